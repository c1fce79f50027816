//! Pictures and files for the tests.

#![allow(dead_code)] // each test binary uses a part of it

use std::path::Path;
use std::sync::Arc;

use cifar_data::{IMAGE_BYTES, ImageSet, SIDE};
use image::{ImageFormat, RgbImage};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

/// Columns as the Hub's files have them.
pub(crate) const HUB_SCHEMA: &str = "message schema {
    optional group img { optional binary bytes; optional binary path (UTF8); }
    optional int64 label;
}";

/// A picture that looks different under every flip, rotation and transposition: four quadrants of
/// different colours, a mark like the letter F in white, and the four corners marked by hand.
pub(crate) fn asymmetric() -> RgbImage {
    let mut picture = RgbImage::from_fn(32, 32, |x, y| {
        image::Rgb(match (x < 16, y < 16) {
            (true, true) => [200, 10, 20],
            (false, true) => [30, 180, 40],
            (true, false) => [50, 60, 220],
            (false, false) => [240, 230, 70],
        })
    });
    for i in 0..14 {
        picture.put_pixel(9, 6 + i, image::Rgb([255; 3])); // stem
        picture.put_pixel(9 + i, 6, image::Rgb([255; 3])); // upper bar, long
        if i < 7 {
            picture.put_pixel(9 + i, 11, image::Rgb([255; 3])); // lower bar, short
        }
    }
    picture.put_pixel(0, 0, image::Rgb([1, 2, 3]));
    picture.put_pixel(31, 0, image::Rgb([4, 5, 6]));
    picture.put_pixel(0, 31, image::Rgb([7, 8, 9]));
    picture.put_pixel(31, 31, image::Rgb([10, 11, 12]));
    picture
}

/// The picture's bytes, channel by channel.
pub(crate) fn chw(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(IMAGE_BYTES);
    for channel in 0..3 {
        for y in 0..SIDE as u32 {
            for x in 0..SIDE as u32 {
                bytes.push(picture.get_pixel(x, y)[channel]);
            }
        }
    }
    bytes
}

/// A set of `pictures` with labels 0, 1, 2 …
pub(crate) fn set_of(pictures: &[RgbImage]) -> ImageSet {
    let pixels = pictures.iter().flat_map(chw).collect();
    ImageSet::new(pixels, (0..pictures.len() as u8).collect()).unwrap()
}

/// The picture as a file in memory.
pub(crate) fn encoded(picture: &image::DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut file = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut file, format).unwrap();
    file.into_inner()
}

/// The picture as a PNG file in memory.
pub(crate) fn png(picture: &RgbImage) -> Vec<u8> {
    encoded(&picture.clone().into(), ImageFormat::Png)
}

/// Writes rows of (picture file, label) as the Hub does, `None` being null, into row groups of
/// `group_rows` rows.
pub(crate) fn write_hub_parquet(
    path: &Path,
    rows: &[(Option<Vec<u8>>, Option<i64>)],
    group_rows: usize,
) {
    write_hub_parquet_as(path, rows, group_rows, WriterProperties::default());
}

/// The same with a codec, pages and encodings of one's choice.
pub(crate) fn write_hub_parquet_as(
    path: &Path,
    rows: &[(Option<Vec<u8>>, Option<i64>)],
    group_rows: usize,
    properties: WriterProperties,
) {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).unwrap();
    }
    let schema = Arc::new(parse_message_type(HUB_SCHEMA).unwrap());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for rows in rows.chunks(group_rows) {
        let mut group = writer.next_row_group().unwrap();
        let images: Vec<ByteArray> = rows
            .iter()
            .filter_map(|(image, _)| image.clone().map(ByteArray::from))
            .collect();
        // 1: the struct is there, its field is null; 2: the field is there too.
        let levels: Vec<i16> = rows
            .iter()
            .map(|(i, _)| 1 + i16::from(i.is_some()))
            .collect();
        let mut column = group.next_column().unwrap().unwrap();
        column
            .typed::<ByteArrayType>()
            .write_batch(&images, Some(&levels), None)
            .unwrap();
        column.close().unwrap();

        let paths: Vec<ByteArray> = (0..rows.len())
            .map(|i| ByteArray::from(format!("{i}.png").into_bytes()))
            .collect();
        let mut column = group.next_column().unwrap().unwrap();
        column
            .typed::<ByteArrayType>()
            .write_batch(&paths, Some(&vec![2; rows.len()]), None)
            .unwrap();
        column.close().unwrap();

        let labels: Vec<i64> = rows.iter().filter_map(|(_, label)| *label).collect();
        let levels: Vec<i16> = rows.iter().map(|(_, l)| i16::from(l.is_some())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column
            .typed::<Int64Type>()
            .write_batch(&labels, Some(&levels), None)
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}
