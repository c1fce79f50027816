//! JPEG as Pillow and torchvision read it.

use image::error::{DecodingError, ImageFormatHint};
use image::{ImageError, ImageFormat, ImageResult, RgbImage};
use libjpeg_turbo_rs::{ColorSpace, DecodeLimits, Decoder, PixelFormat};

/// Decodes a JPEG to the bytes that libjpeg-turbo makes of it, which Pillow and torchvision use; other decoders are several
/// steps of 255 away. Grey becomes three equal channels. None for the colour spaces of printing, which libjpeg-turbo leaves as
/// they are.
///
/// # Errors
/// [`ImageError::Decoding`] for what is damaged, cut off, or would take more than `max_memory` bytes.
pub fn decode(file: &[u8], max_memory: u64) -> ImageResult<Option<RgbImage>> {
    let limits = DecodeLimits {
        max_memory: Some(max_memory),
        ..DecodeLimits::default()
    };
    let mut decoder = Decoder::new_with_limits(file, limits).map_err(failed)?;
    let space = decoder.jpeg_color_space();
    if matches!(space, ColorSpace::Cmyk | ColorSpace::Ycck) {
        return Ok(None);
    }
    decoder.set_output_format(PixelFormat::Rgb);
    let image = decoder.decode_image().map_err(failed)?;
    let sides = u32::try_from(image.width)
        .ok()
        .zip(u32::try_from(image.height).ok());
    let picture = sides.and_then(|(width, height)| RgbImage::from_raw(width, height, image.data));
    picture
        .ok_or_else(|| failed("the decoder gave too few pixels"))
        .map(Some)
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ImageError {
    let format = ImageFormatHint::Exact(ImageFormat::Jpeg);
    ImageError::Decoding(DecodingError::new(format, error))
}
