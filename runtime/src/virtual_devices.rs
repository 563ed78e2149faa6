//! Virtual devices: each rank executes its programs step by step on host memory, with threads of its own.
//!
//! Issue order satisfies every edge of a verified program, so streams and waits need no attention here. Combinations
//! are made in the order of the group, once, so all ranks hold the same bits, in every run.

use std::thread;
use std::time::{Duration, Instant};

use cpu::{View, ViewMut, combine, execute};
use planfile::plan::{Action, Binding, Place, Plan, PlanEntry, Program, Step};
use planfile::{Buffer, Op, RankScalar, Tensor, TensorType};
use rayon::ThreadPool;

use crate::error::{RuntimeError, StepError};
use crate::exchange::{Exchange, Meeting, Route};
use crate::memory::Memory;
use crate::pieces::is_repeated;
use crate::ports::{PartOf, Piece, assemble, misfit, names_of};
use crate::spec::run_spec;

/// Runs an entry on all ranks. `inputs` are whole tensors in the order of the entry's ports, of their types; `devices` and
/// `weights` are by rank. The outputs are whole tensors in the order of the ports.
///
/// # Errors
/// The first rank's that failed by itself; the other ranks then stop too.
pub(crate) fn run_entry(
    plan: &Plan,
    entry: &PlanEntry,
    inputs: &[&Tensor],
    devices: &mut [DeviceMemory],
    weights: &[Buffer],
    observe: Observer<'_>,
) -> Result<Vec<Tensor>, RuntimeError> {
    let exchange = Exchange::default();
    let outcomes: Vec<Result<Vec<Piece<Vec<u8>>>, RuntimeError>> = thread::scope(|scope| {
        let mut threads = Vec::new();
        let mut refused = None;
        for ((rank, memory), weights) in (0u32..).zip(devices).zip(weights) {
            let device = Device { plan, entry, inputs, rank, exchange: &exchange, observe };
            let run = move || memory.pool.install(|| device.run(memory.arena.bytes_mut(), weights.bytes()));
            match thread::Builder::new().name(format!("rank {rank}")).spawn_scoped(scope, run) {
                Ok(thread) => threads.push((rank, thread)),
                Err(source) => {
                    // The others need not wait for this one.
                    drop(exchange.watch());
                    refused = Some(Err(RuntimeError::Thread { rank, source }));
                    break;
                }
            }
        }
        let panicked = |rank| Err(RuntimeError::Panicked { rank });
        let joined = threads.into_iter().map(|(rank, thread)| thread.join().unwrap_or_else(|_| panicked(rank)));
        joined.chain(refused).collect()
    });
    let mut pieces = Vec::new();
    let mut abandoned = None;
    let mut failure = None;
    for outcome in outcomes {
        match outcome {
            Ok(of_rank) => pieces.extend(of_rank),
            Err(error @ RuntimeError::Step { source: StepError::Abandoned, .. }) => {
                abandoned.get_or_insert(error);
            }
            Err(error) => {
                failure.get_or_insert(error);
            }
        }
    }
    match failure.or(abandoned) {
        Some(error) => Err(error),
        None => assemble(plan, entry, pieces),
    }
}

/// What a context has for each rank.
pub(crate) struct DeviceMemory {
    pub(crate) arena: Buffer,
    /// Threads that share the work of a step.
    pub(crate) pool: ThreadPool,
}

/// A step that a rank has just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTime {
    pub rank: u32,
    /// Index into [`Plan::programs`].
    pub program: usize,
    /// Index into the program's steps.
    pub step: usize,
    /// Waiting for other ranks included.
    pub duration: Duration,
}

/// Told after each step how long it took, by all ranks' threads.
pub(crate) type Observer<'a> = Option<&'a (dyn Fn(StepTime) + Sync)>;

/// One rank and what it can see.
#[derive(Clone, Copy)]
struct Device<'a> {
    plan: &'a Plan,
    entry: &'a PlanEntry,
    inputs: &'a [&'a Tensor],
    rank: u32,
    exchange: &'a Exchange,
    observe: Observer<'a>,
}

impl Device<'_> {
    /// Runs the stages that this rank is in; what it holds of the outputs, unless a rank before it holds the same.
    fn run(self, arena: &mut [u8], weights: &[u8]) -> Result<Vec<Piece<Vec<u8>>>, RuntimeError> {
        let watch = self.exchange.watch();
        let mut pieces = Vec::new();
        let mut memory = Memory { arena, weights };
        for &index in &self.entry.programs {
            let index = index as usize;
            let program = self.plan.programs.get(index).ok_or_else(|| RuntimeError::Contradiction {
                what: format!("entry `{}` names program {index}, which is not there", self.entry.name),
            })?;
            let Some(position) = program.ranks.iter().position(|&rank| rank == self.rank) else { continue };
            self.bring_inputs(program, position, &mut memory)?;
            for (number, step) in program.steps.iter().enumerate() {
                let start = Instant::now();
                self.step((index, number), step, position, &mut memory).map_err(|source| RuntimeError::Step {
                    rank: self.rank,
                    program: index,
                    step: number,
                    origin: names_of(self.plan, step),
                    source,
                })?;
                if let Some(observe) = self.observe {
                    observe(StepTime { rank: self.rank, program: index, step: number, duration: start.elapsed() });
                }
            }
            for (number, binding) in program.outputs.iter().enumerate() {
                if !is_repeated(&binding.splits, position) {
                    let bytes = memory.read(&binding.place).map_err(|source| self.at_port(binding, &source))?;
                    pieces.push(Piece { program: index, binding: number, position, bytes: bytes.to_vec() });
                }
            }
        }
        watch.finished();
        Ok(pieces)
    }

    fn at_port(&self, binding: &Binding, source: &StepError) -> RuntimeError {
        RuntimeError::Contradiction { what: format!("port {} on rank {}: {source}", binding.port, self.rank) }
    }

    fn bring_inputs(&self, program: &Program, position: usize, memory: &mut Memory<'_>) -> Result<(), RuntimeError> {
        for binding in &program.inputs {
            let input = self.inputs.get(binding.port as usize).ok_or_else(|| RuntimeError::Contradiction {
                what: format!("there is no input number {}", binding.port),
            })?;
            let local = memory.write(&binding.place).map_err(|source| self.at_port(binding, &source))?;
            let copied = PartOf::new(&input.ty, binding).at(position).scatter(input.data.bytes(), local);
            copied.ok_or_else(|| RuntimeError::Contradiction { what: misfit("input", binding) })?;
        }
        Ok(())
    }

    fn step(&self, at: (usize, usize), step: &Step, position: usize, memory: &mut Memory<'_>) -> Result<(), StepError> {
        match &step.action {
            // A library computes what the kernel's spec says, too.
            Action::Launch { kernel, operands, results, .. } | Action::Library { kernel, operands, results, .. } => {
                let kernel = self.plan.kernels.get(*kernel as usize);
                let kernel = kernel.ok_or_else(|| contradiction("its kernel is not in the plan"))?;
                memory.step(operands, results, |inputs, outputs| run_spec(&kernel.spec, position, inputs, outputs))
            }
            Action::Collective { op, operands, results, algorithm: _ } => {
                self.collective(at, op, operands, results, position, memory)
            }
            Action::Copy { from, to } => {
                memory.step(std::slice::from_ref(from), std::slice::from_ref(to), |inputs, outputs| {
                    copy(inputs[0].bytes, &mut outputs[0])
                })
            }
            Action::Persistent { .. } => Err(StepError::Unsupported { what: "a persistent kernel" }),
        }
    }

    fn collective(
        &self,
        (program, step): (usize, usize),
        op: &Op,
        operands: &[Place],
        results: &[Place],
        position: usize,
        memory: &mut Memory<'_>,
    ) -> Result<(), StepError> {
        let peer = |peers: &[u32]| {
            let peer = peers.get(position).copied();
            peer.ok_or_else(|| contradiction("it has fewer peers than the stage has ranks"))
        };
        let groups = match op {
            Op::Send { channel, peers } => {
                let [operand] = operands else { return Err(contradiction("a send has one operand")) };
                let route = Route { channel: *channel, from: self.rank, to: peer(peers)? };
                self.exchange.send(route, Buffer::from_bytes(memory.read(operand)?));
                return Ok(());
            }
            Op::Recv { channel, peers, ty: _ } => {
                let [result] = results else { return Err(contradiction("a receive has one result")) };
                let message = self.exchange.receive(Route { channel: *channel, from: peer(peers)?, to: self.rank })?;
                let target = memory.write(result)?;
                return copy(message.bytes(), &mut ViewMut { ty: &result.ty, bytes: target });
            }
            other => other.groups().ok_or_else(|| contradiction(format!("{} is no collective", other.name())))?,
        };
        let ([operand], [result]) = (operands, results) else {
            return Err(contradiction("a collective has one operand and one result"));
        };
        let find = |group: &Vec<u32>| group.iter().position(|&rank| rank == self.rank);
        let found = groups.iter().enumerate().find_map(|(group, ranks)| Some((group, find(ranks)?, ranks.len())));
        let (group, member, members) = found.ok_or_else(|| contradiction("the rank is in none of its groups"))?;
        let part = Buffer::from_bytes(memory.read(operand)?);
        let parts =
            self.exchange.meet(Meeting { program, step, group }, (member, members), part, |parts| match op {
                Op::AllReduce { combine, .. } | Op::ReduceScatter { combine, .. } => {
                    combined(*combine, &operand.ty, parts).map(|whole| vec![whole])
                }
                _ => Ok(parts),
            })?;
        let bytes = memory.write(result)?;
        let mut outputs = [ViewMut { ty: &result.ty, bytes }];
        receive(op, &operand.ty, &parts, (member, members), &mut outputs)
    }
}

fn contradiction(what: impl Into<String>) -> StepError {
    StepError::Contradiction { what: what.into() }
}

fn copy(from: &[u8], to: &mut ViewMut<'_>) -> Result<(), StepError> {
    if from.len() != to.bytes.len() {
        return Err(contradiction(format!("{} bytes are copied to {}", from.len(), to.ty)));
    }
    to.bytes.copy_from_slice(from);
    Ok(())
}

/// All parts combined in order.
pub(crate) fn combined(how: planfile::Combine, ty: &TensorType, parts: Vec<Buffer>) -> Result<Buffer, StepError> {
    let mut parts = parts.into_iter();
    let mut whole = parts.next().unwrap_or_default();
    for part in parts {
        combine(how, ty.dtype, whole.bytes_mut(), part.bytes())?;
    }
    Ok(whole)
}

/// Takes what the `member`-th rank gets out of what the group brought: `parts` are all operands in order, or their
/// combination.
pub(crate) fn receive(
    op: &Op,
    ty: &TensorType,
    parts: &[Buffer],
    (member, members): (usize, usize),
    outputs: &mut [ViewMut<'_>; 1],
) -> Result<(), StepError> {
    match op {
        Op::AllGather { axis, .. } => {
            let views: Vec<View<'_>> = parts.iter().map(|part| View { ty, bytes: part.bytes() }).collect();
            Ok(execute(&Op::Concat { axis: *axis }, 0, &views, outputs)?)
        }
        Op::ReduceScatter { axis, .. } => {
            let whole = parts.first().ok_or_else(|| contradiction("nothing was combined"))?;
            let chunk = chunk_of(ty, *axis, member, members)?;
            Ok(execute(&chunk, 0, &[View { ty, bytes: whole.bytes() }], outputs)?)
        }
        Op::AllToAll { split, concat, .. } => {
            let chunk = chunk_of(ty, *split, member, members)?;
            let mut tensors = Vec::with_capacity(parts.len());
            for part in parts {
                let whole = Tensor { ty: ty.clone(), data: part.clone() };
                tensors.extend(cpu::evaluate(&chunk, &[&whole])?);
            }
            let views: Vec<View<'_>> = tensors.iter().map(View::from).collect();
            Ok(execute(&Op::Concat { axis: *concat }, 0, &views, outputs)?)
        }
        _ => {
            let whole = parts.first().ok_or_else(|| contradiction("nothing was combined"))?;
            copy(whole.bytes(), &mut outputs[0])
        }
    }
}

/// The slice that is chunk `member` of `members` along `axis`.
fn chunk_of(ty: &TensorType, axis: u8, member: usize, members: usize) -> Result<Op, StepError> {
    let mut sizes = ty.sizes();
    let (axis, members) = (usize::from(axis), members as u64);
    let size = sizes.get_mut(axis).filter(|size| size.is_multiple_of(members));
    let size = size.ok_or_else(|| contradiction(format!("axis {axis} of {ty} is not a multiple of {members}")))?;
    *size /= members;
    let start = (member as u64).checked_mul(*size).and_then(|start| i64::try_from(start).ok());
    let start = start.ok_or_else(|| contradiction(format!("{ty} does not fit in memory")))?;
    let starts = (0..sizes.len()).map(|dim| RankScalar::Uniform(if dim == axis { start } else { 0 })).collect();
    Ok(Op::Slice { starts, steps: vec![1; sizes.len()], sizes })
}
