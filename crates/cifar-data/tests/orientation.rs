//! One asymmetric picture comes out the same from every source.

mod pictures;

use std::path::Path;

use candle_core::{DType, Device, IndexOp, Tensor};
use cifar_data::{ImageSet, binary};
use image::RgbImage;
use pictures::{asymmetric, png, set_of, write_hub_parquet};

/// Three pictures, all different, the first asymmetric.
fn three() -> [RgbImage; 3] {
    let first = asymmetric();
    let mut second = image::imageops::rotate90(&first);
    second.put_pixel(3, 4, image::Rgb([99, 98, 97]));
    let third = image::imageops::flip_horizontal(&second);
    [first, second, third]
}

fn write_binary(dir: &Path, train: &ImageSet, test: &ImageSet) {
    std::fs::create_dir_all(dir).unwrap();
    // Files of different sizes: the first takes what the others leave.
    let rest = train.len() - 4;
    let first: Vec<usize> = (0..rest).collect();
    std::fs::write(
        dir.join("data_batch_1.bin"),
        binary::encode(&train.select(&first)),
    )
    .unwrap();
    for i in 1..5 {
        let file = dir.join(binary::TRAIN_FILES[i]);
        std::fs::write(file, binary::encode(&train.select(&[rest + i - 1]))).unwrap();
    }
    std::fs::write(dir.join("test_batch.bin"), binary::encode(test)).unwrap();
}

fn parquet_rows(pictures: &[RgbImage], labels: &[u8]) -> Vec<(Option<Vec<u8>>, Option<i64>)> {
    pictures
        .iter()
        .zip(labels)
        .map(|(picture, &label)| (Some(png(picture)), Some(i64::from(label))))
        .collect()
}

#[test]
fn the_same_pictures_come_out_of_all_layouts() {
    let [a, b, c] = three();
    let train_pictures = [&a, &b, &c, &b, &a, &a, &c].map(Clone::clone);
    let test_pictures = [c.clone(), a.clone()];
    let (train, test) = (set_of(&train_pictures), set_of(&test_pictures));
    let train_rows = parquet_rows(&train_pictures, train.labels());
    let test_rows = parquet_rows(&test_pictures, test.labels());

    let root = tempfile::tempdir().unwrap();
    let [one, two, three] = ["binary", "sharded", "converted"].map(|name| root.path().join(name));
    write_binary(&one.join("cifar-10-batches-bin"), &train, &test);
    let plain_text = two.join("plain_text");
    write_hub_parquet(
        &plain_text.join("train-00000-of-00001.parquet"),
        &train_rows,
        3,
    );
    write_hub_parquet(
        &plain_text.join("test-00000-of-00001.parquet"),
        &test_rows,
        100,
    );
    let plain_text = three.join("plain_text");
    write_hub_parquet(&plain_text.join("train/0000.parquet"), &train_rows, 100);
    write_hub_parquet(&plain_text.join("test/0000.parquet"), &test_rows, 1);

    for (dir, inner, source) in [
        (&one, "cifar-10-batches-bin", "CIFAR-10, binary files"),
        (&two, "plain_text", "CIFAR-10, Parquet files"),
        (&three, "plain_text", "CIFAR-10, Parquet files"),
    ] {
        for dir in [dir.clone(), dir.join(inner)] {
            let loaded = cifar_data::load(&dir).unwrap();
            assert_eq!(loaded.train, train, "{}", dir.display());
            assert_eq!(loaded.test, test, "{}", dir.display());
            assert!(loaded.source.starts_with(source), "{}", loaded.source);
        }
    }
}

#[test]
fn the_first_byte_is_red_of_the_top_left_pixel_and_rows_run_to_the_right() {
    let picture = asymmetric();
    let file = tempfile::tempdir().unwrap().keep().join("x.parquet");
    write_hub_parquet(&file, &parquet_rows(&[picture], &[0]), 1);
    let set = cifar_data::hub_parquet::read_file(&file).unwrap().set;
    std::fs::remove_dir_all(file.parent().unwrap()).unwrap();

    let image = set.image(0);
    let pixel = |x: usize, y: usize| [0, 1, 2].map(|c| image[c * 1024 + y * 32 + x]);
    assert_eq!(pixel(0, 0), [1, 2, 3], "top left");
    assert_eq!(pixel(31, 0), [4, 5, 6], "top right");
    assert_eq!(pixel(0, 31), [7, 8, 9], "bottom left");
    assert_eq!(pixel(31, 31), [10, 11, 12], "bottom right");
    assert_eq!(pixel(20, 2), [30, 180, 40], "upper right quadrant");
    assert_eq!(pixel(2, 20), [50, 60, 220], "lower left quadrant");
    assert_eq!(pixel(22, 6), [255; 3], "end of the F's upper bar");
    assert_eq!(
        pixel(6, 22),
        [50, 60, 220],
        "where a transposed F would have it"
    );
    assert_eq!(
        &image[..2],
        [1, 200],
        "red of the first two pixels of the first row"
    );
    assert_eq!(
        (image[1024], image[2048]),
        (2, 3),
        "green and blue planes follow"
    );
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// As `candle-datasets` has them: `f32` images in 0 to 1, (N, 3, 32, 32), and `u8` labels, (N,).
fn as_candle(set: &ImageSet) -> (Tensor, Tensor) {
    let pixels: Vec<u8> = (0..set.len()).flat_map(|i| set.image(i).to_vec()).collect();
    let images = Tensor::from_vec(pixels, (set.len(), 3, 32, 32), &Device::Cpu).unwrap();
    let images = (images.to_dtype(DType::F32).unwrap() / 255.).unwrap();
    (images, Tensor::new(set.labels(), &Device::Cpu).unwrap())
}

/// `load_dir` reads files of exactly 10,000 records, so sparse files are filled up with zeros.
#[test]
fn candle_datasets_load_dir_reads_the_same_from_binary_files() {
    const RECORDS: usize = 10_000;
    let set = set_of(&three());
    let dir = tempfile::tempdir().unwrap();
    for name in binary::TRAIN_FILES.iter().chain([&binary::TEST_FILE]) {
        let path = dir.path().join(name);
        std::fs::write(&path, binary::encode(&set)).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len((RECORDS * binary::RECORD_BYTES) as u64)
            .unwrap();
    }
    let theirs = candle_datasets::vision::cifar::load_dir(dir.path()).unwrap();
    let ours = cifar_data::load(dir.path()).unwrap();
    assert_eq!(theirs.train_images.dims(), [5 * RECORDS, 3, 32, 32]);
    assert_eq!((ours.train.len(), ours.test.len()), (5 * RECORDS, RECORDS));

    // Three pictures at the start of each training file, and all of the test set.
    let picked: Vec<usize> = (0..5)
        .flat_map(|f| [0, 1, 2].map(|i| f * RECORDS + i))
        .collect();
    let (images, labels) = as_candle(&ours.train.select(&picked));
    for (i, &index) in picked.iter().enumerate() {
        let (a, b) = (theirs.train_images.i(index), images.i(i));
        assert_eq!(bits(&a.unwrap()), bits(&b.unwrap()), "picture {index}");
        let (a, b) = (theirs.train_labels.i(index), labels.i(i));
        let [a, b] = [a, b].map(|label| label.unwrap().to_scalar::<u8>().unwrap());
        assert_eq!(a, b, "label {index}");
    }
    let (images, labels) = as_candle(&ours.test);
    assert_eq!(bits(&theirs.test_images), bits(&images));
    let [theirs, ours] = [theirs.test_labels, labels].map(|labels| labels.to_vec1::<u8>().unwrap());
    assert_eq!(theirs, ours);
}
