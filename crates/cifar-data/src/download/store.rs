//! Files on disk: checked in full, written under a temporary name, and renamed only when they are right.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::error::{DownloadError, Mismatch};
use super::manifest::PinnedFile;
use super::{Event, Interrupt};

/// How a file on disk compares with the pinned one.
pub(super) enum State {
    Absent,
    Complete,
    Wrong(Mismatch),
}

/// Compares size and SHA-256 of the file at `path` with `pinned`.
pub(super) fn check(
    path: &Path,
    pinned: &PinnedFile,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<State, DownloadError> {
    let read_error = |source| DownloadError::io("read", path, pinned.bytes, source);
    let bytes = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(State::Absent);
        }
        Err(error) => return Err(read_error(error)),
    };
    if bytes != pinned.bytes {
        return Ok(State::Wrong(Mismatch::Size {
            found: bytes,
            expected: pinned.bytes,
        }));
    }
    progress(Event::Checking { path, bytes });
    let mut hasher = Sha256::new();
    hash_into(&mut hasher, &mut File::open(path).map_err(read_error)?).map_err(read_error)?;
    Ok(match compare(hasher, bytes, pinned) {
        Ok(()) => State::Complete,
        Err(mismatch) => State::Wrong(mismatch),
    })
}

/// Compares what was hashed with `pinned`.
pub(super) fn compare(hasher: Sha256, bytes: u64, pinned: &PinnedFile) -> Result<(), Mismatch> {
    if bytes != pinned.bytes {
        return Err(Mismatch::Size {
            found: bytes,
            expected: pinned.bytes,
        });
    }
    let found: String = hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if !found.eq_ignore_ascii_case(&pinned.sha256) {
        return Err(Mismatch::Sha256 {
            found,
            expected: pinned.sha256.to_string(),
        });
    }
    Ok(())
}

/// The file under way: `<name>.<start of its SHA-256>.part` beside its final place.
///
/// The name holds the content's hash, so bytes of another version are never continued. The file is locked as
/// long as this value lives; a second process waits for it. What has arrived is hashed as it is written.
pub(super) struct PartFile<'a> {
    file: File,
    path: PathBuf,
    pinned: &'a PinnedFile,
    hasher: Sha256,
    len: u64,
    keep: bool,
}

impl<'a> PartFile<'a> {
    /// Opens and locks the part file of `target`, with what an earlier run left in it.
    /// The flag is true when another process held it for a while, who may have finished the job.
    pub(super) fn open(
        target: &Path,
        pinned: &'a PinnedFile,
        interrupt: &Interrupt,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<(PartFile<'a>, bool), DownloadError> {
        let path = part_path(target, pinned);
        let error = |action, source| DownloadError::io(action, &path, pinned.bytes, source);
        let mut waited = false;
        let file = loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(|source| error("create", source))?;
            match file.try_lock() {
                // Between our opening and locking, its last owner may have renamed or removed it.
                Ok(()) if is_still_at(&file, &path) => break file,
                Ok(()) => waited = true,
                Err(TryLockError::WouldBlock) => {
                    if !waited {
                        progress(Event::WaitingForOtherProcess { path: target });
                    }
                    waited = true;
                    if interrupt.is_raised() {
                        return Err(DownloadError::Interrupted {
                            path: target.to_path_buf(),
                            kept: 0,
                        });
                    }
                    sleep(Duration::from_millis(100));
                }
                // Some network file systems know no locks: the hash still guards the result.
                Err(TryLockError::Error(source)) => {
                    tracing::warn!(path = %path.display(), %source, "the file cannot be locked");
                    break file;
                }
            }
        };

        let len = file
            .metadata()
            .map_err(|source| error("read", source))?
            .len();
        let mut hasher = Sha256::new();
        if len <= pinned.bytes {
            let hashed = hash_into(&mut hasher, &mut (&file).take(len));
            hashed.map_err(|source| error("read", source))?;
        }
        let mut part = PartFile {
            file,
            path,
            pinned,
            hasher,
            len,
            keep: true,
        };
        if len > pinned.bytes {
            part.restart()?;
        }
        Ok((part, waited))
    }

    /// Bytes written so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Adds `bytes` at the end.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), DownloadError> {
        if let Err(source) = self.file.write_all(bytes) {
            let error = DownloadError::io("write", &self.path, self.pinned.bytes, source);
            // A full disk needs the room more than we need these bytes.
            self.keep = !matches!(error, DownloadError::DiskFull { .. });
            return Err(error);
        }
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Adds the content of another file.
    pub(super) fn append_file(
        &mut self,
        from: &Path,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), DownloadError> {
        let bytes = self.pinned.bytes;
        let error = |source| DownloadError::io("read", from, bytes, source);
        let mut file = File::open(from).map_err(error)?;
        for_each_chunk(&mut file, error, |chunk| {
            self.append(chunk)?;
            progress(Event::Progress {
                done: self.len,
                bytes,
            });
            Ok(())
        })
    }

    /// Drops what was written and begins at byte 0.
    pub(super) fn restart(&mut self) -> Result<(), DownloadError> {
        self.hasher = Sha256::new();
        if self.len > 0 {
            let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
            emptied.map_err(|source| {
                DownloadError::io("empty", &self.path, self.pinned.bytes, source)
            })?;
        }
        self.len = 0;
        Ok(())
    }

    /// Whether all that was written is the pinned file.
    pub(super) fn verify(&self) -> Result<(), Mismatch> {
        compare(self.hasher.clone(), self.len, self.pinned)
    }

    /// Removes the file when this value is dropped.
    pub(super) fn discard(&mut self) {
        self.keep = false;
    }

    /// Gives the verified file its final name, in one step and for good.
    pub(super) fn publish(mut self, target: &Path) -> Result<(), DownloadError> {
        let synced = self.file.sync_all();
        if let Err(source) = synced {
            let error = DownloadError::io("write", &self.path, self.pinned.bytes, source);
            self.keep = !matches!(error, DownloadError::DiskFull { .. });
            return Err(error);
        }
        fs::rename(&self.path, target)
            .map_err(|source| DownloadError::io("replace", target, self.pinned.bytes, source))?;
        sync_folder(target.parent())
    }
}

impl Drop for PartFile<'_> {
    fn drop(&mut self) {
        // After `publish` the path is gone, or another process's new file that is not ours to remove.
        if (!self.keep || self.len == 0) && is_still_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes part files of other versions of `target` that nobody is writing.
pub(super) fn remove_stale_parts(target: &Path, progress: &mut dyn FnMut(Event<'_>)) {
    let (Some(folder), Some(name)) = (
        target.parent(),
        target.file_name().and_then(|name| name.to_str()),
    ) else {
        return;
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let is_stale = file_name.to_str().is_some_and(|other| {
            let version = other
                .strip_prefix(name)
                .and_then(|rest| rest.strip_prefix('.'));
            let version = version.and_then(|rest| rest.strip_suffix(".part"));
            version.is_some_and(|version| {
                version.len() == VERSION_DIGITS
                    && version.bytes().all(|byte| byte.is_ascii_hexdigit())
            })
        });
        let path = entry.path();
        if is_stale
            && File::open(&path).is_ok_and(|file| file.try_lock().is_ok())
            && fs::remove_file(&path).is_ok()
        {
            progress(Event::RemovedStalePart { path: &path });
        }
    }
}

/// Folders created for a file that may never arrive: those still empty at the end are removed again.
pub(super) struct Folders(Vec<PathBuf>);

impl Folders {
    /// Creates `folder` and the missing ones above it.
    pub(super) fn create(folder: &Path) -> Result<Folders, DownloadError> {
        let missing = folder
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists());
        let created = Folders(missing.map(Path::to_path_buf).collect());
        fs::create_dir_all(folder)
            .map_err(|source| DownloadError::io("create", folder, 0, source))?;
        Ok(created)
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        for folder in &self.0 {
            let _ = fs::remove_dir(folder); // refuses when it is not empty
        }
    }
}

/// Makes the names in a folder durable, where the system can do that.
pub(super) fn sync_folder(folder: Option<&Path>) -> Result<(), DownloadError> {
    if let (true, Some(folder)) = (cfg!(unix), folder) {
        let folder = if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        };
        let synced = File::open(folder).and_then(|handle| handle.sync_all());
        synced.map_err(|source| DownloadError::io("sync", folder, 0, source))?;
    }
    Ok(())
}

/// Where `target` grows until it is complete.
pub(super) fn part_path(target: &Path, pinned: &PinnedFile) -> PathBuf {
    let version: String = pinned.sha256.chars().take(VERSION_DIGITS).collect();
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!("{name}.{version}.part"))
}

const VERSION_DIGITS: usize = 12;

fn hash_into(hasher: &mut Sha256, from: &mut dyn Read) -> io::Result<()> {
    for_each_chunk(
        from,
        |error| error,
        |chunk| {
            hasher.update(chunk);
            Ok(())
        },
    )
}

fn for_each_chunk<E>(
    from: &mut dyn Read,
    read_error: impl Fn(io::Error) -> E,
    mut with: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => with(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(read_error(error)),
        }
    }
}

#[cfg(unix)]
fn is_still_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => ours.dev() == there.dev() && ours.ino() == there.ino(),
        _ => false,
    }
}

/// Without inode numbers the existence of the file must do; a mix-up still ends at the hash, not in wrong data.
#[cfg(not(unix))]
fn is_still_at(_: &File, path: &Path) -> bool {
    path.exists()
}
