//! Files that are written beside their place and renamed into it when whole, and what becomes of those that are not.
//!
//! before  `model.plan` (old), `.plan-3kXw0b` (half of the new one, locked)      after  `model.plan` (new)
//!
//! A file that is not finished is removed when its [`Replacement`] is dropped, or by [`abandon_all`] where a signal ends
//! the process. What a process left behind that was killed outright is removed by the next one that writes to that
//! folder: the lock on it is free then, as the system gives locks back.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use tempfile::NamedTempFile;

/// Letters and digits behind the prefix of an unfinished file's name.
const RANDOM_LETTERS: usize = 6;
/// Another process may take a new file for a left one, between its creation and its lock: so often at most.
const ATTEMPTS: usize = 16;

/// Unfinished files of this process.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Why a file could not be replaced; it is what it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplaceError {
    #[error("cannot write {}: there is no folder {}; make it, or name another place", path.display(), folder.display())]
    NoFolder { path: PathBuf, folder: PathBuf },
    #[error("{} is not a regular file; name another file to write to", path.display())]
    NotAFile { path: PathBuf },
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

/// What to do where a file has no room.
pub fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space, a file that was there before is unchanged"
        }
        io::ErrorKind::FileTooLarge => {
            "; raise the limit on the size of files (`ulimit -f`), a file that was there before is unchanged"
        }
        io::ErrorKind::NotFound => "; check the path",
        _ => "",
    }
}

/// A file under way to its place.
#[derive(Debug)]
pub struct Replacement {
    /// Removed when dropped.
    file: NamedTempFile,
    listed: Listed,
    path: PathBuf,
    folder: PathBuf,
}

/// An entry of [`UNFINISHED`], taken out when dropped.
#[derive(Debug)]
struct Listed(PathBuf);

impl Drop for Listed {
    fn drop(&mut self) {
        unfinished().retain(|path| *path != self.0);
    }
}

impl Replacement {
    /// Begins a file that will replace the one at `path`, through links, or appear there. Until then it has a name that
    /// begins with `prefix`; files of such names that nobody writes any more are removed. It has the permissions of the
    /// file that it replaces, or those of a new one.
    ///
    /// # Errors
    /// A folder that is not there, a device or a folder at `path`, which renaming would replace; or the file system's.
    pub fn new(path: &Path, prefix: &str) -> Result<Self, ReplaceError> {
        let (path, replaced) = place(path)?;
        let folder = folder_of(&path).to_owned();
        let failed = |action| {
            let path = path.clone();
            move |source| ReplaceError::Io { action, path, source }
        };
        let (file, listed) = create(&folder, prefix).map_err(failed("make a file beside"))?;
        if let Some(replaced) = replaced {
            let same = fs::Permissions::from_mode(replaced.mode() & 0o777);
            file.as_file().set_permissions(same).map_err(failed("set the permissions of"))?;
        }
        // Left files do no harm, so failing to remove them is no failure.
        remove_left(&folder, prefix, file.as_file()).unwrap_or_default();
        Ok(Self { file, listed, path, folder })
    }

    /// Where it goes, links followed.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is written, from its beginning on.
    pub fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Puts the file into its place, in one step.
    ///
    /// # Errors
    /// The file system's.
    pub fn finish(self) -> Result<(), ReplaceError> {
        let Self { file, listed, path, folder: _ } = self;
        let renaming = unfinished();
        let outcome = file.persist(&path);
        drop(renaming);
        drop(listed);
        outcome.map(drop).map_err(|error| ReplaceError::Io { action: "replace", path, source: error.error })
    }

    /// As [`Self::finish`], and survives a power cut.
    ///
    /// # Errors
    /// The file system's.
    pub fn finish_durably(self) -> Result<(), ReplaceError> {
        let (path, folder) = (self.path.clone(), self.folder.clone());
        let failed = |action| move |source| ReplaceError::Io { action, path, source };
        self.file.as_file().sync_all().map_err(failed.clone()("write"))?;
        self.finish()?;
        // The rename itself must survive too.
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("write the folder of"))
    }
}

/// Whether a file can go to `path`, as far as that is known before: to be asked before the work of making it.
///
/// # Errors
/// As [`Replacement::new`].
pub fn check(path: &Path) -> Result<(), ReplaceError> {
    place(path).map(drop)
}

/// Removes all unfinished files of this process, which must end now: whoever begins, finishes or drops one after this
/// waits for that.
pub fn abandon_all() {
    abandon(unfinished());
}

/// As [`abandon_all`], from a signal handler or where there is no memory left: waits for no lock, and does nothing where
/// one is held.
pub fn try_abandon_all() {
    match UNFINISHED.try_lock() {
        Ok(unfinished) => abandon(unfinished),
        Err(std::sync::TryLockError::Poisoned(poisoned)) => abandon(poisoned.into_inner()),
        Err(std::sync::TryLockError::WouldBlock) => {}
    }
}

fn abandon(unfinished: MutexGuard<'static, Vec<PathBuf>>) {
    for path in unfinished.iter() {
        fs::remove_file(path).unwrap_or_default();
    }
    // Never given back.
    std::mem::forget(unfinished);
}

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    // A panic elsewhere leaves the list whole: every change of it is one call.
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file that `path` names, through links, and what is there.
fn place(path: &Path) -> Result<(PathBuf, Option<fs::Metadata>), ReplaceError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {
            let failed = |source| ReplaceError::Io { action: "find", path: path.to_owned(), source };
            Ok((fs::canonicalize(path).map_err(failed)?, Some(metadata)))
        }
        Ok(_) => Err(ReplaceError::NotAFile { path: path.to_owned() }),
        Err(_) if path.file_name().is_none() => Err(ReplaceError::NotAFile { path: path.to_owned() }),
        Err(_) => {
            let folder = folder_of(path);
            match fs::metadata(folder) {
                Ok(metadata) if metadata.is_dir() => Ok((path.to_owned(), None)),
                Err(source) if !matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                    Err(ReplaceError::Io { action: "look at the folder of", path: path.to_owned(), source })
                }
                _ => Err(ReplaceError::NoFolder { path: path.to_owned(), folder: folder.to_owned() }),
            }
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file, locked where the file system knows locks.
fn create(folder: &Path, prefix: &str) -> io::Result<(NamedTempFile, Listed)> {
    // As any other new file: the process's mask takes away what the user does not want.
    let permissions = fs::Permissions::from_mode(0o666);
    for _ in 0..ATTEMPTS {
        let mut unfinished = unfinished();
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix(prefix).rand_bytes(RANDOM_LETTERS).permissions(permissions.clone());
        let file = builder.tempfile_in(folder)?;
        let ours = match file.as_file().try_lock() {
            Err(TryLockError::WouldBlock) => false,
            // Without locks nobody can take it for a left one.
            Err(TryLockError::Error(_)) => true,
            Ok(()) => file.as_file().metadata()?.nlink() > 0,
        };
        if ours {
            unfinished.push(file.path().to_owned());
            let listed = Listed(file.path().to_owned());
            return Ok((file, listed));
        }
    }
    Err(io::Error::other("other processes remove each new file"))
}

/// Removes files in `folder` that [`create`] made for a process that is no more: of the same prefix and owner as `ours`,
/// and with a free lock.
fn remove_left(folder: &Path, prefix: &str, ours: &File) -> io::Result<()> {
    let owner = ours.metadata()?.uid();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let letters = name.to_str().and_then(|name| name.strip_prefix(prefix));
        let is_left = |letters: &str| {
            letters.len() == RANDOM_LETTERS && letters.bytes().all(|letter| letter.is_ascii_alphanumeric())
        };
        if letters.is_some_and(is_left) && entry.file_type()?.is_file() {
            // One that cannot be removed is left for somebody who can.
            remove_if_free(&entry.path(), owner).unwrap_or_default();
        }
    }
    Ok(())
}

fn remove_if_free(path: &Path, owner: u32) -> io::Result<()> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.uid() == owner && file.try_lock().is_ok() {
        // It may have been renamed or removed, and its name taken again, before it was locked.
        let named = fs::symlink_metadata(path)?;
        if (named.dev(), named.ino()) == (metadata.dev(), metadata.ino()) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, "old").unwrap();
        let mut begun = Replacement::new(&path, ".plan-").unwrap();
        begun.file().write_all(b"new").unwrap();
        assert_eq!((fs::read(&path).unwrap().as_slice(), names(folder.path()).len()), (&b"old"[..], 2));
        drop(begun);
        assert_eq!(names(folder.path()), ["x"]);
        let mut begun = Replacement::new(&path, ".plan-").unwrap();
        begun.file().write_all(b"new").unwrap();
        begun.finish_durably().unwrap();
        assert_eq!((fs::read(&path).unwrap().as_slice(), names(folder.path()).len()), (&b"new"[..], 1));
    }

    #[test]
    fn only_files_that_nobody_writes_any_more_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, file) = (folder.path().join("x"), |name: &str| folder.path().join(name));
        let under_way = Replacement::new(&path, ".plan-").unwrap();
        let left = [".plan-aB3dE6", ".plan-000000"];
        let kept = [".npz-aB3dE6", ".plan-", ".plan-aB3dE67", ".plan-aB3d.6", "plan-aB3dE6"];
        left.iter().chain(&kept).for_each(|name| fs::write(file(name), "").unwrap());
        fs::create_dir(file(".plan-folder")).unwrap();
        std::os::unix::fs::symlink("plan-aB3dE6", file(".plan-linked")).unwrap();
        Replacement::new(&path, ".plan-").unwrap().finish().unwrap();
        let found = names(folder.path());
        assert!(left.iter().all(|name| !found.contains(&(*name).to_owned())), "{found:?}");
        let kept = kept.iter().chain(&[".plan-folder", ".plan-linked"]);
        assert!(kept.clone().all(|name| found.contains(&(*name).to_owned())), "{found:?}");
        assert_eq!(found.len(), kept.count() + 2, "{found:?}");
        under_way.finish().unwrap();
    }

    #[test]
    fn permissions_are_those_of_the_file_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let mode = || fs::metadata(&path).unwrap().mode() & 0o777;
        Replacement::new(&path, ".plan-").unwrap().finish().unwrap();
        fs::write(folder.path().join("plain"), "").unwrap();
        assert_eq!(mode(), fs::metadata(folder.path().join("plain")).unwrap().mode() & 0o777);
        for mode_before in [0o600, 0o640, 0o444] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode_before)).unwrap();
            Replacement::new(&path, ".plan-").unwrap().finish().unwrap();
            assert_eq!(mode(), mode_before);
        }
    }

    #[test]
    fn places_that_cannot_be_written_to_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "").unwrap();
        for name in ["none/x", "file/x"] {
            let [checked, begun] = [check(&path(name)), Replacement::new(&path(name), ".plan-").map(drop)];
            for error in [checked.unwrap_err(), begun.unwrap_err()] {
                let text = error.to_string();
                assert!(
                    text.contains(&format!("there is no folder {}", path(name).parent().unwrap().display())),
                    "{text}"
                );
            }
        }
        for place in [folder.path(), Path::new("/dev/full"), Path::new("..")] {
            assert!(matches!(check(place), Err(ReplaceError::NotAFile { .. })), "{}", place.display());
        }
        check(Path::new("new")).unwrap();
    }
}
