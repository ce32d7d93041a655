//! A program in a guest, with the streams of this one: what is typed goes in, what it writes comes out, signals pass.

use std::io::{self, Read};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use rekindle_engine::agent::{Exec, Exit, Fate, Process, Reader, Signals, Writer};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::terminal::{self, RawTerminal};

/// How much is read from the standard input at once.
const PIECE: usize = 64 << 10;

/// Signals that can be passed on.
const PASSED_ON: [fn() -> SignalKind; 6] = [
    SignalKind::hangup,
    SignalKind::interrupt,
    SignalKind::quit,
    SignalKind::terminate,
    SignalKind::user_defined1,
    SignalKind::user_defined2,
];

/// What a program gets of this one besides its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub(crate) struct Streams {
    /// Pass the standard input on; without it the program has none
    #[arg(long, short)]
    interactive: bool,
    /// Give the program a terminal, of the size of this one
    #[arg(long, short, requires = "interactive")]
    tty: bool,
}

/// Which signals the program in the guest gets in the place of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passing {
    /// All that can be passed on.
    On,
    /// None: they are for this program.
    Nothing,
}

impl Streams {
    /// Starts the program, and stays with it to its end.
    pub(crate) async fn run(self, exec: Exec, passing: Passing) -> Result<Exit> {
        let exec = match self.tty {
            true => {
                let size = terminal::size().context("-t needs a terminal; leave it away")?;
                let term = std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned());
                exec.tty(size).env("TERM", term)
            }
            false => exec,
        };
        // Heard from here on: one that comes while it starts is for it.
        let heard = Heard::listen(passing)?;
        let process = exec.start().await?;
        let _raw = match self.tty {
            true => Some(RawTerminal::enter()?),
            false => None,
        };
        self.attend(process, heard).await
    }

    async fn attend(self, mut process: Process, heard: Heard) -> Result<Exit> {
        let signals = process.signals();
        let mut tasks = JoinSet::new();
        match process.stdin.take() {
            Some(stdin) if self.interactive => drop(tasks.spawn(type_in(stdin))),
            _ => {}
        }
        tasks.spawn(heard.pass_on(signals.clone(), self.tty));
        let (out, err) = (process.stdout.take(), process.stderr.take());
        let (exit, out, err) = tokio::join!(
            process.outcome(),
            pass(out, tokio::io::stdout(), &signals),
            pass(err, tokio::io::stderr(), &signals),
        );
        let exit = exit?;
        out.and(err)
            .context("cannot write what the program wrote")?;
        Ok(exit)
    }
}

/// Starts a program that nobody stays with: what it writes goes to the guest's console.
pub(crate) async fn leave_alone(exec: Exec) -> Result<()> {
    let process = exec.on_console().fate(Fate::LivesOn).start().await?;
    drop(process);
    Ok(())
}

/// The status that says how a program ended, as a shell has it.
pub(crate) fn exit_code(exit: Exit) -> ExitCode {
    let code = match exit {
        Exit::Status(status) => u8::try_from(status & 0xff).unwrap_or(u8::MAX),
        Exit::Signal(number) => u8::try_from(128 + (number & 0x7f)).unwrap_or(u8::MAX),
    };
    ExitCode::from(code)
}

/// Passes an output on. Where nobody reads it any more, the program is told as any program is.
async fn pass(
    from: Option<Reader>,
    mut to: impl AsyncWrite + Unpin,
    signals: &Signals,
) -> io::Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let passed = async {
        tokio::io::copy(&mut from, &mut to).await?;
        to.flush().await
    };
    match passed.await {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
            signals.send(SIGPIPE).await;
            Ok(())
        }
        done => done,
    }
}

/// For who writes and is not read.
const SIGPIPE: i32 = 13;

/// Passes the standard input on, to its end.
async fn type_in(mut stdin: Writer) {
    let (sender, mut typed) = mpsc::channel(1);
    // Reading cannot be given up; the thread ends with the process.
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        while let Ok(count @ 1..) = io::stdin().lock().read(&mut piece) {
            if sender.blocking_send(piece[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    while let Some(piece) = typed.recv().await {
        if stdin.write_all(&piece).await.is_err() {
            return;
        }
    }
}

/// Signals that came.
struct Heard(mpsc::Receiver<i32>);

impl Heard {
    fn listen(passing: Passing) -> Result<Heard> {
        let (sender, heard) = mpsc::channel(8);
        let passed_on = match passing {
            Passing::On => &PASSED_ON[..],
            Passing::Nothing => &[],
        };
        let kinds = passed_on.iter().map(|kind| kind());
        for kind in kinds.chain([SignalKind::window_change()]) {
            let (mut signals, sender) = (signal(kind)?, sender.clone());
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    if sender.send(kind.as_raw_value()).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Heard(heard))
    }

    async fn pass_on(mut self, signals: Signals, tty: bool) {
        while let Some(number) = self.0.recv().await {
            if number != SignalKind::window_change().as_raw_value() {
                signals.send(number).await;
            } else if tty && let Ok(size) = terminal::size() {
                signals.resize(size).await;
            }
        }
    }
}
