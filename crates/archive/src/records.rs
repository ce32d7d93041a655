//! The stream: records to bytes, and a stranger's bytes to records.
//!
//! ```text
//!   "rekindle-tree 1\n" │ record │ record │ …
//!
//!   1 directory   meta │ name                2 leave
//!   3 file        meta │ name                4 data      u64 offset │ u32 length │ bytes
//!   5 file ends   u64 size                   6 link      meta │ name │ target
//!   7 skipped     u8 what │ name
//!
//!   meta: u16 mode │ u32 uid │ u32 gid │ i64 seconds │ u32 nanoseconds      name, target: u16 length │ bytes
//! ```
//! All numbers are little-endian.

use std::io::{self, BufReader, BufWriter, Read, Write};

use thiserror::Error;

use crate::record::{MAX_DATA, MAX_NAME, MAX_TARGET, Meta, Name, Record, Special};

const MAGIC: &[u8; 16] = b"rekindle-tree 1\n";
const DIRECTORY: u8 = 1;
const LEAVE: u8 = 2;
const FILE: u8 = 3;
const DATA: u8 = 4;
const FILE_END: u8 = 5;
const LINK: u8 = 6;
const SKIPPED: u8 = 7;

/// Room for a record of data and what is before it.
const BUFFER: usize = 2 * MAX_DATA;

/// What is wrong with a stream.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// It cannot be read.
    #[error("what is copied cannot be received")]
    Read(#[source] io::Error),
    /// It ends too early: whoever sends was killed, or has failed.
    #[error("the copy breaks off")]
    Truncated,
    /// It is none, or one of another version.
    #[error("what came is no copy of a file or tree, or is one that this version does not know")]
    NoCopy,
    /// It says what no sender says.
    #[error("what came is no sound copy: {0}")]
    Nonsense(&'static str),
}

/// Writes records.
#[derive(Debug)]
pub struct Writer<W: Write> {
    to: BufWriter<W>,
}

impl<W: Write> Writer<W> {
    /// A stream, with its beginning.
    pub fn new(to: W) -> io::Result<Writer<W>> {
        let mut to = BufWriter::with_capacity(BUFFER, to);
        to.write_all(MAGIC)?;
        Ok(Writer { to })
    }

    /// One more record.
    pub fn put(&mut self, record: &Record<'_>) -> io::Result<()> {
        match record {
            Record::Directory { name, meta } => self.entry(DIRECTORY, name.as_ref(), meta),
            Record::Leave => self.to.write_all(&[LEAVE]),
            Record::File { name, meta } => self.entry(FILE, name.as_ref(), meta),
            Record::Data { offset, bytes } => {
                self.to.write_all(&[DATA])?;
                self.to.write_all(&offset.to_le_bytes())?;
                let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
                self.to.write_all(&length.to_le_bytes())?;
                self.to.write_all(bytes)
            }
            Record::FileEnd { size } => {
                self.to.write_all(&[FILE_END])?;
                self.to.write_all(&size.to_le_bytes())
            }
            Record::Link { name, meta, target } => {
                self.entry(LINK, name.as_ref(), meta)?;
                self.text(target)
            }
            Record::Skipped { name, what } => {
                let what = match what {
                    Special::Socket => 0,
                    Special::Fifo => 1,
                    Special::Device => 2,
                };
                self.to.write_all(&[SKIPPED, what])?;
                self.text(name.as_bytes())
            }
        }
    }

    /// Passes on what is still here.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    fn entry(&mut self, kind: u8, name: Option<&Name>, meta: &Meta) -> io::Result<()> {
        self.to.write_all(&[kind])?;
        let mode = u16::try_from(meta.mode).map_err(io::Error::other)?;
        self.to.write_all(&mode.to_le_bytes())?;
        self.to.write_all(&meta.uid.to_le_bytes())?;
        self.to.write_all(&meta.gid.to_le_bytes())?;
        self.to.write_all(&meta.seconds.to_le_bytes())?;
        self.to.write_all(&meta.nanoseconds.to_le_bytes())?;
        self.text(name.map_or(&[], Name::as_bytes))
    }

    fn text(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
        self.to.write_all(&length.to_le_bytes())?;
        self.to.write_all(bytes)
    }
}

/// Reads records. It needs as much memory as the longest one, however long the stream is.
#[derive(Debug)]
pub struct Records<R: Read> {
    from: BufReader<R>,
    data: Vec<u8>,
}

impl<R: Read> Records<R> {
    /// A stream, whose beginning is read.
    pub fn new(from: R) -> Result<Records<R>, StreamError> {
        let mut records = Records {
            from: BufReader::with_capacity(BUFFER, from),
            data: vec![0; MAX_DATA],
        };
        match &records.array::<16>()? {
            MAGIC => Ok(records),
            _ => Err(StreamError::NoCopy),
        }
    }

    /// The next record. That there is none is an error: a tree says itself where it ends.
    pub fn next_record(&mut self) -> Result<Record<'_>, StreamError> {
        let [kind] = self.array()?;
        Ok(match kind {
            DIRECTORY => {
                let (name, meta) = self.entry()?;
                Record::Directory { name, meta }
            }
            LEAVE => Record::Leave,
            FILE => {
                let (name, meta) = self.entry()?;
                Record::File { name, meta }
            }
            DATA => return self.data(),
            FILE_END => Record::FileEnd {
                size: u64::from_le_bytes(self.array()?),
            },
            LINK => {
                let (name, meta) = self.entry()?;
                let target = self.text(MAX_TARGET)?;
                if target.is_empty() || target.contains(&0) {
                    return Err(StreamError::Nonsense("a link that leads nowhere"));
                }
                Record::Link { name, meta, target }
            }
            SKIPPED => {
                let what = match self.array()? {
                    [0] => Special::Socket,
                    [1] => Special::Fifo,
                    [2] => Special::Device,
                    _ => return Err(StreamError::Nonsense("something unknown was left out")),
                };
                let name = self.name()?.ok_or(NAMELESS)?;
                Record::Skipped { name, what }
            }
            _ => return Err(StreamError::Nonsense("a record of no known kind")),
        })
    }

    /// Sees to it that nothing follows.
    pub fn finish(mut self) -> Result<(), StreamError> {
        loop {
            match self.from.read(&mut self.data) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(StreamError::Nonsense("more than one file or tree")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StreamError::Read(error)),
            }
        }
    }

    fn data(&mut self) -> Result<Record<'_>, StreamError> {
        let offset = u64::from_le_bytes(self.array()?);
        let length = usize::try_from(u32::from_le_bytes(self.array()?)).unwrap_or(usize::MAX);
        if length == 0 || length > MAX_DATA {
            return Err(StreamError::Nonsense("data of a length that none has"));
        }
        self.from
            .read_exact(&mut self.data[..length])
            .map_err(broken)?;
        let bytes = &self.data[..length];
        Ok(Record::Data { offset, bytes })
    }

    fn entry(&mut self) -> Result<(Option<Name>, Meta), StreamError> {
        let meta = Meta {
            mode: u32::from(u16::from_le_bytes(self.array()?)),
            uid: u32::from_le_bytes(self.array()?),
            gid: u32::from_le_bytes(self.array()?),
            seconds: i64::from_le_bytes(self.array()?),
            nanoseconds: u32::from_le_bytes(self.array()?),
        };
        if meta.mode > 0o7777 || meta.nanoseconds >= 1_000_000_000 {
            return Err(StreamError::Nonsense("a mode or a time that nothing has"));
        }
        Ok((self.name()?, meta))
    }

    fn name(&mut self) -> Result<Option<Name>, StreamError> {
        let bytes = self.text(MAX_NAME)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let name = Name::new(&bytes);
        name.map(Some)
            .map_err(|_| StreamError::Nonsense("an entry with a name that none can have"))
    }

    fn text(&mut self, most: usize) -> Result<Vec<u8>, StreamError> {
        let length = usize::from(u16::from_le_bytes(self.array()?));
        if length > most {
            return Err(StreamError::Nonsense("a name or a link that is too long"));
        }
        let mut bytes = vec![0; length];
        self.from.read_exact(&mut bytes).map_err(broken)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(broken)?;
        Ok(bytes)
    }
}

/// What an entry without a name is, where it needs one.
pub(crate) const NAMELESS: StreamError = StreamError::Nonsense("an entry without a name");

fn broken(error: io::Error) -> StreamError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => StreamError::Truncated,
        _ => StreamError::Read(error),
    }
}
