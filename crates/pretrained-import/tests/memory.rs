//! What hostile files make the readers allocate. One test, since it counts for the whole process.

use std::path::Path;

use peak_alloc::PeakAlloc;
use pretrained_import::StateDict;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

fn legacy(object: &[u8]) -> Vec<u8> {
    let start = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.\x80\x02";
    [start, object].concat()
}

/// Bytes allocated at the worst moment, while the file is read.
fn peak(file: &[u8]) -> usize {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = StateDict::from_bytes(file, Path::new("x"));
    let peak = ALLOCATOR.peak_usage() - before;
    assert!(result.is_err());
    peak
}

/// A legacy file of one int8 storage of `len` elements and this many tensors that are all of it.
fn int8(len: u32, views: u8) -> Vec<u8> {
    let count = len.to_le_bytes();
    let mut object = b"}".to_vec();
    for name in (b'a'..).take(views.into()) {
        object.extend([b'X', 1, 0, 0, 0, name]);
        object.extend(
            b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nCharStorage\n",
        );
        object.extend(b"X\x01\0\0\x000X\x03\0\0\0cpuJ");
        object.extend(count);
        object.extend(b"NtQK\0J");
        object.extend(count);
        object.extend(b"\x85K\x01\x85\x89}tRs");
    }
    object.extend(b".\x80\x02]X\x01\0\0\x000a.");
    object.extend(u64::from(len).to_le_bytes());
    object.resize(object.len() + len as usize, 0x80);
    legacy(&object)
}

#[test]
fn a_hostile_file_makes_no_reader_allocate_more_than_a_multiple_of_its_bytes() {
    let tensor: &[u8] =
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((X\x07\0\0\0storagectorch\nFloatStorage\n\
                          X\x01\0\0\x000X\x03\0\0\0cpuK\x01NtQK\0";
    let shape = [b"(", &b"K\x01".repeat(64)[..], b"t"].concat();
    let shaped = [tensor, &shape, &shape, b"\x89}tq\x00R0"].concat();
    let pickles: [(&str, Vec<u8>, &[u8]); 11] = [
        ("empty lists", vec![], b"]"),
        ("empty lists, dropped", vec![], b"]0"),
        ("lists of one", vec![], b"]Na0"),
        ("tuples of one", vec![], b"N\x850"),
        ("values", vec![], b"N"),
        ("marks", vec![], b"("),
        ("memo", b"N".to_vec(), b"\x94"),
        ("sets", vec![], b"\x8f"),
        ("sets of one", vec![], b"\x8f(N\x900"),
        ("texts", vec![], b"\x8c\x01a"),
        ("tensors of 64 dimensions", shaped, b"h\x01h\x00R0"),
    ];
    for (what, start, repeated) in pickles {
        for len in [100_000, 4_000_000] {
            let mut object = start.clone();
            object.extend(repeated.repeat(len / repeated.len()));
            let file = legacy(&object);
            let (peak, len) = (peak(&file), file.len());
            println!(
                "{what}: {peak} bytes for a file of {len}, {} each",
                peak / len
            );
            assert!(peak < 128 * len, "{what}: {peak} bytes for {len}");
        }
    }

    // One key of 400 bytes again and again, beside a tensor whose storage does not come.
    let key = [b"X\x90\x01\0\0", "😀".repeat(100).as_bytes(), b"q\x02N"].concat();
    let mut object = [b"}(", &key[..]].concat();
    object.extend(b"h\x02N".repeat(500_000));
    object.extend(b"X\x01\0\0\0w");
    object.extend(tensor);
    object.extend(b"K\x01\x85K\x01\x85\x89}tRu.");
    let file = legacy(&object);
    let (peak_of_keys, len) = (peak(&file), file.len());
    println!("keys: {peak_of_keys} bytes for a file of {len}");
    assert!(peak_of_keys < 64 * len, "{peak_of_keys} bytes for {len}");

    // Integers that become i64: one tensor of them is read, and three that share a storage are too many.
    let file = int8(1 << 20, 3);
    let (peak_of_views, len) = (peak(&file), file.len());
    println!("int8: {peak_of_views} bytes for a file of {len}");
    assert!(peak_of_views < 10 * len, "{peak_of_views} bytes for {len}");
    let state = StateDict::from_bytes(&int8(1 << 10, 1), Path::new("x")).unwrap();
    assert_eq!(
        state.tensors["a"].to_vec1::<i64>().unwrap(),
        [-128; 1 << 10]
    );

    // Lengths that nothing backs.
    for object in [
        &b"X\xff\xff\x3f\x00abc"[..],
        b"\x8d\xff\xff\x3f\0\0\0\0\0abc",
        b"B\xff\xff\x3f\x00abc",
        b"\x8b\xff\xff\x3f\x00abc",
    ] {
        assert!(peak(&legacy(object)) < 10_000, "{object:?}");
    }
    let safetensors = b"\xff\xff\xff\x05\0\0\0\0{}";
    assert!(peak(safetensors) < 10_000);
    let zip64 = [b"PK\x03\x04", &[0xff; 60][..], b"PK\x05\x06", &[0xff; 18]].concat();
    assert!(peak(&zip64) < 1 << 20);
}
