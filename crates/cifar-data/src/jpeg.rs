//! JPEG as Pillow and torchvision read it.

use image::error::{DecodingError, ImageFormatHint};
use image::{ImageError, ImageFormat, ImageResult, RgbImage};
use libjpeg_turbo_rs::{DecodeLimits, Decoder, PixelFormat};

use crate::guard;

/// Decodes a JPEG to the bytes that libjpeg-turbo makes of it, which Pillow and torchvision use; other decoders are several
/// steps of 255 away. Grey becomes three equal channels. None for pictures of four colours, those of printing, which
/// libjpeg-turbo leaves as they are.
///
/// # Errors
/// [`ImageError::Decoding`] for what is damaged, cut off, of another precision than 8 bits, of two colours, or would take
/// more than `max_memory` bytes.
pub fn decode(file: &[u8], max_memory: u64) -> ImageResult<Option<RgbImage>> {
    guarded(ImageFormat::Jpeg, || decode_unguarded(file, max_memory))
}

/// Calls a decoder of pictures, which panics on some files (as of 0.5.15 zune-jpeg, which `image` uses, on odd sampling factors
/// and on four colours), and makes that an error. Nothing is printed of it.
///
/// # Errors
/// Those of `call`; [`ImageError::Decoding`] where it panics.
pub fn guarded<V>(format: ImageFormat, call: impl FnOnce() -> ImageResult<V>) -> ImageResult<V> {
    guard::guarded(call, |panic| failed(format, panic))
}

fn decode_unguarded(file: &[u8], max_memory: u64) -> ImageResult<Option<RgbImage>> {
    let limits = DecodeLimits {
        max_memory: Some(max_memory),
        ..DecodeLimits::default()
    };
    let mut decoder = Decoder::new_with_limits(file, limits).map_err(failed_jpeg)?;
    let header = decoder.header();
    // Of another precision the decoder makes samples of 16 bits, or panics, as of libjpeg-turbo-rs 0.8.0.
    if header.precision != 8 {
        let problem = format!("{} bits a sample; 8 are read", header.precision);
        return Err(failed_jpeg(problem));
    }
    match header.components.len() {
        1 | 3 => {}
        4 => return Ok(None),
        colours => return Err(failed_jpeg(format!("{colours} colours; 1 or 3 are read"))),
    }
    decoder.set_output_format(PixelFormat::Rgb);
    let image = decoder.decode_image().map_err(failed_jpeg)?;
    let sides = u32::try_from(image.width)
        .ok()
        .zip(u32::try_from(image.height).ok());
    let picture = sides.and_then(|(width, height)| RgbImage::from_raw(width, height, image.data));
    picture
        .ok_or_else(|| failed_jpeg("the decoder gave too few pixels"))
        .map(Some)
}

fn failed_jpeg(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ImageError {
    failed(ImageFormat::Jpeg, error)
}

fn failed(
    format: ImageFormat,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> ImageError {
    ImageError::Decoding(DecodingError::new(ImageFormatHint::Exact(format), error))
}
