//! TAP devices of the host, for the guests of a story.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// TAP devices that are gone when this is, also when a story fails.
#[derive(Debug)]
pub struct Taps(Vec<String>);

impl Taps {
    /// Makes so many, called `PREFIX-0` and so on. Stories that are told at the same time need a prefix each, and none
    /// of [`crate::Rekindle`]'s own.
    ///
    /// # Errors
    /// When `ip` is not there or refuses.
    pub fn make(prefix: &str, count: usize) -> anyhow::Result<Taps> {
        let mut taps = Taps(Vec::new());
        for n in 0..count {
            let name = format!("{prefix}-{n}");
            ip(&["tuntap", "add", "dev", &name, "mode", "tap"])?;
            taps.0.push(name);
        }
        Ok(taps)
    }

    /// Removes them, and proves it.
    ///
    /// # Errors
    /// When one is not there any more, or stays.
    pub fn remove(mut self) -> anyhow::Result<()> {
        for name in self.0.drain(..) {
            ip(&["link", "del", "dev", &name])?;
            let link = Path::new("/sys/class/net").join(&name);
            ensure!(!link.exists(), "{name} is still there");
        }
        Ok(())
    }

    /// The name of one.
    pub fn name(&self, n: usize) -> &str {
        &self.0[n]
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = ip(&["link", "del", "dev", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .status();
    let status = status.context("cannot run ip (Debian's iproute2)")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}
