//! BLAKE3 digests, as `b3sum` prints them.

use crate::sparse::next_data;
use crate::unit::{BLOCK_SIZE, ByteSize, index, length};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
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

    /// The digest of the file at `path`, as `b3sum` prints it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        of_file(&file, ByteSize::new(file.metadata()?.len()))
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

/// The digest of what is not zero in the first `size` bytes of a disk, which takes no time for what is.
///
/// It is BLAKE3 of `size`, and then for each block of 64 KiB that has another byte than zero in it, in order: its number,
/// and its bytes. Numbers are 64 bits, little-endian; the last block may be shorter. So it is the same whether zeros are
/// holes or were written.
///
/// # Errors
/// What reading gives; [`io::ErrorKind::UnexpectedEof`] if the file is shorter.
pub(crate) fn of_data(file: &File, size: ByteSize) -> io::Result<Digest> {
    let end = size.get();
    if file.metadata()?.len() < end {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&end.to_le_bytes());
    let mut buffer = vec![0; index(BLOCK_SIZE)];
    let mut at = 0;
    while let Some(data) = next_data(file, at, end)? {
        // Where a block has data in several places, the first one brings all of it.
        at = data.start / BLOCK_SIZE * BLOCK_SIZE;
        while at < data.end {
            let block = &mut buffer[..index((end - at).min(BLOCK_SIZE))];
            file.read_exact_at(block, at)?;
            if block.iter().any(|&byte| byte != 0) {
                hasher.update(&(at / BLOCK_SIZE).to_le_bytes());
                hasher.update(block);
            }
            at += length(block.len());
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(size: u64, written: &[(u64, &[u8])]) -> (File, ByteSize) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (at, bytes) in written {
            file.write_all_at(bytes, *at).unwrap();
        }
        (file, ByteSize::new(size))
    }

    fn data((file, size): &(File, ByteSize)) -> Digest {
        of_data(file, *size).unwrap()
    }

    #[test]
    fn a_disks_digest_is_of_its_data_however_its_zeros_are_kept() {
        let block: u64 = BLOCK_SIZE;
        let size = 1000 * block + 5;
        let holes = disk(size, &[(3 * block + 7, b"x"), (size - 1, b"y")]);
        let zeros = vec![0; index(4 * block)];
        let written = disk(
            size,
            &[(0, &zeros), (3 * block + 7, b"x"), (size - 1, b"y")],
        );
        assert_eq!(data(&holes), data(&written));

        let mut by_the_book = blake3::Hasher::new();
        by_the_book.update(&size.to_le_bytes());
        let mut first = vec![0; index(block)];
        first[7] = b'x';
        by_the_book.update(&3_u64.to_le_bytes()).update(&first);
        by_the_book
            .update(&1000_u64.to_le_bytes())
            .update(b"\0\0\0\0y");
        assert_eq!(data(&holes), Digest::finish(&by_the_book));
    }

    #[test]
    fn a_byte_elsewhere_a_byte_more_and_another_size_are_other_digests() {
        let digests: Vec<_> = [
            disk(1 << 20, &[]),
            disk(2 << 20, &[]),
            disk(1 << 20, &[(5, b"x")]),
            disk(1 << 20, &[(65536 + 5, b"x")]),
            disk(1 << 20, &[(5, b"x"), (65536 + 5, b"x")]),
        ]
        .iter()
        .map(data)
        .collect();
        for (n, digest) in digests.iter().enumerate() {
            assert!(!digests[..n].contains(digest), "{n}");
        }
    }

    #[test]
    fn a_disk_of_a_tebibyte_of_holes_has_a_digest_at_once() {
        data(&disk(1 << 40, &[(1 << 39, b"x")]));
    }
}
