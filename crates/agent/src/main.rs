//! The agent inside a guest: runs programs for the host.
//!
//! ```text
//!   vsock ─▶ accept ─▶ a thread a connection ─┬─▶ session ◀─▶ threads for a program's three streams
//!                          its other thread ◀─┘      ▲
//!                                         one thread │ waits for all programs
//! ```

// It panics where the console takes nothing; `log.rs` has what does not.
#![deny(clippy::print_stderr)]

mod connection;
mod copying;
mod freeze;
mod init;
mod log;
mod peer;
mod program;
mod session;
mod sessions;
mod sys;
mod users;
mod wake;

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rekindle_agent::{PORT, Transfer};

use crate::connection::Guest;
use crate::log::say;
use crate::peer::Listener;
use crate::sessions::Sessions;

const USAGE: &str = "usage: rekindle-agent [--init | --listen-unix PATH]
Runs programs for the host, which calls through vsock (port 5252). With --init it is the guest's first program.";

/// How long to wait when the guest has nothing left to take a connection with.
const PAUSE: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => serve(Listener::vsock(PORT), Place::Beside),
        ["--init"] => serve(Listener::vsock(PORT), Place::First),
        ["--listen-unix", path] => serve(Listener::unix(Path::new(path)), Place::Apart),
        ["--version"] => {
            println!("rekindle-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        words => match Transfer::parse(words) {
            Some(transfer) => copying::run(&transfer),
            None => wrong_usage(),
        },
    }
}

/// Where the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// As the guest's first program.
    First,
    /// Beside the guest's first program.
    Beside,
    /// In no guest.
    Apart,
}

fn wrong_usage() -> ExitCode {
    say(USAGE);
    ExitCode::from(2)
}

fn serve(listener: io::Result<Listener>, place: Place) -> ExitCode {
    let guest = Arc::new(Guest::new(place));
    match listener.and_then(|listener| begin(&guest.sessions, place).map(|()| listener)) {
        Ok(listener) => accept(&guest, &listener),
        Err(error) => {
            say(format_args!("rekindle-agent: cannot begin: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Starts what runs beside the listener.
fn begin(sessions: &Arc<Sessions>, place: Place) -> io::Result<()> {
    if place == Place::First {
        init::begin(sessions)?;
    }
    // Orphans of programs come to us, and are waited for.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let waits = sessions.clone();
    thread::Builder::new()
        .name("reaper".into())
        .spawn(move || {
            if let Err(error) = waits.reap() {
                say(format_args!(
                    "rekindle-agent: cannot wait for programs: {error}"
                ));
                std::process::exit(1);
            }
        })?;
    if place != Place::Apart {
        // Beside, as the host may take its time.
        thread::Builder::new().name("hello".into()).spawn(|| {
            // Nobody hears it where nobody waits for it, which is no failure.
            let _ = connection::announce();
        })?;
    }
    Ok(())
}

fn accept(guest: &Arc<Guest>, listener: &Listener) -> ExitCode {
    loop {
        match listener.accept() {
            Ok(peer) => connection::attend(guest, peer),
            // A caller that is gone again, or a guest that is out of descriptors for now.
            Err(error) => {
                say(format_args!("rekindle-agent: a caller was lost: {error}"));
                thread::sleep(PAUSE);
            }
        }
    }
}
