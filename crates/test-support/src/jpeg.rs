//! JPEG files that few programs write.

/// `jpeg`, a baseline file, as one of 32×32 pixels with this precision and a component for each of the sampling factors (0x21: two
/// across, one down). The data of its one scan are left as they are, and are those of the first component alone.
///
/// # Panics
/// Where `jpeg` is no such file.
pub fn odd_jpeg(jpeg: &[u8], precision: u8, sampling: &[u8]) -> Vec<u8> {
    let mut odd = jpeg[..2].to_vec();
    let mut rest = &jpeg[2..];
    let count = sampling.len() as u8;
    let segment = |marker: u8, body: &[u8]| {
        let length = (body.len() as u16 + 2).to_be_bytes();
        [&[0xFF, marker], &length[..], body].concat()
    };
    loop {
        let marker = rest[1];
        let end = 2 + usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        let body = &rest[4..end];
        rest = &rest[end..];
        match marker {
            // SOF0: precision, height, width, and of each component number, sampling and quantisation.
            0xC0 => {
                let components = (1..=count).zip(sampling);
                let components = components.flat_map(|(id, &factors)| [id, factors, 0]);
                let head = [precision, 0, 32, 0, 32, count];
                let body: Vec<u8> = head.into_iter().chain(components).collect();
                odd.extend(segment(marker, &body));
            }
            // SOS: how many components, and of each number and tables; then the band and the bits, which are all.
            0xDA => {
                odd.extend(segment(marker, &[1, 1, 0, 0, 63, 0]));
                odd.extend(rest);
                return odd;
            }
            _ => odd.extend(segment(marker, body)),
        }
    }
}
