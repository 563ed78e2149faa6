//! The project's own files, as the tests about the source code read them.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders that hold what tools write, not what people write.
const WRITTEN_BY_TOOLS: [&str; 6] = [".git", ".venv", "__pycache__", "device", "fetched", "target"];

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A text file of the project.
pub(crate) struct Source {
    /// Relative to the root, with `/` between folders.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// Every UTF-8 file below `folder` (relative to the root), by path. Binary files are left out.
pub(crate) fn sources_below(folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for entry in entries {
            let entry = entry.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
            let (path, name) = (entry.path(), entry.file_name());
            if path.is_dir() {
                if !WRITTEN_BY_TOOLS.iter().any(|tool| name == *tool) {
                    folders.push(path);
                }
            } else if let Ok(text) = fs::read_to_string(&path) {
                let relative = path.strip_prefix(root()).unwrap_or(&path);
                let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
                found.push(Source { path: parts.join("/"), text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// The Rust files below `folder`.
pub(crate) fn rust_below(folder: &str) -> Vec<Source> {
    let mut sources = sources_below(folder);
    sources.retain(|source| source.path.ends_with(".rs"));
    sources
}

/// Fails with every violation, so that one run shows all there is to mend.
pub(crate) fn expect_none(rule: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{rule}\n{} violation(s):\n  {}\n", violations.len(), violations.join("\n  "));
}

/// Whether `text` contains `word` and neither end of it continues into a longer word.
pub(crate) fn contains_word(text: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(word).any(|(start, _)| {
        let (before, after) = (&text[..start], &text[start + word.len()..]);
        let joined_before = is_part(word.chars().next()) && is_part(before.chars().next_back());
        let joined_after = is_part(word.chars().next_back()) && is_part(after.chars().next());
        !joined_before && !joined_after
    })
}
