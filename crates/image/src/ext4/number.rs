//! Which number each inode gets, and how many names it has.

use crate::ext4::Ext4Error;
use crate::tree::{Body, InodeId, ROOT, Tree};

/// The number of the root directory.
pub(super) const ROOT_NUMBER: u32 = 2;
/// The first number that is not reserved.
pub(super) const FIRST: u32 = 11;
/// What the kernel allows.
const MAX_LINKS: u32 = 65_000;

/// An inode that is written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numbered {
    pub(super) id: InodeId,
    pub(super) number: u32,
    pub(super) links: u32,
    /// The number of the first directory that names it: of a directory, the only one.
    pub(super) parent: u32,
}

/// All inodes that have a name, by number.
pub(super) struct Numbers {
    inodes: Vec<Numbered>,
    /// Where in `inodes` each inode of the tree is.
    places: std::collections::HashMap<InodeId, usize>,
}

impl Numbers {
    pub(super) fn of(tree: &Tree) -> Result<Self, Ext4Error> {
        let root = Numbered {
            id: ROOT,
            number: ROOT_NUMBER,
            links: 2,
            parent: ROOT_NUMBER,
        };
        let mut numbers = Self {
            inodes: vec![root],
            places: std::iter::once((ROOT, 0)).collect(),
        };
        numbers.visit(tree, ROOT);
        for numbered in &mut numbers.inodes {
            let is_directory = matches!(tree.inode(numbered.id).body, Body::Directory(_));
            if is_directory && numbered.links >= MAX_LINKS {
                // With `dir_nlink` that means "many".
                numbered.links = 1;
            }
            if numbered.links > MAX_LINKS {
                let links = numbered.links;
                return Err(Ext4Error::TooManyLinks { links });
            }
        }
        Ok(numbers)
    }

    // As deep as the tree allows directories to be.
    fn visit(&mut self, tree: &Tree, directory: InodeId) {
        for (_, id) in tree.names(directory) {
            let is_directory = matches!(tree.inode(id).body, Body::Directory(_));
            let place = *self.places.entry(id).or_insert(self.inodes.len());
            if place == self.inodes.len() {
                // Two million inodes at the most.
                let number = u32::try_from(place - 1).unwrap_or(u32::MAX - FIRST) + FIRST;
                self.inodes.push(Numbered {
                    id,
                    number,
                    links: 0,
                    parent: self.number(directory),
                });
            }
            self.inodes[place].links += if is_directory { 2 } else { 1 };
            if is_directory {
                // Its `..`.
                let parent = self.places[&directory];
                self.inodes[parent].links += 1;
                self.visit(tree, id);
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Numbered> {
        self.inodes.iter()
    }

    pub(super) fn number(&self, id: InodeId) -> u32 {
        self.inodes[self.places[&id]].number
    }

    /// How many numbers are taken, reserved ones included: all from 1 on.
    pub(super) fn used(&self) -> u32 {
        self.inodes
            .last()
            .map_or(FIRST - 1, |last| last.number.max(FIRST - 1))
    }
}
