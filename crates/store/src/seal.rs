//! Turning a memory file, as Firecracker wrote it, into a layer: what its pages are, and its digests.
//!
//! ```text
//! holes ──► kinds ──┬─ thread 1: read the data; pages of zeros become zero, blocks get their digests
//!                   └─ thread 2: the digest of the whole file
//! then, and only then, long runs of zeros become holes
//! ```

use crate::digest::{self, Digest};
use crate::pages::{LayerKind, PageKind, Pages, PagesError};
use crate::sparse::{next_data, punch};
use crate::unit::{BLOCK_SIZE, ByteSize, PAGE_SIZE, PageCount, PageNumber, PageRange, index};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;

/// What reading a memory file told about it.
pub(crate) struct Scanned {
    pub(crate) pages: Pages,
    /// Of the blocks with data, in order.
    pub(crate) blocks: Vec<Digest>,
    pub(crate) whole: Digest,
}

/// Reads a memory file. `removed` pages are zero in a Diff where the file has no data for them.
pub(crate) fn scan(
    memory: &File,
    layer: LayerKind,
    size: ByteSize,
    removed: &[PageRange],
) -> Result<Scanned, PagesError> {
    let mut pages = Pages::new(layer, size)?;
    for page in removed
        .iter()
        .flat_map(|range| range.first.get()..range.end().get())
    {
        if page >= pages.len().get() {
            return Err(PagesError::Header {
                field: "removed page",
                value: page,
            });
        }
        pages.set(PageNumber::new(page), PageKind::Zero);
    }
    mark_data(memory, &mut pages)?;
    read(memory, pages).map_err(PagesError::Read)
}

/// Reads the data of a memory file whose pages are known, but for pages of zeros among the data.
pub(crate) fn read(memory: &File, mut pages: Pages) -> io::Result<Scanned> {
    let size = pages.memory_size();
    let (blocks, whole) = thread::scope(|scope| {
        let whole = scope.spawn(|| digest::of_file(memory, size));
        let blocks = read_data(memory, &mut pages);
        (blocks, whole.join().expect("hashing a file does not panic"))
    });
    Ok(Scanned {
        pages,
        blocks: blocks?,
        whole: whole?,
    })
}

// Every page that the file has data for is data, until it is read.
fn mark_data(memory: &File, pages: &mut Pages) -> io::Result<()> {
    let end = pages.memory_size().get();
    let mut at = 0;
    while let Some(data) = next_data(memory, at, end)? {
        at = data.end;
        for page in data.start / PAGE_SIZE..data.end.div_ceil(PAGE_SIZE) {
            pages.set(PageNumber::new(page), PageKind::Data);
        }
    }
    Ok(())
}

// Reads each block with data once: its pages of zeros become zero, and if any data is left it gets a digest.
fn read_data(memory: &File, pages: &mut Pages) -> io::Result<Vec<Digest>> {
    let blocks: Vec<u64> = pages.data_blocks().map(|block| block.get()).collect();
    let mut digests = Vec::with_capacity(blocks.len());
    let mut buffer = [0; 64 * 1024];
    for start in blocks {
        let len = BLOCK_SIZE.min(pages.memory_size().get() - start);
        let block = &mut buffer[..index(len)];
        memory.read_exact_at(block, start)?;
        let mut data = false;
        for (page, bytes) in (start / PAGE_SIZE..).zip(block.as_chunks::<4096>().0) {
            let page = PageNumber::new(page);
            match pages.kind(page) {
                Some(PageKind::Data) if *bytes == [0; 4096] => pages.set(page, PageKind::Zero),
                Some(PageKind::Data) => data = true,
                _ => {}
            }
        }
        if data {
            digests.push(Digest::of(block));
        }
    }
    Ok(digests)
}

// The shortest run of zeros that is worth a hole. Each hole costs the file system a change of its metadata, and
// where it discards, the disk one too: 65,536 holes of a page held up a snapshot of 512 MiB for 18 s (ext4).
const SHORTEST_HOLE: PageCount = PageCount::new(16);

/// Turns the runs of zeros in a memory file into holes, but for short ones.
pub(crate) fn punch_zeros(memory: &File, pages: &Pages) -> io::Result<()> {
    let zeros = pages
        .runs()
        .filter(|run| run.kind == PageKind::Zero && run.count >= SHORTEST_HOLE);
    for run in zeros {
        let start = run.first.offset().get();
        let end = start + run.count.bytes().get();
        // What is a hole already needs no call, and in a Full that is most of it.
        let mut at = start;
        while let Some(data) = next_data(memory, at, end)? {
            at = data.end;
            punch(memory, data)?;
        }
    }
    Ok(())
}

const _: () = assert!(
    PAGE_SIZE == 4096 && BLOCK_SIZE == 65536,
    "the buffers above are a page and a block"
);
