//! The processes that one VM is made of, and what their deaths mean.
//!
//! ```text
//!   firecracker ──── faults ───▶ pager (UFFD restores only)
//!        │                         │
//!        └────── watched by pidfd ─┘      pager dead: firecracker is killed, or the guest hangs for ever
//! ```

use std::path::Path;
use std::time::Duration;

use rekindle_firecracker::Client;
use rekindle_firecracker::{Exit, Process, ProcessId};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::dir::VmDir;
use super::launch::{self, API_PATIENCE, StartError};
use super::reaped::exit_of;
use super::state::Why;
use crate::pager::PagerProcess;

/// How long a process whose connection broke, or whose page server ended, may take to be seen dead itself.
const DEATH_PATIENCE: Duration = Duration::from_millis(20);

/// How long a process that got SIGKILL may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// The VM lost a process that it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Firecracker ended by itself, with this in words.
    Firecracker { exit: String, clean: bool },
    /// The page server ended; Firecracker was killed for it.
    Pager { exit: String },
}

/// The processes. Dropped while armed, it kills them and waits until they are gone.
#[derive(Debug)]
pub(crate) struct Crew {
    pub(crate) firecracker: Process,
    pub(crate) client: Client,
    pub(crate) pager: Option<PagerProcess>,
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
        pager: Option<PagerProcess>,
        on_drop: OnDrop,
    ) -> Crew {
        Crew {
            firecracker,
            client,
            pager,
            dir,
            on_drop,
        }
    }

    pub(crate) fn on_drop(&mut self, on_drop: OnDrop) {
        self.on_drop = on_drop;
    }

    /// Waits until a process that the VM needs is gone, and says which, and how.
    pub(crate) async fn lost(&mut self) -> Lost {
        self.first_death().await;
        self.conclude().await
    }

    /// Runs a call, unless a process is lost meanwhile: a lost page server leaves a call unanswered for ever.
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
                match tokio::time::timeout(DEATH_PATIENCE, self.first_death()).await {
                    Ok(()) => Err(self.conclude().await),
                    Err(_) => Ok(Err(refusal)),
                }
            }
            None => Err(self.conclude().await),
        }
    }

    /// Completes when a process that the VM needs is gone. May be dropped and called again.
    pub(crate) async fn first_death(&self) {
        let firecracker = self.firecracker.wait();
        match &self.pager {
            None => drop(firecracker.await),
            Some(pager) => tokio::select! {
                _ = firecracker => {}
                () = pager.exited() => {}
            },
        }
    }

    /// Says whose death it was, and ends the guest if it was the page server's.
    async fn conclude(&mut self) -> Lost {
        // The page server ends by itself when Firecracker does, and may be seen to end first.
        if let Ok(Ok(exit)) = tokio::time::timeout(DEATH_PATIENCE, self.firecracker.wait()).await {
            // The page server kills a guest that it cannot serve rightly, and says why.
            if let Some(reason) = self.killed_by_pager().await {
                return Lost::Pager { exit: reason };
            }
            let exit = match exit {
                Exit::Unknown => exit_of(&self.dir, self.firecracker.id().pid).await,
                known => known,
            };
            return Lost::Firecracker {
                clean: exit.is_success(),
                exit: exit.to_string(),
            };
        }
        let _ = self.firecracker.kill();
        let _ = self.firecracker.wait().await;
        let exit = self
            .pager
            .as_mut()
            .map_or_else(String::new, |pager| pager.epitaph(&self.dir));
        Lost::Pager { exit }
    }

    async fn killed_by_pager(&mut self) -> Option<String> {
        let pager = self.pager.as_mut()?;
        tokio::time::timeout(KILL_PATIENCE, pager.exited())
            .await
            .ok()?;
        pager.reap();
        // One that gave up before it had the VM left no stats, but words.
        let reason = pager.kill_reason(&self.dir);
        if reason.is_none() && pager.has_failed() {
            return Some(pager.epitaph(&self.dir));
        }
        reason
    }

    /// Kills what still runs and waits until it is gone.
    pub(crate) async fn kill(&mut self) {
        let _ = self.firecracker.kill();
        let _ = tokio::time::timeout(KILL_PATIENCE, self.firecracker.wait()).await;
        self.dismiss_pager().await;
    }

    /// Waits for the page server to write its stats and end, now that Firecracker has ended; a page server that
    /// does not is killed.
    pub(crate) async fn dismiss_pager(&mut self) {
        if let Some(mut pager) = self.pager.take() {
            if tokio::time::timeout(KILL_PATIENCE, pager.exited())
                .await
                .is_err()
            {
                pager.kill();
                pager.exited().await;
            }
            pager.reap();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        if self.on_drop == OnDrop::LiveOn {
            return;
        }
        end_now(&self.firecracker);
        if let Some(pager) = &mut self.pager {
            pager.kill();
            pager.reap();
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
    pager: Option<PagerProcess>,
}

impl Starting {
    /// With a page server, or without one.
    pub(crate) fn new(dir: &VmDir, pager: Option<PagerProcess>) -> Starting {
        Starting {
            dir: dir.clone(),
            firecracker: None,
            pager,
        }
    }

    /// Starts Firecracker, and tells who it is.
    pub(crate) fn launch(&mut self, program: &Path, id: &str) -> Result<ProcessId, StartError> {
        let process = launch::start(program, &self.dir, id)?;
        Ok(self.firecracker.insert(process).id().clone())
    }

    /// The page server.
    pub(crate) fn pager(&self) -> Option<ProcessId> {
        self.pager.as_ref().map(|pager| pager.id().clone())
    }

    /// The crew, once Firecracker's API answers.
    pub(crate) async fn ready(mut self) -> Result<Crew, StartError> {
        let firecracker = self.firecracker.as_ref().expect("it was launched");
        let client = firecracker.ready(API_PATIENCE).await?;
        let firecracker = self.firecracker.take().expect("it was launched");
        let pager = self.pager.take();
        Ok(Crew::new(
            self.dir.clone(),
            firecracker,
            client,
            pager,
            OnDrop::Kill,
        ))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(firecracker) = &self.firecracker {
            end_now(firecracker);
        }
        if let Some(pager) = &mut self.pager {
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
            Lost::Pager { exit } => Why::PagerDied { exit: exit.clone() },
        }
    }
}
