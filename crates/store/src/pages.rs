//! The file `pages`: what each page of a memory file is, and the digests of its data.
//!
//! ```text
//! header 64 B │ kinds: 2 bits a page, padded to 8 B │ digests: 32 B a block with data │ checksum 32 B
//! ```
//!
//! Only the kinds are kept in memory, 64 KiB for each GiB of guest memory; digests are read where they are
//! needed. `docs/snapshot-format.md` has it byte for byte.

use crate::digest::Digest;
use crate::manifest::MAX_MEMORY;
use crate::unit::{
    BLOCK_SIZE, ByteOffset, ByteSize, PAGE_SIZE, PAGES_PER_BLOCK, PageCount, PageNumber, index,
    length,
};
use std::io::{self, BufRead, Read, Write};
use thiserror::Error;

/// The version of the file that this program writes, and the only one that it reads.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"RKDLPAGE";
const HEADER_LEN: u64 = 64;
const PAGES_PER_BYTE: u64 = 4;

/// What a page of a memory file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// All zeros; the memory file has a hole there, or zeros.
    Zero,
    /// In the memory file, at the page's own offset.
    Data,
    /// As in the parent; the memory file has a hole there. Only in a Diff.
    Unchanged,
}

/// Whether a memory file has every page, or leaves some to its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// Every page is data or zero.
    Full,
    /// Some pages are the parent's.
    Diff,
}

/// Pages of one kind that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first of them.
    pub first: PageNumber,
    /// How many they are.
    pub count: PageCount,
    /// What they are.
    pub kind: PageKind,
}

/// What each page of a memory file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages {
    layer: LayerKind,
    memory: ByteSize,
    // Four pages a byte, the first in the low bits; padded with zero bits to a multiple of 8 bytes.
    kinds: Vec<u8>,
}

/// Why a `pages` file cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagesError {
    /// It could not be read.
    #[error("cannot read the pages file")]
    Read(#[from] io::Error),
    /// It is too short to hold even a header.
    #[error("the pages file is cut off")]
    TooShort,
    /// It is something else.
    #[error("it is no pages file")]
    NotPages,
    /// A program of another version wrote it.
    #[error("the pages file has version {found}, and this program reads version {VERSION}")]
    Version {
        /// The version that it has.
        found: u32,
    },
    /// A field of its header has a value that it cannot have.
    #[error("the pages file's {field} has the impossible value {value}")]
    Header {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// It does not have the length that its header demands.
    #[error("the pages file has {actual} bytes instead of {expected}")]
    Length {
        /// The length that follows from the header.
        expected: ByteSize,
        /// The length that it has.
        actual: ByteSize,
    },
    /// Its checksum is not that of its contents.
    #[error("the pages file's checksum is not that of its contents")]
    Checksum,
    /// A page has a kind that does not exist, or not in a Full.
    #[error("page {page} has a kind that it cannot have")]
    Kind {
        /// The page.
        page: PageNumber,
    },
    /// There is a kind for a page beyond the end.
    #[error("the pages file describes pages beyond the end of the memory")]
    Padding,
    /// It does not have as many digests as there are blocks with data.
    #[error("the pages file has {found} digests for {expected} blocks with data")]
    Digests {
        /// How many blocks have data.
        expected: u64,
        /// How many digests the header counts.
        found: u64,
    },
}

impl PageKind {
    const fn bits(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Data => 1,
            Self::Unchanged => 2,
        }
    }

    const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Zero),
            1 => Some(Self::Data),
            2 => Some(Self::Unchanged),
            _ => None,
        }
    }

    // A byte of four pages of this kind.
    const fn four(self) -> u8 {
        self.bits() * 0b0101_0101
    }
}

impl LayerKind {
    const fn code(self) -> u32 {
        match self {
            Self::Full => 0,
            Self::Diff => 1,
        }
    }

    /// What a page is that the memory file has no data for.
    pub(crate) const fn hole(self) -> PageKind {
        match self {
            Self::Full => PageKind::Zero,
            Self::Diff => PageKind::Unchanged,
        }
    }
}

impl Pages {
    /// A description of a memory of `memory` bytes that is one hole.
    ///
    /// # Errors
    /// [`PagesError::Header`] if that is no size that a memory can have.
    pub(crate) fn new(layer: LayerKind, memory: ByteSize) -> Result<Self, PagesError> {
        check_memory(memory)?;
        let mut kinds = vec![0; index(kinds_len(memory))];
        let pages = memory.pages().get();
        let whole = index(pages / PAGES_PER_BYTE);
        kinds[..whole].fill(layer.hole().four());
        let mut new = Self {
            layer,
            memory,
            kinds,
        };
        for page in (pages - pages % PAGES_PER_BYTE)..pages {
            new.set(PageNumber::new(page), layer.hole());
        }
        Ok(new)
    }

    pub(crate) fn set(&mut self, page: PageNumber, kind: PageKind) {
        let shift = page.get() % PAGES_PER_BYTE * 2;
        let byte = &mut self.kinds[index(page.get() / PAGES_PER_BYTE)];
        *byte = *byte & !(0b11 << shift) | kind.bits() << shift;
    }

    /// Whether every page is here.
    pub fn layer(&self) -> LayerKind {
        self.layer
    }

    /// The size of the memory file.
    pub fn memory_size(&self) -> ByteSize {
        self.memory
    }

    /// How many pages the memory has.
    pub fn len(&self) -> PageCount {
        self.memory.pages()
    }

    /// Never: a memory has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len().get() == 0
    }

    /// What a page is; `None` beyond the end.
    pub fn kind(&self, page: PageNumber) -> Option<PageKind> {
        if page.get() >= self.len().get() {
            return None;
        }
        let byte = self.kinds[index(page.get() / PAGES_PER_BYTE)];
        PageKind::from_bits(byte >> (page.get() % PAGES_PER_BYTE * 2) & 0b11)
    }

    /// The run that starts at `page`, as long as it goes on; `None` beyond the end.
    pub fn run_from(&self, page: PageNumber) -> Option<Run> {
        let kind = self.kind(page)?;
        let end = self.len().get();
        let mut next = page.get() + 1;
        while next < end {
            // Whole bytes first: a long run costs a byte comparison for four pages.
            if next.is_multiple_of(PAGES_PER_BYTE) {
                let rest = &self.kinds[index(next / PAGES_PER_BYTE)..];
                let same = rest.iter().take_while(|&&byte| byte == kind.four()).count();
                next = end.min(next + length(same) * PAGES_PER_BYTE);
            }
            if self.kind(PageNumber::new(next)) != Some(kind) {
                break;
            }
            next += 1;
        }
        Some(Run {
            first: page,
            count: PageCount::new(next - page.get()),
            kind,
        })
    }

    /// All runs from the first page to the last; neighbours differ in kind.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        let mut at = PageNumber::new(0);
        std::iter::from_fn(move || {
            let run = self.run_from(at)?;
            at = PageNumber::new(run.first.get() + run.count.get());
            Some(run)
        })
    }

    /// How many pages there are of a kind.
    pub fn count(&self, kind: PageKind) -> PageCount {
        PageCount::new(
            self.runs()
                .filter(|run| run.kind == kind)
                .map(|run| run.count.get())
                .sum(),
        )
    }

    /// The starts of the 64 KiB blocks that hold at least one page of data, in order.
    pub fn data_blocks(&self) -> impl Iterator<Item = ByteOffset> {
        let mut next = 0;
        self.runs()
            .filter(|run| run.kind == PageKind::Data)
            .flat_map(move |run| {
                let end = run.first.get() + run.count.get();
                // The block of this run's first page may have been the last one of the run before.
                let blocks =
                    next.max(run.first.get() / PAGES_PER_BLOCK)..end.div_ceil(PAGES_PER_BLOCK);
                next = blocks.end;
                blocks.map(|block| ByteOffset::new(block * BLOCK_SIZE))
            })
    }

    /// Writes the file; `digests` are those of [`Pages::data_blocks`].
    ///
    /// Returns what is to be recorded of the file.
    pub(crate) fn write(
        &self,
        digests: &[Digest],
        out: impl Write,
    ) -> io::Result<(ByteSize, Digest)> {
        let mut out = Hashed {
            inner: out,
            hasher: blake3::Hasher::new(),
            len: 0,
        };
        let mut header = Vec::with_capacity(index(HEADER_LEN));
        header.extend(MAGIC);
        for field in [VERSION, 4096, 64 * 1024, self.layer.code()] {
            header.extend(field.to_le_bytes());
        }
        header.extend(self.memory.get().to_le_bytes());
        header.extend(length(digests.len()).to_le_bytes());
        header.resize(index(HEADER_LEN), 0);
        out.write_all(&header)?;
        out.write_all(&self.kinds)?;
        for digest in digests {
            out.write_all(digest.as_bytes())?;
        }
        let checksum = Digest::finish(&out.hasher);
        out.write_all(checksum.as_bytes())?;
        out.flush()?;
        Ok((ByteSize::new(out.len), Digest::finish(&out.hasher)))
    }

    /// Reads a file of `size` bytes, and checks all that can be checked without the memory.
    ///
    /// Returns its digest as well, so that a caller need not read it twice. Allocates no more than the file is long.
    ///
    /// # Errors
    /// A [`PagesError`] for whatever is not a whole, sound `pages` file.
    pub fn read(input: impl Read, size: ByteSize) -> Result<(Self, Digest), PagesError> {
        let mut input = Hashed {
            inner: input.take(size.get()),
            hasher: blake3::Hasher::new(),
            len: 0,
        };
        if size.get() < HEADER_LEN {
            return Err(PagesError::TooShort);
        }
        let mut header = [0; 64];
        input.read_exact(&mut header)?;
        let header = Header::parse(&header)?;
        let expected = header.file_len();
        if expected != size {
            return Err(PagesError::Length {
                expected,
                actual: size,
            });
        }
        let mut kinds = vec![0; index(kinds_len(header.memory))];
        input.read_exact(&mut kinds)?;
        let mut buffer = [0; 8192];
        let mut left = header.digests * length(Digest::LEN);
        while left > 0 {
            let piece = &mut buffer[..index(left.min(8192))];
            input.read_exact(piece)?;
            left -= length(piece.len());
        }
        let checksum = Digest::finish(&input.hasher);
        let mut recorded = [0; Digest::LEN];
        input.read_exact(&mut recorded)?;
        if Digest::from_bytes(recorded) != checksum {
            return Err(PagesError::Checksum);
        }
        let pages = Self {
            layer: header.layer,
            memory: header.memory,
            kinds,
        };
        pages.check_kinds()?;
        let blocks = length(pages.data_blocks().count());
        if blocks != header.digests {
            return Err(PagesError::Digests {
                expected: blocks,
                found: header.digests,
            });
        }
        Ok((pages, Digest::finish(&input.hasher)))
    }

    /// The blocks with data and their digests, from the file that these pages were read from, at its start.
    ///
    /// # Errors
    /// What reading gives, in the first item that could not be read.
    pub(crate) fn digests(
        &self,
        file: impl BufRead,
    ) -> impl Iterator<Item = io::Result<(ByteOffset, Digest)>> {
        let skip = HEADER_LEN + length(self.kinds.len());
        let mut file = file;
        let mut skipped = false;
        self.data_blocks().map(move |block| {
            if !skipped {
                io::copy(&mut file.by_ref().take(skip), &mut io::sink())?;
                skipped = true;
            }
            let mut digest = [0; Digest::LEN];
            file.read_exact(&mut digest)?;
            Ok((block, Digest::from_bytes(digest)))
        })
    }

    fn check_kinds(&self) -> Result<(), PagesError> {
        /// The high bit of each page of a word.
        const HIGH: u64 = 0xaaaa_aaaa_aaaa_aaaa;
        let pages = self.len().get();
        // A chain has a file of these for each layer, so 32 pages are looked at in one go.
        for (at, word) in (0_u64..).step_by(32).zip(self.kinds.as_chunks().0) {
            let word = u64::from_le_bytes(*word);
            let wrong = match self.layer {
                LayerKind::Full => word & HIGH,
                LayerKind::Diff => word & word << 1 & HIGH,
            };
            // The pages of the last word that do not exist.
            let beyond = word & u64::MAX.checked_shl(bits(pages - at)).unwrap_or(0);
            if beyond != 0 {
                return Err(PagesError::Padding);
            }
            if wrong != 0 {
                return Err(PagesError::Kind {
                    page: PageNumber::new(at + u64::from(wrong.trailing_zeros() / 2)),
                });
            }
        }
        Ok(())
    }
}

/// How many bits of a word so many pages take; more than it has if there are more.
fn bits(pages: u64) -> u32 {
    u32::try_from(pages.saturating_mul(2)).unwrap_or(u32::MAX)
}

struct Header {
    layer: LayerKind,
    memory: ByteSize,
    digests: u64,
}

impl Header {
    fn parse(bytes: &[u8; 64]) -> Result<Self, PagesError> {
        let (magic, rest) = bytes.split_at(8);
        let (words, rest) = rest.split_at(16);
        let (longs, reserved) = rest.split_at(16);
        if magic != MAGIC {
            return Err(PagesError::NotPages);
        }
        let word =
            |n: usize| u32::from_le_bytes(*words.as_chunks().0.get(n).expect("there are four"));
        let long =
            |n: usize| u64::from_le_bytes(*longs.as_chunks().0.get(n).expect("there are two"));
        let impossible = |field, value| Err(PagesError::Header { field, value });
        if word(0) != VERSION {
            return Err(PagesError::Version { found: word(0) });
        }
        if u64::from(word(1)) != PAGE_SIZE {
            return impossible("page size", word(1).into());
        }
        if u64::from(word(2)) != BLOCK_SIZE {
            return impossible("block size", word(2).into());
        }
        let layer = match word(3) {
            0 => LayerKind::Full,
            1 => LayerKind::Diff,
            code => return impossible("kind", code.into()),
        };
        let memory = ByteSize::new(long(0));
        check_memory(memory)?;
        let blocks = memory.get().div_ceil(BLOCK_SIZE);
        if long(1) > blocks {
            return impossible("number of digests", long(1));
        }
        match reserved.iter().find(|&&byte| byte != 0) {
            Some(&byte) => impossible("reserved part", byte.into()),
            None => Ok(Self {
                layer,
                memory,
                digests: long(1),
            }),
        }
    }

    fn file_len(&self) -> ByteSize {
        let digests = (self.digests + 1) * length(Digest::LEN);
        ByteSize::new(HEADER_LEN + kinds_len(self.memory) + digests)
    }
}

fn check_memory(memory: ByteSize) -> Result<(), PagesError> {
    let size = memory.get();
    match size > 0 && memory <= MAX_MEMORY && size.is_multiple_of(PAGE_SIZE) {
        true => Ok(()),
        false => Err(PagesError::Header {
            field: "memory size",
            value: size,
        }),
    }
}

fn kinds_len(memory: ByteSize) -> u64 {
    memory
        .pages()
        .get()
        .div_ceil(PAGES_PER_BYTE)
        .next_multiple_of(8)
}

// Hashes and counts what passes through.
struct Hashed<T> {
    inner: T,
    hasher: blake3::Hasher,
    len: u64,
}

impl<T: Write> Write for Hashed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.len += length(written);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Hashed<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(bytes)?;
        self.hasher.update(&bytes[..read]);
        self.len += length(read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
