//! Writes down what was decided: programs, kernels, weight placement, explanations.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ir::{Graph, Node, Placement, ValueDef, ValueId, WeightId};
use planfile::fingerprint::Fingerprint;
use planfile::plan::{
    Action, Argument, Binding, CollectiveAlgorithm, Explanations, Implementation, Kernel, LinkRequirement, Manifest,
    Place, PlacedWeight, Plan, PlanAxis, PlanEntry, PlanPiece, PlanPort, PlanState, PlanWeight, Program, SplitDim,
    Step, TargetRef,
};
use planfile::{Op, Spec, SpecNode, Target, TensorType};

use crate::cost;
use crate::error::PassError;
use crate::schedule::{ALIGN, Schedule, Scheduled, is_view};

/// Makes the plan. Explanations of the sharding are the caller's to add.
///
/// # Errors
/// [`PassError::Invalid`]: an earlier pass left something undecided.
pub fn run(scheduled: &Scheduled, target: &Target) -> Result<Plan, PassError> {
    let module = &scheduled.module;
    let ranks = module.mesh.ranks();
    let mut lowering = Lowering {
        scheduled,
        target,
        kernels: Vec::new(),
        kernel_index: HashMap::new(),
        names: Vec::new(),
        name_index: HashMap::new(),
        placed: Vec::new(),
        placed_index: BTreeMap::new(),
        arena_bytes: vec![0; ranks as usize],
    };
    let (mut programs, mut entries) = (Vec::new(), Vec::new());
    for (entry_index, entry) in module.entries.iter().enumerate() {
        let first = programs.len() as u32;
        for (stage, &graph) in entry.stages.iter().enumerate() {
            let schedule = &scheduled.schedules[graph.index()];
            programs.push(lowering.program(entry_index as u32, stage as u32, module.graph(graph), schedule)?);
        }
        let own = programs[first as usize..].iter();
        let port = |port: &ir::Port| PlanPort { name: port.name.clone(), ty: port.ty.clone() };
        entries.push(PlanEntry {
            name: entry.name.clone(),
            inputs: entry.inputs.iter().map(port).collect(),
            outputs: entry.outputs.iter().map(port).collect(),
            pinned: entry.pinned.clone(),
            programs: (first..programs.len() as u32).collect(),
            predicted_ns: own.flat_map(|program| &program.steps).map(|step| step.cost.predicted_ns).sum(),
        });
    }
    let links = links(&programs, target);
    let (placed, image_bytes) = lay_out_image(lowering.placed, ranks);
    // Weights that no program reads any more are not part of the plan.
    let mut kept = BTreeMap::new();
    for weight in &placed {
        let next = kept.len() as u32;
        kept.entry(weight.weight).or_insert(next);
    }
    let weights = {
        let mut order: Vec<(&u32, &u32)> = kept.iter().collect();
        order.sort_by_key(|(_, new)| **new);
        let weight = |(old, _): (&u32, &u32)| {
            let weight = module.weight(WeightId(*old));
            PlanWeight { name: weight.name.clone(), ty: weight.ty.clone(), recipe: weight.recipe.clone() }
        };
        order.into_iter().map(weight).collect()
    };
    let placed = placed.into_iter().map(|placed| PlacedWeight { weight: kept[&placed.weight], ..placed }).collect();
    let axis = |axis: &ir::MeshAxis| PlanAxis { name: axis.name.clone(), size: axis.size() };
    let manifest = Manifest {
        producer: concat!("planwright ", env!("CARGO_PKG_VERSION")).to_owned(),
        model: module.name.clone(),
        files: module.files.clone(),
        // Who reads the files knows: the compiler fills it in.
        fingerprint: Fingerprint::default(),
        mesh: module.mesh.axes.iter().map(axis).collect(),
        ranks,
        target: TargetRef { name: target.name.clone(), architecture: CPU.to_owned() },
        entries,
        weights,
        placed,
        weight_arena_bytes: lowering.arena_bytes,
        image_bytes,
        states: states(module),
        links,
    };
    let explanations = Explanations { names: lowering.names, ..Explanations::default() };
    Ok(Plan { manifest, programs, kernels: lowering.kernels, code: Vec::new(), explanations })
}

/// The architecture of plans whose kernels are their specifications, executed on the host.
pub(crate) const CPU: &str = "cpu";

fn states(module: &ir::Module) -> Vec<PlanState> {
    let mut offset = 0u64;
    let place = |state: &ir::State| {
        let arena_offset = offset;
        offset = (offset + state.ty.bytes().unwrap_or(0)).next_multiple_of(ALIGN);
        PlanState { name: state.name.clone(), ty: state.ty.clone(), extent: state.extent, arena_offset }
    };
    module.states.iter().map(place).collect()
}

/// The links between ranks that exchange data.
fn links(programs: &[Program], target: &Target) -> Vec<LinkRequirement> {
    let mut pairs = BTreeSet::new();
    for program in programs {
        for step in &program.steps {
            let Action::Collective { op, .. } = &step.action else { continue };
            match op {
                Op::AllReduce { groups, .. }
                | Op::AllGather { groups, .. }
                | Op::ReduceScatter { groups, .. }
                | Op::AllToAll { groups, .. } => {
                    for group in groups {
                        pairs.extend(
                            group.iter().flat_map(|&a| group.iter().filter(move |&&b| a < b).map(move |&b| (a, b))),
                        );
                    }
                }
                Op::Send { peers, .. } | Op::Recv { peers, .. } => {
                    let ordered = program.ranks.iter().zip(peers).map(|(&a, &b)| (a.min(b), a.max(b)));
                    pairs.extend(ordered);
                }
                _ => {}
            }
        }
    }
    let class = |(a, b): (u32, u32)| {
        let link = *target.topology.get(a as usize)?.get(b as usize)?;
        let class = target.links.get(link as usize)?.name.clone();
        Some(LinkRequirement { ranks: (a, b), class })
    };
    pairs.into_iter().filter_map(class).collect()
}

struct Lowering<'a> {
    scheduled: &'a Scheduled,
    target: &'a Target,
    kernels: Vec<Kernel>,
    kernel_index: HashMap<Spec, u32>,
    names: Vec<String>,
    name_index: HashMap<String, u32>,
    placed: Vec<PlacedWeight>,
    placed_index: BTreeMap<(u32, WeightId, Placement), usize>,
    /// Of each rank's weight arena.
    arena_bytes: Vec<u64>,
}

impl Lowering<'_> {
    fn program(&mut self, entry: u32, stage: u32, graph: &Graph, schedule: &Schedule) -> Result<Program, PassError> {
        let ranks = graph.ranks.clone();
        let (mut inputs, mut outputs, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        for (index, value) in graph.values.iter().enumerate() {
            if let ValueDef::Input(port) = value.def {
                let place = self.place(graph, schedule, stage, ValueId(index as u32))?;
                inputs.push(Binding { port, place, splits: self.splits(value, &ranks) });
            }
        }
        let steps_of =
            graph.nodes.iter().zip(&schedule.absorbed).filter(|(node, absorbed)| !is_view(node) && !**absorbed);
        for (node, _) in steps_of {
            steps.push(self.step(graph, schedule, stage, node)?);
        }
        for (&value, &offset) in &schedule.copies {
            let from = self.place(graph, schedule, stage, value)?;
            let to = Place { ty: from.ty.clone(), at: Argument::Arena { offset } };
            let bytes = from.ty.bytes().unwrap_or(0);
            let predicted = (2 * bytes) as f64 / self.target.device.memory_bytes_per_second;
            let cost = planfile::plan::StepCost {
                predicted_ns: predicted.mul_add(1e9, self.target.device.launch_ns).round() as u64,
                memory_bytes: 2 * bytes,
                ..Default::default()
            };
            steps.push(Step { action: Action::Copy { from, to }, stream: 0, waits: vec![], origin: vec![], cost });
        }
        for output in &graph.outputs {
            let mut place = self.place(graph, schedule, stage, output.value)?;
            if let Some(&offset) = schedule.copies.get(&output.value) {
                place.at = Argument::Arena { offset };
            }
            let splits = self.splits(graph.value(output.value), &ranks);
            outputs.push(Binding { port: output.position, place, splits });
        }
        Ok(Program {
            entry,
            stage,
            ranks,
            inputs,
            outputs,
            steps,
            arena_bytes: schedule.arena_bytes,
            peer_arena_bytes: 0,
            streams: 1,
        })
    }

    fn step(&mut self, graph: &Graph, schedule: &Schedule, stage: u32, node: &Node) -> Result<Step, PassError> {
        let mut places = |values: &[ValueId]| -> Result<Vec<Place>, PassError> {
            values.iter().map(|&value| self.place(graph, schedule, stage, value)).collect()
        };
        let (sources, layout) = sources(graph, schedule, node);
        let (operands, results) = (places(&sources)?, places(&node.results)?);
        let action = if node.op.is_collective() {
            Action::Collective { op: node.op.clone(), operands, results, algorithm: CollectiveAlgorithm::Host }
        } else {
            let types = operands.iter().map(|place| place.ty.clone()).collect();
            let spec = specification(node, types, &layout).map_err(|why| PassError::invalid("lower", why))?;
            let kernel = self.kernel(spec, node.op.name());
            Action::Launch { kernel, operands, results, scalars: vec![], launch: None }
        };
        let names = node.origin.iter().filter(|name| !name.is_empty());
        let origin = names.map(|name| self.name(name)).collect();
        Ok(Step { action, stream: 0, waits: vec![], origin, cost: cost::node(graph, node, self.target) })
    }

    fn kernel(&mut self, spec: Spec, op: &str) -> u32 {
        if let Some(&known) = self.kernel_index.get(&spec) {
            return known;
        }
        let index = self.kernels.len() as u32;
        let name = format!("{op}_{index}");
        self.kernel_index.insert(spec.clone(), index);
        self.kernels.push(Kernel { name, spec, implementation: Implementation::Reference });
        index
    }

    fn name(&mut self, name: &str) -> u32 {
        if let Some(&known) = self.name_index.get(name) {
            return known;
        }
        let index = self.names.len() as u32;
        self.name_index.insert(name.to_owned(), index);
        self.names.push(name.to_owned());
        index
    }

    fn place(&mut self, graph: &Graph, schedule: &Schedule, stage: u32, value: ValueId) -> Result<Place, PassError> {
        let root = schedule.root[value.index()];
        let at = match graph.value(root).def {
            ValueDef::Weight(weight) => Argument::Weights { offset: self.weight(graph, stage, weight, root)? },
            ValueDef::State(state) => Argument::State { state: state.0, offset: 0 },
            ValueDef::Input(_) | ValueDef::Node(..) => {
                let offset = schedule.offsets.get(&root).copied();
                Argument::Arena {
                    offset: offset.ok_or_else(|| PassError::invalid("lower", format!("{root} has no memory")))?,
                }
            }
        };
        Ok(Place { ty: graph.ty(value).clone(), at })
    }

    /// Offset of a weight, placed as the value says, in the arenas of the stage's ranks.
    fn weight(&mut self, graph: &Graph, stage: u32, weight: WeightId, value: ValueId) -> Result<u64, PassError> {
        let local = graph.value(value);
        let placement = local.shard.as_ref().map(|shard| shard.placement.clone()).unwrap_or_default();
        let key = (stage, weight, placement);
        if let Some(&known) = self.placed_index.get(&key) {
            return Ok(self.placed[known].arena_offset);
        }
        let used = graph.ranks.iter().filter_map(|&rank| self.arena_bytes.get(rank as usize)).max();
        let arena_offset = used.copied().unwrap_or(0).next_multiple_of(ALIGN);
        let bytes = local.ty.bytes().ok_or_else(|| PassError::invalid("lower", format!("{value} is too large")))?;
        for &rank in &graph.ranks {
            self.arena_bytes[rank as usize] = arena_offset + bytes;
        }
        self.placed_index.insert(key, self.placed.len());
        self.placed.push(PlacedWeight {
            weight: weight.0,
            stage,
            ranks: graph.ranks.clone(),
            ty: local.ty.clone(),
            arena_offset,
            splits: self.splits(local, &graph.ranks),
            images: Vec::new(),
        });
        Ok(arena_offset)
    }

    /// The pieces of every split dimension, for each of the ranks.
    fn splits(&self, value: &ir::Value, ranks: &[u32]) -> Vec<SplitDim> {
        let mesh = &self.scheduled.module.mesh;
        let Some(shard) = &value.shard else { return Vec::new() };
        let plan_piece = |piece: &ir::Piece| PlanPiece { global: piece.global, local: piece.local, len: piece.len };
        let pieces = |split: &ir::Split, rank: u32| {
            // Ranks beyond the last unit hold padding alone.
            split.pieces(mesh, rank).iter().filter(|piece| piece.len > 0).map(plan_piece).collect()
        };
        let dim = |split: &ir::Split| SplitDim {
            dim: split.dim,
            pieces: ranks.iter().map(|&rank| pieces(split, rank)).collect(),
        };
        shard.placement.splits.iter().map(dim).collect()
    }
}

/// What a node's kernel reads, and what it does first to its second operand: nodes that the schedule has absorbed.
fn sources<'a>(graph: &'a Graph, schedule: &Schedule, node: &Node) -> (Vec<ValueId>, Vec<&'a Op>) {
    let (mut sources, mut layout) = (node.operands.clone(), Vec::new());
    while let Some(operand) = sources.get_mut(1)
        && let ValueDef::Node(id, _) = graph.value(*operand).def
        && schedule.absorbed[id.index()]
    {
        layout.push(&graph.node(id).op);
        *operand = graph.node(id).operands[0];
    }
    layout.reverse();
    (sources, layout)
}

/// The node's primitive, after those that undo the layout of its second operand.
fn specification(node: &Node, types: Vec<TensorType>, layout: &[&Op]) -> Result<Spec, String> {
    if layout.is_empty() {
        return Spec::of(node.op.clone(), types);
    }
    let inputs = types.len() as u32;
    let mut spec = Spec { inputs: types, nodes: Vec::new(), results: Vec::new() };
    let mut second = 1;
    for (&op, defined) in layout.iter().zip(inputs..) {
        spec.nodes.push(SpecNode { op: op.clone(), operands: vec![second] });
        second = defined;
    }
    let mut operands: Vec<u32> = (0..inputs).collect();
    operands[1] = second;
    spec.nodes.push(SpecNode { op: node.op.clone(), operands });
    spec.results = vec![second + 1];
    spec.types().map(|_| spec)
}

/// Gives every distinct part of a weight its place in the weights section, in the order in which ranks read them.
fn lay_out_image(mut placed: Vec<PlacedWeight>, ranks: u32) -> (Vec<PlacedWeight>, u64) {
    let mut offset = 0u64;
    // Parts of the same elements may still differ in how much padding follows them.
    let mut known: HashMap<PartKey, u64> = HashMap::new();
    let mut images: Vec<Vec<u64>> = placed.iter().map(|weight| vec![0; weight.ranks.len()]).collect();
    for rank in 0..ranks {
        for (weight, images) in placed.iter().zip(&mut images) {
            let Some(position) = weight.ranks.iter().position(|&other| other == rank) else { continue };
            let pieces = weight.splits.iter().map(|split| split.pieces[position].clone()).collect();
            let dims: Vec<u8> = weight.splits.iter().map(|split| split.dim).collect();
            let key = (weight.weight, weight.ty.sizes(), [vec![dims_key(&dims)], pieces].concat());
            images[position] = *known.entry(key).or_insert_with(|| {
                let start = offset;
                // An empty weight takes a place too: its offset must not be the next one's.
                offset = (start + weight.ty.bytes().unwrap_or(0).max(1)).next_multiple_of(ALIGN);
                start
            });
        }
    }
    for (weight, images) in placed.iter_mut().zip(images) {
        weight.images = images;
    }
    (placed, offset)
}

/// A rank's part of a weight: the weight, the part's sizes and its pieces.
type PartKey = (u32, Vec<u64>, Vec<Vec<PlanPiece>>);

/// The split dimensions as part of a key.
fn dims_key(dims: &[u8]) -> Vec<PlanPiece> {
    dims.iter().map(|&dim| PlanPiece { global: u64::from(dim), local: 0, len: 0 }).collect()
}

#[cfg(test)]
mod tests {
    use planfile::{DType, TensorType};

    use super::*;

    /// A weight of one dimension on ranks 0 and 1, of which each holds the given run in `local` elements.
    fn placed(weight: u32, local: u64, runs: [(u64, u64); 2]) -> PlacedWeight {
        let piece = |(global, len)| PlanPiece { global, local: 0, len };
        let pieces = runs.map(|run| Some(piece(run)).into_iter().filter(|piece| piece.len > 0).collect()).to_vec();
        PlacedWeight {
            weight,
            stage: 0,
            ranks: vec![0, 1],
            ty: TensorType::new(DType::F32, &[local]),
            arena_offset: 0,
            splits: vec![SplitDim { dim: 0, pieces }],
            images: Vec::new(),
        }
    }

    #[test]
    fn parts_with_more_padding_have_a_place_of_their_own() {
        // Both second ranks hold element 2 alone, in a part of 100 elements and in one of two.
        let (laid, bytes) = lay_out_image(vec![placed(0, 100, [(0, 0), (2, 1)]), placed(0, 2, [(0, 2), (2, 1)])], 2);
        assert_ne!(laid[0].images[1], laid[1].images[1]);
        assert_eq!(bytes, 2 * 512 + 2 * 256);
    }

    #[test]
    fn the_same_part_is_stored_once() {
        let (laid, bytes) = lay_out_image(vec![placed(0, 2, [(0, 2), (0, 2)]), placed(0, 2, [(0, 2), (0, 2)])], 2);
        assert!(laid.iter().flat_map(|weight| &weight.images).all(|&image| image == 0));
        assert_eq!(bytes, 256);
    }

    #[test]
    fn empty_weights_share_no_place_with_others() {
        let (laid, _) = lay_out_image(vec![placed(0, 0, [(0, 0), (0, 0)]), placed(1, 2, [(0, 2), (2, 2)])], 2);
        assert_ne!(laid[0].images[0], laid[1].images[0]);
    }
}
