//! Makes things on several threads, and hands them over in order, with a bound on the bytes that wait.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Bytes that may be under way at once; two things may be, whatever their size.
const UNDER_WAY_BYTES: u64 = 64 << 20;
/// Threads beyond these wait for the disk.
const THREADS_MAX: usize = 8;

/// Calls `make` for each job on some thread, and `take` with what came of it on this one, in the jobs' order.
///
/// # Errors
/// The first error of `take`; no further job is begun then.
pub(super) fn in_order<J: Sync, M: Send, E>(
    jobs: &[J],
    bytes: impl Fn(&J) -> u64 + Sync,
    make: impl Fn(&J) -> M + Sync,
    mut take: impl FnMut(&J, M) -> Result<(), E>,
) -> Result<(), E> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(jobs.len());
    if threads < 2 {
        return jobs.iter().try_for_each(|job| take(job, make(job)));
    }
    let line = Line { state: Mutex::new(State::default()), room: Condvar::new(), ready: Condvar::new() };
    thread::scope(|scope| {
        // Whatever ends this function early ends the threads too.
        let _end = End(&line);
        let work = || {
            let _end = EndOnPanic(&line);
            while let Some(index) = line.begin(jobs, &bytes) {
                let made = make(&jobs[index]);
                line.lock().made.insert(index, made);
                line.ready.notify_one();
            }
        };
        // Those that the system has no room for are done without.
        let begun = (0..threads).map(|_| thread::Builder::new().spawn_scoped(scope, work).is_ok());
        if begun.filter(|begun| *begun).count() == 0 {
            return jobs.iter().try_for_each(|job| take(job, make(job)));
        }
        for (index, job) in jobs.iter().enumerate() {
            // None after a panic, which the scope hands on.
            let Some(made) = line.wait_for(index) else { return Ok(()) };
            take(job, made)?;
            line.finish(bytes(job));
        }
        Ok(())
    })
}

struct Line<M> {
    state: Mutex<State<M>>,
    /// Something was taken.
    room: Condvar,
    /// Something was made.
    ready: Condvar,
}

struct State<M> {
    /// The job that is begun next.
    next: usize,
    /// Jobs begun and not taken, and their bytes.
    jobs: usize,
    bytes: u64,
    made: BTreeMap<usize, M>,
    ended: bool,
}

impl<M> Default for State<M> {
    fn default() -> Self {
        Self { next: 0, jobs: 0, bytes: 0, made: BTreeMap::new(), ended: false }
    }
}

impl<M> Line<M> {
    fn lock(&self) -> MutexGuard<'_, State<M>> {
        // Every change is whole: a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job, once there is room for it; none when there are no more.
    fn begin<J>(&self, jobs: &[J], bytes: &impl Fn(&J) -> u64) -> Option<usize> {
        let mut state = self.lock();
        loop {
            let job = jobs.get(state.next).filter(|_| !state.ended)?;
            let bytes = bytes(job);
            if state.jobs < 2 || state.bytes.saturating_add(bytes) <= UNDER_WAY_BYTES {
                state.next += 1;
                state.jobs += 1;
                state.bytes = state.bytes.saturating_add(bytes);
                return Some(state.next - 1);
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn wait_for(&self, index: usize) -> Option<M> {
        let mut state = self.lock();
        loop {
            if let Some(made) = state.made.remove(&index) {
                return Some(made);
            }
            if state.ended {
                return None;
            }
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, bytes: u64) {
        let mut state = self.lock();
        state.jobs = state.jobs.saturating_sub(1);
        state.bytes = state.bytes.saturating_sub(bytes);
        drop(state);
        self.room.notify_all();
    }

    fn end(&self) {
        self.lock().ended = true;
        self.room.notify_all();
        self.ready.notify_all();
    }
}

/// Ends the line when dropped.
struct End<'a, M>(&'a Line<M>);

impl<M> Drop for End<'_, M> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Ends the line when dropped by a panic.
struct EndOnPanic<'a, M>(&'a Line<M>);

impl<M> Drop for EndOnPanic<'_, M> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn things_come_in_order_and_few_wait() {
        let jobs: Vec<u64> = (0..200).collect();
        let (begun, most) = (AtomicU64::new(0), AtomicU64::new(0));
        let mut taken = Vec::new();
        let size = UNDER_WAY_BYTES / 4;
        let make = |job: &u64| {
            most.fetch_max(begun.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            if job.is_multiple_of(7) {
                thread::yield_now();
            }
            job * 10
        };
        in_order(
            &jobs,
            |_| size,
            make,
            |job, made| {
                assert_eq!(made, job * 10);
                taken.push(*job);
                begun.fetch_sub(1, Ordering::SeqCst);
                Ok::<(), ()>(())
            },
        )
        .unwrap();
        assert_eq!(taken, jobs);
        assert!(most.into_inner() <= 4);
    }

    #[test]
    fn large_things_come_too() {
        let made = AtomicU64::new(0);
        let make = |_: &u64| made.fetch_add(1, Ordering::SeqCst);
        in_order(&[1, 2, 3, 4, 5], |_| u64::MAX, make, |_, _| Ok::<(), ()>(())).unwrap();
        assert_eq!(made.into_inner(), 5);
    }

    #[test]
    fn an_error_ends_it() {
        let made = AtomicU64::new(0);
        let jobs = vec![UNDER_WAY_BYTES; 1000];
        let make = |_: &u64| made.fetch_add(1, Ordering::SeqCst);
        let result = in_order(&jobs, |&bytes| bytes, make, |_, number| if number < 3 { Ok(()) } else { Err("full") });
        assert_eq!(result, Err("full"));
        assert!(made.into_inner() < 20);
    }

    #[test]
    fn a_panic_is_handed_on() {
        let ended = std::panic::catch_unwind(|| {
            let make = |&job: &u64| assert_ne!(job, 7);
            in_order(&(0..20).collect::<Vec<u64>>(), |_| 1, make, |_, ()| Ok::<(), ()>(()))
        });
        assert!(ended.is_err());
    }
}
