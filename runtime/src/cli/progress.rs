//! Signs of life on standard error, where that is a terminal.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Work on fewer bytes is over before a bar could be read.
const SHOWN_FROM_BYTES: u64 = 256 << 20;

/// A bar over bytes; hidden for small totals, and where standard error is no terminal.
pub fn bytes_bar(what: &'static str, total_bytes: u64) -> ProgressBar {
    if total_bytes < SHOWN_FROM_BYTES {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}");
    let bar = ProgressBar::new(total_bytes).with_message(what);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// A spinner for work of unknown length; hidden where standard error is no terminal.
pub fn spinner() -> ProgressBar {
    // Ticks come from a thread, which only a terminal is worth.
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
