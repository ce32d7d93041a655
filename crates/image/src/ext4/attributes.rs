//! Extended attributes: behind the inode's fields if they fit, else in a block of their own.
//!
//! ```text
//! entries, sorted ──> … 0 0 0 0 …  free  … <── values
//! ```

use crate::ext4::Ext4Error;
use crate::spool::BLOCK;
use crate::tree::Meta;

const MAGIC: u32 = 0xea02_0000;
/// Behind the fields of an inode of 256 bytes.
const INLINE: usize = 96;
/// Before the entries in a block.
const BLOCK_HEADER: usize = 32;
/// Prefixes are numbers on disk.
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];

/// The extended attributes of an inode, as bytes.
pub(super) enum Attributes {
    /// For the space behind the inode's fields; nothing if there are none.
    Inline(Vec<u8>),
    /// A block.
    Block(Vec<u8>),
}

struct Attribute<'a> {
    prefix: u8,
    name: &'a [u8],
    value: &'a [u8],
}

impl Attributes {
    pub(super) fn of(meta: &Meta) -> Result<Self, Ext4Error> {
        let mut attributes = Vec::new();
        for (full, value) in &meta.xattrs {
            // Others are no part of an image.
            let named = |(prefix, number): &(&[u8], u8)| {
                full.strip_prefix(*prefix).map(|name| (*number, name))
            };
            if let Some((prefix, name)) = PREFIXES.iter().find_map(named) {
                if name.is_empty() || name.len() > 255 {
                    return Err(Ext4Error::Attributes);
                }
                attributes.push(Attribute {
                    prefix,
                    name,
                    value,
                });
            }
        }
        if attributes.is_empty() {
            return Ok(Self::Inline(Vec::new()));
        }
        attributes.sort_by_key(|a| (a.prefix, a.name.len(), a.name));
        let entries = attributes.iter().map(Attribute::entry_size).sum::<usize>() + 4;
        let size = entries + attributes.iter().map(Attribute::value_size).sum::<usize>();
        if 4 + size <= INLINE {
            let mut bytes = vec![0; INLINE];
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            // Offsets are counted from the first entry, and hashes are not asked for here.
            place(&attributes, &mut bytes[4..], 0, |_| 0);
            return Ok(Self::Inline(bytes));
        }
        if BLOCK_HEADER + size > BLOCK {
            return Err(Ext4Error::Attributes);
        }
        let mut bytes = vec![0; BLOCK];
        for (at, word) in [(0, MAGIC), (4, 1), (8, 1), (12, block_hash(&attributes))] {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        place(&attributes, &mut bytes, BLOCK_HEADER, |attribute| {
            attribute.hash()
        });
        Ok(Self::Block(bytes))
    }
}

/// Writes entries from `first` on and values from the end.
fn place(
    attributes: &[Attribute<'_>],
    bytes: &mut [u8],
    first: usize,
    hash: impl Fn(&Attribute<'_>) -> u32,
) {
    let (mut at, mut end) = (first, bytes.len());
    for attribute in attributes {
        end -= attribute.value_size();
        bytes[end..end + attribute.value.len()].copy_from_slice(attribute.value);
        // All of it is within a block.
        let offset = match attribute.value {
            [] => 0,
            _ => u16::try_from(end).unwrap_or_default(),
        };
        let size = u32::try_from(attribute.value.len()).unwrap_or_default();
        bytes[at] = u8::try_from(attribute.name.len()).unwrap_or_default();
        bytes[at + 1] = attribute.prefix;
        bytes[at + 2..at + 4].copy_from_slice(&offset.to_le_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&size.to_le_bytes());
        bytes[at + 12..at + 16].copy_from_slice(&hash(attribute).to_le_bytes());
        bytes[at + 16..at + 16 + attribute.name.len()].copy_from_slice(attribute.name);
        at += attribute.entry_size();
    }
}

impl Attribute<'_> {
    fn entry_size(&self) -> usize {
        (16 + self.name.len()).next_multiple_of(4)
    }

    fn value_size(&self) -> usize {
        self.value.len().next_multiple_of(4)
    }

    /// `ext4_xattr_hash_entry` of the kernel.
    fn hash(&self) -> u32 {
        let name = self
            .name
            .iter()
            .fold(0_u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
        self.value.chunks(4).fold(name, |hash, chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            hash.rotate_left(16) ^ u32::from_le_bytes(word)
        })
    }
}

/// `ext4_xattr_rehash` of the kernel.
fn block_hash(attributes: &[Attribute<'_>]) -> u32 {
    let hashes = attributes.iter().map(Attribute::hash);
    hashes.fold(0_u32, |hash, of_one| hash.rotate_left(16) ^ of_one)
}
