//! Firecracker without anything of ours: a process, and fixed bytes on its socket.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

/// How long one call may take. Firecracker writes a snapshot of 4 GiB in it, on a slow disk.
const PATIENCE: Duration = Duration::from_secs(300);

/// Starts Firecracker in `dir`, and returns once its API answers.
pub(super) fn start(firecracker: &Path, dir: &Path, serial: Stdio) -> Result<(Guard, Raw)> {
    let watch = inotify::init(CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, dir, WatchFlags::CREATE)?;
    let vm = Guard(
        Command::new(firecracker)
            .args([
                "--id",
                "bench",
                "--api-sock",
                "api.sock",
                "--log-path",
                "/dev/null",
            ])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(serial)
            .spawn()
            .context("cannot start firecracker")?,
    );
    let mut raw = Raw::connect(&watch, &dir.join("api.sock"))?;
    raw.exchange(b"GET / HTTP/1.1\r\nHost: l\r\n\r\n")?;
    Ok((vm, raw))
}

/// Fixed requests on a raw socket.
pub(super) struct Raw {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Raw {
    /// Waits for the socket to appear, then connects; nothing tells when it listens.
    fn connect(watch: &rustix::fd::OwnedFd, socket: &Path) -> Result<Raw> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(watch, &mut buffer);
        while !socket.exists() {
            events.next()?;
        }
        loop {
            match Raw::to(socket) {
                Ok(raw) => return Ok(raw),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                    std::thread::sleep(Duration::from_micros(50));
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    pub(super) fn to(socket: &Path) -> std::io::Result<Raw> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Raw {
            stream,
            buffer: vec![0; 4096],
        })
    }

    /// Tells when the request's first byte was sent, and how long the answer took in microseconds.
    pub(super) fn timed(&mut self, method: &str, path: &str, body: &str) -> Result<(Instant, f64)> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let begun = Instant::now();
        self.exchange(request.as_bytes())
            .with_context(|| format!("{method} {path} failed"))?;
        Ok((begun, micros(begun)))
    }

    /// One request, one answer, which fits one read.
    pub(super) fn exchange(&mut self, request: &[u8]) -> Result<()> {
        self.stream.write_all(request)?;
        let n = self.stream.read(&mut self.buffer)?;
        let answer = &self.buffer[..n];
        if !answer.starts_with(b"HTTP/1.1 20") {
            bail!(
                "the raw request was refused: {}",
                String::from_utf8_lossy(answer)
            );
        }
        Ok(())
    }
}

/// A process that does not outlive this.
pub(super) struct Guard(pub(super) Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}
