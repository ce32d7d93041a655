//! The host's side of a session, without the connection: what to send, and what became of what came.

use thiserror::Error;

use crate::PROTOCOL;
use crate::flow::{Inbox, Offence, Outbox};
use crate::frame::{Frame, Stream};
use crate::message::{Exec, Exit, FromAgent, FromHost, MessageError, Received, Refusal, SessionId};

/// A session, as who called sees it. It outlives its connections: give each new one [`Caller::open`] first.
#[derive(Debug)]
pub struct Caller {
    session: SessionId,
    exec: Box<Exec>,
    stdin: Outbox,
    stdout: Inbox,
    stderr: Inbox,
    begun: Begun,
    exit: Option<Exit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begun {
    /// The agent has never answered.
    Never,
    /// There is a session, and the present connection has no answer yet.
    Before,
    /// The present connection goes on with it.
    Now,
}

/// Why a connection, or the session, is of no use any more.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CallerError {
    /// The agent would not have the session.
    #[error(transparent)]
    Refused(Refusal),
    /// The agent said what cannot be understood.
    #[error("the agent says what this host does not understand")]
    Message(#[from] MessageError),
    /// The agent broke the rules.
    #[error("the agent breaks the rules of the protocol")]
    Offence(#[from] Offence),
    /// The agent said what has no place here.
    #[error("the agent says {0}, which has no place here")]
    OutOfPlace(&'static str),
}

impl Caller {
    /// A session that is to be begun.
    pub fn new(session: SessionId, exec: Exec) -> Caller {
        Caller {
            session,
            exec: Box::new(exec),
            stdin: Outbox::default(),
            stdout: Inbox::default(),
            stderr: Inbox::default(),
            begun: Begun::Never,
            exit: None,
        }
    }

    /// The first frame of a new connection. What of the input the agent does not have is sent again.
    pub fn open(&mut self) -> Frame {
        let exec = match self.begun {
            // The answer may be what was lost: the agent knows the session then, and starts nothing twice.
            Begun::Never => Some(self.exec.clone()),
            Begun::Before | Begun::Now => {
                self.begun = Begun::Before;
                None
            }
        };
        let open = FromHost::Open {
            protocol: PROTOCOL,
            session: self.session.clone(),
            exec,
            received: Received {
                stdout: self.stdout.resume(),
                stderr: self.stderr.resume(),
            },
        };
        open.frame()
    }

    /// Takes a frame from the agent.
    pub fn receive(&mut self, frame: Frame) -> Result<(), CallerError> {
        match frame {
            Frame::Message(json) => self.message(FromAgent::parse(&json)?),
            _ if self.begun != Begun::Now => Err(CallerError::OutOfPlace("something else first")),
            Frame::Data {
                stream,
                offset,
                bytes,
            } => Ok(self.output(stream)?.data(offset, &bytes)?),
            Frame::End { stream, offset } => Ok(self.output(stream)?.end(offset)?),
            Frame::Ack {
                stream: Stream::Stdin,
                offset,
            } => Ok(self.stdin.acknowledged(offset)?),
            Frame::Ack { .. } => Err(CallerError::OutOfPlace("that it has its own output")),
        }
    }

    fn message(&mut self, message: FromAgent) -> Result<(), CallerError> {
        match message {
            FromAgent::Begun { stdin, .. } if self.begun != Begun::Now => {
                self.stdin.again_from(stdin)?;
                self.begun = Begun::Now;
                Ok(())
            }
            FromAgent::Refused(refusal) => Err(CallerError::Refused(refusal)),
            FromAgent::Exited(exit) if self.begun == Begun::Now => {
                self.exit = Some(exit);
                Ok(())
            }
            FromAgent::Begun { .. } => Err(CallerError::OutOfPlace("twice that it has begun")),
            FromAgent::Exited(_) => Err(CallerError::OutOfPlace("that what never began ended")),
            FromAgent::Hello(_) | FromAgent::Pong(_) => {
                Err(CallerError::OutOfPlace("that it is there"))
            }
            FromAgent::WhatTime | FromAgent::Woken(_) | FromAgent::Quiesced(_) => {
                Err(CallerError::OutOfPlace("what answers others"))
            }
        }
    }

    fn output(&mut self, stream: Stream) -> Result<&mut Inbox, CallerError> {
        match stream {
            Stream::Stdin => Err(CallerError::OutOfPlace("what the program reads")),
            Stream::Stdout => Ok(&mut self.stdout),
            Stream::Stderr => Ok(&mut self.stderr),
        }
    }

    /// The next frame to send; `None` until something happens.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if self.begun != Begun::Now {
            return None;
        }
        for (stream, inbox) in [
            (Stream::Stdout, &mut self.stdout),
            (Stream::Stderr, &mut self.stderr),
        ] {
            if let Some(offset) = inbox.next_ack() {
                return Some(Frame::Ack { stream, offset });
            }
        }
        let stream = Stream::Stdin;
        if let Some((offset, bytes)) = self.stdin.next_data() {
            return Some(Frame::Data {
                stream,
                offset,
                bytes,
            });
        }
        let offset = self.stdin.next_end()?;
        Some(Frame::End { stream, offset })
    }

    /// How many bytes of input can be written.
    pub fn room(&self) -> usize {
        self.stdin.room()
    }

    /// Writes input, no more than there is [room](Caller::room) for.
    pub fn write(&mut self, bytes: &[u8]) {
        self.stdin.push(bytes);
    }

    /// The input has ended.
    pub fn end_input(&mut self) {
        self.stdin.end();
    }

    /// Takes output that came, `most` bytes of it. There is none of [`Stream::Stdin`].
    pub fn read(&mut self, stream: Stream, most: usize) -> Vec<u8> {
        match stream {
            Stream::Stdin => Vec::new(),
            Stream::Stdout => self.stdout.take(most),
            Stream::Stderr => self.stderr.take(most),
        }
    }

    /// How the program ended, once all of its output was read. The agent may be told to
    /// [forget](FromHost::Forget) the session then.
    pub fn outcome(&self) -> Option<Exit> {
        let is_read = self.stdout.is_over() && self.stderr.is_over();
        self.exit.filter(|_| is_read)
    }

    /// Whether the agent has answered through the present connection.
    pub fn is_open(&self) -> bool {
        self.begun == Begun::Now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Why;

    fn caller() -> Caller {
        Caller::new("s".parse().unwrap(), Exec::default())
    }

    fn begun(stdin: u64) -> Frame {
        FromAgent::Begun { pid: 1, stdin }.frame()
    }

    fn asks_to_run(frame: &Frame) -> bool {
        let Frame::Message(json) = frame else {
            panic!("{frame:?}")
        };
        match FromHost::parse(json).unwrap() {
            FromHost::Open { exec, .. } => exec.is_some(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_program_is_asked_for_until_it_is_known_to_have_begun() {
        let mut caller = caller();
        assert!(asks_to_run(&caller.open()));
        assert!(asks_to_run(&caller.open()), "the answer was lost");
        caller.receive(begun(0)).unwrap();
        assert!(!asks_to_run(&caller.open()));
    }

    #[test]
    fn input_that_was_lost_is_sent_again() {
        let mut caller = caller();
        caller.open();
        caller.write(b"abcdef");
        assert_eq!(caller.next_frame(), None, "nobody listens yet");
        caller.receive(begun(0)).unwrap();
        let data = |offset, bytes: &[u8]| Frame::Data {
            stream: Stream::Stdin,
            offset,
            bytes: bytes.to_vec(),
        };
        assert_eq!(caller.next_frame(), Some(data(0, b"abcdef")));
        caller.open();
        assert_eq!(caller.next_frame(), None);
        caller.receive(begun(4)).unwrap();
        assert_eq!(caller.next_frame(), Some(data(4, b"ef")));
        caller.end_input();
        let end = Frame::End {
            stream: Stream::Stdin,
            offset: 6,
        };
        assert_eq!(caller.next_frame(), Some(end));
        assert_eq!(caller.next_frame(), None);
    }

    #[test]
    fn the_outcome_waits_for_the_output() {
        let mut caller = caller();
        caller.open();
        caller.receive(begun(0)).unwrap();
        let stream = Stream::Stdout;
        let bytes = b"out".to_vec();
        let offset = 0;
        caller
            .receive(Frame::Data {
                stream,
                offset,
                bytes,
            })
            .unwrap();
        for (stream, offset) in [(Stream::Stdout, 3), (Stream::Stderr, 0)] {
            caller.receive(Frame::End { stream, offset }).unwrap();
        }
        caller
            .receive(FromAgent::Exited(Exit::Status(0)).frame())
            .unwrap();
        assert_eq!(caller.outcome(), None);
        assert_eq!(caller.read(Stream::Stdout, 10), b"out");
        assert_eq!(caller.outcome(), Some(Exit::Status(0)));
    }

    #[test]
    fn an_agent_that_breaks_the_rules_is_found_out() {
        let frames = [
            FromAgent::Exited(Exit::Status(0)).frame(),
            Frame::Ack {
                stream: Stream::Stdin,
                offset: 0,
            },
            Frame::Message(b"{}".to_vec()),
            FromAgent::Refused(Refusal {
                why: Why::Full,
                words: "no".into(),
            })
            .frame(),
            begun(1),
        ];
        for frame in frames {
            assert!(caller().receive(frame.clone()).is_err(), "{frame:?}");
        }
        let mut caller = caller();
        caller.receive(begun(0)).unwrap();
        let stream = Stream::Stdin;
        let frames = [
            begun(0),
            Frame::Ack { stream, offset: 1 },
            Frame::End { stream, offset: 0 },
            Frame::Ack {
                stream: Stream::Stdout,
                offset: 0,
            },
        ];
        for frame in frames {
            assert!(caller.receive(frame.clone()).is_err(), "{frame:?}");
        }
    }
}
