//! The snapshot that every contender restores, and where its memory file is: in the page cache or on the disk alone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use rekindle_pager::baseline::cached_pages;
use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::guest::{GATE, Guest};
use super::machine::{Machine, Place};

const PAGE: usize = 4096;
const CHUNK: usize = 1 << 20;

/// A guest before its open gate.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) vmstate: PathBuf,
    pub(super) memory: PathBuf,
    file: File,
    /// How many pages a pass changes.
    pub(super) pages: u32,
    pub(super) memory_mib: u32,
    /// How many pages hold anything but zeros; the others are holes.
    pub(super) data_pages: u64,
}

impl Image {
    /// Boots a guest and takes its snapshot.
    pub(super) fn take(place: &Place, name: &str, guest: &Guest) -> Result<Image> {
        let path = |ending: &str| place.dir().join(format!("{name}.{ending}"));
        let (vmstate, memory) = (path("vmstate"), path("memory"));
        Machine::start(place)?
            .boot(guest, &path("elf"), [&vmstate, &memory])
            .with_context(|| format!("cannot take a snapshot of the guest {name}"))?;
        let file = File::options().read(true).write(true).open(&memory)?;
        file.write_all_at(&[1], GATE.into())?;
        let data_pages = make_sparse(&file).context("cannot make holes in the memory file")?;
        ensure!(
            data_pages >= guest.pages.into(),
            "the guest {name} left {data_pages} pages, and should have changed {}",
            guest.pages
        );
        file.sync_all()?;
        Ok(Image {
            vmstate,
            memory,
            file,
            pages: guest.pages,
            memory_mib: guest.memory_mib,
            data_pages,
        })
    }

    /// Brings all data into the page cache.
    pub(super) fn warm(&self) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        loop {
            at = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => return Ok(()),
                found => found?,
            };
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(at))?;
            while at < hole {
                let most = usize::try_from(hole - at).map_or(CHUNK, |left| left.min(CHUNK));
                match self.file.read_at(&mut buffer[..most], at)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    n => at += length(n),
                }
            }
        }
    }

    /// Gives the room on the disk back at once, where it is much.
    pub(super) fn remove(&self) -> io::Result<()> {
        std::fs::remove_file(&self.memory)
    }

    /// Drops the file from the page cache, and tells how many of its pages are there nevertheless.
    pub(super) fn evict(&self) -> io::Result<usize> {
        self.file.sync_data()?;
        rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed)?;
        cached_pages(&self.file)
    }
}

/// Turns pages of zeros into holes, as the store does for a published snapshot; returns how many pages are left.
fn make_sparse(file: &File) -> Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut data = 0;
    let mut zeros: Option<u64> = None;
    let mut at = 0;
    loop {
        let n = file.read_at(&mut buffer, at)?;
        ensure!(n.is_multiple_of(PAGE), "the memory file ends within a page");
        if n == 0 {
            break;
        }
        for page in buffer[..n].chunks(PAGE) {
            if page.iter().all(|byte| *byte == 0) {
                zeros.get_or_insert(at);
            } else {
                data += 1;
                punch(file, zeros.take(), at)?;
            }
            at += length(PAGE);
        }
    }
    punch(file, zeros, at)?;
    Ok(data)
}

fn punch(file: &File, from: Option<u64>, to: u64) -> Result<(), Errno> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    from.map_or(Ok(()), |from| {
        rustix::fs::fallocate(file, mode, from, to - from)
    })
}

fn length(n: usize) -> u64 {
    u64::try_from(n).expect("a buffer's length")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn pages_of_zeros_become_holes_and_the_rest_stays() {
        let path = std::env::temp_dir().join(format!("rekindle-sparse-{}", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let file = file.unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut bytes = vec![0; 600 * PAGE];
        for page in [3, 4, 300] {
            bytes[page * PAGE + 7] = 1;
        }
        file.write_all_at(&bytes, 0).unwrap();
        assert_eq!(make_sparse(&file).unwrap(), 3);
        let mut after = vec![1; bytes.len()];
        file.read_exact_at(&mut after, 0).unwrap();
        assert!(after == bytes);
        assert!(file.metadata().unwrap().blocks() * 512 < length(bytes.len()));
    }
}
