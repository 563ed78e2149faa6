//! Too little memory ends a command with an exit code, not with `SIGABRT`.
//!
//! What is large is allocated where failing is an error that says for what. Everything else goes through here: Rust
//! aborts the process when such an allocation fails, and the abort is turned into the exit code. Programs that embed the
//! library choose for themselves.

#![expect(unsafe_code, reason = "an allocator is an unsafe trait, and a signal handler has rules of its own")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, Ordering};

use planfile::replace::try_abandon_all;
use signal_hook::consts::SIGABRT;
use signal_hook::low_level::{exit, register};

use super::Exit;

/// The system's allocator, which remembers whether it ever failed. For `#[global_allocator]`.
#[derive(Debug)]
pub struct Allocator;

static HAS_FAILED: AtomicBool = AtomicBool::new(false);

const ADVICE: &[u8] = b"error: there is too little memory; use a machine with more of it, or raise `ulimit -v`\n";

fn noted(memory: *mut u8) -> *mut u8 {
    if memory.is_null() {
        HAS_FAILED.store(true, Ordering::Relaxed);
    }
    memory
}

// SAFETY: every method is the system allocator's, whose contract is the trait's.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that the system's allocator asks for; so below.
        noted(unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        noted(unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as above.
        noted(unsafe { System.realloc(memory, layout, bytes) })
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// From now on, an abort after a failed allocation is [`Exit::Invalid`]. Any other abort stays one: when the handler
/// returns, the system ends the process.
pub(super) fn handle() {
    let end = || {
        if HAS_FAILED.load(Ordering::Relaxed) {
            try_abandon_all();
            let _ = rustix::io::write(rustix::stdio::stderr(), ADVICE);
            exit(Exit::Invalid as i32);
        }
    };
    // SAFETY: atomic reads and system calls, all of which a handler may do; nothing here waits for a lock or panics, and
    // only a path of hundreds of bytes allocates, where failing comes back here and finds the lock taken.
    let _ = unsafe { register(SIGABRT, end) };
}
