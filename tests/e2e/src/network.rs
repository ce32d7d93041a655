//! A host of a story's own, with an internet beside it: network namespaces, in which nothing of this machine's networks is
//! seen or touched.

use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The internet's address.
pub const INTERNET: &str = "203.0.113.2";
/// Its address of version 6.
pub const INTERNET_V6: &str = "2001:db8::2";
/// The host's address as the internet sees it.
pub const HOST: &str = "203.0.113.1";
/// Its address of version 6.
pub const HOST_V6: &str = "2001:db8::1";
/// Where clouds tell a machine's secrets. The internet has it, and the host gets there.
pub const METADATA: &str = "169.254.169.254";

/// How long what is not let through is waited for.
const SILENCE: Duration = Duration::from_secs(2);

/// The two namespaces. Gone when this is, save for whoever is in them.
#[derive(Debug)]
pub struct Networks {
    host: String,
    internet: String,
}

impl Networks {
    /// Makes them, and takes the calling thread, and what it starts from now on, to the host. Stories that are told at the
    /// same time need a name each.
    ///
    /// # Errors
    /// When `ip` is not there or refuses.
    pub fn enter(name: &str) -> anyhow::Result<Networks> {
        let networks = Networks {
            host: format!("{name}-host"),
            internet: format!("{name}-internet"),
        };
        let Networks { host, internet } = &networks;
        sh(&format!(
            "ip netns add {host}
             ip netns add {internet}
             ip -n {host} link set lo up
             ip -n {internet} link set lo up
             ip -n {host} link add wan type veth peer name wan netns {internet}
             ip -n {host} addr add {HOST}/24 dev wan
             ip -n {internet} addr add {INTERNET}/24 dev wan
             ip -n {internet} addr add {METADATA}/32 dev wan
             ip -n {host} link set wan up
             ip -n {internet} link set wan up
             ip -n {host} route add {METADATA} via {INTERNET}
             ip -n {host} addr add {HOST_V6}/64 dev wan nodad
             ip -n {internet} addr add {INTERNET_V6}/64 dev wan nodad
             ip netns exec {host} sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward
                                         echo 1 > /proc/sys/net/ipv6/conf/all/forwarding'"
        ))?;
        enter(host)?;
        Ok(networks)
    }

    /// Says a word to whoever connects to this address, for as long as the story is told.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn internet_greets(
        &self,
        address: &str,
        port: u16,
        word: &'static str,
    ) -> anyhow::Result<()> {
        let listener = within(&self.internet, || Ok(TcpListener::bind((address, port))?))?;
        greet(listener, word);
        Ok(())
    }

    /// Sends so many bytes to whoever connects to this port, for as long as the story is told.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn internet_sends(&self, port: u16, bytes: usize) -> anyhow::Result<()> {
        self.internet_meets(port, move |stream| stream.write_all(&vec![0; bytes]))
    }

    /// Tells whoever connects to this port and sends something how many bytes it was.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn internet_counts(&self, port: u16) -> anyhow::Result<()> {
        self.internet_meets(port, |stream| {
            let count = io::copy(stream, &mut io::sink())?;
            writeln!(stream, "{count}")
        })
    }

    fn internet_meets(
        &self,
        port: u16,
        meet: impl Fn(&mut TcpStream) -> io::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let listener = within(&self.internet, || Ok(TcpListener::bind((INTERNET, port))?))?;
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                // Whoever hangs up has heard enough.
                let _ = meet(&mut stream);
            }
        });
        Ok(())
    }

    /// The same as [`internet_greets`](Networks::internet_greets) on the host.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn host_greets(&self, port: u16, word: &'static str) -> anyhow::Result<()> {
        // Both versions of IP.
        greet(TcpListener::bind(("::", port))?, word);
        Ok(())
    }

    /// Connects from the internet. The error if it does not get there.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn from_internet(&self, there: SocketAddr) -> anyhow::Result<TcpStream> {
        within(&self.internet, || {
            Ok(TcpStream::connect_timeout(&there, SILENCE)?)
        })
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        for name in [&self.host, &self.internet] {
            let _ = sh(&format!("ip netns del {name}"));
        }
    }
}

/// Takes the calling thread into a named namespace.
fn enter(name: &str) -> anyhow::Result<()> {
    let namespace = File::open(format!("/run/netns/{name}"))?;
    Ok(move_into_link_name_space(
        namespace.as_fd(),
        Some(LinkNameSpaceType::Network),
    )?)
}

/// Does something in a named namespace. A socket stays there.
fn within<T: Send>(
    name: &str,
    what: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            enter(name)?;
            what()
        });
        inside
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn greet(listener: TcpListener, word: &'static str) {
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = writeln!(stream, "{word}");
        }
    });
}

fn sh(script: &str) -> anyhow::Result<()> {
    let status = Command::new("sh")
        .args(["-ec", script])
        .stdin(Stdio::null())
        .status()
        .context("cannot run sh and ip (Debian's iproute2)")?;
    ensure!(status.success(), "{script}: {status}");
    Ok(())
}
