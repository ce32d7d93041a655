//! Files with holes in tar archives of the POSIX kind: GNU tar's form 1.0.
//!
//! ```text
//! extended header: GNU.sparse.major=1 minor=0 name=… realsize=…
//! contents:        "2\n0\n4096\n1048576\n4096\n" up to a multiple of 512, then the data of these two stretches
//! ```
//!
//! From GNU tar's manual, "Storing Sparse Files"; the older forms 0.0 and 0.1, which nothing has written by default
//! since 2006, are refused. The `tar` crate reads the GNU kind itself.

use std::io::{self, Read};

/// How many stretches of data a file may have.
const MAX_STRETCHES: u64 = 1 << 20;

/// What the extended headers say about holes.
#[derive(Debug, Default)]
pub(crate) struct Said {
    major: Option<Vec<u8>>,
    minor: Option<Vec<u8>>,
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
}

impl Said {
    /// Takes in one header, its key without `GNU.sparse.`.
    pub(crate) fn hear(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        match key {
            b"major" => self.major = Some(value.to_owned()),
            b"minor" => self.minor = Some(value.to_owned()),
            b"name" => self.name = Some(value.to_owned()),
            b"realsize" => self.size = Some(number(value)?),
            _ => {
                return Err(invalid(
                    "its holes are written in a form of old; pack it again",
                ));
            }
        }
        Ok(())
    }

    /// Whether it is a form that can be read, or there is none.
    pub(crate) fn check(&self) -> io::Result<()> {
        match (&self.major, &self.minor, self.size) {
            (None, None, None) if self.name.is_none() => Ok(()),
            (Some(major), Some(minor), Some(_)) if major == b"1" && minor == b"0" => Ok(()),
            _ => Err(invalid("its holes are written in an unknown form")),
        }
    }
}

/// A file with its holes as zeros.
pub(crate) struct Whole<R> {
    stream: R,
    /// Stretches of data, the next one last.
    stretches: Vec<(u64, u64)>,
    at: u64,
    size: u64,
}

impl<R: Read> Whole<R> {
    pub(crate) fn new(mut stream: R, size: u64) -> io::Result<Self> {
        let mut map = Map {
            stream: &mut stream,
            read: 0,
        };
        let count = map.number()?;
        if count > MAX_STRETCHES {
            return Err(invalid("it has too many holes"));
        }
        let mut stretches = Vec::new();
        let mut end = 0;
        for _ in 0..count {
            let (start, length) = (map.number()?, map.number()?);
            let next = start.checked_add(length);
            if start < end || next.is_none_or(|next| next > size) {
                return Err(invalid(
                    "its stretches of data overlap or go beyond its end",
                ));
            }
            end = next.unwrap_or(end);
            stretches.push((start, length));
        }
        map.skip_padding()?;
        stretches.reverse();
        Ok(Self {
            stream,
            stretches,
            at: 0,
            size,
        })
    }
}

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self
            .stretches
            .last()
            .is_some_and(|(start, length)| start + length <= self.at)
        {
            self.stretches.pop();
        }
        let (data_start, data_length) = self.stretches.last().copied().unwrap_or((self.size, 0));
        let is_hole = self.at < data_start;
        let end = if is_hole {
            data_start
        } else {
            data_start + data_length
        };
        let wanted = usize::try_from(end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let wanted = wanted.min(buffer.len());
        let read = if is_hole {
            buffer[..wanted].fill(0);
            wanted
        } else {
            self.stream.read(&mut buffer[..wanted])?
        };
        if read == 0 && wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += crate::spool::length(read);
        Ok(read)
    }
}

/// The numbers at the beginning of the contents, one a line.
struct Map<'a, R> {
    stream: &'a mut R,
    read: usize,
}

impl<R: Read> Map<'_, R> {
    fn number(&mut self) -> io::Result<u64> {
        let mut digits = Vec::new();
        loop {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            self.read += 1;
            match byte[0] {
                b'\n' => return number(&digits),
                byte if digits.len() < 20 => digits.push(byte),
                _ => return Err(invalid("its list of holes is damaged")),
            }
        }
    }

    fn skip_padding(&mut self) -> io::Result<()> {
        let mut padding = vec![0; self.read.next_multiple_of(512) - self.read];
        self.stream.read_exact(&mut padding)
    }
}

fn number(text: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(text)
        .ok()
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| invalid("its list of holes is damaged"))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
