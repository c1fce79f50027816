//! What is known of a file before it is fetched.

use std::borrow::Cow;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::Mismatch;

/// Text that is a literal where it can be.
pub type Text = Cow<'static, str>;

/// What decides whether a file is the right one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pin {
    /// Its SHA-256 and what is known of its size.
    Sha256 {
        /// Its size.
        size: Size,
        /// In hexadecimal.
        sha256: Text,
    },
    /// Its size and the SHA-1 that git gives it, which is all the Hub states of small files.
    ///
    /// Nobody should rely on SHA-1 against a forger. It is what the server says of itself, and so protects against
    /// damage on the way, not against the server.
    GitBlob {
        /// Its size in bytes.
        bytes: u64,
        /// SHA-1 of `blob <bytes>\0` and the content, in hexadecimal.
        sha1: Text,
    },
}

/// What is known of a file's size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// All.
    Exactly(u64),
    /// A bound, so that no server fills the disk.
    AtMost(u64),
}

impl Pin {
    /// A file of which all is known.
    pub const fn sha256(bytes: u64, sha256: Text) -> Pin {
        Pin::Sha256 {
            size: Size::Exactly(bytes),
            sha256,
        }
    }

    /// How many hexadecimal digits its hash has.
    pub(crate) fn digits(&self) -> usize {
        match self {
            Pin::Sha256 { .. } => 64,
            Pin::GitBlob { .. } => 40,
        }
    }

    /// The size, if it is known.
    pub fn exact_bytes(&self) -> Option<u64> {
        match *self {
            Pin::Sha256 {
                size: Size::Exactly(bytes),
                ..
            }
            | Pin::GitBlob { bytes, .. } => Some(bytes),
            Pin::Sha256 { .. } => None,
        }
    }

    /// The size, or the most it may be.
    pub fn most_bytes(&self) -> u64 {
        match *self {
            Pin::Sha256 {
                size: Size::Exactly(bytes) | Size::AtMost(bytes),
                ..
            }
            | Pin::GitBlob { bytes, .. } => bytes,
        }
    }

    /// The hash in hexadecimal.
    pub fn hash(&self) -> &str {
        match self {
            Pin::Sha256 { sha256, .. } => sha256,
            Pin::GitBlob { sha1, .. } => sha1,
        }
    }
}

/// Compares bytes with a [`Pin`] as they come.
#[derive(Debug, Clone)]
pub struct Verifier {
    pin: Pin,
    hasher: Hasher,
    len: u64,
}

#[derive(Debug, Clone)]
enum Hasher {
    Sha256(Sha256),
    GitBlob(Sha1),
}

impl Verifier {
    /// Before the first byte.
    pub fn new(pin: &Pin) -> Verifier {
        let hasher = match pin {
            Pin::Sha256 { .. } => Hasher::Sha256(Sha256::new()),
            Pin::GitBlob { bytes, .. } => {
                Hasher::GitBlob(Sha1::new_with_prefix(format!("blob {bytes}\0")))
            }
        };
        Verifier {
            pin: pin.clone(),
            hasher,
            len: 0,
        }
    }

    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.hasher {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::GitBlob(hasher) => hasher.update(bytes),
        }
        self.len += bytes.len() as u64;
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Whether that was the file.
    ///
    /// # Errors
    /// The difference.
    pub fn verify(self) -> Result<(), Mismatch> {
        let found = self.len;
        if let Some(expected) = self.pin.exact_bytes().filter(|&bytes| bytes != found) {
            return Err(Mismatch::Size { found, expected });
        }
        let expected = self.pin.hash().to_owned();
        let (found, is_git) = match self.hasher {
            Hasher::Sha256(hasher) => (hexadecimal(&hasher.finalize()), false),
            Hasher::GitBlob(hasher) => (hexadecimal(&hasher.finalize()), true),
        };
        match found.eq_ignore_ascii_case(&expected) {
            true => Ok(()),
            false if is_git => Err(Mismatch::GitBlob { found, expected }),
            false => Err(Mismatch::Sha256 { found, expected }),
        }
    }
}

fn hexadecimal(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_git_blob_has_the_hash_that_git_gives_it() {
        // `printf 'hello\n' | git hash-object --stdin`
        let pin = Pin::GitBlob {
            bytes: 6,
            sha1: "ce013625030ba8dba906f756967f9e9ca394464a".into(),
        };
        let verify = |content: &[u8]| {
            let mut verifier = Verifier::new(&pin);
            verifier.update(&content[..2]);
            verifier.update(&content[2..]);
            verifier.verify()
        };
        assert_eq!(verify(b"hello\n"), Ok(()));
        assert!(matches!(
            verify(b"hallo\n"),
            Err(Mismatch::GitBlob { found, .. }) if found.len() == 40
        ));
        let (found, expected) = (5, 6);
        assert_eq!(verify(b"hello"), Err(Mismatch::Size { found, expected }));
    }

    #[test]
    fn a_bound_on_the_size_leaves_the_decision_to_the_hash() {
        let pin = Pin::Sha256 {
            size: Size::AtMost(100),
            sha256: "2CF24DBA5FB0A30E26E83B2AC5B9E29E1B161E5C1FA7425E73043362938B9824".into(),
        };
        let mut verifier = Verifier::new(&pin);
        verifier.update(b"hello");
        assert_eq!(verifier.clone().verify(), Ok(()));
        verifier.update(b"!");
        assert!(matches!(verifier.verify(), Err(Mismatch::Sha256 { .. })));
        assert_eq!((pin.exact_bytes(), pin.most_bytes()), (None, 100));
    }
}
