//! The Hugging Face Hub's version: Parquet files of encoded pictures.
//!
//! Columns: `img`, a struct of `bytes` (binary: a PNG or JPEG file) and `path` (string, ignored),
//! and `label` (int64). The published pictures are PNG, hence lossless. JPEG copies are read too, to the
//! bytes that Pillow makes of them ([`crate::jpeg`]); a result measured on them should say so: see
//! [`HubImages::jpeg`] and [`TrainTest::source`].

mod pages;

use std::fs::File;
use std::io::Cursor;
use std::path::Path;

use image::{
    ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, ImageResult, Limits, RgbImage,
};
use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;
use rayon::prelude::*;

use crate::{CLASSES, DataError, IMAGE_BYTES, ImageSet, SIDE, TrainTest, guard, jpeg};

/// The two layouts' training and test file, within the folder `plain_text`.
pub const FILES: [(&str, &str); 2] = [
    (
        "train-00000-of-00001.parquet",
        "test-00000-of-00001.parquet",
    ),
    ("train/0000.parquet", "test/0000.parquet"),
];

/// Most rows that are read from one file.
pub const MAX_ROWS: usize = 1_000_000;

/// Most bytes of one encoded picture; a PNG of 32×32 pixels has some 2,400.
pub const MAX_ENCODED_BYTES: usize = 1 << 20;

/// Most memory that decoding one may take.
const MAX_DECODER_BYTES: u64 = 4 * MAX_ENCODED_BYTES as u64;

/// What a Parquet file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubImages {
    /// The decoded pictures, in the order of the rows.
    pub set: ImageSet,
    /// How many of them were JPEG.
    pub jpeg: usize,
}

/// Loads a training and a test file.
///
/// # Errors
/// Those of [`read_file`].
pub fn load(train: &Path, test: &Path) -> Result<TrainTest, DataError> {
    let train_images = read_file(train)?;
    let test_images = read_file(test)?;
    let copy = match (train_images.jpeg, test_images.jpeg) {
        (0, 0) => "",
        _ => " (JPEG copy)",
    };
    Ok(TrainTest {
        train: train_images.set,
        test: test_images.set,
        source: format!(
            "CIFAR-10{copy}, Parquet files {} and {}",
            train.display(),
            test.display()
        ),
    })
}

/// Reads one file. Pictures are decoded on all threads of rayon's pool.
///
/// # Errors
/// [`DataError::Read`] and [`DataError::Parquet`] for a file that cannot be read,
/// [`DataError::ParquetColumn`] without the columns above, [`DataError::Empty`] and
/// [`DataError::TooMany`] for the number of rows, and for a row, which they name:
/// [`DataError::ParquetNull`], [`DataError::ParquetLabel`], [`DataError::Picture`],
/// [`DataError::Decode`].
pub fn read_file(path: &Path) -> Result<HubImages, DataError> {
    let file = ParquetFile::open(path)?;
    file.check_place_of_chunks()?;
    let rows = file.count_rows()?;
    file.check_pages(rows)?;
    let mut pictures = Pictures::default();
    for group in 0..file.reader.num_row_groups() {
        file.read_group(group, &mut pictures)?;
    }
    if pictures.labels.len() != rows {
        return Err(DataError::ParquetRows {
            path: path.to_owned(),
            column: "label",
            found: pictures.labels.len(),
            expected: rows,
        });
    }
    let set = ImageSet::new(pictures.pixels, pictures.labels)?;
    let jpeg = pictures.jpeg;
    Ok(HubImages { set, jpeg })
}

/// A file in which the two columns were found. Nothing else that its metadata says is believed before
/// it has been checked.
struct ParquetFile<'a> {
    path: &'a Path,
    bytes: u64,
    /// For the check of the pages; the reader has taken the other handle.
    pages: File,
    reader: SerializedFileReader<File>,
    /// Index of the leaf column `img.bytes`.
    img: usize,
    /// Index of the leaf column `label`.
    label: usize,
}

/// What has been read.
#[derive(Default)]
struct Pictures {
    pixels: Vec<u8>,
    labels: Vec<u8>,
    jpeg: usize,
}

impl<'a> ParquetFile<'a> {
    fn open(path: &'a Path) -> Result<Self, DataError> {
        let read_error = |source| DataError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read_error)?;
        let bytes = file.metadata().map_err(read_error)?.len();
        let pages = file.try_clone().map_err(read_error)?;
        let reader = guarded(|| SerializedFileReader::new(file))
            .map_err(|source| parquet_error(path, source))?;
        let schema = reader.metadata().file_metadata().schema_descr();
        let img = find_column(schema, "img.bytes", PhysicalType::BYTE_ARRAY, path)?;
        let label = find_column(schema, "label", PhysicalType::INT64, path)?;
        Ok(Self {
            path,
            bytes,
            pages,
            reader,
            img,
            label,
        })
    }

    /// The two columns' chunks, group by group.
    fn chunks(&self) -> impl Iterator<Item = &ColumnChunkMetaData> {
        let groups = self.reader.metadata().row_groups().iter();
        groups.flat_map(|group| [group.column(self.img), group.column(self.label)])
    }

    /// Checks that the chunks lie in the file.
    fn check_place_of_chunks(&self) -> Result<(), DataError> {
        for chunk in self.chunks() {
            let start = chunk
                .dictionary_page_offset()
                .unwrap_or(chunk.data_page_offset());
            let end = start.checked_add(chunk.compressed_size());
            let in_file =
                end.is_some_and(|end| u64::try_from(end).is_ok_and(|end| end <= self.bytes));
            if start < 0 || chunk.compressed_size() < 0 || !in_file {
                let problem = format!(
                    "column `{}` is said to be at byte {start}, {} bytes long, in a file of {}",
                    chunk.column_path().string(),
                    chunk.compressed_size(),
                    self.bytes
                );
                return Err(parquet_error(self.path, ParquetError::General(problem)));
            }
        }
        Ok(())
    }

    /// How many rows all groups are said to hold: at least one, and no more than [`MAX_ROWS`].
    fn count_rows(&self) -> Result<usize, DataError> {
        let groups = self.reader.metadata().row_groups();
        let rows: i128 = groups
            .iter()
            .map(|group| i128::from(group.num_rows()))
            .sum();
        if rows > MAX_ROWS as i128 || groups.iter().any(|group| group.num_rows() < 0) {
            return Err(DataError::TooMany {
                path: self.path.to_owned(),
                found: u64::try_from(rows).unwrap_or(u64::MAX),
                max: MAX_ROWS as u64,
            });
        }
        match rows as usize {
            0 => Err(DataError::Empty {
                path: self.path.to_owned(),
            }),
            rows => Ok(rows),
        }
    }

    /// Checks that no page takes more memory than a good one can. It comes after the chunks' place, since
    /// the range of one that lies nowhere is a panic of the library's.
    fn check_pages(&self, rows: usize) -> Result<(), DataError> {
        for chunk in self.chunks() {
            let (range, codec) = (chunk.byte_range(), chunk.compression());
            pages::check(&self.pages, range, codec, rows).map_err(|error| {
                let column = chunk.column_path().string();
                let problem = match error {
                    ParquetError::General(problem) => problem,
                    other => other.to_string(),
                };
                let problem = format!("column `{column}`: {problem}");
                parquet_error(self.path, ParquetError::General(problem))
            })?;
        }
        Ok(())
    }

    /// Appends the pictures of a row group, block by block.
    fn read_group(&self, group: usize, pictures: &mut Pictures) -> Result<(), DataError> {
        let path = self.path;
        let group = guarded(|| self.reader.get_row_group(group))
            .map_err(|source| parquet_error(path, source))?;
        let mut images = Column::<ByteArrayType>::open(&*group, self.img, "img.bytes", path)?;
        let mut classes = Column::<Int64Type>::open(&*group, self.label, "label", path)?;
        loop {
            let row = pictures.labels.len();
            let encoded = images.next_values(row)?;
            let labels = classes.next_values(row)?;
            if encoded.len() != labels.len() {
                return Err(DataError::ParquetRows {
                    path: path.to_owned(),
                    column: "label",
                    found: row + labels.len(),
                    expected: row + encoded.len(),
                });
            }
            if encoded.is_empty() {
                return Ok(());
            }
            pictures.append(encoded, labels, path)?;
        }
    }
}

impl Pictures {
    /// Appends a block of as many encoded pictures as labels.
    fn append(
        &mut self,
        encoded: Vec<ByteArray>,
        labels: Vec<i64>,
        path: &Path,
    ) -> Result<(), DataError> {
        let row = self.labels.len();
        for (i, found) in labels.into_iter().enumerate() {
            let label = u8::try_from(found)
                .ok()
                .filter(|&l| usize::from(l) < CLASSES);
            self.labels
                .push(label.ok_or_else(|| DataError::ParquetLabel {
                    path: path.to_owned(),
                    row: row + i,
                    found,
                })?);
        }
        self.pixels.resize(self.labels.len() * IMAGE_BYTES, 0);
        let formats = self.pixels[row * IMAGE_BYTES..]
            .par_chunks_exact_mut(IMAGE_BYTES)
            .zip(encoded)
            .enumerate()
            .map(|(i, (image, encoded))| decode_picture(encoded.data(), image, row + i, path))
            .collect::<Result<Vec<_>, _>>()?;
        self.jpeg += formats.iter().filter(|&&f| f == ImageFormat::Jpeg).count();
        Ok(())
    }
}

fn parquet_error(path: &Path, source: ParquetError) -> DataError {
    DataError::Parquet {
        path: path.to_owned(),
        source,
    }
}

/// The index of the leaf column `name`.
fn find_column(
    schema: &SchemaDescriptor,
    name: &'static str,
    physical_type: PhysicalType,
    path: &Path,
) -> Result<usize, DataError> {
    let (column, expected) = match physical_type {
        PhysicalType::BYTE_ARRAY => ("img", "struct{bytes: binary, path: string}"),
        _ => ("label", "int64"),
    };
    let error = |found| DataError::ParquetColumn {
        path: path.to_owned(),
        column,
        expected,
        found,
    };
    let columns = schema.columns();
    let Some(index) = columns.iter().position(|c| c.path().string() == name) else {
        let names: Vec<_> = columns
            .iter()
            .map(|c| format!("`{}` ({})", c.path().string(), c.physical_type()))
            .collect();
        return Err(error(match names.is_empty() {
            true => "no column".to_owned(),
            false => names.join(", "),
        }));
    };
    let descriptor = &columns[index];
    if descriptor.physical_type() != physical_type {
        return Err(error(format!(
            "`{name}` of type {}",
            descriptor.physical_type()
        )));
    }
    if descriptor.max_rep_level() != 0 {
        return Err(error(format!("a list of `{name}`")));
    }
    Ok(index)
}

/// One column of a row group, read block by block.
struct Column<'a, T: DataType> {
    reader: ColumnReaderImpl<T>,
    /// The definition level of a value that is not null.
    full_level: i16,
    name: &'static str,
    path: &'a Path,
}

impl<'a, T: DataType> Column<'a, T> {
    /// Rows per block: enough to decode in parallel, little memory.
    const BLOCK: usize = 1024;

    fn open(
        group: &dyn RowGroupReader,
        index: usize,
        name: &'static str,
        path: &'a Path,
    ) -> Result<Self, DataError> {
        let reader = guarded(|| group.get_column_reader(index))
            .map_err(|source| parquet_error(path, source))?;
        Ok(Self {
            // `find_column` has checked the type, without which this would panic.
            reader: get_typed_column_reader(reader),
            full_level: group
                .metadata()
                .column(index)
                .column_descr()
                .max_def_level(),
            name,
            path,
        })
    }

    /// The next values, of which the first belongs to `row`; none at the end.
    fn next_values(&mut self, row: usize) -> Result<Vec<T::T>, DataError> {
        let mut values = Vec::with_capacity(Self::BLOCK);
        let mut levels = Vec::new();
        let (records, _, _) = guarded(|| {
            let reader = &mut self.reader;
            reader.read_records(Self::BLOCK, Some(&mut levels), None, &mut values)
        })
        .map_err(|source| parquet_error(self.path, source))?;
        if let Some(null) = levels.iter().position(|&level| level != self.full_level) {
            return Err(DataError::ParquetNull {
                path: self.path.to_owned(),
                row: row + null,
                column: self.name,
            });
        }
        if values.len() != records {
            let problem = format!(
                "{} values in {records} records of `{}`",
                values.len(),
                self.name
            );
            return Err(parquet_error(self.path, ParquetError::General(problem)));
        }
        Ok(values)
    }
}

/// Calls the Parquet library, which panics on some damaged files (as of 60.1: a page that names a
/// dictionary that is not there, for one), and makes that an error.
fn guarded<V>(call: impl FnOnce() -> Result<V, ParquetError>) -> Result<V, ParquetError> {
    guard::guarded(call, ParquetError::General)
}

/// Decodes a picture into `chw`, [`IMAGE_BYTES`] long.
fn decode_picture(
    encoded: &[u8],
    chw: &mut [u8],
    row: usize,
    path: &Path,
) -> Result<ImageFormat, DataError> {
    let not_expected = |found: String| DataError::Picture {
        path: path.to_owned(),
        row,
        found,
    };
    let decode_error = |source| DataError::Decode {
        path: path.to_owned(),
        row,
        source,
    };
    if encoded.len() > MAX_ENCODED_BYTES {
        return Err(not_expected(format!("{} bytes long", encoded.len())));
    }
    let format = match image::guess_format(encoded) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg)) => format,
        Ok(other) => return Err(not_expected(format!("a {other:?} file"))),
        Err(_) => {
            return Err(not_expected(format!(
                "{} bytes of no known format",
                encoded.len()
            )));
        }
    };
    let read = || -> ImageResult<Result<RgbImage, String>> {
        let mut reader = ImageReader::with_format(Cursor::new(encoded), format);
        let mut limits = Limits::default();
        limits.max_alloc = Some(MAX_DECODER_BYTES);
        reader.limits(limits);
        let decoder = reader.into_decoder()?;
        // Checked before anything is allocated for the pixels.
        let (width, height) = decoder.dimensions();
        if (width, height) != (SIDE as u32, SIDE as u32) {
            return Ok(Err(format!("{width}×{height} pixels large")));
        }
        // Transparency or 16 bits would be lost without a word.
        let color = decoder.color_type();
        if !matches!(color, ColorType::Rgb8 | ColorType::L8) {
            return Ok(Err(format!("of colour type {color:?}")));
        }
        Ok(match format {
            ImageFormat::Jpeg => jpeg::decode(encoded, MAX_DECODER_BYTES)?
                .ok_or_else(|| "of four colours, CMYK or YCCK".to_owned()),
            _ => Ok(DynamicImage::from_decoder(decoder)?.into_rgb8()),
        })
    };
    let rgb = jpeg::guarded(format, read)
        .map_err(decode_error)?
        .map_err(not_expected)?;
    let (red, rest) = chw.split_at_mut(SIDE * SIDE);
    let (green, blue) = rest.split_at_mut(SIDE * SIDE);
    for (i, pixel) in rgb.pixels().enumerate() {
        [red[i], green[i], blue[i]] = pixel.0;
    }
    Ok(format)
}
