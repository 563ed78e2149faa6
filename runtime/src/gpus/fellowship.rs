//! What the ranks of a context share: where they meet, and how they stop when one of them fails.

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use cuda::CudaError;
use cuda::nccl::Communicator;

pub(super) struct Fellowship {
    ranks: u64,
    /// How often a rank has come to a meeting, over all ranks and meetings.
    arrived: AtomicU64,
    stopped: AtomicBool,
    /// All ranks', for whoever must free a rank that hangs in one.
    communicators: Mutex<Vec<Arc<Communicator>>>,
}

impl Fellowship {
    pub(super) fn new(ranks: u32) -> Self {
        Self {
            ranks: u64::from(ranks.max(1)),
            arrived: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            communicators: Mutex::default(),
        }
    }

    /// Everyone's waiting ends with [`CudaError::Abandoned`].
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// # Errors
    /// [`CudaError::Abandoned`] once a rank has failed.
    pub(super) fn check(&self) -> Result<(), CudaError> {
        if self.stopped.load(Ordering::Acquire) { Err(CudaError::Abandoned) } else { Ok(()) }
    }

    /// Waits until all ranks are here: they leave within a fraction of a microsecond of each other.
    pub(super) fn meet(&self) -> Result<(), CudaError> {
        let before = self.arrived.fetch_add(1, Ordering::AcqRel);
        let all = (before / self.ranks + 1) * self.ranks;
        while self.arrived.load(Ordering::Acquire) < all {
            self.check()?;
            hint::spin_loop();
        }
        Ok(())
    }

    pub(super) fn register(&self, communicator: &Arc<Communicator>) {
        let mut communicators = self.communicators.lock().unwrap_or_else(PoisonError::into_inner);
        communicators.push(Arc::clone(communicator));
    }

    /// Ends all communicators under the ranks that hang in them. Nobody waits for it: that may take as long as what
    /// they hang in, and NCCL leaves the thread on another GPU.
    pub(super) fn abort(&self) {
        self.stop();
        let all: Vec<_> = self.communicators.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
        let end = move || all.iter().for_each(|communicator| communicator.abort());
        // Without a thread, ranks that hang are given up a little later.
        let _ = Builder::new().name("abort".to_owned()).spawn(end);
    }

    /// Leaves communicators to their ranks, who end them in good order.
    pub(super) fn release(&self) {
        self.communicators.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn nobody_leaves_a_meeting_before_all_have_come() {
        let fellowship = Fellowship::new(3);
        let meetings = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for meeting in 0..50 {
                        meetings.fetch_add(1, Ordering::AcqRel);
                        fellowship.meet().unwrap();
                        assert!(meetings.load(Ordering::Acquire) >= 3 * (meeting + 1));
                    }
                });
            }
        });
        assert_eq!(meetings.into_inner(), 150);
    }

    #[test]
    fn nobody_waits_for_a_rank_that_failed() {
        let fellowship = Fellowship::new(2);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| fellowship.meet());
            fellowship.stop();
            assert_eq!(waiting.join().unwrap(), Err(CudaError::Abandoned));
        });
        assert!(fellowship.check().is_err());
    }
}
