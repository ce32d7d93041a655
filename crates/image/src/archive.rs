//! One tar stream, put on top of what is in a [`Tree`] already: a layer of an image, or all of it.
//!
//! ```text
//! tar entries ─┬─ .wh.NAME, .wh..wh..opq ─> what earlier layers put there goes
//!              ├─ contents ───────────────> Spool
//!              └─ the rest ───────────────> Tree
//! ```
//!
//! The archive is a stranger's. A name with `..` is refused, a leading `/` counts for nothing, and a name that leads
//! through a symbolic link of the image ends where the guest would find it, never in the host. How much may come is
//! bounded, also by what one entry may say about itself: the parser holds that in memory.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use tar::{Entry, EntryType, Header};
use thiserror::Error;

use crate::limits::Limits;
use crate::sparse;
use crate::spool::Spool;
use crate::tree::{Body, Device, Inode, Layer, Meta, Time, Tree, TreeError};

/// What an entry may say about itself in the headers before it, in bytes.
const MAX_HEADERS: u64 = 1 << 20;
/// The extended attributes of one file, in bytes: what ext4 has room for without an inode of their own.
const MAX_XATTRS: usize = 3072;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What other names with this beginning mean concerns a union file system of old.
const RESERVED: &[u8] = b".wh..wh.";
/// The namespaces of extended attributes that an image may set. Access lists (`system.`) have another form on disk.
const XATTRS: [&str; 3] = ["security.", "trusted.", "user."];
/// Overlayfs keeps its own notes in these, and believes them.
const OVERLAY_XATTRS: &str = "trusted.overlay.";

/// Why an archive cannot be an image, or a layer of one.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// It is no tar archive, or was cut off or damaged.
    #[error("the archive cannot be read after {entries} entries")]
    Read {
        /// How many were read before.
        entries: u64,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// One entry cannot be read.
    #[error("{path:?} in the archive cannot be read")]
    Entry {
        /// Its name.
        path: String,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// One entry cannot be put into a file system.
    #[error("{path:?} in the archive is refused")]
    Refused {
        /// Its name.
        path: String,
        /// Why.
        #[source]
        source: TreeError,
    },
    /// An entry is of a kind that no image has.
    #[error("{path:?} in the archive is of the kind {kind:?}, which no image has")]
    Kind {
        /// Its name.
        path: String,
        /// The kind.
        kind: char,
    },
    /// The extended attributes of a file do not fit into the image.
    #[error("{path:?} in the archive has more than {MAX_XATTRS} bytes of extended attributes")]
    Xattrs {
        /// Its name.
        path: String,
    },
    /// It has more entries than were allowed.
    #[error("the image has more than {limit} entries")]
    TooMany {
        /// How many were allowed.
        limit: u64,
    },
    /// It is larger than was allowed.
    #[error("the image is larger than {limit} bytes unpacked; --max-size allows more")]
    TooLarge {
        /// How large it may be.
        limit: u64,
    },
}

/// The layers of an image, coming one after another.
#[derive(Debug)]
pub(crate) struct Layers {
    tree: Tree,
    spool: Spool,
    limits: Limits,
    layer: Layer,
    entries: u64,
    bytes: u64,
}

impl Layers {
    /// None yet.
    #[must_use]
    pub(crate) fn new(spool: Spool, limits: Limits) -> Self {
        Self {
            tree: Tree::new(),
            spool,
            limits,
            layer: Layer(0),
            entries: 0,
            bytes: 0,
        }
    }

    /// What they add up to.
    #[must_use]
    pub(crate) fn into_parts(self) -> (Tree, Spool) {
        (self.tree, self.spool)
    }

    /// Puts a tar stream on top. It may go on after the archive's end: that is for [`Layers::skip_rest`].
    ///
    /// # Errors
    /// An [`ArchiveError`]; what came before it is in the tree then, which is of no more use.
    pub(crate) fn apply(&mut self, stream: impl Read) -> Result<(), ArchiveError> {
        self.next_layer();
        let mut headers = Headers::of(stream);
        headers.try_each(|entry| self.entry(entry))
    }

    /// Reads what stands behind the end of an archive.
    ///
    /// # Errors
    /// If it cannot be read, or is more than the image may have in all.
    pub(crate) fn skip_rest(&mut self, stream: &mut dyn Read) -> Result<(), ArchiveError> {
        let limit = self.limits.bytes;
        let mut rest = stream.take(limit.saturating_sub(self.bytes).saturating_add(1));
        let skipped =
            io::copy(&mut rest, &mut io::sink()).map_err(|source| ArchiveError::Read {
                entries: self.entries,
                source,
            })?;
        self.count(skipped)
    }

    pub(crate) fn next_layer(&mut self) {
        self.layer = Layer(self.layer.0 + 1);
    }

    /// Adds to how large the image is.
    fn count(&mut self, bytes: u64) -> Result<(), ArchiveError> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.limits.bytes {
            let limit = self.limits.bytes;
            return Err(ArchiveError::TooLarge { limit });
        }
        Ok(())
    }

    fn entry<R: Read>(&mut self, mut entry: Entry<'_, R>) -> Result<(), ArchiveError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            let limit = self.limits.entries;
            return Err(ArchiveError::TooMany { limit });
        }
        let mut path = entry.path_bytes().into_owned();
        let fail = |path: &[u8], source| ArchiveError::Entry {
            path: shown(path),
            source,
        };
        let said = Said::of(&mut entry).map_err(|e| fail(&path, e))?;
        if let Some(name) = &said.sparse.name {
            path.clone_from(name);
        }
        let kind = entry.header().entry_type();
        let done = if kind == EntryType::XGlobalHeader {
            // What it says is for all that follows, and nothing of it is for us.
            Ok(())
        } else if let Some((directory, name)) = whiteout(&path) {
            self.white_out(directory, name)
        } else if kind == EntryType::Link {
            let target = entry.link_name_bytes().unwrap_or_default().into_owned();
            return self.link(&path, &target);
        } else {
            let meta = meta(entry.header(), &said).map_err(|e| fail(&path, e))?;
            let body = self.body(&mut entry, &path, &said)?;
            self.put(&path, Inode { body, meta })?;
            Ok(())
        };
        done.map_err(|source| refused(&path, source))?;
        // A device with contents: they mean nothing, and are no part of the next entry's headers.
        io::copy(&mut entry, &mut io::sink()).map_err(|e| fail(&path, e))?;
        Ok(())
    }

    /// Gives a file another name.
    pub(crate) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), ArchiveError> {
        let linked = self.tree.link(path, target, self.layer);
        linked.map_err(|source| refused(path, source))
    }

    /// Puts a file on top.
    pub(crate) fn put(&mut self, path: &[u8], inode: Inode) -> Result<(), ArchiveError> {
        let sizes = inode
            .meta
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len() + 20);
        if sizes.sum::<usize>() > MAX_XATTRS {
            return Err(ArchiveError::Xattrs { path: shown(path) });
        }
        let put = self.tree.put(path, inode, self.layer);
        put.map_err(|source| refused(path, source))
    }

    /// Takes in the contents of a file, which has `size` bytes.
    pub(crate) fn contents_of(
        &mut self,
        stream: &mut dyn Read,
        size: u64,
        path: &[u8],
    ) -> Result<Body, ArchiveError> {
        self.count(size)?;
        let mut stream = stream.take(size);
        let added = self.spool.add(&mut stream).and_then(|contents| {
            if contents.size() < size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(contents)
        });
        added.map(Body::File).map_err(|source| ArchiveError::Entry {
            path: shown(path),
            source,
        })
    }

    fn white_out(&mut self, directory: &[u8], name: &[u8]) -> Result<(), TreeError> {
        if name == OPAQUE {
            return self.tree.white_out_below(directory, self.layer);
        }
        if name.starts_with(RESERVED) {
            return Ok(());
        }
        match &name[WHITEOUT.len()..] {
            b"" | b"." | b".." => Err(TreeError::BadName),
            name => {
                let path = [directory, name].concat();
                self.tree.white_out(&path, self.layer)
            }
        }
    }

    fn body<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        path: &[u8],
        said: &Said,
    ) -> Result<Body, ArchiveError> {
        let kind = entry.header().entry_type();
        let directory = || Body::Directory(std::collections::BTreeMap::new());
        Ok(match kind {
            EntryType::Directory => directory(),
            // Archives of old have no kind for directories.
            EntryType::Regular if path.ends_with(b"/") => directory(),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.contents(entry, path, &said.sparse)?
            }
            EntryType::Symlink => {
                Body::Symlink(entry.link_name_bytes().unwrap_or_default().into_owned())
            }
            EntryType::Char => Body::Character(device(entry.header(), path)?),
            EntryType::Block => Body::Block(device(entry.header(), path)?),
            EntryType::Fifo => Body::Fifo,
            kind => {
                return Err(ArchiveError::Kind {
                    path: shown(path),
                    kind: char::from(kind.as_byte()),
                });
            }
        })
    }

    fn contents<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        path: &[u8],
        sparse: &sparse::Said,
    ) -> Result<Body, ArchiveError> {
        let Some(size) = sparse.size else {
            let size = entry.size();
            return self.contents_of(entry, size, path);
        };
        let whole = sparse::Whole::new(entry, size).map_err(|source| ArchiveError::Entry {
            path: shown(path),
            source,
        });
        self.contents_of(&mut whole?, size, path)
    }
}

/// A name, for people.
fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn refused(path: &[u8], source: TreeError) -> ArchiveError {
    ArchiveError::Refused {
        path: shown(path),
        source,
    }
}

/// Whether an image has extended attributes of that name.
pub(crate) fn is_kept_attribute(name: &[u8]) -> bool {
    let is = |prefix: &str| name.starts_with(prefix.as_bytes());
    XATTRS.iter().any(|prefix| is(prefix)) && !is(OVERLAY_XATTRS)
}

/// The directory, with the slash, and the name of a whiteout.
fn whiteout(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = path
        .iter()
        .rposition(|byte| *byte == b'/')
        .map_or(0, |at| at + 1);
    let (directory, name) = path.split_at(at);
    name.starts_with(WHITEOUT).then_some((directory, name))
}

/// What an entry's extended headers say, beside what the parser takes from them.
#[derive(Default)]
struct Said {
    mtime: Option<Time>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: sparse::Said,
}

impl Said {
    fn of<R: Read>(entry: &mut Entry<'_, R>) -> io::Result<Self> {
        let mut said = Self::default();
        if entry.header().entry_type() == EntryType::XGlobalHeader {
            return Ok(said);
        }
        for extension in entry.pax_extensions()?.into_iter().flatten() {
            let extension = extension?;
            let value = extension.value_bytes();
            match extension.key_bytes() {
                b"mtime" => said.mtime = std::str::from_utf8(value).ok().and_then(time),
                key if let Some(name) = key.strip_prefix(b"SCHILY.xattr.")
                    && is_kept_attribute(name) =>
                {
                    said.xattrs.push((name.to_owned(), value.to_owned()));
                }
                key if let Some(key) = key.strip_prefix(b"GNU.sparse.") => {
                    said.sparse.hear(key, value)?
                }
                _ => {}
            }
        }
        said.sparse.check()?;
        Ok(said)
    }
}

/// Seconds since 1970, with decimals.
fn time(text: &str) -> Option<Time> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits = format!("{fraction:0<9}");
    let nanoseconds: u32 = digits.get(..9)?.parse().ok()?;
    Some(if whole.starts_with('-') && nanoseconds > 0 {
        Time {
            seconds: seconds.checked_sub(1)?,
            nanoseconds: 1_000_000_000 - nanoseconds,
        }
    } else {
        Time {
            seconds,
            nanoseconds,
        }
    })
}

fn meta(header: &Header, said: &Said) -> io::Result<Meta> {
    let id = |id: u64| {
        u32::try_from(id).map_err(|_| io::Error::other("an owner is a number of 32 bits"))
    };
    let old = header.as_old();
    let mtime = said.mtime.map_or_else(
        || {
            let seconds = number(&old.mtime, || header.mtime())?;
            Ok::<_, io::Error>(Time {
                seconds: i64::try_from(seconds).unwrap_or(i64::MAX),
                nanoseconds: 0,
            })
        },
        Ok,
    )?;
    let mode = number(&old.mode, || header.mode().map(u64::from))?;
    Ok(Meta {
        mode: u16::try_from(mode & 0o7777).unwrap_or_default(),
        uid: id(number(&old.uid, || header.uid())?)?,
        gid: id(number(&old.gid, || header.gid())?)?,
        mtime,
        xattrs: said.xattrs.iter().cloned().collect(),
    })
}

/// A number of a header; a field without one is 0, as for other programs.
fn number(field: &[u8], parsed: impl FnOnce() -> io::Result<u64>) -> io::Result<u64> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Ok(0);
    }
    parsed()
}

fn device(header: &Header, path: &[u8]) -> Result<Device, ArchiveError> {
    let read = || -> io::Result<Device> {
        Ok(Device {
            major: header.device_major()?.unwrap_or(0),
            minor: header.device_minor()?.unwrap_or(0),
        })
    };
    read().map_err(|source| ArchiveError::Entry {
        path: shown(path),
        source,
    })
}

/// The entries of an archive, with a bound on what each says about itself.
pub(crate) struct Headers<R: Read> {
    archive: tar::Archive<Metered<R>>,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Headers<R> {
    pub(crate) fn of(stream: R) -> Self {
        let left = Rc::new(Cell::new(u64::MAX));
        let archive = tar::Archive::new(Metered {
            stream,
            left: Rc::clone(&left),
        });
        Self { archive, left }
    }

    fn try_each(
        &mut self,
        mut visit: impl FnMut(Entry<'_, Metered<R>>) -> Result<(), ArchiveError>,
    ) -> Result<(), ArchiveError> {
        let read = |entries, source| ArchiveError::Read { entries, source };
        let mut count = 0;
        let mut entries = self.archive.entries().map_err(|e| read(0, e))?;
        loop {
            self.left.set(MAX_HEADERS);
            let Some(entry) = entries.next() else {
                self.left.set(u64::MAX);
                return Ok(());
            };
            let entry = entry.map_err(|e| read(count, e))?;
            self.left.set(u64::MAX);
            count += 1;
            visit(entry)?;
        }
    }

    /// Shows all entries, `most` of them, and passes over their contents.
    pub(crate) fn each(
        &mut self,
        most: u64,
        mut visit: impl FnMut(&Entry<'_, Metered<R>>),
    ) -> Result<(), ArchiveError> {
        let mut count = 0;
        self.try_each(|mut entry| {
            count += 1;
            if count > most {
                return Err(ArchiveError::TooMany { limit: most });
            }
            visit(&entry);
            let passed = io::copy(&mut entry, &mut io::sink());
            passed.map(drop).map_err(|source| ArchiveError::Read {
                entries: count,
                source,
            })
        })
    }
}

/// A stream that ends in an error once more was read than is `left`.
pub(crate) struct Metered<R> {
    stream: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        let left = self.left.get();
        let read_bytes = crate::spool::length(read);
        if left != u64::MAX {
            let left = left.checked_sub(read_bytes).ok_or_else(|| {
                io::Error::other(format!(
                    "an entry has more than {MAX_HEADERS} bytes of headers"
                ))
            })?;
            self.left.set(left);
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
