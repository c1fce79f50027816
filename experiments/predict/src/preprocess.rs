//! From a file to the network's input, as the network was trained or evaluated.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use cifar_data::{Normalization, SIDE, jpeg};
use image::{
    ColorType, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage,
};
use transfer_common::Resampling;

/// Of the pictures that are read.
pub(crate) const FORMATS: [ImageFormat; 4] = [
    ImageFormat::Jpeg,
    ImageFormat::Png,
    ImageFormat::WebP,
    ImageFormat::Bmp,
];

/// Most bytes that decoding a picture may take.
const MAX_MEMORY: u64 = 1 << 30;

/// Most pixels of a side. Each takes 24 bytes of weights when the picture is resized.
const MAX_SIDE: u32 = 1_000_000;

/// What is done to a picture before the network sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Preprocessing {
    /// torchvision's evaluation of ImageNet weights: short side 256, the middle 224×224, ImageNet's
    /// mean and standard deviation.
    ImageNet,
    /// What CIFAR-10's pictures are: 32×32 pixels, normalised to −1…1. The whole picture is
    /// squeezed into the square.
    Cifar,
}

/// `torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()`.
const IMAGENET: Normalization = Normalization {
    mean: [0.485, 0.456, 0.406],
    std: [0.229, 0.224, 0.225],
};
const SHORT_SIDE: usize = 256;
const CROP: usize = 224;

impl Preprocessing {
    /// Height and width of what comes out, in pixels.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::ImageNet => CROP,
            Self::Cifar => SIDE,
        }
    }

    /// What is said where it is taken for granted.
    pub(crate) fn assumed(self) -> &'static str {
        match self {
            Self::ImageNet => {
                "The weights do not say what their pictures were: taken as torchvision's are, the middle 224×224 pixels \
                 of a short side of 256, normalised by ImageNet's mean and standard deviation"
            }
            Self::Cifar => {
                "The weights do not say what their pictures were: taken as CIFAR-10's are, 32×32 pixels, normalised to −1…1"
            }
        }
    }

    /// The network's input (3, size, size).
    pub(crate) fn apply(self, picture: &RgbImage) -> Vec<f32> {
        let (picture, normalization) = match self {
            Self::ImageNet => (middle_of_short_side(picture), IMAGENET),
            Self::Cifar => {
                let side = Side::whole(SIDE);
                (resize(picture, side, side), Normalization::HALF)
            }
        };
        let channel = |c: usize| {
            picture
                .pixels()
                .map(move |p| normalization.apply(c, p.0[c]))
        };
        (0..3).flat_map(channel).collect()
    }
}

/// What such an error says ends with what its cause says.
fn failed(error: ImageError) -> anyhow::Error {
    anyhow!("cannot be decoded: {error}")
}

/// Decodes a picture of any of [`FORMATS`] by the `image` crate.
fn decode(file: &[u8], format: ImageFormat) -> Result<RgbImage> {
    // The reader's own limits hold beside ours.
    let open = || ImageReader::with_format(Cursor::new(file), format).into_decoder();
    let shape = jpeg::guarded(format, || {
        let decoder = open()?;
        let bytes = decoder.total_bytes();
        Ok((decoder.dimensions(), decoder.color_type(), bytes))
    });
    let ((width, height), color, bytes) = shape.map_err(failed)?;
    let pixels = format!("{width}×{height} pixels");
    ensure!(
        width.max(height) <= MAX_SIDE,
        "has {pixels}; a side of {MAX_SIDE} is the most"
    );
    // What is not RGB is copied once more.
    let copied = match color {
        ColorType::Rgb8 => 0,
        _ => 3 * u64::from(width) * u64::from(height),
    };
    let too_large = || anyhow!("has {pixels}, which take more than 1 GiB to decode");
    if bytes.saturating_add(copied) > MAX_MEMORY {
        return Err(too_large());
    }
    let picture = jpeg::guarded(format, || {
        let mut decoder = open()?;
        let mut limits = Limits::default();
        limits.max_alloc = Some(MAX_MEMORY - bytes - copied);
        decoder.set_limits(limits)?;
        Ok(DynamicImage::from_decoder(decoder)?.into_rgb8())
    });
    picture.map_err(|error| match error {
        ImageError::Limits(_) => too_large(),
        error => failed(error),
    })
}

/// Reads a picture. Transparency is dropped and what a camera says of its orientation is not
/// looked at, as in torchvision. The format is that of the content, whatever the file is called.
///
/// # Errors
/// A file that cannot be read, is no picture of a known format, is damaged, has a side of more than a million pixels, or
/// would take more than a gigabyte.
pub(crate) fn read(path: &Path) -> Result<RgbImage> {
    let file = fs::read(path).context("cannot be read")?;
    let format = image::guess_format(&file).ok();
    let format = format.filter(|format| FORMATS.contains(format));
    let format = format.context("is no JPEG, PNG, WebP or BMP picture")?;
    let decoded = match format {
        ImageFormat::Jpeg => jpeg::decode(&file, MAX_MEMORY),
        _ => Ok(None),
    };
    let picture = match decoded.map_err(failed)? {
        Some(picture) => picture,
        None => decode(&file, format)?,
    };
    ensure!(picture.width() > 0 && picture.height() > 0, "has no pixels");
    Ok(picture)
}

/// Resized so that the shorter side has 256 pixels, and of that the middle: torchvision's `resize` cuts the other side to a
/// whole number. Only what stays is computed, however long a picture is.
fn middle_of_short_side(picture: &RgbImage) -> RgbImage {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let other = |long: usize, short: usize| SHORT_SIDE * long / short;
    let (across, down) = match width <= height {
        true => (SHORT_SIDE, other(height, width)),
        false => (other(width, height), SHORT_SIDE),
    };
    resize(picture, Side::middle(across), Side::middle(down))
}

/// How long a side becomes, and which of its pixels are wanted.
#[derive(Debug, Clone, Copy)]
struct Side {
    pixels: usize,
    begin: usize,
    count: usize,
}

impl Side {
    fn whole(pixels: usize) -> Self {
        Self {
            pixels,
            begin: 0,
            count: pixels,
        }
    }

    /// Those of a centre crop of a side that has as many.
    fn middle(pixels: usize) -> Self {
        Self {
            pixels,
            // Python rounds halves to even.
            begin: ((pixels - CROP) as f64 / 2.0).round_ties_even() as usize,
            count: CROP,
        }
    }
}

/// `PIL.Image.resize` with `BILINEAR`: rows first, then columns, each result rounded to a byte, with
/// weights of 22 binary places. Pillow 13 begins with the columns where a picture shrinks much more in
/// height than in width, which may round a byte to its neighbour.
fn resize(picture: &RgbImage, width: Side, height: Side) -> RgbImage {
    let across = FixedPoint::new(picture.width(), width);
    let down = FixedPoint::new(picture.height(), height);
    let (first, end) = down.inputs();
    let rows = RgbImage::from_fn(width.count as u32, end - first, |x, y| {
        across.mix(x, |tap| picture.get_pixel(tap, first + y).0)
    });
    RgbImage::from_fn(width.count as u32, height.count as u32, |x, y| {
        down.mix(y, |tap| rows.get_pixel(x, tap - first).0)
    })
}

/// Weights as PIL has them for bytes (`Resample.c`, `normalize_coeffs_8bpc`).
struct FixedPoint(Vec<(u32, Vec<u32>)>);

/// 32 bits less 8 of the byte and 2 for filters that overshoot.
const PRECISION: u32 = 22;

impl FixedPoint {
    /// Where the side keeps its length, each weight is 1 and a byte stays what it is.
    fn new(input: u32, side: Side) -> Self {
        let wanted = side.begin..side.begin + side.count;
        let resampling = Resampling::part(input as usize, side.pixels, wanted);
        let fixed = |weight: &f64| (0.5 + weight * f64::from(1 << PRECISION)) as u32;
        let taps = resampling.taps();
        Self(
            taps.map(|(first, weights)| (first as u32, weights.iter().map(fixed).collect()))
                .collect(),
        )
    }

    /// The first input that is taken, and the one after the last.
    fn inputs(&self) -> (u32, u32) {
        let ends = self
            .0
            .iter()
            .map(|(first, weights)| first + weights.len() as u32);
        let first = self.0.iter().map(|(first, _)| *first).min();
        (first.unwrap_or(0), ends.max().unwrap_or(0))
    }

    fn mix(&self, output: u32, pixel: impl Fn(u32) -> [u8; 3]) -> image::Rgb<u8> {
        let (first, weights) = &self.0[output as usize];
        let mut sums = [1u32 << (PRECISION - 1); 3];
        for (tap, &weight) in (*first..).zip(weights) {
            for (sum, byte) in sums.iter_mut().zip(pixel(tap)) {
                // Weights sum to 2²² but for a rounding of each, so it cannot pass 2³².
                *sum = sum.saturating_add(weight * u32::from(byte));
            }
        }
        image::Rgb(sums.map(|sum| (sum >> PRECISION).min(255) as u8))
    }
}

#[cfg(test)]
mod tests;
