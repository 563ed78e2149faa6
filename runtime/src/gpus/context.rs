//! A context on GPUs, from its caller's side: hands out work to the ranks' threads and collects what comes of it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use planfile::Tensor;
use planfile::plan::Plan;

use super::faults::Fault;
use super::fellowship::Fellowship;
use super::memory_report::DeviceMemoryReport;
use super::rank::{Rank, Staging, Told};
use super::session::CudaSession;
use super::thread::RankThread;
use super::transfer::Transfers;
use crate::error::{RuntimeError, StepError};
use crate::ports::{PartOf, Piece, assemble, misfit, names_of};
use cuda::CudaError;
use cuda::driver::Pinned;
use cuda::nccl::Nccl;

/// How long ranks get to notice that another one failed, before they are torn out of what they wait for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Messages of steps that may wait for the caller before ranks wait for it.
const MESSAGES: usize = 16;

/// What a rank had in memory around a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRecord {
    pub rank: u32,
    /// Index into the plan's programs.
    pub program: usize,
    /// Index into the program's steps.
    pub step: usize,
    /// Before the step.
    pub operands: Vec<Tensor>,
    /// After it.
    pub results: Vec<Tensor>,
}

/// How long a rank took for a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepDuration {
    pub rank: u32,
    /// Index into the plan's programs.
    pub program: usize,
    /// Index into the program's steps.
    pub step: usize,
    /// Microseconds.
    pub us: f64,
}

pub(crate) struct CudaContext {
    plan: Arc<Plan>,
    session: Arc<CudaSession>,
    threads: Vec<RankThread>,
    /// By rank. Absent while a rank has it, and for good if that rank failed.
    staging: Vec<Option<Staging>>,
    fellowship: Arc<Fellowship>,
    broken: bool,
}

/// What comes back from a rank.
enum Message<T> {
    Told(Told),
    Done(u32, Result<T, RuntimeError>),
    /// The job is over, with an answer or without: it panicked.
    Over(u32),
}

/// Tells when the job it belongs to is over, however it ends.
struct Ending<T> {
    rank: u32,
    sender: SyncSender<Message<T>>,
}

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        // A caller that has gone needs no answer.
        let _ = self.sender.send(Message::Over(self.rank));
    }
}

impl CudaContext {
    /// Reserves activation memory on all ranks and connects them.
    pub(crate) fn new(plan: Arc<Plan>, session: &Arc<CudaSession>) -> Result<Self, RuntimeError> {
        let ranks = plan.manifest.ranks;
        let fellowship = Arc::new(Fellowship::new(ranks));
        let mut threads = Vec::new();
        let mut staging = Vec::new();
        for (rank, gpu) in (0u32..).zip(session.gpus()) {
            threads.push(RankThread::start(rank, Some(Arc::clone(gpu)))?);
            let (mut inputs, mut outputs) = (0, 0);
            for entry in &plan.manifest.entries {
                let transfers = Transfers::new(&plan, entry, rank)?;
                inputs = transfers.input_bytes.max(inputs);
                outputs = transfers.output_bytes.max(outputs);
            }
            let pinned = |bytes| Pinned::zeroed(gpu, bytes).map_err(|source| RuntimeError::Rank { rank, source });
            staging.push(Some(Staging { inputs: pinned(inputs)?, outputs: pinned(outputs)? }));
        }
        let session = Arc::clone(session);
        let mut context = Self { plan, session, threads, staging, fellowship, broken: false };
        let make = |rank: u32| {
            let (plan, session) = (Arc::clone(&context.plan), Arc::clone(&context.session));
            let fellowship = Arc::clone(&context.fellowship);
            let job = move |state: &mut Option<Rank>, _: &mut dyn FnMut(Told)| {
                *state = Some(Rank::new(rank, plan, session, fellowship)?);
                Ok(())
            };
            Box::new(job) as RankJob<()>
        };
        let (outcome, lost) = context.on_all(make, &mut |_| {});
        context.settle(outcome, &lost)?;
        if context.session.exchanges() {
            let id = Nccl::ready()?.unique_id()?;
            context.each(move |rank| rank.join(id))?;
        }
        Ok(context)
    }

    /// Runs an entry on whole inputs in the order of its ports; whole outputs in that of the entry.
    pub(crate) fn run(&mut self, entry: usize, inputs: &[&Tensor]) -> Result<Vec<Tensor>, RuntimeError> {
        self.begin(entry, inputs)?;
        let faults = self.staged(move |rank, staging, _| rank.run(entry, staging), &mut |_| {})?;
        self.fail_first(faults)?;
        self.outputs(entry)
    }

    /// As [`Self::run`], step by step; `told` gets each rank's steps, with their tensors if `records`.
    pub(crate) fn run_told(
        &mut self,
        entry: usize,
        inputs: &[&Tensor],
        records: bool,
        told: &mut dyn FnMut(Told),
    ) -> Result<Vec<Tensor>, RuntimeError> {
        self.begin(entry, inputs)?;
        let faults = self.staged(move |rank, staging, tell| rank.run_told(entry, staging, records, tell), told)?;
        self.fail_first(faults)?;
        self.outputs(entry)
    }

    /// Microseconds of each of `runs` runs by graph, of the rank that takes longest.
    pub(crate) fn time(&mut self, entry: usize, inputs: &[&Tensor], runs: u32) -> Result<Vec<f64>, RuntimeError> {
        self.run(entry, inputs)?;
        let times = self.staged(move |rank, staging, _| rank.time(entry, staging, runs), &mut |_| {})?;
        let longest = |run: usize| times.iter().filter_map(|times| times.get(run).copied()).fold(0.0, f64::max);
        Ok((0..runs as usize).map(longest).collect())
    }

    /// Each rank's steps alone.
    pub(crate) fn time_steps(
        &mut self,
        entry: usize,
        inputs: &[&Tensor],
        samples: (u32, u32),
    ) -> Result<Vec<StepDuration>, RuntimeError> {
        self.run(entry, inputs)?;
        let times = self.staged(move |rank, staging, _| rank.time_steps(entry, staging, samples), &mut |_| {})?;
        Ok(times.into_iter().flatten().collect())
    }

    /// What each rank takes of its GPU's memory now.
    pub(crate) fn device_memory(&mut self) -> Result<Vec<DeviceMemoryReport>, RuntimeError> {
        if self.broken {
            return Err(RuntimeError::Broken);
        }
        self.each(|rank| rank.device_memory())
    }

    /// As [`Self::run`], in which one rank's thread panics instead.
    #[cfg(test)]
    pub(crate) fn run_with_panic(&mut self, entry: usize, inputs: &[&Tensor], fails: u32) -> Result<(), RuntimeError> {
        self.begin(entry, inputs)?;
        let run = move |rank: &mut Rank, staging: &mut Staging, _: &mut dyn FnMut(Told)| {
            assert!(rank.rank != fails, "as the test wants it");
            rank.run(entry, staging)
        };
        self.staged(run, &mut |_| {}).map(drop)
    }

    /// Prepares the entry on all ranks and cuts the inputs into the staging memory.
    fn begin(&mut self, entry: usize, inputs: &[&Tensor]) -> Result<(), RuntimeError> {
        if self.broken {
            return Err(RuntimeError::Broken);
        }
        self.each(move |rank| rank.prepare(entry))?;
        let contradiction = |what: String| RuntimeError::Contradiction { what };
        let described = self.plan.manifest.entries.get(entry);
        let described = described.ok_or_else(|| contradiction(format!("there is no entry number {entry}")))?;
        for (rank, staging) in (0u32..).zip(&mut self.staging) {
            let Some(staging) = staging else { return Err(RuntimeError::Broken) };
            for transfer in Transfers::new(&self.plan, described, rank)?.inputs {
                let binding = &self.plan.programs[transfer.program].inputs[transfer.binding];
                let input = inputs.get(binding.port as usize);
                let input = input.ok_or_else(|| contradiction(format!("there is no input number {}", binding.port)))?;
                let local = &mut staging.inputs.bytes_mut()[transfer.range];
                let copied = PartOf::new(&input.ty, binding).at(transfer.position).scatter(input.data.bytes(), local);
                copied.ok_or_else(|| contradiction(misfit("input", binding)))?;
            }
        }
        Ok(())
    }

    /// The error of the step that first read an index that is out of range, on the first rank where it did. What
    /// follows from it is not told. All ranks are done, so that the context goes on to be of use.
    fn fail_first(&self, faults: Vec<Option<Fault>>) -> Result<(), RuntimeError> {
        let Some(Fault { program, step, rank }) = faults.into_iter().flatten().min() else { return Ok(()) };
        let described = self.plan.programs.get(program).and_then(|program| program.steps.get(step));
        let origin = described.map(|step| names_of(&self.plan, step)).unwrap_or_default();
        Err(RuntimeError::Step { rank, program, step, origin, source: StepError::OutOfRange })
    }

    /// Puts outputs together from the staging memory.
    fn outputs(&self, entry: usize) -> Result<Vec<Tensor>, RuntimeError> {
        let described = self.plan.manifest.entries.get(entry);
        let described = described
            .ok_or_else(|| RuntimeError::Contradiction { what: format!("there is no entry number {entry}") })?;
        let mut pieces = Vec::new();
        for (rank, staging) in (0u32..).zip(&self.staging) {
            let Some(staging) = staging else { return Err(RuntimeError::Broken) };
            for transfer in Transfers::new(&self.plan, described, rank)?.outputs {
                let bytes = &staging.outputs.bytes()[transfer.range];
                let (program, binding, position) = (transfer.program, transfer.binding, transfer.position);
                pieces.push(Piece { program, binding, position, bytes });
            }
        }
        assemble(&self.plan, described, pieces)
    }

    /// Does the same on all ranks at once.
    fn each<T: Send + 'static>(
        &mut self,
        work: impl Fn(&mut Rank) -> Result<T, RuntimeError> + Clone + Send + 'static,
    ) -> Result<Vec<T>, RuntimeError> {
        let make = |_| {
            let work = work.clone();
            let job = move |state: &mut Option<Rank>, _: &mut dyn FnMut(Told)| match state {
                Some(rank) => work(rank),
                None => Err(RuntimeError::Broken),
            };
            Box::new(job) as RankJob<T>
        };
        let (outcome, lost) = self.on_all(make, &mut |_| {});
        self.settle(outcome, &lost)
    }

    /// As [`Self::each`], with the rank's staging memory, which is the rank's until it is done.
    fn staged<T: Send + 'static>(
        &mut self,
        work: impl Fn(&mut Rank, &mut Staging, &mut dyn FnMut(Told)) -> Result<T, RuntimeError> + Clone + Send + 'static,
        told: &mut dyn FnMut(Told),
    ) -> Result<Vec<T>, RuntimeError> {
        let mut staging: Vec<Option<Staging>> = self.staging.iter_mut().map(Option::take).collect();
        let make = |number: u32| {
            let (work, staging) = (work.clone(), staging.get_mut(number as usize).and_then(Option::take));
            let job = move |state: &mut Option<Rank>, tell: &mut dyn FnMut(Told)| match (state, staging) {
                (Some(rank), Some(mut staging)) => {
                    let outcome = work(rank, &mut staging, tell);
                    Ok((outcome?, staging))
                }
                _ => Err(RuntimeError::Broken),
            };
            Box::new(job) as RankJob<(T, Staging)>
        };
        let (outcome, lost) = self.on_all(make, told);
        let (results, staging): (Vec<T>, Vec<Staging>) = self.settle(outcome, &lost)?.into_iter().unzip();
        self.staging = staging.into_iter().map(Some).collect();
        Ok(results)
    }

    /// Remembers that a context is of no use after a failure: its ranks have stopped at different places.
    fn settle<T>(&mut self, outcome: Result<T, RuntimeError>, lost: &[u32]) -> Result<T, RuntimeError> {
        for &rank in lost {
            if let Some(thread) = self.threads.get_mut(rank as usize) {
                thread.lost = true;
            }
        }
        self.broken |= outcome.is_err();
        outcome
    }

    /// As [`on_all`], when no other context's ranks are at work.
    fn on_all<T: Send + 'static>(
        &self,
        make: impl FnMut(u32) -> RankJob<T>,
        told: &mut dyn FnMut(Told),
    ) -> (Result<Vec<T>, RuntimeError>, Vec<u32>) {
        let _turn = self.session.turn();
        on_all(make, &self.threads, &self.fellowship, told)
    }
}

/// What a rank does, and tells meanwhile.
type RankJob<T> = Box<dyn FnOnce(&mut Option<Rank>, &mut dyn FnMut(Told)) -> Result<T, RuntimeError> + Send>;

/// Gives each rank a job and waits for all; results by rank, and the ranks that never came back.
///
/// When one fails, the others are told to stop, and after a while torn out of what they wait for. The error is the
/// first that is not about another's failure.
fn on_all<T: Send + 'static>(
    mut make: impl FnMut(u32) -> RankJob<T>,
    threads: &[RankThread],
    fellowship: &Fellowship,
    told: &mut dyn FnMut(Told),
) -> (Result<Vec<T>, RuntimeError>, Vec<u32>) {
    let (sender, messages) = sync_channel::<Message<T>>(MESSAGES);
    let mut outcomes: Vec<Option<Result<T, RuntimeError>>> = threads.iter().map(|_| None).collect();
    for (rank, thread) in (0u32..).zip(threads) {
        let job = make(rank);
        let ending = Ending { rank, sender: sender.clone() };
        let given = thread.give(Box::new(move |state| {
            let sender = ending.sender.clone();
            let outcome = job(state, &mut |told| {
                let _ = sender.send(Message::Told(told));
            });
            let _ = sender.send(Message::Done(rank, outcome));
            drop(ending);
        }));
        if !given {
            outcomes[rank as usize] = Some(Err(RuntimeError::Panicked { rank }));
            fellowship.stop();
        }
    }
    drop(sender);
    let lost = collect(&messages, &mut outcomes, fellowship, told);
    let mut results = Vec::with_capacity(outcomes.len());
    let (mut failure, mut abandoned) = (None, None);
    for (rank, outcome) in (0u32..).zip(outcomes) {
        match outcome.unwrap_or(Err(RuntimeError::Panicked { rank })) {
            Ok(result) => results.push(result),
            Err(error) if is_abandoned(&error) => abandoned = abandoned.or(Some(error)),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure.or(abandoned) {
        Some(error) => (Err(error), lost),
        None => (Ok(results), lost),
    }
}

/// Takes messages until all jobs are over; the ranks that hang for good.
fn collect<T>(
    messages: &Receiver<Message<T>>,
    outcomes: &mut [Option<Result<T, RuntimeError>>],
    fellowship: &Fellowship,
    told: &mut dyn FnMut(Told),
) -> Vec<u32> {
    let mut over: Vec<bool> = outcomes.iter().map(Option::is_some).collect();
    let mut aborted = false;
    while over.contains(&false) {
        let stopped = fellowship.check().is_err();
        let message = if stopped {
            messages.recv_timeout(PATIENCE)
        } else {
            messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match message {
            Ok(Message::Told(step)) => told(step),
            Ok(Message::Done(rank, outcome)) => {
                if outcome.is_err() {
                    fellowship.stop();
                }
                outcomes[rank as usize] = Some(outcome);
            }
            Ok(Message::Over(rank)) => {
                if outcomes[rank as usize].is_none() {
                    fellowship.stop();
                }
                over[rank as usize] = true;
            }
            Err(RecvTimeoutError::Timeout) if !aborted => {
                aborted = true;
                fellowship.abort();
            }
            Err(_) => break,
        }
    }
    (0u32..).zip(over).filter(|(_, over)| !over).map(|(rank, _)| rank).collect()
}

fn is_abandoned(error: &RuntimeError) -> bool {
    matches!(
        error,
        RuntimeError::Rank { source: CudaError::Abandoned, .. }
            | RuntimeError::Step { source: StepError::Abandoned | StepError::Cuda(CudaError::Abandoned), .. }
            | RuntimeError::Broken
    )
}

impl Drop for CudaContext {
    fn drop(&mut self) {
        let session = Arc::clone(&self.session);
        // Freeing memory waits for a GPU.
        let _turn = session.turn();
        // Communicators end together: each rank drops its own, and none may wait for another's thread.
        self.fellowship.release();
        for thread in &mut self.threads {
            thread.close();
        }
        self.threads.clear();
        self.staging.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Threads without GPUs.
    fn threads(count: u32) -> (Vec<RankThread>, Fellowship) {
        ((0..count).map(|rank| RankThread::start(rank, None).unwrap()).collect(), Fellowship::new(count))
    }

    fn job<T>(work: impl FnOnce(&mut dyn FnMut(Told)) -> Result<T, RuntimeError> + Send + 'static) -> RankJob<T> {
        Box::new(move |_, tell| work(tell))
    }

    #[test]
    fn results_come_by_rank_and_steps_as_they_are_told() {
        let (threads, fellowship) = threads(3);
        let mut steps = 0;
        let make = |rank| {
            job(move |tell| {
                for step in 0..100 {
                    tell(Told::Time(StepDuration { rank, program: 0, step, us: 1.0 }));
                }
                Ok(10 * rank)
            })
        };
        let (outcome, lost) = on_all(make, &threads, &fellowship, &mut |_| steps += 1);
        assert_eq!((outcome.unwrap(), lost, steps), (vec![0, 10, 20], vec![], 300));
    }

    #[test]
    fn a_rank_that_panics_is_named_and_frees_the_others() {
        let (threads, fellowship) = threads(3);
        let fellowship = Arc::new(fellowship);
        let make = |rank| {
            let fellowship = Arc::clone(&fellowship);
            job(move |_| {
                assert!(rank != 1, "as the test wants it");
                fellowship.meet().map_err(|source| RuntimeError::Rank { rank, source })
            })
        };
        let (outcome, lost) = on_all(make, &threads, &fellowship, &mut |_| {});
        assert!(matches!(outcome, Err(RuntimeError::Panicked { rank: 1 })), "{outcome:?}");
        assert!(lost.is_empty());
        // Its thread lives on, to free what the rank has.
        assert!(threads[1].give(Box::new(|_| {})));
    }

    #[test]
    fn the_cause_is_reported_and_not_what_followed_from_it() {
        let (threads, fellowship) = threads(2);
        let fellowship = Arc::new(fellowship);
        let make = |rank| {
            let fellowship = Arc::clone(&fellowship);
            job::<()>(move |_| match rank {
                0 => Err(RuntimeError::Rank { rank, source: fellowship.meet().unwrap_err() }),
                _ => Err(RuntimeError::SameGpu { ordinal: 7 }),
            })
        };
        let (outcome, _) = on_all(make, &threads, &fellowship, &mut |_| {});
        assert!(matches!(outcome, Err(RuntimeError::SameGpu { ordinal: 7 })), "{outcome:?}");
    }
}
