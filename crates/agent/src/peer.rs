//! Where callers come from: the host through vsock, or, without a VM, through a Unix socket.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rekindle_agent::HELLO_PORT;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

/// A connection.
#[derive(Debug)]
pub(crate) enum Peer {
    Vsock(VsockStream),
    Unix(UnixStream),
}

impl Peer {
    /// The host, where it waits for the agent's call.
    pub(crate) fn host() -> io::Result<Peer> {
        let host = VsockAddr::new(VMADDR_CID_HOST, HELLO_PORT);
        Ok(Peer::Vsock(VsockStream::connect(&host)?))
    }

    pub(crate) fn try_clone(&self) -> io::Result<Peer> {
        Ok(match self {
            Peer::Vsock(stream) => Peer::Vsock(stream.try_clone()?),
            Peer::Unix(stream) => Peer::Unix(stream.try_clone()?),
        })
    }

    /// Ends it for whoever reads or writes it.
    pub(crate) fn shut_down(&self) {
        let _ = match self {
            Peer::Vsock(stream) => stream.shutdown(Shutdown::Both),
            Peer::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Peer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Peer::Vsock(stream) => stream.read(buffer),
            Peer::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Peer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Peer::Vsock(stream) => stream.write(bytes),
            Peer::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where connections come in.
#[derive(Debug)]
pub(crate) enum Listener {
    Vsock(VsockListener),
    Unix(UnixListener),
}

impl Listener {
    pub(crate) fn vsock(port: u32) -> io::Result<Listener> {
        let address = VsockAddr::new(VMADDR_CID_ANY, port);
        Ok(Listener::Vsock(VsockListener::bind(&address)?))
    }

    pub(crate) fn unix(path: &Path) -> io::Result<Listener> {
        Ok(Listener::Unix(UnixListener::bind(path)?))
    }

    /// Waits for a connection.
    pub(crate) fn accept(&self) -> io::Result<Peer> {
        Ok(match self {
            Listener::Vsock(listener) => Peer::Vsock(listener.accept()?.0),
            Listener::Unix(listener) => Peer::Unix(listener.accept()?.0),
        })
    }
}
