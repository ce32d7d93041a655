//! Streams that may be compressed: which way is seen in their first bytes.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::errors::FrameDecoderError;
use ruzstd::decoding::errors::ReadFrameHeaderError::SkipFrame;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// What zstd skips, the lowest of 16 such numbers.
const ZSTD_SKIPPED: u32 = 0x184d_2a50;
/// More memory than this no decoder may take: what `zstd --ultra -22 --long=27` and `xz -9` want.
const WINDOW: u64 = 128 << 20;

/// The stream, unpacked if it is packed by gzip, xz or zstd.
///
/// # Errors
/// What reading its beginning gives.
pub(crate) fn decompress<'a>(mut stream: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut head = Vec::new();
    stream.by_ref().take(6).read_to_end(&mut head)?;
    let packed = BufReader::with_capacity(128 * 1024, Cursor::new(head.clone()).chain(stream));
    Ok(if head.starts_with(GZIP) {
        Box::new(MultiGzDecoder::new(packed))
    } else if head.starts_with(XZ) {
        let kib = u32::try_from(WINDOW / 1024).unwrap_or(u32::MAX);
        Box::new(XzReader::new_mem_limit(packed, true, kib))
    } else if head.starts_with(ZSTD) || is_skipped(&head) {
        Box::new(Zstd::new(packed))
    } else {
        Box::new(packed)
    })
}

fn is_skipped(head: &[u8]) -> bool {
    head.first_chunk()
        .is_some_and(|head| u32::from_le_bytes(*head) & !0xf == ZSTD_SKIPPED)
}

/// All frames of a zstd stream, one after another; the decoder itself knows only one.
struct Zstd<R> {
    packed: R,
    decoder: FrameDecoder,
    at: Place,
}

enum Place {
    BetweenFrames,
    InFrame,
}

impl<R: BufRead> Zstd<R> {
    fn new(packed: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(WINDOW);
        Self {
            packed,
            decoder,
            at: Place::BetweenFrames,
        }
    }

    /// Begins the next frame; `false` at the end of the stream.
    fn begin(&mut self) -> io::Result<bool> {
        while !self.packed.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.packed) {
                Ok(()) => {
                    self.at = Place::InFrame;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(SkipFrame { length, .. })) => {
                    let length = u64::from(length);
                    let mut skipped = self.packed.by_ref().take(length);
                    if io::copy(&mut skipped, &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(invalid(error)),
            }
        }
        Ok(false)
    }

    fn end(&mut self) -> io::Result<()> {
        let said = self.decoder.get_checksum_from_data();
        if said.is_some() && said != self.decoder.get_calculated_checksum() {
            return Err(invalid(
                "a zstd frame's checksum is not that of its contents",
            ));
        }
        self.at = Place::BetweenFrames;
        Ok(())
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.at {
                Place::BetweenFrames => {
                    if !self.begin()? {
                        return Ok(0);
                    }
                }
                Place::InFrame if self.decoder.can_collect() > 0 => {
                    return self.decoder.read(buffer);
                }
                Place::InFrame if self.decoder.is_finished() => self.end()?,
                Place::InFrame => {
                    let strategy = BlockDecodingStrategy::UptoBlocks(1);
                    self.decoder
                        .decode_blocks(&mut self.packed, strategy)
                        .map_err(invalid)?;
                }
            }
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn unpacked(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        decompress(packed)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn each_kind_is_unpacked_and_what_is_none_stays_as_it_is() {
        let text = b"the same bytes, again and again ".repeat(10_000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        assert_eq!(unpacked(&gzip.finish().unwrap()).unwrap(), text);
        let options = lzma_rust2::XzOptions::with_preset(1);
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        xz.write_all(&text).unwrap();
        assert_eq!(unpacked(&xz.finish().unwrap()).unwrap(), text);
        assert_eq!(unpacked(&zstd(&text)).unwrap(), text);
        assert_eq!(unpacked(&text).unwrap(), text);
        assert_eq!(unpacked(b"").unwrap(), b"");
    }

    #[test]
    fn a_zstd_stream_has_all_its_frames_and_not_what_is_to_be_skipped() {
        let skipped = [
            &0x184d_2a53_u32.to_le_bytes()[..],
            &3_u32.to_le_bytes(),
            b"xyz",
        ]
        .concat();
        let stream = [
            skipped.clone(),
            zstd(b"one "),
            skipped.clone(),
            zstd(b"two"),
        ]
        .concat();
        assert_eq!(unpacked(&stream).unwrap(), b"one two");
        let cut = [zstd(b"one"), skipped[..10].to_vec()].concat();
        assert!(unpacked(&cut).is_err());
    }

    #[test]
    fn a_stream_that_was_cut_off_is_an_error() {
        let text = b"0123456789".repeat(100_000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        for packed in [gzip.finish().unwrap(), zstd(&text)] {
            assert!(unpacked(&packed[..packed.len() - 9]).is_err());
        }
    }
}
