//! One restore of a guest, whoever brings its memory, timed from outside.
//!
//! ```text
//!   PUT /snapshot/load ──── answer   PATCH /vm Resumed        '.'        '.'        '.'
//!   │◄─────── load ───────────►│       │◄── first pass ───────►│◄─ second ─►│◄─ …  ─►│
//!   │◄────────────────────── load to pass ────────────────────►│
//! ```
//!
//! Each server of pages is a process of its own and listens before the clock starts. The moment of a dot is when it was
//! read from Firecracker's standard output, which is the guest's serial port. Nothing is pinned to a CPU.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rekindle_pager::Stats;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::handler::Kind;
use super::image::Image;
use super::machine::{Machine, Place};
use super::memory;
use super::raw::Guard;

/// How many passes are timed. The third and the later ones find everything in place.
const PASSES: usize = 6;
/// How long a server may take to end after its VM.
const PARTING: Duration = Duration::from_secs(30);
const SOCKET: &str = "uffd.sock";
const STATS: &str = "stats.json";

/// Where a guest's memory comes from.
#[derive(Debug)]
pub(super) enum Backend {
    /// `rekindle pager`.
    Pager {
        record: Option<PathBuf>,
        replay: Option<PathBuf>,
    },
    /// Firecracker maps the file.
    File,
    /// What we compare with.
    Handler(Kind),
}

/// Where the memory file is when the clock starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cache {
    /// All of its data is in the page cache.
    Hot,
    /// None of it.
    Evicted,
}

/// What is restored, and how.
#[derive(Debug)]
pub(super) struct Contender {
    pub(super) name: &'static str,
    pub(super) backend: Backend,
    pub(super) cache: Cache,
}

/// What one restore took, in microseconds.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) load: f64,
    pub(super) resume: f64,
    /// From the first byte of the request to load to the end of the first pass.
    pub(super) load_to_pass: f64,
    /// The first from the first byte of the request to resume, each other from the one before.
    pub(super) passes: Vec<f64>,
    /// What the page server counted; a baseline counts nothing.
    pub(super) stats: Option<Stats>,
    /// `Private_Dirty` of the server in KiB, if that was asked for.
    pub(super) idle_kib: Option<f64>,
    /// How many pages of an evicted file were in the page cache nevertheless.
    pub(super) left_in_cache: usize,
}

impl Contender {
    pub(super) fn hot(name: &'static str, backend: Backend) -> Contender {
        Contender {
            name,
            backend,
            cache: Cache::Hot,
        }
    }

    /// Restores `image`, lets it pass six times, and ends it.
    pub(super) fn run(&self, place: &Place, image: &Image) -> Result<Run> {
        self.run_idle(place, image, None)
    }

    /// The same; after the passes and so long again, the server's memory is measured.
    pub(super) fn run_idle(
        &self,
        place: &Place,
        image: &Image,
        idle: Option<Duration>,
    ) -> Result<Run> {
        self.restore(place, image, idle)
            .with_context(|| format!("the restore by {:?} failed", self.name))
    }

    fn restore(&self, place: &Place, image: &Image, idle: Option<Duration>) -> Result<Run> {
        let left_in_cache = match self.cache {
            Cache::Hot => image.warm().map(|()| 0),
            Cache::Evicted => image.evict(),
        }?;
        let server = Server::start(place, image, &self.backend)?;
        // Dropped before the server, which would leave it waiting for a page.
        let mut machine = Machine::start(place)?;
        let (backend, path) = match server {
            Some(_) => ("Uffd", Path::new(SOCKET)),
            None => ("File", image.memory.as_path()),
        };
        let (begun, load) = machine.load(&image.vmstate, backend, path)?;
        let (resumed, resume) = machine.resume()?;
        let dots = machine.passes(PASSES)?.to_vec();
        let idle_kib = match (idle, &server) {
            (Some(time), Some(server)) => {
                std::thread::sleep(time);
                Some(memory::of_process(server.process.0.id())?)
            }
            _ => None,
        };
        drop(machine);
        Ok(Run {
            load,
            resume,
            load_to_pass: between(begun, dots[0]),
            passes: std::iter::once(resumed)
                .chain(dots.iter().copied())
                .zip(&dots)
                .map(|(from, to)| between(from, *to))
                .collect(),
            stats: server.map_or(Ok(None), Server::finish)?,
            idle_kib,
            left_in_cache,
        })
    }
}

fn between(from: Instant, to: Instant) -> f64 {
    to.duration_since(from).as_secs_f64() * 1e6
}

impl Run {
    /// A pass that finds everything in place: the median of the third to the last.
    pub(super) fn resident(&self) -> f64 {
        let mut later = self.passes[2..].to_vec();
        later.sort_by(f64::total_cmp);
        later[later.len() / 2]
    }

    /// From the resume to the end of the second pass.
    pub(super) fn two_passes(&self) -> f64 {
        self.passes[0] + self.passes[1]
    }
}

/// A process that serves one VM.
struct Server {
    process: Guard,
    stats: Option<PathBuf>,
}

impl Server {
    fn start(place: &Place, image: &Image, backend: &Backend) -> Result<Option<Server>> {
        let mut command = Command::new(&place.rekindle);
        let mut stats = None;
        match backend {
            Backend::File => return Ok(None),
            Backend::Handler(kind) => {
                command.args(["bench", "handler", "--kind", kind.name()]);
            }
            Backend::Pager { record, replay } => {
                let path = place.dir().join(STATS);
                command.arg("pager").arg("--stats").arg(&path);
                stats = Some(path);
                for (option, file) in [("--record", record), ("--replay", replay)] {
                    if let Some(file) = file {
                        command.arg(option).arg(file);
                    }
                }
            }
        }
        let mut process = Guard(
            command
                .args(["--socket", SOCKET, "--memory"])
                .arg(&image.memory)
                .current_dir(place.dir())
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .context("cannot start the server of pages")?,
        );
        let mut ready = String::new();
        BufReader::new(process.0.stdout.take().context("no pipe")?).read_line(&mut ready)?;
        ensure!(!ready.is_empty(), "the server of pages did not start");
        Ok(Some(Server { process, stats }))
    }

    /// Waits for its end, which follows the VM's.
    fn finish(mut self) -> Result<Option<Stats>> {
        let status = wait(&mut self.process.0)?;
        ensure!(status.success(), "the server of pages ended with {status}");
        let Some(path) = &self.stats else {
            return Ok(None);
        };
        let text =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        std::fs::remove_file(path)?;
        let stats = serde_json::from_slice(&text);
        stats.with_context(|| format!("{} is not ours", path.display()))
    }
}

fn wait(child: &mut Child) -> Result<ExitStatus> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    let limit = Timespec::try_from(PARTING)?;
    if rustix::io::retry_on_intr(|| poll(&mut ended, Some(&limit)))? == 0 {
        bail!("the server of pages was still there {PARTING:?} after its VM");
    }
    Ok(child.wait()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resident_pass_is_none_of_the_first_two() {
        let run = Run {
            load: 0.0,
            resume: 0.0,
            load_to_pass: 0.0,
            passes: vec![900.0, 80.0, 7.0, 5.0, 6.0, 8.0],
            stats: None,
            idle_kib: None,
            left_in_cache: 0,
        };
        assert_eq!((run.resident(), run.two_passes()), (7.0, 980.0));
    }
}
