//! Completions for shells.

use clap::Command;
pub use clap_complete::Shell;

/// A script that completes `command`'s flags; where to put it depends on the shell.
pub fn completions(shell: Shell, mut command: Command) -> String {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}
