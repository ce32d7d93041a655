//! A terminal that a story holds the other end of.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};

use anyhow::{bail, ensure};
use rekindle_e2e::SOON;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// Our end of it, and what it has said.
pub(crate) struct Pty {
    ours: File,
    said: String,
}

impl Pty {
    pub(crate) fn open(rows: u16, columns: u16) -> anyhow::Result<Pty> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = rustix::pty::openpt(flags)?;
        rustix::pty::grantpt(&ours)?;
        rustix::pty::unlockpt(&ours)?;
        let pty = Pty {
            ours: File::from(ours),
            said: String::new(),
        };
        pty.resizes(rows, columns)?;
        Ok(pty)
    }

    /// Starts a program whose terminal it is.
    pub(crate) fn spawn(&self, command: &mut Command) -> anyhow::Result<Child> {
        let name = rustix::pty::ptsname(&self.ours, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let theirs: OwnedFd = rustix::fs::open(&*name, flags, Mode::empty())?;
        command
            .stdin(theirs.try_clone()?)
            .stdout(theirs.try_clone()?)
            .stderr(theirs);
        Ok(command.spawn()?)
    }

    pub(crate) fn resizes(&self, rows: u16, columns: u16) -> anyhow::Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(&self.ours, size)?)
    }

    pub(crate) fn types(&mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.ours.write_all(text.as_bytes())?)
    }

    /// Waits until it says this, after what was heard before.
    pub(crate) fn hears(&mut self, text: &str) -> anyhow::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.said.find(text) {
                self.said.drain(..at + text.len());
                return Ok(());
            }
            let mut ready = [PollFd::new(&self.ours, PollFlags::IN)];
            let came = rustix::event::poll(&mut ready, Some(&Timespec::try_from(SOON)?))?;
            ensure!(came > 0, "it never said {text:?}, but {:?}", self.said);
            match self.ours.read(&mut buffer) {
                Ok(count @ 1..) => self.said += &String::from_utf8_lossy(&buffer[..count]),
                _ => bail!("it ended without {text:?}: {:?}", self.said),
            }
        }
    }
}
