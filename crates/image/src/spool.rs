//! Where the contents of files wait until the image's layout is known: one unnamed file, blocks of zeros left out.
//!
//! ```text
//! a file:  [ data ][ zeros  ][ data ]         the spool:  … [ data ][ data ] …
//!            └────── Run ──────┘└── Run ────────────────────────┘
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What a block of the image has, in bytes.
pub(crate) const BLOCK: usize = 4096;
/// How much is read at once: 256 blocks.
const PIECE: usize = 256 * BLOCK;

/// The contents of a regular file, which are in a [`Spool`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    /// How long the file is, in bytes.
    pub(crate) size: u64,
    /// Its data, in order; what is between them is zeros.
    pub(crate) runs: Vec<Run>,
    /// BLAKE3 of all of it but the zeros between the runs.
    pub(crate) hash: [u8; 32],
}

/// Blocks that follow each other in a file and in the spool; the last one may be only partly the file's, and is zeros
/// from there on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Which block of the file it begins at.
    pub(crate) file_block: u64,
    /// Which block of the spool.
    pub(crate) spool_block: u64,
    /// How many.
    pub(crate) blocks: u64,
}

impl Contents {
    /// How long the file is, in bytes.
    #[must_use]
    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

/// The contents of files.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    blocks: u64,
}

impl Spool {
    /// An empty one, as a file without a name in `directory`.
    ///
    /// # Errors
    /// If no file can be made there.
    pub(crate) fn new(directory: &Path) -> io::Result<Self> {
        Ok(Self {
            file: tempfile::tempfile_in(directory)?,
            blocks: 0,
        })
    }

    /// Takes in all that `reader` has.
    ///
    /// # Errors
    /// What reading or writing gives.
    pub(crate) fn add(&mut self, reader: &mut dyn Read) -> io::Result<Contents> {
        let mut runs: Vec<Run> = Vec::new();
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; PIECE];
        let mut size = 0;
        let mut start = 0;
        loop {
            let filled = fill(reader, &mut buffer)?;
            size += length(filled);
            buffer[filled..].fill(0);
            for (first, data) in stretches(&buffer[..filled.next_multiple_of(BLOCK)]) {
                hasher.update(data);
                self.file.write_all_at(data, self.blocks * length(BLOCK))?;
                let (file_block, blocks) = (start + length(first), length(data.len() / BLOCK));
                match runs.last_mut() {
                    Some(run) if run.file_block + run.blocks == file_block => run.blocks += blocks,
                    _ => runs.push(Run {
                        file_block,
                        spool_block: self.blocks,
                        blocks,
                    }),
                }
                self.blocks += blocks;
            }
            start += length(PIECE / BLOCK);
            if filled < PIECE {
                let hash = *hasher.finalize().as_bytes();
                return Ok(Contents { size, runs, hash });
            }
        }
    }

    /// The file that the runs are in.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// All of a file's bytes.
    ///
    /// # Errors
    /// What reading gives.
    #[cfg(test)]
    pub(crate) fn read(&self, contents: &Contents) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(contents.size).unwrap()];
        for run in &contents.runs {
            let at = usize::try_from(run.file_block).unwrap() * BLOCK;
            let end = (at + usize::try_from(run.blocks).unwrap() * BLOCK).min(bytes.len());
            self.file
                .read_exact_at(&mut bytes[at..end], run.spool_block * length(BLOCK))?;
        }
        Ok(bytes)
    }
}

/// The stretches of whole blocks that are not all zeros, each with the number of its first block.
fn stretches(piece: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let is_zero = |block: usize| {
        let bytes = &piece[block * BLOCK..(block + 1) * BLOCK];
        bytes.iter().all(|byte| *byte == 0)
    };
    let blocks = piece.len() / BLOCK;
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = (at..blocks).find(|block| !is_zero(*block))?;
        let end = (first..blocks)
            .find(|block| is_zero(*block))
            .unwrap_or(blocks);
        at = end;
        Some((first, &piece[first * BLOCK..end * BLOCK]))
    })
}

/// Reads until the buffer is full or there is nothing more.
fn fill(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A length in memory as one on disk.
pub(crate) fn length(bytes: usize) -> u64 {
    // Lossless: a usize has 64 bits at the most.
    bytes as u64
}
