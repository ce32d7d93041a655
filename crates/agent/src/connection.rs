//! A caller's connection: the first message says what it is for; then one thread reads and one writes.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rekindle_agent::{
    Decoder, Frame, FromAgent, FromHost, Hello, PROTOCOL, Quiesce, Received, Refusal, Why,
};

use crate::Place;
use crate::freeze::Freezer;
use crate::log::say;
use crate::peer::Peer;
use crate::session::Session;
use crate::sessions::Sessions;
use crate::wake::{HostTime, Identity};

const BUFFER: usize = 64 << 10;

/// All that callers can ask for.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) sessions: Arc<Sessions>,
    identity: Identity,
    freezer: Arc<Freezer>,
}

impl Guest {
    pub(crate) fn new(place: Place) -> Guest {
        Guest {
            sessions: Arc::new(Sessions::new(place)),
            identity: Identity::default(),
            freezer: Arc::default(),
        }
    }
}

/// Looks after a connection, on threads of its own. One that the guest has no thread for is closed.
pub(crate) fn attend(guest: &Arc<Guest>, peer: Peer) {
    let guest = guest.clone();
    let serve = move || {
        if let Err(error) = serve(&guest, peer) {
            say(format_args!(
                "rekindle-agent: a caller was hung up on: {error}"
            ));
        }
    };
    let started = thread::Builder::new().name("caller".into()).spawn(serve);
    if let Err(error) = started {
        say(format_args!(
            "rekindle-agent: no thread for a caller: {error}"
        ));
    }
}

fn serve(guest: &Guest, mut peer: Peer) -> io::Result<()> {
    let mut frames = Frames::new();
    let Some(first) = frames.next(&mut peer)? else {
        return Ok(());
    };
    let Frame::Message(json) = first else {
        return Err(nonsense("the first frame is no message"));
    };
    match FromHost::parse(&json).map_err(nonsense)? {
        FromHost::Ping => tell(&mut peer, &FromAgent::Pong(ourselves())),
        FromHost::Open { protocol, .. } | FromHost::Quiesce(Quiesce { protocol, .. })
            if protocol != PROTOCOL =>
        {
            tell(&mut peer, &FromAgent::Refused(other_protocol(protocol)))
        }
        FromHost::Wake(wake) if wake.protocol != PROTOCOL => tell(
            &mut peer,
            &FromAgent::Refused(other_protocol(wake.protocol)),
        ),
        FromHost::Open {
            session,
            exec,
            received,
            ..
        } => match guest.sessions.open(session, exec.as_deref()) {
            Ok(session) => go_on(&session, peer, frames, received),
            Err(refusal) => tell(&mut peer, &FromAgent::Refused(refusal)),
        },
        FromHost::Wake(asked) => {
            let Guest {
                sessions,
                identity,
                freezer,
            } = guest;
            let ask_time = || what_time(&mut peer, &mut frames);
            let answer = match identity.wake(&asked, sessions, freezer, ask_time) {
                Ok(woken) => FromAgent::Woken(woken),
                Err(refusal) => FromAgent::Refused(refusal),
            };
            tell(&mut peer, &answer)
        }
        FromHost::Quiesce(asked) => stand_still(&guest.freezer, &asked, &mut peer, &mut frames),
        _ => Err(nonsense("the first message opens nothing")),
    }
}

/// Until the connection ends.
fn stand_still(
    freezer: &Arc<Freezer>,
    asked: &Quiesce,
    peer: &mut Peer,
    frames: &mut Frames,
) -> io::Result<()> {
    let (quiesced, _frozen) = match freezer.freeze(asked) {
        Ok(frozen) => frozen,
        Err(refusal) => return tell(peer, &FromAgent::Refused(refusal)),
    };
    tell(peer, &FromAgent::Quiesced(quiesced))?;
    match frames.next(peer)? {
        None => Ok(()),
        Some(_) => Err(nonsense("a message to who stands still")),
    }
}

fn other_protocol(theirs: u32) -> Refusal {
    let version = env!("CARGO_PKG_VERSION");
    let words = format!(
        "the guest's agent ({version}) speaks version {PROTOCOL} of the protocol, not {theirs}"
    );
    let why = Why::Protocol;
    Refusal { why, words }
}

/// Asks the host for its time.
fn what_time(peer: &mut Peer, frames: &mut Frames) -> io::Result<HostTime> {
    let asked = Instant::now();
    tell(peer, &FromAgent::WhatTime)?;
    let Some(Frame::Message(json)) = frames.next(peer)? else {
        return Err(nonsense("no time"));
    };
    match FromHost::parse(&json).map_err(nonsense)? {
        FromHost::Time { unix_ns } => Ok(HostTime {
            unix: Duration::from_nanos(unix_ns),
            answer_took: asked.elapsed(),
        }),
        _ => Err(nonsense("no time")),
    }
}

fn go_on(
    session: &Arc<Session>,
    mut peer: Peer,
    mut frames: Frames,
    received: Received,
) -> io::Result<()> {
    let call = session
        .called(peer.try_clone()?, received)
        .map_err(nonsense)?;
    let writer = {
        let (session, peer) = (session.clone(), peer.try_clone()?);
        thread::Builder::new()
            .name("answers".into())
            .spawn(move || write(&session, call, peer))
    };
    let read = match writer {
        Ok(_) => read(session, call, &mut peer, &mut frames),
        Err(error) => Err(error),
    };
    peer.shut_down();
    session.hung_up(call);
    read
}

fn read(session: &Session, call: u64, peer: &mut Peer, frames: &mut Frames) -> io::Result<()> {
    while let Some(frame) = frames.next(peer)? {
        session.receive(call, frame).map_err(nonsense)?;
    }
    Ok(())
}

fn write(session: &Session, call: u64, mut peer: Peer) {
    while let Some(bytes) = session.to_send(call) {
        if peer.write_all(&bytes).is_err() {
            break;
        }
    }
    // It ends the thread that reads, too.
    peer.shut_down();
}

/// Calls the host, to say that the agent listens. Nobody may be there to hear it: who owns the VM later asks by himself.
pub(crate) fn announce() -> io::Result<()> {
    tell(&mut Peer::host()?, &FromAgent::Hello(ourselves()))
}

fn ourselves() -> Hello {
    Hello {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn tell(peer: &mut Peer, message: &FromAgent) -> io::Result<()> {
    let mut bytes = Vec::new();
    message.frame().encode(&mut bytes);
    peer.write_all(&bytes)
}

fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionReset | NotConnected)
}

fn nonsense(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The frames that come through a connection.
struct Frames {
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl Frames {
    fn new() -> Frames {
        Frames {
            decoder: Decoder::default(),
            buffer: vec![0; BUFFER],
        }
    }

    /// The next one; `None` when the caller hung up.
    fn next(&mut self, peer: &mut Peer) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(nonsense)? {
                return Ok(Some(frame));
            }
            match peer.read(&mut self.buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.feed(&self.buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // As Firecracker ends every connection when a snapshot is taken, and a newer one the older.
                Err(error) if is_end(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}
