//! Merges element-wise nodes into the one that reads them.
//!
//! before  %h = pointwise %x, %b {$0 + $1}        after  %y = pointwise %x, %b {max($0 + $1, 0.0)}
//!         %y = pointwise %h {max($0, 0.0)}
//!
//! Each element is computed once, so a node is merged only where one other node reads it, as many elements as it
//! makes. No bit of a result changes: an expression that is spliced into another keeps its roundings. What reads a
//! state stays where it is, since the state may be written before the reader runs.

use ir::{Edit, Graph, IrError, Node, ValueDef, ValueId, joined_origin};
use planfile::{Expr, ExprOp, Op};

use crate::error::PassError;
use crate::phase::Sharded;
use crate::settings::Settings;

/// Instructions of a merged expression: beyond, its registers no longer fit in the nearest memory.
const MAX_OPS: usize = 256;
/// Operands of a merged expression.
const MAX_OPERANDS: usize = 32;

/// Merges chains of element-wise nodes in every graph.
///
/// # Errors
/// [`PassError::Ir`] if a type does not follow.
pub fn run(Sharded(module): Sharded, _: &Settings<'_>) -> Result<Sharded, PassError> {
    Ok(Sharded(module.rewrite(merged)?))
}

/// The node with its producers in it, where that is possible for any. They have been through this, so what they read
/// may be in them.
fn merged(edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, IrError> {
    let Op::Pointwise { expr, dims } = &node.op else { return edit.keep(node) };
    // Whatever is taken makes it longer.
    if expr.ops.len() > MAX_OPS || node.operands.len() > MAX_OPS {
        return edit.keep(node);
    }
    let (old, operands) = (edit.old(), edit.operands(node)?);
    let graph = edit.new_graph();
    // One after the other, as long as the whole stays small.
    let mut splice = Splice { expr, operands: &operands, taken: Vec::new() };
    let mut written = None;
    for (&before, &operand) in node.operands.iter().zip(&operands) {
        let Some(producer) = graph.producer(operand) else { continue };
        let Op::Pointwise { expr, dims: same } = &producer.op else { continue };
        // An operand that a node reads twice has one reader.
        let own = node.operands.iter().filter(|&&other| other == before).count();
        let alone = old.reads(before) as usize == own && !splice.taken.iter().any(|taken| taken.0 == operand);
        if alone
            && same == dims
            && !reads_state(graph, producer)
            && let Some((next, text)) = splice.with(operand, expr, producer)
        {
            (splice, written) = (next, Some(text));
        }
    }
    let Some((ops, read)) = written else { return edit.keep(node) };
    let origins = splice.taken.iter().map(|(_, _, producer)| &producer.origin);
    let origin = joined_origin(origins.chain([&node.origin]));
    let taken: Vec<ValueId> = splice.taken.iter().map(|taken| taken.0).collect();
    // In a chain each link holds all that is before it.
    taken.into_iter().for_each(|value| edit.empty(value));
    edit.add(Op::Pointwise { expr: Expr { ops }, dims: dims.clone() }, &read, &origin)
}

/// Whether the node reads what another may write before its own reader runs.
fn reads_state(graph: &Graph, node: &Node) -> bool {
    node.operands.iter().any(|&operand| matches!(graph.value(operand).def, ValueDef::State(_)))
}

/// Instructions and operands.
type Written = (Vec<ExprOp>, Vec<ValueId>);

/// An expression, some of whose operands are expressions themselves.
#[derive(Clone)]
struct Splice<'a> {
    expr: &'a Expr,
    operands: &'a [ValueId],
    /// Operands and what computes them.
    taken: Vec<(ValueId, &'a Expr, &'a Node)>,
}

impl<'a> Splice<'a> {
    /// With one more operand computed, and what it is then; `None` when that is too much.
    fn with(&self, operand: ValueId, expr: &'a Expr, producer: &'a Node) -> Option<(Self, Written)> {
        let mut next = self.clone();
        next.taken.push((operand, expr, producer));
        let (ops, operands) = next.write()?;
        (ops.len() <= MAX_OPS && operands.len() <= MAX_OPERANDS).then_some((next, (ops, operands)))
    }

    /// Instructions and operands. `None` when there are not enough slots.
    fn write(&self) -> Option<Written> {
        // Room for all of it at once: growing bit by bit, links of a chain leave holes of every size behind.
        let parts = self.taken.iter().map(|(_, expr, _)| expr.ops.len() + 1).sum::<usize>();
        let (mut ops, mut operands) = (Vec::with_capacity(self.expr.ops.len() + parts), Vec::new());
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
            let value = *self.operands.get(usize::from(index))?;
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
            let reads_it = |op: &&ExprOp| matches!(op, ExprOp::Operand(index) if self.operands.get(usize::from(*index)) == Some(&value));
            if self.expr.ops.iter().filter(reads_it).count() > 1 {
                let slot = u8::try_from(free).ok()?;
                ops.push(ExprOp::Set(slot));
                kept[position] = Some(slot);
                free += 1;
            }
        }
        Some((ops, operands))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{CPU, Case};

    fn case() -> Case<Sharded> {
        Case::new(run, CPU)
    }

    #[test]
    fn chains_become_one_node() {
        case().check(
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
        let fused = case().run(
            "%x: f32[3]
             %h = pointwise %x {exp($0)}
             %y = pointwise %h, %h {$0 * $1 + $0}
             return %y",
        );
        let [Node { op: Op::Pointwise { expr, .. }, .. }] = fused.graphs[0].nodes() else { panic!("{fused}") };
        let exponentials = expr.ops.iter().filter(|op| matches!(op, ExprOp::Unary(_))).count();
        assert_eq!((exponentials, expr.slots()), (1, 1), "{fused}");
    }

    #[test]
    fn other_readers_keep_a_node() {
        case().check_unchanged(
            "%x: f32[3]
             %h = pointwise %x {exp($0)}
             %y = pointwise %h {$0 + 1.0}
             %z: f32[] = reduce %h {sum [0]}
             return %y, %z",
        );
        case().check_unchanged(
            "%x: f32[3]
             %h = pointwise %x {exp($0)}
             %y = pointwise %h {$0 + 1.0}
             return %y, %h",
        );
    }

    #[test]
    fn a_smaller_operand_is_not_computed_for_each_row() {
        case().check_unchanged(
            "%x: f32[2, 3]
             %b: f32[3]
             %h = pointwise %b {exp($0)}
             %y: f32[2, 3] = pointwise %x, %h {$0 + $1}
             return %y",
        );
    }

    #[test]
    fn merged_expressions_stay_small() {
        let mut text = "%x0: f32[3]\n".to_owned();
        for i in 0..MAX_OPS {
            text.push_str(&format!("%x{} = pointwise %x{i} {{exp($0)}}\n", i + 1));
        }
        let module = case().run(&format!("{text} return %x{MAX_OPS}"));
        assert_eq!(module.graphs[0].nodes().len(), 2);
    }
}
