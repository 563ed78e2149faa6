//! Holds the arrows between the crates, and what is absent from each: the invariants of README.md's architecture.

#![expect(clippy::panic, reason = "a test stops at the first surprise")]

mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use sources::{Source, contains_word, expect_none, root, rust_below, sources_below};

/// Every workspace crate with the workspace crates that it may name.
const ARROWS: &[(&str, &[&str])] = &[
    ("planfile", &[]),
    ("cpu", &["planfile"]),
    ("cuda", &["planfile"]),
    ("kernels", &["planfile"]),
    ("ir", &["planfile"]),
    ("onnx", &["planfile", "cpu", "ir"]),
    ("passes", &["planfile", "cpu", "ir", "kernels"]),
    ("runtime", &["planfile", "cpu", "cuda"]),
    ("planwright", &["planfile", "cpu", "cuda", "ir", "onnx", "passes", "runtime"]),
];

/// What `runtime` must not link, directly or through anything: it ships to production.
const ABSENT_FROM_RUNTIME: &[&str] = &["egg", "petgraph", "prost", "ir", "passes", "kernels", "onnx"];

/// Runs cargo in the root, without the network: building this test has already fetched what is needed.
fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(arguments)
        .arg("--offline")
        .output()
        .unwrap_or_else(|error| panic!("cargo {arguments:?}: {error}"));
    assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Names of the packages that are linked into `package`, itself left out.
fn linked_into(package: &str) -> BTreeSet<String> {
    cargo(&["tree", "-p", package, "-e", "normal", "--prefix", "none"])
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != package)
        .map(str::to_owned)
        .collect()
}

/// Each member with the workspace crates that its manifest names as normal dependencies.
fn members() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = cargo(&["metadata", "--no-deps", "--format-version", "1"]);
    let metadata: serde_json::Value =
        serde_json::from_str(&metadata).unwrap_or_else(|error| panic!("cargo metadata: {error}"));
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap_or_default().to_owned();
    let packages = list(&metadata["packages"]);
    let names: BTreeSet<String> = packages.iter().map(&name).collect();
    packages
        .iter()
        .map(|package| {
            let dependencies = list(&package["dependencies"]);
            let normal = dependencies.iter().filter(|dependency| dependency["kind"].is_null());
            (name(package), normal.map(&name).filter(|dependency| names.contains(dependency)).collect())
        })
        .collect()
}

#[test]
fn crates_depend_along_the_arrows_only() {
    let members = members();
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut violations = Vec::new();
    for (member, dependencies) in &members {
        let Some(allowed) = allowed.get(member.as_str()) else {
            violations.push(format!("{member} has no row in ARROWS (tests/layering.rs) and no place in README.md"));
            continue;
        };
        for dependency in dependencies.iter().filter(|name| !allowed.contains(&name.as_str())) {
            violations.push(format!("{member} depends on {dependency}; it may depend on {allowed:?}"));
        }
    }
    for (name, _) in ARROWS.iter().filter(|(name, _)| !members.contains_key(*name)) {
        violations.push(format!("{name} has a row in ARROWS but is no member of the workspace"));
    }
    expect_none("Workspace crates depend on each other along the arrows of README.md only.", &violations);
}

#[test]
fn the_runtime_links_no_compiler() {
    let linked = linked_into("runtime");
    assert!(linked.contains("planfile"), "cargo tree was not understood: {linked:?}");
    let violations: Vec<String> = ABSENT_FROM_RUNTIME
        .iter()
        .filter(|name| linked.contains(**name))
        .map(|name| format!("runtime links {name}; `cargo tree -p runtime -e normal -i {name}` shows through what"))
        .collect();
    expect_none("The runtime ships to production: it links no part of the compiler.", &violations);
}

#[test]
fn bincode_is_named_in_the_codec_alone_and_with_a_limit() {
    const CODEC: &str = "runtime/planfile/src/codec.rs";
    let mut violations = Vec::new();
    for source in rust_below(".").iter().filter(|source| source.path != CODEC && !source.path.starts_with("tests/")) {
        for (number, line) in source.text.lines().enumerate().filter(|(_, line)| contains_word(line, "bincode")) {
            if !line.trim_start().starts_with("//") {
                violations.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
            }
        }
    }
    for source in sources_below(".").iter().filter(|source| source.path.ends_with("Cargo.toml")) {
        let names_it = source.text.lines().any(|line| line.trim_start().starts_with("bincode"));
        if names_it && source.path != "Cargo.toml" && source.path != "runtime/planfile/Cargo.toml" {
            violations.push(format!("{}: only planfile depends on bincode", source.path));
        }
    }
    let codec = rust_below("runtime/planfile").into_iter().find(|source| source.path == CODEC);
    if !codec.is_some_and(|codec| shipped_lines(&codec).any(|(_, line)| line.contains("with_limit"))) {
        violations.push(format!("{CODEC}: no `with_limit`: a decode without one trusts lengths that a file states"));
    }
    expect_none("bincode is unmaintained: it stays in one file, with a size limit on every decode.", &violations);
}

#[test]
fn no_pass_does_input_or_output() {
    const FORBIDDEN: &[&str] = &[
        "std::fs",
        "std::net",
        "std::process",
        "std::env",
        "stdin",
        "stdout",
        "stderr",
        "print!",
        "println!",
        "eprint!",
        "eprintln!",
        "File::open",
        "File::create",
        "tempfile",
    ];
    expect_none(
        "Passes and the IR turn values into values: files, terminals and the environment belong to the importer, the \
         codec and the command lines.",
        &shipped_lines_with(&["passes/src", "passes/ir/src"], FORBIDDEN),
    );
}

#[test]
fn nothing_that_reaches_a_plan_reads_a_clock() {
    // `std::time::Duration` is a number, not a clock.
    const FORBIDDEN: &[&str] = &["Instant", "SystemTime", "UNIX_EPOCH"];
    expect_none(
        "Same input, same bytes: nothing that reaches a plan may depend on the time.",
        &shipped_lines_with(&["passes", "runtime/planfile", "kernels"], FORBIDDEN),
    );
}

#[test]
fn no_cuda_library_is_linked() {
    expect_none(
        "CUDA, cuBLASLt, cuDNN, NCCL and NVRTC are loaded at run time: everything builds and tests without them.",
        &shipped_lines_with(&["src", "passes", "kernels", "runtime"], &["#[link(", "rustc-link-lib"]),
    );
}

/// Shipped lines of Rust below the folders that contain a forbidden word.
fn shipped_lines_with(folders: &[&str], forbidden: &[&str]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in folders.iter().flat_map(|folder| rust_below(folder)) {
        for (number, line) in shipped_lines(&source) {
            for word in forbidden.iter().filter(|word| contains_word(line, word)) {
                violations.push(format!("{}:{number}: `{word}` in `{}`", source.path, line.trim()));
            }
        }
    }
    violations
}

/// Line numbers (from 1) and lines of what ships: everything above the inline `mod tests`, without comments.
fn shipped_lines(source: &Source) -> impl Iterator<Item = (usize, &str)> {
    let is_test_file = source.path.ends_with("/tests.rs") || source.path.contains("/tests/");
    source
        .text
        .lines()
        .take_while(move |line| !is_test_file && *line != "mod tests {")
        .enumerate()
        .map(|(index, line)| (index + 1, line.split("//").next().unwrap_or(line)))
}

#[test]
fn only_shipped_code_is_judged() {
    let text = "use a; // std::fs\nlet b;\n#[cfg(test)]\nmod tests {\n    std::fs\n}\n".to_owned();
    let source = Source { path: "passes/src/a.rs".to_owned(), text };
    assert_eq!(shipped_lines(&source).collect::<Vec<_>>(), [(1, "use a; "), (2, "let b;"), (3, "#[cfg(test)]")]);
    assert!(contains_word("std::fs::read", "std::fs") && contains_word("#[link(name)]", "#[link("));
    assert!(!contains_word("std::fsync", "std::fs") && !contains_word("eprintln!", "println!"));
}
