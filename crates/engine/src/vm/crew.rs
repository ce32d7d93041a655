//! The processes that one VM is made of, and what their deaths mean.
//!
//! ```text
//!   firecracker ──── faults ───▶ pager (UFFD restores only)
//!        │                         │
//!   watched by pidfd          attended by the relay: a dead one is replaced; if nobody can take over,
//!   here                      firecracker is killed, or the guest would wait for ever
//! ```
//!
//! So the one death that is waited for here is Firecracker's, and what the relay says of it tells whose it was.

use std::time::Duration;

use rekindle_firecracker::{Client, Exit, Process, ProcessId};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::dir::VmDir;
use super::launch::{self, API_PATIENCE, StartError};
use super::reaped::exit_of;
use super::record::Record;
use super::relay::{Means, Relay, Verdict};
use super::state::Why;
use crate::Engine;
use crate::net::Place;
use crate::pager::{PagerProcess, has_state, kill_reason};

/// How long a process whose connection broke may take to be seen dead itself.
const DEATH_PATIENCE: Duration = Duration::from_millis(20);

/// How long a page server without a VM may take to be seen dead. It may as well wait for one that never comes.
const IDLE_PATIENCE: Duration = Duration::from_millis(200);

/// How often a Firecracker whose end cannot be waited for is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// How long a process that got SIGKILL may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// SIGKILL.
const KILLED: i32 = 9;

/// The VM lost a process that it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Firecracker ended by itself, with this in words.
    Firecracker { exit: String, clean: bool },
    /// The page server ended, and none took its place; Firecracker was killed for it.
    Pager { exit: String },
    /// The page server ended before it had the VM: nothing has run yet. Firecracker was killed for it.
    NeverServed { exit: String },
}

/// The processes. Dropped while armed, it kills them and waits until they are gone.
#[derive(Debug)]
pub(crate) struct Crew {
    pub(crate) firecracker: Process,
    pub(crate) client: Client,
    relay: Option<Relay>,
    dir: VmDir,
    on_drop: OnDrop,
}

/// What happens to the processes when their owner lets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnDrop {
    /// They are killed.
    Kill,
    /// They live on.
    LiveOn,
}

impl Crew {
    pub(crate) fn new(
        dir: VmDir,
        firecracker: Process,
        client: Client,
        relay: Option<Relay>,
        on_drop: OnDrop,
    ) -> Crew {
        Crew {
            firecracker,
            client,
            relay,
            dir,
            on_drop,
        }
    }

    pub(crate) fn on_drop(&mut self, on_drop: OnDrop) {
        self.on_drop = on_drop;
    }

    /// Waits until the VM is gone, and says for whose death, and how it came.
    pub(crate) async fn lost(&mut self) -> Lost {
        self.first_death().await;
        self.conclude().await
    }

    /// Runs a call, unless the VM is lost meanwhile. A page server that is replaced only delays the answer.
    pub(crate) async fn guard<T, E>(
        &mut self,
        call: impl AsyncFnOnce(&Client) -> Result<T, E>,
    ) -> Result<Result<T, E>, Lost> {
        let answer = tokio::select! {
            biased;
            answer = call(&self.client) => Some(answer),
            () = self.first_death() => None,
        };
        match answer {
            Some(Ok(answer)) => Ok(Ok(answer)),
            // A call that broke because the process died is told as the death that it is. The connection
            // breaks a moment before the process is gone.
            Some(Err(refusal)) => {
                let is_lost = self.relay.as_ref().is_some_and(Relay::is_lost);
                let patience = if is_lost {
                    KILL_PATIENCE
                } else {
                    DEATH_PATIENCE
                };
                match tokio::time::timeout(patience, self.first_death()).await {
                    Ok(()) => Err(self.conclude().await),
                    Err(_) => Ok(Err(refusal)),
                }
            }
            None => Err(self.conclude().await),
        }
    }

    /// Completes when the VM is gone. May be dropped and called again.
    pub(crate) async fn first_death(&self) {
        // Whose end cannot be waited for is not dead.
        while self.firecracker.wait().await.is_err() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Says whose death it was.
    async fn conclude(&mut self) -> Lost {
        let exit = self.firecracker.wait().await.unwrap_or(Exit::Unknown);
        // The page server ends by itself when Firecracker does, and may have killed it: it says so at its end.
        match self.verdict().await {
            Some(Verdict::GaveUp(exit)) => return Lost::Pager { exit },
            Some(Verdict::NeverServed(exit)) => return Lost::NeverServed { exit },
            // A Firecracker that ended by itself makes a page server without a VM end, too.
            Some(Verdict::Refused(words)) if exit == Exit::Signal(KILLED) => {
                return Lost::Pager { exit: words };
            }
            Some(Verdict::WithTheVm | Verdict::Refused(_)) => {
                if let Some(exit) = kill_reason(&self.dir) {
                    return Lost::Pager { exit };
                }
            }
            None => {}
        }
        let exit = match exit {
            Exit::Unknown => exit_of(&self.dir, self.firecracker.id().pid).await,
            known => known,
        };
        Lost::Firecracker {
            clean: exit.is_success(),
            exit: exit.to_string(),
        }
    }

    /// What became of the page server, now that Firecracker has ended.
    async fn verdict(&mut self) -> Option<Verdict> {
        let relay = self.relay.as_mut()?;
        let patience = if has_state(&self.dir) {
            KILL_PATIENCE
        } else {
            IDLE_PATIENCE
        };
        tokio::time::timeout(patience, relay.over()).await.ok()
    }

    /// Kills what still runs and waits until it is gone.
    pub(crate) async fn kill(&mut self) {
        let _ = self.firecracker.kill();
        let _ = tokio::time::timeout(KILL_PATIENCE, self.firecracker.wait()).await;
        // The page server writes its stats and ends; one that does not is killed.
        self.verdict().await;
        if let Some(mut relay) = self.relay.take() {
            relay.end();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        if self.on_drop == OnDrop::LiveOn {
            return;
        }
        end_now(&self.firecracker);
        if let Some(relay) = &mut self.relay {
            relay.end();
        }
    }
}

/// Kills Firecracker and waits, without a runtime, until it is gone.
fn end_now(firecracker: &Process) {
    let patience = Timespec::try_from(KILL_PATIENCE).ok();
    if firecracker.kill().is_ok() {
        let mut gone = [PollFd::new(firecracker.pidfd(), PollFlags::IN)];
        let _ = rustix::event::poll(&mut gone, patience.as_ref());
    }
    let _ = firecracker.try_wait();
}

/// Processes of a start, before they are a crew. Dropped, also by a caller who gives up waiting, it kills them.
#[derive(Debug)]
pub(crate) struct Starting {
    dir: VmDir,
    firecracker: Option<Process>,
    pager: Option<(PagerProcess, Means)>,
}

impl Starting {
    /// With a page server, or without one.
    pub(crate) fn new(dir: &VmDir, pager: Option<(PagerProcess, Means)>) -> Starting {
        Starting {
            dir: dir.clone(),
            firecracker: None,
            pager,
        }
    }

    /// Starts Firecracker, and tells who it is.
    pub(crate) fn launch(
        &mut self,
        engine: &Engine,
        record: &Record,
        place: &Place<'_>,
    ) -> Result<ProcessId, StartError> {
        launch::start(engine, &self.dir, record, place, &mut self.firecracker)?;
        let process = self.firecracker.as_ref().expect("it was started");
        Ok(process.id().clone())
    }

    /// The crew, once Firecracker's API answers.
    pub(crate) async fn ready(mut self) -> Result<Crew, StartError> {
        let firecracker = self.firecracker.as_ref().expect("it was launched");
        let client = firecracker.ready(API_PATIENCE).await?;
        let pidfd = firecracker.pidfd().try_clone();
        let pidfd = pidfd.map_err(StartError::Watch)?;
        let firecracker = self.firecracker.take().expect("it was launched");
        let relay = self.pager.take().map(|(pager, means)| {
            Relay::start(means, firecracker.id().clone(), pidfd, Some(pager))
        });
        Ok(Crew::new(
            self.dir.clone(),
            firecracker,
            client,
            relay,
            OnDrop::Kill,
        ))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(firecracker) = &self.firecracker {
            end_now(firecracker);
        }
        if let Some((pager, _)) = &mut self.pager {
            pager.kill();
            pager.reap();
        }
    }
}

impl Lost {
    /// As the reason in a VM's record.
    pub(crate) fn why(&self, log: Vec<String>) -> Why {
        match self {
            Lost::Firecracker { exit, .. } => Why::FirecrackerDied {
                exit: exit.clone(),
                log,
            },
            Lost::Pager { exit } | Lost::NeverServed { exit } => {
                Why::PagerDied { exit: exit.clone() }
            }
        }
    }
}
