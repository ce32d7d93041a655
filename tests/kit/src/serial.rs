//! What a guest prints, read as it comes.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The reading end of a guest's serial port: a pipe or a FIFO.
#[derive(Debug)]
pub struct Serial {
    port: OwnedFd,
    unread: Vec<u8>,
}

impl Serial {
    /// Reads from `port`.
    pub fn new(port: impl Into<OwnedFd>) -> Serial {
        Serial {
            port: port.into(),
            unread: Vec::new(),
        }
    }

    /// Waits until the guest has printed `text`, and returns all up to and with it.
    ///
    /// What comes after is kept for the next call.
    ///
    /// # Errors
    /// When `within` is over or the port is closed first; what came instead is in the error.
    pub fn wait_for(&mut self, text: &str, within: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + within;
        let mut searched = 0;
        loop {
            let wanted = text.as_bytes();
            let found = self.unread[searched..]
                .windows(wanted.len())
                .position(|window| window == wanted);
            if let Some(at) = found {
                let rest = self.unread.split_off(searched + at + wanted.len());
                let seen = std::mem::replace(&mut self.unread, rest);
                return Ok(String::from_utf8_lossy(&seen).into_owned());
            }
            searched = (self.unread.len() + 1).saturating_sub(wanted.len());
            let more = self
                .read(deadline)
                .with_context(|| format!("wait for {text:?} after {:?}", self.tail()))?;
            if more == Port::Quiet {
                bail!("no {text:?} within {within:?}, only {:?}", self.tail());
            }
        }
    }

    /// Takes what was printed and not yet returned, without waiting.
    ///
    /// # Errors
    /// When the port cannot be read.
    pub fn take(&mut self) -> anyhow::Result<String> {
        loop {
            match self.read(Instant::now()) {
                Ok(Port::Spoke) => {}
                Ok(Port::Quiet) => break,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error).context("read the serial port"),
            }
        }
        let seen = std::mem::take(&mut self.unread);
        Ok(String::from_utf8_lossy(&seen).into_owned())
    }

    /// Fails when the guest prints anything for so long.
    ///
    /// # Errors
    /// With what was printed.
    pub fn expect_silence(&mut self, duration: Duration) -> anyhow::Result<()> {
        match self.read(Instant::now() + duration) {
            Ok(Port::Spoke) => bail!("it printed {:?}", self.tail()),
            Ok(Port::Quiet) => Ok(()),
            Err(error) => Err(error).context("read the serial port"),
        }
    }

    /// One piece more, if any comes before `deadline`.
    fn read(&mut self, deadline: Instant) -> io::Result<Port> {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut ready = [PollFd::new(&self.port, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| poll(&mut ready, Some(&left)))? == 0 {
            return Ok(Port::Quiet);
        }
        let mut piece = [0; 4096];
        let size = rustix::io::retry_on_intr(|| rustix::io::read(&self.port, &mut piece))?;
        if size == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.unread.extend(&piece[..size]);
        Ok(Port::Spoke)
    }

    fn tail(&self) -> String {
        let from = self.unread.len().saturating_sub(200);
        String::from_utf8_lossy(&self.unread[from..]).into_owned()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Port {
    Spoke,
    Quiet,
}

#[cfg(test)]
mod tests {
    use std::io::{Write, pipe};
    use std::time::Duration;

    use super::Serial;

    const SOON: Duration = Duration::from_millis(20);

    #[test]
    fn text_is_found_across_pieces_and_what_follows_is_kept() {
        let (reader, mut writer) = pipe().unwrap();
        let mut serial = Serial::new(reader);
        writer.write_all(b"boot\nn=").unwrap();
        assert!(serial.wait_for("n=1\n", SOON).is_err());
        writer.write_all(b"1\nn=2\n").unwrap();
        assert_eq!(serial.wait_for("n=1\n", SOON).unwrap(), "boot\nn=1\n");
        assert_eq!(serial.take().unwrap(), "n=2\n");
        serial.expect_silence(SOON).unwrap();
    }

    #[test]
    fn what_came_instead_is_in_the_error() {
        let (reader, mut writer) = pipe().unwrap();
        let mut serial = Serial::new(reader);
        writer.write_all(b"panic").unwrap();
        let error = serial.wait_for("login", SOON).unwrap_err();
        assert!(error.to_string().contains("panic"), "{error:#}");
        drop(writer);
        let error = serial.wait_for("login", SOON).unwrap_err();
        assert!(format!("{error:#}").contains("end of file"), "{error:#}");
    }
}
