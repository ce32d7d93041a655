//! The socket that Firecracker connects to, from being made to being removed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, chmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// Where the page server waits for Firecracker.
#[derive(Debug)]
pub enum Socket {
    /// A path at which to make a socket that only this user can connect to. It is removed again once
    /// Firecracker has connected. One that a dead process left there is replaced.
    Path(PathBuf),
    /// A socket that somebody else has bound and listens on, and will remove.
    Listener {
        /// The socket.
        listener: OwnedFd,
        /// Its path, to be named.
        path: PathBuf,
    },
}

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("{path} is in use: somebody listens on it")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// What is at the path is not a socket, so it is not ours to replace.
    #[error("{path} exists and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A step failed.
    #[error("cannot make the socket {path}")]
    Make {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A listening socket; its file, if we made it, is removed on drop.
#[derive(Debug)]
pub(crate) struct Listening {
    fd: OwnedFd,
    path: PathBuf,
    made: Option<FileId>,
}

/// Device and inode, by which a file that took our path's place is told from ours.
type FileId = (u64, u64);

impl Listening {
    pub(crate) fn open(socket: Socket) -> Result<Listening, ListenError> {
        match socket {
            Socket::Listener { listener, path } => Ok(Listening {
                fd: listener,
                path,
                made: None,
            }),
            Socket::Path(path) => {
                clear(&path)?;
                make(&path).map_err(|errno| ListenError::Make {
                    path,
                    source: errno.into(),
                })
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if self.made.is_some() && file_id(&self.path).ok() == self.made {
            let _ = unlink(&self.path);
        }
    }
}

/// Makes room for our socket: removes one that nobody listens on.
fn clear(path: &Path) -> Result<(), ListenError> {
    let make = |errno: Errno| ListenError::Make {
        path: path.into(),
        source: errno.into(),
    };
    match lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(make(errno)),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return Err(ListenError::NotASocket { path: path.into() });
        }
        Ok(_) => {}
    }
    let probe = stream_socket().map_err(make)?;
    match SocketAddrUnix::new(path).and_then(|address| connect(&probe, &address)) {
        Err(Errno::CONNREFUSED) => unlink(path).map_err(make),
        Err(Errno::NOENT) => Ok(()),
        // EAGAIN: somebody listens, and has all hands full.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse { path: path.into() }),
        Err(errno) => Err(make(errno)),
    }
}

fn make(path: &Path) -> Result<Listening, Errno> {
    let fd = stream_socket()?;
    bind(&fd, &SocketAddrUnix::new(path)?)?;
    let made = Some(file_id(path)?);
    let listening = Listening {
        fd,
        path: path.into(),
        made,
    };
    // Nobody can connect before `listen`, so there is no moment in which the mode is too wide.
    chmod(path, Mode::RUSR | Mode::WUSR)?;
    listen(&listening.fd, 16)?;
    Ok(listening)
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    // Non-blocking, so that asking whether somebody listens cannot hang on a full queue, nor `accept` on a
    // connection that is gone again.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn file_id(path: &Path) -> Result<FileId, Errno> {
    let stat = lstat(path)?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    fn open(path: &Path) -> Result<Listening, ListenError> {
        Listening::open(Socket::Path(path.into()))
    }

    #[test]
    fn the_socket_is_its_owners_alone_and_gone_when_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listening = open(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_somebody_listens_on_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = open(&path).unwrap();
        assert!(matches!(open(&path), Err(ListenError::InUse { .. })));
        assert!(path.exists());
        drop(first);
    }

    #[test]
    fn a_socket_that_a_dead_process_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        open(&path).unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(open(&path), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_file_that_took_the_sockets_place_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listening = open(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(listening);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_path_that_is_too_long_or_nowhere_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for path in [
            dir.path().join("x".repeat(120)),
            dir.path().join("none").join("s"),
        ] {
            match open(&path) {
                Err(ListenError::Make { path: named, .. }) => assert_eq!(named, path),
                other => panic!("{other:?}"),
            }
        }
    }
}
