//! A real agent, which listens on a Unix socket instead of vsock, and who calls it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use rekindle_agent::{Caller, CallerError, Decoder, Exec, Exit, Frame, FromHost, Stream, Why};

/// For what nothing announces.
const SOON: Duration = Duration::from_secs(60);

pub(crate) struct Agent {
    pub(crate) child: Child,
    pub(crate) dir: tempfile::TempDir,
}

impl Agent {
    pub(crate) fn start() -> Agent {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent");
        // As a shell starts what it does not wait for, which a guest's init does.
        let child = Command::new("sh")
            .args(["-c", r#"trap "" INT QUIT; exec "$0" "$@""#])
            .arg(env!("CARGO_BIN_EXE_rekindle-agent"))
            .arg("--listen-unix")
            .arg(&socket)
            .spawn()
            .unwrap();
        let agent = Agent { child, dir };
        until("the agent listens", || UnixStream::connect(&socket).is_ok());
        agent
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("agent")).unwrap()
    }

    pub(crate) fn call(&self, name: &str, exec: Exec) -> Call<'_> {
        let mut caller = Caller::new(name.parse().unwrap(), exec);
        let line = Line::open(self.connect(), &mut caller);
        Call {
            agent: self,
            caller,
            line,
            out: Vec::new(),
            err: Vec::new(),
        }
    }

    /// Runs a shell's command to its end.
    pub(crate) fn sh(&self, name: &str, script: &str) -> (Exit, String, String) {
        self.call(name, sh(script)).finish()
    }

    pub(crate) fn refusal(&self, name: &str, exec: Exec) -> (Why, String) {
        match self.call(name, exec).step() {
            Err(CallerError::Refused(refusal)) => (refusal.why, refusal.words),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < deadline, "not so: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn exec(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        ..Exec::default()
    }
}

pub(crate) fn sh(script: &str) -> Exec {
    exec(&["sh", "-c", script])
}

/// A connection.
pub(crate) struct Line {
    pub(crate) stream: UnixStream,
    pub(crate) decoder: Decoder,
}

impl Line {
    pub(crate) fn open(stream: UnixStream, caller: &mut Caller) -> Line {
        let decoder = Decoder::default();
        let mut line = Line { stream, decoder };
        line.send(&caller.open());
        line
    }

    pub(crate) fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next frame; `None` when the agent hung up.
    pub(crate) fn receive(&mut self) -> Option<Frame> {
        let mut buffer = [0; 10_000];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            match self.stream.read(&mut buffer).unwrap_or(0) {
                0 => return None,
                count => self.decoder.feed(&buffer[..count]),
            }
        }
    }
}

/// A session, and what came of it.
pub(crate) struct Call<'a> {
    pub(crate) agent: &'a Agent,
    pub(crate) caller: Caller,
    pub(crate) line: Line,
    pub(crate) out: Vec<u8>,
    pub(crate) err: Vec<u8>,
}

impl Call<'_> {
    /// Sends what there is to send, and takes one frame.
    pub(crate) fn step(&mut self) -> Result<(), CallerError> {
        self.read();
        while let Some(frame) = self.caller.next_frame() {
            self.line.send(&frame);
        }
        let frame = self.line.receive().expect("the agent hung up");
        self.caller.receive(frame)?;
        self.read();
        Ok(())
    }

    pub(crate) fn read(&mut self) {
        for (stream, to) in [
            (Stream::Stdout, &mut self.out),
            (Stream::Stderr, &mut self.err),
        ] {
            to.extend(self.caller.read(stream, usize::MAX));
        }
    }

    /// Another connection takes the place of this one; what is under way in it is lost.
    pub(crate) fn breaks(&mut self) {
        self.line = Line::open(self.agent.connect(), &mut self.caller);
    }

    /// Until the program has said this on its standard output.
    pub(crate) fn hears(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.out).contains(text) {
            self.step().unwrap();
        }
    }

    pub(crate) fn finish(mut self) -> (Exit, String, String) {
        self.caller.end_input();
        while self.caller.outcome().is_none() {
            self.step().unwrap();
        }
        self.line.send(&FromHost::Forget.frame());
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            self.caller.outcome().unwrap(),
            text(self.out),
            text(self.err),
        )
    }
}
