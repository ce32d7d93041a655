//! Reading an index that may come from a stranger.

use super::{
    CHUNK, Chunk, EXTENT, Extent, HEADER, Index, IndexError, MAGIC, NO_CHUNK, PACK, PackRef, Place,
    STREAM, Stream, VERSION, layer_of, refuse_host_files, stream_sizes,
};
use crate::digest::Digest;
use crate::manifest::Manifest;
use crate::packed::{Codec, MAX_CHUNK_PAGES, MAX_PACK};
use crate::pages::LayerKind;
use crate::unit::{ByteSize, PAGE_SIZE, PageCount, PageNumber, PageRange, index, length};

impl Index {
    /// Reads an index, and compares all that it says with itself and with its manifest.
    ///
    /// # Errors
    /// An [`IndexError`] for whatever is not a whole, sound index.
    pub fn parse(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut input = Input { rest: body(bytes)? };
        let counts = Counts::parse(input.take(HEADER).ok_or(IndexError::NotIndex)?)?;
        let table = |count: u32, record: usize| u64::from(count) * length(record);
        let fixed = length(HEADER + Digest::LEN)
            + table(counts.packs, PACK)
            + table(counts.chunks, CHUNK)
            + table(counts.streams, STREAM)
            + u64::from(counts.manifest)
            + u64::from(counts.vmstate)
            + u64::from(counts.working_set);
        let wrong = |expected| IndexError::Length {
            expected,
            actual: length(bytes.len()),
        };
        let packs = input.records(counts.packs, PACK).ok_or(wrong(fixed))?;
        let chunks = input.records(counts.chunks, CHUNK).ok_or(wrong(fixed))?;
        let streams = input.records(counts.streams, STREAM).ok_or(wrong(fixed))?;
        let packs = numbered("pack", packs, parse_pack)?;
        let chunks = numbered("chunk", chunks, |record| parse_chunk(record, &packs))?;
        let sizes: Vec<(u64, u64)> = streams
            .map(|record| (long(&record[0..8]), long(&record[8..16])))
            .collect();
        let extents = sizes
            .iter()
            .try_fold(0_u64, |sum, (_, n)| sum.checked_add(*n));
        let expected = extents
            .and_then(|extents| extents.checked_mul(length(EXTENT)))
            .and_then(|extents| extents.checked_add(fixed))
            .unwrap_or(u64::MAX);
        if expected != length(bytes.len()) {
            return Err(wrong(expected));
        }
        let tables = input.take(index(expected - fixed)).ok_or(wrong(expected))?;
        let mut part = |len: u32| input.take(index(len.into())).ok_or(wrong(expected));
        let manifest = Manifest::parse(part(counts.manifest)?)?;
        let vmstate = part(counts.vmstate)?.to_vec();
        let working_set = part(counts.working_set)?.to_vec();
        check_manifest(&manifest, &vmstate, &sizes)?;
        let index = Self {
            streams: parse_streams(tables, &sizes, &chunks, layer_of(&manifest))?,
            manifest,
            vmstate,
            working_set,
            packs,
            chunks,
        };
        index.check_use()?;
        Ok(index)
    }

    /// Each chunk has a use, so that nobody fetches what is not needed.
    fn check_use(&self) -> Result<(), IndexError> {
        let mut used = vec![false; self.chunks.len()];
        for extent in self.streams.iter().flat_map(|stream| &stream.extents) {
            if let Place::Chunk { chunk, .. } = extent.place {
                used[index(chunk.into())] = true;
            }
        }
        match used.iter().position(|&used| !used) {
            None => Ok(()),
            Some(number) => Err(invalid("chunk", number, "belongs to no file")),
        }
    }
}

/// What stands before the checksum.
fn body(bytes: &[u8]) -> Result<&[u8], IndexError> {
    if !bytes.starts_with(&MAGIC) || bytes.len() < HEADER + Digest::LEN {
        return Err(IndexError::NotIndex);
    }
    let version = word(&bytes[8..12]);
    if version != VERSION {
        return Err(IndexError::Version { found: version });
    }
    let (body, checksum) = bytes.split_at(bytes.len() - Digest::LEN);
    match Digest::of(body).as_bytes() == checksum {
        true => Ok(body),
        false => Err(IndexError::Checksum),
    }
}

struct Counts {
    packs: u32,
    chunks: u32,
    streams: u32,
    manifest: u32,
    vmstate: u32,
    working_set: u32,
}

impl Counts {
    fn parse(header: &[u8]) -> Result<Self, IndexError> {
        let field = |n: usize| word(&header[12 + 4 * n..16 + 4 * n]);
        if u64::from(field(0)) != PAGE_SIZE {
            return Err(invalid("page size", 0, "is not 4096"));
        }
        if header[40..].iter().any(|&byte| byte != 0) {
            return Err(invalid("header", 0, "ends in something else than zeros"));
        }
        Ok(Self {
            packs: field(1),
            chunks: field(2),
            streams: field(3),
            manifest: field(4),
            vmstate: field(5),
            working_set: field(6),
        })
    }
}

/// What was not read yet.
struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (now, later) = self.rest.split_at_checked(len)?;
        self.rest = later;
        Some(now)
    }

    fn records(&mut self, count: u32, len: usize) -> Option<std::slice::ChunksExact<'a, u8>> {
        let bytes = index(count.into()).checked_mul(len)?;
        Some(self.take(bytes)?.chunks_exact(len))
    }
}

/// Reads a table; what is wrong with a record is told with its number.
fn numbered<T>(
    what: &'static str,
    records: std::slice::ChunksExact<'_, u8>,
    parse: impl Fn(&[u8]) -> Result<T, &'static str>,
) -> Result<Vec<T>, IndexError> {
    let numbered = records.enumerate();
    numbered
        .map(|(number, record)| parse(record).map_err(|problem| invalid(what, number, problem)))
        .collect()
}

fn parse_pack(record: &[u8]) -> Result<PackRef, &'static str> {
    let size = long(&record[32..40]);
    match u32::try_from(size) {
        Ok(small) if size > 0 && size <= MAX_PACK => Ok(PackRef {
            name: digest(record),
            size: small,
        }),
        _ => Err("has a size that no pack has"),
    }
}

fn parse_chunk(record: &[u8], packs: &[PackRef]) -> Result<Chunk, &'static str> {
    let half = |at: usize| u16::from_le_bytes([record[at], record[at + 1]]);
    let chunk = Chunk {
        digest: digest(record),
        pack: word(&record[32..36]),
        offset: word(&record[36..40]),
        stored: word(&record[40..44]),
        pages: half(44),
        codec: Codec::from_code(half(46)).ok_or("is stored in an unknown way")?,
    };
    let raw = u64::from(chunk.pages) * PAGE_SIZE;
    let pack = packs
        .get(index(chunk.pack.into()))
        .ok_or("is in a pack that is not there")?;
    match () {
        () if !(1..=MAX_CHUNK_PAGES).contains(&chunk.pages.into()) => {
            Err("has a size that no chunk has")
        }
        () if chunk.stored == 0 || u64::from(chunk.stored) > raw => Err("is longer than its pages"),
        () if chunk.codec == Codec::Stored && u64::from(chunk.stored) != raw => {
            Err("is not as long as its pages")
        }
        () if chunk.range().end > pack.size.into() => Err("reaches beyond its pack"),
        () => Ok(chunk),
    }
}

fn parse_streams(
    tables: &[u8],
    sizes: &[(u64, u64)],
    chunks: &[Chunk],
    layer: LayerKind,
) -> Result<Vec<Stream>, IndexError> {
    let mut records = tables.chunks_exact(EXTENT).enumerate();
    let mut streams = Vec::new();
    for (stream, &(size, count)) in sizes.iter().enumerate() {
        let size = ByteSize::new(size);
        let zeros = stream == 0 && layer == LayerKind::Diff;
        let mut next = 0;
        let mut extents = Vec::with_capacity(index(count));
        for (number, record) in records.by_ref().take(index(count)) {
            let extent = parse_extent(record, chunks).and_then(|extent| match () {
                () if extent.pages.first.get() < next => Err("is not after the one before"),
                () if extent.pages.end().get() > size.pages().get() => {
                    Err("reaches beyond its file")
                }
                () if extent.place == Place::Zero && !zeros => {
                    Err("is zero where all that is left out is")
                }
                () => Ok(extent),
            });
            let extent = extent.map_err(|problem| invalid("extent", number, problem))?;
            next = extent.pages.end().get();
            extents.push(extent);
        }
        streams.push(Stream { size, extents });
    }
    Ok(streams)
}

fn parse_extent(record: &[u8], chunks: &[Chunk]) -> Result<Extent, &'static str> {
    let field = |n: usize| word(&record[4 * n..4 * n + 4]);
    let (first, count, chunk, at) = (field(0), field(1), field(2), field(3));
    let pages = PageRange {
        first: PageNumber::new(first.into()),
        count: PageCount::new(count.into()),
    };
    if count == 0 {
        return Err("has no pages");
    }
    if chunk == NO_CHUNK {
        let place = Place::Zero;
        return match at {
            0 => Ok(Extent { pages, place }),
            _ => Err("is somewhere in no chunk"),
        };
    }
    let of = chunks
        .get(index(chunk.into()))
        .ok_or("is in a chunk that is not there")?;
    match u16::try_from(at) {
        Ok(at) if u64::from(at) + u64::from(count) <= u64::from(of.pages) => Ok(Extent {
            pages,
            place: Place::Chunk { chunk, at },
        }),
        _ => Err("reaches beyond its chunk"),
    }
}

fn check_manifest(
    manifest: &Manifest,
    vmstate: &[u8],
    sizes: &[(u64, u64)],
) -> Result<(), IndexError> {
    refuse_host_files(manifest)?;
    let disagrees = |what| Err(IndexError::Disagrees { what });
    let wanted = stream_sizes(manifest);
    let found = sizes.iter().map(|(size, _)| ByteSize::new(*size));
    if !found.eq(wanted) {
        return disagrees("the sizes of memory and disks");
    }
    let record = manifest.files.vmstate;
    if record.size.get() != length(vmstate.len()) || record.blake3 != Digest::of(vmstate) {
        return disagrees("vmstate");
    }
    Ok(())
}

fn invalid(what: &'static str, number: usize, problem: &'static str) -> IndexError {
    IndexError::Invalid {
        what,
        number,
        problem,
    }
}

fn digest(record: &[u8]) -> Digest {
    Digest::from_bytes(*record.first_chunk().expect("records start with a digest"))
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(*bytes.first_chunk().expect("four bytes"))
}

fn long(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().expect("eight bytes"))
}
