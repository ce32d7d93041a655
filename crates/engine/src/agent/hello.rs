//! The owner's end of the agent's first call: the guest has an agent, and it listens.

use std::io;
use std::time::Duration;

use rekindle_agent::{Frame, FromAgent, HELLO_PORT, Hello};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::connect::{Line, Near};
use super::{Agent, AgentError};
use crate::jail;
use crate::vm::dir::{VSOCK_SOCKET, VmDir};
use crate::vm::record::{GuestAgent, Ledger};

/// A guest that calls and says nothing is not listened to for longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long nobody is taken after one could not be.
const RECOVERY: Duration = Duration::from_millis(50);

/// The longest name of a release that is believed.
const LONGEST_VERSION: usize = 64;

/// The socket to which Firecracker connects when the guest calls, relative to the VM's directory.
pub(crate) fn socket() -> String {
    format!("{VSOCK_SOCKET}_{HELLO_PORT}")
}

/// Listens for the agent's call for as long as it lives.
#[derive(Debug)]
pub(crate) struct Listener(JoinHandle<()>);

impl Listener {
    /// Takes calls from now on, and writes down who called. The guest need not run yet.
    pub(crate) fn start(dir: &VmDir, ledger: &Ledger) -> io::Result<Listener> {
        let path = dir.file(socket());
        // Bound under a temporary name, so that one who called the last owner is not refused in between.
        let next = dir.file(format!("{}.next", socket()));
        let _ = std::fs::remove_file(&next);
        let listener = UnixListener::bind(Near::of(&next)?.path())?;
        std::fs::rename(&next, &path)?;
        jail::give(dir, &socket()).map_err(io::Error::other)?;
        Ok(Listener(tokio::spawn(listen(listener, ledger.clone()))))
    }

    /// The same for a guest whose agent may have called before: it is asked, too. It listens before it calls, so that one
    /// of the two comes through.
    pub(crate) fn start_late(dir: &VmDir, ledger: &Ledger) -> io::Result<Listener> {
        let listens = Listener::start(dir, ledger)?;
        let (agent, ledger) = (Agent::of(dir), ledger.clone());
        Ok(Listener(tokio::spawn(async move {
            let _listens = listens;
            if let Ok(hello) = agent.ping_awaited().await {
                note(&ledger, hello);
            }
            std::future::pending().await
        })))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn listen(listener: UnixListener, ledger: Ledger) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Ok(Ok(hello)) = tokio::time::timeout(PATIENCE, hear(stream)).await {
                    note(&ledger, hello);
                }
            }
            // Too few descriptors, which passes; nothing tells when.
            Err(_) => tokio::time::sleep(RECOVERY).await,
        }
    }
}

async fn hear(stream: UnixStream) -> Result<Hello, AgentError> {
    match Line::new(stream).next().await? {
        Some(Frame::Message(json)) => match FromAgent::parse(&json)? {
            FromAgent::Hello(hello) => Ok(hello),
            _ => Err(AgentError::Nonsense),
        },
        Some(_) => Err(AgentError::Nonsense),
        None => Err(AgentError::HungUp),
    }
}

fn note(ledger: &Ledger, hello: Hello) {
    let Hello { protocol, version } = hello;
    let is_plain = |c: char| c.is_ascii_graphic();
    if version.len() <= LONGEST_VERSION && version.chars().all(is_plain) {
        ledger.write_agent(GuestAgent::Ready { protocol, version });
    }
}
