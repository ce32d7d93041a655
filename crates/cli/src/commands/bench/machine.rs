//! One Firecracker that runs one of the bench's guests: boot it up to its gate, or load it and time its passes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rekindle_engine::Engine;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::guest::Guest;
use super::raw::{self, Guard, Raw};

/// How long one pass of a guest may take. The slowest handler takes some seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Which programs work where.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) firecracker: PathBuf,
    pub(super) rekindle: PathBuf,
    dir: PathBuf,
}

impl Place {
    /// The engine's programs, and a directory of this bench's own. It is gone again when this is dropped.
    pub(super) fn of(engine: &Engine) -> Result<Place> {
        let dir = engine.root().tmp();
        let dir = dir.join(format!("bench-{}", std::process::id()));
        std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let programs = engine.programs();
        Ok(Place {
            firecracker: programs.firecracker.clone(),
            rekindle: programs.rekindle.clone(),
            dir,
        })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Whoever looks for leftovers finds it.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A running Firecracker, killed when it is dropped.
pub(super) struct Machine {
    // Its serial port hangs up after it has ended, not before.
    process: Guard,
    raw: Raw,
    serial: ChildStdout,
    /// When each pass was over.
    dots: Vec<Instant>,
}

impl Machine {
    /// Starts Firecracker with the bench's directory as its own; the API answers when this returns.
    pub(super) fn start(place: &Place) -> Result<Machine> {
        let socket = place.dir().join("api.sock");
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let (mut process, raw) = raw::start(&place.firecracker, place.dir(), Stdio::piped())?;
        let serial = process.0.stdout.take().context("no pipe")?;
        Ok(Machine {
            process,
            raw,
            serial,
            dots: Vec::new(),
        })
    }

    /// Boots a guest, waits until it stands before its gate, and takes a snapshot of it there.
    pub(super) fn boot(mut self, guest: &Guest, kernel: &Path, files: [&Path; 2]) -> Result<()> {
        std::fs::write(kernel, &guest.elf)?;
        let [vmstate, memory] = files;
        let config = format!(r#"{{"vcpu_count":1,"mem_size_mib":{}}}"#, guest.memory_mib);
        self.raw.timed("PUT", "/machine-config", &config)?;
        let source = format!(r#"{{"kernel_image_path":{kernel:?}}}"#);
        self.raw.timed("PUT", "/boot-source", &source)?;
        let start = r#"{"action_type":"InstanceStart"}"#;
        self.raw.timed("PUT", "/actions", start)?;
        self.passes(1)?;
        self.raw.timed("PATCH", "/vm", r#"{"state":"Paused"}"#)?;
        let create = format!(
            r#"{{"snapshot_type":"Full","snapshot_path":{vmstate:?},"mem_file_path":{memory:?}}}"#
        );
        self.raw.timed("PUT", "/snapshot/create", &create)?;
        Ok(())
    }

    /// Loads a snapshot. Tells when that began, and how long it took in microseconds.
    pub(super) fn load(
        &mut self,
        vmstate: &Path,
        backend: &str,
        path: &Path,
    ) -> Result<(Instant, f64)> {
        let body = format!(
            r#"{{"snapshot_path":{vmstate:?},"resume_vm":false,"mem_backend":{{"backend_type":"{backend}","backend_path":{path:?}}}}}"#
        );
        self.raw.timed("PUT", "/snapshot/load", &body)
    }

    /// Lets it run. Tells when that began, and how long it took in microseconds.
    pub(super) fn resume(&mut self) -> Result<(Instant, f64)> {
        self.raw.timed("PATCH", "/vm", r#"{"state":"Resumed"}"#)
    }

    /// Waits until the guest has printed so many dots, and tells when each of them came.
    pub(super) fn passes(&mut self, count: usize) -> Result<&[Instant]> {
        let deadline = Instant::now() + PATIENCE;
        while self.dots.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut ready = [PollFd::new(&self.serial, PollFlags::IN)];
            let left = Timespec::try_from(left)?;
            let spoke = rustix::io::retry_on_intr(|| poll(&mut ready, Some(&left)))?;
            ensure!(
                spoke > 0,
                "the guest printed {} dots in {PATIENCE:?}, not {count}",
                self.dots.len()
            );
            let mut bytes = [0; 64];
            let n = self.serial.read(&mut bytes)?;
            let now = Instant::now();
            ensure!(n > 0, "Firecracker ended: {:?}", self.process.0.wait()?);
            let dots = bytes[..n].iter().filter(|byte| **byte == b'.').count();
            self.dots.extend(std::iter::repeat_n(now, dots));
        }
        Ok(&self.dots[..count])
    }
}
