//! Writes down what was decided: programs, kernels, weight placement, explanations.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ir::{Graph, Placement, ValueDef, ValueId, WeightId};
use kernels::cuda::Launch;
use planfile::fingerprint::Fingerprint;
use planfile::launch::{self, LABEL_BYTES};
use planfile::plan::{
    Action, Argument, Binding, Call, Code, Explanations, Implementation, Kernel, LinkRequirement, Manifest, Place,
    PlacedWeight, Plan, PlanAxis, PlanEntry, PlanPiece, PlanPort, PlanState, PlanWeight, Program, SplitDim, Step,
    TargetRef, predicted_ns,
};
use planfile::{Cuda, DType, Spec, Target, TensorType};

use crate::error::PassError;
use crate::phase::{self, Copied, Execution, Schedule, Scheduled};
use crate::schedule::ALIGN;

/// Makes the plan. Explanations of the sharding are the caller's to add.
///
/// # Errors
/// [`PassError::Invalid`]: an earlier pass left something undecided. [`PassError::Assemble`]: kernels were not compiled.
pub fn run(scheduled: &Scheduled, target: &Target, assembler: &dyn Assembler) -> Result<Plan, PassError> {
    let module = &scheduled.module;
    let ranks = module.mesh.ranks();
    let mut lowering = Lowering {
        scheduled,
        kernels: Vec::new(),
        kernel_index: HashMap::new(),
        sources: Vec::new(),
        source_index: HashMap::new(),
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
            frozen: entry.frozen.clone(),
            programs: (first..programs.len() as u32).collect(),
            predicted_ns: predicted_ns(own),
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
        target: TargetRef { name: target.name.clone(), architecture: target.device.architecture.to_string() },
        entries,
        weights,
        placed,
        weight_arena_bytes: lowering.arena_bytes,
        image_bytes,
        states: states(module),
        links,
    };
    let explanations = Explanations { names: lowering.names, ..Explanations::default() };
    let architecture = target.device.architecture;
    let labelled: Vec<KernelSource> = lowering.sources.iter().map(Labelled::source).collect();
    let cubins = match architecture.cuda() {
        Some(cuda) if !labelled.is_empty() => assembler.assemble(&labelled, cuda)?,
        _ => Vec::new(),
    };
    if cubins.len() != labelled.len() {
        return Err(PassError::invalid("lower", format!("{} cubins of {}", cubins.len(), labelled.len())));
    }
    let code = cubins.into_iter().map(|cubin| Code { architecture: architecture.to_string(), cubin }).collect();
    Ok(Plan { manifest, programs, kernels: lowering.kernels, code, explanations })
}

/// A kernel's source: one translation unit that defines the function `symbol`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelSource {
    pub symbol: String,
    pub source: String,
}

/// A source with the labels of all kernels that share it.
struct Labelled {
    kernel: KernelSource,
    labels: Vec<[u8; LABEL_BYTES]>,
}

impl Labelled {
    fn source(&self) -> KernelSource {
        let KernelSource { symbol, source } = &self.kernel;
        KernelSource { symbol: symbol.clone(), source: format!("{source}\n{}", launch::declaration(&self.labels)) }
    }
}

/// Makes machine code of CUDA C++: passes do no I/O, and a compiler is a library to be found and loaded.
pub trait Assembler {
    /// Machine code of each source, in their order.
    ///
    /// # Errors
    /// [`PassError::Assemble`]: no compiler, or what it said.
    fn assemble(&self, sources: &[KernelSource], architecture: Cuda) -> Result<Vec<Vec<u8>>, PassError>;
}

/// For targets whose devices are the host: there is nothing to assemble.
#[derive(Clone, Copy, Debug)]
pub struct NoAssembler;

impl Assembler for NoAssembler {
    fn assemble(&self, sources: &[KernelSource], architecture: Cuda) -> Result<Vec<Vec<u8>>, PassError> {
        let why = format!("{} kernels for {architecture}, and no compiler was given", sources.len());
        Err(PassError::Assemble { why })
    }
}

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
    let pairs: BTreeSet<(u32, u32)> = programs.iter().flat_map(Program::exchanging).collect();
    let class = |(a, b): (u32, u32)| {
        let link = *target.topology.get(a as usize)?.get(b as usize)?;
        let class = target.links.get(link as usize)?.name.clone();
        Some(LinkRequirement { ranks: (a, b), class })
    };
    pairs.into_iter().filter_map(class).collect()
}

struct Lowering<'a> {
    scheduled: &'a Scheduled,
    kernels: Vec<Kernel>,
    kernel_index: HashMap<Spec, u32>,
    sources: Vec<Labelled>,
    source_index: HashMap<KernelSource, usize>,
    names: Vec<String>,
    name_index: HashMap<String, u32>,
    placed: Vec<PlacedWeight>,
    placed_index: BTreeMap<(u32, WeightId, Placement), usize>,
    /// Of each rank's weight arena.
    arena_bytes: Vec<u64>,
}

impl Lowering<'_> {
    fn program(&mut self, entry: u32, stage: u32, graph: &Graph, schedule: &Schedule) -> Result<Program, PassError> {
        let ranks = graph.ranks().to_vec();
        let (mut inputs, mut outputs, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        let mut faults = 0;
        for (index, value) in graph.values().iter().enumerate() {
            if let ValueDef::Input(port) = value.def {
                let place = self.place(graph, schedule, stage, ValueId(index as u32))?;
                inputs.push(Binding { port, place, splits: self.splits(value, &ranks) });
            }
        }
        for (index, step) in schedule.steps.iter().enumerate() {
            let Some(chosen) = step else { continue };
            let mut step = self.step(graph, schedule, stage, index, chosen)?;
            if let (Execution::Kernel(_), Action::Launch { scalars, .. }) = (&*chosen.execution, &mut step.action)
                && chosen.region.spec.checks_indices()
            {
                scalars.push(Argument::Fault { word: faults });
                faults += 1;
            }
            steps.push(step);
        }
        for (&value, &Copied { offset, cost }) in &schedule.copies {
            let from = self.place(graph, schedule, stage, value)?;
            let to = Place { ty: from.ty.clone(), at: Argument::Arena { offset } };
            steps.push(Step { action: Action::Copy { from, to }, stream: 0, waits: vec![], origin: vec![], cost });
        }
        for output in graph.outputs() {
            let mut place = self.place(graph, schedule, stage, output.value)?;
            if let Some(copied) = schedule.copies.get(&output.value) {
                place.at = Argument::Arena { offset: copied.offset };
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

    fn step(
        &mut self,
        graph: &Graph,
        schedule: &Schedule,
        stage: u32,
        index: usize,
        chosen: &phase::Step,
    ) -> Result<Step, PassError> {
        let phase::Step { region, execution, cost } = chosen;
        let (node, spec) = (&graph.nodes()[index], &region.spec);
        let mut places = |values: &[ValueId]| -> Result<Vec<Place>, PassError> {
            values.iter().map(|&value| self.place(graph, schedule, stage, value)).collect()
        };
        let (operands, results) = (places(&region.inputs)?, places(&node.results)?);
        let action = match &**execution {
            &Execution::Collective(algorithm) => {
                Action::Collective { op: node.op.clone(), operands, results, algorithm }
            }
            Execution::Reference => {
                let kernel = self.kernel(spec, node.op.name(), |_| Implementation::Reference);
                Action::Launch { kernel, operands, results, scalars: vec![], launch: None }
            }
            Execution::Kernel(launch) => {
                let invalid = |why: String| PassError::invalid("lower", why);
                let label = launch::label(spec, &launch.symbol, &launch.rule).map_err(invalid)?;
                let kernel = self.kernel(spec, &launch.symbol, |lowering| lowering.code(launch, label));
                let scalars = spec.rank_scalars().into_iter().map(|value| Argument::Scalar { value }).collect();
                let shape = launch.rule.shape(spec).map_err(invalid)?;
                Action::Launch { kernel, operands, results, scalars, launch: Some(shape) }
            }
            Execution::Call { library, call, workspace_bytes } => {
                let implementation =
                    Implementation::Library { library: *library, version: String::new(), call: call.clone() };
                let name = match call {
                    Call::Matmul(_) => "matmul",
                    Call::Convolution(_) => "convolution",
                };
                let kernel = self.kernel(spec, name, |_| implementation);
                let workspace = schedule.workspaces.get(&index).map(|&offset| Place {
                    ty: TensorType::new(DType::U8, &[*workspace_bytes]),
                    at: Argument::Arena { offset },
                });
                Action::Library { kernel, operands, results, workspace, algorithm: vec![] }
            }
        };
        let names = ir::joined_origin(region.nodes.iter().map(|&id| &graph.node(id).origin));
        let origin = names.iter().filter(|name| !name.is_empty()).map(|name| self.name(name)).collect();
        Ok(Step { action, stream: 0, waits: vec![], origin, cost: *cost })
    }

    /// The kernel of that specification; `implementation` is asked once for each.
    fn kernel(&mut self, spec: &Spec, name: &str, implementation: impl FnOnce(&mut Self) -> Implementation) -> u32 {
        if let Some(&known) = self.kernel_index.get(spec) {
            return known;
        }
        let index = self.kernels.len() as u32;
        let name = format!("{name}_{index}");
        self.kernel_index.insert(spec.clone(), index);
        let implementation = implementation(self);
        self.kernels.push(Kernel { name, spec: spec.clone(), implementation });
        index
    }

    /// Where the kernel's machine code will be: sources that are the same share it.
    fn code(&mut self, launch: &Launch, label: [u8; LABEL_BYTES]) -> Implementation {
        let kernel = KernelSource { symbol: launch.symbol.clone(), source: launch.source.clone() };
        let code = *self.source_index.entry(kernel).or_insert_with_key(|kernel| {
            self.sources.push(Labelled { kernel: kernel.clone(), labels: Vec::new() });
            self.sources.len() - 1
        });
        self.sources[code].labels.push(label);
        Implementation::Cuda { code: code as u32, symbol: launch.symbol.clone(), rule: launch.rule.clone() }
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
        let used = graph.ranks().iter().filter_map(|&rank| self.arena_bytes.get(rank as usize)).max();
        let arena_offset = used.copied().unwrap_or(0).next_multiple_of(ALIGN);
        let bytes = local.ty.bytes().ok_or_else(|| PassError::invalid("lower", format!("{value} is too large")))?;
        for &rank in graph.ranks() {
            self.arena_bytes[rank as usize] = arena_offset + bytes;
        }
        self.placed_index.insert(key, self.placed.len());
        self.placed.push(PlacedWeight {
            weight: weight.0,
            stage,
            ranks: graph.ranks().to_vec(),
            ty: local.ty.clone(),
            arena_offset,
            splits: self.splits(local, graph.ranks()),
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
    use planfile::Op;

    use super::*;
    use crate::harness::{H200, Machine};

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

    /// Machine code that nobody runs.
    struct Unrun;

    impl Assembler for Unrun {
        fn assemble(&self, sources: &[KernelSource], _: Cuda) -> Result<Vec<Vec<u8>>, PassError> {
            Ok(sources.iter().map(|_| vec![1]).collect())
        }
    }

    #[test]
    fn steps_that_check_indices_have_words_of_their_own() {
        let text = "%x: f32[8, 4]
            %i: i64[3]
            %j: i32[3, 1]
            %u: f32[3, 4]
            %k: i64[5, 4]
            %a = gather %x, %i {axis 0}
            %s = scatter_nd %x, %j, %u {sum}
            %t = pointwise %s {tanh($0)}
            %e = gather_elements %t, %k {axis 0}
            %g = gather %t, %i {axis 0}
            return %a, %e, %g";
        let module = ir::text::parse_lines(text).unwrap();
        let machine = Machine::new(H200);
        let plan = crate::compile::run(module, &machine.settings(), &Unrun, &mut |_, _| {}).unwrap().unwrap().plan;
        let reads_indices = |step: &Step| {
            let Action::Launch { kernel, .. } = &step.action else { return false };
            let mut nodes = plan.kernels[*kernel as usize].spec.nodes.iter();
            nodes.any(|node| matches!(node.op, Op::Gather { .. } | Op::GatherElements { .. } | Op::ScatterNd { .. }))
        };
        let program = &plan.programs[0];
        let reading = (0..program.steps.len()).filter(|&step| reads_indices(&program.steps[step]));
        let expected: Vec<(usize, u32)> = reading.zip(0..).collect();
        assert_eq!((program.faults().collect::<Vec<_>>(), expected.len()), (expected, 4));
        assert!(program.steps.len() > 4, "{} steps", program.steps.len());
        // The two gathers are the same kernel at different places.
        let kernel_of = |(step, word): (usize, u32)| match &program.steps[step].action {
            Action::Launch { kernel, .. } => (*kernel, word),
            other => panic!("a word of no launch: {other:?}"),
        };
        let mut kernels: Vec<(u32, u32)> = program.faults().map(kernel_of).collect();
        kernels.retain(|&(kernel, _)| {
            plan.kernels[kernel as usize].spec.nodes.iter().any(|node| matches!(node.op, Op::Gather { .. }))
        });
        let [(first, first_word), (last, last_word)] = kernels[..] else { panic!("{kernels:?}") };
        assert_eq!(first, last);
        assert_ne!(first_word, last_word);
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
