//! What a mesh splits of a module, what stays whole on every device, and why.
//!
//! Read off the module after it was placed, beside the one before: an axis is used as many ways as the finest split over
//! it, and what no split touches is whole.

use std::collections::BTreeMap;

use ir::{Graph, Mesh, MeshAxis, Module, Node, ValueDef, ValueId, WeightId};
use planfile::text::count;
use planfile::{Op, Target};

use super::batch_size;
use super::factors::{Kind, factors};
use super::hints::hints;
use crate::cost;
use crate::settings::ShardOptions;

/// An axis of the mesh that does less than its size says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdleAxis {
    pub axis: String,
    pub size: u32,
    /// How many ways it splits what it splits most: 1 where it splits nothing.
    pub ways: u64,
    /// A clause: `a batch of 1 cannot be split`.
    pub why: String,
}

impl IdleAxis {
    /// A sentence.
    pub fn text(&self) -> String {
        let Self { axis, size, ways, why } = self;
        match ways {
            1 => format!("{axis}={size} splits nothing: {why}"),
            _ => format!("{axis}={size} splits only {ways} ways, so that devices do the same work: {why}"),
        }
    }
}

/// Axes of the mesh that split nothing, or in fewer parts than they have devices.
pub fn idle_axes(module: &Module, placed: &Module, options: &ShardOptions) -> Vec<IdleAxis> {
    let mesh = &placed.mesh;
    let idle = |axis: &MeshAxis| {
        let ways = match axis.name.as_str() {
            "pipe" => stages_with_work(placed),
            _ => ways(placed, mesh, &axis.name),
        };
        let why = || match axis.name.as_str() {
            "data" => why_not_data(module, axis, options),
            "pipe" => "the model has too few operations to cut it in as many stages".to_owned(),
            _ => why_not_tensor(module, axis),
        };
        (ways < u64::from(axis.size())).then(|| IdleAxis {
            axis: axis.name.clone(),
            size: axis.size(),
            ways,
            why: why(),
        })
    };
    mesh.axes.iter().filter_map(idle).collect()
}

/// The most parts that any value has over this axis.
fn ways(placed: &Module, mesh: &Mesh, axis: &str) -> u64 {
    let axis = mesh.axis(axis);
    let values = placed.graphs.iter().flat_map(|graph| graph.values());
    let splits = values.filter_map(|value| value.shard.as_ref()).flat_map(|shard| &shard.placement.splits);
    splits.map(|split| mesh.chunks(split.over.intersection(axis))).max().unwrap_or(1)
}

/// Stages of the entry that has most of them with work to do.
fn stages_with_work(placed: &Module) -> u64 {
    let busy = |graph: &Graph| graph.nodes().iter().any(|node| !matches!(node.op, Op::Send { .. } | Op::Recv { .. }));
    let stages = |entry: &ir::Entry| entry.stages.iter().filter(|&&stage| busy(placed.graph(stage))).count() as u64;
    placed.entries.iter().map(stages).max().unwrap_or(1).max(1)
}

fn why_not_data(module: &Module, axis: &MeshAxis, options: &ShardOptions) -> String {
    let dim = options.batch_dim;
    match module.entries.iter().filter_map(|entry| batch_size(entry, dim)).min() {
        None => format!("no input has a dimension {dim} to take for the batch"),
        Some(batch) => {
            format!("a batch of {batch} (dimension {dim} of the inputs) cannot be split {} ways", axis.size())
        }
    }
}

/// The widest product with a weight that could be split, by columns in the units that must stay together.
fn why_not_tensor(module: &Module, axis: &MeshAxis) -> String {
    let mut widest: Option<(u64, String, u64)> = None;
    let mut recurrent = false;
    for graph in &module.graphs {
        let hints = hints(graph);
        for node in graph.nodes() {
            recurrent |= matches!(node.op, Op::Recurrence { .. });
            if !is_product_with_weight(graph, node) {
                continue;
            }
            let types = |values: &[ValueId]| values.iter().map(|&value| graph.ty(value)).collect::<Vec<_>>();
            let table = factors(&node.op, &types(&node.operands), &types(&node.results));
            let Some(dims) = table.results.first() else { continue };
            for (dim, along) in dims.iter().enumerate().skip(1) {
                let Some(along) = along.filter(|along| table.factors[along.factor].kind == Kind::Parallel) else {
                    continue;
                };
                // Columns are what a weight has, not the rows of the activation.
                let of_weight = node.operands.iter().zip(&table.operands).any(|(&operand, dims)| {
                    is_weight(graph, operand) && dims.iter().flatten().any(|other| other.factor == along.factor)
                });
                let size = graph.ty(node.results[0]).size(dim);
                let segments = hints.segments(node.results[0], dim, size);
                let parts = segments.iter().map(|segment| segment.size / segment.unit.max(1)).min().unwrap_or(0);
                if of_weight && widest.as_ref().is_none_or(|(most, ..)| parts > *most) {
                    let name = node.origin.first().map_or_else(|| node.op.name().to_owned(), ToString::to_string);
                    widest = Some((parts, name, size));
                }
            }
        }
    }
    let size = u64::from(axis.size());
    match widest {
        None if recurrent => "recurrent layers are not split, and there are no other products with weights".to_owned(),
        None => "there are no products with weights".to_owned(),
        Some((parts, name, columns)) if parts < size && parts == columns => {
            format!("the widest product with weights (`{name}`) has {}", count(columns, "column"))
        }
        Some((parts, name, columns)) if parts < size => {
            format!(
                "the widest product with weights (`{name}`) has {columns} columns in {parts} parts that stay together"
            )
        }
        Some((_, name, _)) => {
            format!("what products with weights such as `{name}` compute is needed whole by what reads it")
        }
    }
}

fn is_weight(graph: &Graph, value: ValueId) -> bool {
    matches!(graph.value(value).def, ValueDef::Weight(_))
}

fn is_product_with_weight(graph: &Graph, node: &Node) -> bool {
    matches!(node.op, Op::Dot { .. } | Op::Conv { .. })
        && node.operands.iter().filter(|&&operand| is_weight(graph, operand)).count() == 1
}

/// What of a module no split touches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Whole {
    /// Shares of the weights' bytes and of the arithmetic operations, from 0 to 1.
    pub weights: f64,
    pub operations: f64,
    /// What they are of, the most first: a kind of weight, and its share of all weights' bytes.
    pub weight_kinds: Vec<(&'static str, f64)>,
    /// Primitives, and their share of all operations.
    pub operation_kinds: Vec<(&'static str, f64)>,
}

/// Kinds of what stays whole that are named.
const NAMED_KINDS: usize = 3;
/// A share below this is not worth a word.
const WORTH_A_WORD: f64 = 0.005;

/// What stays whole on each device that holds it: on every device, or on every device of a stage.
pub fn whole(module: &Module, placed: &Module, target: &Target) -> Whole {
    let mut weights: BTreeMap<WeightId, (u64, Option<&'static str>)> = BTreeMap::new();
    let (mut operations, mut by_primitive) = (0u64, BTreeMap::<&'static str, u64>::new());
    for graph in &placed.graphs {
        let is_split = |value: ValueId| {
            let shard = graph.value(value).shard.as_ref();
            shard.is_some_and(|shard| !shard.placement.splits.is_empty() || shard.placement.partial.is_some())
        };
        for node in graph.nodes() {
            for &operand in &node.operands {
                let value = graph.value(operand);
                if let ValueDef::Weight(weight) = value.def {
                    let kind = (!is_split(operand)).then(|| weight_kind(&node.op));
                    let bytes = module.weights.get(weight.index()).and_then(|weight| weight.ty.bytes()).unwrap_or(0);
                    // A weight that one reader splits is stored whole for the other.
                    let known = weights.entry(weight).or_insert((bytes, kind));
                    known.1 = known.1.or(kind);
                }
            }
            if !node.operands.iter().chain(&node.results).any(|&value| is_split(value)) {
                let own = cost::node(graph, node, target).operations;
                operations = operations.saturating_add(own);
                *by_primitive.entry(node.op.name()).or_default() += own;
            }
        }
    }
    let nodes = module.graphs.iter().flat_map(|graph| graph.nodes().iter().map(move |node| (graph, node)));
    let all_operations: u64 = nodes.map(|(graph, node)| cost::node(graph, node, target).operations).sum();
    let all_weights: u64 = weights.values().map(|(bytes, _)| bytes).sum();
    let mut by_kind: BTreeMap<&'static str, u64> = BTreeMap::new();
    for (bytes, kind) in weights.values() {
        if let Some(kind) = kind {
            *by_kind.entry(kind).or_default() += bytes;
        }
    }
    let share = |part: u64, all: u64| if all == 0 { 0.0 } else { (part as f64 / all as f64).min(1.0) };
    let shares = |parts: BTreeMap<&'static str, u64>, all: u64| {
        let mut shares: Vec<(&'static str, f64)> =
            parts.into_iter().map(|(kind, part)| (kind, share(part, all))).collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares.retain(|(_, share)| *share >= WORTH_A_WORD);
        shares.truncate(NAMED_KINDS);
        shares
    };
    Whole {
        weights: share(by_kind.values().sum(), all_weights),
        operations: share(operations, all_operations),
        weight_kinds: shares(by_kind, all_weights),
        operation_kinds: shares(by_primitive, all_operations),
    }
}

/// What a weight is, by what reads it, and why it may be whole.
fn weight_kind(op: &Op) -> &'static str {
    match op {
        Op::Dot { .. } | Op::Conv { .. } => "products that are too narrow or whose readers need them whole",
        Op::Gather { .. } | Op::GatherElements { .. } | Op::GatherNd { .. } => "look-up tables that are small",
        Op::Recurrence { .. } => "recurrent layers, which are not split",
        Op::Norm { .. } | Op::Pointwise { .. } => "vectors of norms and biases",
        _ => "others",
    }
}

impl Whole {
    /// A sentence; none where all is split.
    pub fn text(&self, mesh: &Mesh) -> Option<String> {
        if self.weights < WORTH_A_WORD && self.operations < WORTH_A_WORD {
            return None;
        }
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        let list = |kinds: &[(&'static str, f64)]| -> String {
            kinds.iter().map(|(kind, share)| format!("{kind} ({})", percent(*share))).collect::<Vec<_>>().join(", ")
        };
        let (has_tensor, has_stages) = (!mesh.axis("tensor").is_empty(), !mesh.axis("pipe").is_empty());
        let everywhere = if has_stages { "every device of a stage" } else { "every device" };
        let mut text = format!(
            "{} of the weights and {} of the operations stay whole on {everywhere}",
            percent(self.weights),
            percent(self.operations)
        );
        if !has_tensor {
            text.push_str(", because only the axis `tensor` splits weights");
        } else if !self.weight_kinds.is_empty() {
            text.push_str(&format!("; weights: {}", list(&self.weight_kinds)));
        }
        if !self.operation_kinds.is_empty() {
            text.push_str(&format!("; operations: {}", list(&self.operation_kinds)));
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{CPU, Machine};
    use crate::shard::{parse_mesh, place};

    /// Idle axes, and the sentence about what stays whole, of `y = x · w` on a mesh.
    fn product(rows: u64, columns: u64, mesh: &str) -> (Vec<IdleAxis>, Option<String>) {
        let text = format!(
            "module \"m\"\n\
             weight w0 \"w\": f32[8, {columns}] = random 1\n\
             entry \"main\" (x: f32[{rows}, 8]) -> (y: f32[{rows}, {columns}]) = @main\n\
             graph @main (%0: f32[{rows}, 8]) {{\n  \
               %1: f32[8, {columns}] = weight w0 \"w\"\n  \
               %2: f32[{rows}, {columns}] = dot %0, %1 {{contract [1]x[0]}}   # /fc/MatMul\n  \
               return %2\n\
             }}\n"
        );
        let module = ir::text::parse(&text).unwrap();
        let mesh = parse_mesh(mesh).unwrap();
        let machine = Machine::new(CPU).with_mesh(mesh.clone());
        let settings = machine.settings();
        let placed = place(module.clone(), mesh.clone(), &settings).unwrap();
        (idle_axes(&module, &placed, &settings.shard), whole(&module, &placed, settings.target).text(&mesh))
    }

    fn why(rows: u64, columns: u64, mesh: &str) -> Vec<String> {
        product(rows, columns, mesh).0.iter().map(IdleAxis::text).collect()
    }

    #[test]
    fn axes_that_split_are_not_mentioned() {
        assert_eq!(product(4, 16, "data=2,tensor=2"), (vec![], None));
    }

    #[test]
    fn axes_that_split_nothing_say_why() {
        let batch = "data=2 splits nothing: a batch of 1 (dimension 0 of the inputs) cannot be split 2 ways";
        assert_eq!(why(1, 16, "data=2"), [batch]);
        let narrow = "tensor=4 splits nothing: the widest product with weights (`/fc/MatMul`) has 1 column";
        assert_eq!(why(4, 1, "tensor=4"), [narrow]);
        let [part] = &why(4, 3, "tensor=4")[..] else { panic!("one axis") };
        assert!(part.starts_with("tensor=4 splits only 2 ways") && part.ends_with("has 3 columns"), "{part}");
        let [few] = &why(4, 16, "pipe=3")[..] else { panic!("one axis") };
        assert!(few.starts_with("pipe=3 splits nothing") && few.contains("stages"), "{few}");
        let [part] = &why(2, 16, "data=6")[..] else { panic!("one axis") };
        assert!(part.starts_with("data=6 splits only 2 ways"), "{part}");
        assert_eq!(why(1, 3, "data=2,tensor=4").len(), 2);
    }

    #[test]
    fn what_stays_whole_is_said() {
        let batch = product(4, 16, "data=2").1.unwrap();
        assert!(
            batch.starts_with("100 % of the weights and 0 % of the operations stay whole on every device"),
            "{batch}"
        );
        let narrow = product(4, 1, "tensor=4").1.unwrap();
        assert!(narrow.contains("100 % of the weights and 100 % of the operations"), "{narrow}");
        assert!(narrow.contains("products that are too narrow") && narrow.contains("dot (100 %)"), "{narrow}");
    }
}
