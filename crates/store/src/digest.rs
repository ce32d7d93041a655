//! BLAKE3 digests, as `b3sum` prints them.

use crate::sparse::next_data;
use crate::unit::{ByteSize, index, length};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use thiserror::Error;

/// The BLAKE3 hash of a file or of a part of it; 64 lower-case hex digits as text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// A text is no digest: it is not 64 lower-case hex digits.
#[derive(Debug, Error)]
#[error("a digest is 64 lower-case hex digits")]
pub struct InvalidDigest;

impl Digest {
    /// How many bytes a digest has.
    pub const LEN: usize = 32;

    /// The digest of some bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// A digest that was read from somewhere.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn finish(hasher: &blake3::Hasher) -> Self {
        Self(*hasher.finalize().as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(InvalidDigest);
        }
        blake3::Hash::from_hex(text)
            .map(|hash| Self(*hash.as_bytes()))
            .map_err(|_| InvalidDigest)
    }
}

/// The digest of the first `size` bytes of a file, holes read as the zeros that they are.
///
/// # Errors
/// What reading gives; [`io::ErrorKind::UnexpectedEof`] if the file is shorter.
pub(crate) fn of_file(file: &File, size: ByteSize) -> io::Result<Digest> {
    let end = size.get();
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut at = 0;
    while let Some(data) = next_data(file, at, end)? {
        zeros(&mut hasher, data.start - at);
        at = data.start;
        while at < data.end {
            let piece = &mut buffer[..index((data.end - at).min(256 * 1024))];
            file.read_exact_at(piece, at)?;
            hasher.update(piece);
            at += length(piece.len());
        }
    }
    if file.metadata()?.len() < end {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    zeros(&mut hasher, end - at);
    Ok(Digest::finish(&hasher))
}

fn zeros(hasher: &mut blake3::Hasher, mut count: u64) {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    while count > 0 {
        let piece = &ZEROS[..index(count.min(length(ZEROS.len())))];
        hasher.update(piece);
        count -= length(piece.len());
    }
}
