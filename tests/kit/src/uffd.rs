//! A process that plays Firecracker for a page server: guest memory, a real userfaultfd, threads as vCPUs.
//!
//! ```text
//!   test process                          child: the test program again, with an order in its environment
//!   ────────────                          ───────────────────────────────────────────────────────────────
//!   FakeVm::start ───────────────────────► maps the regions, registers them
//!   vm.thread() ── connects ─────────────► a guest thread
//!     thread.ask(Order::Handshake) ──────►   connects to the page server, sends JSON and descriptor
//!     thread.ask(Order::Read …) ─────────►   touches memory, answers with what it saw
//! ```
//!
//! It is a process of its own because a page server kills its VM when it must. A page is described by its
//! *stamp*, one word from which all its words follow: so one number says what a page holds, and a page
//! that mixes two is found.

mod guest;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// Bytes of a small page; stamps are a small page each, whatever the memory is made of.
pub const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// What tells the test program that it is to play the VM.
const ORDERS: &str = "REKINDLE_KIT_PLAYS_VM";
/// How long an answer may take before a test is told that the guest hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// The words of a page with this stamp; 0 is a page of zeros.
pub fn page_of(stamp: u64) -> Vec<u8> {
    (0..WORDS)
        .flat_map(|at| word_of(stamp, at).to_ne_bytes())
        .collect()
}

fn word_of(stamp: u64, at: usize) -> u64 {
    let factor = 2 * u64::try_from(at).expect("a small number") + 1;
    stamp.wrapping_mul(factor)
}

/// How pages of zeros get into a memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    /// As holes.
    Holes,
    /// As zeros, as Firecracker itself writes them.
    Written,
}

/// Makes a memory file of these stamps.
pub fn write_memory(path: &Path, stamps: &[u64], zeros: Zeros) -> io::Result<()> {
    let file = File::create_new(path)?;
    file.set_len(byte(stamps.len()))?;
    for (page, &stamp) in stamps.iter().enumerate() {
        if stamp != 0 || zeros == Zeros::Written {
            file.write_all_at(&page_of(stamp), byte(page))?;
        }
    }
    Ok(())
}

fn byte(page: usize) -> u64 {
    (page * PAGE)
        .try_into()
        .expect("a file of less than 16 EiB")
}

/// How the fake VM is built.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Build {
    /// The length of each region, in small pages.
    pub regions: Vec<usize>,
    /// Of huge pages.
    pub huge: bool,
    /// With a descriptor that blocks.
    pub blocking: bool,
}

/// What a guest thread is asked for. Pages are small ones, counted through all regions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Order {
    /// Says what there is to say to the page server.
    Handshake(Handshake),
    /// Says how many bytes of JSON a handshake would be, and what.
    Describe,
    /// Looks at pages.
    Read {
        /// The first.
        page: usize,
        /// How many.
        count: usize,
    },
    /// Fills a page.
    Write {
        /// Which.
        page: usize,
        /// With this.
        stamp: u64,
    },
    /// Gives pages back, as a balloon does.
    Remove {
        /// The first.
        page: usize,
        /// How many.
        count: usize,
    },
    /// Gives one page back many times over.
    Flood {
        /// Which.
        page: usize,
        /// How often.
        times: usize,
    },
    /// Fills a missing page through the VM's own copy of the descriptor, waking nobody.
    Slip {
        /// Which.
        page: usize,
        /// With this.
        stamp: u64,
    },
    /// Writes all memory to a file, the kernel touching the pages.
    Dump {
        /// The file.
        path: PathBuf,
    },
    /// Closes the VM's own copy of the descriptor.
    CloseDescriptor,
    /// Closes the connection to the page server, as Firecracker up to 1.11 does.
    HangUp,
    /// Reads, writes and gives back pages at random, and checks each against what it must be.
    Random {
        /// What the choices follow from.
        seed: u64,
        /// How many.
        steps: usize,
        /// The first page that is this thread's.
        page: usize,
        /// What its pages hold to begin with.
        stamps: Vec<u64>,
    },
    /// Gives pages back in some threads and looks at the same pages in others, and checks each look.
    Storm(Storm),
    /// Reads one word of each page, in a scattered order, and says how long each took.
    Time {
        /// The first page.
        page: usize,
        /// How many.
        count: usize,
    },
}

/// Removals over pages that are looked at meanwhile; nobody writes to them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Storm {
    /// What the choices follow from.
    pub seed: u64,
    /// The first page of the stretch.
    pub page: usize,
    /// What its pages hold to begin with.
    pub stamps: Vec<u64>,
    /// How many threads give pages back. The first one does nothing else, as a balloon; the others look at what
    /// they gave back.
    pub removers: usize,
    /// How many threads look at pages until no more are given back.
    pub readers: usize,
    /// How many runs of pages each of the removers gives back.
    pub removals: usize,
}

/// What was seen in a [`Storm`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Looks at pages that held what the memory file has.
    pub kept: u64,
    /// Looks at pages that had been given back, and were zero.
    pub gone: u64,
    /// Looks at pages that were being given back, or about to be, and held either.
    pub going: u64,
    /// Pages given back, each time.
    pub removed: u64,
}

/// What is sent to a page server.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Handshake {
    /// Where to.
    pub socket: PathBuf,
    /// Instead of the truth.
    pub message: Option<String>,
    /// Descriptors sent along.
    pub hand: Vec<Handed>,
}

/// A descriptor in a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Handed {
    /// The userfaultfd.
    Uffd,
    /// `/dev/null`.
    Null,
}

impl Order {
    /// A handshake as Firecracker makes it.
    pub fn handshake(socket: &Path) -> Order {
        Order::Handshake(Handshake {
            socket: socket.into(),
            message: None,
            hand: vec![Handed::Uffd],
        })
    }
}

/// What a guest thread answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// The stamps that were seen; `None` for a page that has none.
    Stamps(Vec<Option<u64>>),
    /// The JSON of the handshake.
    Text(String),
    /// Nanoseconds.
    Times(Vec<u64>),
    /// The storm is over.
    Seen(Seen),
    /// It did not work, or a page was wrong.
    Failed(String),
}

/// The process, as the test sees it. It is killed when dropped.
#[derive(Debug)]
pub struct FakeVm {
    child: Child,
    control: tempfile::TempPath,
}

/// One thread of the guest.
#[derive(Debug)]
pub struct GuestThread {
    stream: BufReader<UnixStream>,
}

impl FakeVm {
    /// Starts one. The test program's `main` must begin with [`play_if_asked`].
    pub fn start(build: &Build) -> anyhow::Result<FakeVm> {
        let dir = std::env::temp_dir();
        let (listener, control) = tempfile::Builder::new()
            .prefix("fakevm")
            .make_in(dir, |path| UnixListener::bind(path))?
            .into_parts();
        let program = std::env::current_exe().context("cannot find the test program")?;
        let child = Command::new(program)
            .env(ORDERS, serde_json::to_string(build)?)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .context("cannot start the fake VM")?;
        Ok(FakeVm { child, control })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A new thread of the guest.
    pub fn thread(&self) -> anyhow::Result<GuestThread> {
        let stream = UnixStream::connect(&self.control).context("cannot reach the fake VM")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(GuestThread {
            stream: BufReader::new(stream),
        })
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Kills it.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        Ok(self.child.kill()?)
    }

    /// Waits until it has ended.
    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait()?)
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        // It may have ended, or been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl GuestThread {
    /// Gives an order without waiting for its answer.
    pub fn begin(&mut self, order: &Order) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        Ok(self.stream.get_mut().write_all(&line)?)
    }

    /// The answer to the oldest order without one; `None` if the VM died before it came.
    pub fn finish(&mut self) -> anyhow::Result<Option<Answer>> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(serde_json::from_str(&line)?)),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(e) => Err(e).context("the guest does not answer: it hangs"),
        }
    }

    /// Whether there is no answer after this long.
    pub fn still_waits_after(&mut self, time: Duration) -> anyhow::Result<bool> {
        self.stream.get_ref().set_read_timeout(Some(time))?;
        let got = self.stream.fill_buf().map(<[u8]>::len);
        self.stream.get_ref().set_read_timeout(Some(PATIENCE))?;
        Ok(got.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock))
    }

    /// Gives an order and waits for its answer; that the order failed is an error.
    pub fn ask(&mut self, order: &Order) -> anyhow::Result<Answer> {
        self.begin(order)?;
        match self.finish()? {
            Some(Answer::Failed(why)) => bail!("{order:?}: {why}"),
            Some(answer) => Ok(answer),
            None => bail!("the VM died over {order:?}"),
        }
    }

    /// The stamps of these pages; a page that has none is an error.
    pub fn read(&mut self, page: usize, count: usize) -> anyhow::Result<Vec<u64>> {
        match self.ask(&Order::Read { page, count })? {
            Answer::Stamps(stamps) => stamps
                .into_iter()
                .collect::<Option<_>>()
                .context("a page mixes two"),
            other => bail!("{other:?} is no answer to a read"),
        }
    }
}

/// Plays the VM, and does not return, if this process was started for that.
pub fn play_if_asked() {
    let Some(build) = std::env::var_os(ORDERS) else {
        return;
    };
    let played =
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(serde_json::from_slice(build.as_encoded_bytes())?))
            .and_then(|build| guest::play(&build));
    if let Err(error) = played {
        eprintln!("the fake VM: {error:#}");
    }
    std::process::exit(1);
}

/// Connects to a page server and leaves without a word, as one does who asks whether it listens.
pub fn knock(socket: &Path) -> io::Result<()> {
    drop(UnixStream::connect(socket)?);
    Ok(())
}

/// Connects to a page server, says something without any descriptor, and waits until it hangs up.
pub fn babble(socket: &Path, message: &[u8]) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(message)?;
    match stream.read(&mut [0]) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Err(e) => Err(e),
    }
}
