//! A connection to a port of the guest, through Firecracker's Unix socket.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rekindle_agent::{Decoder, Frame, PORT};
use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::error::{AgentError, ConnectError};
use crate::jail;
use crate::vm::dir::{VSOCK_SOCKET, VmDir};

/// Firecracker answers `OK `, a port of up to ten digits and a line break.
const LONGEST_ANSWER: usize = 32;

/// How much is read at once.
const BUFFER: usize = 64 << 10;

/// Firecracker gives up after 2 s where the guest says nothing. Where the guest has no driver for the device, and while
/// it writes a snapshot, it takes no connection at all.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connects to the agent's port.
pub(super) async fn connect(dir: &VmDir) -> Result<UnixStream, ConnectError> {
    let silent = |_| Err(ConnectError::Refused { port: PORT });
    let called = tokio::time::timeout(PATIENCE, call(dir)).await;
    called.unwrap_or_else(silent)
}

async fn call(dir: &VmDir) -> Result<UnixStream, ConnectError> {
    let path = dir.file(VSOCK_SOCKET);
    let socket = |source: io::Error| ConnectError::Socket {
        path: path.clone(),
        source,
    };
    let path = jail::socket(dir, VSOCK_SOCKET).map_err(socket)?;
    let near = Near::of(&path).map_err(socket)?;
    let mut stream = UnixStream::connect(near.path()).await.map_err(socket)?;
    // In one write: Firecracker takes no line in pieces.
    let line = format!("CONNECT {PORT}\n");
    if stream.write_all(line.as_bytes()).await.is_err() {
        return Err(ConnectError::Refused { port: PORT });
    }
    let mut answer = Vec::new();
    while !answer.contains(&b'\n') && answer.len() <= LONGEST_ANSWER {
        match stream.read_buf(&mut answer).await {
            Ok(0) | Err(_) => return Err(ConnectError::Refused { port: PORT }),
            Ok(_) => {}
        }
    }
    // The agent never speaks first, so nothing comes behind the line.
    match answer.strip_suffix(b"\n") {
        Some(line) if line.starts_with(b"OK ") && !line.contains(&b'\n') => Ok(stream),
        _ => Err(ConnectError::Answer { path }),
    }
}

/// A short path to a socket, of which the kernel takes 107 bytes.
#[derive(Debug)]
pub(super) struct Near {
    dir: OwnedFd,
    name: PathBuf,
}

impl Near {
    /// Of a socket that need not exist, in a directory that does.
    pub(super) fn of(path: &Path) -> io::Result<Near> {
        let dir = path.parent().unwrap_or(path);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Near {
            dir: rustix::fs::open(dir, flags, Mode::empty())?,
            name: path.file_name().map(PathBuf::from).unwrap_or_default(),
        })
    }

    /// Good for as long as this lives.
    pub(super) fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd")
            .join(self.dir.as_raw_fd().to_string())
            .join(&self.name)
    }
}

/// A connection, as frames.
#[derive(Debug)]
pub(super) struct Line {
    stream: UnixStream,
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl Line {
    pub(super) fn new(stream: UnixStream) -> Line {
        Line {
            stream,
            decoder: Decoder::default(),
            buffer: vec![0; BUFFER],
        }
    }

    pub(super) async fn send(&mut self, frame: &Frame) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.stream.write_all(&bytes).await
    }

    /// The next frame; `None` when the other side hung up. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, AgentError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            match self.stream.read(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.feed(&self.buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
