//! What steps have become: calls with all their arguments, ready to be put on a stream.
#![expect(unsafe_code, reason = "puts work on a GPU, at addresses of a verified plan")]

use std::sync::Arc;

use super::transfer::Transfer;
use cuda::CudaError;
use cuda::cublaslt::PreparedMatmul;
use cuda::cudnn::PreparedConvolution;
use cuda::driver::{Address, Event, Function, Graph, Stream};
use cuda::nccl::{Communicator, Exchange};

/// One step's call.
pub(super) enum Work {
    Launch { function: Function, grid: [u32; 3], block: [u32; 3], shared_bytes: u32, parameters: Vec<u64> },
    Matmul(PreparedMatmul),
    Convolution(PreparedConvolution),
    Exchange { communicator: Arc<Communicator>, what: Exchange, from: Address, to: Address },
    Copy { from: Address, to: Address, bytes: u64 },
}

/// A step with its place in the program's order.
pub(super) struct PreparedStep {
    pub(super) work: Work,
    pub(super) stream: usize,
    /// Steps on other streams that must be over first.
    pub(super) waits: Vec<usize>,
    /// Recorded behind the step, where others wait for it.
    pub(super) done: Option<Event>,
}

/// A program of one rank.
pub(super) struct PreparedProgram {
    /// Index into the plan's programs.
    pub(super) program: usize,
    /// Where its inputs go and its outputs come from.
    pub(super) inputs: Vec<(Transfer, Address)>,
    pub(super) outputs: Vec<(Transfer, Address)>,
    pub(super) steps: Vec<PreparedStep>,
    /// Captured on the first run.
    pub(super) graph: Option<Graph>,
}

/// A rank's streams; those besides the first begin after what is on it, and it goes on after them.
pub(super) struct Streams {
    /// At least one.
    pub(super) all: Vec<Stream>,
    pub(super) fork: Event,
    /// One for each stream besides the first.
    pub(super) joins: Vec<Event>,
}

impl Streams {
    pub(super) fn first(&self) -> &Stream {
        &self.all[0]
    }
}

impl Work {
    /// Puts the call on the stream.
    ///
    /// # Safety
    /// The addresses are those of a verified plan in arenas, and these and the libraries' handles stay until the stream
    /// is done.
    pub(super) unsafe fn enqueue(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; each call is within operands and results that the plan's verification covers,
        // and a kernel's parameters were counted when the step was prepared.
        unsafe {
            match self {
                Self::Launch { function, grid, block, shared_bytes, parameters } => {
                    function.launch(stream, (*grid, *block, *shared_bytes), parameters)
                }
                Self::Matmul(matmul) => matmul.enqueue(stream),
                Self::Convolution(convolution) => convolution.enqueue(stream),
                Self::Exchange { communicator, what, from, to } => communicator.exchange(*what, *from, *to, stream),
                Self::Copy { from, to, bytes } => stream.copy(*from, *to, *bytes),
            }
        }
    }
}

impl PreparedProgram {
    /// Puts all steps on the streams, in the plan's order. A failure names its step.
    ///
    /// # Safety
    /// As for [`Work::enqueue`].
    pub(super) unsafe fn enqueue(&self, streams: &Streams) -> Result<(), StepFailure> {
        let at = |step: usize| move |source: CudaError| StepFailure { step, source };
        let (first, others) = (streams.first(), &streams.all[1..]);
        if !others.is_empty() {
            streams.fork.record(first).map_err(at(0))?;
            for other in others {
                other.wait_for(&streams.fork).map_err(at(0))?;
            }
        }
        for (number, step) in self.steps.iter().enumerate() {
            let stream = streams.all.get(step.stream).unwrap_or(first);
            for event in step.waits.iter().filter_map(|&from| self.steps.get(from)?.done.as_ref()) {
                stream.wait_for(event).map_err(at(number))?;
            }
            // SAFETY: the caller's promise.
            unsafe { step.work.enqueue(stream) }.map_err(at(number))?;
            if let Some(done) = &step.done {
                done.record(stream).map_err(at(number))?;
            }
        }
        let last = self.steps.len().saturating_sub(1);
        for (other, join) in others.iter().zip(&streams.joins) {
            join.record(other).map_err(at(last))?;
            first.wait_for(join).map_err(at(last))?;
        }
        Ok(())
    }
}

/// A step that could not be put on a stream.
#[derive(Debug)]
pub(super) struct StepFailure {
    pub(super) step: usize,
    pub(super) source: CudaError,
}

impl From<CudaError> for StepFailure {
    /// Of the capture as a whole.
    fn from(source: CudaError) -> Self {
        Self { step: 0, source }
    }
}
