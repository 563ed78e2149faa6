//! Merges element-wise nodes into the one that reads them.
//!
//! before  %h = pointwise %x, %b {$0 + $1}        after  %y = pointwise %x, %b {max($0 + $1, 0.0)}
//!         %y = pointwise %h {max($0, 0.0)}
//!
//! Each element is computed once, so a node is merged only where one other node reads it, as many elements as it
//! makes. No bit of a result changes: an expression that is spliced into another keeps its roundings. What reads a
//! state stays where it is, since the state may be written before the reader runs.

use ir::{Graph, Module, Node, ValueDef, ValueId, joined_origin};
use planfile::{Expr, ExprOp, Op};

use crate::error::PassError;
use crate::pipeline::Settings;
use crate::simplify::dead;

/// Instructions of a merged expression: beyond, its registers no longer fit in the nearest memory.
const MAX_OPS: usize = 256;
/// Operands of a merged expression.
const MAX_OPERANDS: usize = 32;

/// Merges chains of element-wise nodes in every graph.
///
/// # Errors
/// None; the signature is the pipeline's.
pub fn run(mut module: Module, _: &Settings<'_>) -> Result<Module, PassError> {
    module.graphs.iter_mut().for_each(fuse);
    Ok(dead::run(&module))
}

fn fuse(graph: &mut Graph) {
    let mut reads = vec![0u32; graph.values.len()];
    // An operand that a node reads twice has one reader.
    let mut last_reader = vec![usize::MAX; graph.values.len()];
    for (index, node) in graph.nodes.iter().enumerate() {
        for operand in &node.operands {
            if std::mem::replace(&mut last_reader[operand.index()], index) != index {
                reads[operand.index()] += 1;
            }
        }
    }
    for output in &graph.outputs {
        reads[output.value.index()] += 1;
    }
    for index in 0..graph.nodes.len() {
        // What a merged node read may be merged as well: nodes before it have been through this.
        if let Some(node) = merged(graph, &graph.nodes[index], &reads) {
            graph.nodes[index] = node;
        }
    }
}

/// The node with its producers in it, where that is possible for any.
fn merged(graph: &Graph, node: &Node, reads: &[u32]) -> Option<Node> {
    let Op::Pointwise { expr, dims } = &node.op else { return None };
    // Whatever is taken makes it longer.
    if expr.ops.len() > MAX_OPS {
        return None;
    }
    let producers: Vec<Option<(&Expr, &Node)>> = node
        .operands
        .iter()
        .map(|&operand| {
            let ValueDef::Node(id, _) = graph.value(operand).def else { return None };
            let producer = graph.node(id);
            match &producer.op {
                Op::Pointwise { expr, dims: same }
                    if same == dims && reads[operand.index()] == 1 && !reads_state(graph, producer) =>
                {
                    Some((expr, producer))
                }
                _ => None,
            }
        })
        .collect();
    // One after the other, as long as the whole stays small.
    let mut splice = Splice::new(expr, node);
    for (&operand, producer) in node.operands.iter().zip(&producers) {
        let Some((expr, producer)) = producer else { continue };
        if splice.taken.iter().any(|taken| taken.0 == operand) {
            continue;
        }
        if let Some(next) = splice.with(operand, expr, producer) {
            splice = next;
        }
    }
    (!splice.taken.is_empty()).then(|| splice.finish(node))
}

/// Whether the node reads what another may write before its own reader runs.
fn reads_state(graph: &Graph, node: &Node) -> bool {
    node.operands.iter().any(|&operand| matches!(graph.value(operand).def, ValueDef::State(_)))
}

/// An expression, some of whose operands are expressions themselves.
#[derive(Clone)]
struct Splice<'a> {
    expr: &'a Expr,
    node: &'a Node,
    /// Operands and what computes them.
    taken: Vec<(ValueId, &'a Expr, &'a Node)>,
}

impl<'a> Splice<'a> {
    fn new(expr: &'a Expr, node: &'a Node) -> Self {
        Self { expr, node, taken: Vec::new() }
    }

    /// With one more operand computed; `None` when that is too much.
    fn with(&self, operand: ValueId, expr: &'a Expr, producer: &'a Node) -> Option<Self> {
        let mut next = self.clone();
        next.taken.push((operand, expr, producer));
        let (ops, operands) = next.write()?;
        (ops.len() <= MAX_OPS && operands.len() <= MAX_OPERANDS).then_some(next)
    }

    /// Instructions and operands. `None` when there are not enough slots.
    fn write(&self) -> Option<(Vec<ExprOp>, Vec<ValueId>)> {
        let (mut ops, mut operands) = (Vec::new(), Vec::new());
        let number = |operands: &mut Vec<ValueId>, value: ValueId| {
            let known = operands.iter().position(|&known| known == value);
            let position = known.unwrap_or_else(|| {
                operands.push(value);
                operands.len() - 1
            });
            u16::try_from(position).ok()
        };
        let mut free = self.expr.slots();
        // Where the result of each spliced expression is kept for its second use.
        let mut kept: Vec<Option<u8>> = vec![None; self.taken.len()];
        for op in &self.expr.ops {
            let &ExprOp::Operand(index) = op else {
                ops.push(op.clone());
                continue;
            };
            let value = *self.node.operands.get(usize::from(index))?;
            let Some(position) = self.taken.iter().position(|taken| taken.0 == value) else {
                ops.push(ExprOp::Operand(number(&mut operands, value)?));
                continue;
            };
            if let Some(slot) = kept[position] {
                ops.push(ExprOp::Get(slot));
                continue;
            }
            let (_, expr, producer) = self.taken[position];
            let own = free;
            for op in &expr.ops {
                ops.push(match op {
                    ExprOp::Operand(index) => {
                        ExprOp::Operand(number(&mut operands, *producer.operands.get(usize::from(*index))?)?)
                    }
                    ExprOp::Set(slot) => ExprOp::Set(u8::try_from(own + usize::from(*slot)).ok()?),
                    ExprOp::Get(slot) => ExprOp::Get(u8::try_from(own + usize::from(*slot)).ok()?),
                    other => other.clone(),
                });
            }
            free += expr.slots();
            let reads_it = |op: &&ExprOp| matches!(op, ExprOp::Operand(index) if self.node.operands.get(usize::from(*index)) == Some(&value));
            if self.expr.ops.iter().filter(reads_it).count() > 1 {
                let slot = u8::try_from(free).ok()?;
                ops.push(ExprOp::Set(slot));
                kept[position] = Some(slot);
                free += 1;
            }
        }
        Some((ops, operands))
    }

    fn finish(self, node: &Node) -> Node {
        let Some((ops, operands)) = self.write() else { return node.clone() };
        let Op::Pointwise { dims, .. } = &node.op else { return node.clone() };
        let op = Op::Pointwise { expr: Expr { ops }, dims: dims.clone() };
        let origins = self.taken.iter().map(|(_, _, producer)| &producer.origin);
        let origin = joined_origin(origins.chain([&node.origin]));
        Node { op, operands, results: node.results.clone(), origin }
    }
}

#[cfg(test)]
mod tests {
    use ir::text::{graph_text, parse_lines};
    use ir::verify::verify;

    use super::*;

    #[track_caller]
    fn check(before: &str, after: &str) {
        let mut fused = parse_lines(before).unwrap();
        fused.graphs.iter_mut().for_each(fuse);
        let fused = dead::run(&fused);
        verify(&fused).unwrap();
        let expected = dead::run(&parse_lines(after).unwrap());
        assert_eq!(graph_text(&fused, &fused.graphs[0]), graph_text(&expected, &expected.graphs[0]));
    }

    #[track_caller]
    fn check_unchanged(text: &str) {
        check(text, text);
    }

    #[test]
    fn chains_become_one_node() {
        check(
            "%x: f32[2, 3]
             %b: f32[3]
             %h: f32[2, 3] = pointwise %x, %b {$0 + $1}
             %i = pointwise %h {exp($0)}
             %y = pointwise %i, %x {$0 * $1}
             return %y",
            "%x: f32[2, 3]
             %b: f32[3]
             %y: f32[2, 3] = pointwise %x, %b {exp($0 + $1) * $0}
             return %y",
        );
    }

    #[test]
    fn what_is_read_twice_is_computed_once() {
        let mut fused = parse_lines(
            "%x: f32[3]
             %h = pointwise %x {exp($0)}
             %y = pointwise %h, %h {$0 * $1 + $0}
             return %y",
        )
        .unwrap();
        fused.graphs.iter_mut().for_each(fuse);
        let fused = dead::run(&fused);
        verify(&fused).unwrap();
        let [Node { op: Op::Pointwise { expr, .. }, .. }] = fused.graphs[0].nodes.as_slice() else { panic!("{fused}") };
        let exponentials = expr.ops.iter().filter(|op| matches!(op, ExprOp::Unary(_))).count();
        assert_eq!((exponentials, expr.slots()), (1, 1), "{fused}");
        let x = planfile::Tensor::from_elements(&[3], &[0.0f32, 1.0, -2.0]).unwrap();
        let y = cpu::evaluate(&fused.graphs[0].nodes[0].op, &[&x]).unwrap();
        let y = y[0].elements::<f32>().unwrap();
        let close = |(y, x): (&f32, f32)| (y - (x.exp() * x.exp() + x.exp())).abs() < 1e-5;
        assert!(y.iter().zip([0.0, 1.0, -2.0]).all(close), "{y:?}");
    }

    #[test]
    fn other_readers_keep_a_node() {
        check_unchanged(
            "%x: f32[3]
             %h = pointwise %x {exp($0)}
             %y = pointwise %h {$0 + 1.0}
             %z: f32[] = reduce %h {sum [0]}
             return %y, %z",
        );
        check_unchanged(
            "%x: f32[3]
             %h = pointwise %x {exp($0)}
             %y = pointwise %h {$0 + 1.0}
             return %y, %h",
        );
    }

    #[test]
    fn a_smaller_operand_is_not_computed_for_each_row() {
        check_unchanged(
            "%x: f32[2, 3]
             %b: f32[3]
             %h = pointwise %b {exp($0)}
             %y: f32[2, 3] = pointwise %x, %h {$0 + $1}
             return %y",
        );
    }

    #[test]
    fn readers_of_a_wide_node_are_counted_once_each() {
        // Comparing each operand with those before it would be twenty thousand million comparisons.
        const OPERANDS: usize = 200_000;
        let ty = planfile::TensorType::new(planfile::DType::F32, &[1]);
        let mut module = parse_lines("%x: f32[1]\n%y = concat %x, %x {axis 0}\nreturn %y").unwrap();
        let graph = &mut module.graphs[0];
        let operands = (1..OPERANDS as u32).map(|input| graph.add_source(ty.clone(), ValueDef::Input(input)));
        graph.nodes[0].operands = operands.collect();
        fuse(graph);
        assert_eq!(graph.nodes[0].operands.len(), OPERANDS - 1);
    }

    #[test]
    fn merged_expressions_stay_small() {
        let mut text = "%x0: f32[3]\n".to_owned();
        for i in 0..MAX_OPS {
            text.push_str(&format!("%x{} = pointwise %x{i} {{exp($0)}}\n", i + 1));
        }
        let mut module = parse_lines(&format!("{text} return %x{MAX_OPS}")).unwrap();
        module.graphs.iter_mut().for_each(fuse);
        let module = dead::run(&module);
        verify(&module).unwrap();
        assert_eq!(module.graphs[0].nodes.len(), 2);
    }
}
