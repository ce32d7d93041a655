//! Ending a VM: the guest is asked, given time, then killed through its pidfd.

use std::time::Duration;

use jiff::Timestamp;

use super::adopt::{end_leftovers, end_workers_in};
use super::claim::Claim;
use super::console::Console;
use super::dir::{DirError, VmDir};
use super::record::{Record, RecordError};
use super::state::{Ask, State, Step, decide};
use super::{End, Vm, VmError, launch};

/// How a VM is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// The guest gets Ctrl-Alt-Del and this long to shut itself down. A paused guest cannot, and is killed at once.
    Ask(Duration),
    /// It is killed at once.
    Kill,
}

/// Why a VM that nobody owns could not be ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// Somebody owns it, or its directory cannot be used.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// What is left of it cannot be looked for.
    #[error("cannot look for the processes of the VM")]
    Look(#[source] std::io::Error),
    /// Its record cannot be read or written.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Kills what is left of a VM whose owner is dead, keeps its last output, and writes down that it was stopped. `Ok` if
/// it had ended already; the state that it ended in.
pub async fn stop_unowned(dir: VmDir) -> Result<State, StopError> {
    let claim = Claim::take(dir)?;
    let mut record = Record::read(claim.dir())?;
    if record.state.is_over() {
        return Ok(record.state);
    }
    end_leftovers(&record).await.map_err(StopError::Look)?;
    end_workers_in(claim.dir()).await;
    // Output is no reason to leave the VM undone.
    if let Ok(mut console) = Console::open(claim.dir()) {
        console.finish().await;
    }
    launch::remove_sockets(claim.dir());
    claim.dir().undo_network()?;
    record.state = State::Stopped;
    record.ended = Some(Timestamp::now());
    record.capturing = None;
    record.firecracker = None;
    record.pager = None;
    record.write(claim.dir())?;
    Ok(record.state)
}

impl Vm {
    /// Ends the VM. `Ok` if it had ended already; the state that it ended in. Its directory stays until this is
    /// dropped, or for good if it was told to [live on](Vm::live_on).
    pub async fn stop(&mut self, manner: Manner) -> Result<State, VmError> {
        if decide(&self.record.state, Ask::Stop)? == Step::Already {
            return Ok(self.record.state.clone());
        }
        if let (Manner::Ask(grace), State::Running) = (manner, &self.record.state) {
            self.ask_to_end(grace).await;
        }
        Ok(self.finish(End::Asked).await)
    }

    /// Ends the VM and removes its directory.
    pub async fn remove(mut self) -> Result<(), DirError> {
        if self.crew.is_some() {
            self.finish(End::Asked).await;
        }
        self.claim.remove()
    }

    /// Whatever goes wrong here, killing is next.
    async fn ask_to_end(&mut self, grace: Duration) {
        let Some(crew) = &mut self.crew else { return };
        let asked = crew
            .guard(async |client| client.send_ctrl_alt_del().await)
            .await;
        if matches!(asked, Ok(Ok(()))) {
            let _ = tokio::time::timeout(grace, crew.lost()).await;
        }
    }
}
