//! What `--help` says at the end: exit codes, and the environment variables that the programs read.

use std::fmt::Write;

use clap::{Command, CommandFactory, FromArgMatches};

use super::exit::Exit;

/// A program of the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Compile,
    Plan,
}

/// An environment variable that a program reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: &'static str,
    /// What it is good for.
    pub does: &'static str,
    /// Programs that read it; all if empty.
    pub only: &'static [Program],
}

/// All of them; `tests/environment.rs` compares the list with the sources and with README.md.
pub const ENVIRONMENT: &[Variable] = &[
    both("PLANWRIGHT_CUDA_DRIVER", "file of the CUDA driver's library, instead of any search"),
    both("PLANWRIGHT_NVRTC", "the same of NVRTC"),
    both("PLANWRIGHT_CUBLASLT", "the same of cuBLASLt"),
    both("PLANWRIGHT_CUDNN", "the same of cuDNN"),
    both("PLANWRIGHT_NCCL", "the same of NCCL"),
    both("CUDA_HOME", "a CUDA toolkit, searched for libraries first"),
    both("CUDA_PATH", "the same, after CUDA_HOME"),
    both("VIRTUAL_ENV", "a Python environment whose packages are searched for libraries"),
    both("CONDA_PREFIX", "the same"),
    both("PATH", "its folders with a python3, whose packages are searched for libraries"),
    both("HOME", "its Python packages are searched for libraries; its .cache/planwright keeps machine code"),
    both("CUDA_VISIBLE_DEVICES", "of the driver: GPUs that the process may use"),
    both("RAYON_NUM_THREADS", "threads that evaluate weights and constants"),
    both("NCCL_NVLS_ENABLE", "of NCCL, set to 0 (no multicast over NVLink) unless it is set"),
    Variable {
        name: "PLANWRIGHT_CACHE",
        does: "folder that keeps machine code of kernels; may be deleted at any time",
        only: &[Program::Compile],
    },
    Variable {
        name: "XDG_CACHE_HOME",
        does: "its folder planwright keeps machine code, unless PLANWRIGHT_CACHE is set",
        only: &[Program::Compile],
    },
];

const fn both(name: &'static str, does: &'static str) -> Variable {
    Variable { name, does, only: &[] }
}

/// The command line with exit codes and variables at the end of `--help`, its own and its subcommands'.
pub fn described(command: Command, program: Program) -> Command {
    let footer = footer(program);
    let names: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let described = command.after_long_help(footer);
    names.into_iter().fold(described, |command, name| {
        command.mut_subcommand(name, |subcommand| self::described(subcommand, program))
    })
}

/// Reads the process's arguments; ends the process where they are wrong, and for `--help` and `--version`.
pub fn parse<T: CommandFactory + FromArgMatches>(program: Program) -> T {
    let matches = described(T::command(), program).get_matches();
    T::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

fn footer(program: Program) -> String {
    let mut text = "Exit codes:\n".to_owned();
    // Writing to a string cannot fail.
    for (exit, meaning) in Exit::MEANINGS {
        let _ = writeln!(text, "  {exit:>7}  {meaning}");
    }
    text.push_str("\nEnvironment variables:\n");
    for Variable { name, does, only } in ENVIRONMENT {
        if only.is_empty() || only.contains(&program) {
            let _ = writeln!(text, "  {name:<22}  {does}");
        }
    }
    text
}

/// Arguments without a description, subcommands without one, and values without a name; for tests of command lines.
pub fn undescribed(command: &Command) -> Vec<String> {
    let mut found = Vec::new();
    let name = command.get_name();
    if command.get_about().is_none() {
        found.push(format!("{name}: what does it do?"));
    }
    if command.get_after_long_help().is_none() {
        found.push(format!("{name}: no exit codes and variables at the end"));
    }
    for argument in command.get_arguments() {
        let id = argument.get_id();
        if argument.get_help().is_none_or(|help| help.to_string().trim().is_empty()) {
            found.push(format!("{name} {id}: no description"));
        }
        // What clap makes of the field's name says nothing about the value.
        let value_names = argument.get_value_names().unwrap_or_default();
        let made_up =
            value_names.iter().any(|name| name.eq_ignore_ascii_case(id.as_str()) && argument.get_long().is_some());
        if argument.get_action().takes_values() && (value_names.is_empty() || made_up) {
            found.push(format!("{name} {id}: no name of its value"));
        }
    }
    found.extend(command.get_subcommands().flat_map(undescribed));
    found
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    #[test]
    fn what_is_not_described_is_found() {
        let bare = Command::new("x").arg(Arg::new("flag").long("flag"));
        let found = undescribed(&bare);
        for word in ["what does it do", "no exit codes", "x flag: no description", "x flag: no name of its value"] {
            assert!(found.iter().any(|line| line.contains(word)), "{found:?}");
        }
        let whole = Command::new("x").about("does x").arg(Arg::new("flag").long("flag").help("f").value_name("N"));
        assert_eq!(undescribed(&described(whole, Program::Plan)), Vec::<String>::new());
    }

    #[test]
    fn subcommands_end_with_exit_codes_and_variables() {
        let command = described(Command::new("x").subcommand(Command::new("y")), Program::Plan);
        let subcommand = command.find_subcommand("y").and_then(Command::get_after_long_help).unwrap().to_string();
        assert!(subcommand.contains("70  internal error") && subcommand.contains("PLANWRIGHT_NCCL"), "{subcommand}");
        assert!(!subcommand.contains("PLANWRIGHT_CACHE"));
        assert!(footer(Program::Compile).contains("PLANWRIGHT_CACHE"));
    }
}
