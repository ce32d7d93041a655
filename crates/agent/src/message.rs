//! Messages: what is said besides the bytes. JSON, one object a frame, told apart by its `is`.

mod wake;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::wake::{
    Address, Clock, Hook, HookEnd, Orphan, Quiesce, Quiesced, Step, Vm, Wake, What, Woken,
};
use crate::frame::Frame;

/// What the host says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum FromHost {
    /// Are you there? The first and only message of a stream; [`FromAgent::Pong`] answers it.
    Ping,
    /// Begin a session, or go on with it: the first message of any other stream.
    Open {
        /// The host's [`PROTOCOL`](crate::PROTOCOL).
        protocol: u32,
        /// Chosen by the host, never used before.
        session: SessionId,
        /// What to run, if there is no such session yet. Without it, there must be one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exec: Option<Box<Exec>>,
        /// From where on the host wants the program's output.
        received: Received,
    },
    /// Send the program's process group a signal.
    Signal {
        /// Its number on Linux, 1 to 64.
        number: i32,
    },
    /// The terminal has another size now.
    Resize(Size),
    /// The exit and all of the output have come: the session is over.
    Forget,
    /// You are another VM from now on. The first message of a stream; [`FromAgent::Woken`] answers it.
    Wake(Box<Wake>),
    /// The time, which [`FromAgent::WhatTime`] asked for.
    Time {
        /// Nanoseconds since 1970, UTC.
        unix_ns: u64,
    },
    /// You are about to be copied. The first message of a stream; [`FromAgent::Quiesced`] answers it, and what it did is
    /// undone when the stream ends.
    Quiesce(Quiesce),
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum FromAgent {
    /// The first and only message of a stream that the agent opens: it listens from now on.
    Hello(Hello),
    /// The answer to [`FromHost::Ping`].
    Pong(Hello),
    /// The program runs, or did.
    Begun {
        /// Its pid in the guest.
        pid: u32,
        /// How many bytes of its input the agent has passed on. What follows is to be sent, again too.
        stdin: u64,
    },
    /// There will be no session. The last message of the stream.
    Refused(Refusal),
    /// The program has ended. All of its output was sent before.
    Exited(Exit),
    /// Tell the time, at once: half of what the answer takes is added to it.
    WhatTime,
    /// The guest is awake, and programs can run. The last message of the stream.
    Woken(Woken),
    /// File systems stand still.
    Quiesced(Quiesced),
}

/// Who speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The agent's [`PROTOCOL`](crate::PROTOCOL).
    pub protocol: u32,
    /// The agent's release.
    pub version: String,
}

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program, found along the `PATH` of its environment, and its arguments.
    pub argv: Vec<String>,
    /// Its environment; nothing is added to it.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Where it works; `/` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// Who it runs as, `user` or `uid`, with `:group` or `:gid` if wanted; whoever the agent is if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The size of the terminal that it gets; pipes if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<Size>,
    /// What becomes of it without its caller.
    #[serde(default)]
    pub fate: Fate,
    /// It reads nothing, and what it writes goes to the guest's console instead of the caller.
    #[serde(default, skip_serializing_if = "is_false")]
    pub console: bool,
    /// The guest goes down once it has ended and its caller knows, or is gone for good.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ends_guest: bool,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_false(value: &bool) -> bool {
    !value
}

/// What becomes of a program whose caller is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It goes on. Once it writes more than is kept for its caller, it waits for one.
    LivesOn,
    /// It is killed if the caller is not back after so many milliseconds.
    EndsAfterMs(u32),
}

impl Default for Fate {
    fn default() -> Self {
        Fate::EndsAfterMs(10_000)
    }
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// How many bytes of each of the program's outputs the host has passed on. What follows is to be sent, again too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// Of standard output.
    pub stdout: u64,
    /// Of standard error.
    pub stderr: u64,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// By itself, with this status.
    Status(i32),
    /// By a signal.
    Signal(i32),
}

/// Why there is no session.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize, Deserialize)]
#[error("{words}")]
pub struct Refusal {
    /// Which kind of reason.
    pub why: Why,
    /// The reason in words.
    pub words: String,
}

/// Kinds of reasons for which there is no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The host speaks another version of the protocol.
    Protocol,
    /// Nobody knows the session: it was forgotten, or the guest was started anew.
    NoSession,
    /// There is no such program, directory or user.
    NotFound,
    /// The program may not be run.
    NotAllowed,
    /// What was asked for makes no sense.
    Nonsense,
    /// The guest has no room for another program.
    Full,
    /// It would have taken longer than was allowed.
    TooLate,
}

/// A session's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionId(String);

/// A session's name that is none.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a session's name has 1 to 64 of the characters a-z, 0-9 and -")]
pub struct InvalidSessionId;

impl FromStr for SessionId {
    type Err = InvalidSessionId;

    fn from_str(text: &str) -> Result<Self, InvalidSessionId> {
        let valid = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        if text.is_empty() || text.len() > 64 || !text.bytes().all(valid) {
            return Err(InvalidSessionId);
        }
        Ok(SessionId(text.to_owned()))
    }
}

impl TryFrom<String> for SessionId {
    type Error = InvalidSessionId;

    fn try_from(text: String) -> Result<Self, InvalidSessionId> {
        text.parse()
    }
}

impl From<SessionId> for String {
    fn from(id: SessionId) -> String {
        id.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A message that cannot be understood.
#[derive(Debug, Error)]
#[error("a message that cannot be understood")]
pub struct MessageError(#[from] serde_json::Error);

impl FromHost {
    /// The message as a frame.
    pub fn frame(&self) -> Frame {
        frame(self)
    }

    /// A message from a frame's JSON.
    pub fn parse(json: &[u8]) -> Result<FromHost, MessageError> {
        Ok(serde_json::from_slice(json)?)
    }
}

impl FromAgent {
    /// The message as a frame.
    pub fn frame(&self) -> Frame {
        frame(self)
    }

    /// A message from a frame's JSON.
    pub fn parse(json: &[u8]) -> Result<FromAgent, MessageError> {
        Ok(serde_json::from_slice(json)?)
    }
}

fn frame(message: &impl Serialize) -> Frame {
    let json = serde_json::to_vec(message).expect("these have nothing that JSON has not");
    Frame::Message(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> SessionId {
        "a-1".parse().unwrap()
    }

    #[test]
    fn messages_look_as_documented() {
        let open = FromHost::Open {
            protocol: 1,
            session: session(),
            exec: Some(Box::new(Exec {
                argv: vec!["uname".into(), "-a".into()],
                tty: Some(Size {
                    rows: 24,
                    columns: 80,
                }),
                ..Exec::default()
            })),
            received: Received::default(),
        };
        let json = r#"{"is":"open","protocol":1,"session":"a-1","exec":{"argv":["uname","-a"],"env":[],"tty":{"rows":24,"columns":80},"fate":{"ends_after_ms":10000}},"received":{"stdout":0,"stderr":0}}"#;
        assert_eq!(open.frame(), Frame::Message(json.into()));
        assert_eq!(FromHost::parse(json.as_bytes()).unwrap(), open);
        let host = [
            (FromHost::Ping, r#"{"is":"ping"}"#),
            (
                FromHost::Signal { number: 15 },
                r#"{"is":"signal","number":15}"#,
            ),
            (FromHost::Forget, r#"{"is":"forget"}"#),
        ];
        for (message, json) in host {
            assert_eq!(message.frame(), Frame::Message(json.into()));
            assert_eq!(FromHost::parse(json.as_bytes()).unwrap(), message);
        }
        let begun = FromAgent::Begun { pid: 7, stdin: 0 };
        assert_eq!(
            begun.frame(),
            Frame::Message(r#"{"is":"begun","pid":7,"stdin":0}"#.into())
        );
        let hello = Hello {
            protocol: 1,
            version: "0.1.0".into(),
        };
        assert_eq!(
            FromAgent::Hello(hello).frame(),
            Frame::Message(r#"{"is":"hello","protocol":1,"version":"0.1.0"}"#.into())
        );
        let exited = r#"{"is":"exited","status":3}"#;
        assert_eq!(
            FromAgent::parse(exited.as_bytes()).unwrap(),
            FromAgent::Exited(Exit::Status(3))
        );
    }

    #[test]
    fn a_message_that_is_none_is_told() {
        for json in ["", "{}", r#"{"is":"dance"}"#, r#"{"is":"open"}"#, "[1]"] {
            assert!(FromHost::parse(json.as_bytes()).is_err(), "{json}");
        }
        let climbing =
            r#"{"is":"open","protocol":1,"session":"../x","received":{"stdout":0,"stderr":0}}"#;
        let error = FromHost::parse(climbing.as_bytes()).unwrap_err();
        let reason = std::error::Error::source(&error).unwrap().to_string();
        assert!(reason.contains("a session's name"), "{reason}");
        assert!("".parse::<SessionId>().is_err());
        assert!("x".repeat(65).parse::<SessionId>().is_err());
    }
}
