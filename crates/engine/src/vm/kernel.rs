//! What kind of kernel a file holds, from its first bytes: refused early is understood early.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use object::elf::{EM_X86_64, FileHeader64, PT_LOAD};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, ReadRef};

/// What a kernel file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Linux kernel, told by its ELF notes.
    Linux,
    /// Another ELF program: a bare-metal guest, a unikernel.
    Other,
}

/// Why a file is no kernel that Firecracker can start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// It cannot be read.
    #[error("the kernel {path} cannot be read")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A compressed Linux kernel.
    #[error(
        "the kernel {path} is a compressed Linux kernel (bzImage); Firecracker before 1.17 needs the ELF \
         inside it (vmlinux), `rekindle setup` unpacks Debian's"
    )]
    Compressed {
        /// The file.
        path: PathBuf,
    },
    /// Anything else.
    #[error("the kernel {path} is not an x86-64 ELF program: {reason}")]
    NotElf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// Where the boot protocol's magic number stands in a bzImage.
const BZIMAGE_MAGIC_OFFSET: usize = 0x202;

/// Refuses what Firecracker cannot start, and says what the rest is.
pub fn check(path: &Path) -> Result<Kind, KernelError> {
    let io = |source| KernelError::Io {
        path: path.into(),
        source,
    };
    let not_elf = |reason| KernelError::NotElf {
        path: path.into(),
        reason,
    };
    let mut file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let mut start = [0; BZIMAGE_MAGIC_OFFSET + 4];
    let read = read_up_to(&mut file, &mut start).map_err(io)?;
    if read == start.len() && &start[BZIMAGE_MAGIC_OFFSET..] == b"HdrS" {
        return Err(KernelError::Compressed { path: path.into() });
    }
    if !start[..read].starts_with(b"\x7fELF") {
        return Err(not_elf("it does not begin with an ELF header"));
    }
    let cache = ReadCache::new(file);
    let header = FileHeader64::<Endianness>::parse(&cache)
        .map_err(|_| not_elf("its ELF header is damaged or not 64-bit"))?;
    let endian = header
        .endian()
        .map_err(|_| not_elf("its byte order is unknown"))?;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(not_elf("it was built for another kind of processor"));
    }
    let segments = header
        .program_headers(endian, &cache)
        .map_err(|_| not_elf("its program headers are cut off"))?;
    let mut loads = false;
    let mut linux = false;
    for segment in segments {
        let (offset, size) = segment.file_range(endian);
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(not_elf(
                "it is truncated: a segment ends behind the end of the file",
            ));
        }
        loads |= segment.p_type(endian) == PT_LOAD && size > 0;
        linux |= has_linux_note(segment, endian, &cache);
    }
    if !loads {
        return Err(not_elf("it has nothing to load"));
    }
    Ok(if linux { Kind::Linux } else { Kind::Other })
}

/// Linux's vmlinux has notes of its own, and the entry points that Xen's PVH boot looks for.
fn has_linux_note<'data>(
    segment: &object::elf::ProgramHeader64<Endianness>,
    endian: Endianness,
    data: impl ReadRef<'data>,
) -> bool {
    let Ok(Some(mut notes)) = segment.notes(endian, data) else {
        return false;
    };
    while let Ok(Some(note)) = notes.next() {
        if matches!(note.name(), b"Linux" | b"Xen") {
            return true;
        }
    }
    false
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_bytes(bytes: &[u8]) -> Result<Kind, KernelError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        check(file.path())
    }

    /// An ELF header with one PT_LOAD of four bytes.
    fn elf() -> Vec<u8> {
        let mut b = vec![0; 64 + 56 + 4];
        b[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        b[16] = 2;
        b[18] = 62;
        b[20] = 1;
        b[32] = 64;
        b[52] = 64;
        b[54] = 56;
        b[56] = 1;
        b[64] = 1;
        b[64 + 8] = 120;
        b[64 + 32] = 4;
        b[64 + 40] = 4;
        b
    }

    #[test]
    fn a_plain_elf_is_no_linux() {
        assert_eq!(check_bytes(&elf()).unwrap(), Kind::Other);
    }

    #[test]
    fn a_truncated_elf_is_refused() {
        let whole = elf();
        for length in [0, 3, 16, 63, 70, 119, 123] {
            assert!(check_bytes(&whole[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_bzimage_is_named_as_such() {
        let mut image = vec![0; 4096];
        image[BZIMAGE_MAGIC_OFFSET..BZIMAGE_MAGIC_OFFSET + 4].copy_from_slice(b"HdrS");
        assert!(matches!(
            check_bytes(&image),
            Err(KernelError::Compressed { .. })
        ));
    }

    #[test]
    fn another_processors_elf_is_refused() {
        let mut image = elf();
        image[18] = 183;
        assert!(matches!(
            check_bytes(&image),
            Err(KernelError::NotElf { .. })
        ));
    }
}
