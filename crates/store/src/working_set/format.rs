//! The bytes of a working set: one file for a set, and one set for a file.

use super::{MAX_COUNT, MAX_SIZE, Touched, VERSION, WorkingSet, WorkingSetError, coarse};
use crate::digest::Digest;
use crate::unit::{ByteOffset, ByteSize, index, length};

const MAGIC: [u8; 4] = *b"RKWS";
const HEADER_LEN: usize = 24;

/// The unit of times in the file: 1024 µs.
pub(super) const TICK_BITS: u32 = 10;

/// The longest run. It bounds what a short file can be unpacked to: three bytes for 256 pages.
const MAX_RUN: u64 = 256;

/// The largest file of a memory with so many pages.
///
/// A page of its own takes at most 7 bytes (5 for a distance below 2^30, 2 for length and count), and a group 8 more
/// (4 for a time below 2^22 units, 4 for its number of runs if they are all of its pages).
pub(super) fn size_limit(pages: u64) -> ByteSize {
    let seams = length(HEADER_LEN + Digest::LEN);
    let size = pages.saturating_mul(16).saturating_add(seams);
    ByteSize::new(size.min(MAX_SIZE.get()))
}

/// Pages that follow each other, of one time and one count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    start: u64,
    at_us: u32,
    // 1 to MAX_RUN.
    len: u16,
    count: u8,
}

impl Stretch {
    fn end(self) -> u64 {
        self.start + u64::from(self.len)
    }

    fn touched(self) -> impl Iterator<Item = Touched> {
        (self.start..self.end()).map(move |page| Touched {
            page,
            at_us: self.at_us,
            count: self.count,
        })
    }

    /// Whether a stretch that starts at `start` has no reason not to be part of this one.
    fn goes_on(self, start: u64, count: u8) -> bool {
        self.end() == start && self.count == count && u64::from(self.len) < MAX_RUN
    }
}

impl WorkingSet {
    /// Reads a set from the bytes of its file.
    ///
    /// Allocates in proportion to the file, and to the pages of the memory that the *file* names; who knows the memory
    /// reads with [`WorkingSet::parse_for`].
    ///
    /// # Errors
    /// A [`WorkingSetError`] for whatever [`WorkingSet::to_bytes`] would not write.
    pub fn parse(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        Self::parse_header(bytes)?.parse_body(bytes)
    }

    /// Reads the set of a memory with `pages` pages of `page_size` bytes; that of any other is refused before anything
    /// is allocated.
    ///
    /// # Errors
    /// [`WorkingSetError::OtherMemory`], and what [`WorkingSet::parse`] refuses.
    pub fn parse_for(bytes: &[u8], page_size: u64, pages: u64) -> Result<Self, WorkingSetError> {
        let empty = Self::parse_header(bytes)?;
        if (empty.page_size, empty.pages) != (page_size, pages) {
            return Err(WorkingSetError::OtherMemory {
                page_size: empty.page_size,
                pages: empty.pages,
            });
        }
        empty.parse_body(bytes)
    }

    fn parse_header(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let (header, _) = bytes
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(WorkingSetError::TooShort)?;
        let (words, pages) = header.split_at(16);
        let word = |n: usize| words.as_chunks().0.get(n).copied().expect("there are four");
        if word(0) != MAGIC {
            return Err(WorkingSetError::NotWorkingSet);
        }
        // Before all else: how a later version is sealed is not ours to know.
        match u32::from_le_bytes(word(1)) {
            VERSION => {}
            found => return Err(WorkingSetError::Version { found }),
        }
        let (sealed, checksum) = bytes
            .split_last_chunk::<{ Digest::LEN }>()
            .filter(|(sealed, _)| sealed.len() >= HEADER_LEN)
            .ok_or(WorkingSetError::TooShort)?;
        if Digest::of(sealed) != Digest::from_bytes(*checksum) {
            return Err(WorkingSetError::Checksum);
        }
        let pages = u64::from_le_bytes(pages.try_into().expect("eight bytes are left"));
        let mut empty = Self::new(u32::from_le_bytes(word(2)).into(), pages)?;
        empty.runs = u32::from_le_bytes(word(3));
        let limit = size_limit(pages);
        match length(bytes.len()) <= limit.get() {
            true => Ok(empty),
            false => Err(WorkingSetError::TooLarge { limit }),
        }
    }

    fn parse_body(mut self, bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let mut reader = Reader {
            bytes: &bytes[..bytes.len() - Digest::LEN],
            at: HEADER_LEN,
        };
        let mut stretches = reader.groups(self.pages)?;
        // By page, to find what overlaps with so little memory; then back into their order.
        stretches.sort_unstable_by_key(|stretch| stretch.start);
        if let Some(page) = first_overlap(&stretches) {
            return Err(WorkingSetError::Twice { page });
        }
        stretches.sort_unstable_by_key(|stretch| (stretch.at_us, stretch.start));
        let total: u64 = stretches.iter().map(|stretch| u64::from(stretch.len)).sum();
        self.touched.reserve_exact(index(total));
        self.touched
            .extend(stretches.into_iter().flat_map(Stretch::touched));
        Ok(self)
    }

    /// The bytes of the set's file. Only a set of tens of gigabytes has more than [`MAX_SIZE`] of them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        let page_size = u32::try_from(self.page_size).expect("a page has at most 2 MiB");
        for field in [VERSION, page_size, self.runs] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(self.pages.to_le_bytes());
        let mut before = 0;
        for group in self.touched.chunk_by(|a, b| a.at_us == b.at_us) {
            let ticks = group.first().map_or(0, |first| first.at_us >> TICK_BITS);
            put_varint(&mut bytes, u64::from(ticks - before));
            before = ticks;
            put_stretches(&mut bytes, &stretches_of(group));
        }
        let checksum = Digest::of(&bytes);
        bytes.extend(checksum.as_bytes());
        bytes
    }
}

fn first_overlap(by_page: &[Stretch]) -> Option<u64> {
    by_page
        .array_windows()
        .find(|[before, after]| after.start < before.end())
        .map(|[_, after]| after.start)
}

/// The stretches of pages that have one time, and are in order.
fn stretches_of(group: &[Touched]) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    for touched in group {
        match stretches.last_mut() {
            Some(last) if last.goes_on(touched.page, touched.count) => last.len += 1,
            _ => stretches.push(Stretch {
                start: touched.page,
                at_us: touched.at_us,
                len: 1,
                count: touched.count,
            }),
        }
    }
    stretches
}

fn put_stretches(bytes: &mut Vec<u8>, stretches: &[Stretch]) {
    put_varint(bytes, length(stretches.len()));
    let mut end = 0;
    for stretch in stretches {
        put_varint(bytes, stretch.start - end);
        end = stretch.end();
        let shape =
            u64::from(stretch.len - 1) * u64::from(MAX_COUNT) + u64::from(stretch.count - 1);
        put_varint(bytes, shape);
    }
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(0x80 | value.to_le_bytes()[0] & 0x7f);
        value >>= 7;
    }
    bytes.push(value.to_le_bytes()[0]);
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    /// All groups up to the end, as long as they are of a memory with `pages` pages.
    fn groups(&mut self, pages: u64) -> Result<Vec<Stretch>, WorkingSetError> {
        let mut stretches = Vec::new();
        let mut ticks = None;
        while self.at < self.bytes.len() {
            let at_us = self.time(&mut ticks)?;
            self.group(at_us, pages, &mut stretches)?;
            // Every stretch has a page at least, so some overlap. Later is too late: they are kept until the end.
            if length(stretches.len()) > pages {
                return self.malformed("more runs than there are pages");
            }
        }
        Ok(stretches)
    }

    fn time(&mut self, ticks: &mut Option<u64>) -> Result<u32, WorkingSetError> {
        let more = self.varint()?;
        let now = match *ticks {
            Some(_) if more == 0 => return self.malformed("two groups of one time"),
            before => before.unwrap_or(0).checked_add(more),
        };
        *ticks = now;
        let at_us = now
            .and_then(|now| now.checked_mul(1 << TICK_BITS))
            .and_then(|us| u32::try_from(us).ok());
        match at_us {
            None => self.malformed("a time that is too late"),
            Some(at_us) if coarse(at_us) != at_us => self.malformed("a time that is too fine"),
            Some(at_us) => Ok(at_us),
        }
    }

    fn group(
        &mut self,
        at_us: u32,
        pages: u64,
        stretches: &mut Vec<Stretch>,
    ) -> Result<(), WorkingSetError> {
        let count = self.varint()?;
        if count == 0 {
            return self.malformed("an empty group");
        }
        let mut before: Option<Stretch> = None;
        // Each takes two bytes at least, so the end of the file ends a lie.
        for _ in 0..count {
            let stretch = self.stretch(at_us, before.map_or(0, Stretch::end), pages)?;
            if before.is_some_and(|before| before.goes_on(stretch.start, stretch.count)) {
                return self.malformed("a run in two pieces");
            }
            stretches.push(stretch);
            before = Some(stretch);
        }
        Ok(())
    }

    fn stretch(&mut self, at_us: u32, from: u64, pages: u64) -> Result<Stretch, WorkingSetError> {
        let start = from.saturating_add(self.varint()?);
        let shape = self.varint()?;
        let len = (shape / u64::from(MAX_COUNT)).saturating_add(1);
        let count = shape % u64::from(MAX_COUNT) + 1;
        if len > MAX_RUN {
            return self.malformed("a run that is too long");
        }
        if start.saturating_add(len) > pages {
            return Err(WorkingSetError::OutOfRange { page: start, pages });
        }
        Ok(Stretch {
            start,
            at_us,
            len: u16::try_from(len).expect("a run has at most 256 pages"),
            count: u8::try_from(count).expect("a count is at most 8"),
        })
    }

    /// Seven bits a byte, the lowest first, the highest bit set in all but the last; no longer than it must be.
    fn varint(&mut self) -> Result<u64, WorkingSetError> {
        let mut value = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let Some(&byte) = self.bytes.get(self.at) else {
                return self.malformed("its end in the middle of a group");
            };
            self.at += 1;
            let digits = u64::from(byte & 0x7f);
            if digits << shift >> shift != digits {
                return self.malformed("a number that is too large");
            }
            value |= digits << shift;
            if byte & 0x80 == 0 {
                return match byte == 0 && shift > 0 {
                    true => self.malformed("a number that is longer than it must be"),
                    false => Ok(value),
                };
            }
        }
        self.malformed("a number that is too large")
    }

    fn malformed<T>(&self, problem: &'static str) -> Result<T, WorkingSetError> {
        Err(WorkingSetError::Malformed {
            at: ByteOffset::new(length(self.at)),
            problem,
        })
    }
}
