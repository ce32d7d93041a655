//! Nothing leaked: what the host has of ours is after a step what it was before.
//!
//! ```text
//!   let before = Belongings::of(root, "rk")?;
//!   …a step…
//!   before.assert_same();      panics with each process, link, mount, … that came or went
//! ```
//!
//! Only what belongs to one root directory, or carries one prefix, is looked at, so that tests beside
//! each other do not disturb each other.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::nft;
use crate::processes::{self, Process};

/// Where in the root stays what was fetched and built.
const KEPT: [&str; 2] = ["assets", "cache"];

/// A thing on the host that can leak.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thing {
    /// A process that names the root directory, as [`processes::naming`] finds it.
    Process(Process),
    /// A file or directory in the root, but for what was fetched and built, which is there to stay.
    File(PathBuf),
    /// A mount on a place in the root, or of one.
    Mount(PathBuf),
    /// A bound Unix socket with an absolute path in the root.
    Socket(PathBuf),
    /// A network interface whose name has the prefix.
    Link(String),
    /// A network interface or a table of the packet filter whose name has the root's own prefix.
    Network(String),
    /// A named network namespace whose name has the prefix.
    Namespace(String),
    /// A cgroup whose name has the prefix.
    Cgroup(PathBuf),
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Thing::Process(process) => process.fmt(f),
            Thing::File(path) => write!(f, "file {}", path.display()),
            Thing::Mount(path) => write!(f, "mount {}", path.display()),
            Thing::Socket(path) => write!(f, "socket {}", path.display()),
            Thing::Link(name) => write!(f, "network interface {name}"),
            Thing::Network(what) => write!(f, "network {what}"),
            Thing::Namespace(name) => write!(f, "network namespace {name}"),
            Thing::Cgroup(path) => write!(f, "cgroup {}", path.display()),
        }
    }
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there before.
    New(Thing),
    /// It is not there any more.
    Gone(Thing),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::New(thing) => write!(f, "new: {thing}"),
            Change::Gone(thing) => write!(f, "gone: {thing}"),
        }
    }
}

/// All that the host has of ours at one moment.
#[derive(Clone, Debug)]
pub struct Belongings {
    root: PathBuf,
    prefix: String,
    things: BTreeSet<Thing>,
}

impl Belongings {
    /// What belongs to the directory `root`, or has a name with `prefix` where names are the host's.
    ///
    /// # Errors
    /// When the host's tables cannot be read.
    pub fn of(root: &Path, prefix: &str) -> io::Result<Belongings> {
        let mut things = BTreeSet::new();
        things.extend(processes::naming(root)?.into_iter().map(Thing::Process));
        files(root, &mut things)?;
        let kept = KEPT.map(|part| root.join(part));
        let is_kept = |path: &Path| kept.iter().any(|kept| path.starts_with(kept));
        things.retain(|thing| !matches!(thing, Thing::File(path) if is_kept(path)));
        mounts(root, &fs::read("/proc/self/mountinfo")?, &mut things);
        sockets(root, &fs::read("/proc/net/unix")?, &mut things);
        things.extend(names("/sys/class/net", prefix)?.map(Thing::Link));
        things.extend(networks_of(root)?.into_iter().map(Thing::Network));
        things.extend(names("/run/netns", prefix)?.map(Thing::Namespace));
        cgroups(Path::new("/sys/fs/cgroup"), prefix, &mut things)?;
        Ok(Belongings {
            root: root.to_owned(),
            prefix: prefix.to_owned(),
            things,
        })
    }

    /// The things.
    pub fn things(&self) -> impl Iterator<Item = &Thing> {
        self.things.iter()
    }

    /// What is different now.
    ///
    /// # Errors
    /// When the host's tables cannot be read.
    pub fn changes(&self) -> io::Result<Vec<Change>> {
        let now = Belongings::of(&self.root, &self.prefix)?.things;
        let new = now.difference(&self.things).cloned().map(Change::New);
        let gone = self.things.difference(&now).cloned().map(Change::Gone);
        Ok(new.chain(gone).collect())
    }

    /// # Panics
    /// When anything is different now, naming each thing.
    #[track_caller]
    pub fn assert_same(&self) {
        self.assert_same_within(Duration::ZERO);
    }

    /// The same, but new processes are given so much time each to end before all is compared.
    ///
    /// # Panics
    /// As [`Belongings::assert_same`].
    #[track_caller]
    pub fn assert_same_within(&self, time: Duration) {
        let mut changes = self.changes().expect("the host's tables can be read");
        if !time.is_zero() && !changes.is_empty() {
            for change in &changes {
                if let Change::New(Thing::Process(process)) = change {
                    process.ends(time).expect("a process can be waited for");
                }
            }
            changes = self.changes().expect("the host's tables can be read");
        }
        let changes: Vec<String> = changes.iter().map(Change::to_string).collect();
        assert!(changes.is_empty(), "leaked:\n{}", changes.join("\n"));
    }
}

/// The network interfaces and the packet filter's tables that a root has on the host, as the calling thread sees it: their
/// names begin with `rk` and what the link `installation` in the root says.
///
/// # Errors
/// When the host's tables cannot be read.
pub fn networks_of(root: &Path) -> io::Result<Vec<String>> {
    let Some(installation) = present(fs::read_link(root.join("installation")))? else {
        return Ok(Vec::new());
    };
    let prefix = format!("rk{}", installation.display());
    let mut found = Vec::new();
    // Two lines of headings, and then a line each, which begins with the name and a colon.
    for line in fs::read_to_string("/proc/thread-self/net/dev")?
        .lines()
        .skip(2)
    {
        let name = line.split(':').next().unwrap_or_default().trim();
        if name.starts_with(&prefix) {
            found.push(format!("link {name}"));
        }
    }
    let tables = nft::tables()?.into_iter();
    found.extend(
        tables
            .filter(|name| name.starts_with(&prefix))
            .map(|name| format!("table {name}")),
    );
    found.sort();
    Ok(found)
}

/// Files that vanish while they are looked at are not there.
fn files(directory: &Path, things: &mut BTreeSet<Thing>) -> io::Result<()> {
    for entry in present(fs::read_dir(directory))?.into_iter().flatten() {
        let entry = entry?;
        if present(entry.file_type())?.is_some_and(|kind| kind.is_dir()) {
            files(&entry.path(), things)?;
        }
        things.insert(Thing::File(entry.path()));
    }
    Ok(())
}

fn cgroups(directory: &Path, prefix: &str, things: &mut BTreeSet<Thing>) -> io::Result<()> {
    for entry in present(fs::read_dir(directory))?.into_iter().flatten() {
        let entry = entry?;
        if present(entry.file_type())?.is_some_and(|kind| kind.is_dir()) {
            if has_prefix(&entry.file_name(), prefix) {
                things.insert(Thing::Cgroup(entry.path()));
            }
            cgroups(&entry.path(), prefix, things)?;
        }
    }
    Ok(())
}

/// A line is `id parent device root point options… - type source options`.
fn mounts(root: &Path, table: &[u8], things: &mut BTreeSet<Thing>) {
    for line in table.split(|byte| *byte == b'\n') {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let Some(point) = fields.get(4).map(|field| unescaped(field)) else {
            continue;
        };
        let dash = fields.iter().position(|field| *field == b"-");
        let source = dash.and_then(|at| fields.get(at + 2));
        let source = source.map(|field| unescaped(field)).unwrap_or_default();
        if point.starts_with(root) || source.starts_with(root) {
            things.insert(Thing::Mount(point));
        }
    }
}

/// The kernel writes a space in a path as `\040`, and some others likewise.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut path = Vec::new();
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| after.get(..3)).flatten();
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                rest = &after[3..];
            }
            None => {
                path.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsStr::from_bytes(&path))
}

/// A line ends with the path, if the socket has one.
fn sockets(root: &Path, table: &[u8], things: &mut BTreeSet<Thing>) {
    for line in table.split(|byte| *byte == b'\n') {
        if let Some(at) = line.iter().position(|byte| *byte == b'/') {
            let path = Path::new(OsStr::from_bytes(&line[at..]));
            if path.starts_with(root) {
                things.insert(Thing::Socket(path.to_owned()));
            }
        }
    }
}

fn names(directory: &str, prefix: &str) -> io::Result<impl Iterator<Item = String>> {
    let mut names = Vec::new();
    for entry in present(fs::read_dir(directory))?.into_iter().flatten() {
        let name = entry?.file_name();
        if has_prefix(&name, prefix) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(names.into_iter())
}

fn has_prefix(name: &OsStr, prefix: &str) -> bool {
    name.as_bytes().starts_with(prefix.as_bytes())
}

fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::{Belongings, Change, Thing, mounts};
    use crate::fixture::TempRoot;

    /// No name of the host begins so.
    const PREFIX: &str = "rekindle-test";

    #[test]
    fn a_host_that_nobody_touched_is_the_same() {
        let root = TempRoot::new().unwrap();
        fs::write(root.join("file"), "").unwrap();
        let before = Belongings::of(root.path(), PREFIX).unwrap();
        assert_eq!(before.things().count(), 1);
        before.assert_same();
    }

    #[test]
    fn a_socket_a_file_and_a_process_that_stay_are_named() {
        let root = TempRoot::new().unwrap();
        fs::write(root.join("old"), "").unwrap();
        let before = Belongings::of(root.path(), PREFIX).unwrap();

        fs::remove_file(root.join("old")).unwrap();
        let socket = root.join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut child = Command::new("sleep")
            .arg("100")
            .env("REKINDLE_ROOT", root.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let changes = before.changes().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();

        let is_new = |thing: Thing| changes.contains(&Change::New(thing));
        assert!(is_new(Thing::File(socket.clone())), "{changes:?}");
        assert!(is_new(Thing::Socket(socket.clone())), "{changes:?}");
        assert!(changes.contains(&Change::Gone(Thing::File(root.join("old")))));
        let process = format!("new: process {} (sleep 100)", child.id());
        let texts: Vec<String> = changes.iter().map(Change::to_string).collect();
        assert!(texts.contains(&process), "{texts:?}");
        assert_eq!(changes.len(), 4, "{changes:?}");

        drop(listener);
        fs::remove_file(socket).unwrap();
        fs::write(root.join("old"), "").unwrap();
        before.assert_same();
    }

    #[test]
    fn a_process_that_is_about_to_end_is_waited_for() {
        let root = TempRoot::new().unwrap();
        let before = Belongings::of(root.path(), PREFIX).unwrap();
        let mut child = Command::new("sleep")
            .arg("0.2")
            .current_dir(root.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        assert_eq!(before.changes().unwrap().len(), 1);
        before.assert_same_within(Duration::from_secs(5));
        child.wait().unwrap();
    }

    #[test]
    fn a_mount_belongs_to_the_root_by_its_place_or_its_source() {
        let table = b"22 1 0:5 / /tmp/rk-1/my\\040disk rw - tmpfs tmpfs rw\n\
                      23 1 7:0 / /mnt rw shared:1 - ext4 /tmp/rk-1/image rw\n\
                      24 1 0:6 / /tmp/rk-12 rw - tmpfs tmpfs rw\n";
        let mut things = BTreeSet::new();
        mounts(Path::new("/tmp/rk-1"), table, &mut things);
        let expected = ["/tmp/rk-1/my disk", "/mnt"].map(|path| Thing::Mount(path.into()));
        assert_eq!(things, BTreeSet::from(expected));
    }
}
