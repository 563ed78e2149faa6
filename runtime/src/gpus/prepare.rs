//! Turns the steps of a verified program into calls: addresses, functions, algorithms. Nothing is left to work out
//! when a program runs, and nothing that can fail on one rank alone comes after this.
#![expect(unsafe_code, reason = "tries out convolutions on the GPU")]

use std::sync::Arc;

use planfile::plan::{
    Action, Argument, Binding, Call, CollectiveAlgorithm, EdgeKind, Implementation, LaunchShape, Place, Program, Step,
};
use planfile::{DType, Op, RankScalar, TensorType};

use super::rank::Rank;
use super::transfer::{Transfer, Transfers};
use super::work::{PreparedProgram, PreparedStep, Work};
use crate::error::{RuntimeError, StepError};
use crate::ports::names_of;
use cuda::cublaslt;
use cuda::cudnn;
use cuda::driver::{Address, Event};
use cuda::nccl::Exchange;

fn contradiction(what: impl Into<String>) -> StepError {
    StepError::Contradiction { what: what.into() }
}

fn unsupported(what: &'static str) -> StepError {
    StepError::UnsupportedOnGpu { what }
}

impl Rank {
    /// Prepares the programs of an entry that this rank is in. Afterwards nothing of use is in its arena.
    pub(super) fn prepare(&mut self, entry: usize) -> Result<(), RuntimeError> {
        if self.entries.contains_key(&entry) {
            return Ok(());
        }
        let plan = Arc::clone(&self.plan);
        let Some(described) = plan.manifest.entries.get(entry) else {
            return Err(RuntimeError::Contradiction { what: format!("there is no entry number {entry}") });
        };
        let transfers = Transfers::new(&plan, described, self.rank)?;
        let mut programs = Vec::new();
        for &number in &described.programs {
            let number = number as usize;
            let Some(program) = plan.programs.get(number) else { continue };
            let Some(position) = program.ranks.iter().position(|&member| member == self.rank) else { continue };
            let mut steps = Vec::with_capacity(program.steps.len());
            for (index, step) in program.steps.iter().enumerate() {
                let prepared = self.step(program, index, step, position).map_err(|source| RuntimeError::Step {
                    rank: self.rank,
                    program: number,
                    step: index,
                    origin: names_of(&plan, step),
                    source,
                })?;
                steps.push(prepared);
            }
            programs.push(PreparedProgram {
                program: number,
                inputs: self.ports(number, &program.inputs, &transfers.inputs)?,
                outputs: self.ports(number, &program.outputs, &transfers.outputs)?,
                steps,
                graph: None,
            });
        }
        // Convolutions were tried out.
        self.wait()?;
        self.entries.insert(entry, programs);
        Ok(())
    }

    fn ports(
        &self,
        program: usize,
        bindings: &[Binding],
        transfers: &[Transfer],
    ) -> Result<Vec<(Transfer, Address)>, RuntimeError> {
        let own = transfers.iter().filter(|transfer| transfer.program == program);
        let found = own.filter_map(|transfer| Some((transfer, bindings.get(transfer.binding)?)));
        found
            .map(|(transfer, binding)| {
                let address = self.address(&binding.place).map_err(|source| RuntimeError::Contradiction {
                    what: format!("port {} on rank {}: {source}", binding.port, self.rank),
                })?;
                Ok((transfer.clone(), address))
            })
            .collect()
    }

    fn step(
        &mut self,
        program: &Program,
        index: usize,
        step: &Step,
        position: usize,
    ) -> Result<PreparedStep, StepError> {
        let mut waits = Vec::new();
        for edge in &step.waits {
            if matches!(edge.kind, EdgeKind::Signal { .. }) {
                return Err(unsupported("a signal between GPUs"));
            }
            let from = program.steps.get(edge.from as usize).filter(|_| (edge.from as usize) < index);
            let from = from.ok_or_else(|| contradiction("it waits for a step that does not come before it"))?;
            // A programmatic edge allows to start earlier, and does not demand it.
            if from.stream != step.stream {
                waits.push(edge.from as usize);
            }
        }
        let later = program.steps.get(index + 1..).unwrap_or_default();
        let is_awaited =
            |later: &Step| later.stream != step.stream && later.waits.iter().any(|edge| edge.from as usize == index);
        let done = later.iter().any(is_awaited).then(|| Event::new(&self.gpu)).transpose()?;
        let stream = step.stream as usize;
        if stream >= self.streams.all.len() {
            return Err(contradiction("it is on a stream that its program does not have"));
        }
        Ok(PreparedStep { work: self.work(step, position)?, stream, waits, done })
    }

    fn work(&mut self, step: &Step, position: usize) -> Result<Work, StepError> {
        match &step.action {
            Action::Launch { kernel, operands, results, scalars, launch } => {
                self.launch(*kernel, (operands, results, scalars), launch.as_ref(), position)
            }
            Action::Library { kernel, operands, results, workspace, algorithm } => {
                self.library(*kernel, (operands, results), workspace.as_ref(), algorithm)
            }
            Action::Collective { algorithm: CollectiveAlgorithm::Host, .. } => {
                Err(unsupported("a collective through the host"))
            }
            Action::Collective { algorithm: CollectiveAlgorithm::OneShot, .. } => {
                Err(unsupported("a one-shot collective"))
            }
            Action::Collective { op, operands, results, algorithm: CollectiveAlgorithm::Nccl } => {
                self.collective(op, operands, results, position)
            }
            Action::Copy { from, to } => {
                if from.ty.bytes() != to.ty.bytes() {
                    return Err(contradiction(format!("{} is copied to {}", from.ty, to.ty)));
                }
                Ok(Work::Copy { from: self.address(from)?, to: self.address(to)?, bytes: bytes_of(&to.ty)? })
            }
            Action::Persistent { .. } => Err(unsupported("a persistent kernel")),
        }
    }

    /// The address of a tensor in one of the rank's arenas.
    pub(super) fn address(&self, place: &Place) -> Result<Address, StepError> {
        let (offset, arena) = match &place.at {
            Argument::Arena { offset } => (*offset, &self.arena),
            Argument::Weights { offset } => (*offset, self.session.weights(self.rank)?),
            Argument::Peer { .. } => return Err(unsupported("memory of a peer")),
            Argument::State { .. } => return Err(unsupported("state between runs")),
            Argument::Extent { .. }
            | Argument::Epoch
            | Argument::TensorMap { .. }
            | Argument::Scalar { .. }
            | Argument::Fault { .. } => {
                return Err(contradiction("a tensor is at a place that holds none"));
            }
        };
        let end = place.ty.bytes().and_then(|bytes| offset.checked_add(bytes));
        // The verifier has checked this; here it keeps kernels from others' memory.
        if end.is_none_or(|end| end > arena.bytes) {
            return Err(contradiction(format!("{} at {offset} ends outside of {} bytes", place.ty, arena.bytes)));
        }
        Ok(arena.address + offset)
    }

    fn launch(
        &self,
        kernel: u32,
        (operands, results, scalars): (&[Place], &[Place], &[Argument]),
        launch: Option<&LaunchShape>,
        position: usize,
    ) -> Result<Work, StepError> {
        let described = self.plan.kernels.get(kernel as usize);
        let described = described.ok_or_else(|| contradiction("its kernel is not in the plan"))?;
        let Implementation::Cuda { code, symbol, .. } = &described.implementation else {
            return Err(unsupported("a kernel without machine code"));
        };
        let launch = launch.ok_or_else(|| contradiction("a launch has no grid"))?;
        let mut parameters = Vec::with_capacity(operands.len() + results.len() + scalars.len());
        for place in operands.iter().chain(results) {
            parameters.push(self.address(place)?);
        }
        for scalar in scalars {
            parameters.push(match scalar {
                Argument::Scalar { value } => value_of(value, position)? as u64,
                Argument::Fault { word } => self.faults.word(*word)?,
                _ => return Err(unsupported("a scalar in device memory")),
            });
        }
        let mut grid = [0; 3];
        for (size, value) in grid.iter_mut().zip(&launch.grid) {
            let value = u32::try_from(value_of(value, position)?).ok().filter(|&value| value > 0);
            *size = value.ok_or_else(|| contradiction("a grid is no number of blocks"))?;
        }
        let module = self.session.module(self.rank, *code)?;
        let function = module.function(symbol, self.session.shared_bytes(kernel), parameters.len())?;
        Ok(Work::Launch { function, grid, block: launch.block, shared_bytes: launch.shared_bytes, parameters })
    }

    fn library(
        &mut self,
        kernel: u32,
        (operands, results): (&[Place], &[Place]),
        workspace: Option<&Place>,
        algorithm: &[u8],
    ) -> Result<Work, StepError> {
        let plan = Arc::clone(&self.plan);
        let described = plan.kernels.get(kernel as usize);
        let described = described.ok_or_else(|| contradiction("its kernel is not in the plan"))?;
        let Implementation::Library { call, .. } = &described.implementation else {
            return Err(contradiction("a call into a library names another kind of kernel"));
        };
        let types = |places: &[Place]| places.iter().map(|place| place.ty.clone()).collect::<Vec<TensorType>>();
        call.check(&types(operands), &types(results)).map_err(contradiction)?;
        let at = |place: &Place| Ok::<(Address, DType), StepError>((self.address(place)?, place.ty.dtype));
        let addresses = operands.iter().map(at).collect::<Result<Vec<_>, _>>()?;
        let [result] = results else { return Err(contradiction("a call into a library has one result")) };
        let result = at(result)?;
        let workspace = match workspace {
            Some(place) => (self.address(place)?, bytes_of(&place.ty)?),
            None => (0, 0),
        };
        match call {
            Call::Matmul(matmul) => {
                let operands = cublaslt::Operands { operands: &addresses, result, workspace, algorithm };
                let handle = match &mut self.cublaslt {
                    Some(handle) => handle,
                    none => none.insert(cublaslt::Handle::new(&self.gpu)?),
                };
                Ok(Work::Matmul(handle.prepare(matmul, &operands)?))
            }
            Call::Convolution(convolution) => {
                let operands = cudnn::Operands { operands: &addresses, result, workspace };
                let handle = match &mut self.cudnn {
                    Some(handle) => handle,
                    none => none.insert(cudnn::Handle::new(&self.gpu)?),
                };
                let stream = self.streams.first();
                // SAFETY: `address` and the call's own check keep it inside of the arenas, which hold nothing of use
                // while programs are prepared.
                Ok(Work::Convolution(unsafe { handle.prepare(convolution, &operands, stream) }?))
            }
        }
    }

    fn collective(&self, op: &Op, operands: &[Place], results: &[Place], position: usize) -> Result<Work, StepError> {
        let peer = |peers: &[u32]| {
            let peer = peers.get(position).copied().filter(|&peer| peer < self.plan.manifest.ranks);
            peer.ok_or_else(|| contradiction("it has fewer peers than the stage has ranks"))
        };
        let (groups, operand, result) = match (op, operands, results) {
            // Both ends know that there is nothing to bring.
            (Op::Send { .. }, [place], []) | (Op::Recv { .. }, [], [place]) if place.ty.bytes() == Some(0) => {
                let at = self.address(place)?;
                return Ok(Work::Copy { from: at, to: at, bytes: 0 });
            }
            (Op::Send { peers, .. }, [operand], []) => {
                let what = Exchange::Send { bytes: bytes_of(&operand.ty)?, peer: peer(peers)? };
                let from = self.address(operand)?;
                return Ok(Work::Exchange { communicator: self.world()?, what, from, to: from });
            }
            (Op::Recv { peers, .. }, [], [result]) => {
                let what = Exchange::Receive { bytes: bytes_of(&result.ty)?, peer: peer(peers)? };
                let to = self.address(result)?;
                return Ok(Work::Exchange { communicator: self.world()?, what, from: to, to });
            }
            (_, [operand], [result]) if let Some(groups) = op.groups() => (groups, operand, result),
            _ => return Err(contradiction(format!("{} with these operands is no collective", op.name()))),
        };
        let group = groups.iter().find(|group| group.contains(&self.rank));
        let members = group.ok_or_else(|| contradiction("the rank is in none of its groups"))?.len() as u64;
        let (from, to) = (self.address(operand)?, self.address(result)?);
        let what = exchange(op, &operand.ty, &result.ty, members)?;
        // A group of one has nothing to exchange, and NCCL nothing to do with no bytes.
        if members == 1 || operand.ty.elements() == Some(0) {
            return Ok(Work::Copy { from, to, bytes: bytes_of(&result.ty)? });
        }
        Ok(Work::Exchange { communicator: self.communicator(groups)?, what, from, to })
    }
}

fn value_of(value: &RankScalar, position: usize) -> Result<i64, StepError> {
    value.get(position).ok_or_else(|| contradiction("a table by rank is too short"))
}

fn bytes_of(ty: &TensorType) -> Result<u64, StepError> {
    ty.bytes().ok_or_else(|| contradiction(format!("{ty} does not fit in memory")))
}

/// What a collective asks of NCCL, which moves whole runs of bytes: chunks must lie one after the other.
fn exchange(op: &Op, operand: &TensorType, result: &TensorType, members: u64) -> Result<Exchange, StepError> {
    let leads = |ty: &TensorType, axis: u8| {
        let before = ty.dims.iter().take(usize::from(axis));
        let fits = usize::from(axis) < ty.rank() && before.map(|dim| dim.capacity()).all(|size| size == 1);
        let apart = || contradiction(format!("chunks of {ty} along axis {axis} do not lie one after the other"));
        fits.then_some(()).ok_or_else(apart)
    };
    let (from, to) = (bytes_of(operand)?, bytes_of(result)?);
    let sizes = |fits: bool| fits.then_some(()).ok_or_else(|| contradiction(format!("{operand} becomes {result}")));
    let elements = result.elements().unwrap_or(0);
    match op {
        Op::AllReduce { combine, .. } => {
            sizes(from == to)?;
            Ok(Exchange::AllReduce { combine: *combine, dtype: result.dtype, elements })
        }
        Op::AllGather { axis, .. } => {
            leads(result, *axis)?;
            sizes(from.checked_mul(members) == Some(to))?;
            Ok(Exchange::AllGather { bytes: from })
        }
        Op::ReduceScatter { combine, axis, .. } => {
            leads(operand, *axis)?;
            sizes(to.checked_mul(members) == Some(from))?;
            Ok(Exchange::ReduceScatter { combine: *combine, dtype: result.dtype, elements })
        }
        Op::AllToAll { split, concat, .. } => {
            leads(operand, *split)?;
            leads(result, *concat)?;
            sizes(from == to && from.is_multiple_of(members))?;
            Ok(Exchange::AllToAll { bytes: from / members })
        }
        other => Err(contradiction(format!("{} is no collective", other.name()))),
    }
}

#[cfg(test)]
mod tests {
    use planfile::Combine;

    use super::*;

    fn f32s(sizes: &[u64]) -> TensorType {
        TensorType::new(DType::F32, sizes)
    }

    #[test]
    fn collectives_move_whole_runs() {
        let groups = || vec![vec![0, 1]];
        let gather = |axis| Op::AllGather { axis, groups: groups() };
        assert_eq!(exchange(&gather(0), &f32s(&[2, 3]), &f32s(&[4, 3]), 2).unwrap(), Exchange::AllGather { bytes: 24 });
        assert_eq!(exchange(&gather(1), &f32s(&[1, 3]), &f32s(&[1, 6]), 2).unwrap(), Exchange::AllGather { bytes: 12 });
        let apart = exchange(&gather(1), &f32s(&[2, 3]), &f32s(&[2, 6]), 2).unwrap_err().to_string();
        assert!(apart.contains("along axis 1 do not lie one after the other"), "{apart}");
        let scatter = Op::ReduceScatter { combine: Combine::Sum, axis: 0, groups: groups() };
        let expected = Exchange::ReduceScatter { combine: Combine::Sum, dtype: DType::F32, elements: 6 };
        assert_eq!(exchange(&scatter, &f32s(&[4, 3]), &f32s(&[2, 3]), 2).unwrap(), expected);
        assert!(exchange(&scatter, &f32s(&[4, 3]), &f32s(&[4, 3]), 2).is_err());
        let all = Op::AllToAll { split: 0, concat: 1, groups: groups() };
        assert_eq!(exchange(&all, &f32s(&[4]), &f32s(&[1, 4]), 2).unwrap(), Exchange::AllToAll { bytes: 8 });
        assert!(exchange(&all, &f32s(&[4, 2]), &f32s(&[2, 4]), 2).is_err());
    }
}
