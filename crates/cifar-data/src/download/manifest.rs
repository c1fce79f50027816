//! What is fetched: every file with its size and SHA-256, as data.

use std::borrow::Cow;
use std::fmt;

use verified_download::{Pin, Text};

/// A file whose content is known before it is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinnedFile {
    /// Where it lies below the data folder (or inside its archive), with `/` between the parts.
    pub path: Text,
    /// Its exact size in bytes.
    pub bytes: u64,
    /// Its SHA-256 in lower-case hexadecimal.
    pub sha256: Text,
}

impl PinnedFile {
    /// What its content must be.
    pub(super) fn pin(&self) -> Pin {
        Pin::sha256(self.bytes, self.sha256.clone())
    }
}

/// A list of files and where they come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// Files of one revision of a data set on the Hugging Face Hub.
    Hub(HubManifest),
    /// One archive that is unpacked into files.
    Archive(ArchiveManifest),
}

/// Files of one revision of a data set on the Hugging Face Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubManifest {
    /// `owner/name` of the data set.
    pub repository: Text,
    /// The full commit hash: a branch could change under us.
    pub revision: Text,
    /// Paths are those in the repository, kept as they are below the data folder.
    pub files: Cow<'static, [PinnedFile]>,
}

/// A `.tar.gz` of one folder of regular files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveManifest {
    /// Where the archive is.
    pub url: Text,
    /// The archive itself; it is kept beside the unpacked folder.
    pub archive: PinnedFile,
    /// The one folder in the archive, which becomes a folder of the same name.
    pub folder: Text,
    /// The files wanted from it; their paths are below `folder`.
    pub members: Cow<'static, [PinnedFile]>,
    /// Names that may be in the archive too and are not unpacked. Anything else is refused.
    pub unneeded: Cow<'static, [Text]>,
}

/// Who publishes CIFAR-10.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// `uoft-cs/cifar10` on the Hugging Face Hub: two parquet files of PNG images, 144 MB.
    #[default]
    Hub,
    /// The authors' own server in Toronto: one archive of binary files, 170 MB, often slow.
    Toronto,
}

impl Source {
    /// The pinned files of this source.
    pub fn manifest(self) -> Manifest {
        match self {
            Source::Hub => Manifest::Hub(CIFAR10_HUB),
            Source::Toronto => Manifest::Archive(CIFAR10_TORONTO),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Hub => "the Hugging Face Hub",
            Source::Toronto => "the University of Toronto",
        })
    }
}

/// CIFAR-10 as the Hub publishes it.
pub const CIFAR10_HUB: HubManifest = HubManifest {
    repository: Cow::Borrowed("uoft-cs/cifar10"),
    revision: Cow::Borrowed("0b2714987fa478483af9968de7c934580d0bb9a2"),
    files: Cow::Borrowed(&[
        pinned(
            "plain_text/train-00000-of-00001.parquet",
            119_705_255,
            "8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883",
        ),
        pinned(
            "plain_text/test-00000-of-00001.parquet",
            23_940_850,
            "841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de",
        ),
    ]),
};

/// CIFAR-10 as its authors publish it, in the version "suitable for C programs".
pub const CIFAR10_TORONTO: ArchiveManifest = ArchiveManifest {
    url: Cow::Borrowed("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),
    archive: pinned(
        "cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    folder: Cow::Borrowed("cifar-10-batches-bin"),
    members: Cow::Borrowed(&[
        binary_batch(
            "data_batch_1.bin",
            "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        ),
        binary_batch(
            "data_batch_2.bin",
            "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        ),
        binary_batch(
            "data_batch_3.bin",
            "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        ),
        binary_batch(
            "data_batch_4.bin",
            "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        ),
        binary_batch(
            "data_batch_5.bin",
            "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        ),
        binary_batch(
            "test_batch.bin",
            "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        ),
    ]),
    unneeded: Cow::Borrowed(&[
        Cow::Borrowed("batches.meta.txt"),
        Cow::Borrowed("readme.html"),
    ]),
};

const fn pinned(path: &'static str, bytes: u64, sha256: &'static str) -> PinnedFile {
    PinnedFile {
        path: Cow::Borrowed(path),
        bytes,
        sha256: Cow::Borrowed(sha256),
    }
}

const fn binary_batch(name: &'static str, sha256: &'static str) -> PinnedFile {
    pinned(name, 10_000 * (1 + 3 * 32 * 32), sha256)
}
