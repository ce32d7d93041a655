//! What a VM may be asked in which state. Pure: no I/O, read this first.
//!
//! ```text
//!               boot                 pause
//!   Configured ──────▶ Running ◀──────────────▶ Paused ◀── restore
//!        │                │          resume        │
//!        └────────────────┴───────────┬────────────┘
//!                                     ▼
//!                        Stopped, or Failed(why)
//! ```
//!
//! Asking for what is already so is not an error: [`decide`] answers [`Step::Already`].

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "why")]
pub enum State {
    /// Its directory exists; the guest has not run yet.
    Configured,
    /// The guest's virtual CPUs run.
    Running,
    /// The guest stands still, its memory and devices are kept.
    Paused,
    /// It ended as asked, or the guest shut itself down.
    Stopped,
    /// It ended otherwise.
    Failed(Why),
}

impl State {
    /// Whether a Firecracker process belongs to this state.
    pub fn is_alive(&self) -> bool {
        matches!(self, State::Running | State::Paused)
    }

    /// Whether the VM has ended, one way or the other.
    pub fn is_over(&self) -> bool {
        matches!(self, State::Stopped | State::Failed(_))
    }

    /// One word for tables: `running`, `failed`, …
    pub fn word(&self) -> &'static str {
        match self {
            State::Configured => "configured",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Failed(_) => "failed",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Failed(why) => write!(f, "failed: {why}"),
            other => f.write_str(other.word()),
        }
    }
}

/// Why a VM failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[non_exhaustive]
pub enum Why {
    /// Firecracker ended by itself, not because it was asked.
    FirecrackerDied {
        /// How it ended, in words.
        exit: String,
        /// The last lines of its log.
        log: Vec<String>,
    },
    /// The page server ended while the guest still needed it; the VM was killed.
    PagerDied {
        /// How it ended, in words, with the page that was bad if that was the reason.
        exit: String,
    },
    /// It never got as far as running.
    NeverStarted {
        /// The error that ended boot or restore, with its causes.
        error: String,
    },
    /// Its processes were gone when somebody looked, with nobody left to tell why.
    Vanished {
        /// What was missing.
        what: String,
    },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::FirecrackerDied { exit, .. } => write!(f, "firecracker ended by itself ({exit})"),
            Why::PagerDied { exit } => {
                write!(f, "the page server ended ({exit}), the VM was killed")
            }
            Why::NeverStarted { error } => write!(f, "it never started: {error}"),
            Why::Vanished { what } => write!(f, "{what}"),
        }
    }
}

/// What can be asked of a VM that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Stop the virtual CPUs, keep everything.
    Pause,
    /// Let them run again.
    Resume,
    /// Write a snapshot, whatever the state before, and return to it.
    Snapshot,
    /// End it.
    Stop,
    /// Remove its directory.
    Remove,
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ask::Pause => "pause",
            Ask::Resume => "resume",
            Ask::Snapshot => "snapshot",
            Ask::Stop => "stop",
            Ask::Remove => "remove",
        })
    }
}

/// What an allowed request comes down to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is something to do.
    Do,
    /// It is so already; nothing to do, no error.
    Already,
}

/// A request that the VM's state forbids.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Only a VM that has started can do this.
    #[error("{0}: the VM has not started yet")]
    NotStarted(Ask),
    /// The VM has ended.
    #[error("{0}: the VM is stopped")]
    Stopped(Ask),
    /// The VM has failed.
    #[error("{0}: the VM has failed ({1})")]
    Failed(Ask, Why),
    /// Only an ended VM can be removed.
    #[error("{0}: the VM is {1}; stop it first, or use --force")]
    Alive(Ask, &'static str),
}

/// Whether `ask` is allowed in `state`, and whether it changes anything.
pub fn decide(state: &State, ask: Ask) -> Result<Step, Refusal> {
    use State::{Configured, Failed, Paused, Running, Stopped};
    match (state, ask) {
        (Running, Ask::Pause | Ask::Snapshot | Ask::Stop)
        | (Paused, Ask::Resume | Ask::Snapshot | Ask::Stop)
        | (Configured, Ask::Stop)
        | (Stopped | Failed(_) | Configured, Ask::Remove) => Ok(Step::Do),
        (Running, Ask::Resume) | (Paused, Ask::Pause) | (Stopped | Failed(_), Ask::Stop) => {
            Ok(Step::Already)
        }
        (Running | Paused, Ask::Remove) => Err(Refusal::Alive(ask, state.word())),
        (Configured, _) => Err(Refusal::NotStarted(ask)),
        (Stopped, _) => Err(Refusal::Stopped(ask)),
        (Failed(why), _) => Err(Refusal::Failed(ask, why.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> State {
        State::Failed(Why::Vanished {
            what: "gone".into(),
        })
    }

    #[test]
    fn repeating_what_is_so_is_no_error() {
        assert_eq!(decide(&State::Running, Ask::Resume), Ok(Step::Already));
        assert_eq!(decide(&State::Paused, Ask::Pause), Ok(Step::Already));
        assert_eq!(decide(&State::Stopped, Ask::Stop), Ok(Step::Already));
        assert_eq!(decide(&failed(), Ask::Stop), Ok(Step::Already));
    }

    #[test]
    fn an_ended_vm_refuses_with_its_reason() {
        let refusal = decide(&State::Stopped, Ask::Pause).unwrap_err();
        assert_eq!(refusal.to_string(), "pause: the VM is stopped");
        let refusal = decide(&failed(), Ask::Snapshot).unwrap_err();
        assert_eq!(refusal.to_string(), "snapshot: the VM has failed (gone)");
    }

    #[test]
    fn only_an_ended_vm_is_removed() {
        for (state, allowed) in [
            (State::Configured, true),
            (State::Running, false),
            (State::Paused, false),
            (State::Stopped, true),
            (failed(), true),
        ] {
            assert_eq!(decide(&state, Ask::Remove).is_ok(), allowed, "{state}");
        }
    }

    #[test]
    fn every_alive_state_can_be_stopped_and_snapshotted() {
        for state in [State::Running, State::Paused] {
            assert!(state.is_alive());
            assert_eq!(decide(&state, Ask::Stop), Ok(Step::Do));
            assert_eq!(decide(&state, Ask::Snapshot), Ok(Step::Do));
        }
    }

    #[test]
    fn a_state_survives_json() {
        let why = Why::PagerDied {
            exit: "signal 9".into(),
        };
        for state in [State::Configured, State::Running, State::Failed(why)] {
            let text = serde_json::to_string(&state).unwrap();
            assert_eq!(
                serde_json::from_str::<State>(&text).unwrap(),
                state,
                "{text}"
            );
        }
    }
}
