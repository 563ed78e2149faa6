//! Opens files that others name: regular ones only, without ever waiting for one.
//!
//! Opening a pipe waits for somebody at its other end, and reading a terminal or `/dev/zero` never ends; a file of this
//! project is none of these, so they are told apart before they are touched.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens the file at `path`, through links, and says its length in bytes; `None` where a folder, a pipe, a device or a
/// socket is.
///
/// # Errors
/// The file system's.
pub fn open(path: &Path) -> io::Result<Option<(File, u64)>> {
    // Looked at first, since opening alone can have an effect on a device.
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    // What is opened may be another file than what was looked at: it must not wait either, and is looked at again.
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some((file, metadata.len())))
}

/// The text of a small file; `None` where it is not a regular one.
///
/// # Errors
/// The file system's, more than `limit` bytes, or bytes that are not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> io::Result<Option<String>> {
    let Some((file, bytes)) = open(path)? else { return Ok(None) };
    if bytes > limit {
        let what = format!("it has {bytes} bytes, at most {limit} are read");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, limit), &mut text)?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn regular_files_are_opened_and_nothing_else_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "12345").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        for name in ["file", "link"] {
            assert_eq!(open(&path(name)).unwrap().unwrap().1, 5);
        }
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), rustix::fs::Mode::RUSR).unwrap();
        let _listener = UnixListener::bind(path("socket")).unwrap();
        for name in ["pipe", "socket", "", "/dev/zero", "/dev/tty"] {
            // A machine may have no terminal.
            assert!(open(&path(name)).map_or_else(|_| name == "/dev/tty", |opened| opened.is_none()), "{name}");
        }
        assert_eq!(open(&path("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn texts_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read_text(&path, 5).unwrap().as_deref(), Some("12345"));
        assert!(read_text(&path, 4).unwrap_err().to_string().contains("5 bytes, at most 4"));
        assert!(read_text(folder.path(), 4).unwrap().is_none());
    }
}
