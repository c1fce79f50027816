use candle_core::Tensor;
use test_support::{Fixture, assert_close};
use transfer_common::resize_batch;

use super::*;

const TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");

fn fixture() -> Fixture {
    Fixture::load(format!("{TESTS}/fixtures/preprocessing.safetensors"))
}

fn pictures(fixture: &Fixture) -> Vec<String> {
    let names = fixture.json("pictures");
    let names = names.as_array().unwrap().iter();
    names
        .map(|name| name.as_str().unwrap().to_string())
        .collect()
}

fn prepared(name: &str, preprocessing: Preprocessing) -> Vec<f32> {
    let picture = read(Path::new(&format!("{TESTS}/pictures/{name}"))).unwrap();
    preprocessing.apply(&picture)
}

/// What we may differ by, in steps of a byte: one, for the order of the passes that [`resize`] tells
/// of. Most pictures have no difference at all.
const TOLERANCE: f32 = 1.0;

#[test]
fn imagenet_preprocessing_is_torchvisions_within_one_step_of_a_byte() {
    let fixture = fixture();
    let names = pictures(&fixture);
    assert_eq!(names.len(), 7);
    for name in &names {
        let values = prepared(name, Preprocessing::ImageNet);
        let expected = fixture.tensor(&format!("{name}.imagenet"));
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        let mut worst = 0f32;
        for (i, expected) in expected.iter().enumerate() {
            let (c, y, x) = (i / 256, 7 + i / 16 % 16 * 14, 7 + i % 16 * 14);
            let found = values[(c * 224 + y) * 224 + x];
            worst = worst.max((found - expected).abs() * IMAGENET.std[c] * 255.0);
        }
        println!("{name}: {worst:.3} of 255");
        assert!(worst <= TOLERANCE + 1e-3, "{name}: {worst} of 255");
    }
}

#[test]
fn cifar_preprocessing_is_a_resize_to_32_pixels_within_one_step_of_a_byte() {
    let fixture = fixture();
    for name in pictures(&fixture) {
        let values = prepared(&name, Preprocessing::Cifar);
        let expected = fixture.tensor(&format!("{name}.cifar"));
        let expected: Vec<u8> = expected.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(values.len(), expected.len());
        let steps = |(value, &byte): (&f32, &u8)| ((value + 1.0) * 127.5 - f32::from(byte)).abs();
        let worst = values.iter().zip(&expected).map(steps).fold(0.0, f32::max);
        assert!(worst <= TOLERANCE + 1e-3, "{name}: {worst} of 255");
    }
}

#[test]
fn batches_are_resized_as_pytorch_interpolates_with_antialiasing() {
    let fixture = fixture();
    let images = fixture.tensor("resize.images");
    for size in [20, 48, 224] {
        let resized = resize_batch(images, size, size).unwrap();
        let every = size / 16;
        let kept: Vec<u32> = (0..size as u32).step_by(every).collect();
        let kept = Tensor::new(kept, images.device()).unwrap();
        let sampled = resized.index_select(&kept, 2).unwrap();
        let sampled = sampled.index_select(&kept, 3).unwrap();
        let expected = fixture.tensor(&format!("resize.{size}"));
        assert_close(&format!("{size}"), &sampled, expected, 1e-6);
    }
}

#[test]
fn a_crop_of_an_odd_rest_begins_where_pythons_rounding_puts_it() {
    // 341 − 224 = 117 and 343 − 224 = 119: halves, to the even neighbour.
    for (pixels, begin) in [(224, 0), (256, 16), (341, 58), (343, 60)] {
        let side = Side::middle(pixels);
        assert_eq!((side.begin, side.count), (begin, 224), "{pixels}");
    }
}

#[test]
fn what_is_computed_of_a_part_is_that_part_of_the_whole() {
    let picture = RgbImage::from_fn(37, 90, |x, y| {
        image::Rgb([(x * 7) as u8, (y * 11) as u8, (x * y) as u8])
    });
    for (across, down) in [(256, 622), (37, 90), (300, 224), (20, 25)] {
        let part = |pixels: usize| Side {
            begin: pixels / 3,
            count: pixels / 2,
            ..Side::whole(pixels)
        };
        let whole = resize(&picture, Side::whole(across), Side::whole(down));
        let (x, y) = (part(across), part(down));
        let (left, top) = (x.begin as u32, y.begin as u32);
        let cut = image::imageops::crop_imm(&whole, left, top, x.count as u32, y.count as u32);
        assert!(resize(&picture, x, y) == cut.to_image(), "{across}×{down}");
        assert_eq!(across == 37, whole == picture);
    }
}

#[test]
fn a_long_thin_picture_takes_no_more_than_others() {
    // Its short side of 256 pixels would make it 256 million long.
    for (width, height) in [(1, 1_000_000), (1_000_000, 1)] {
        let picture = RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([if (x + y) < 500_000 { 0 } else { 255 }; 3])
        });
        let values = Preprocessing::ImageNet.apply(&picture);
        assert_eq!(values.len(), 3 * 224 * 224);
        // The middle is at the edge between 0 and 255: from 111.5 of 256 before to as much behind what is half of both.
        let expected = [16, 239].map(|byte| IMAGENET.apply(0, byte));
        assert_eq!([values[0], values[224 * 224 - 1]], expected);
    }
}

#[test]
fn a_picture_that_would_take_too_much_memory_is_refused_with_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("picture");
    for (width, height) in [(1_000_001, 1), (1, 1_000_001)] {
        let long = DynamicImage::new_rgb8(width, height);
        long.save_with_format(&path, ImageFormat::Png).unwrap();
        assert_eq!(
            format!("{:#}", read(&path).unwrap_err()),
            format!("has {width}×{height} pixels; a side of 1000000 is the most")
        );
    }
    let long = DynamicImage::new_rgb8(1_000_000, 1);
    long.save_with_format(&path, ImageFormat::Png).unwrap();
    assert_eq!(read(&path).unwrap().dimensions(), (1_000_000, 1));
    // An empty picture that says it has this size.
    let error_of = |picture: DynamicImage, side: u32| {
        let mut file = Cursor::new(Vec::new());
        picture.write_to(&mut file, ImageFormat::Bmp).unwrap();
        let mut file = file.into_inner();
        for at in [18, 22] {
            file[at..at + 4].copy_from_slice(&side.to_le_bytes());
        }
        fs::write(&path, file).unwrap();
        format!("{:#}", read(&path).unwrap_err())
    };
    // 3 bytes a pixel of 1 GiB, and 4 of which 3 are copied.
    for (picture, side) in [
        (DynamicImage::new_rgb8(1, 1), 18_919),
        (DynamicImage::new_rgba8(1, 1), 12_386),
    ] {
        let error = error_of(picture.clone(), side);
        let expected = format!("has {side}×{side} pixels, which take more than 1 GiB to decode");
        assert_eq!(error, expected);
        let error = error_of(picture, side - 1);
        assert!(error.starts_with("cannot be decoded"), "{error}");
    }
}

#[test]
fn what_is_no_picture_is_an_error_that_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let jpeg = std::fs::read(format!("{TESTS}/pictures/wide.jpg")).unwrap();
    let cases: [(&str, &[u8], &str); 5] = [
        ("empty.png", b"", "is no JPEG"),
        ("text.jpg", b"no picture at all", "is no JPEG"),
        (
            "other.gif",
            b"GIF89a\x01\x00\x01\x00\x00\x00\x00",
            "is no JPEG",
        ),
        (
            "cut.png",
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
            "cannot be decoded",
        ),
        ("half.jpg", &jpeg[..jpeg.len() / 2], "cannot be decoded"),
    ];
    for (name, bytes, expected) in cases {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(error.contains(expected), "{name}: {error}");
    }
    let path = dir.path().join("jpeg.png");
    std::fs::write(&path, &jpeg).unwrap();
    assert_eq!(read(&path).unwrap().dimensions(), (500, 375));
    assert!(read(&dir.path().join("absent")).is_err());
}
