//! Writing an index.

use super::{Index, MAGIC, NO_CHUNK, Place, VERSION};
use crate::digest::Digest;
use crate::manifest::ManifestError;
use crate::unit::{PAGE_SIZE, length};

impl Index {
    /// The bytes of the index.
    ///
    /// # Errors
    /// If its manifest cannot be written.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let manifest = self.manifest.to_bytes()?;
        let mut out = Vec::new();
        out.extend(MAGIC);
        let page = u32::try_from(PAGE_SIZE).expect("a page is small");
        let count = |n: usize| u32::try_from(n).expect("a snapshot has fewer than 2^32 of them");
        for field in [
            VERSION,
            page,
            count(self.packs.len()),
            count(self.chunks.len()),
            count(self.streams.len()),
            count(manifest.len()),
            count(self.vmstate.len()),
            count(self.working_set.len()),
        ] {
            out.extend(field.to_le_bytes());
        }
        out.resize(super::HEADER, 0);
        for pack in &self.packs {
            out.extend(pack.name.as_bytes());
            out.extend(u64::from(pack.size).to_le_bytes());
        }
        for chunk in &self.chunks {
            out.extend(chunk.digest.as_bytes());
            for field in [chunk.pack, chunk.offset, chunk.stored] {
                out.extend(field.to_le_bytes());
            }
            out.extend(chunk.pages.to_le_bytes());
            out.extend(chunk.codec.code().to_le_bytes());
        }
        for stream in &self.streams {
            out.extend(stream.size.get().to_le_bytes());
            out.extend(length(stream.extents.len()).to_le_bytes());
        }
        self.write_extents(&mut out);
        out.extend(manifest);
        out.extend(&self.vmstate);
        out.extend(&self.working_set);
        let checksum = Digest::of(&out);
        out.extend(checksum.as_bytes());
        Ok(out)
    }

    fn write_extents(&self, out: &mut Vec<u8>) {
        // A memory has at most 4 TiB, which is 2^30 pages.
        let small = |n: u64| u32::try_from(n).expect("fewer than 2^32 pages");
        for extent in self.streams.iter().flat_map(|stream| &stream.extents) {
            let (chunk, at) = match extent.place {
                Place::Zero => (NO_CHUNK, 0),
                Place::Chunk { chunk, at } => (chunk, at),
            };
            for field in [
                small(extent.pages.first.get()),
                small(extent.pages.count.get()),
                chunk,
                u32::from(at),
            ] {
                out.extend(field.to_le_bytes());
            }
        }
    }
}
