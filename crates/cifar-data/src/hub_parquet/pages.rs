//! What the pages of a column say of themselves, read before the Parquet library allocates what they claim.
//!
//! As of parquet 60.1 it makes room for as many bytes, and as many entries of a dictionary, as a page's header says, and
//! some codecs unpack without end. Headers are structs in Thrift's compact protocol (parquet-format's `parquet.thrift`,
//! `PageHeader`).

use std::io::{BufReader, Read, Seek, SeekFrom};

use parquet::basic::Compression;
use parquet::errors::ParquetError;

/// Most bytes of a page, unpacked: writers end one after about 1 MB, or at the latest with the row group, and the
/// pictures of all of CIFAR-10 are 144 MB.
pub(super) const MAX_PAGE_BYTES: i64 = 256 << 20;

/// Most bytes of a page's header. Its largest part are statistics: the least and greatest value of the page.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// PLAIN, PLAIN_DICTIONARY, DELTA_BINARY_PACKED and RLE_DICTIONARY. The library's decoders of others make room for as many values as
/// their data claim.
const ENCODINGS: [i64; 4] = [0, 2, 5, 8];

/// Checks that no page of a column chunk, `bytes` long from byte `start` of `file`, takes more memory than a good one can.
/// Where the library may not read what a header says the same way, it is refused.
pub(super) fn check(
    file: impl Read + Seek,
    (start, bytes): (u64, u64),
    codec: Compression,
    rows: usize,
) -> Result<(), ParquetError> {
    // These fill what room a page claims, and no more.
    if !matches!(
        codec,
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)
    ) {
        let name_and_level = format!("{codec:?}");
        let name = name_and_level.split('(').next().unwrap_or_default();
        return Err(refused(format!(
            "it is compressed with {name}; UNCOMPRESSED, SNAPPY and ZSTD are read"
        )));
    }
    let mut file = BufReader::with_capacity(1 << 10, file);
    file.seek(SeekFrom::Start(start))?;
    let mut left = bytes;
    while left > 0 {
        let most = left.min(MAX_HEADER_BYTES);
        let mut limited = file.by_ref().take(most);
        let header = Header::read(&mut limited)?;
        left -= most - limited.limit();
        header.check(left, codec, rows)?;
        file.seek_relative(header.stored)?;
        left -= header.stored as u64; // `check` has compared them
    }
    Ok(())
}

/// The parts of a page's header that memory depends on.
#[derive(Debug, Default)]
struct Header {
    /// Bytes of the page, unpacked.
    unpacked: i64,
    /// Bytes of the page in the file.
    stored: i64,
    /// Of the values of a page of data.
    encoding: Option<i64>,
    /// Entries, where the page is a dictionary.
    entries: Option<i64>,
}

impl Header {
    fn read(from: &mut impl Read) -> Result<Self, ParquetError> {
        let mut header = Self::default();
        fields(from, &mut |id, field, from| {
            match (id, field) {
                (1 | 4, Field::I32(_)) => {}
                (2, Field::I32(bytes)) => header.unpacked = bytes,
                (3, Field::I32(bytes)) => header.stored = bytes,
                (5, Field::Struct) => header.encoding = integer(from, 2)?,
                (7, Field::Struct) => header.entries = integer(from, 1)?,
                (8, Field::Struct) => header.encoding = integer(from, 4)?,
                // An index, which has no fields yet.
                (6, Field::Struct) => skip(from)?,
                _ => return Err(refused(format!("field {id} of a page's header is odd"))),
            }
            Ok(())
        })?;
        Ok(header)
    }

    fn check(&self, left: u64, codec: Compression, rows: usize) -> Result<(), ParquetError> {
        let &Self {
            unpacked,
            stored,
            encoding,
            entries,
        } = self;
        if u64::try_from(stored).map_or(true, |stored| stored > left) {
            return Err(refused(format!(
                "a page is said to have {stored} bytes where {left} are left"
            )));
        }
        // Snappy's longest copy, of 64 bytes, takes three.
        let most = match codec {
            Compression::SNAPPY => (stored * 64 / 3).min(MAX_PAGE_BYTES),
            _ => MAX_PAGE_BYTES,
        };
        if !(0..=most).contains(&unpacked) {
            return Err(refused(format!(
                "a page of {stored} bytes is said to unpack to {unpacked}; at most {most} are possible"
            )));
        }
        if let Some(encoding) = encoding.filter(|encoding| !ENCODINGS.contains(encoding)) {
            return Err(refused(format!(
                "a page has encoding {encoding} of parquet-format; PLAIN (0), PLAIN_DICTIONARY (2), DELTA_BINARY_PACKED (5) \
                 and RLE_DICTIONARY (8) are read"
            )));
        }
        match entries.filter(|entries| !(0..=rows as i64).contains(entries)) {
            Some(entries) => Err(refused(format!(
                "a dictionary of {entries} entries for {rows} rows"
            ))),
            None => Ok(()),
        }
    }
}

/// A field's value, so far as it is read here.
enum Field {
    I32(i64),
    /// It is up to the caller to read it.
    Struct,
    Other,
}

/// Reads a struct, and calls `each` with every field and its number.
fn fields<R: Read>(
    from: &mut R,
    each: &mut dyn FnMut(i64, Field, &mut R) -> Result<(), ParquetError>,
) -> Result<(), ParquetError> {
    let mut id = 0;
    loop {
        let head = byte(from)?;
        let kind = head & 0x0F;
        if kind == 0 {
            return Ok(());
        }
        id = match head >> 4 {
            0 => zigzag(from)?,
            step => id + i64::from(step),
        };
        let field = match kind {
            // A boolean lies in its kind.
            1 | 2 => Field::Other,
            5 => Field::I32(zigzag(from)?),
            3 => byte(from).map(|_| Field::Other)?,
            4 | 6 => zigzag(from).map(|_| Field::Other)?,
            8 => {
                let bytes = varint(from)?;
                let passed = std::io::copy(&mut from.take(bytes), &mut std::io::sink())?;
                if passed < bytes {
                    return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                }
                Field::Other
            }
            12 => Field::Struct,
            _ => {
                return Err(refused(format!(
                    "a field of kind {kind} in a page's header"
                )));
            }
        };
        each(id, field, from)?;
    }
}

/// Field `wanted` of a struct, an integer; structs within it are statistics.
fn integer<R: Read>(from: &mut R, wanted: i64) -> Result<Option<i64>, ParquetError> {
    let mut found = None;
    fields(from, &mut |id, field, from| match field {
        Field::I32(value) if id == wanted => {
            found = Some(value);
            Ok(())
        }
        Field::Struct => skip(from),
        _ if id == wanted => Err(refused(format!("field {id} in a page's header is odd"))),
        _ => Ok(()),
    })?;
    Ok(found)
}

/// A struct without others in it.
fn skip<R: Read>(from: &mut R) -> Result<(), ParquetError> {
    fields(from, &mut |_, field, _| match field {
        Field::Struct => Err(refused("a page's header is nested too deeply".into())),
        _ => Ok(()),
    })
}

fn byte(from: &mut impl Read) -> Result<u8, ParquetError> {
    let mut byte = [0];
    from.read_exact(&mut byte)?;
    Ok(byte[0])
}

/// Seven bits a byte, the low ones first; those of 64 bits that the library reads too.
fn varint(from: &mut impl Read) -> Result<u64, ParquetError> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let byte = byte(from)?;
        value |= u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(refused("a number in a page's header is too long".into()))
}

fn zigzag(from: &mut impl Read) -> Result<i64, ParquetError> {
    let value = varint(from)?;
    Ok((value >> 1) as i64 ^ -((value & 1) as i64))
}

fn refused(problem: String) -> ParquetError {
    ParquetError::General(problem)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    /// A field of kind 5, an integer of 32 bits, right after the one before.
    fn integer_field(value: i64) -> Vec<u8> {
        let mut left = ((value << 1) ^ (value >> 63)) as u64;
        let mut bytes = vec![0x15];
        while left >= 0x80 {
            bytes.push(left as u8 | 0x80);
            left >>= 7;
        }
        bytes.push(left as u8);
        bytes
    }

    /// A page of `stored` bytes: its kind, what it is said to unpack to, and a struct in field 3 + `step`.
    fn page(kind: i64, unpacked: i64, stored: usize, step: u8, fields: &[i64]) -> Vec<u8> {
        let sizes = [kind, unpacked, stored as i64].map(integer_field).concat();
        let fields: Vec<u8> = fields.iter().flat_map(|&f| integer_field(f)).collect();
        [
            &sizes,
            &[step << 4 | 12][..],
            &fields,
            &[0, 0],
            &vec![7; stored],
        ]
        .concat()
    }

    /// Of values in this encoding.
    fn data(unpacked: i64, stored: usize, encoding: i64) -> Vec<u8> {
        page(0, unpacked, stored, 2, &[10, encoding, 3, 3])
    }

    fn dictionary(unpacked: i64, stored: usize, entries: i64) -> Vec<u8> {
        page(2, unpacked, stored, 4, &[entries, 0])
    }

    fn problem(pages: &[Vec<u8>], codec: Compression) -> Option<String> {
        let before = 5;
        let file = [vec![9; before], pages.concat()].concat();
        let chunk = (before as u64, (file.len() - before) as u64);
        check(Cursor::new(file), chunk, codec, 100)
            .err()
            .map(|error| error.to_string())
    }

    #[test]
    fn pages_as_large_as_good_ones_are_read() {
        for codec in [Compression::UNCOMPRESSED, Compression::SNAPPY] {
            let pages = [dictionary(640, 30, 100), data(5000, 3000, 8), data(0, 0, 0)];
            assert_eq!(problem(&pages, codec), None);
        }
        assert_eq!(
            problem(&[data(MAX_PAGE_BYTES, 4, 0)], Compression::UNCOMPRESSED),
            None
        );
    }

    #[test]
    fn what_claims_more_memory_than_a_good_page_takes_is_refused() {
        use Compression::{SNAPPY, UNCOMPRESSED};
        let good = || data(640, 30, 0);
        for (bad, codec, expected) in [
            (data(0x7FFF_FFFF, 10, 0), SNAPPY, "unpack to 2147483647"),
            (data(641, 30, 0), SNAPPY, "unpack to 641; at most 640"),
            (data(-1, 30, 0), SNAPPY, "unpack to -1"),
            (
                data(MAX_PAGE_BYTES + 1, 30, 0),
                UNCOMPRESSED,
                "at most 268435456",
            ),
            (
                dictionary(640, 30, 101),
                UNCOMPRESSED,
                "101 entries for 100 rows",
            ),
            (dictionary(640, 30, -1), UNCOMPRESSED, "-1 entries"),
            // DELTA_LENGTH_BYTE_ARRAY
            (data(640, 30, 6), UNCOMPRESSED, "encoding 6"),
            // The same in a page of the second version.
            (
                page(3, 640, 30, 5, &[9, 0, 9, 6]),
                UNCOMPRESSED,
                "encoding 6",
            ),
        ] {
            let text = problem(&[good(), bad], codec).expect("an error");
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn a_header_that_could_be_read_in_two_ways_is_refused() {
        let sizes = |second: &[u8]| [&integer_field(0), second, &integer_field(4)].concat();
        // The size as a number of 64 bits, as text, and as a list.
        for second in [&[0x16, 8][..], &[0x18, 1, 8], &[0x19, 0x05]] {
            let text = problem(&[sizes(second)], Compression::SNAPPY).expect("an error");
            assert!(text.contains("page's header"), "{text}");
        }
        let long = [&[0x15][..], &[0x80; 9], &[0]].concat();
        let text = problem(&[sizes(&long)], Compression::SNAPPY).expect("an error");
        assert!(text.contains("too long"), "{text}");
        for cut in [1, 3, 6, 11] {
            let cut = data(640, 30, 0)[..cut].to_vec();
            assert!(problem(&[cut], Compression::SNAPPY).is_some());
        }
    }
}
