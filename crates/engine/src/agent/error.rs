//! Why an agent is of no use.

use std::io;
use std::path::PathBuf;

use rekindle_agent::{CallerError, FrameError, MessageError, PROTOCOL, Refusal};

use crate::vm::follow::FollowError;
use crate::vm::record::RecordError;

/// Why a guest's agent could not be asked, or would not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The VM has no device to reach it through.
    #[error(
        "{vm} has no vsock device, so its guest cannot be asked: start it with --vsock 3, or without --kernel and --initrd"
    )]
    NoVsock {
        /// The VM.
        vm: String,
    },
    /// Nobody listens in the guest.
    #[error(
        "the guest of {vm} has no agent: start it without --kernel and --initrd, or run rekindle-agent in it"
    )]
    NoAgent {
        /// The VM.
        vm: String,
        /// What came of calling it.
        #[source]
        source: ConnectError,
    },
    /// It was there before, and does not answer any more.
    #[error("the agent in the guest of {vm} does not answer; see: rekindle logs {vm}")]
    Silent {
        /// The VM.
        vm: String,
        /// What came of the last call.
        #[source]
        source: ConnectError,
    },
    /// The guest stands still.
    #[error("{vm} is paused; let it run with: rekindle resume {vm}")]
    Paused {
        /// The VM.
        vm: String,
    },
    /// The VM is over.
    #[error("{vm} has ended")]
    Ended {
        /// The VM.
        vm: String,
    },
    /// The agent speaks another version of the protocol.
    #[error(
        "the guest's agent ({version}) speaks version {theirs} of the protocol, this program {PROTOCOL}: use the rekindle that the guest was booted with, or boot it anew"
    )]
    Protocol {
        /// Its version of the protocol.
        theirs: u32,
        /// Its release.
        version: String,
    },
    /// It will not run the program.
    #[error(transparent)]
    Refused(Refusal),
    /// It breaks the rules.
    #[error("the guest's agent cannot be understood")]
    Caller(#[source] CallerError),
    /// It sends what are no frames.
    #[error("the guest's agent cannot be understood")]
    Frame(#[from] FrameError),
    /// It says what is no message.
    #[error("the guest's agent cannot be understood")]
    Message(#[from] MessageError),
    /// It answers something else.
    #[error("the guest's agent answers something else than it was asked")]
    Nonsense,
    /// It was asked, and the connection ended.
    #[error("the guest's agent hung up")]
    HungUp,
    /// It was asked, and nothing came.
    #[error("the guest's agent took the call and says nothing")]
    Unanswered,
    /// The connection broke.
    #[error("the connection to the guest's agent broke")]
    Broke(#[from] io::Error),
    /// What is known of the VM cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Nobody tells when the VM changes.
    #[error(transparent)]
    Follow(#[from] FollowError),
}

impl From<CallerError> for AgentError {
    fn from(error: CallerError) -> Self {
        match error {
            CallerError::Refused(refusal) => AgentError::Refused(refusal),
            other => AgentError::Caller(other),
        }
    }
}

/// Why there is no connection to an agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The vsock device's socket cannot be used.
    #[error("cannot connect to {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The guest does not listen there, or did not answer in time.
    #[error("nobody answers on vsock port {port}")]
    Refused {
        /// The port.
        port: u32,
    },
    /// Firecracker answered something that it never answers.
    #[error("the answer through {path} makes no sense")]
    Answer {
        /// The socket.
        path: PathBuf,
    },
}
