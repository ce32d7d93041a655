//! What the host and the agent inside a guest say to each other: a small protocol over one stream per session.
//!
//! ```text
//!   host ──Open──▶ agent      ──Data stdin──▶  ◀──Data stdout, stderr──  ◀──Exited──  ──Forget──▶
//!        ◀─Begun──                ◀──Ack──            ──Ack──▶
//! ```
//!
//! A session outlives its stream. Firecracker resets every vsock connection when a snapshot is taken, and whoever called
//! may die; so bytes are counted from the session's beginning, each side keeps what the other has not acknowledged, and
//! a new stream goes on where the old one broke: nothing is lost, nothing comes twice. What is kept is bounded, which is
//! also the back-pressure: who does not read stops who writes.
//!
//! `docs/agent-protocol.md` has it byte for byte. This library is pure: no system calls, no threads, no runtime.
#![forbid(unsafe_code)]

mod caller;
mod flow;
mod frame;
mod message;
mod transfer;

pub use caller::{Caller, CallerError};
pub use flow::{Inbox, Offence, Outbox, WINDOW};
pub use frame::{Decoder, Frame, FrameError, MAX_DATA, MAX_FRAME, Stream};
pub use message::{
    Address, Clock, Exec, Exit, Fate, FromAgent, FromHost, Hello, Hook, HookEnd, InvalidSessionId,
    MessageError, Orphan, Quiesce, Quiesced, Received, Refusal, SessionId, Size, Step, Vm, Wake,
    What, Why, Woken,
};
pub use transfer::Transfer;

/// The version of the protocol. Either side refuses another's.
pub const PROTOCOL: u32 = 1;

/// The vsock port that the agent listens on.
pub const PORT: u32 = 5252;

/// The vsock port of the host that the agent calls once it listens.
pub const HELLO_PORT: u32 = 5253;
