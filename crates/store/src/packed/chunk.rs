//! A chunk: some pages one after the other, compressed if that makes them smaller.

use crate::digest::Digest;
use crate::packed::index::Chunk;
use crate::unit::index;
use std::borrow::Cow;
use std::cell::RefCell;
use std::io;
use thiserror::Error;
use zstd::bulk::Decompressor;

/// 3, zstd's own default: `docs/decisions/0021-chunks-of-64-kib-by-zstd.md`.
const LEVEL: i32 = 3;

/// How the bytes of a chunk are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As they are.
    Stored,
    /// One zstd frame.
    Zstd,
}

/// Why stored bytes are not the chunk that they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChunkError {
    /// They have another length than the index says.
    #[error("it has another length than the index says")]
    Length,
    /// They cannot be decompressed to the size of the chunk.
    #[error("it cannot be decompressed")]
    Compression,
    /// They are other bytes.
    #[error("it is not what its BLAKE3 says")]
    Digest,
}

impl Codec {
    pub(super) const fn code(self) -> u16 {
        match self {
            Self::Stored => 0,
            Self::Zstd => 1,
        }
    }

    pub(super) const fn from_code(code: u16) -> Option<Self> {
        match code {
            0 => Some(Self::Stored),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Compresses whole pages; what does not get smaller is stored.
pub(super) fn encode(raw: &[u8]) -> io::Result<(Codec, Vec<u8>)> {
    let packed = zstd::bulk::compress(raw, LEVEL)?;
    Ok(match packed.len() < raw.len() {
        true => (Codec::Zstd, packed),
        false => (Codec::Stored, raw.to_vec()),
    })
}

thread_local! {
    // To make one costs as much as to use it.
    static DECOMPRESSOR: RefCell<Decompressor<'static>> = RefCell::default();
}

/// The pages of a chunk from the bytes that a pack has for it, proven by its BLAKE3.
///
/// However the bytes were made, no more memory is taken than the chunk has pages.
///
/// # Errors
/// A [`ChunkError`] if they are not those of this chunk.
pub fn decode<'a>(chunk: &Chunk, stored: impl Into<Cow<'a, [u8]>>) -> Result<Vec<u8>, ChunkError> {
    let stored = stored.into();
    if stored.len() != index(chunk.stored.into()) {
        return Err(ChunkError::Length);
    }
    let size = index(chunk.raw_size());
    let raw = match chunk.codec {
        Codec::Stored => stored.into_owned(),
        // Gives up at a frame that would become longer.
        Codec::Zstd => DECOMPRESSOR
            .with_borrow_mut(|decompressor| decompressor.decompress(&stored, size))
            .map_err(|_| ChunkError::Compression)?,
    };
    match () {
        () if raw.len() != size => Err(ChunkError::Compression),
        () if Digest::of(&raw) != chunk.digest => Err(ChunkError::Digest),
        () => Ok(raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk_of(raw: &[u8]) -> (Chunk, Vec<u8>) {
        let (codec, stored) = encode(raw).unwrap();
        let chunk = Chunk {
            digest: Digest::of(raw),
            pack: 0,
            offset: 0,
            stored: u32::try_from(stored.len()).unwrap(),
            pages: u16::try_from(raw.len() / 4096).unwrap(),
            codec,
        };
        (chunk, stored)
    }

    #[test]
    fn what_was_packed_comes_back() {
        let noise: Vec<u8> = (0..16_384_u32)
            .map(|n| blake3::hash(&n.to_le_bytes()).as_bytes()[0])
            .collect();
        for (raw, codec) in [(noise, Codec::Stored), (vec![7; 65_536], Codec::Zstd)] {
            let (chunk, stored) = chunk_of(&raw);
            assert_eq!(chunk.codec, codec);
            assert_eq!(decode(&chunk, &stored).unwrap(), raw);
        }
    }

    #[test]
    fn bytes_of_another_chunk_are_refused() {
        let (chunk, mut stored) = chunk_of(&[7; 8192]);
        assert_eq!(decode(&chunk, &stored[1..]), Err(ChunkError::Length));
        let (other, same_length) = chunk_of(&[8; 8192]);
        assert_eq!(other.stored, chunk.stored);
        assert_eq!(decode(&chunk, &same_length), Err(ChunkError::Digest));
        stored.fill(0);
        assert_eq!(decode(&chunk, &stored), Err(ChunkError::Compression));
    }

    #[test]
    fn a_frame_that_grows_beyond_the_chunk_is_refused() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
        let (mut chunk, _) = chunk_of(&[7; 4096]);
        chunk.stored = u32::try_from(bomb.len()).unwrap();
        assert_eq!(decode(&chunk, &bomb), Err(ChunkError::Compression));
        // One that becomes shorter is as wrong.
        let short = zstd::bulk::compress(&[7; 100], 3).unwrap();
        chunk.stored = u32::try_from(short.len()).unwrap();
        assert_eq!(decode(&chunk, &short), Err(ChunkError::Compression));
    }
}
