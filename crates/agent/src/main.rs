//! The agent inside a guest: runs programs for the host.
//!
//! ```text
//!   vsock ─▶ accept ─▶ a thread a connection ─┬─▶ session ◀─▶ threads for a program's three streams
//!                          its other thread ◀─┘      ▲
//!                                         one thread │ waits for all programs
//! ```

mod connection;
mod copying;
mod peer;
mod program;
mod session;
mod sessions;
mod sys;
mod users;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rekindle_agent::{PORT, Transfer};

use crate::peer::Listener;
use crate::sessions::Sessions;

const USAGE: &str = "usage: rekindle-agent [--listen PORT | --listen-unix PATH]
Runs programs for the host, which calls through vsock (port 5252 unless told otherwise).";

/// How long to wait when the guest has nothing left to take a connection with.
const PAUSE: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let listener = match words.as_slice() {
        [] => Listener::vsock(PORT),
        ["--listen", port] => match port.parse() {
            Ok(port) => Listener::vsock(port),
            Err(_) => return wrong_usage(),
        },
        ["--listen-unix", path] => Listener::unix(Path::new(path)),
        ["--version"] => {
            println!("rekindle-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        words => match Transfer::parse(words) {
            Some(transfer) => return copying::run(&transfer),
            None => return wrong_usage(),
        },
    };
    match listener {
        Ok(listener) => serve(&listener),
        Err(error) => {
            eprintln!("rekindle-agent: cannot listen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wrong_usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn serve(listener: &Listener) -> ExitCode {
    // Orphans of programs come to us, and are waited for.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let sessions = Arc::new(Sessions::default());
    let waits = sessions.clone();
    let reaper = thread::Builder::new().name("reaper".into()).spawn(move || {
        if let Err(error) = waits.reap() {
            eprintln!("rekindle-agent: cannot wait for programs: {error}");
            std::process::exit(1);
        }
    });
    if let Err(error) = reaper {
        eprintln!("rekindle-agent: no thread: {error}");
        return ExitCode::FAILURE;
    }
    loop {
        match listener.accept() {
            Ok(peer) => connection::attend(&sessions, peer),
            // A caller that is gone again, or a guest that is out of descriptors for now.
            Err(error) => {
                eprintln!("rekindle-agent: a caller was lost: {error}");
                thread::sleep(PAUSE);
            }
        }
    }
}
