//! A rank's thread: lives as long as its context, and does one job after the other on its GPU.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{Builder, JoinHandle};

use super::rank::Rank;
use crate::error::RuntimeError;
use cuda::driver::Gpu;

/// What a thread does on its rank, which is there once the first job has made it.
pub(super) type Job = Box<dyn FnOnce(&mut Option<Rank>) + Send>;

pub(super) struct RankThread {
    /// Dropped first: that ends the thread.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// Whether to leave the thread alone at the end: it hangs in a library.
    pub(super) lost: bool,
}

impl RankThread {
    /// A thread that has entered its GPU, if it has one.
    pub(super) fn start(rank: u32, gpu: Option<Arc<Gpu>>) -> Result<Self, RuntimeError> {
        let (jobs, queue) = channel::<Job>();
        let work = move || {
            // A failure shows in the first job's first call.
            let _entered = gpu.as_ref().map(|gpu| gpu.enter());
            let mut state = None;
            while let Ok(job) = queue.recv() {
                // A job answers through a channel of its own, which closes when it panics.
                let _ = catch_unwind(AssertUnwindSafe(|| job(&mut state)));
            }
        };
        let thread = Builder::new().name(format!("rank {rank}")).spawn(work);
        let thread = thread.map_err(|source| RuntimeError::Thread { rank, source })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), lost: false })
    }

    /// Whether the thread was there to take the job.
    pub(super) fn give(&self, job: Job) -> bool {
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok())
    }

    /// Lets the thread end after its jobs.
    pub(super) fn close(&mut self) {
        self.jobs = None;
    }
}

impl Drop for RankThread {
    fn drop(&mut self) {
        self.close();
        if let Some(thread) = self.thread.take()
            && !self.lost
        {
            // Panics were caught in the thread.
            let _ = thread.join();
        }
    }
}
