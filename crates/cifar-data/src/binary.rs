//! The binary version: records of one label byte and 3,072 pixel bytes (CHW).
//!
//! Format: <https://www.cs.toronto.edu/~kriz/cifar.html>, "Binary version". The published files
//! hold 10,000 records each; files with fewer or more are read as well, so that a subset can be
//! given to any program that reads CIFAR-10.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::{CLASSES, DataError, IMAGE_BYTES, ImageSet, TrainTest};

/// Bytes of one record: the label and the pixels.
pub const RECORD_BYTES: usize = 1 + IMAGE_BYTES;

/// Most records that are read from one file (3 GB).
pub const MAX_RECORDS: usize = 1_000_000;

/// Names of the training files, in order.
pub const TRAIN_FILES: [&str; 5] = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
];

/// Name of the test file.
pub const TEST_FILE: &str = "test_batch.bin";

/// Loads the five training files and the test file of `dir`.
///
/// # Errors
/// Those of [`read_file`], for the first file that has one.
pub fn load(dir: &Path) -> Result<TrainTest, DataError> {
    let mut train = read_file(&dir.join(TRAIN_FILES[0]))?;
    for name in &TRAIN_FILES[1..] {
        train.append(read_file(&dir.join(name))?);
    }
    Ok(TrainTest {
        train,
        test: read_file(&dir.join(TEST_FILE))?,
        source: format!("CIFAR-10, binary files in {}", dir.display()),
    })
}

/// Reads one file.
///
/// # Errors
/// [`DataError::Read`] if the file cannot be read, [`DataError::TooMany`] above [`MAX_RECORDS`],
/// else those of [`decode`].
pub fn read_file(path: &Path) -> Result<ImageSet, DataError> {
    let read_error = |source| DataError::Read {
        path: path.to_owned(),
        source,
    };
    let limit = (MAX_RECORDS * RECORD_BYTES) as u64;
    let file = File::open(path).map_err(read_error)?;
    let size = file.metadata().map_err(read_error)?.len();
    if size > limit {
        return Err(DataError::TooMany {
            path: path.to_owned(),
            found: size / RECORD_BYTES as u64,
            max: MAX_RECORDS as u64,
        });
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // The limit also ends a file whose size is not known, such as a device.
    file.take(limit)
        .read_to_end(&mut bytes)
        .map_err(read_error)?;
    decode(&bytes, path)
}

/// Decodes the bytes of one file; `path` is only named in errors.
///
/// # Errors
/// [`DataError::Empty`], [`DataError::BinarySize`] unless `bytes` is a whole number of records,
/// [`DataError::BinaryLabel`] for the first label above 9.
pub fn decode(bytes: &[u8], path: &Path) -> Result<ImageSet, DataError> {
    if bytes.is_empty() {
        return Err(DataError::Empty {
            path: path.to_owned(),
        });
    }
    let (records, []) = bytes.as_chunks::<RECORD_BYTES>() else {
        return Err(DataError::BinarySize {
            path: path.to_owned(),
            found: bytes.len() as u64,
            record: RECORD_BYTES as u64,
        });
    };
    let mut labels = Vec::with_capacity(records.len());
    let mut pixels = Vec::with_capacity(records.len() * IMAGE_BYTES);
    for (record, [label, image @ ..]) in records.iter().enumerate() {
        if usize::from(*label) >= CLASSES {
            return Err(DataError::BinaryLabel {
                path: path.to_owned(),
                record,
                found: *label,
            });
        }
        labels.push(*label);
        pixels.extend_from_slice(image);
    }
    ImageSet::new(pixels, labels)
}

/// The bytes of a binary file that holds `set`: the inverse of [`decode`].
pub fn encode(set: &ImageSet) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(set.len() * RECORD_BYTES);
    for index in 0..set.len() {
        bytes.push(set.label(index));
        bytes.extend_from_slice(set.image(index));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::shapes::{self, Split};

    fn bytes() -> Vec<u8> {
        encode(&shapes::generate(3, Split::Train, 3))
    }

    #[test]
    fn a_file_of_any_whole_number_of_records_is_read() {
        let set = shapes::generate(3, Split::Train, 3);
        assert_eq!(decode(&encode(&set), Path::new("x")).unwrap(), set);
    }

    #[test]
    fn a_truncated_file_is_an_error_that_names_the_file_and_the_record() {
        let error = decode(&bytes()[..2 * RECORD_BYTES + 5], Path::new("d/x.bin")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`d/x.bin` has 6151 bytes: 2 whole records of 3073 bytes and 5 bytes of record 2; \
             expected a multiple of 3073 (is the file truncated?)"
        );
    }

    #[test]
    fn a_wrong_label_byte_is_an_error_that_names_the_record() {
        let mut bytes = bytes();
        bytes[2 * RECORD_BYTES] = 10;
        let error = decode(&bytes, Path::new("d/x.bin")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`d/x.bin`, record 2: label byte 10, expected 0 to 9"
        );
    }

    #[test]
    fn an_empty_file_is_an_error() {
        let error = decode(&[], Path::new("x.bin")).unwrap_err();
        assert_eq!(error.to_string(), "`x.bin` holds no picture");
    }

    #[test]
    fn a_folder_in_place_of_a_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let error = read_file(dir.path()).unwrap_err();
        assert!(matches!(&error, DataError::Read { path, .. } if path == dir.path()));
    }

    #[cfg(unix)]
    #[test]
    fn an_empty_device_and_an_oversized_file_are_errors() {
        assert!(matches!(
            read_file(Path::new("/dev/null")),
            Err(DataError::Empty { .. })
        ));
        let file = tempfile::NamedTempFile::new().unwrap();
        let size = ((MAX_RECORDS + 1) * RECORD_BYTES) as u64;
        file.as_file().set_len(size).unwrap();
        assert!(matches!(
            read_file(file.path()),
            Err(DataError::TooMany {
                found: 1_000_001,
                ..
            })
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_or_refused_and_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..3 * RECORD_BYTES)
        ) {
            if let Ok(set) = decode(&bytes, Path::new("x")) {
                prop_assert_eq!(encode(&set), bytes);
            }
        }

        #[test]
        fn whole_records_are_read_exactly_when_every_label_is_below_ten(
            labels in prop::collection::vec(0u8..12, 1..4),
            fill in any::<u8>(),
        ) {
            let mut bytes = Vec::new();
            for &label in &labels {
                bytes.push(label);
                bytes.extend([fill; IMAGE_BYTES]);
            }
            match decode(&bytes, Path::new("x")) {
                Ok(set) => prop_assert_eq!(set.labels(), labels),
                Err(DataError::BinaryLabel { record, found, .. }) => {
                    prop_assert_eq!(labels.iter().position(|&l| l > 9), Some(record));
                    prop_assert_eq!(labels[record], found);
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
    }
}
