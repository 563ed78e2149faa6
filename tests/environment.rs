//! Holds that `--help` and README.md name the environment variables that the programs read, and no others.

#![expect(clippy::panic, reason = "a test stops at the first surprise")]

mod sources;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use runtime::cli::{ENVIRONMENT, Exit};
use sources::{contains_word, expect_none, root, rust_below};

/// What libraries read that the programs use.
const READ_BY_LIBRARIES: [&str; 2] = ["CUDA_VISIBLE_DEVICES", "RAYON_NUM_THREADS"];
/// Files that list variables and read none.
const LISTS: [&str; 1] = ["runtime/src/cli/help.rs"];

/// Names in capitals that stand in quotes: what a source may read from the environment. One word may be any name, unless
/// it is the first argument of a call.
fn quoted_capitals(text: &str) -> BTreeSet<&str> {
    let is_name = |word: &&str| {
        word.len() > 3
            && word.starts_with(|c: char| c.is_ascii_uppercase())
            && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    };
    let parts: Vec<&str> = text.split('"').collect();
    let named = |pair: &[&'_ str]| pair[1].contains('_') || pair[0].ends_with('(');
    parts.windows(2).filter(|pair| is_name(&pair[1]) && named(pair)).map(|pair| pair[1]).collect()
}

/// What the programs' own sources read: every name beginning with PLANWRIGHT_, and every name in capitals in a file
/// that reads the environment. Unit tests at a file's end do not count.
fn read_by_programs() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for source in ["src", "runtime", "passes", "kernels"].iter().flat_map(|folder| rust_below(folder)) {
        if source.path.contains("/tests/") || LISTS.contains(&source.path.as_str()) {
            continue;
        }
        let own = source.text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let reads = own.contains("env::var") || own.contains("env::set_var");
        let names = quoted_capitals(own).into_iter().filter(|name| reads || name.starts_with("PLANWRIGHT_"));
        found.extend(names.map(str::to_owned));
    }
    found
}

#[test]
fn every_variable_that_is_read_is_listed_and_no_other() {
    let mut read = read_by_programs();
    read.extend(READ_BY_LIBRARIES.map(str::to_owned));
    let listed: BTreeSet<String> = ENVIRONMENT.iter().map(|variable| variable.name.to_owned()).collect();
    assert!(read.contains("PLANWRIGHT_CACHE") && read.contains("CUDA_HOME"), "the search is broken: {read:?}");
    let differences: Vec<String> = read.symmetric_difference(&listed).cloned().collect();
    expect_none("runtime/src/cli/help.rs lists the variables that the programs read.", &differences);
}

#[test]
fn the_readme_names_every_variable_and_exit_code() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let mut missing: Vec<String> = ENVIRONMENT
        .iter()
        .map(|variable| variable.name.to_owned())
        .filter(|name| !contains_word(&readme, &format!("`{name}`")))
        .collect();
    for (exit, meaning) in Exit::MEANINGS {
        let row = format!("| {exit} | {meaning} |");
        if !readme.lines().any(|line| line == row) {
            missing.push(row);
        }
    }
    expect_none("README.md has every environment variable and exit code.", &missing);
    // None that there is not.
    let words = readme.split(|c: char| !(c.is_ascii_uppercase() || c == '_'));
    let unknown: Vec<String> = words
        .filter(|word| word.starts_with("PLANWRIGHT_") && !ENVIRONMENT.iter().any(|variable| variable.name == *word))
        .map(str::to_owned)
        .collect();
    expect_none("README.md names variables that are read.", &unknown);
}

#[test]
fn help_ends_with_exit_codes_and_variables() {
    let output = Command::new(env!("CARGO_BIN_EXE_compile")).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    for variable in ENVIRONMENT {
        assert!(help.contains(variable.name), "{} is not in\n{help}", variable.name);
    }
    let Some((_, codes)) = help.split_once("Exit codes:") else { panic!("no exit codes in\n{help}") };
    assert!(Exit::MEANINGS.iter().all(|(_, meaning)| codes.contains(meaning)), "{codes}");
}
