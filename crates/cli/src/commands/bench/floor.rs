//! The floor: the same restore with nothing of ours but the page server. Fixed bytes on a raw socket, no client, no
//! records, no drains.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use rekindle_engine::store::Snapshot;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

/// How long each step took, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    pub(super) api: f64,
    pub(super) load: f64,
    pub(super) resume: f64,
    /// From the spawn of Firecracker to the running guest.
    pub(super) total: f64,
    /// All that the caller waits for.
    pub(super) call: f64,
}

/// Restores a snapshot in `dir`, and ends it again. The page server listens before the clock starts.
pub(super) fn restore(
    firecracker: &Path,
    rekindle: &Path,
    snapshot: &Snapshot,
    dir: &Path,
) -> Result<Steps> {
    let mut pager = Guard(
        Command::new(rekindle)
            .args(["pager", "--socket", "uffd.sock", "--snapshot"])
            .arg(snapshot.dir())
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the page server")?,
    );
    let mut ready = String::new();
    BufReader::new(pager.0.stdout.take().context("no pipe")?).read_line(&mut ready)?;
    ensure!(!ready.is_empty(), "the page server did not start");

    let begun = Instant::now();
    let watch = inotify::init(CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, dir, WatchFlags::CREATE)?;
    let serial = File::options().write(true).open("/dev/null")?;
    let vm = Guard(
        Command::new(firecracker)
            .args([
                "--id",
                "floor",
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
    let api = micros(begun);

    let body = format!(
        "{{\"snapshot_path\":{:?},\"resume_vm\":false,\"mem_backend\":{{\"backend_type\":\"Uffd\",\"backend_path\":\"uffd.sock\"}}}}",
        snapshot.vmstate_path()
    );
    let load = raw.timed("PUT", "/snapshot/load", &body)?;
    let resume = raw.timed("PATCH", "/vm", r#"{"state":"Resumed"}"#)?;
    let total = micros(begun);
    drop(vm);
    drop(pager);
    for socket in ["api.sock", "uffd.sock", "v.sock"] {
        let _ = std::fs::remove_file(dir.join(socket));
    }
    Ok(Steps {
        api,
        load,
        resume,
        total,
        call: total,
    })
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
                    std::thread::sleep(std::time::Duration::from_micros(50));
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    pub(super) fn to(socket: &Path) -> std::io::Result<Raw> {
        Ok(Raw {
            stream: UnixStream::connect(socket)?,
            buffer: vec![0; 4096],
        })
    }

    fn timed(&mut self, method: &str, path: &str, body: &str) -> Result<f64> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let begun = Instant::now();
        self.exchange(request.as_bytes())?;
        Ok(micros(begun))
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
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}
