//! The agent in a guest, from the host: is it there, ask it something, run a program through it.
//!
//! ```text
//!   owner ──── v.sock_5253 ◀── hello ─── agent        it listens: the record says so from now on (hello.rs)
//!   anybody ── v.sock ── CONNECT 5252 ─▶ agent        one connection a question or a session (connect.rs)
//! ```
//!
//! [`Agent`] needs nothing but the VM's directory: who runs a program in a guest need not be its owner, and goes on when
//! the owner dies. [`Agent::ask`] is one message and its answer on a connection of its own; [`Agent::exec`] is a session
//! (`docs/agent-protocol.md`), which goes on by itself when its connection breaks.

mod connect;
mod copy;
mod error;
mod exec;
pub(crate) mod hello;
mod process;
#[cfg(test)]
mod tests;
pub(crate) mod wake;

use std::time::Duration;

pub use copy::{Copy, CopyError};
pub use error::AgentError;
pub use exec::{Exec, Output};
pub use process::{Process, Reader, Signals, Writer};
pub use rekindle_agent::{Exit, Fate, Size};
use rekindle_agent::{Frame, FromAgent, FromHost, Hello, PROTOCOL};
pub use rekindle_archive::{Owner, PackError, Special, StreamError, Tally, UnpackError};
use tokio::net::UnixStream;

use self::connect::Line;
use crate::vm::dir::VmDir;
use crate::vm::follow::Changes;
use crate::vm::record::{GuestAgent, Record};
use crate::vm::state::State;
use crate::vm::wake::Waking;

/// How long an agent that is known to be there may leave a call unanswered. Firecracker gives up each after 2 s.
const PATIENCE: Duration = Duration::from_secs(30);

/// A call that was refused sooner was refused by the guest; Firecracker itself waits for 2 s.
const FIRECRACKERS_PATIENCE: Duration = Duration::from_secs(1);

/// How long to wait before the second call; each time twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// The agent in the guest of a VM.
#[derive(Clone, Debug)]
pub struct Agent {
    dir: VmDir,
}

impl Agent {
    /// The agent in the guest of the VM that has this directory, whoever owns it.
    pub fn of(dir: &VmDir) -> Agent {
        Agent { dir: dir.clone() }
    }

    /// Waits until the agent of a guest that has one listens, and says who it is. It is told, not asked again and
    /// again. For a guest that is not known to have one, it is asked once.
    pub async fn ready(&self) -> Result<Hello, AgentError> {
        let mut changes = Changes::of(&self.dir)?;
        loop {
            let record = self.running_record()?;
            match record.agent {
                Some(GuestAgent::Ready { protocol, version }) => {
                    return checked(Hello { protocol, version });
                }
                Some(GuestAgent::Awaited) => self.change(&mut changes, &record).await?,
                None => return self.ping().await,
            }
        }
    }

    /// Asks the agent whether it is there, and who it is.
    pub async fn ping(&self) -> Result<Hello, AgentError> {
        match self.ask(&FromHost::Ping).await? {
            FromAgent::Pong(hello) => checked(hello),
            _ => Err(AgentError::Nonsense),
        }
    }

    /// Says something to the agent, on a connection of its own, and returns the one message that it answers. Who cannot
    /// wait for as long as a guest takes sets a limit.
    pub async fn ask(&self, message: &FromHost) -> Result<FromAgent, AgentError> {
        ask_through(self.reach(WhenPaused::Refuse).await?, message).await
    }

    /// Who is there, whatever is known. A guest that refuses is asked once; one that has no time to is asked again.
    pub(crate) async fn ping_awaited(&self) -> Result<Hello, AgentError> {
        let begun = tokio::time::Instant::now();
        loop {
            let called = tokio::time::Instant::now();
            let source = match connect::connect(&self.dir).await {
                Ok(stream) => match ask_through(stream, &FromHost::Ping).await? {
                    FromAgent::Pong(hello) => return Ok(hello),
                    _ => return Err(AgentError::Nonsense),
                },
                Err(source) => source,
            };
            if called.elapsed() < FIRECRACKERS_PATIENCE || begun.elapsed() > PATIENCE {
                let vm = self.dir.name();
                return Err(AgentError::NoAgent { vm, source });
            }
        }
    }

    /// A program to run in the guest: its name, which is looked for along its `PATH`, and its arguments.
    pub fn exec<I>(&self, argv: I) -> Exec
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        Exec::new(self.clone(), argv.into_iter().map(Into::into).collect())
    }

    /// A connection to the agent. One that is known to be there is called again where it does not answer, which is so
    /// around a snapshot and in a guest that is short of processors.
    async fn reach(&self, paused: WhenPaused) -> Result<UnixStream, AgentError> {
        let mut changes = Changes::of(&self.dir)?;
        let begun = tokio::time::Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let record = match paused {
                WhenPaused::Refuse => self.running_record()?,
                WhenPaused::Wait => self.record()?,
            };
            if record.state != State::Running
                || record.capturing.is_some()
                || record.agent == Some(GuestAgent::Awaited)
                || matches!(record.waking, Some(Waking::Due { .. }))
            {
                self.change(&mut changes, &record).await?;
                continue;
            }
            let refusal = match connect::connect(&self.dir).await {
                Ok(stream) => return Ok(stream),
                Err(refusal) => refusal,
            };
            if self.has_died(&record) {
                return Err(self.ended());
            }
            if record.agent.is_none() {
                return Err(AgentError::NoAgent {
                    vm: self.dir.name(),
                    source: refusal,
                });
            }
            if begun.elapsed() > PATIENCE {
                return Err(AgentError::Silent {
                    vm: self.dir.name(),
                    source: refusal,
                });
            }
            // Nothing tells when a guest has a moment.
            let _ = tokio::time::timeout(pause, changes.next()).await;
            pause *= 2;
        }
    }

    /// The record of a VM that is not over.
    fn record(&self) -> Result<Record, AgentError> {
        let record = Record::read(&self.dir)?;
        if record.state.is_over() {
            return Err(self.ended());
        }
        if record.machine.vsock.is_none() {
            return Err(AgentError::NoVsock {
                vm: self.dir.name(),
            });
        }
        Ok(record)
    }

    /// The record of a VM that runs, or is about to.
    fn running_record(&self) -> Result<Record, AgentError> {
        let record = self.record()?;
        if record.state == State::Paused && record.capturing.is_none() {
            return Err(AgentError::Paused {
                vm: self.dir.name(),
            });
        }
        Ok(record)
    }

    /// Waits until something changes in the directory, or Firecracker dies.
    async fn change(&self, changes: &mut Changes, record: &Record) -> Result<(), AgentError> {
        let pidfd = match &record.firecracker {
            Some(process) => Some(process.open_pidfd().map_err(|_| self.ended())?),
            None => None,
        };
        let death = async {
            match &pidfd {
                Some(pidfd) => drop(pidfd.exited().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = changes.next() => Ok(changed?),
            () = death => Err(self.ended()),
        }
    }

    fn has_died(&self, record: &Record) -> bool {
        let firecracker = record.firecracker.as_ref();
        firecracker.is_none_or(|process| !process.is_alive())
    }

    fn ended(&self) -> AgentError {
        AgentError::Ended {
            vm: self.dir.name(),
        }
    }
}

/// What a call does while the VM is paused for longer than a snapshot takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WhenPaused {
    /// It fails.
    Refuse,
    /// It waits, as what was begun goes on with the VM.
    Wait,
}

async fn ask_through(stream: UnixStream, message: &FromHost) -> Result<FromAgent, AgentError> {
    let mut line = Line::new(stream);
    line.send(&message.frame()).await?;
    match line.next().await? {
        Some(Frame::Message(json)) => Ok(FromAgent::parse(&json)?),
        Some(_) => Err(AgentError::Nonsense),
        None => Err(AgentError::HungUp),
    }
}

fn checked(hello: Hello) -> Result<Hello, AgentError> {
    if hello.protocol == PROTOCOL {
        return Ok(hello);
    }
    Err(AgentError::Protocol {
        theirs: hello.protocol,
        version: hello.version,
    })
}
