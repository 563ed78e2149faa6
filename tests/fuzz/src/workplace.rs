//! A folder for one file at a time, in memory where the machine has such a place.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;

/// Length of the file with external data beside each model.
pub const DATA_BYTES: usize = 1 << 20;

/// The folder of this process, with `weights.bin` in it: all that a model may read.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let memory = Path::new("/dev/shm");
            let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            let folder = folder.expect("a folder for temporary files");
            let data: Vec<u8> = (0..DATA_BYTES).map(|at| (at % 3) as u8).collect();
            std::fs::write(folder.path().join("weights.bin"), data).expect("room for a file of a mebibyte");
            folder
        })
        .path()
}

/// The file with these bytes; the next call replaces it.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).expect("room for one input");
    path
}
