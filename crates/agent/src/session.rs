//! A session: a program, its bytes, and whoever calls at the moment.
//!
//! Everything that waits, waits for one condition variable: readers for room, the writer for input, the connection for
//! something to send, the end of the session for its caller.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rekindle_agent::{
    Exec, Exit, Fate, Frame, FromAgent, FromHost, Inbox, MAX_DATA, MessageError, Offence, Orphan,
    Outbox, Received, SessionId, Stream,
};
use rustix::process::{Pid, Signal};

use crate::peer::Peer;
use crate::program::Terminal;

/// What a caller said is wrong, and its connection of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Nonsense {
    #[error("a message that cannot be understood")]
    Message(#[from] MessageError),
    #[error("bytes that cannot be")]
    Offence(#[from] Offence),
    #[error("what has no place here")]
    OutOfPlace,
}

#[derive(Debug)]
pub(crate) struct Session {
    pid: Pid,
    fate: Fate,
    terminal: Option<Terminal>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    stdin: Inbox,
    stdout: Outbox,
    stderr: Outbox,
    exit: Option<Exit>,
    /// The present connection, and how many there were.
    caller: Option<Peer>,
    calls: u64,
    begun_told: bool,
    exit_told: bool,
    forgotten: bool,
    /// Nobody hears it and nobody can: it has no input, and what it writes beyond what is kept is thrown away.
    unheard: bool,
}

/// What a thread of the session does next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Input {
    Bytes(Vec<u8>),
    End,
}

impl Session {
    pub(crate) fn new(pid: Pid, exec: &Exec, terminal: Option<Terminal>) -> Session {
        let (mut stdout, mut stderr) = (Outbox::default(), Outbox::default());
        if terminal.is_some() || exec.console {
            // On a terminal all that it writes comes through the one.
            stderr.end();
        }
        if exec.console {
            stdout.end();
        }
        Session {
            pid,
            fate: exec.fate,
            terminal,
            inner: Mutex::new(Inner {
                stdin: Inbox::default(),
                stdout,
                stderr,
                exit: None,
                caller: None,
                calls: 0,
                begun_told: false,
                exit_told: false,
                forgotten: false,
                unheard: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        let waited = self.changed.wait(inner);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    // ---- The program's side.

    /// Waits for room in an output; `None` when nobody will ever want it.
    pub(crate) fn room(&self, stream: Stream) -> Option<usize> {
        let mut inner = self.inner();
        loop {
            if inner.forgotten {
                return None;
            }
            match inner.output(stream).room() {
                0 if inner.unheard => return Some(MAX_DATA),
                0 => inner = self.wait(inner),
                room => return Some(room),
            }
        }
    }

    /// Adds output for which there is room.
    pub(crate) fn wrote(&self, stream: Stream, bytes: &[u8]) {
        let mut inner = self.inner();
        let kept = match inner.unheard {
            true => bytes.len().min(inner.output(stream).room()),
            false => bytes.len(),
        };
        inner.output(stream).push(&bytes[..kept]);
        drop(inner);
        self.changed.notify_all();
    }

    /// An output has ended.
    pub(crate) fn wrote_all(&self, stream: Stream) {
        self.inner().output(stream).end();
        self.changed.notify_all();
    }

    /// Waits for input; `None` when the program has ended.
    pub(crate) fn input(&self, most: usize) -> Option<Input> {
        let mut inner = self.inner();
        loop {
            if inner.exit.is_some() || inner.forgotten {
                return None;
            }
            let bytes = inner.stdin.take(most);
            if !bytes.is_empty() {
                drop(inner);
                // There may be something to acknowledge.
                self.changed.notify_all();
                return Some(Input::Bytes(bytes));
            }
            if inner.stdin.is_over() || inner.unheard {
                return Some(Input::End);
            }
            inner = self.wait(inner);
        }
    }

    /// The program has ended, and is waited for. Nobody signals its number in between.
    pub(crate) fn reap(&self, wait: impl FnOnce() -> io::Result<Exit>) -> io::Result<()> {
        let mut inner = self.inner();
        inner.exit = Some(wait()?);
        drop(inner);
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn has_exited(&self) -> bool {
        self.inner().exit.is_some()
    }

    // ---- The caller's side.

    /// Takes a new connection, in the place of the one before. Returns its number.
    pub(crate) fn called(&self, peer: Peer, received: Received) -> Result<u64, Nonsense> {
        let mut inner = self.inner();
        if inner.unheard {
            return Err(Nonsense::OutOfPlace);
        }
        inner.stdout.again_from(received.stdout)?;
        inner.stderr.again_from(received.stderr)?;
        inner.begun_told = false;
        inner.exit_told = false;
        if let Some(before) = inner.caller.replace(peer) {
            before.shut_down();
        }
        inner.calls += 1;
        let call = inner.calls;
        drop(inner);
        self.changed.notify_all();
        Ok(call)
    }

    /// A connection has ended. Where it was the present one, the program waits for another, as long as it may.
    pub(crate) fn hung_up(&self, call: u64) {
        let mut inner = self.inner();
        if inner.calls != call {
            return;
        }
        inner.caller = None;
        self.changed.notify_all();
        self.wait_for_another(inner, call);
    }

    /// Waits until another caller than the last one is there, and kills the program once it may wait no more.
    fn wait_for_another(&self, mut inner: MutexGuard<'_, Inner>, call: u64) {
        let Fate::EndsAfterMs(patience) = self.fate else {
            return;
        };
        let patience = Duration::from_millis(patience.into());
        let begun = Instant::now();
        while inner.calls == call && !inner.forgotten {
            let Some(left) = patience.checked_sub(begun.elapsed()) else {
                self.kill(&inner, Signal::KILL);
                inner.forgotten = true;
                self.changed.notify_all();
                return;
            };
            let waited = self.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the program has ended, and its caller knows or will not come back.
    pub(crate) fn wait_until_over(&self) {
        let mut inner = self.inner();
        while !(inner.forgotten
            || (self.fate == Fate::LivesOn || inner.unheard) && inner.is_left_alone())
        {
            inner = self.wait(inner);
        }
        while inner.exit.is_none() {
            inner = self.wait(inner);
        }
    }

    // ---- Without a caller.

    /// From now on nobody hears it: it has no input, and what it writes is thrown away once enough of it is kept.
    pub(crate) fn unheard(&self) {
        self.inner().unheard = true;
        self.changed.notify_all();
    }

    /// Its caller is another VM's, and lost for ever. It goes on unheard, as long as its fate lets it. Tells who it is,
    /// unless it has ended.
    pub(crate) fn orphan(self: &Arc<Self>, session: &SessionId) -> Option<Orphan> {
        let mut inner = self.inner();
        inner.calls += 1;
        let call = inner.calls;
        if let Some(caller) = inner.caller.take() {
            caller.shut_down();
        }
        inner.unheard = true;
        if inner.exit.is_some() {
            inner.forgotten = true;
        }
        let over = inner.forgotten;
        drop(inner);
        self.changed.notify_all();
        if over {
            return None;
        }
        let orphan = self.clone();
        let waits = thread::Builder::new().name("orphan".into());
        let waits = waits.spawn(move || orphan.wait_for_another(orphan.inner(), call));
        if waits.is_err() {
            // Without a thread that waits there is no waiting.
            self.kill(&self.inner(), Signal::KILL);
        }
        Some(Orphan {
            session: session.clone(),
            pid: pid_of(self.pid),
            ends_after_ms: match self.fate {
                Fate::LivesOn => None,
                Fate::EndsAfterMs(patience) => Some(patience),
            },
        })
    }

    /// Whether its caller is another VM's.
    pub(crate) fn is_unheard(&self) -> bool {
        self.inner().unheard
    }

    /// Waits until it has ended and all that it wrote is here. Kills it at the deadline, and returns `None` then.
    pub(crate) fn outlast(&self, deadline: Instant) -> Option<Exit> {
        let mut inner = self.inner();
        loop {
            let over = inner.stdout.has_ended() && inner.stderr.has_ended();
            if let Some(exit) = inner.exit
                && over
            {
                return Some(exit);
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                self.kill(&inner, Signal::KILL);
                return None;
            };
            let waited = self.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What it wrote to standard error, of what is kept of it.
    pub(crate) fn complaints(&self) -> Vec<u8> {
        let mut inner = self.inner();
        let data = std::iter::from_fn(|| inner.stderr.next_data());
        data.flat_map(|(_, bytes)| bytes).collect()
    }

    /// Nobody will ask for it again.
    pub(crate) fn forget(&self) {
        self.inner().forgotten = true;
        self.changed.notify_all();
    }

    // ---- The caller's side again: what it says.

    /// Takes a frame from the present caller.
    pub(crate) fn receive(&self, call: u64, frame: Frame) -> Result<(), Nonsense> {
        let mut inner = self.inner();
        if inner.calls != call {
            return Err(Nonsense::OutOfPlace);
        }
        match frame {
            Frame::Data {
                stream: Stream::Stdin,
                offset,
                bytes,
            } => inner.stdin.data(offset, &bytes)?,
            Frame::End {
                stream: Stream::Stdin,
                offset,
            } => inner.stdin.end(offset)?,
            Frame::Ack {
                stream: stream @ (Stream::Stdout | Stream::Stderr),
                offset,
            } => inner.output(stream).acknowledged(offset)?,
            Frame::Message(json) => match FromHost::parse(&json)? {
                FromHost::Signal { number } => {
                    let signal = Signal::from_named_raw(number).ok_or(Nonsense::OutOfPlace)?;
                    self.kill(&inner, signal);
                }
                FromHost::Resize(size) => {
                    let terminal = self.terminal.as_ref().ok_or(Nonsense::OutOfPlace)?;
                    terminal.resize(size);
                }
                FromHost::Forget if inner.exit.is_some() => inner.forgotten = true,
                _ => return Err(Nonsense::OutOfPlace),
            },
            _ => return Err(Nonsense::OutOfPlace),
        }
        drop(inner);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for frames to send through a connection, a few at once; `None` when it is of no use any more.
    pub(crate) fn to_send(&self, call: u64) -> Option<Vec<u8>> {
        let mut inner = self.inner();
        loop {
            if inner.calls != call || inner.caller.is_none() || inner.forgotten {
                return None;
            }
            let mut bytes = Vec::new();
            while bytes.len() < 64 << 10
                && let Some(frame) = inner.next_frame(self.pid)
            {
                frame.encode(&mut bytes);
            }
            if !bytes.is_empty() {
                return Some(bytes);
            }
            inner = self.wait(inner);
        }
    }

    /// Whether nobody can ask for it again.
    pub(crate) fn is_forgotten(&self) -> bool {
        self.inner().forgotten
    }

    /// Forgets a session that has ended and has no caller.
    pub(crate) fn forget_if_idle(&self) -> bool {
        let mut inner = self.inner();
        if inner.exit.is_some() && inner.caller.is_none() {
            inner.forgotten = true;
            self.changed.notify_all();
        }
        inner.forgotten
    }

    /// Sends the program's group a signal. It has not been waited for as long as its exit is not known, so that its
    /// number is its own.
    fn kill(&self, inner: &Inner, signal: Signal) {
        if inner.exit.is_none() {
            let _ = rustix::process::kill_process_group(self.pid, signal);
        }
    }
}

fn pid_of(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

impl Inner {
    fn is_left_alone(&self) -> bool {
        self.exit.is_some() && self.caller.is_none()
    }

    fn output(&mut self, stream: Stream) -> &mut Outbox {
        match stream {
            Stream::Stderr => &mut self.stderr,
            _ => &mut self.stdout,
        }
    }

    fn next_frame(&mut self, pid: Pid) -> Option<Frame> {
        if !self.begun_told {
            self.begun_told = true;
            let begun = FromAgent::Begun {
                pid: pid_of(pid),
                stdin: self.stdin.resume(),
            };
            return Some(begun.frame());
        }
        if let Some(offset) = self.stdin.next_ack() {
            let stream = Stream::Stdin;
            return Some(Frame::Ack { stream, offset });
        }
        for stream in [Stream::Stderr, Stream::Stdout] {
            let outbox = self.output(stream);
            if let Some((offset, bytes)) = outbox.next_data() {
                return Some(Frame::Data {
                    stream,
                    offset,
                    bytes,
                });
            }
            if let Some(offset) = outbox.next_end() {
                return Some(Frame::End { stream, offset });
            }
        }
        let exit = self.exit?;
        if self.exit_told || !self.stdout.is_sent() || !self.stderr.is_sent() {
            return None;
        }
        self.exit_told = true;
        Some(FromAgent::Exited(exit).frame())
    }
}
