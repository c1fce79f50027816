//! Good and bad Parquet files.

mod pictures;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cifar_data::hub_parquet::read_file;
use cifar_data::{DataError, jpeg};
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage, RgbaImage};
use parquet::basic::{Compression, Encoding};
use parquet::data_type::Int64Type;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::ColumnPath;
use pictures::{asymmetric, chw, encoded, png, write_hub_parquet, write_hub_parquet_as};
use tempfile::TempDir;
use test_support::{Fixture, odd_jpeg};

type Row = (Option<Vec<u8>>, Option<i64>);

fn file_of(rows: &[Row]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0000.parquet");
    write_hub_parquet(&path, rows, 2);
    (dir, path)
}

fn good(label: i64) -> Row {
    (Some(png(&asymmetric())), Some(label))
}

/// The error of a file, without the folder it lies in, and with its causes.
fn error_of(path: &Path) -> String {
    let error = read_file(path).unwrap_err();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text.replace(&format!("{}/", path.parent().unwrap().display()), "")
}

fn error_of_rows(rows: &[Row]) -> String {
    let (_dir, path) = file_of(rows);
    error_of(&path)
}

/// Three good rows and a picture that is not: it is in the second row group.
fn error_of_picture(picture: Vec<u8>) -> String {
    error_of_rows(&[good(0), good(1), good(2), (Some(picture), Some(3))])
}

#[test]
fn rows_are_read_in_order_across_row_groups_and_blocks() {
    let mut pictures = Vec::new();
    let mut rows = Vec::new();
    for i in 0..2500u32 {
        let mut picture = RgbImage::new(32, 32);
        picture.put_pixel(1, 2, image::Rgb([i as u8, (i >> 8) as u8, 7]));
        rows.push((Some(png(&picture)), Some(i64::from(i % 10))));
        pictures.push(picture);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0000.parquet");
    write_hub_parquet(&path, &rows, 2200);
    let images = read_file(&path).unwrap();
    assert_eq!((images.set.len(), images.jpeg), (2500, 0));
    for (i, picture) in pictures.iter().enumerate() {
        assert_eq!(images.set.image(i), chw(picture), "picture {i}");
        assert_eq!(usize::from(images.set.label(i)), i % 10);
    }
}

#[test]
fn a_jpeg_is_read_to_the_bytes_of_pillow_and_counted() {
    let fixture = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/jpeg.safetensors"
    );
    let fixture = Fixture::load(fixture);
    let names = ["subsampled", "full_colour", "coarse", "progressive", "grey"];
    let bytes = |name: &str, what: &str| {
        let tensor = fixture.tensor(&format!("{name}.{what}"));
        tensor.flatten_all().unwrap().to_vec1::<u8>().unwrap()
    };
    let jpegs = names.map(|name| (Some(bytes(name, "file")), Some(1)));
    let (_dir, path) = file_of(&[&[good(0)], &jpegs[..]].concat());
    let images = read_file(&path).unwrap();
    assert_eq!(images.jpeg, names.len());
    for (i, name) in names.iter().enumerate() {
        assert_eq!(images.set.image(i + 1), bytes(name, "pixels"), "{name}");
    }
}

#[test]
fn a_jpeg_that_is_cut_off_is_an_error_that_names_its_row() {
    let jpeg = encoded(&asymmetric().into(), ImageFormat::Jpeg);
    let text = error_of_picture(jpeg[..jpeg.len() / 2].to_vec());
    let expected = "`0000.parquet`, row 3: cannot decode the picture";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn an_odd_jpeg_is_refused_by_its_row_without_a_panic() {
    let jpeg = encoded(&asymmetric().into(), ImageFormat::Jpeg);
    let colour = "`0000.parquet`, row 3: the picture is of four colours, CMYK or YCCK; expected";
    let decode = "`0000.parquet`, row 3: cannot decode the picture: ";
    for (precision, sampling, expected) in [
        (8, &[0x11; 4][..], colour),
        (8, &[0x11, 0x12, 0x41, 0x24], colour),
        (8, &[0x11; 2], decode),
        (12, &[0x11, 0x22], decode),
        (12, &[0x11; 3], decode),
        (12, &[0x11], decode),
    ] {
        let text = error_of_picture(odd_jpeg(&jpeg, precision, sampling));
        assert!(text.starts_with(expected), "{sampling:x?}: {text}");
    }
}

#[test]
fn a_jpeg_of_another_precision_or_two_colours_is_refused_before_it_is_decoded() {
    let jpeg = encoded(&asymmetric().into(), ImageFormat::Jpeg);
    for (precision, sampling, expected) in [
        (12, &[0x11; 3][..], "12 bits a sample; 8 are read"),
        (12, &[0x11, 0x22], "12 bits a sample; 8 are read"),
        (8, &[0x11; 2], "2 colours; 1 or 3 are read"),
    ] {
        let error = jpeg::decode(&odd_jpeg(&jpeg, precision, sampling), u64::MAX).unwrap_err();
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}

#[test]
fn a_grey_picture_has_three_equal_channels() {
    let grey = GrayImage::from_fn(32, 32, |x, y| image::Luma([(x * 3 + y) as u8]));
    let grey = DynamicImage::from(grey);
    let (_dir, path) = file_of(&[(Some(encoded(&grey, ImageFormat::Png)), Some(5))]);
    let set = read_file(&path).unwrap().set;
    assert_eq!(set.image(0), chw(&grey.into_rgb8()));
}

#[test]
fn files_are_read_as_the_hubs_and_other_writers_write_them() {
    let picture = asymmetric();
    let rows: Vec<Row> = (0..40)
        .map(|i| {
            let mut picture = picture.clone();
            picture.put_pixel(0, 0, image::Rgb([i % 7, 0, 0]));
            (Some(png(&picture)), Some(i64::from(i % 10)))
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0000.parquet");
    write_hub_parquet(&path, &rows, 40);
    let expected = read_file(&path).unwrap();
    let bytes = ColumnPath::from(vec!["img".to_owned(), "bytes".to_owned()]);
    for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
        let zstd = Compression::ZSTD(Default::default());
        for (codec, dictionary) in [(Compression::SNAPPY, true), (zstd, true), (zstd, false)] {
            let properties = WriterProperties::builder()
                .set_writer_version(version)
                .set_compression(codec)
                .set_dictionary_enabled(dictionary)
                .set_column_encoding(bytes.clone(), Encoding::PLAIN)
                .set_statistics_enabled(EnabledStatistics::Page)
                .set_data_page_row_count_limit(9)
                .set_write_batch_size(3);
            write_hub_parquet_as(&path, &rows, 20, properties.build());
            assert_eq!(
                read_file(&path).unwrap(),
                expected,
                "{version:?}, {codec:?}, {dictionary}"
            );
        }
    }
}

#[test]
fn a_codec_that_may_unpack_without_end_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0000.parquet");
    for (codec, name) in [
        (Compression::GZIP(Default::default()), "GZIP"),
        (Compression::BROTLI(Default::default()), "BROTLI"),
    ] {
        let properties = WriterProperties::builder().set_compression(codec);
        write_hub_parquet_as(&path, &[good(0)], 2, properties.build());
        let text = error_of(&path);
        let expected = format!("column `img.bytes`: it is compressed with {name}; UNCOMPRESSED");
        assert!(text.contains(&expected), "{text}");
    }
}

#[test]
fn a_file_that_is_not_parquet_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0000.parquet");
    std::fs::write(&path, "<html>not found</html>").unwrap();
    let text = error_of(&path);
    assert!(
        text.starts_with("cannot read `0000.parquet` as Parquet: "),
        "{text}"
    );
    std::fs::write(&path, "").unwrap();
    let text = error_of(&path);
    assert!(
        text.starts_with("cannot read `0000.parquet` as Parquet: "),
        "{text}"
    );
}

#[test]
fn a_missing_file_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let text = error_of(&dir.path().join("0000.parquet"));
    assert!(text.starts_with("cannot read `0000.parquet`: "), "{text}");
}

/// A file of one row, whose columns are all int64.
fn int64_columns(schema: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0000.parquet");
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    while let Some(mut column) = group.next_column().unwrap() {
        let values = column.typed::<Int64Type>();
        values.write_batch(&[1], None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    (dir, path)
}

#[test]
fn a_file_without_img_is_an_error_that_lists_the_columns() {
    let (_dir, path) = int64_columns("message m { required int64 image; required int64 label; }");
    assert_eq!(
        error_of(&path),
        "`0000.parquet`: expected a column `img` of type struct{bytes: binary, path: string}, \
         found `image` (INT64), `label` (INT64)"
    );
}

#[test]
fn a_column_of_another_type_is_an_error_that_names_both() {
    let (_dir, path) = int64_columns(
        "message m { required group img { required int64 bytes; } required int64 label; }",
    );
    assert_eq!(
        error_of(&path),
        "`0000.parquet`: expected a column `img` of type struct{bytes: binary, path: string}, \
         found `img.bytes` of type INT64"
    );
}

#[test]
fn a_file_without_rows_is_an_error() {
    assert_eq!(error_of_rows(&[]), "`0000.parquet` holds no picture");
}

#[test]
fn a_label_that_is_no_class_is_an_error_that_names_the_row() {
    for label in [10, -1, 256, i64::MIN] {
        assert_eq!(
            error_of_rows(&[good(0), good(9), good(label)]),
            format!("`0000.parquet`, row 2: label {label}, expected 0 to 9")
        );
    }
}

#[test]
fn a_null_is_an_error_that_names_the_row_and_the_column() {
    assert_eq!(
        error_of_rows(&[good(0), good(1), good(2), (None, Some(1))]),
        "`0000.parquet`, row 3: `img.bytes` is null"
    );
    assert_eq!(
        error_of_rows(&[good(0), (good(0).0, None)]),
        "`0000.parquet`, row 1: `label` is null"
    );
}

#[test]
fn a_corrupt_picture_is_an_error_that_names_the_row() {
    let mut corrupt = png(&asymmetric());
    let middle = corrupt.len() / 2;
    corrupt[middle] ^= 0x55;
    for picture in [corrupt.clone(), corrupt[..middle].to_vec()] {
        let text = error_of_picture(picture);
        let expected = "`0000.parquet`, row 3: cannot decode the picture: ";
        assert!(text.starts_with(expected), "{text}");
    }
    let mut jpeg = encoded(&asymmetric().into(), ImageFormat::Jpeg);
    jpeg.truncate(30);
    let text = error_of_picture(jpeg);
    assert!(text.contains("row 3: cannot decode"), "{text}");
}

#[test]
fn a_picture_of_another_size_or_kind_is_an_error_that_says_so() {
    let expected = "; expected a PNG or JPEG of 32×32 pixels, 8-bit RGB or grey";
    let small = RgbImage::new(31, 32);
    let clear = DynamicImage::from(RgbaImage::new(32, 32));
    let deep = DynamicImage::from(asymmetric()).into_rgb16();
    for (picture, found) in [
        (png(&small), "31×32 pixels large"),
        (encoded(&clear, ImageFormat::Png), "of colour type Rgba8"),
        (
            encoded(&deep.into(), ImageFormat::Png),
            "of colour type Rgb16",
        ),
        (b"GIF89a..........".to_vec(), "a Gif file"),
        (b"hello".to_vec(), "5 bytes of no known format"),
        (Vec::new(), "0 bytes of no known format"),
        (vec![0; (1 << 20) + 1], "1048577 bytes long"),
    ] {
        assert_eq!(
            error_of_picture(picture),
            format!("`0000.parquet`, row 3: the picture is {found}{expected}")
        );
    }
}

#[test]
fn a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded() {
    // Width 2³⁰ in the header, with its checksum made right.
    let mut huge = png(&asymmetric());
    huge[16..20].copy_from_slice(&(1u32 << 30).to_be_bytes());
    let crc = crc32(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.to_be_bytes());
    let text = error_of_picture(huge);
    assert!(text.contains("`0000.parquet`, row 3: "), "{text}");
    assert!(
        text.contains("1073741824×32") || text.contains("imit"),
        "{text}"
    );
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn a_truncated_or_damaged_file_never_panics() {
    let (_dir, path) = file_of(&[good(0), good(1), good(2)]);
    let whole = std::fs::read(&path).unwrap();
    let intact = read_file(&path).unwrap();
    for length in (0..whole.len()).step_by(7) {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(
            read_file(&path).is_err(),
            "{length} of {} bytes",
            whole.len()
        );
    }
    let mut refused = 0;
    for position in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[position] ^= [0x01, 0x80, 0xFF][position % 3];
        std::fs::write(&path, damaged).unwrap();
        match read_file(&path) {
            Ok(images) => assert_eq!(images.set.len(), intact.set.len(), "byte {position}"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > whole.len() / 4, "{refused} of {}", whole.len());
}

#[test]
fn errors_can_be_told_apart_by_their_variant() {
    let (_dir, path) = file_of(&[good(0), good(10)]);
    assert!(matches!(
        read_file(&path),
        Err(DataError::ParquetLabel {
            row: 1,
            found: 10,
            ..
        })
    ));
}
