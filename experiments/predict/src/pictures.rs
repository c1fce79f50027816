//! Which files are meant.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::preprocess::FORMATS;

/// Endings of the files that are taken from folders whatever they hold, in any case.
const EXTENSIONS: [&str; 5] = ["jpg", "jpeg", "png", "webp", "bmp"];

/// What a given path led to instead of a picture.
#[derive(Debug)]
pub(crate) struct NotFound {
    pub(crate) path: PathBuf,
    reason: String,
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// The files of `paths` in the order given: each as it is, folders with all pictures in them and
/// below, by name. Folders that are links are not followed, so that nothing is walked in circles.
pub(crate) fn find(paths: &[PathBuf]) -> Vec<Result<PathBuf, NotFound>> {
    let mut found = Vec::new();
    for path in paths {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                let before = found.len();
                walk(path, &mut found);
                if found.len() == before {
                    found.push(Err(NotFound {
                        path: path.clone(),
                        reason: format!("no picture ({}) in this folder", EXTENSIONS.join(", ")),
                    }));
                }
            }
            Ok(metadata) if metadata.is_file() => found.push(Ok(path.clone())),
            // What it gives may never come, or never end.
            Ok(_) => found.push(Err(NotFound {
                path: path.clone(),
                reason: "is neither a file nor a folder".into(),
            })),
            Err(error) => found.push(Err(not_found(path, &error))),
        }
    }
    found
}

fn walk(dir: &Path, found: &mut Vec<Result<PathBuf, NotFound>>) {
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = match entries {
        Ok(entries) => entries,
        Err(error) => return found.push(Err(not_found(dir, &error))),
    };
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&path, found),
            Ok(_) => match is_picture(&path) {
                Ok(true) => found.push(Ok(path)),
                Ok(false) => {}
                Err(error) if is_named_as_picture(&path) => {
                    found.push(Err(not_found(&path, &error)));
                }
                Err(_) => {}
            },
            Err(error) => found.push(Err(not_found(&path, &error))),
        }
    }
}

/// A file that is one by its name, or else by how it begins. What is no file may never end.
fn is_picture(path: &Path) -> io::Result<bool> {
    let is_file = fs::metadata(path)?.is_file();
    Ok(is_file && (is_named_as_picture(path) || begins_as_picture(path)?))
}

fn is_named_as_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| {
        EXTENSIONS
            .iter()
            .any(|known| known.eq_ignore_ascii_case(extension))
    })
}

fn begins_as_picture(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?.take(16).read_to_end(&mut start)?;
    Ok(image::guess_format(&start).is_ok_and(|format| FORMATS.contains(&format)))
}

fn not_found(path: &Path, error: &io::Error) -> NotFound {
    NotFound {
        path: path.to_path_buf(),
        reason: format!("cannot be read: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_give_their_pictures_by_name_and_files_are_taken_as_given() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("b/empty")).unwrap();
        for name in ["c.PNG", "a.jpg", "b/x.webp", "b/notes.txt", "odd.name"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        // A picture by its content.
        fs::write(dir.path().join("d"), b"\x89PNG\r\n\x1a\n").unwrap();
        let paths = ["", "odd.name", "absent.png", "b/empty"].map(|name| dir.path().join(name));
        let found: Vec<_> = find(&paths)
            .into_iter()
            .map(|found| found.map_err(|error| error.to_string()))
            .collect();
        let names = ["a.jpg", "b/x.webp", "c.PNG", "d", "odd.name"];
        let expected = names.map(|name| dir.path().join(name));
        assert_eq!(found.len(), 7);
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found.as_ref().unwrap(), &expected);
        }
        assert!(found[5].as_ref().unwrap_err().contains("cannot be read"));
        assert!(found[6].as_ref().unwrap_err().contains("no picture"));
    }

    #[cfg(unix)]
    #[test]
    fn what_is_neither_a_file_nor_a_folder_is_never_opened() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.png"), "").unwrap();
        for name in ["pipe.jpg", "pipe"] {
            let pipe = dir.path().join(name);
            let made = std::process::Command::new("mkfifo").arg(pipe).status();
            assert!(made.unwrap().success());
        }
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("zero.png")).unwrap();
        let found = find(&[dir.path().to_path_buf()]);
        assert_eq!(found.len(), 1, "{found:?}");
        for name in ["pipe.jpg", "zero.png"] {
            let found = find(&[dir.path().join(name)]);
            let error = found[0].as_ref().unwrap_err().to_string();
            assert_eq!(error, "is neither a file nor a folder", "{name}");
        }
    }
}
