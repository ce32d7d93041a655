//! Page servers that have served, and then try something that they should not, as somebody who got hold of one would.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, ensure};
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use rekindle_kit::uffd::{Build, FakeVm, Order, Zeros, write_memory};
use rekindle_pager::{Source, landlock_works};
use rustix::process::{
    PidfdFlags, Signal, Uid, chroot, kill_process, pidfd_open, pidfd_send_signal,
};
use serde::{Deserialize, Serialize};

use crate::scene::{mixed, saw};
use crate::server::{Kept, Server, Serving};

const SIGSYS: i32 = 31;
/// How a deed ends that was done, and one that was refused.
const DONE: i32 = 40;
const REFUSED: i32 = 41;

/// What is tried.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Deed {
    Open,
    CreateElsewhere,
    CreateBesideTheStats,
    Remove,
    Listen,
    Execute,
    Spawn,
    SignalParent,
    HoldParent,
    StopTheVm,
    BecomeRoot,
    NewRoot,
    StartAThread,
    Panic,
}

impl Deed {
    /// Tries it, with what the page server was told, and ends.
    pub(crate) fn attempt(self, serving: &Serving) -> ! {
        let code = if self.succeeds(serving) {
            DONE
        } else {
            REFUSED
        };
        std::process::exit(code)
    }

    fn succeeds(self, serving: &Serving) -> bool {
        let parent = rustix::process::getppid();
        match self {
            Deed::Open => File::open("/etc/hostname").is_ok(),
            Deed::CreateElsewhere => File::create(elsewhere(&serving.state)).is_ok(),
            Deed::CreateBesideTheStats => {
                File::create(serving.stats.with_extension("more")).is_ok()
            }
            Deed::Remove => fs::remove_file(&serving.state).is_ok(),
            Deed::Listen => TcpListener::bind("127.0.0.1:0").is_ok(),
            Deed::Execute => Command::new("/bin/true").exec().raw_os_error().is_none(),
            Deed::Spawn => Command::new("/bin/true").spawn().is_ok(),
            Deed::SignalParent => parent.is_some_and(|it| kill_process(it, Signal::WINCH).is_ok()),
            Deed::HoldParent => {
                parent.is_some_and(|it| pidfd_open(it, PidfdFlags::empty()).is_ok())
            }
            // Any descriptor is refused alike.
            Deed::StopTheVm => pidfd_send_signal(std::io::stdin(), Signal::STOP)
                .is_err_and(|e| e != rustix::io::Errno::NOSYS),
            Deed::BecomeRoot => {
                rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).is_ok()
            }
            Deed::NewRoot => chroot("/").is_ok(),
            Deed::StartAThread => std::thread::Builder::new()
                .spawn(|| vec![1_u8; 1 << 20].len())
                .is_ok_and(|thread| thread.join().is_ok()),
            Deed::Panic => panic!("on purpose"),
        }
    }
}

fn elsewhere(state: &Path) -> PathBuf {
    let dir = state.parent().and_then(Path::parent);
    dir.unwrap_or(Path::new("/")).join("elsewhere")
}

pub(crate) fn stories() -> Vec<Story> {
    vec![
        Story::new(
            "a page server without rights can do nothing but serve and kill its VM",
            without_rights,
        ),
        Story::new(
            "a page server with its files can write beside them, and speak to nobody",
            with_its_files,
        ),
        Story::new(
            "a page server without rights kills a VM whose memory is cut short",
            kills_its_vm,
        ),
        Story::new(
            "the kernel says that a page server is confined, and who it is",
            the_kernel_says,
        ),
        Story::new(
            "a page server whose log takes nothing serves all the same",
            log_is_full,
        ),
    ]
}

struct Place {
    dir: tempfile::TempDir,
    serving: Serving,
    stamps: Vec<u64>,
}

impl Place {
    fn new(rights: Kept, deed: Option<Deed>) -> anyhow::Result<Place> {
        let dir = tempfile::tempdir()?;
        let [own, stats] = ["own", "stats"].map(|name| dir.path().join(name));
        fs::create_dir(&own)?;
        fs::create_dir(&stats)?;
        let stamps = mixed(64);
        write_memory(&own.join("memory"), &stamps, Zeros::Holes)?;
        let serving = Serving {
            source: Source::Memory(own.join("memory")),
            socket: own.join("pager.sock"),
            state: own.join("pager.state"),
            stats: stats.join("stats.json"),
            set: stats.join("working-set"),
            rights,
            deed,
        };
        Ok(Place {
            dir,
            serving,
            stamps,
        })
    }

    /// A page server and a VM that have found each other.
    fn served(&self) -> anyhow::Result<(Server, FakeVm)> {
        self.served_by(Server::start(&self.serving)?)
    }

    fn served_by(&self, mut server: Server) -> anyhow::Result<(Server, FakeVm)> {
        let vm = FakeVm::start(&Build {
            regions: vec![self.stamps.len()],
            huge: false,
            blocking: false,
        })?;
        vm.thread()?.ask(&Order::handshake(&self.serving.socket))?;
        server.serves()?;
        Ok((server, vm))
    }
}

/// How a page server ends that tries this when its VM has ended.
fn after(rights: Kept, deed: Deed) -> anyhow::Result<ExitStatus> {
    let place = Place::new(rights, Some(deed))?;
    let (server, mut vm) = place.served()?;
    let mut thread = vm.thread()?;
    thread.begin(&Order::Read { page: 0, count: 64 })?;
    ensure!(saw(&mut thread)? == place.stamps, "it does not serve");
    vm.kill()?;
    vm.wait()?;
    let status = server.status()?;
    ensure!(place.serving.state.exists(), "its state is gone");
    ensure!(
        !place.dir.path().join("elsewhere").exists(),
        "it wrote elsewhere"
    );
    Ok(status)
}

fn ends_by(rights: Kept, code: i32, deeds: &[Deed]) -> anyhow::Result<()> {
    for &deed in deeds {
        let status = after(rights, deed)?;
        ensure!(status.code() == Some(code), "{deed:?}: {status}");
    }
    Ok(())
}

fn ends_killed(rights: Kept, deeds: &[Deed]) -> anyhow::Result<()> {
    for &deed in deeds {
        let status = after(rights, deed)?;
        ensure!(status.signal() == Some(SIGSYS), "{deed:?}: {status}");
    }
    Ok(())
}

const KILLED: [Deed; 5] = [
    Deed::Listen,
    Deed::Execute,
    Deed::SignalParent,
    Deed::BecomeRoot,
    Deed::NewRoot,
];

fn without_rights() -> anyhow::Result<()> {
    requires_root()?;
    let refused = [
        Deed::Open,
        Deed::Remove,
        Deed::Spawn,
        Deed::HoldParent,
        Deed::StopTheVm,
    ];
    ends_by(Kept::Nothing, REFUSED, &refused)?;
    ends_killed(Kept::Nothing, &KILLED)?;
    ends_killed(
        Kept::Nothing,
        &[Deed::CreateElsewhere, Deed::CreateBesideTheStats],
    )?;
    ends_by(Kept::Nothing, DONE, &[Deed::StartAThread])?;
    // As any Rust program, message and all.
    ends_by(Kept::Nothing, 101, &[Deed::Panic])
}

fn with_its_files() -> anyhow::Result<()> {
    requires_root()?;
    ends_by(
        Kept::Files,
        DONE,
        &[Deed::CreateBesideTheStats, Deed::StartAThread],
    )?;
    ends_by(Kept::Files, REFUSED, &[Deed::HoldParent, Deed::StopTheVm])?;
    if landlock_works() {
        ends_by(
            Kept::Files,
            REFUSED,
            &[Deed::Open, Deed::CreateElsewhere, Deed::Remove],
        )?;
    }
    ends_killed(Kept::Files, &KILLED)
}

fn kills_its_vm() -> anyhow::Result<()> {
    requires_root()?;
    let place = Place::new(Kept::Nothing, None)?;
    let Source::Memory(memory) = &place.serving.source else {
        unreachable!("it is a file");
    };
    let (server, mut vm) = place.served()?;
    File::options().write(true).open(memory)?.set_len(4096)?;
    let mut thread = vm.thread()?;
    thread.begin(&Order::Read { page: 63, count: 1 })?;
    ensure!(vm.wait()?.signal() == Some(9), "it lives");
    server.end()?;
    let stats = fs::read_to_string(&place.serving.stats)?;
    ensure!(stats.contains("bad_page"), "{stats}");
    Ok(())
}

fn the_kernel_says() -> anyhow::Result<()> {
    requires_root()?;
    for (rights, user) in [(Kept::Nothing, Some(1_904_000_000)), (Kept::Files, None)] {
        let place = Place::new(rights, None)?;
        let (server, mut vm) = place.served()?;
        let pid = server.pid();
        let status = status(pid)?;
        let is = |field: &str, value: &str| {
            ensure!(
                status.get(field).map(String::as_str) == Some(value),
                "{status:?}"
            );
            Ok(())
        };
        is("NoNewPrivs", "1")?;
        is("Seccomp", "2")?;
        // CAP_KILL.
        is("CapEff", "0000000000000020")?;
        is("CapPrm", "0000000000000020")?;
        let user = user.map_or(0, |user| user + pid).to_string();
        let users = [user.as_str(); 4].join("\t");
        is("Uid", &users)?;
        is("Gid", &users)?;
        vm.kill()?;
        vm.wait()?;
        server.end()?;
    }
    Ok(())
}

fn log_is_full() -> anyhow::Result<()> {
    requires_root()?;
    let place = Place::new(Kept::Files, None)?;
    // It has something to say.
    fs::write(&place.serving.set, "no working set")?;
    let log = File::options().write(true).open("/dev/full")?;
    let server = Server::start_logging_to(&place.serving, log.into())?;
    let (server, mut vm) = place.served_by(server)?;
    let mut thread = vm.thread()?;
    thread.begin(&Order::Read { page: 0, count: 64 })?;
    ensure!(saw(&mut thread)? == place.stamps, "it does not serve");
    vm.kill()?;
    vm.wait()?;
    server.end()
}

fn status(pid: u32) -> anyhow::Result<BTreeMap<String, String>> {
    let mut text = String::new();
    File::open(format!("/proc/{pid}/status"))
        .context("it has ended")?
        .read_to_string(&mut text)?;
    let fields = text.lines().filter_map(|line| line.split_once(":\t"));
    Ok(fields
        .map(|(name, value)| (name.into(), value.into()))
        .collect())
}
