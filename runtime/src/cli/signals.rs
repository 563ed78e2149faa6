//! What a command does when a signal ends it, or a limit on the size of files stops it.
//!
//! Without this, an unfinished plan would stay beside the place it was to go to.

use std::fs;
use std::sync::Arc;
use std::thread::Builder;

use planfile::replace::abandon_all;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXCPU, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level::exit;

/// Signals that end a command by default, and are sent for that.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGTERM, SIGXCPU];
/// Added to a signal's number: the exit code that shells show for a command that a signal ended.
const EXIT_BY_SIGNAL: i32 = 128;

/// From now on, a signal that ends this process removes its unfinished files first, and a write beyond the limit on the
/// size of files is an error instead of a signal. Signals that whoever started the process had it ignore, as `nohup`
/// does, stay ignored.
pub(super) fn handle() {
    let ignored = ignored();
    // A handler that does nothing: the write then fails with `EFBIG`.
    if !is_in(ignored, SIGXFSZ) {
        let _ = signal_hook::flag::register(SIGXFSZ, Arc::default());
    }
    let ending: Vec<i32> = ENDING.into_iter().filter(|&signal| !is_in(ignored, signal)).collect();
    // A thread of its own may take locks, which a handler may not. Where there is none, the system ends the process,
    // and the next one removes what it left.
    let wait = move || {
        let Ok(mut signals) = Signals::new(ending) else { return };
        if let Some(signal) = signals.forever().next() {
            abandon_all();
            // At once: destructors of what still runs would be in its way.
            exit(EXIT_BY_SIGNAL + signal);
        }
    };
    let _ = Builder::new().name("signals".to_owned()).stack_size(STACK_BYTES).spawn(wait);
}

/// The thread removes files and ends.
const STACK_BYTES: usize = 64 << 10;

/// Signals that this process ignores, signal `n` as bit `n - 1`. None where the system does not tell.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn is_in(mask: u64, signal: i32) -> bool {
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::SIGPIPE;

    use super::*;

    #[test]
    fn what_is_ignored_is_known() {
        // Rust's own start-up code ignores it.
        assert!(is_in(ignored(), SIGPIPE));
        assert!(!is_in(ignored(), SIGXFSZ));
    }
}
