//! Directories: entries one after another, none across the end of a block.

use crate::ext4::number::{Numbered, Numbers};
use crate::spool::{BLOCK, length};
use crate::tree::{Body, InodeId, Tree};

/// What an entry says about a directory.
const DIRECTORY: u8 = 2;

/// How many blocks a directory takes.
pub(super) fn blocks(tree: &Tree, directory: InodeId) -> u64 {
    let mut at = entry_size(1) + entry_size(2);
    for (name, _) in tree.names(directory) {
        let size = entry_size(name.len());
        if at % BLOCK + size > BLOCK || at.is_multiple_of(BLOCK) {
            at = at.next_multiple_of(BLOCK);
        }
        at += size;
    }
    length(at.div_ceil(BLOCK))
}

/// A directory's blocks.
pub(super) fn bytes(tree: &Tree, numbers: &Numbers, directory: &Numbered) -> Vec<u8> {
    let mut packer = Packer {
        bytes: Vec::new(),
        last: 0,
    };
    packer.add(b".", directory.number, DIRECTORY);
    packer.add(b"..", directory.parent, DIRECTORY);
    for (name, id) in tree.names(directory.id) {
        packer.add(name, numbers.number(id), kind(&tree.inode(id).body));
    }
    packer.end_block();
    packer.bytes
}

/// Inode, lengths and kind, the name, up to a multiple of 4.
fn entry_size(name: usize) -> usize {
    (8 + name).next_multiple_of(4)
}

fn kind(body: &Body) -> u8 {
    match body {
        Body::File(_) => 1,
        Body::Directory(_) => DIRECTORY,
        Body::Character(_) => 3,
        Body::Block(_) => 4,
        Body::Fifo => 5,
        Body::Symlink(_) => 7,
    }
}

struct Packer {
    bytes: Vec<u8>,
    /// Where the last entry begins.
    last: usize,
}

impl Packer {
    fn add(&mut self, name: &[u8], inode: u32, kind: u8) {
        let size = entry_size(name.len());
        if self.bytes.len() % BLOCK + size > BLOCK {
            self.end_block();
        }
        self.last = self.bytes.len();
        self.bytes.extend_from_slice(&inode.to_le_bytes());
        self.bytes.extend_from_slice(&[0, 0]);
        // A name has 255 bytes at the most.
        self.bytes.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        self.bytes.push(kind);
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.last + size, 0);
        self.set_length(size);
    }

    /// The last entry takes what is left of the block.
    fn end_block(&mut self) {
        let end = self.bytes.len().next_multiple_of(BLOCK);
        self.set_length(end - self.last);
        self.bytes.resize(end, 0);
    }

    fn set_length(&mut self, size: usize) {
        // A block at the most.
        let size = u16::try_from(size).unwrap_or_default();
        self.bytes[self.last + 4..self.last + 6].copy_from_slice(&size.to_le_bytes());
    }
}
