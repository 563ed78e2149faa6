//! Holds what a reader may rely on in every file: documentation, reasons, size, and paths that exist.

#![expect(clippy::panic, reason = "a test stops at the first surprise")]

mod sources;

use std::fs;

use sources::{contains_word, expect_none, root, rust_below, sources_below};

/// Lines after which a file holds a second concept.
const LINES_MAX: usize = 600;

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Folders of the workspace members, relative to the root; the root package is the empty path.
fn member_folders() -> Vec<String> {
    let manifest = read("Cargo.toml");
    let list = manifest
        .lines()
        .find_map(|line| line.strip_prefix("members = ["))
        .unwrap_or_else(|| panic!("Cargo.toml: no line `members = [...]`"));
    let members = list.split('"').skip(1).step_by(2).map(|member| format!("{member}/"));
    std::iter::once(String::new()).chain(members).collect()
}

#[test]
fn every_file_says_what_it_is_for() {
    let violations: Vec<String> = rust_below(".")
        .iter()
        .filter(|source| !source.text.starts_with("//! "))
        .map(|source| source.path.clone())
        .collect();
    expect_none("Every Rust file begins with `//!` and says what it is for.", &violations);
}

#[test]
fn no_file_holds_two_concepts() {
    let violations: Vec<String> = rust_below(".")
        .iter()
        .map(|source| (source.text.lines().count(), &source.path))
        .filter(|(lines, _)| *lines > LINES_MAX)
        .map(|(lines, path)| format!("{path}: {lines} lines; look for the second concept and give it a file"))
        .collect();
    expect_none(&format!("No Rust file is longer than {LINES_MAX} lines."), &violations);
}

#[test]
fn members_inherit_lints_and_package_fields() {
    let mut violations = Vec::new();
    for folder in member_folders() {
        let path = format!("{folder}Cargo.toml");
        let manifest = read(&path);
        if !manifest.contains("[lints]\nworkspace = true\n") {
            violations.push(format!("{path}: no `[lints]` with `workspace = true`"));
        }
        for field in ["version", "edition", "rust-version", "license", "publish"] {
            if !manifest.lines().any(|line| line == format!("{field}.workspace = true")) {
                violations.push(format!("{path}: no `{field}.workspace = true`"));
            }
        }
        let sections = manifest.split("\n[").filter(|section| {
            let header = section.lines().next().unwrap_or_default();
            header.ends_with("dependencies]") && !header.starts_with("workspace.")
        });
        for entry in sections.flat_map(|section| section.lines().skip(1)) {
            if entry.contains('=') && !entry.starts_with('#') && !entry.contains("workspace = true") {
                violations.push(format!("{path}: `{entry}` is not taken from [workspace.dependencies]"));
            }
        }
    }
    expect_none("Members inherit lints, package fields and dependencies from the workspace.", &violations);
}

#[test]
fn every_dependency_has_a_reason() {
    let manifest = read("Cargo.toml");
    let section = manifest
        .split("\n[")
        .find_map(|section| section.strip_prefix("workspace.dependencies]"))
        .unwrap_or_else(|| panic!("Cargo.toml: no [workspace.dependencies]"));
    // Our own crates are explained by README.md. One comment may speak for two entries, such as serde and serde_json.
    let mut violations = Vec::new();
    let mut entries_since_comment = usize::MAX;
    for line in section.lines().map(str::trim) {
        if line.starts_with('#') {
            entries_since_comment = 0;
        } else if line.is_empty() {
            entries_since_comment = usize::MAX;
        } else if line.contains(" = ") && !line.contains("{ path = ") {
            entries_since_comment = entries_since_comment.saturating_add(1);
            if entries_since_comment > 2 {
                violations.push(line.to_owned());
            }
        }
    }
    expect_none(
        "Every entry of [workspace.dependencies] has a comment above it that says why it is there.",
        &violations,
    );
}

#[test]
fn every_ignored_test_says_what_it_needs() {
    let bare = concat!("#[ig", "nore]");
    let mut violations = Vec::new();
    for source in rust_below(".") {
        for (index, _) in source.text.lines().enumerate().filter(|(_, line)| line.contains(bare)) {
            violations.push(format!("{}:{}", source.path, index + 1));
        }
    }
    expect_none("An ignored test says what it needs: `#[ignore = \"needs 2 GPUs\"]`.", &violations);
}

#[test]
fn nothing_is_left_for_later_in_comments() {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("to", "do!"), concat!("unimpl", "emented!")];
    let mut violations = Vec::new();
    for source in written_by_people() {
        for (index, line) in source.text.lines().enumerate() {
            for word in words.iter().filter(|word| contains_word(line, word)) {
                violations.push(format!("{}:{}: {word}", source.path, index + 1));
            }
        }
    }
    expect_none("What is missing is an error that says so, or an entry of the tracker; not a comment.", &violations);
}

#[test]
fn no_file_names_a_path_of_one_machine() {
    let roots = [concat!("/wo", "rk"), concat!("/ro", "ot"), concat!("/ho", "me"), concat!("/Us", "ers")];
    let mut violations = Vec::new();
    for source in written_by_people() {
        for (index, line) in source.text.lines().enumerate() {
            for folder in roots.iter().filter(|folder| names_folder(line, folder)) {
                violations.push(format!("{}:{}: {folder}: {}", source.path, index + 1, line.trim()));
            }
        }
    }
    expect_none("Nothing names a folder of the machine it was written on.", &violations);
}

/// Whether `line` names an absolute path in `folder`: `/x/...` at the start of a word, not `a/x/...` and not `/xyz`.
fn names_folder(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(start, _)| {
        let before = line[..start].chars().next_back();
        let after = line[start + folder.len()..].chars().next();
        let begins = !before.is_some_and(|c| c.is_alphanumeric() || "_-./}".contains(c));
        begins && !after.is_some_and(|c| c.is_alphanumeric() || "_-.".contains(c))
    })
}

/// Every text file of the project except what cargo writes.
fn written_by_people() -> Vec<sources::Source> {
    let mut sources = sources_below(".");
    sources.retain(|source| source.path != "Cargo.lock" && !source.path.starts_with("LICENSE"));
    sources
}

#[test]
fn paths_named_in_documents_exist() {
    let mut violations = Vec::new();
    for document in ["README.md", "fixtures/README.md", "tests/README.md"] {
        let text = read(document);
        let mut found = 0;
        for (index, path) in named_paths(&text) {
            found += 1;
            if !root().join(&path).exists() {
                violations.push(format!("{document}:{}: {path}", index + 1));
            }
        }
        assert!(found > 0, "{document} names no path: the search in tests/tidy.rs is broken");
    }
    expect_none("Paths that documents name exist.", &violations);
}

/// Paths relative to the root that a Markdown text names in code spans and code blocks, with the index of their line.
///
/// A path is a word whose first folder is one of the project's. Words with placeholders (`NAME`, `*`, `<..>`) and what
/// tools write (`target`, `fixtures/fetched`, `fixtures/.venv`) are no claims about the repository.
fn named_paths(text: &str) -> Vec<(usize, String)> {
    let mut in_block = false;
    let mut paths = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        let code: Vec<&str> = if in_block { vec![line] } else { line.split('`').skip(1).step_by(2).collect() };
        for word in code.iter().flat_map(|code| code.split_whitespace()) {
            let word = word.trim_start_matches("./").trim_end_matches([',', ';', ':', '.']);
            let first = word.split('/').next().unwrap_or_default();
            let is_rooted = word.contains('/') && !first.is_empty() && root().join(first).is_dir();
            let is_file = [".md", ".rs", ".toml", ".py"].iter().any(|ending| word.ends_with(ending));
            let has_placeholder = word.contains(['*', '<', '{', '=', '[', '(']) || word.contains("NAME");
            let written = ["fixtures/fetched", "fixtures/.venv"];
            let is_written_by_tools = first == "target" || written.iter().any(|folder| word.starts_with(folder));
            if (is_rooted || is_file) && !has_placeholder && !is_written_by_tools {
                paths.push((index, word.to_owned()));
            }
        }
    }
    paths
}

#[test]
fn named_paths_are_found_in_spans_and_blocks_only() {
    let text = "See `src/main.rs`, `a / b` and tests/none.rs; `fixtures/NAME/x.pb`.\n\n```sh\ncargo run ./tests/run, gone.rs\n```\n";
    let paths: Vec<String> = named_paths(text).into_iter().map(|(_, path)| path).collect();
    assert_eq!(paths, ["src/main.rs", "tests/run", "gone.rs"]);
}

#[test]
fn folders_of_machines_are_told_from_names() {
    let folder = concat!("/wo", "rk");
    assert!(names_folder(&format!("open {folder}/x"), folder));
    assert!(names_folder(&format!("\"{folder}\""), folder));
    assert!(!names_folder(&format!("{folder}shop/x"), folder));
    assert!(!names_folder(&format!("frame{folder}/x"), folder));
}
