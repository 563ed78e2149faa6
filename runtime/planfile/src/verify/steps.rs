//! Steps, each for itself: operands and results against kernels, edges, and what a step may overwrite.

use super::bounds::{Bounds, memory_name, range};
use super::faults;
use super::kernels::{Facts, InPlace};
use super::persistent::TaskOrder;
use super::{At, Report};
use crate::architecture::Architecture;
use crate::infer::infer;
use crate::op::{Groups, Op};
use crate::plan::{
    Action, Argument, CollectiveAlgorithm, Edge, EdgeKind, Implementation, LaunchShape, Library, Place, Plan, Program,
    Step, StepCost,
};
use crate::text::count;
use crate::types::TensorType;

/// Most threads of a block, in all and by dimension.
const MAX_BLOCK_THREADS: u64 = 1024;
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
/// Bytes of an algorithm of cuBLASLt: `cublasLtMatmulAlgo_t`.
const CUBLASLT_ALGORITHM_BYTES: usize = 64;
/// Bytes of a signal in the peer arena.
pub(super) const SIGNAL_BYTES: u64 = 8;

type Checked = Result<(), String>;

/// Checks each step of a program whose sizes, and whose kernels, are sound.
pub(super) fn check(plan: &Plan, index: usize, facts: &[Facts], report: &mut Report) {
    let program = &plan.programs[index];
    let on_host = plan.manifest.target.architecture.parse() == Ok(Architecture::Cpu);
    let context = Context { plan, program, facts, bounds: Bounds::new(plan, program), on_host };
    for (position, step) in program.steps.iter().enumerate() {
        let checked = context.step(position, step);
        report.check(At { program: index, step: Some(position) }, checked);
    }
    faults::check(program, index, report);
}

struct Context<'a> {
    plan: &'a Plan,
    program: &'a Program,
    facts: &'a [Facts],
    bounds: Bounds<'a>,
    /// Whether hosts execute the plan, and not GPUs.
    on_host: bool,
}

impl Context<'_> {
    fn step(&self, position: usize, step: &Step) -> Checked {
        if step.stream >= self.program.streams {
            return Err(format!("stream {} of {}", step.stream, self.program.streams));
        }
        for edge in &step.waits {
            self.edge(position, step, edge)?;
        }
        check_cost(&step.cost)?;
        let names = self.plan.explanations.names.len();
        if let Some(name) = step.origin.iter().find(|&&name| name as usize >= names) {
            return Err(format!("comes from name {name} of {names}"));
        }
        match &step.action {
            Action::Launch { kernel, operands, results, scalars, launch } => {
                self.kernel(*kernel, operands, results, Caller::Launch)?;
                self.launch(*kernel, scalars, launch.as_ref())
            }
            Action::Library { kernel, operands, results, workspace, algorithm } => {
                self.kernel(*kernel, operands, results, Caller::Library)?;
                self.algorithm(*kernel, algorithm)?;
                let Some(workspace) = workspace else { return Ok(()) };
                self.bounds.check(workspace).map_err(|what| format!("workspace: {what}"))?;
                self.writable(workspace)?;
                let others = operands.iter().chain(results);
                self.apart(workspace, others, InPlace::Never).map_err(|what| format!("workspace {what}"))
            }
            Action::Collective { op, operands, results, algorithm } => {
                self.collective(op, operands, results, *algorithm)
            }
            Action::Copy { from, to } => {
                self.places(&[from], &[to], InPlace::Never)?;
                let same = from.ty.dtype == to.ty.dtype && from.ty.bytes() == to.ty.bytes();
                same.then_some(()).ok_or_else(|| format!("copies {} to {}", from.ty, to.ty))
            }
            Action::Persistent { tasks, counters, launch } => {
                for (number, task) in tasks.iter().enumerate() {
                    let checked = self.kernel(task.kernel, &task.operands, &task.results, Caller::Launch);
                    checked.map_err(|what| format!("task {number}: {what}"))?;
                }
                TaskOrder::new(tasks, counters)?;
                let fine = self.on_host && launch.is_none();
                fine.then_some(()).ok_or_else(|| "a persistent step has no machine code".to_owned())
            }
        }
    }

    fn edge(&self, position: usize, step: &Step, edge: &Edge) -> Checked {
        let from = edge.from as usize;
        if from >= position {
            return Err(format!("waits for step #{from}, which does not come before it"));
        }
        match &edge.kind {
            EdgeKind::Full => Ok(()),
            EdgeKind::Programmatic => {
                let launch = |step: &Step| matches!(step.action, Action::Launch { .. });
                let both = launch(step) && launch(&self.program.steps[from]);
                both.then_some(()).ok_or_else(|| format!("a programmatic edge from step #{from}, not between launches"))
            }
            EdgeKind::Signal { ranks, offset } => {
                if *ranks != self.program.ranks {
                    return Err(format!("a signal of ranks {ranks:?}, not of all the program's"));
                }
                let size = self.program.peer_arena_bytes;
                let inside = offset.checked_add(SIGNAL_BYTES).is_some_and(|end| end <= size);
                let fine = inside && offset.is_multiple_of(SIGNAL_BYTES);
                fine.then_some(()).ok_or_else(|| format!("a signal at {offset} of {size} of the peer arena"))
            }
        }
    }

    fn kernel(&self, kernel: u32, operands: &[Place], results: &[Place], caller: Caller) -> Checked {
        let all = self.plan.kernels.len();
        let found = self.plan.kernels.get(kernel as usize).zip(self.facts.get(kernel as usize));
        let (kernel, facts) = found.ok_or_else(|| format!("kernel {kernel} of {all}"))?;
        let library = matches!(kernel.implementation, Implementation::Library { .. });
        if library != (caller == Caller::Library) {
            return Err(format!("kernel `{}` is not called this way", kernel.name));
        }
        if let Some(length) = facts.ranks
            && length != self.program.ranks.len()
        {
            let ranks = self.program.ranks.len();
            return Err(format!("kernel `{}` has tables of {length} values for {ranks} ranks", kernel.name));
        }
        let takes = match_types(operands, &kernel.spec.inputs, "operand");
        let gives = match_types(results, &facts.results, "result");
        takes.and(gives).map_err(|what| format!("kernel `{}`: {what}", kernel.name))?;
        let (operands, results): (Vec<&Place>, Vec<&Place>) = (operands.iter().collect(), results.iter().collect());
        self.places(&operands, &results, facts.in_place)
    }

    /// Places are in bounds, results may be written there, and share bytes with nothing that they must not.
    fn places(&self, operands: &[&Place], results: &[&Place], in_place: InPlace) -> Checked {
        for (number, place) in operands.iter().enumerate() {
            self.bounds.check(place).map_err(|what| format!("operand {number}: {what}"))?;
        }
        for (number, place) in results.iter().enumerate() {
            self.bounds.check(place).map_err(|what| format!("result {number}: {what}"))?;
            self.writable(place).map_err(|what| format!("result {number}: {what}"))?;
        }
        for (number, result) in results.iter().enumerate() {
            let said = |what: String| format!("result {number} {what}");
            self.apart(result, results[..number].iter().copied(), InPlace::Never).map_err(said)?;
            match in_place {
                InPlace::First => {
                    let (state, rest) = operands.split_at(operands.len().min(1));
                    self.apart(result, state.iter().copied(), InPlace::Any).map_err(said)?;
                    self.apart(result, rest.iter().copied(), InPlace::Never).map_err(said)?;
                }
                InPlace::Any | InPlace::Never => {
                    self.apart(result, operands.iter().copied(), in_place).map_err(said)?;
                }
            }
        }
        Ok(())
    }

    fn writable(&self, place: &Place) -> Checked {
        match &place.at {
            Argument::Weights { .. } => Err("writes to weights".to_owned()),
            Argument::Peer { rank, .. } if !self.bounds.is_injective(rank) => {
                Err("two ranks write to the same peer".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// A result may share bytes only with an operand that it replaces element by element.
    fn apart<'a>(&self, result: &Place, others: impl Iterator<Item = &'a Place>, in_place: InPlace) -> Checked {
        for other in others {
            if !self.bounds.overlap(result, other) {
                continue;
            }
            let elementwise = other.ty.dims == result.ty.dims && other.ty.dtype.bytes() == result.ty.dtype.bytes();
            if in_place == InPlace::Never || other.at != result.at || !elementwise {
                let (a, b) = (range(result), range(other));
                let memory = memory_name(&result.at);
                return Err(format!("at {:#x}..{:#x} of the {memory} overlaps {:#x}..{:#x}", a.0, a.1, b.0, b.1));
            }
        }
        Ok(())
    }

    /// A launch is the one that follows from its kernel's rule, with the scalars that its specification has.
    fn launch(&self, kernel: u32, scalars: &[Argument], launch: Option<&LaunchShape>) -> Checked {
        let Some(expected) = self.facts.get(kernel as usize).and_then(|facts| facts.launch.as_ref()) else {
            let fine = scalars.is_empty() && launch.is_none();
            return fine.then_some(()).ok_or_else(|| "a grid or scalars for a kernel without code".to_owned());
        };
        let shape = launch.ok_or("launches device code without a grid")?;
        check_shape(shape)?;
        if *shape != expected.shape {
            return Err(format!("launches{shape}, and its kernel's rule gives{}", expected.shape));
        }
        let count = expected.scalars.len() + usize::from(expected.checks);
        if scalars.len() != count {
            return Err(format!("{} scalars, its kernel takes {count}", scalars.len()));
        }
        let wanted = expected.scalars.iter().map(Some).chain([None]);
        for (number, (scalar, wanted)) in scalars.iter().zip(wanted).enumerate() {
            match (scalar, wanted) {
                (Argument::Scalar { value }, Some(wanted)) if value == wanted => {}
                // Words are checked together: each belongs to one step.
                (Argument::Fault { .. }, None) => {}
                (_, Some(wanted)) => return Err(format!("scalar {number} is not {wanted}, as its kernel has it")),
                (_, None) => return Err(format!("scalar {number} is no fault word, and its kernel checks indices")),
            }
        }
        Ok(())
    }

    /// An algorithm is as long as its library's; what its bytes say is the library's to know.
    fn algorithm(&self, kernel: u32, algorithm: &[u8]) -> Checked {
        let kernel = self.plan.kernels.get(kernel as usize);
        let bytes = match kernel.map(|kernel| &kernel.implementation) {
            Some(Implementation::Library { library: Library::CublasLt, .. }) => CUBLASLT_ALGORITHM_BYTES,
            _ => 0,
        };
        let fine = algorithm.is_empty() || algorithm.len() == bytes;
        fine.then_some(()).ok_or_else(|| {
            format!("an algorithm of {}, its library's have {bytes}", count(algorithm.len() as u64, "byte"))
        })
    }

    fn collective(&self, op: &Op, operands: &[Place], results: &[Place], algorithm: CollectiveAlgorithm) -> Checked {
        let types: Vec<&TensorType> = operands.iter().map(|operand| &operand.ty).collect();
        let inferred = infer(op, &types).map_err(|what| format!("{}: {what}", op.name()))?;
        match_types(results, &inferred, "result").map_err(|what| format!("{}: {what}", op.name()))?;
        match (op.groups(), op.peers()) {
            (Some(groups), _) => self.groups(groups)?,
            // Peers are checked against the other side, once all programs are known to be sound.
            (None, Some(peers)) if peers.len() == self.program.ranks.len() => {}
            (None, Some(peers)) => {
                return Err(format!("{} peers for {} ranks", peers.len(), self.program.ranks.len()));
            }
            (None, None) => return Err(format!("{} is not between ranks", op.name())),
        }
        if (algorithm == CollectiveAlgorithm::Nccl) == self.on_host {
            let target = &self.plan.manifest.target.architecture;
            return Err(format!("{} by {algorithm:?} is not for {target}", op.name()));
        }
        let own = |place: &Place| matches!(&place.at, Argument::Peer { rank, .. } if self.bounds.is_own(rank));
        if algorithm == CollectiveAlgorithm::OneShot && !operands.iter().all(own) {
            return Err("peers cannot read operands outside the rank's own peer arena".to_owned());
        }
        let (operands, results): (Vec<&Place>, Vec<&Place>) = (operands.iter().collect(), results.iter().collect());
        self.places(&operands, &results, InPlace::Never)
    }

    /// Every rank of the program is in one group, and no other. Groups are disjoint.
    fn groups(&self, groups: &Groups) -> Checked {
        let mut ranks: Vec<u32> = groups.iter().flatten().copied().collect();
        ranks.sort_unstable();
        let fine = ranks == self.program.ranks;
        fine.then_some(()).ok_or_else(|| format!("groups {groups:?} are not ranks {:?}", self.program.ranks))
    }
}

/// What every device takes; how much memory and how many registers there are is checked with the code.
fn check_shape(shape: &LaunchShape) -> Checked {
    let threads = shape.block.iter().try_fold(1u64, |threads, &size| threads.checked_mul(u64::from(size)));
    let fine = threads.is_some_and(|threads| (1..=MAX_BLOCK_THREADS).contains(&threads))
        && shape.block.iter().zip(MAX_BLOCK).all(|(&size, most)| size <= most);
    fine.then_some(()).ok_or_else(|| format!("a block of {:?} threads", shape.block))
}

fn check_cost(cost: &StepCost) -> Checked {
    let StepCost { predicted_ns, operations, memory_bytes, link_bytes } = *cost;
    let fine = *cost == cost.capped();
    fine.then_some(()).ok_or_else(|| {
        format!("is said to take {predicted_ns} ns, {operations} operations, {memory_bytes} and {link_bytes} bytes")
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Caller {
    Launch,
    Library,
}

fn match_types(places: &[Place], types: &[TensorType], what: &str) -> Checked {
    if places.len() != types.len() {
        return Err(format!("{} {what}s, expected {}", places.len(), types.len()));
    }
    for (number, (place, ty)) in places.iter().zip(types).enumerate() {
        if place.ty != *ty {
            return Err(format!("{what} {number} is {}, expected {ty}", place.ty));
        }
    }
    Ok(())
}
