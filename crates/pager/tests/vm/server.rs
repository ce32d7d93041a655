//! Page servers as processes of their own, which can be killed: the test program again, told by its environment.

use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rekindle_pager::{
    Adoption, Failing, Living, Options, PagerError, Rights, Socket, Source, Stats, adopt, collect,
    serve, server_of,
};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use crate::sandbox::Deed;

/// What tells the test program that it is to serve.
const DUTY: &str = "REKINDLE_TEST_SERVES_PAGES";
/// How long a page server may take to be where it should be.
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_micros(200);

/// What a page server is told.
#[derive(Debug, Serialize, Deserialize)]
enum Duty {
    Serve(Serving),
    Adopt {
        vm: u32,
        state: PathBuf,
        replace: bool,
        rights: Kept,
    },
}

/// What rights a page server is to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kept {
    /// Those to its files: it writes down all itself.
    Files,
    /// None: whoever started it does.
    Nothing,
}

impl From<Kept> for Rights {
    fn from(kept: Kept) -> Rights {
        match kept {
            Kept::Files => Rights::ItsFiles,
            Kept::Nothing => Rights::None,
        }
    }
}

/// Whom and what to serve.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Serving {
    pub(crate) source: Source,
    pub(crate) socket: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) stats: PathBuf,
    pub(crate) set: PathBuf,
    pub(crate) rights: Kept,
    /// What it tries when the VM has ended.
    pub(crate) deed: Option<Deed>,
}

/// Serves, and does not return, if this process was started for that.
pub(crate) fn serve_if_asked() {
    let Some(duty) = env::var_os(DUTY) else {
        return;
    };
    let served = set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(serde_json::from_slice(duty.as_encoded_bytes())?))
        .and_then(|duty| Ok(follow(duty)?));
    if let Err(error) = &served {
        eprintln!("a page server: {error:#}");
    }
    std::process::exit(i32::from(served.is_err()));
}

fn follow(duty: Duty) -> Result<Stats, PagerError> {
    match duty {
        Duty::Serve(serving) => {
            let told = serving.clone();
            let mut options = Options::new(Socket::Path(told.socket), told.source);
            options.state = Some(told.state);
            options.stats = Some(told.stats);
            options.replay = Some(told.set.clone());
            options.record = Some(told.set);
            options.failing = Failing::LeavesItToASuccessor;
            options.rights = told.rights.into();
            let stats = serve(options, |_| println!("ready"))?;
            match serving.deed {
                Some(deed) => deed.attempt(&serving),
                None => Ok(stats),
            }
        }
        Duty::Adopt {
            vm,
            state,
            replace,
            rights,
        } => {
            let vm = i32::try_from(vm).expect("a process id");
            let mut adoption = Adoption::new(vm, state);
            adoption.rights = rights.into();
            if replace {
                adoption.living = Living::Replace;
            }
            adopt(adoption, Failing::LeavesItToASuccessor)
        }
    }
}

/// How a page server comes to its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Takeover {
    /// It is killed, and is dead when the next one starts.
    Dead,
    /// It is killed when the next one is about to start.
    Dying,
    /// The next one ends it.
    Replaced,
}

/// A page server of a VM. It is killed when dropped.
pub(crate) struct Server {
    child: Child,
    state: PathBuf,
    rights: Kept,
}

impl Server {
    /// Starts one, and waits until it listens.
    pub(crate) fn start(serving: &Serving) -> anyhow::Result<Server> {
        Server::start_logging_to(serving, Stdio::inherit())
    }

    pub(crate) fn start_logging_to(serving: &Serving, log: Stdio) -> anyhow::Result<Server> {
        let mut command = command(&Duty::Serve(serving.clone()))?;
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("its output is a pipe")?;
        let server = Server {
            child,
            state: serving.state.clone(),
            rights: serving.rights,
        };
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line == "ready\n", "the page server said {line:?}");
        Ok(server)
    }

    /// Puts another one in its place.
    pub(crate) fn hand_over(&mut self, vm: u32, how: Takeover) -> anyhow::Result<()> {
        // Who is dying is still alive to others.
        let replace = how != Takeover::Dead;
        let mut next = command(&Duty::Adopt {
            vm,
            state: self.state.clone(),
            replace,
            rights: self.rights,
        })?;
        match how {
            Takeover::Dead => {
                self.child.kill()?;
                self.child.wait()?;
            }
            Takeover::Dying => self.child.kill()?,
            // Of two that have both yet to take over, the later one is not always the last.
            Takeover::Replaced => self.serves()?,
        }
        if self.rights == Kept::Nothing {
            collect(&self.state)?;
        }
        let mut old = std::mem::replace(&mut self.child, next.spawn()?);
        wait(&mut old).map(drop)
    }

    /// Waits until it is the one that serves.
    pub(crate) fn serves(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while server_of(&self.state).ok() != Some(self.child.id()) {
            if let Some(status) = self.child.try_wait()? {
                bail!("the page server ended: {status}");
            }
            ensure!(Instant::now() < deadline, "it never serves");
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ends, once it has.
    pub(crate) fn status(mut self) -> anyhow::Result<ExitStatus> {
        wait(&mut self.child)
    }

    /// Waits until it has ended, which it does when its VM has.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        let status = wait(&mut self.child)?;
        ensure!(status.success(), "the page server ended: {status}");
        if self.rights == Kept::Nothing {
            collect(&self.state)?;
        }
        Ok(())
    }

    pub(crate) fn state(&self) -> &Path {
        &self.state
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended, or been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(duty: &Duty) -> anyhow::Result<Command> {
    let program = env::current_exe().context("cannot find the test program")?;
    let mut command = Command::new(program);
    command.env(DUTY, serde_json::to_string(duty)?);
    Ok(command)
}

fn wait(child: &mut Child) -> anyhow::Result<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        ensure!(Instant::now() < deadline, "a page server does not end");
        thread::sleep(PAUSE);
    }
}
