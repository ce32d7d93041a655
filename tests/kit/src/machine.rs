//! A real Firecracker, driven without any code that is under test.
//!
//! ```text
//!   start ── boot(guest) ──▶ runs ⇄ paused ── snapshot ──▶ files
//!     └───── load(files) ──────────────▲                     │
//!              ▲─────────────────────────────────────────────┘
//! ```

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::guest::Guest;
use crate::raw::RawApi;
use crate::serial::Serial;

/// How long Firecracker may take until its API answers.
const START: Duration = Duration::from_secs(10);

/// Which pages a snapshot has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All.
    Full,
    /// Those that were written since the last snapshot; needs [`Tracking::On`].
    Diff,
}

/// Whether KVM records which pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// It does, so that there can be Diff snapshots.
    On,
    /// It does not.
    Off,
}

/// The two files of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotFiles {
    /// What Firecracker knows of the VM.
    pub vmstate: PathBuf,
    /// The guest's memory.
    pub memory: PathBuf,
}

impl SnapshotFiles {
    /// `vmstate` and `memory` in a directory.
    pub fn inside(directory: &Path) -> SnapshotFiles {
        SnapshotFiles {
            vmstate: directory.join("vmstate"),
            memory: directory.join("memory"),
        }
    }
}

/// A Firecracker process, killed when it is dropped.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    stdin: ChildStdin,
    api: RawApi,
    serial: Serial,
    directory: PathBuf,
}

impl Machine {
    /// Starts Firecracker with `directory` as its working directory, and waits until its API listens.
    ///
    /// The directory gets `api.sock`, `log` and `stderr`.
    ///
    /// # Errors
    /// When it cannot be started or does not listen in time.
    pub fn start(firecracker: &Path, directory: &Path) -> anyhow::Result<Machine> {
        let socket = directory.join("api.sock");
        File::create(directory.join("log")).context("create the log")?;
        let stderr = File::create(directory.join("stderr")).context("create the error log")?;
        let watch = watch(directory)?;
        let mut child = Command::new(firecracker)
            .args(["--api-sock", "api.sock", "--id", "kit"])
            .args(["--log-path", "log", "--level", "Warn"])
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("start {}", firecracker.display()))?;
        let stdin = child.stdin.take().context("it was piped")?;
        let stdout = child.stdout.take().context("it was piped")?;
        match connect(&socket, &child, &watch) {
            Ok(api) => Ok(Machine {
                child,
                stdin,
                api,
                serial: Serial::new(stdout),
                directory: directory.to_owned(),
            }),
            Err(error) => {
                end(&mut child);
                let said = fs::read_to_string(directory.join("stderr")).unwrap_or_default();
                Err(error.context(format!("Firecracker said {said:?}")))
            }
        }
    }

    /// Boots a guest.
    ///
    /// # Errors
    /// When Firecracker refuses it.
    pub fn boot(&mut self, guest: &Guest, tracking: Tracking) -> anyhow::Result<()> {
        guest.write(&self.directory.join("kernel"))?;
        let tracked = tracking == Tracking::On;
        let memory = guest.memory().0;
        self.put(
            "/machine-config",
            &format!(
                r#"{{"vcpu_count":1,"mem_size_mib":{memory},"smt":false,"track_dirty_pages":{tracked}}}"#
            ),
        )?;
        self.put("/boot-source", r#"{"kernel_image_path":"kernel"}"#)?;
        self.put("/actions", r#"{"action_type":"InstanceStart"}"#)
    }

    /// Loads a snapshot with Firecracker's File backend. The VM is paused then.
    ///
    /// # Errors
    /// When Firecracker refuses it.
    pub fn load(&mut self, files: &SnapshotFiles, tracking: Tracking) -> anyhow::Result<()> {
        self.load_from(files, tracking, "File", &files.memory)
    }

    /// Loads a snapshot whose memory comes from the page server that listens on `socket`.
    ///
    /// # Errors
    /// When Firecracker refuses it.
    pub fn load_uffd(
        &mut self,
        files: &SnapshotFiles,
        tracking: Tracking,
        socket: &Path,
    ) -> anyhow::Result<()> {
        self.load_from(files, tracking, "Uffd", socket)
    }

    fn load_from(
        &mut self,
        files: &SnapshotFiles,
        tracking: Tracking,
        backend: &str,
        path: &Path,
    ) -> anyhow::Result<()> {
        let (vmstate, path) = (files.vmstate.display(), path.display());
        let tracked = tracking == Tracking::On;
        self.put(
            "/snapshot/load",
            &format!(
                r#"{{"snapshot_path":"{vmstate}","mem_backend":{{"backend_type":"{backend}","backend_path":"{path}"}},"enable_diff_snapshots":{tracked},"resume_vm":false}}"#
            ),
        )
    }

    /// Pauses the VM.
    ///
    /// # Errors
    /// When Firecracker refuses it.
    pub fn pause(&mut self) -> anyhow::Result<()> {
        self.patch("/vm", r#"{"state":"Paused"}"#)
    }

    /// Lets the VM run on.
    ///
    /// # Errors
    /// When Firecracker refuses it.
    pub fn resume(&mut self) -> anyhow::Result<()> {
        self.patch("/vm", r#"{"state":"Resumed"}"#)
    }

    /// Writes a snapshot of the paused VM.
    ///
    /// # Errors
    /// When Firecracker refuses it.
    pub fn snapshot(&mut self, kind: SnapshotKind, files: &SnapshotFiles) -> anyhow::Result<()> {
        let (vmstate, memory) = (files.vmstate.display(), files.memory.display());
        self.put(
            "/snapshot/create",
            &format!(
                r#"{{"snapshot_type":"{kind:?}","snapshot_path":"{vmstate}","mem_file_path":"{memory}"}}"#
            ),
        )
    }

    /// The connection to its API.
    pub fn api(&mut self) -> &mut RawApi {
        &mut self.api
    }

    /// What the guest prints.
    pub fn serial(&mut self) -> &mut Serial {
        &mut self.serial
    }

    /// Where the guest's serial input comes from.
    pub fn keyboard(&mut self) -> &mut ChildStdin {
        &mut self.stdin
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn put(&mut self, path: &str, json: &str) -> anyhow::Result<()> {
        let status = self.api.put(path, json)?;
        ensure!(status < 300, "PUT {path}: {status} {}", self.api.body());
        Ok(())
    }

    fn patch(&mut self, path: &str, json: &str) -> anyhow::Result<()> {
        let status = self.api.patch(path, json)?;
        ensure!(status < 300, "PATCH {path}: {status} {}", self.api.body());
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

fn watch(directory: &Path) -> anyhow::Result<OwnedFd> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).context("watch for the socket")?;
    inotify::add_watch(&watch, directory, inotify::WatchFlags::CREATE)
        .with_context(|| format!("watch {}", directory.display()))?;
    Ok(watch)
}

/// Waits for the socket to appear, then for it to listen, which nothing announces.
fn connect(socket: &Path, child: &Child, watch: &OwnedFd) -> anyhow::Result<RawApi> {
    let process = Pid::from_child(child);
    let process = pidfd_open(process, PidfdFlags::empty()).context("open its pidfd")?;
    let deadline = Instant::now() + START;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("no API after {START:?}");
        }
        match RawApi::connect(socket) {
            Ok(api) => return Ok(api),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let left = Timespec::try_from(left).map_err(io::Error::other)?;
                let mut ready = [
                    PollFd::new(watch, PollFlags::IN),
                    PollFd::new(&process, PollFlags::IN),
                ];
                poll(&mut ready, Some(&left))?;
                ensure!(ready[1].revents().is_empty(), "Firecracker ended");
                if !ready[0].revents().is_empty() {
                    rustix::io::read(watch, &mut [0; 4096])?;
                }
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::thread::yield_now(),
            Err(error) => return Err(error).context("connect to the API"),
        }
    }
}
