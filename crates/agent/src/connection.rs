//! A caller's connection: the first message says what it is for; then one thread reads and one writes.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::thread;

use rekindle_agent::{
    Decoder, Frame, FromAgent, FromHost, Hello, PROTOCOL, Received, Refusal, Why,
};

use crate::peer::Peer;
use crate::session::Session;
use crate::sessions::Sessions;

const BUFFER: usize = 64 << 10;

/// Looks after a connection, on threads of its own. One that the guest has no thread for is closed.
pub(crate) fn attend(sessions: &Arc<Sessions>, peer: Peer) {
    let sessions = sessions.clone();
    let serve = move || {
        if let Err(error) = serve(&sessions, peer) {
            eprintln!("rekindle-agent: a caller was hung up on: {error}");
        }
    };
    let started = thread::Builder::new().name("caller".into()).spawn(serve);
    if let Err(error) = started {
        eprintln!("rekindle-agent: no thread for a caller: {error}");
    }
}

fn serve(sessions: &Arc<Sessions>, mut peer: Peer) -> io::Result<()> {
    let mut frames = Frames::new();
    let Some(first) = frames.next(&mut peer)? else {
        return Ok(());
    };
    let Frame::Message(json) = first else {
        return Err(nonsense("the first frame is no message"));
    };
    match FromHost::parse(&json).map_err(nonsense)? {
        FromHost::Ping => tell(&mut peer, &FromAgent::Pong(ourselves())),
        FromHost::Open { protocol, .. } if protocol != PROTOCOL => {
            let version = env!("CARGO_PKG_VERSION");
            let words = format!(
                "the guest's agent ({version}) speaks version {PROTOCOL} of the protocol, not {protocol}"
            );
            let why = Why::Protocol;
            tell(&mut peer, &FromAgent::Refused(Refusal { why, words }))
        }
        FromHost::Open {
            session,
            exec,
            received,
            ..
        } => match sessions.open(session, exec.as_deref()) {
            Ok(session) => go_on(&session, peer, frames, received),
            Err(refusal) => tell(&mut peer, &FromAgent::Refused(refusal)),
        },
        _ => Err(nonsense("the first message opens nothing")),
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
