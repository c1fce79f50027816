//! Unpacking: only the files the manifest names, each checked, and no path taken from the archive.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use flate2::read::GzDecoder;
use verified_download::{Interrupt, Text, Verifier, sync_folder};

use super::Event;
use super::error::{ArchiveError, DownloadError};
use super::manifest::{ArchiveManifest, PinnedFile};

/// The most an entry may hold that is not unpacked, and the room for headers in the bound on the whole.
const UNNEEDED_LIMIT: u64 = 1 << 20;

/// Unpacks the files in `wanted` into `dir/<manifest.folder>`, which gets each of them complete or not at all.
pub(super) fn unpack(
    archive: &Path,
    manifest: &ArchiveManifest,
    wanted: &[&PinnedFile],
    dir: &Path,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<(), DownloadError> {
    let error = |action, path: &Path, source| DownloadError::io(action, path, 0, source);
    let packed = File::open(archive).map_err(|source| error("read", archive, source))?;
    // Who unpacks shares the lock; who has it alone is the only one, and what lies there is left over. Where there are no
    // locks, nothing is removed.
    if packed.try_lock().is_ok() {
        remove_stale_staging(dir, &manifest.folder, progress);
        let _ = packed.unlock();
    }
    let _ = packed.lock_shared();
    progress(Event::Unpacking { archive });
    let staging = tempfile::Builder::new()
        .prefix(&staging_prefix(&manifest.folder))
        .rand_bytes(STAGING_LETTERS)
        .tempdir_in(dir)
        .map_err(|source| error("create", &dir.join(&*manifest.folder), source))?;
    // A temporary folder is private; the folder in it has ordinary permissions and may become the final one.
    let staged = staging.path().join(&*manifest.folder);
    fs::create_dir(&staged).map_err(|source| error("create", &staged, source))?;

    let folder = dir.join(&*manifest.folder);
    Unpacker {
        archive,
        manifest,
        wanted,
        staged: &staged,
        folder: &folder,
        interrupt,
        progress,
    }
    .run(&packed)?;
    sync_folder(Some(&staged))?;

    // Fails where the folder exists with files in it; then only the wanted files are moved.
    if fs::rename(&staged, &folder).is_err() {
        for file in wanted {
            let target = folder.join(&*file.path);
            fs::rename(staged.join(&*file.path), &target)
                .map_err(|source| error("replace", &target, source))?;
        }
        sync_folder(Some(&folder))?;
    }
    Ok(sync_folder(Some(dir))?)
}

/// Letters and digits at the end of a staging folder's name.
const STAGING_LETTERS: usize = 6;

fn staging_prefix(folder: &str) -> String {
    format!(".{folder}.")
}

/// Removes the staging folders of runs that were killed.
fn remove_stale_staging(dir: &Path, folder: &str, progress: &mut dyn FnMut(Event<'_>)) {
    let prefix = staging_prefix(folder);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let letters = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        let is_ours = letters.is_some_and(|letters| {
            letters.len() == STAGING_LETTERS && letters.bytes().all(|b| b.is_ascii_alphanumeric())
        });
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let path = entry.path();
        if is_ours && is_folder && fs::remove_dir_all(&path).is_ok() {
            progress(Event::RemovedStaleFolder { path: &path });
        }
    }
}

struct Unpacker<'a, 'p> {
    archive: &'a Path,
    manifest: &'a ArchiveManifest,
    wanted: &'a [&'a PinnedFile],
    staged: &'a Path,
    /// Where the files get to in the end.
    folder: &'a Path,
    interrupt: &'a Interrupt,
    progress: &'p mut dyn FnMut(Event<'_>),
}

impl Unpacker<'_, '_> {
    fn run(&mut self, packed: &File) -> Result<(), DownloadError> {
        let manifest = self.manifest;
        let total: u64 = manifest.members.iter().map(|member| member.bytes).sum();
        let limit = total + UNNEEDED_LIMIT * (1 + manifest.unneeded.len() as u64);
        // The bound also ends a small archive that unpacks to terabytes.
        let mut tar = tar::Archive::new(GzDecoder::new(BufReader::new(packed)).take(limit));
        let mut seen: Vec<Text> = Vec::new();
        let mut done = 0;
        for entry in tar
            .entries()
            .map_err(|source| self.refuse(ArchiveError::Unreadable(source)))?
        {
            let mut entry =
                entry.map_err(|source| self.refuse(ArchiveError::Unreadable(source)))?;
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let kind = entry.header().entry_type();
            if kind.is_dir()
                && path.trim_start_matches("./").trim_end_matches('/') == manifest.folder
            {
                continue;
            }
            if kind.is_pax_global_extensions() {
                continue; // a comment on the archive as a whole
            }
            if !kind.is_file() {
                let kind = format!("{kind:?}").to_lowercase();
                return Err(self.refuse(ArchiveError::NotAPlainFile { entry: path, kind }));
            }
            // The name is only compared: the path that is written to comes from the manifest.
            let name = path
                .trim_start_matches("./")
                .strip_prefix(&*manifest.folder)
                .and_then(|rest| rest.strip_prefix('/'));
            let member = manifest
                .members
                .iter()
                .find(|member| name == Some(&*member.path));
            let unneeded = manifest
                .unneeded
                .iter()
                .find(|unneeded| name == Some(&***unneeded));
            let known = member.map(|member| &member.path).or(unneeded);
            let Some(known) = known.filter(|known| !seen.contains(known)) else {
                return Err(self.refuse(ArchiveError::UnexpectedEntry { entry: path }));
            };
            seen.push(known.clone());
            let found = entry.size();
            match member {
                Some(member) if found != member.bytes => {
                    return Err(self.refuse(ArchiveError::WrongSize {
                        entry: path,
                        found,
                        expected: member.bytes,
                    }));
                }
                Some(member) if self.wanted.contains(&member) => {
                    self.write(&mut entry, member, &path, done, total)?;
                }
                None if found > UNNEEDED_LIMIT => {
                    return Err(self.refuse(ArchiveError::WrongSize {
                        entry: path,
                        found,
                        expected: UNNEEDED_LIMIT,
                    }));
                }
                _ => {}
            }
            done += member.map_or(0, |member| member.bytes);
            (self.progress)(Event::UnpackingProgress { done, bytes: total });
        }
        match self
            .wanted
            .iter()
            .find(|member| !seen.contains(&member.path))
        {
            Some(member) => Err(self.refuse(ArchiveError::Missing {
                entry: format!("{}/{}", manifest.folder, member.path),
            })),
            None => Ok(()),
        }
    }

    fn write(
        &mut self,
        entry: &mut impl Read,
        member: &PinnedFile,
        name: &str,
        done: u64,
        total: u64,
    ) -> Result<(), DownloadError> {
        // Errors name where it would be; the staging folder is gone by then.
        let target = self.folder.join(&*member.path);
        let error = |source| DownloadError::io("write", &target, member.bytes, source);
        let mut file = File::create_new(self.staged.join(&*member.path)).map_err(error)?;
        let mut verifier = Verifier::new(&member.pin());
        let mut buffer = vec![0; 1 << 18];
        let mut written = 0;
        loop {
            if self.interrupt.is_raised() {
                return Err(verified_download::DownloadError::Interrupted {
                    path: target,
                    kept: 0,
                }
                .into());
            }
            let count = match entry.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.refuse(ArchiveError::Unreadable(source))),
            };
            file.write_all(&buffer[..count]).map_err(error)?;
            verifier.update(&buffer[..count]);
            written += count as u64;
            (self.progress)(Event::UnpackingProgress {
                done: done + written,
                bytes: total,
            });
        }
        verifier.verify().map_err(|problem| {
            self.refuse(ArchiveError::WrongBytes {
                entry: name.to_owned(),
                problem,
            })
        })?;
        file.sync_all().map_err(error)
    }

    fn refuse(&self, problem: ArchiveError) -> DownloadError {
        DownloadError::Archive {
            archive: self.archive.to_path_buf(),
            problem,
        }
    }
}
