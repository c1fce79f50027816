//! Files on disk: checked in full, written under a temporary name, and renamed only when they are right.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::error::{DownloadError, Mismatch};
use crate::pin::{Pin, Verifier};
use crate::{Event, Interrupt};

/// How a file on disk compares with the pinned one.
pub(crate) enum State {
    Absent,
    Complete(u64),
    Wrong(Mismatch),
}

/// Compares the file at `path` with `pin`.
pub(crate) fn check(
    path: &Path,
    pin: &Pin,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<State, DownloadError> {
    let read_error = |source| DownloadError::io("read", path, pin.most_bytes(), source);
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
    if let Some(expected) = pin.exact_bytes().filter(|&expected| expected != bytes) {
        return Ok(State::Wrong(Mismatch::Size {
            found: bytes,
            expected,
        }));
    }
    progress(Event::Checking { path, bytes });
    let mut verifier = Verifier::new(pin);
    hash_into(&mut verifier, &mut File::open(path).map_err(read_error)?).map_err(read_error)?;
    Ok(match verifier.verify() {
        Ok(()) => State::Complete(bytes),
        Err(mismatch) => State::Wrong(mismatch),
    })
}

/// The file under way: `<name>.<start of its hash>.part` beside its final place.
///
/// The name holds the content's hash, so bytes of another version are never continued. The file is locked as
/// long as this value lives; a second process waits for it. What has arrived is hashed as it is written.
pub(crate) struct PartFile<'a> {
    file: File,
    path: PathBuf,
    pin: &'a Pin,
    verifier: Verifier,
    keep: bool,
}

impl<'a> PartFile<'a> {
    /// Opens and locks the part file of `target`, with what an earlier run left in it.
    /// The flag is true when another process held it for a while, who may have finished the job.
    pub(crate) fn open(
        target: &Path,
        pin: &'a Pin,
        interrupt: &Interrupt,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<(PartFile<'a>, bool), DownloadError> {
        let path = part_path(target, pin);
        let error = |action, source| DownloadError::io(action, &path, pin.most_bytes(), source);
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
        let mut verifier = Verifier::new(pin);
        if len <= pin.most_bytes() {
            let hashed = hash_into(&mut verifier, &mut (&file).take(len));
            hashed.map_err(|source| error("read", source))?;
        } else {
            let emptied = file.set_len(0);
            emptied.map_err(|source| error("empty", source))?;
        }
        let part = PartFile {
            file,
            path,
            pin,
            verifier,
            keep: true,
        };
        Ok((part, waited))
    }

    /// Bytes written so far.
    pub(crate) fn len(&self) -> u64 {
        self.verifier.len()
    }

    /// Adds `bytes` at the end.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), DownloadError> {
        if let Err(source) = self.file.write_all(bytes) {
            let error = DownloadError::io("write", &self.path, self.pin.most_bytes(), source);
            // A full disk needs the room more than we need these bytes.
            self.keep = !matches!(error, DownloadError::DiskFull { .. });
            return Err(error);
        }
        self.verifier.update(bytes);
        Ok(())
    }

    /// Adds the content of another file.
    pub(crate) fn append_file(
        &mut self,
        from: &Path,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), DownloadError> {
        let most = self.pin.most_bytes();
        let error = |source| DownloadError::io("read", from, most, source);
        let mut file = File::open(from).map_err(error)?;
        let bytes = file.metadata().map_err(error)?.len();
        for_each_chunk(&mut file, error, |chunk| {
            self.append(chunk)?;
            progress(Event::Progress {
                done: self.len(),
                bytes,
            });
            Ok(())
        })
    }

    /// Drops what was written and begins at byte 0.
    pub(crate) fn restart(&mut self) -> Result<(), DownloadError> {
        if self.len() > 0 {
            let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
            emptied.map_err(|source| {
                DownloadError::io("empty", &self.path, self.pin.most_bytes(), source)
            })?;
        }
        self.verifier = Verifier::new(self.pin);
        Ok(())
    }

    /// Whether all that was written is the pinned file.
    pub(crate) fn verify(&self) -> Result<(), Mismatch> {
        self.verifier.clone().verify()
    }

    /// Removes the file when this value is dropped.
    pub(crate) fn discard(&mut self) {
        self.keep = false;
    }

    /// Gives the verified file its final name, in one step and for good.
    pub(crate) fn publish(mut self, target: &Path) -> Result<(), DownloadError> {
        let synced = self.file.sync_all();
        if let Err(source) = synced {
            let error = DownloadError::io("write", &self.path, self.pin.most_bytes(), source);
            self.keep = !matches!(error, DownloadError::DiskFull { .. });
            return Err(error);
        }
        fs::rename(&self.path, target).map_err(|source| {
            DownloadError::io("replace", target, self.pin.most_bytes(), source)
        })?;
        sync_folder(target.parent())
    }
}

impl Drop for PartFile<'_> {
    fn drop(&mut self) {
        // After `publish` the path is gone, or another process's new file that is not ours to remove.
        if (!self.keep || self.len() == 0) && is_still_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes part files of other versions of `target` that nobody is writing.
pub(crate) fn remove_stale_parts(target: &Path, progress: &mut dyn FnMut(Event<'_>)) {
    let (Some(folder), Some(name)) = (
        target.parent().map(or_here),
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
pub(crate) struct Folders(Vec<PathBuf>);

impl Folders {
    /// Creates `folder` and the missing ones above it.
    pub(crate) fn create(folder: &Path) -> Result<Folders, DownloadError> {
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
///
/// # Errors
/// A folder that cannot be opened or synchronised.
pub fn sync_folder(folder: Option<&Path>) -> Result<(), DownloadError> {
    if let (true, Some(folder)) = (cfg!(unix), folder) {
        let folder = or_here(folder);
        let synced = File::open(folder).and_then(|handle| handle.sync_all());
        synced.map_err(|source| DownloadError::io("sync", folder, 0, source))?;
    }
    Ok(())
}

/// The folder of a bare file name has no name; it is the working directory.
fn or_here(folder: &Path) -> &Path {
    match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    }
}

/// Where `target` grows until it is complete.
pub(crate) fn part_path(target: &Path, pin: &Pin) -> PathBuf {
    let version: String = pin.hash().chars().take(VERSION_DIGITS).collect();
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!("{name}.{version}.part"))
}

const VERSION_DIGITS: usize = 12;

fn hash_into(verifier: &mut Verifier, from: &mut dyn Read) -> io::Result<()> {
    for_each_chunk(
        from,
        |error| error,
        |chunk| {
            verifier.update(chunk);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_file_name_is_in_the_working_directory() {
        let folder = |path: &'static str| Path::new(path).parent().map(or_here);
        assert_eq!(folder("weights.bin"), Some(Path::new(".")));
        assert_eq!(folder("a/weights.bin"), Some(Path::new("a")));
    }
}
