//! From Debian's `vmlinuz` to the ELF `vmlinux` that Firecracker boots.
//!
//! ```text
//! bzImage:  setup sectors │ decompressor │ payload ([vmlinux] compressed, its length) │ …
//!           0x1f1 setup_sects   0x248 payload_offset   0x24c payload_length
//! ```
//!
//! The setup header (the kernel's `Documentation/arch/x86/boot.rst`) says where the payload is;
//! its first bytes say how it is compressed. But for gzip, which has one of its own, the build
//! appends the uncompressed length, which is compared.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;

const BOOT_SECTOR: usize = 512;
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// A legacy LZ4 chunk unpacks to at most that.
const LZ4_LEGACY_CHUNK: usize = 8 << 20;
/// No kernel is as large; a payload that unpacks to more is damaged.
const LARGEST_KERNEL: u64 = 512 << 20;

/// Unpacks a bzImage to the ELF inside; an ELF is passed through.
///
/// # Errors
/// When the image is neither, when it is cut short or damaged, or when it is compressed in a way
/// other than LZ4, gzip, zstd and xz.
pub(crate) fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    if image.starts_with(b"\x7fELF") {
        return Ok(image.to_vec());
    }
    let elf = decompress(payload(image)?).context("cannot unpack the kernel's payload")?;
    ensure!(
        elf.starts_with(b"\x7fELF"),
        "the kernel's payload is no ELF image"
    );
    Ok(elf)
}

fn payload(image: &[u8]) -> Result<&[u8]> {
    ensure!(
        image.get(0x202..0x206) == Some(b"HdrS"),
        "it is neither an ELF kernel nor a bzImage"
    );
    let word = |at: usize| -> Result<usize> {
        let bytes = image
            .get(at..at + 4)
            .context("the kernel's header is cut short")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    let setup_sectors = match image[0x1f1] {
        // For historical reasons (boot.rst).
        0 => 4,
        n => usize::from(n),
    };
    let start = (setup_sectors + 1) * BOOT_SECTOR + word(0x248)?;
    let end = start + word(0x24c)?;
    image.get(start..end).with_context(|| {
        format!(
            "the kernel is cut short: {} bytes instead of at least {end}",
            image.len()
        )
    })
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => without_length(payload, lz4_legacy),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => without_length(payload, |packed| {
            read_all(ruzstd::decoding::StreamingDecoder::new(packed)?)
        }),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => without_length(payload, xz),
        [0x1f, 0x8b, ..] => read_all(GzDecoder::new(payload)),
        _ => bail!(
            "it is compressed in an unknown way (it begins {:02x?})",
            &payload[..payload.len().min(6)]
        ),
    }
}

/// Unpacks an xz file in memory.
pub(crate) fn xz(packed: &[u8]) -> Result<Vec<u8>> {
    read_all(lzma_rust2::XzReader::new(packed, false))
}

fn read_all(reader: impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(LARGEST_KERNEL).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Splits the length off the end, unpacks the rest, and compares.
fn without_length(payload: &[u8], unpack: impl Fn(&[u8]) -> Result<Vec<u8>>) -> Result<Vec<u8>> {
    let (packed, length) = payload.split_last_chunk::<4>().context("it is empty")?;
    let bytes = unpack(packed)?;
    let length = usize::try_from(u32::from_le_bytes(*length))?;
    ensure!(
        bytes.len() == length,
        "it unpacks to {} bytes instead of {length}",
        bytes.len()
    );
    Ok(bytes)
}

/// The format of `lz4 -l`: a magic number, then chunks with their packed length before them.
fn lz4_legacy(packed: &[u8]) -> Result<Vec<u8>> {
    let mut rest = packed
        .strip_prefix(&LZ4_LEGACY_MAGIC)
        .context("no legacy LZ4")?;
    let mut bytes = Vec::new();
    let mut chunk = vec![0; LZ4_LEGACY_CHUNK];
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk::<4>().context("it is cut short")?;
        let length = usize::try_from(u32::from_le_bytes(*length))?;
        let (block, after) = after.split_at_checked(length).context("it is cut short")?;
        let n = lz4_flex::block::decompress_into(block, &mut chunk)?;
        bytes.extend_from_slice(&chunk[..n]);
        rest = after;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// A bzImage of two setup sectors and 100 bytes of decompressor around `payload`.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * BOOT_SECTOR + 100];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&100u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0xcc; 64]);
        image
    }

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend((0..9u32 << 20).map(|i| (i / 3).to_le_bytes()[0]));
        elf
    }

    fn with_length(mut packed: Vec<u8>, length: usize) -> Vec<u8> {
        packed.extend(u32::try_from(length).unwrap().to_le_bytes());
        packed
    }

    /// Literals only: a token of 15 literals, 255s, the rest; valid as the last sequence.
    fn lz4_block(bytes: &[u8]) -> Vec<u8> {
        let more = bytes
            .len()
            .checked_sub(15)
            .expect("a test's block has 15 bytes");
        let mut block = vec![0xf0];
        block.extend(std::iter::repeat_n(255, more / 255));
        block.push(u8::try_from(more % 255).unwrap());
        block.extend_from_slice(bytes);
        block
    }

    fn lz4_legacy_file(bytes: &[u8]) -> Vec<u8> {
        let mut file = LZ4_LEGACY_MAGIC.to_vec();
        for chunk in bytes.chunks(LZ4_LEGACY_CHUNK) {
            let block = lz4_block(chunk);
            file.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            file.extend(block);
        }
        file
    }

    fn through(program: &str, args: &[&str], input: &[u8]) -> Option<Vec<u8>> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        output.status.success().then_some(output.stdout)
    }

    #[test]
    fn legacy_lz4_of_several_chunks_unpacks() {
        let elf = elf();
        let payload = with_length(lz4_legacy_file(&elf), elf.len());
        assert!(vmlinux(&bzimage(&payload)).unwrap() == elf);
    }

    #[test]
    fn gzip_carries_its_own_length() {
        let elf = elf();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&elf).unwrap();
        assert!(vmlinux(&bzimage(&gzip.finish().unwrap())).unwrap() == elf);
    }

    #[test]
    fn xz_and_zstd_as_the_kernel_build_packs_them_unpack() {
        let elf = elf();
        let programs: [(&str, &[&str]); 2] = [
            ("xz", &["--check=crc32", "--x86", "--lzma2=preset=1"]),
            ("zstd", &["-q", "-19", "--single-thread"]),
        ];
        for (program, args) in programs {
            let Some(packed) = through(program, args, &elf) else {
                println!("SKIPPED unpacking a kernel packed by {program}: no such program here");
                continue;
            };
            let payload = with_length(packed, elf.len());
            assert!(vmlinux(&bzimage(&payload)).unwrap() == elf, "{program}");
        }
    }

    #[test]
    fn a_wrong_length_is_noticed() {
        let elf = elf();
        let payload = with_length(lz4_legacy_file(&elf), elf.len() + 1);
        let refusal = vmlinux(&bzimage(&payload)).unwrap_err();
        assert!(format!("{refusal:#}").contains("instead of"), "{refusal:#}");
    }

    #[test]
    fn cut_short_unknown_and_other_files_are_refused() {
        let image = bzimage(&with_length(lz4_legacy_file(&elf()), elf().len()));
        let cut = format!("{:#}", vmlinux(&image[..image.len() / 2]).unwrap_err());
        assert!(cut.contains("cut short"), "{cut}");
        let unknown = format!("{:#}", vmlinux(&bzimage(b"LZMAlzma")).unwrap_err());
        assert!(unknown.contains("unknown way"), "{unknown}");
        let other = format!("{:#}", vmlinux(b"#!/bin/sh\n").unwrap_err());
        assert!(other.contains("neither"), "{other}");
        let no_elf = with_length(lz4_legacy_file(b"this is no program"), 18);
        let no_elf = format!("{:#}", vmlinux(&bzimage(&no_elf)).unwrap_err());
        assert!(no_elf.contains("no ELF"), "{no_elf}");
    }

    #[test]
    fn an_elf_kernel_is_taken_as_it_is() {
        assert_eq!(vmlinux(b"\x7fELF and so on").unwrap(), b"\x7fELF and so on");
    }
}
