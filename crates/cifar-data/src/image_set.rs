//! Pictures and labels in memory.

use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use crate::{CLASSES, DataError, IMAGE_BYTES};

/// Pictures (`u8`, CHW, 3 × 32 × 32) with their labels (0 to 9).
#[derive(Clone)]
pub struct ImageSet {
    pixels: Vec<u8>,
    labels: Vec<u8>,
    /// Once somebody has asked for it: it takes a fifth of a second for CIFAR-10.
    fingerprint: OnceLock<String>,
}

impl PartialEq for ImageSet {
    fn eq(&self, other: &Self) -> bool {
        (&self.labels, &self.pixels) == (&other.labels, &other.pixels)
    }
}

impl Eq for ImageSet {}

impl ImageSet {
    /// The set of `labels.len()` pictures whose pixels follow one another in `pixels`.
    ///
    /// # Errors
    /// [`DataError::SetSize`] unless `pixels` has [`IMAGE_BYTES`] for each label;
    /// [`DataError::SetLabel`] for a label above 9.
    pub fn new(pixels: Vec<u8>, labels: Vec<u8>) -> Result<Self, DataError> {
        if labels.len().checked_mul(IMAGE_BYTES) != Some(pixels.len()) {
            return Err(DataError::SetSize {
                labels: labels.len(),
                pixels: pixels.len(),
            });
        }
        match labels
            .iter()
            .position(|&label| usize::from(label) >= CLASSES)
        {
            Some(index) => Err(DataError::SetLabel {
                index,
                found: labels[index],
            }),
            None => Ok(Self::of(pixels, labels)),
        }
    }

    fn of(pixels: Vec<u8>, labels: Vec<u8>) -> Self {
        Self {
            pixels,
            labels,
            fingerprint: OnceLock::new(),
        }
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no picture.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Picture `index`: [`IMAGE_BYTES`] bytes, CHW.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len), as indexing a slice does.
    pub fn image(&self, index: usize) -> &[u8] {
        &self.pixels[index * IMAGE_BYTES..][..IMAGE_BYTES]
    }

    /// Label of picture `index`.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len), as indexing a slice does.
    pub fn label(&self, index: usize) -> u8 {
        self.labels[index]
    }

    /// All labels.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    /// All pixels: [`len`](Self::len) × [`IMAGE_BYTES`] bytes, (N, C, H, W).
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The pictures at `indices`, in that order.
    ///
    /// # Panics
    /// If an index is not below [`len`](Self::len), as indexing a slice does.
    pub fn select(&self, indices: &[usize]) -> Self {
        let mut pixels = Vec::with_capacity(indices.len() * IMAGE_BYTES);
        for &index in indices {
            pixels.extend_from_slice(self.image(index));
        }
        let labels = indices.iter().map(|&index| self.label(index)).collect();
        Self::of(pixels, labels)
    }

    /// The first `n` pictures, or all if there are fewer.
    pub fn take_first(&self, n: usize) -> Self {
        let n = n.min(self.len());
        let pixels = self.pixels[..n * IMAGE_BYTES].to_vec();
        Self::of(pixels, self.labels[..n].to_vec())
    }

    /// How many pictures each class has.
    pub fn class_counts(&self) -> [usize; CLASSES] {
        let mut counts = [0; CLASSES];
        for &label in &self.labels {
            counts[usize::from(label)] += 1;
        }
        counts
    }

    /// SHA-256, in hexadecimal, of the number of pictures (u64, little-endian), the labels and the
    /// pixels: two sets have the same fingerprint if and only if they are equal, order included.
    /// A resumed run compares it, so as not to go on with other pictures. Computed once.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.get_or_init(|| self.hash()).clone()
    }

    fn hash(&self) -> String {
        let mut hash = Sha256::new();
        hash.update((self.len() as u64).to_le_bytes());
        hash.update(&self.labels);
        hash.update(&self.pixels);
        hash.finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Adds the pictures of `other` behind these.
    pub(crate) fn append(&mut self, other: Self) {
        self.pixels.extend_from_slice(&other.pixels);
        self.labels.extend_from_slice(&other.labels);
        self.fingerprint = OnceLock::new();
    }
}

impl std::fmt::Debug for ImageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageSet")
            .field("len", &self.len())
            .field("class_counts", &self.class_counts())
            .finish_non_exhaustive()
    }
}

/// A training set and a test set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainTest {
    /// Pictures to train on.
    pub train: ImageSet,
    /// Pictures to test on.
    pub test: ImageSet,
    /// Where they come from, for people: "CIFAR-10, binary files in data/cifar-10-batches-bin".
    pub source: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shapes::{self, Split};

    #[test]
    fn pixels_that_do_not_fit_the_labels_are_an_error() {
        let error = ImageSet::new(vec![0; IMAGE_BYTES - 1], vec![0]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "1 labels need 3072 bytes of pixels, found 3071"
        );
    }

    #[test]
    fn a_label_above_nine_is_an_error_that_names_the_picture() {
        let error = ImageSet::new(vec![0; 2 * IMAGE_BYTES], vec![9, 10]).unwrap_err();
        assert_eq!(error.to_string(), "label 10 at index 1, expected 0 to 9");
    }

    #[test]
    fn selecting_keeps_each_picture_with_its_label() {
        let set = shapes::generate(1, Split::Train, 10);
        let chosen = set.select(&[7, 0, 7]);
        assert_eq!(chosen.labels(), [set.label(7), set.label(0), set.label(7)]);
        assert_eq!(chosen.image(0), set.image(7));
        assert_eq!(chosen.image(1), set.image(0));
        assert_eq!(chosen.image(2), set.image(7));
        assert_eq!(set.take_first(3), set.select(&[0, 1, 2]));
        assert_eq!(set.take_first(99), set);
    }

    #[test]
    fn the_fingerprint_sees_a_pixel_a_label_and_the_order() {
        let set = shapes::generate(1, Split::Train, 3);
        let mut pixels = set.pixels().to_vec();
        pixels[5000] ^= 1;
        let other_pixel = ImageSet::new(pixels, set.labels().to_vec()).unwrap();
        let other_label = ImageSet::new(set.pixels().to_vec(), vec![0, 1, 3]).unwrap();
        let other_order = set.select(&[1, 0, 2]);

        let prints = [&set, &other_pixel, &other_label, &other_order].map(ImageSet::fingerprint);
        assert_eq!(prints[0].len(), 64);
        for (i, print) in prints.iter().enumerate() {
            assert!(!prints[..i].contains(print), "{i} repeats: {print}");
        }
        assert_eq!(prints[0], set.clone().fingerprint());
        // It is kept, which makes no other set of it, and not longer than it is true.
        assert_eq!(set, set.select(&[0, 1, 2]));
        let mut longer = set.clone();
        longer.append(other_label);
        assert_ne!(prints[0], longer.fingerprint());
    }
}
