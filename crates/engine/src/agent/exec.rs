//! What to run in a guest, and how.

use std::future::{Future, IntoFuture};
use std::pin::Pin;

use rekindle_agent::{Exec as Wanted, Exit, Fate, SessionId, Size};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::io::AsyncReadExt;

use super::process::Process;
use super::{Agent, AgentError};

/// Where a program finds others, unless it is told another place.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that is to be run in a guest. Awaited, it is started.
#[derive(Clone, Debug)]
#[must_use = "nothing runs until it is awaited"]
pub struct Exec {
    agent: Agent,
    wanted: Wanted,
}

/// What a program wrote, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

impl Exec {
    pub(super) fn new(agent: Agent, argv: Vec<String>) -> Exec {
        let wanted = Wanted {
            argv,
            env: vec![("PATH".to_owned(), PATH.to_owned())],
            ..Wanted::default()
        };
        Exec { agent, wanted }
    }

    /// Sets a variable of its environment, which has a `PATH` and its user's `HOME` otherwise.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let name = name.into();
        self.wanted.env.retain(|(other, _)| *other != name);
        self.wanted.env.push((name, value.into()));
        self
    }

    /// Where it works; `/` otherwise.
    pub fn dir(mut self, dir: impl Into<String>) -> Self {
        self.wanted.dir = Some(dir.into());
        self
    }

    /// Who it runs as: `user` or a number, with `:group` if wanted; root otherwise.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.wanted.user = Some(user.into());
        self
    }

    /// Gives it a terminal of this size. What it writes comes as standard output then, errors too.
    pub fn tty(mut self, size: Size) -> Self {
        self.wanted.tty = Some(size);
        self
    }

    /// What becomes of it when its [`Process`] is dropped or this program dies; killed after ten seconds otherwise.
    pub fn fate(mut self, fate: Fate) -> Self {
        self.wanted.fate = fate;
        self
    }

    /// It reads nothing, and what it writes goes to the guest's console, which is the VM's serial output.
    pub fn on_console(mut self) -> Self {
        self.wanted.console = true;
        self
    }

    /// The guest goes down, and the VM with it, once it has ended and its caller knows how, or is gone for good.
    pub fn ends_guest(mut self) -> Self {
        self.wanted.ends_guest = true;
        self
    }

    /// Starts it. It runs when this returns.
    ///
    /// # Errors
    /// When there is no agent, the VM does not run, or the guest cannot run the program.
    pub async fn start(self) -> Result<Process, AgentError> {
        Process::start(self.agent, fresh_session(), self.wanted).await
    }

    /// Runs it without input to its end, and keeps all that it writes.
    ///
    /// # Errors
    /// As for [`Exec::start`], and when the VM ends meanwhile.
    pub async fn output(self) -> Result<Output, AgentError> {
        let mut process = self.start().await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let (out, err) = (process.stdout.take(), process.stderr.take());
        process.stdin = None;
        let (exit, _, _) = tokio::join!(
            process.outcome(),
            async {
                match out {
                    Some(mut out) => out.read_to_end(&mut stdout).await,
                    None => Ok(0),
                }
            },
            async {
                match err {
                    Some(mut err) => err.read_to_end(&mut stderr).await,
                    None => Ok(0),
                }
            },
        );
        Ok(Output {
            exit: exit?,
            stdout,
            stderr,
        })
    }
}

impl IntoFuture for Exec {
    type Output = Result<Process, AgentError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.start())
    }
}

/// A session's name that nobody has had.
fn fresh_session() -> SessionId {
    let mut bytes = [0; 16];
    // Sixteen bytes come whole or not at all once the pool is ready.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    let name = format!("{:032x}", u128::from_ne_bytes(bytes));
    name.parse().expect("hexadecimal digits, 32 of them")
}
