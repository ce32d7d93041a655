//! Reading all of a snapshot, to find what a disk or a stranger changed.

use crate::digest::{self, Digest};
use crate::file::{Access, At, FileError};
use crate::manifest::FileRecord;
use crate::pages::PageKind;
use crate::snapshot::{MEMORY, OpenError, PAGES, Snapshot, VMSTATE};
use crate::sparse::next_data;
use crate::unit::{BLOCK_SIZE, ByteOffset, PAGE_SIZE, PageNumber, index};
use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use thiserror::Error;

/// What is wrong with a snapshot.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// A file is missing, cut off, or not what the manifest records.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A block of memory is not what it was.
    #[error("{} was damaged: the 64 KiB at offset {offset} are not those that were written", path.display())]
    Block {
        /// The memory file.
        path: PathBuf,
        /// Where the block starts.
        offset: ByteOffset,
    },
    /// A page that was zero, or the parent's, has something in it.
    #[error("{} was damaged: page {page} should be empty and is not", path.display())]
    Page {
        /// The memory file.
        path: PathBuf,
        /// The page.
        page: PageNumber,
    },
}

impl Snapshot {
    /// Reads everything and compares it with what was recorded; stops at the first thing that is wrong.
    ///
    /// Base images and files of the host are not part of a snapshot; of them, the size alone is known.
    ///
    /// # Errors
    /// A [`VerifyError`] that names the file, and in the memory the place, that is wrong.
    pub fn verify(&self) -> Result<(), VerifyError> {
        let files = self.manifest().files;
        self.check_contents(VMSTATE, files.vmstate)?;
        self.check_contents(PAGES, files.pages)?;
        self.verify_memory(files.memory)?;
        for (file, record) in self.manifest().layers() {
            self.check_disk(file, record)?;
        }
        Ok(())
    }

    fn verify_memory(&self, record: FileRecord) -> Result<(), VerifyError> {
        let path = self.memory_path();
        let memory = self.open_sized(MEMORY, record.size)?;
        let (places, whole) = thread::scope(|scope| {
            let whole = scope.spawn(|| digest::of_file(&memory, record.size));
            let places = self
                .verify_blocks(&memory, &path)
                .and_then(|()| self.verify_empty(&memory, &path));
            (places, whole.join().expect("hashing a file does not panic"))
        });
        places?;
        match whole.at("read", &path)? == record.blake3 {
            true => Ok(()),
            false => Err(OpenError::Damaged { path }.into()),
        }
    }

    fn verify_blocks(&self, memory: &File, path: &Path) -> Result<(), VerifyError> {
        let pages = BufReader::new(self.handle().open_file(PAGES, Access::Read)?);
        let mut buffer = [0; 64 * 1024];
        for item in self.pages().digests(pages) {
            let (offset, digest) = item.at("read", &self.dir().join(PAGES))?;
            let len = BLOCK_SIZE.min(self.pages().memory_size().get() - offset.get());
            let block = &mut buffer[..index(len)];
            memory.read_exact_at(block, offset.get()).at("read", path)?;
            if Digest::of(block) != digest {
                return Err(VerifyError::Block {
                    path: path.to_owned(),
                    offset,
                });
            }
        }
        Ok(())
    }

    fn verify_empty(&self, memory: &File, path: &Path) -> Result<(), VerifyError> {
        for run in self.pages().runs().filter(|run| run.kind != PageKind::Data) {
            let start = run.first.offset().get();
            let found =
                first_nonzero(memory, start, start + run.count.bytes().get()).at("read", path)?;
            if let Some(page) = found {
                return Err(VerifyError::Page {
                    path: path.to_owned(),
                    page,
                });
            }
        }
        Ok(())
    }
}

fn first_nonzero(file: &File, start: u64, end: u64) -> io::Result<Option<PageNumber>> {
    let mut page = [0; 4096];
    let mut at = start;
    while let Some(data) = next_data(file, at, end)? {
        at = data.end;
        for offset in (data.start / PAGE_SIZE * PAGE_SIZE..data.end).step_by(page.len()) {
            file.read_exact_at(&mut page, offset)?;
            if page != [0; 4096] {
                return Ok(Some(ByteOffset::new(offset).page()));
            }
        }
    }
    Ok(None)
}
