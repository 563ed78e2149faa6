//! One rank of a context, on its own thread: memory, streams, libraries, and the programs that run on them.
#![expect(unsafe_code, reason = "runs the programs of a verified plan in arenas of its own")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use planfile::Tensor;
use planfile::plan::{Action, Place, Plan};

use super::context::{StepDuration, StepRecord};
use super::faults::{Fault, Faults};
use super::fellowship::Fellowship;
use super::memory_report::DeviceMemoryReport;
use super::session::{CudaSession, arena_bytes};
use super::work::{PreparedProgram, StepFailure, Streams};
use crate::error::{RuntimeError, StepError};
use crate::ports::names_of;
use cuda::CudaError;
use cuda::cublaslt;
use cuda::cudnn;
use cuda::driver::{DeviceMemory, Event, Gpu, Pinned, Stream, read};
use cuda::nccl::{Communicator, UniqueId};

/// Groups of ranks, as collectives name them.
type Groups = Vec<Vec<u32>>;

/// Page-locked memory that an entry's inputs and outputs of one rank pass through.
pub(super) struct Staging {
    pub(super) inputs: Pinned,
    pub(super) outputs: Pinned,
}

/// What is told of each step while a program runs step by step.
pub(crate) enum Told {
    /// The step's tensors, before and after.
    Record(StepRecord),
    /// How long it took from call to end.
    Time(StepDuration),
}

/// Fields are dropped in this order: what uses something comes before it.
pub(super) struct Rank {
    pub(super) entries: BTreeMap<usize, Vec<PreparedProgram>>,
    communicators: BTreeMap<Groups, Arc<Communicator>>,
    world: Option<Arc<Communicator>>,
    pub(super) cublaslt: Option<cublaslt::Handle>,
    pub(super) cudnn: Option<cudnn::Handle>,
    begin: Event,
    end: Event,
    pub(super) streams: Streams,
    pub(super) arena: DeviceMemory,
    pub(super) faults: Faults,
    pub(super) gpu: Arc<Gpu>,
    pub(super) session: Arc<CudaSession>,
    pub(super) plan: Arc<Plan>,
    fellowship: Arc<Fellowship>,
    pub(super) rank: u32,
}

impl Rank {
    /// Reserves memory and streams. On the rank's thread, as all else here.
    pub(super) fn new(
        rank: u32,
        plan: Arc<Plan>,
        session: Arc<CudaSession>,
        fellowship: Arc<Fellowship>,
    ) -> Result<Self, RuntimeError> {
        let gpu = session.gpus().get(rank as usize).cloned();
        let gpu = gpu.ok_or_else(|| RuntimeError::Contradiction { what: format!("rank {rank} has no GPU") })?;
        let bytes = arena_bytes(&plan, rank);
        let at = |source| RuntimeError::Rank { rank, source };
        let (free, total) = gpu.memory().map_err(at)?;
        if bytes > free {
            return Err(RuntimeError::GpuMemory { rank, ordinal: gpu.info.ordinal, needed: bytes, free, total });
        }
        let own = plan.programs.iter().filter(|program| program.ranks.contains(&rank));
        let count = own.map(|program| program.streams).max().unwrap_or(1).max(1);
        let make = || {
            let arena = DeviceMemory::allocate(&gpu, bytes)?;
            let all = (0..count).map(|_| Stream::new(&gpu)).collect::<Result<Vec<_>, _>>()?;
            let joins = (1..count).map(|_| Event::new(&gpu)).collect::<Result<Vec<_>, _>>()?;
            let streams = Streams { all, fork: Event::new(&gpu)?, joins };
            // What nobody has written is the same in every run.
            arena.clear(streams.first())?;
            streams.first().wait()?;
            let faults = Faults::new(&gpu, &plan, rank)?;
            Ok((arena, streams, faults, [Event::timed(&gpu)?, Event::timed(&gpu)?]))
        };
        let (arena, streams, faults, [begin, end]) = make().map_err(at)?;
        Ok(Self {
            entries: BTreeMap::new(),
            communicators: BTreeMap::new(),
            world: None,
            cublaslt: None,
            cudnn: None,
            begin,
            end,
            streams,
            arena,
            faults,
            gpu,
            session,
            plan,
            fellowship,
            rank,
        })
    }

    /// Joins the other ranks, and every set of groups that the plan's collectives name. All ranks do this at once.
    pub(super) fn join(&mut self, id: UniqueId) -> Result<(), RuntimeError> {
        let rank = self.rank;
        self.join_groups(id).map_err(|source| RuntimeError::Rank { rank, source })
    }

    fn join_groups(&mut self, id: UniqueId) -> Result<(), CudaError> {
        let ranks = self.plan.manifest.ranks;
        let world = Arc::new(Communicator::join(id, ranks, self.rank)?);
        self.fellowship.register(&world);
        for groups in groups_of(&self.plan) {
            let everyone: Vec<u32> = (0..ranks).collect();
            if groups == [everyone] {
                self.communicators.insert(groups, Arc::clone(&world));
                continue;
            }
            let place = groups.iter().enumerate().find_map(|(number, group)| {
                let position = group.iter().position(|&member| member == self.rank)?;
                Some((number as u32, position as u32, group.len() as u32))
            });
            if let Some(own) = world.split(place)? {
                let own = Arc::new(own);
                self.fellowship.register(&own);
                self.communicators.insert(groups, own);
            }
        }
        self.world = Some(world);
        Ok(())
    }

    pub(super) fn world(&self) -> Result<Arc<Communicator>, StepError> {
        let absent = || StepError::Contradiction { what: "a message to a rank of a plan that has one rank".to_owned() };
        self.world.clone().ok_or_else(absent)
    }

    pub(super) fn communicator(&self, groups: &Groups) -> Result<Arc<Communicator>, StepError> {
        let absent = || StepError::Contradiction { what: "a collective of a group that was not joined".to_owned() };
        self.communicators.get(groups).cloned().ok_or_else(absent)
    }

    fn first(&self) -> &Stream {
        self.streams.first()
    }

    /// Waits for the GPU, unless another rank fails in the meantime.
    pub(super) fn wait(&self) -> Result<(), RuntimeError> {
        self.wait_for_gpu().map_err(|source| RuntimeError::Rank { rank: self.rank, source })
    }

    fn wait_for_gpu(&self) -> Result<(), CudaError> {
        let Some(world) = &self.world else { return self.first().wait() };
        self.first().wait_unless(|| {
            self.fellowship.check()?;
            world.state()
        })
    }

    /// Ends what the GPU is doing after a failure: nobody comes any more to what it waits for.
    fn stop(&mut self, programs: &mut [PreparedProgram]) {
        self.fellowship.stop();
        // A communicator ends only after the graphs that use it; one that is running goes when it is over.
        for program in self.entries.values_mut().flatten().chain(programs) {
            program.graph = None;
        }
        for communicator in self.communicators.values().chain(&self.world) {
            communicator.abort();
        }
        let _ = self.first().wait();
    }

    /// What the rank takes of its GPU's memory now.
    pub(super) fn device_memory(&self) -> Result<DeviceMemoryReport, RuntimeError> {
        let absent = || RuntimeError::Contradiction { what: format!("rank {} has no weights", self.rank) };
        let weights = self.session.weights(self.rank).map_err(|_| absent())?;
        let report = DeviceMemoryReport::new(&self.plan, &self.session, (self.rank, &self.gpu), weights, &self.arena);
        report.map_err(|source| RuntimeError::Rank { rank: self.rank, source })
    }

    fn upload(&self, program: &PreparedProgram, staging: &Staging) -> Result<(), CudaError> {
        for (transfer, address) in &program.inputs {
            // SAFETY: the address has room for the port's part, which `Rank::address` checked against the arena; the
            // staging memory is not touched before the rank has waited.
            unsafe { staging.inputs.upload(transfer.range.clone(), *address, self.first()) }?;
        }
        Ok(())
    }

    fn download(&self, program: &PreparedProgram, staging: &mut Staging) -> Result<(), CudaError> {
        for (transfer, address) in &program.outputs {
            // SAFETY: as in `upload`.
            unsafe { staging.outputs.download(transfer.range.clone(), *address, self.first()) }?;
        }
        Ok(())
    }

    fn failed_step(&self, program: usize, step: usize, source: impl Into<StepError>) -> RuntimeError {
        let described = self.plan.programs.get(program).and_then(|program| program.steps.get(step));
        let origin = described.map(|step| names_of(&self.plan, step)).unwrap_or_default();
        RuntimeError::Step { rank: self.rank, program, step, origin, source: source.into() }
    }

    /// Takes an entry's programs out, so that they can be changed while the rank is used.
    fn with_programs<T>(
        &mut self,
        entry: usize,
        run: impl FnOnce(&mut Self, &mut [PreparedProgram]) -> Result<T, RuntimeError>,
    ) -> Result<T, RuntimeError> {
        let mut programs = self.entries.remove(&entry).unwrap_or_default();
        let outcome = run(self, &mut programs);
        if outcome.is_err() {
            // Work may still be going on with what the programs own.
            self.stop(&mut programs);
        }
        self.entries.insert(entry, programs);
        outcome
    }

    /// The first step of these programs that read an index that is out of range since the last time this was asked.
    /// The GPU has nothing to do.
    fn take_fault(&mut self, programs: &[PreparedProgram]) -> Result<Option<Fault>, RuntimeError> {
        let described = programs.iter().filter_map(|own| Some((own.program, self.plan.programs.get(own.program)?)));
        self.faults.take(described, self.rank).map_err(|source| RuntimeError::Rank { rank: self.rank, source })
    }

    /// Runs a prepared entry on the inputs in `staging`. The first run goes step by step and captures the graphs. A
    /// fault is no failure of the rank: it has done all its steps, and the other ranks do theirs.
    pub(super) fn run(&mut self, entry: usize, staging: &mut Staging) -> Result<Option<Fault>, RuntimeError> {
        self.with_programs(entry, |rank, programs| {
            let at = |source| RuntimeError::Rank { rank: rank.rank, source };
            for program in &mut *programs {
                rank.upload(program, staging).map_err(at)?;
                if program.graph.is_none() {
                    // Libraries load code and connect ranks on first use, which a capture would not allow; and what the
                    // driver refuses is known by its step. Indices out of range are looked for once all has run.
                    rank.step_by_step(program, None)?;
                    rank.upload(program, staging).map_err(at)?;
                    rank.capture(program)?;
                }
                if let Some(graph) = &program.graph {
                    // SAFETY: what it was captured from lives as long as the program.
                    unsafe { rank.first().launch(graph) }.map_err(at)?;
                }
                rank.download(program, staging).map_err(at)?;
            }
            rank.wait()?;
            rank.take_fault(programs)
        })
    }

    /// As [`Self::run`], step by step, each waited for, and tells of each.
    pub(super) fn run_told(
        &mut self,
        entry: usize,
        staging: &mut Staging,
        records: bool,
        tell: &mut dyn FnMut(Told),
    ) -> Result<Option<Fault>, RuntimeError> {
        self.with_programs(entry, |rank, programs| {
            let at = |source| RuntimeError::Rank { rank: rank.rank, source };
            for program in &mut *programs {
                rank.upload(program, staging).map_err(at)?;
                rank.step_by_step(program, Some((records, &mut *tell)))?;
                rank.download(program, staging).map_err(at)?;
            }
            rank.wait()?;
            rank.take_fault(programs)
        })
    }

    fn step_by_step(
        &self,
        program: &PreparedProgram,
        mut told: Option<(bool, &mut dyn FnMut(Told))>,
    ) -> Result<(), RuntimeError> {
        let number = program.program;
        let described = self.plan.programs.get(number).map(|program| program.steps.as_slice()).unwrap_or_default();
        self.wait()?;
        for (index, (step, described)) in program.steps.iter().zip(described).enumerate() {
            let failed = |source: CudaError| self.failed_step(number, index, source);
            let (operands, results) = tensors_of(&described.action);
            let before = match &told {
                Some((true, _)) => self.tensors(operands).map_err(|source| self.failed_step(number, index, source))?,
                _ => Vec::new(),
            };
            let start = Instant::now();
            // SAFETY: `prepare` resolved all addresses in the rank's arenas, which live as long as the rank.
            unsafe { step.work.enqueue(self.first()) }.map_err(failed)?;
            self.wait_for_gpu().map_err(failed)?;
            let us = start.elapsed().as_secs_f64() * 1e6;
            let (rank, program, step) = (self.rank, number, index);
            match &mut told {
                Some((true, tell)) => {
                    let results = self.tensors(results).map_err(|source| self.failed_step(number, index, source))?;
                    tell(Told::Record(StepRecord { rank, program, step, operands: before, results }));
                }
                Some((false, tell)) => tell(Told::Time(StepDuration { rank, program, step, us })),
                None => {}
            }
        }
        Ok(())
    }

    /// Copies of tensors in the rank's memory.
    fn tensors(&self, places: &[Place]) -> Result<Vec<Tensor>, StepError> {
        let copy = |place: &Place| {
            let address = self.address(place)?;
            let bytes = place.ty.bytes().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(usize::MAX);
            let mut tensor = Tensor::zeroed(place.ty.clone()).ok_or(StepError::Memory { bytes })?;
            // SAFETY: `address` checked that the tensor is in the arena.
            unsafe { read(self.first(), address, tensor.data.bytes_mut()) }?;
            Ok(tensor)
        };
        places.iter().map(copy).collect()
    }

    fn capture(&self, program: &mut PreparedProgram) -> Result<(), RuntimeError> {
        let captured = self.first().capture(|| {
            // SAFETY: as in `step_by_step`; the graph is dropped before the rank's arenas.
            unsafe { program.enqueue(&self.streams) }
        });
        let failed = |failure: StepFailure| self.failed_step(program.program, failure.step, failure.source);
        program.graph = Some(captured.map_err(failed)?);
        Ok(())
    }

    /// Microseconds of each of `runs` runs by graph, inputs uploaded before. After a first run of the entry on the same
    /// inputs, which had no faults.
    pub(super) fn time(&mut self, entry: usize, staging: &Staging, runs: u32) -> Result<Vec<f64>, RuntimeError> {
        self.with_programs(entry, |rank, programs| {
            let at = |source| RuntimeError::Rank { rank: rank.rank, source };
            let mut times = Vec::with_capacity(runs as usize);
            for _ in 0..runs {
                for (number, program) in programs.iter().enumerate() {
                    rank.upload(program, staging).map_err(at)?;
                    if number == 0 {
                        rank.wait()?;
                        rank.fellowship.meet().map_err(at)?;
                        rank.begin.record(rank.first()).map_err(at)?;
                    }
                    if let Some(graph) = &program.graph {
                        // SAFETY: as in `run`.
                        unsafe { rank.first().launch(graph) }.map_err(at)?;
                    }
                }
                if programs.is_empty() {
                    rank.fellowship.meet().map_err(at)?;
                    times.push(0.0);
                    continue;
                }
                rank.end.record(rank.first()).map_err(at)?;
                rank.wait()?;
                times.push(rank.end.us_since(&rank.begin).map_err(at)?);
            }
            Ok(times)
        })
    }

    /// Microseconds of each step alone: `repeats` times in a graph, the median of `samples` such graphs.
    pub(super) fn time_steps(
        &mut self,
        entry: usize,
        staging: &Staging,
        (repeats, samples): (u32, u32),
    ) -> Result<Vec<StepDuration>, RuntimeError> {
        self.with_programs(entry, |rank, programs| {
            let at = |source| RuntimeError::Rank { rank: rank.rank, source };
            let mut durations = Vec::new();
            for program in &mut *programs {
                rank.upload(program, staging).map_err(at)?;
                for step in 0..program.steps.len() {
                    let us = rank.time_step(program, step, (repeats.max(1), samples.max(1)));
                    let us = us.map_err(|source| rank.failed_step(program.program, step, source))?;
                    durations.push(StepDuration { rank: rank.rank, program: program.program, step, us });
                }
            }
            // A step alone may find anything where its indices were.
            rank.wait()?;
            rank.take_fault(programs)?;
            Ok(durations)
        })
    }

    fn time_step(
        &self,
        program: &PreparedProgram,
        step: usize,
        (repeats, samples): (u32, u32),
    ) -> Result<f64, CudaError> {
        let stream = self.first();
        let Some(step) = program.steps.get(step) else { return Ok(0.0) };
        // Repeating a step changes nothing: no step writes what it reads.
        // SAFETY: as in `step_by_step`.
        unsafe { step.work.enqueue(stream) }?;
        self.wait_for_gpu()?;
        let graph = stream.capture::<CudaError>(|| {
            // SAFETY: as above.
            (0..repeats).try_for_each(|_| unsafe { step.work.enqueue(stream) })
        })?;
        let mut times = Vec::with_capacity(samples as usize);
        for _ in 0..=samples {
            self.begin.record(stream)?;
            // SAFETY: as above; waited for before the graph is dropped.
            unsafe { stream.launch(&graph) }?;
            self.end.record(stream)?;
            self.wait_for_gpu()?;
            times.push(self.end.us_since(&self.begin)? / f64::from(repeats));
        }
        // The first one warms up.
        let times = &mut times[1..];
        times.sort_unstable_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // What follows frees what the GPU may still use.
        if self.wait_for_gpu().is_err() {
            self.stop(&mut []);
        }
    }
}

/// Groups that need a communicator, each once, in an order that all ranks share.
fn groups_of(plan: &Plan) -> BTreeSet<Groups> {
    let steps = plan.programs.iter().flat_map(|program| &program.steps);
    let groups = steps.filter_map(|step| match &step.action {
        Action::Collective { op, .. } => op.groups(),
        Action::Launch { .. } | Action::Library { .. } | Action::Copy { .. } | Action::Persistent { .. } => None,
    });
    groups.filter(|groups| groups.iter().any(|group| group.len() > 1)).cloned().collect()
}

/// Tensors that a step reads and writes.
fn tensors_of(action: &Action) -> (&[Place], &[Place]) {
    match action {
        Action::Launch { operands, results, .. }
        | Action::Library { operands, results, .. }
        | Action::Collective { operands, results, .. } => (operands, results),
        Action::Copy { from, to } => (std::slice::from_ref(from), std::slice::from_ref(to)),
        Action::Persistent { .. } => (&[], &[]),
    }
}
