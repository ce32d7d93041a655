//! A memory file, a page server for it, and a VM that can shake hands with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rekindle_kit::require::requires_root;
use rekindle_kit::uffd::{Answer, Build, FakeVm, GuestThread, Order, Zeros, write_memory};
use rekindle_pager::{Ended, Live, Options, PagerError, Ready, Socket, Source, Stats, serve};
use rustix::fs::{Advice, fadvise};
use tempfile::TempDir;

/// How long anything may take that is not a test of waiting.
const PATIENCE: Duration = Duration::from_secs(20);

/// A page server in a thread of its own.
pub(crate) struct Pager {
    ready: Ready,
    over: mpsc::Receiver<Result<Stats, PagerError>>,
    thread: JoinHandle<()>,
}

impl Pager {
    pub(crate) fn start(options: Options) -> anyhow::Result<Pager> {
        let (tell_ready, ready) = mpsc::channel();
        let (tell_over, over) = mpsc::channel();
        let thread = thread::spawn(move || {
            let served = serve(options, |ready| {
                tell_ready.send(ready.clone()).expect("the test waits")
            });
            // A test that failed no longer listens.
            let _ = tell_over.send(served);
        });
        match ready.recv_timeout(PATIENCE) {
            Ok(ready) => Ok(Pager {
                ready,
                over,
                thread,
            }),
            Err(_) => Err(over
                .recv_timeout(PATIENCE)?
                .expect_err("it was never ready")
                .into()),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.ready.listening.clone()
    }

    /// What it returned; it has to, soon.
    pub(crate) fn end(self) -> anyhow::Result<Result<Stats, PagerError>> {
        let end = self
            .over
            .recv_timeout(PATIENCE)
            .context("the page server goes on for ever")?;
        ensure!(self.thread.join().is_ok(), "the page server panicked");
        ensure!(!self.ready.listening.exists(), "the socket is left behind");
        Ok(end)
    }
}

/// All of it, on small pages unless said otherwise.
pub(crate) struct Scene {
    pub(crate) dir: TempDir,
    pub(crate) stamps: Vec<u64>,
    pub(crate) vm: FakeVm,
    pub(crate) pager: Pager,
}

/// What a scene is made from.
pub(crate) struct Plan {
    pub(crate) stamps: Vec<u64>,
    pub(crate) build: Build,
    pub(crate) zeros: Zeros,
}

/// Every fifth page is zero; no other two are alike.
pub(crate) fn mixed(pages: usize) -> Vec<u64> {
    (0..pages)
        .map(|page| {
            if page % 5 == 0 {
                0
            } else {
                0xabcd_0000 + page as u64
            }
        })
        .collect()
}

impl Plan {
    pub(crate) fn of(stamps: Vec<u64>) -> Plan {
        let regions = vec![stamps.len()];
        let build = Build {
            regions,
            huge: false,
            blocking: false,
        };
        Plan {
            stamps,
            build,
            zeros: Zeros::Holes,
        }
    }

    /// Makes it so; nobody has shaken hands yet.
    pub(crate) fn set(self) -> anyhow::Result<Scene> {
        requires_root()?;
        let dir = tempfile::tempdir()?;
        let memory = dir.path().join("memory");
        write_memory(&memory, &self.stamps, self.zeros)?;
        let mut options = Options::new(
            Socket::Path(dir.path().join("pager.sock")),
            Source::Memory(memory),
        );
        options.stats = Some(dir.path().join("stats.json"));
        let pager = Pager::start(options)?;
        Ok(Scene {
            vm: FakeVm::start(&self.build)?,
            dir,
            stamps: self.stamps,
            pager,
        })
    }
}

impl Scene {
    /// Of this many pages, after the handshake.
    pub(crate) fn served(pages: usize) -> anyhow::Result<(Scene, GuestThread)> {
        let scene = Plan::of(mixed(pages)).set()?;
        let mut thread = scene.vm.thread()?;
        thread.ask(&scene.handshake())?;
        Ok((scene, thread))
    }

    pub(crate) fn memory(&self) -> PathBuf {
        self.dir.path().join("memory")
    }

    pub(crate) fn handshake(&self) -> Order {
        Order::handshake(&self.pager.socket())
    }

    /// Reads pages in a thread that may have to wait; the answer comes with [`saw`].
    pub(crate) fn reader(&self, page: usize, count: usize) -> anyhow::Result<GuestThread> {
        let mut thread = self.vm.thread()?;
        thread.begin(&Order::Read { page, count })?;
        Ok(thread)
    }

    /// Ends the VM, then looks at what the page server says of it.
    pub(crate) fn finish(mut self) -> anyhow::Result<Stats> {
        self.vm.kill()?;
        let stats = self.pager.end()??;
        ensure!(stats.ended == Some(Ended::VmExited), "{:?}", stats.ended);
        let written: Stats =
            serde_json::from_slice(&fs::read(self.dir.path().join("stats.json"))?)?;
        ensure!(written == stats, "the stats file says something else");
        ensure!(
            stats.vm_pid.unsigned_abs() == self.vm.pid(),
            "the stats name another VM"
        );
        Ok(stats)
    }
}

/// What a [`Scene::reader`] saw in the end.
pub(crate) fn saw(thread: &mut GuestThread) -> anyhow::Result<Vec<u64>> {
    match thread.finish()?.context("the VM died")? {
        Answer::Stamps(stamps) => stamps
            .into_iter()
            .collect::<Option<_>>()
            .context("a torn page"),
        other => anyhow::bail!("{other:?}"),
    }
}

/// Long enough for the kernel to put a thread to sleep over a fault.
pub(crate) fn let_it_wait() {
    thread::sleep(Duration::from_millis(100));
}

/// Waits until so many threads of the VM sleep over a fault: blocked, and in no system call.
pub(crate) fn until_they_fault(vm: u32, threads: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let tasks = fs::read_dir(format!("/proc/{vm}/task"))?.flatten();
        let calls = tasks.filter_map(|task| fs::read_to_string(task.path().join("syscall")).ok());
        let asleep = calls.filter(|call| call.starts_with("-1 ")).count();
        if asleep == threads {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{asleep} of {threads} threads fault"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// Leaves a file on the disk alone, where the file system can be talked into that.
pub(crate) fn leaves_the_cache(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

/// What goes on while nothing seems to: what the page server has counted, and where the VM's threads are.
pub(crate) fn situation(vm: u32, state: &Path) -> String {
    let mut text = match Live::open(state) {
        Ok(live) => format!("process {} serves: {:?}\n", live.server(), live.stats()),
        Err(error) => format!("nobody serves: {error}\n"),
    };
    let tasks = fs::read_dir(format!("/proc/{vm}/task"))
        .into_iter()
        .flatten();
    for task in tasks.flatten() {
        let of = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let (place, call) = (of("wchan"), of("syscall"));
        text += &format!(
            "{:?} in {place:?}, call {:?}\n",
            task.file_name(),
            call.trim()
        );
    }
    text
}
