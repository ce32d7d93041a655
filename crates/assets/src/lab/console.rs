//! What qemu prints: the boot's noise, the command's output, and its end.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::pulse::Pulse;

/// `lab-init.sh` prints it when all that follows is the command's.
const READY: &[u8] = b"rekindle-lab: ready";

/// How often a silent lab is looked at.
const LOOK: Duration = Duration::from_secs(5);

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Copied {
    ToTheEnd,
    OutOfTime,
    /// The lab does not live any more, and has not ended either.
    StandsStill,
}

/// Copies qemu's output, which ends with qemu.
pub(super) fn copy_until(
    mut from: impl Read + AsFd,
    to: &mut Console<'_>,
    deadline: Option<Instant>,
    pulse: &mut Pulse,
) -> Result<Copied> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let wait = Timespec::try_from(left.unwrap_or(LOOK).min(LOOK))?;
        match poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&wait)) {
            Ok(0) if left.is_some_and(|left| left <= LOOK) => return Ok(Copied::OutOfTime),
            Ok(0) if pulse.stands_still() => return Ok(Copied::StandsStill),
            Ok(0) => continue,
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match from.read(&mut buffer)? {
            0 => return Ok(Copied::ToTheEnd),
            n => to.take(&buffer[..n])?,
        }
    }
}

/// The lab's console: boot noise is kept for an error, the rest is passed on.
pub(super) struct Console<'a> {
    output: &'a mut dyn Write,
    /// `None` once the command runs.
    boot: Option<Vec<u8>>,
}

impl<'a> Console<'a> {
    pub(super) fn new(output: &'a mut dyn Write) -> Self {
        Self {
            output,
            boot: Some(Vec::new()),
        }
    }

    pub(super) fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(boot) = &mut self.boot else {
            self.output.write_all(bytes)?;
            return self.output.flush();
        };
        boot.extend_from_slice(bytes);
        let Some(ready) = boot.windows(READY.len()).position(|w| w == READY) else {
            return Ok(());
        };
        let after = ready + READY.len();
        let Some(end) = boot[after..].iter().position(|b| *b == b'\n') else {
            return Ok(());
        };
        let rest = boot.split_off(after + end + 1);
        self.boot = None;
        self.take(&rest)
    }

    /// What the boot printed, if the command never ran.
    pub(super) fn boot_output(&self) -> &[u8] {
        self.boot.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_noise_is_stripped_wherever_the_output_is_cut() {
        let all = b"SeaBIOS\r\n[ 0.1] noise\r\nrekindle-lab: ready\r\nfirst\nsecond\n";
        for cut in 0..all.len() {
            let mut output = Vec::new();
            let mut console = Console::new(&mut output);
            console.take(&all[..cut]).unwrap();
            console.take(&all[cut..]).unwrap();
            assert_eq!(console.boot_output(), b"");
            assert_eq!(output, b"first\nsecond\n", "cut at {cut}");
        }
    }
}
