//! A program that runs in a guest: its streams, its signals, its end.
//!
//! ```text
//!   Writer ══ 64 KiB ══▶ ┌────────┐ ◀══ connection ══▶ agent
//!   Reader ◀═ 64 KiB ═══ │  task  │     broken? another one, and on
//!   signals, size ─────▶ └────────┘ ──▶ how it ended
//! ```
//!
//! The task keeps what the other side has not acknowledged (`rekindle_agent::Caller`). Who does not read stops the
//! program once 64 KiB wait here and 256 KiB in the guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rekindle_agent::{Caller, Decoder, Exec, Exit, FromHost, MAX_DATA, SessionId, Size, Stream};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex,
};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::{Agent, AgentError, WhenPaused};

/// How many bytes of a stream wait here.
const WAITING: usize = 64 << 10;

/// How many signals and sizes wait for a connection; what is more is refused.
const ASKS: usize = 16;

/// A program's standard output or standard error. Dropped, what comes is thrown away.
#[derive(Debug)]
pub struct Reader(DuplexStream);

/// A program's standard input. Dropped or shut down, it has ended.
#[derive(Debug)]
pub struct Writer(DuplexStream);

/// A program that runs in a guest. Dropped, its fate decides: it lives on, or is killed.
#[derive(Debug)]
pub struct Process {
    /// What it reads.
    pub stdin: Option<Writer>,
    /// What it writes; on a terminal all of it.
    pub stdout: Option<Reader>,
    /// What it complains; none on a terminal.
    pub stderr: Option<Reader>,
    asks: mpsc::Sender<FromHost>,
    outcome: oneshot::Receiver<Result<Exit, AgentError>>,
    task: JoinHandle<()>,
    connecting: Duration,
}

impl Process {
    pub(super) async fn start(
        agent: Agent,
        session: SessionId,
        exec: Exec,
    ) -> Result<Process, AgentError> {
        let has_stderr = exec.tty.is_none();
        let (stdin, their_stdin) = duplex(WAITING);
        let (stdout, their_stdout) = duplex(WAITING);
        let (stderr, their_stderr) = duplex(WAITING);
        let (asks, asked) = mpsc::channel(ASKS);
        let (ended, outcome) = oneshot::channel();
        let (began, begun) = oneshot::channel();
        let called = Instant::now();
        let connection = agent.reach(WhenPaused::Refuse).await?;
        let connecting = called.elapsed();
        let mut driver = Driver {
            agent,
            caller: Caller::new(session, exec),
            began: Some(began),
            stdin: Source(Some(their_stdin)),
            stdout: Sink::new(Stream::Stdout, their_stdout),
            stderr: Sink::new(Stream::Stderr, their_stderr),
            asked,
        };
        let task = tokio::spawn(async move {
            let outcome = driver.run(connection).await;
            // Nobody may wait for it.
            let _ = ended.send(outcome);
        });
        let process = Process {
            stdin: Some(Writer(stdin)),
            stdout: Some(Reader(stdout)),
            stderr: has_stderr.then_some(Reader(stderr)),
            asks,
            outcome,
            task,
            connecting,
        };
        match begun.await {
            Ok(()) => Ok(process),
            Err(_) => match process.outcome().await {
                Ok(_) => Err(AgentError::Nonsense),
                Err(error) => Err(error),
            },
        }
    }

    /// Waits for its end, and tells how it ended. Its input ends, and what of its output was not taken is thrown away.
    ///
    /// # Errors
    /// When the VM ends first, or its agent forgot the program.
    pub async fn wait(mut self) -> Result<Exit, AgentError> {
        self.stdin = None;
        self.stdout = None;
        self.stderr = None;
        self.outcome().await
    }

    /// Waits for its end, which comes when all of its output was read.
    ///
    /// # Errors
    /// As for [`Process::wait`].
    pub async fn outcome(mut self) -> Result<Exit, AgentError> {
        match (&mut self.outcome).await {
            Ok(outcome) => outcome,
            Err(_) => Err(AgentError::HungUp),
        }
    }

    /// How long it took until the agent had taken the call: the first part of the program's start.
    pub fn connecting(&self) -> Duration {
        self.connecting
    }

    /// Hands it a signal by its number on Linux, and all that belong to its process group.
    pub fn signals(&self) -> Signals {
        Signals(self.asks.clone())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What can be told to a program besides its input. It may be kept while something else waits for the program.
#[derive(Clone, Debug)]
pub struct Signals(mpsc::Sender<FromHost>);

impl Signals {
    /// Sends its process group a signal, by its number on Linux. One that has ended gets none.
    pub async fn send(&self, number: i32) {
        let _ = self.0.send(FromHost::Signal { number }).await;
    }

    /// Its terminal has another size now.
    pub async fn resize(&self, size: Size) {
        let _ = self.0.send(FromHost::Resize(size)).await;
    }
}

/// What the task works on.
struct Driver {
    agent: Agent,
    caller: Caller,
    began: Option<oneshot::Sender<()>>,
    stdin: Source,
    stdout: Sink,
    stderr: Sink,
    asked: mpsc::Receiver<FromHost>,
}

/// What became of a connection.
enum Turn {
    Over(Exit),
    Broken,
}

impl Driver {
    async fn run(&mut self, mut connection: UnixStream) -> Result<Exit, AgentError> {
        loop {
            match self.converse(connection).await? {
                Turn::Over(exit) => return Ok(exit),
                Turn::Broken => connection = self.agent.reach(WhenPaused::Wait).await?,
            }
        }
    }

    /// Goes on with the session through one connection.
    async fn converse(&mut self, mut connection: UnixStream) -> Result<Turn, AgentError> {
        let (mut from, mut to) = connection.split();
        let mut decoder = Decoder::default();
        let (mut came, mut typed) = (vec![0; MAX_DATA], vec![0; MAX_DATA]);
        let mut out = Vec::new();
        self.caller.open().encode(&mut out);
        loop {
            while let Some(frame) = decoder.next_frame()? {
                self.caller.receive(frame)?;
            }
            if self.caller.is_open()
                && let Some(began) = self.began.take()
            {
                let _ = began.send(());
            }
            self.stdout.fill(&mut self.caller);
            self.stderr.fill(&mut self.caller);
            while out.len() < MAX_DATA
                && let Some(frame) = self.caller.next_frame()
            {
                frame.encode(&mut out);
            }
            if let Some(exit) = self.caller.outcome()
                && self.stdout.is_dry()
                && self.stderr.is_dry()
            {
                FromHost::Forget.frame().encode(&mut out);
                // One that does not hear it forgets by itself.
                let _ = to.write_all(&out).await;
                return Ok(Turn::Over(exit));
            }
            let room = self.caller.room().min(typed.len());
            tokio::select! {
                read = from.read(&mut came) => match read {
                    Ok(0) | Err(_) => return Ok(Turn::Broken),
                    Ok(count) => decoder.feed(&came[..count]),
                },
                written = to.write(&out), if !out.is_empty() => match written {
                    Ok(count) => drop(out.drain(..count)),
                    Err(_) => return Ok(Turn::Broken),
                },
                count = self.stdin.read(&mut typed[..room]), if room > 0 && self.stdin.is_open() => {
                    match count {
                        0 => self.caller.end_input(),
                        count => self.caller.write(&typed[..count]),
                    }
                }
                () = self.stdout.pour(), if !self.stdout.is_dry() => {}
                () = self.stderr.pour(), if !self.stderr.is_dry() => {}
                Some(ask) = self.asked.recv(), if self.caller.is_open() => {
                    ask.frame().encode(&mut out);
                }
            }
        }
    }
}

/// Where the program's input comes from.
struct Source(Option<DuplexStream>);

impl Source {
    fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// 0 at its end. May be dropped and called again.
    async fn read(&mut self, buffer: &mut [u8]) -> usize {
        let Some(from) = &mut self.0 else { return 0 };
        let count = from.read(buffer).await.unwrap_or(0);
        if count == 0 {
            self.0 = None;
        }
        count
    }
}

/// Where an output of the program goes.
struct Sink {
    stream: Stream,
    to: Option<DuplexStream>,
    /// What was taken from the session and has not gone on, from `at` on.
    held: Vec<u8>,
    at: usize,
}

impl Sink {
    fn new(stream: Stream, to: DuplexStream) -> Sink {
        Sink {
            stream,
            to: Some(to),
            held: Vec::new(),
            at: 0,
        }
    }

    fn is_dry(&self) -> bool {
        self.at == self.held.len()
    }

    /// Takes more from the session once all has gone on.
    fn fill(&mut self, caller: &mut Caller) {
        if self.is_dry() {
            self.held = caller.read(self.stream, MAX_DATA);
            self.at = 0;
        }
    }

    /// Passes some of it on. May be dropped and called again.
    async fn pour(&mut self) {
        let Some(to) = &mut self.to else {
            self.at = self.held.len();
            return;
        };
        match to.write(&self.held[self.at..]).await {
            Ok(count) => self.at += count,
            // Nobody reads it.
            Err(_) => self.to = None,
        }
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Writer {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
