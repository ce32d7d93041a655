//! A file system in memory: what the layers of an image add up to, before it is written.
//!
//! ```text
//! Tree ─ inodes: Vec<Inode>     [0] is the root
//!            └ Body::Directory { name → (inode, layer that put it there) }
//! ```
//!
//! Names lead to inodes as on a disk, so hard links are two names of one inode. Whoever looks a path up never leaves
//! the tree: links are followed as a process sees them whose root this is, and `..` of the root is the root. Nothing
//! of it touches the host's file system.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::spool::Contents;

/// The longest name that ext4 has, in bytes.
const MAX_NAME: usize = 255;
/// How many links are followed on the way to one file, as in Linux.
const MAX_LINKS: usize = 40;
/// The longest path, in bytes, as in Linux.
const MAX_PATH: usize = 4096;
/// How deep directories may be in each other. More than anybody needs, and few enough to go through by recursion.
const MAX_DEPTH: usize = 1024;
/// The longest target of a symbolic link, in bytes: one block, with the zero that ends it.
const MAX_TARGET: usize = 4095;

/// Which inode of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct InodeId(usize);

/// The inode of `/`.
pub(crate) const ROOT: InodeId = InodeId(0);

/// Which layer a name comes from; later ones are larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Layer(pub u32);

/// A point in time, since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Time {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// And nanoseconds, below a second.
    pub nanoseconds: u32,
}

/// What is known of a file beside its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permissions, with the set-user-ID, set-group-ID and sticky bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When the contents changed.
    pub mtime: Time,
    /// Extended attributes, by full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Meta {
    /// Root's, of 1970, without extended attributes.
    #[must_use]
    pub(crate) fn root(mode: u16) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: BTreeMap::new(),
        }
    }
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    /// A directory.
    Directory(BTreeMap<Vec<u8>, Name>),
    /// A regular file.
    File(Contents),
    /// A symbolic link, and where it leads.
    Symlink(Vec<u8>),
    /// A character device.
    Character(Device),
    /// A block device.
    Block(Device),
    /// A named pipe.
    Fifo,
}

/// The numbers of a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    /// Which driver, up to 12 bits.
    pub major: u32,
    /// Which of its devices, up to 20 bits.
    pub minor: u32,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    /// What it leads to.
    pub inode: InodeId,
    /// Who put it there, or said anything about it, last.
    pub layer: Layer,
}

/// A file, under however many names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inode {
    /// What it is.
    pub body: Body,
    /// What is known of it.
    pub meta: Meta,
}

/// A whole file system.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
}

/// Why something cannot be put into a tree.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TreeError {
    /// The path climbs.
    #[error("the name has a .. in it")]
    Climbs,
    /// A name is too long, or has a zero in it.
    #[error("a part of the name is not 1 to {MAX_NAME} bytes without a zero")]
    BadName,
    /// The path is longer than a process could say.
    #[error(
        "the name has more than {MAX_PATH} bytes, or is more than {MAX_DEPTH} directories deep"
    )]
    TooLong,
    /// A path leads through something that is no directory.
    #[error("{} is no directory", String::from_utf8_lossy(.0))]
    NotADirectory(Vec<u8>),
    /// A path leads in a circle.
    #[error("the name leads through more than {MAX_LINKS} symbolic links")]
    TooManyLinks,
    /// A path leads to nothing.
    #[error("there is no {}", String::from_utf8_lossy(.0))]
    Missing(Vec<u8>),
    /// A directory cannot have a second name.
    #[error("it is a second name of {}, a directory", String::from_utf8_lossy(.0))]
    LinkToDirectory(Vec<u8>),
    /// The root is a directory and stays one.
    #[error("it would put something else in the place of the root directory")]
    ReplacesRoot,
    /// A symbolic link leads nowhere, or its target is too long.
    #[error("a symbolic link has a target of 1 to {MAX_TARGET} bytes without a zero")]
    BadTarget,
    /// The numbers of a device that no kernel has.
    #[error("a device node has a major number of 12 and a minor one of 20 bits")]
    BadDevice,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// An empty root directory.
    #[must_use]
    pub(crate) fn new() -> Self {
        let root = Inode {
            body: Body::Directory(BTreeMap::new()),
            meta: Meta::root(0o755),
        };
        Self { inodes: vec![root] }
    }

    /// The inode of that id.
    #[must_use]
    pub(crate) fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.0]
    }

    /// The names in a directory, sorted; none if it is something else.
    pub(crate) fn names(&self, id: InodeId) -> impl Iterator<Item = (&[u8], InodeId)> {
        let names = match &self.inode(id).body {
            Body::Directory(names) => Some(names),
            _ => None,
        };
        names
            .into_iter()
            .flatten()
            .map(|(name, entry)| (name.as_slice(), entry.inode))
    }

    /// Puts a file where `path` says, in place of what stands there; directories on the way are made. A directory on
    /// top of a directory takes over its names.
    ///
    /// # Errors
    /// A [`TreeError`] for a path that no archive of good will has.
    pub(crate) fn put(&mut self, path: &[u8], inode: Inode, layer: Layer) -> Result<(), TreeError> {
        check(&inode.body)?;
        let Some((directory, name)) = self.parent(path, layer)? else {
            let Body::Directory(_) = inode.body else {
                return Err(TreeError::ReplacesRoot);
            };
            self.inodes[ROOT.0].meta = inode.meta;
            return Ok(());
        };
        if let (Body::Directory(new), Some(old)) = (&inode.body, self.child(directory, &name))
            && new.is_empty()
            && matches!(self.inode(old).body, Body::Directory(_))
        {
            self.inodes[old.0].meta = inode.meta;
            self.name(directory, name, old, layer);
            return Ok(());
        }
        let id = self.add(inode);
        self.name(directory, name, id, layer);
        Ok(())
    }

    /// Gives what `target` leads to a second name.
    ///
    /// # Errors
    /// As [`Tree::put`]; [`TreeError::Missing`] if there is no target, [`TreeError::LinkToDirectory`] if it is one.
    pub(crate) fn link(
        &mut self,
        path: &[u8],
        target: &[u8],
        layer: Layer,
    ) -> Result<(), TreeError> {
        let missing = || TreeError::Missing(target.to_owned());
        let parts = split(target)?;
        let (last, way) = parts.split_last().ok_or_else(missing)?;
        let directory = self.walk(way, None)?.ok_or_else(missing)?;
        let inode = self.child(directory, last).ok_or_else(missing)?;
        if matches!(self.inode(inode).body, Body::Directory(_)) {
            return Err(TreeError::LinkToDirectory(target.to_owned()));
        }
        let (directory, name) = self.parent(path, layer)?.ok_or(TreeError::ReplacesRoot)?;
        self.name(directory, name, inode, layer);
        Ok(())
    }

    /// Takes away what layers before this one put at `path`, if anything.
    ///
    /// # Errors
    /// As [`Tree::put`].
    pub(crate) fn white_out(&mut self, path: &[u8], layer: Layer) -> Result<(), TreeError> {
        let parts = split(path)?;
        let Some((last, way)) = parts.split_last() else {
            return Err(TreeError::ReplacesRoot);
        };
        if let Some(directory) = self.walk(way, None)? {
            self.prune_name(directory, last, layer);
        }
        Ok(())
    }

    /// Takes away what layers before this one put into the directory at `path`, if it is there.
    ///
    /// # Errors
    /// As [`Tree::put`].
    pub(crate) fn white_out_below(&mut self, path: &[u8], layer: Layer) -> Result<(), TreeError> {
        if let Some(directory) = self.walk(&split(path)?, None)? {
            self.prune_below(directory, layer);
        }
        Ok(())
    }

    /// What `path` leads to, symbolic links followed, also the last one.
    #[must_use]
    pub(crate) fn find(&self, path: &[u8]) -> Option<InodeId> {
        let parts = split(path).ok()?;
        let mut walk = Walk::new(&parts);
        self.step(&mut walk).ok().flatten()
    }

    fn add(&mut self, inode: Inode) -> InodeId {
        self.inodes.push(inode);
        InodeId(self.inodes.len() - 1)
    }

    fn child(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        match &self.inode(directory).body {
            Body::Directory(names) => names.get(name).map(|entry| entry.inode),
            _ => None,
        }
    }

    fn name(&mut self, directory: InodeId, name: Vec<u8>, inode: InodeId, layer: Layer) {
        if let Body::Directory(names) = &mut self.inodes[directory.0].body {
            names.insert(name, Name { inode, layer });
        }
    }

    /// The directory that `path` is in, made if missing, and its last part; nothing for the root itself.
    fn parent(
        &mut self,
        path: &[u8],
        layer: Layer,
    ) -> Result<Option<(InodeId, Vec<u8>)>, TreeError> {
        let parts = split(path)?;
        let Some((last, way)) = parts.split_last() else {
            return Ok(None);
        };
        let directory = self.walk(way, Some(layer))?;
        // Made, so it is there.
        Ok(directory.map(|directory| (directory, last.clone())))
    }

    /// The directory at the end of `parts`. With a layer, what is missing is made.
    fn walk(
        &mut self,
        parts: &[Vec<u8>],
        make: Option<Layer>,
    ) -> Result<Option<InodeId>, TreeError> {
        let mut walk = Walk::new(parts);
        loop {
            if let Some(at) = self.step(&mut walk)? {
                return match self.inode(at).body {
                    Body::Directory(_) => Ok(Some(at)),
                    _ => Err(TreeError::NotADirectory(
                        parts.last().cloned().unwrap_or_default(),
                    )),
                };
            }
            let (Some(layer), Some(name)) = (make, walk.rest.pop()) else {
                return Ok(None);
            };
            if walk.way.len() > MAX_DEPTH {
                return Err(TreeError::TooLong);
            }
            let made = self.add(Inode {
                body: Body::Directory(BTreeMap::new()),
                meta: Meta::root(0o755),
            });
            self.name(walk.at(), name, made, layer);
            walk.way.push(made);
        }
    }

    /// Goes on until the end, or until the next part is not there (`None`).
    fn step(&self, walk: &mut Walk) -> Result<Option<InodeId>, TreeError> {
        while let Some(part) = walk.rest.pop() {
            if part == b".." {
                // Only the target of a link has these.
                if walk.way.len() > 1 {
                    walk.way.pop();
                }
                continue;
            }
            let Body::Directory(names) = &self.inode(walk.at()).body else {
                return Err(TreeError::NotADirectory(part));
            };
            let Some(child) = names.get(&part).map(|entry| entry.inode) else {
                walk.rest.push(part);
                return Ok(None);
            };
            let Body::Symlink(target) = &self.inode(child).body else {
                walk.way.push(child);
                continue;
            };
            walk.links += 1;
            if walk.links > MAX_LINKS {
                return Err(TreeError::TooManyLinks);
            }
            if target.starts_with(b"/") {
                walk.way.truncate(1);
            }
            let parts = target.split(|byte| *byte == b'/');
            let parts = parts.filter(|part| !part.is_empty() && *part != b".");
            let mut parts = parts.map(<[u8]>::to_vec).collect::<Vec<_>>();
            parts.reverse();
            walk.rest.append(&mut parts);
        }
        Ok(Some(walk.at()))
    }

    fn prune_name(&mut self, directory: InodeId, name: &[u8], layer: Layer) {
        let Body::Directory(names) = &self.inode(directory).body else {
            return;
        };
        let Some(entry) = names.get(name).copied() else {
            return;
        };
        self.prune_below(entry.inode, layer);
        let is_filled = self.names(entry.inode).next().is_some();
        if entry.layer < layer
            && !is_filled
            && let Body::Directory(names) = &mut self.inodes[directory.0].body
        {
            names.remove(name);
        }
    }

    fn prune_below(&mut self, directory: InodeId, layer: Layer) {
        let names = self.names(directory).map(|(name, _)| name.to_vec());
        for name in names.collect::<Vec<_>>() {
            self.prune_name(directory, &name, layer);
        }
    }
}

/// A path that is being followed.
struct Walk {
    /// From the root to where it is now.
    way: Vec<InodeId>,
    /// The parts that are left, the next one last.
    rest: Vec<Vec<u8>>,
    links: usize,
}

impl Walk {
    fn new(parts: &[Vec<u8>]) -> Self {
        Self {
            way: vec![ROOT],
            rest: parts.iter().rev().cloned().collect(),
            links: 0,
        }
    }

    fn at(&self) -> InodeId {
        self.way.last().copied().unwrap_or(ROOT)
    }
}

/// The parts of a path from an archive; a leading `/` counts for nothing.
fn split(path: &[u8]) -> Result<Vec<Vec<u8>>, TreeError> {
    if path.len() > MAX_PATH {
        return Err(TreeError::TooLong);
    }
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(TreeError::Climbs),
            part if part.len() > MAX_NAME || part.contains(&0) => return Err(TreeError::BadName),
            part => parts.push(part.to_vec()),
        }
    }
    Ok(parts)
}

fn check(body: &Body) -> Result<(), TreeError> {
    match body {
        Body::Symlink(target)
            if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) =>
        {
            Err(TreeError::BadTarget)
        }
        Body::Character(device) | Body::Block(device)
            if device.major >= 1 << 12 || device.minor >= 1 << 20 =>
        {
            Err(TreeError::BadDevice)
        }
        _ => Ok(()),
    }
}
