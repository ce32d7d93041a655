//! Frames: what a stream is cut into.
//!
//! ```text
//!   u32 length of the rest │ u8 kind │ …
//!                            0 message: JSON
//!                            1 data:  u8 stream │ u64 offset │ bytes
//!                            2 end:   u8 stream │ u64 offset
//!                            3 ack:   u8 stream │ u64 offset
//! ```
//! All numbers are little-endian.

use thiserror::Error;

/// The most bytes of data in one frame.
pub const MAX_DATA: usize = 64 << 10;

/// The most bytes of a frame behind its length. A message needs as much as a program's arguments and environment.
pub const MAX_FRAME: usize = 1 << 20;

const LENGTH: usize = 4;
const MESSAGE: u8 = 0;
const DATA: u8 = 1;
const END: u8 = 2;
const ACK: u8 = 3;

/// One of a program's three streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// What it reads.
    Stdin,
    /// What it writes. On a terminal it is all there is.
    Stdout,
    /// What it complains.
    Stderr,
}

impl Stream {
    fn number(self) -> u8 {
        match self {
            Stream::Stdin => 0,
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        }
    }

    fn of(number: u8) -> Option<Stream> {
        match number {
            0 => Some(Stream::Stdin),
            1 => Some(Stream::Stdout),
            2 => Some(Stream::Stderr),
            _ => None,
        }
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A message, as JSON.
    Message(Vec<u8>),
    /// Bytes of a stream.
    Data {
        /// Which.
        stream: Stream,
        /// How many bytes of it came before these.
        offset: u64,
        /// 1 to [`MAX_DATA`] bytes.
        bytes: Vec<u8>,
    },
    /// A stream ends.
    End {
        /// Which.
        stream: Stream,
        /// How many bytes it has.
        offset: u64,
    },
    /// What came before is not needed again.
    Ack {
        /// Of which stream.
        stream: Stream,
        /// How many bytes were taken.
        offset: u64,
    },
}

/// What is wrong with a frame. The stream that it came through is of no use any more.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameError {
    /// It is longer than any frame.
    #[error("a frame of {length} bytes; the longest have {MAX_FRAME}")]
    TooLong {
        /// What it says.
        length: usize,
    },
    /// It is shorter than frames of its kind are, or longer.
    #[error("a frame of kind {kind} with {length} bytes")]
    Length {
        /// Its kind.
        kind: u8,
        /// Its length.
        length: usize,
    },
    /// It has no kind at all.
    #[error("an empty frame")]
    Empty,
    /// There is no such kind.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// There is no such stream.
    #[error("a frame for the unknown stream {0}")]
    Stream(u8),
}

impl Frame {
    /// The frame's bytes, appended.
    ///
    /// # Panics
    /// When it is longer than [`MAX_FRAME`], or has more than [`MAX_DATA`] bytes of data, or none.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([0; LENGTH]);
        match self {
            Frame::Message(json) => {
                out.push(MESSAGE);
                out.extend(json);
            }
            Frame::Data {
                stream,
                offset,
                bytes,
            } => {
                assert!(
                    (1..=MAX_DATA).contains(&bytes.len()),
                    "data of a wrong length"
                );
                head(out, DATA, *stream, *offset);
                out.extend(bytes);
            }
            Frame::End { stream, offset } => head(out, END, *stream, *offset),
            Frame::Ack { stream, offset } => head(out, ACK, *stream, *offset),
        }
        let length = out.len() - start - LENGTH;
        assert!(length <= MAX_FRAME, "a frame that is too long");
        let length = u32::try_from(length).expect("frames are short");
        out[start..start + LENGTH].copy_from_slice(&length.to_le_bytes());
    }

    /// A frame from what is behind its length.
    fn parse(body: &[u8]) -> Result<Frame, FrameError> {
        let (&kind, rest) = body.split_first().ok_or(FrameError::Empty)?;
        let wrong = || FrameError::Length {
            kind,
            length: body.len(),
        };
        if kind == MESSAGE {
            return Ok(Frame::Message(rest.to_vec()));
        }
        if kind > ACK {
            return Err(FrameError::Kind(kind));
        }
        let (&number, rest) = rest.split_first().ok_or_else(wrong)?;
        let stream = Stream::of(number).ok_or(FrameError::Stream(number))?;
        let (offset, bytes) = rest.split_first_chunk::<8>().ok_or_else(wrong)?;
        let offset = u64::from_le_bytes(*offset);
        match kind {
            DATA if (1..=MAX_DATA).contains(&bytes.len()) => Ok(Frame::Data {
                stream,
                offset,
                bytes: bytes.to_vec(),
            }),
            END if bytes.is_empty() => Ok(Frame::End { stream, offset }),
            ACK if bytes.is_empty() => Ok(Frame::Ack { stream, offset }),
            _ => Err(wrong()),
        }
    }
}

fn head(out: &mut Vec<u8>, kind: u8, stream: Stream, offset: u64) {
    out.push(kind);
    out.push(stream.number());
    out.extend(offset.to_le_bytes());
}

/// Finds frames in what comes in, in whatever pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
}

impl Decoder {
    /// Takes bytes as they come.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole frame; `None` if more has to come first.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((length, rest)) = self.pending.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        // Before anything of it is waited for, or kept.
        if length > MAX_FRAME {
            return Err(FrameError::TooLong { length });
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = Frame::parse(body)?;
        self.pending.drain(..LENGTH + length);
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(frame: &Frame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        bytes
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let stream = prop_oneof![
            Just(Stream::Stdin),
            Just(Stream::Stdout),
            Just(Stream::Stderr)
        ];
        let bytes = proptest::collection::vec(any::<u8>(), 1..300);
        (0..4u8, stream, any::<u64>(), bytes).prop_map(|(kind, stream, offset, bytes)| match kind {
            MESSAGE => Frame::Message(bytes),
            DATA => Frame::Data {
                stream,
                offset,
                bytes,
            },
            END => Frame::End { stream, offset },
            _ => Frame::Ack { stream, offset },
        })
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            sent in proptest::collection::vec(frames(), 1..8),
            cut in 1..40usize,
        ) {
            let bytes: Vec<u8> = sent.iter().flat_map(encoded).collect();
            let mut decoder = Decoder::default();
            let mut received = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.feed(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    received.push(frame);
                }
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            while let Ok(Some(frame)) = decoder.next_frame() {
                let again = encoded(&frame);
                prop_assert!(bytes.windows(again.len()).any(|window| window == again));
            }
        }
    }

    #[test]
    fn what_is_no_frame_is_told() {
        let read = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.feed(bytes);
            decoder.next_frame()
        };
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&[1, 0, 0]), Ok(None));
        assert_eq!(read(&[0, 0, 0, 0]), Err(FrameError::Empty));
        assert_eq!(read(&[1, 0, 0, 0, 9]), Err(FrameError::Kind(9)));
        assert_eq!(read(&[2, 0, 0, 0, DATA, 3]), Err(FrameError::Stream(3)));
        let length = |kind, length| Err(FrameError::Length { kind, length });
        assert_eq!(read(&[1, 0, 0, 0, DATA]), length(DATA, 1));
        assert_eq!(
            read(&[10, 0, 0, 0, DATA, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            length(DATA, 10)
        );
        assert_eq!(
            read(&[11, 0, 0, 0, ACK, 1, 0, 0, 0, 0, 0, 0, 0, 0, 5]),
            length(ACK, 11)
        );
        // Told before a single byte of it has come.
        assert_eq!(
            read(&[0, 0, 0, 0x80]),
            Err(FrameError::TooLong { length: 1 << 31 })
        );
    }

    #[test]
    fn what_the_fuzz_target_starts_from_is_understood() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/agent_frames");
        let mut seen = 0;
        for seed in std::fs::read_dir(seeds).unwrap() {
            let path = seed.unwrap().path();
            let mut decoder = Decoder::default();
            // The first byte says in which pieces the target cuts the rest.
            decoder.feed(&std::fs::read(&path).unwrap()[1..]);
            while let Some(frame) = decoder.next_frame().unwrap() {
                if let Frame::Message(json) = frame {
                    let host = crate::FromHost::parse(&json).is_ok();
                    let agent = crate::FromAgent::parse(&json).is_ok();
                    assert!(host || agent, "{}", path.display());
                }
            }
            assert!(decoder.pending.is_empty(), "{}", path.display());
            seen += 1;
        }
        assert!(seen >= 5);
    }
}
