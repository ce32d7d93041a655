//! Ending a VM: the guest is asked, given time, then killed through its pidfd.

use std::time::Duration;

use super::state::{Ask, State, Step, decide};
use super::{End, Vm, VmError};
use crate::vm::dir::DirError;

/// How a VM is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// The guest gets Ctrl-Alt-Del and this long to shut itself down. A paused guest cannot, and is killed at once.
    Ask(Duration),
    /// It is killed at once.
    Kill,
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
        self.claim.dir().remove()
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
