//! Packing a snapshot: its pages into chunks, the chunks that are nowhere yet into packs.
//!
//! ```text
//! plan ─► batch: read ─┬─ hash, compress ─┐ in as many threads as there are CPUs
//!                      ├─ hash, compress ─┤
//!                      └─ hash, compress ─┴─► known? refer to it : append to the open pack ─► full? hand it out
//! ```
//!
//! No more than one batch and one pack are in memory.

use crate::digest::Digest;
use crate::file::{Access, At, FileError};
use crate::packed::chunk::encode;
use crate::packed::index::{
    Chunk, Extent, Index, IndexError, PackRef, Place, Stream, layer_of, refuse_host_files,
};
use crate::packed::plan::{Planned, plan};
use crate::packed::{Codec, PACK_SIZE};
use crate::pages::{LayerKind, PageKind};
use crate::snapshot::{Snapshot, VMSTATE};
use crate::sparse::next_data;
use crate::unit::{
    BLOCK_SIZE, ByteSize, PAGE_SIZE, PageCount, PageNumber, PageRange, index, length,
};
use crate::working_set;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use thiserror::Error;

/// How many chunks are read before they are compressed: 16 MiB of pages.
const BATCH: usize = 256;

/// A pack that is complete.
#[derive(Debug)]
pub struct Pack {
    /// Its name and size.
    pub is: PackRef,
    /// Its bytes: chunks, one after the other.
    pub bytes: Vec<u8>,
    /// How many bytes of pages of the snapshot are packed by now, in this and all packs before.
    pub pages_done: ByteSize,
}

/// Where a chunk is already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    pack: PackRef,
    // Its pack's place in another index means nothing here.
    chunk: Chunk,
}

/// The chunks that are where a snapshot is packed to, and need not be packed again.
#[derive(Debug, Default)]
pub struct KnownChunks {
    by_digest: HashMap<Digest, Known>,
}

/// Why a snapshot was not packed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PackError<E: std::error::Error + 'static> {
    /// It has a drive that cannot travel.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A file of it cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A pack could not be put where it belongs.
    #[error(transparent)]
    Put(E),
}

impl KnownChunks {
    /// Remembers all chunks of a packed snapshot.
    pub fn add(&mut self, index: &Index) {
        for &chunk in &index.chunks {
            let pack = index.packs[crate::unit::index(chunk.pack.into())];
            self.by_digest
                .entry(chunk.digest)
                .or_insert(Known { pack, chunk });
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_digest.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_digest.is_empty()
    }
}

/// Packs a snapshot whose contents were verified; chunks that are `known` are referred to where they are.
///
/// Each pack is handed to `put` as soon as it is full. The index is worth nothing before they all are in place.
///
/// # Errors
/// A [`PackError`]; what `put` was given before may be left where it is, or be removed.
pub fn pack<E: std::error::Error + 'static>(
    snapshot: &Snapshot,
    known: &KnownChunks,
    put: &mut dyn FnMut(Pack) -> Result<(), E>,
) -> Result<Index, PackError<E>> {
    refuse_host_files(snapshot.manifest())?;
    let mut packer = Packer {
        known,
        put,
        index: Index {
            manifest: snapshot.manifest().clone(),
            vmstate: read_whole(snapshot, VMSTATE)?,
            working_set: read_working_set(snapshot),
            packs: Vec::new(),
            chunks: Vec::new(),
            streams: Vec::new(),
        },
        numbers: HashMap::new(),
        packs: HashMap::new(),
        open: Vec::new(),
        first_open: 0,
        pages_done: 0,
    };
    packer.memory(snapshot)?;
    for (file, record) in snapshot.manifest().layers() {
        packer.disk(snapshot, file.as_ref(), record.size)?;
    }
    packer.finish()
}

struct Packer<'a, E> {
    known: &'a KnownChunks,
    put: &'a mut dyn FnMut(Pack) -> Result<(), E>,
    index: Index,
    /// The chunks of this index, by digest.
    numbers: HashMap<Digest, u32>,
    /// The packs of others in this index, by name.
    packs: HashMap<Digest, u32>,
    /// The pack that is being filled.
    open: Vec<u8>,
    /// The first chunk of this index that is in it.
    first_open: usize,
    pages_done: u64,
}

impl<E: std::error::Error + 'static> Packer<'_, E> {
    fn memory(&mut self, snapshot: &Snapshot) -> Result<(), PackError<E>> {
        let pages = snapshot.pages();
        let range = |run: crate::pages::Run| PageRange {
            first: run.first,
            count: run.count,
        };
        let of = |kind| pages.runs().filter(move |run| run.kind == kind).map(range);
        let data: Vec<PageRange> = of(PageKind::Data).collect();
        let planned = plan(&data, touched(&self.index).into_iter());
        let memory = snapshot.open_memory()?;
        let mut extents = self.stream(&memory, &snapshot.memory_path(), &planned)?;
        if layer_of(&self.index.manifest) == LayerKind::Diff {
            extents.extend(of(PageKind::Zero).map(|pages| Extent {
                pages,
                place: Place::Zero,
            }));
        }
        self.add_stream(pages.memory_size(), extents);
        Ok(())
    }

    fn disk(
        &mut self,
        snapshot: &Snapshot,
        file: &Path,
        size: ByteSize,
    ) -> Result<(), PackError<E>> {
        let path = snapshot.dir().join(file);
        let disk = snapshot.handle().open_file(file, Access::Read)?;
        let data = data_pages(&disk, size).at("read", &path)?;
        let planned = plan(&data, std::iter::empty());
        let extents = self.stream(&disk, &path, &planned)?;
        self.add_stream(size, extents);
        Ok(())
    }

    fn add_stream(&mut self, size: ByteSize, mut extents: Vec<Extent>) {
        extents.sort_by_key(|extent| extent.pages.first);
        self.index.streams.push(Stream { size, extents });
    }

    /// Packs the planned chunks of a file; tells where its pages are.
    fn stream(
        &mut self,
        file: &File,
        path: &Path,
        planned: &[Planned],
    ) -> Result<Vec<Extent>, PackError<E>> {
        let mut extents = Vec::new();
        for batch in planned.chunks(BATCH) {
            let made = prepare(file, batch, &self.numbers, self.known).at("read", path)?;
            for (runs, made) in batch.iter().zip(made) {
                let chunk = self.place(made)?;
                let mut at = 0;
                for &pages in runs {
                    let place = Place::Chunk { chunk, at };
                    extents.push(Extent { pages, place });
                    at += u16::try_from(pages.count.get()).expect("a chunk is small");
                }
                self.pages_done += u64::from(at) * PAGE_SIZE;
            }
        }
        Ok(extents)
    }

    /// Gives a chunk its number, and its place in a pack if it has none.
    fn place(&mut self, made: Made) -> Result<u32, PackError<E>> {
        if let Some(&number) = self.numbers.get(&made.digest) {
            return Ok(number);
        }
        let number = small(self.index.chunks.len());
        self.numbers.insert(made.digest, number);
        if let Some(&Known { pack, chunk }) = self.known.by_digest.get(&made.digest) {
            let pack = self.pack_number(pack);
            self.index.chunks.push(Chunk { pack, ..chunk });
            return Ok(number);
        }
        let (codec, bytes) = made.packed.expect("only what is there is not compressed");
        self.index.chunks.push(Chunk {
            digest: made.digest,
            pack: OPEN,
            offset: small(self.open.len()),
            stored: small(bytes.len()),
            pages: made.pages,
            codec,
        });
        self.open.extend(bytes);
        if length(self.open.len()) >= PACK_SIZE {
            self.close()?;
        }
        Ok(number)
    }

    fn pack_number(&mut self, pack: PackRef) -> u32 {
        *self.packs.entry(pack.name).or_insert_with(|| {
            self.index.packs.push(pack);
            small(self.index.packs.len() - 1)
        })
    }

    fn close(&mut self) -> Result<(), PackError<E>> {
        if self.open.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.open);
        let is = PackRef {
            name: Digest::of(&bytes),
            size: small(bytes.len()),
        };
        let number = self.pack_number(is);
        for chunk in &mut self.index.chunks[self.first_open..] {
            if chunk.pack == OPEN {
                chunk.pack = number;
            }
        }
        self.first_open = self.index.chunks.len();
        let pages_done = ByteSize::new(self.pages_done);
        (self.put)(Pack {
            is,
            bytes,
            pages_done,
        })
        .map_err(PackError::Put)
    }

    fn finish(mut self) -> Result<Index, PackError<E>> {
        self.close()?;
        Ok(self.index)
    }
}

/// Stands for the pack that has no number yet.
const OPEN: u32 = u32::MAX;

/// A chunk that was read.
struct Made {
    digest: Digest,
    pages: u16,
    /// None if it is somewhere already.
    packed: Option<(Codec, Vec<u8>)>,
}

/// Reads, hashes and compresses chunks, each CPU its share; not those that are in the index or elsewhere already.
fn prepare(
    file: &File,
    batch: &[Planned],
    numbers: &HashMap<Digest, u32>,
    known: &KnownChunks,
) -> io::Result<Vec<Made>> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let share = batch.len().div_ceil(threads).max(1);
    let one = |runs: &Planned| {
        let raw = read(file, runs)?;
        let digest = Digest::of(&raw);
        let is_there = numbers.contains_key(&digest) || known.by_digest.contains_key(&digest);
        Ok(Made {
            digest,
            pages: u16::try_from(length(raw.len()) / PAGE_SIZE).expect("a chunk is small"),
            packed: if is_there { None } else { Some(encode(&raw)?) },
        })
    };
    thread::scope(|scope| {
        let shares: Vec<_> = batch
            .chunks(share)
            .map(|share| scope.spawn(move || share.iter().map(one).collect::<io::Result<Vec<_>>>()))
            .collect();
        let mut made = Vec::with_capacity(batch.len());
        for share in shares {
            made.extend(share.join().expect("packing does not panic")?);
        }
        Ok(made)
    })
}

fn small(n: usize) -> u32 {
    u32::try_from(n).expect("packs are small, and chunks fewer than 2^32")
}

/// The pages of a chunk; beyond the end of the file zeros.
fn read(file: &File, runs: &Planned) -> io::Result<Vec<u8>> {
    let pages: u64 = runs.iter().map(|run| run.count.get()).sum();
    let mut raw = vec![0; index(pages * PAGE_SIZE)];
    let mut rest = raw.as_mut_slice();
    for run in runs {
        let (mut now, later) = rest.split_at_mut(index(run.count.bytes().get()));
        rest = later;
        let mut at = run.first.offset().get();
        while !now.is_empty() {
            match file.read_at(now, at) {
                // A disk need not end with a page.
                Ok(0) => break,
                Ok(n) => {
                    now = &mut now[n..];
                    at += length(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(raw)
}

/// The pages of a file that are not zeros.
fn data_pages(file: &File, size: ByteSize) -> io::Result<Vec<PageRange>> {
    let mut found: Vec<PageRange> = Vec::new();
    let mut block = vec![0; index(BLOCK_SIZE)];
    let mut at = 0;
    while let Some(data) = next_data(file, at, size.get())? {
        let mut start = (data.start / PAGE_SIZE * PAGE_SIZE).max(at);
        while start < data.end {
            let wanted = index(BLOCK_SIZE.min(size.get() - start));
            block.fill(0);
            file.read_exact_at(&mut block[..wanted], start)?;
            for (page, bytes) in (start / PAGE_SIZE..).zip(block.as_chunks::<4096>().0) {
                if *bytes == [0; 4096] {
                    continue;
                }
                match found.last_mut() {
                    Some(run) if run.end().get() == page => {
                        run.count = PageCount::new(run.count.get() + 1);
                    }
                    _ => found.push(PageRange {
                        first: PageNumber::new(page),
                        count: PageCount::new(1),
                    }),
                }
            }
            start += BLOCK_SIZE;
        }
        at = start;
    }
    Ok(found)
}

/// The pages of the working set, in order, in pages of 4 KiB.
fn touched(of: &Index) -> Vec<u64> {
    let bytes = of.working_set.as_slice();
    let Ok(set) = working_set::WorkingSet::parse(bytes) else {
        return Vec::new();
    };
    let small = set.page_size() / PAGE_SIZE;
    set.touched()
        .iter()
        .flat_map(|touched| touched.page * small..(touched.page + 1) * small)
        .collect()
}

fn read_whole(snapshot: &Snapshot, name: &str) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    let mut file = snapshot.handle().open_file(name, Access::Read)?;
    file.read_to_end(&mut bytes)
        .at("read", &snapshot.dir().join(name))?;
    Ok(bytes)
}

/// The working set, if there is a sound one: it is a hint.
fn read_working_set(snapshot: &Snapshot) -> Vec<u8> {
    let memory = &snapshot.manifest().memory;
    let (page, size) = (memory.page_size.get(), memory.size.get());
    match working_set::read_for(&snapshot.working_set_path(), page, size / page) {
        Ok(Some(set)) => set.to_bytes(),
        _ => Vec::new(),
    }
}
