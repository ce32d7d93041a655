//! Writes a [`Tree`] as an ext4 file system: nothing is mounted, no program run, and the same tree gives the same bytes.
//!
//! ```text
//! block 0      1 …                                                     next             end
//! superblock │ groups │ block bitmaps │ inode bitmaps │ inode tables │ files, in order │ free │
//!              and at the start of groups 1, 3, 5, 7, 9, 25, 27, …: copies of the first two
//! ```
//!
//! Blocks of 4 KiB, inodes of 256 bytes, extents, bitmaps and tables of all groups together at the front (`flex_bg`).
//! There is no journal and there are no checksums: an image is read, and what a VM writes goes elsewhere. What is not
//! data is a hole in the file. Inodes are numbered, and files laid out, in the order of a walk with sorted names; the
//! UUID is a hash of all that is in the file system. `docs/decisions` has why this is not left to `mke2fs`.
//!
//! The form is that of the kernel's `Documentation/filesystems/ext4`.

mod attributes;
mod bytes;
mod directory;
mod extents;
mod inode;
mod layout;
mod number;
mod superblock;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;
use thiserror::Error;

use crate::spool::{BLOCK, Contents, Spool, length};
use crate::tree::{Body, Inode, Layer, Meta, Tree, TreeError};
use attributes::Attributes;
use extents::Extent;
use inode::Raw;
use layout::{Allocator, Layout, Needs};
use number::{Numbered, Numbers};

/// The largest file system that is written, in bytes.
pub(crate) const MAX_SIZE: u64 = 1 << 40;

/// Why a tree cannot be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Ext4Error {
    /// The image cannot be written, or the contents not be read back.
    #[error("cannot write the file system")]
    Io(#[from] io::Error),
    /// The file system of the host is full.
    #[error("no space left on this host to write the file system")]
    NoSpace,
    /// It would be larger than is supported.
    #[error("the file system would have {size} bytes, and {MAX_SIZE} is the most")]
    TooLarge {
        /// How large.
        size: u64,
    },
    /// A file has more names than an inode can count.
    #[error("a file has {links} names, and ext4 has room for 65000")]
    TooManyLinks {
        /// How many.
        links: u32,
    },
    /// Extended attributes do not fit into a block.
    #[error("the extended attributes of a file do not fit into a block")]
    Attributes,
    /// The tree has something else where ext4 wants a directory.
    #[error("lost+found cannot be made")]
    LostFound(#[source] TreeError),
}

/// What is asked for beside the contents.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    /// At least this many bytes in all; more if the contents want it.
    pub min_size: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// How large the file system is, in bytes.
    pub size: u64,
}

/// Writes `tree` into the empty `file`.
///
/// # Errors
/// An [`Ext4Error`]; the file is of no use then.
pub(crate) fn write(
    mut tree: Tree,
    spool: &Spool,
    file: &File,
    options: Options,
) -> Result<Written, Ext4Error> {
    if tree.find(b"lost+found").is_none() {
        let lost = Inode {
            body: Body::Directory(std::collections::BTreeMap::new()),
            meta: Meta::root(0o700),
        };
        tree.put(b"lost+found", lost, Layer(0))
            .map_err(Ext4Error::LostFound)?;
    }
    let numbers = Numbers::of(&tree)?;
    let mut needs = Needs::new(numbers.used());
    for numbered in numbers.iter() {
        needs.blocks += blocks_wanted(&tree, numbered)?;
    }
    let (layout, allocator) = Layout::new(&needs, options.min_size)?;
    file.set_len(layout.size())?;
    let mut writer = Writer {
        tree: &tree,
        numbers: &numbers,
        spool,
        file,
        layout,
        allocator,
        hasher: blake3::Hasher::new(),
    };
    writer.write().map_err(|error| match error {
        Ext4Error::Io(source) if is_full(&source) => Ext4Error::NoSpace,
        other => other,
    })?;
    Ok(Written {
        size: writer.layout.size(),
    })
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// A bound on the blocks that a file takes beside its inode.
fn blocks_wanted(tree: &Tree, numbered: &Numbered) -> Result<u64, Ext4Error> {
    let inode = tree.inode(numbered.id);
    let data = match &inode.body {
        Body::Directory(_) => directory::blocks(tree, numbered.id),
        Body::File(contents) => {
            let blocks = contents.runs.iter().map(|run| run.blocks).sum::<u64>();
            blocks + extents::tree_blocks_bound(length(contents.runs.len()), blocks)
        }
        Body::Symlink(target) if target.len() >= inode::FAST_SYMLINK => 1,
        _ => 0,
    };
    let attributes = match Attributes::of(&inode.meta)? {
        Attributes::Block(_) => 1,
        Attributes::Inline(_) => 0,
    };
    Ok(data + attributes)
}

struct Writer<'a> {
    tree: &'a Tree,
    numbers: &'a Numbers,
    spool: &'a Spool,
    file: &'a File,
    layout: Layout,
    allocator: Allocator,
    /// Over all inodes and their contents.
    hasher: blake3::Hasher,
}

impl Writer<'_> {
    fn write(&mut self) -> Result<(), Ext4Error> {
        let per_group = self.layout.inodes_per_group();
        let mut table = Vec::new();
        let mut group = 0;
        // Inode 1 stands first; those below the first of ours, but for the root, are empty.
        let mut next = 1;
        for numbered in self.numbers.iter() {
            let raw = self.inode(numbered)?;
            self.hasher.update(&numbered.number.to_le_bytes());
            self.hasher.update(&raw);
            while (numbered.number - 1) / per_group > group {
                self.flush(&mut table, group)?;
                group += 1;
                next = group * per_group + 1;
            }
            let empty = usize::try_from(numbered.number - next).unwrap_or_default();
            table.resize(table.len() + empty * inode::SIZE, 0);
            table.extend_from_slice(&raw);
            next = numbered.number + 1;
        }
        self.flush(&mut table, group)?;
        self.groups()
    }

    fn flush(&self, table: &mut Vec<u8>, group: u32) -> io::Result<()> {
        self.write_block(self.layout.inode_table(group), table)?;
        table.clear();
        Ok(())
    }

    fn groups(&mut self) -> Result<(), Ext4Error> {
        let uuid = self.uuid();
        let mut free = Vec::new();
        for group in 0..self.layout.groups() {
            let bitmap = self.layout.block_bitmap(group, &self.allocator);
            free.push(bitmap.iter().map(|byte| byte.count_zeros()).sum());
            self.write_block(self.layout.block_bitmap_at(group), &bitmap)?;
            let bitmap = self.layout.inode_bitmap(group, self.numbers.used());
            self.write_block(self.layout.inode_bitmap_at(group), &bitmap)?;
        }
        let table = superblock::group_table(&self.layout, &free, self.numbers, self.tree);
        for group in self.layout.copies() {
            let first = self.layout.first_block(group);
            let superblock = superblock::superblock(&self.layout, &free, self.numbers, uuid, group);
            let at = if group == 0 {
                1024
            } else {
                first * length(BLOCK)
            };
            self.file.write_all_at(&superblock, at)?;
            self.write_block(first + 1, &table)?;
        }
        Ok(())
    }

    /// A UUID of the version for one's own schemes (RFC 9562, version 8).
    fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.hasher.finalize().as_bytes()[..16]);
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }

    /// Writes what a file has beside its inode, and returns the inode.
    fn inode(&mut self, numbered: &Numbered) -> Result<[u8; inode::SIZE], Ext4Error> {
        let inode = self.tree.inode(numbered.id);
        let mut raw = Raw::new(inode, numbered.links);
        match &inode.body {
            Body::Directory(_) => {
                let bytes = directory::bytes(self.tree, self.numbers, numbered);
                self.hasher.update(&bytes);
                self.small(&mut raw, &bytes)?;
            }
            Body::Symlink(target) if target.len() < inode::FAST_SYMLINK => raw.symlink(target),
            Body::Symlink(target) => {
                self.hasher.update(target);
                self.small(&mut raw, target)?;
            }
            Body::File(contents) => self.contents(&mut raw, contents)?,
            Body::Character(device) | Body::Block(device) => raw.device(*device),
            Body::Fifo => {}
        }
        match Attributes::of(&inode.meta)? {
            Attributes::Inline(bytes) => raw.attributes(&bytes),
            Attributes::Block(bytes) => {
                self.hasher.update(&bytes);
                let (block, _) = self.allocator.take(1)?;
                self.write_block(block, &bytes)?;
                raw.attribute_block(block);
            }
        }
        Ok(raw.finish())
    }

    /// Contents that are at hand.
    fn small(&mut self, raw: &mut Raw, bytes: &[u8]) -> Result<(), Ext4Error> {
        let blocks = length(bytes.len().div_ceil(BLOCK));
        let mut extents = Vec::new();
        self.allocate(0, blocks, &mut extents, |writer, extent, done| {
            let from = usize::try_from(done).unwrap_or_default() * BLOCK;
            let to = (from + usize::try_from(extent.blocks).unwrap_or_default() * BLOCK)
                .min(bytes.len());
            writer.write_block(extent.start, &bytes[from..to])
        })?;
        self.extents(raw, &extents)?;
        raw.size(length(bytes.len()));
        Ok(())
    }

    fn contents(&mut self, raw: &mut Raw, contents: &Contents) -> Result<(), Ext4Error> {
        self.hasher.update(&contents.hash);
        let mut extents = Vec::new();
        for run in &contents.runs {
            self.allocate(
                run.file_block,
                run.blocks,
                &mut extents,
                |writer, extent, done| {
                    writer.copy(run.spool_block + done, extent.start, extent.blocks)
                },
            )?;
        }
        self.extents(raw, &extents)?;
        raw.size(contents.size);
        Ok(())
    }

    /// Takes blocks for a stretch of a file and has each piece written; `write` learns how many blocks went before.
    fn allocate(
        &mut self,
        file_block: u64,
        blocks: u64,
        extents: &mut Vec<Extent>,
        write: impl Fn(&Self, Extent, u64) -> io::Result<()>,
    ) -> Result<(), Ext4Error> {
        let mut done = 0;
        while done < blocks {
            let (start, got) = self
                .allocator
                .take((blocks - done).min(extents::MAX_LENGTH))?;
            let extent = Extent {
                file_block: file_block + done,
                start,
                blocks: got,
            };
            write(self, extent, done)?;
            extents.push(extent);
            done += got;
        }
        Ok(())
    }

    fn extents(&mut self, raw: &mut Raw, extents: &[Extent]) -> Result<(), Ext4Error> {
        let tree = extents::Root::build(extents, || Ok(self.allocator.take(1)?.0))?;
        for (block, bytes) in &tree.blocks {
            self.write_block(*block, bytes)?;
        }
        let data = extents.iter().map(|extent| extent.blocks).sum::<u64>();
        raw.extents(&tree.root, data + length(tree.blocks.len()));
        Ok(())
    }

    fn write_block(&self, block: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, block * length(BLOCK))
    }

    /// From the spool into the image, in the kernel where it can.
    fn copy(&self, from: u64, to: u64, blocks: u64) -> io::Result<()> {
        let block = length(BLOCK);
        let (mut from, mut to, end) = (from * block, to * block, (from + blocks) * block);
        let spool = self.spool.file();
        while from < end {
            let wanted = usize::try_from(end - from).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(
                spool,
                Some(&mut from),
                self.file,
                Some(&mut to),
                wanted,
            ) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    let mut bytes = vec![0; wanted.min(1 << 20)];
                    spool.read_exact_at(&mut bytes, from)?;
                    self.file.write_all_at(&bytes, to)?;
                    from += length(bytes.len());
                    to += length(bytes.len());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
