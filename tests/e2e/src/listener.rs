//! What a guest prints, as `rekindle logs -f` hands it over.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rekindle_kit::serial::Serial;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::SOON;
use crate::rekindle::wait_for;

/// A `rekindle logs -f`, or another command whose output is read as it comes.
#[derive(Debug)]
pub struct Listener {
    child: Child,
    serial: Serial,
}

impl Listener {
    /// Listens to a command whose standard output was piped.
    ///
    /// # Errors
    /// When it was not.
    pub fn new(mut child: Child) -> anyhow::Result<Listener> {
        let out = child.stdout.take().context("its output was piped")?;
        Ok(Listener {
            child,
            serial: Serial::new(out),
        })
    }

    /// Waits for a text, and returns all up to and with it.
    ///
    /// # Errors
    /// When it does not come.
    pub fn hears(&mut self, text: &str) -> anyhow::Result<String> {
        self.serial.wait_for(text, SOON)
    }

    /// The process.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits until the command ends by itself, and says with which status, and what came last.
    ///
    /// # Errors
    /// When it does not end.
    pub fn ends(&mut self) -> anyhow::Result<(Option<i32>, String)> {
        let status = wait_for(&mut self.child, SOON)?;
        Ok((status.code(), self.serial.take()?))
    }

    /// Counts how often the counter guest printed a number, and checks that none is missing or comes twice.
    /// Waits until there are `count`, and returns the first and the last of them.
    ///
    /// # Errors
    /// When they do not come, or are not in sequence.
    pub fn counts(&mut self, count: usize) -> anyhow::Result<(u64, u64)> {
        let deadline = Instant::now() + SOON;
        let mut text = String::new();
        while text.matches('\n').count() < count {
            ensure!(Instant::now() < deadline, "only {text:?}");
            text += &self.serial.wait_for("\n", SOON)?;
        }
        sequence(&text)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = wait_for(&mut self.child, Duration::from_secs(5));
    }
}

/// Whether all that the guest of a VM has printed was taken out of its FIFO, by the VM's directory.
///
/// # Errors
/// When the FIFO is there and cannot be looked at.
pub fn is_drained(vm: &Path) -> anyhow::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::open(vm.join("serial.fifo"), flags, Mode::empty()) {
        Ok(fifo) => Ok(rustix::io::ioctl_fionread(fifo)? == 0),
        // It goes with Firecracker, when all is out of it.
        Err(Errno::NOENT) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// The first and the last number that the counter guest printed. The lines at the ends may be cut off: a snapshot
/// can be taken in the middle of one.
///
/// # Errors
/// When a number is missing, comes twice, or is none.
pub fn sequence(text: &str) -> anyhow::Result<(u64, u64)> {
    let whole = text
        .split_inclusive('\n')
        .filter_map(|line| line.strip_prefix("n=")?.strip_suffix('\n'));
    let numbers: Vec<u64> = whole
        .map(|number| number.parse().with_context(|| format!("{text:?}")))
        .collect::<anyhow::Result<_>>()?;
    let in_sequence = numbers.windows(2).all(|pair| pair[1] == pair[0] + 1);
    ensure!(in_sequence, "not in sequence: {text:?}");
    let first = numbers
        .first()
        .with_context(|| format!("no number in {text:?}"))?;
    Ok((*first, first + numbers.len() as u64 - 1))
}

#[cfg(test)]
mod tests {
    use super::sequence;

    #[test]
    fn numbers_are_in_sequence_or_not() {
        assert_eq!(sequence("4\nn=5\nn=6\nn=").unwrap(), (5, 6));
        assert!(sequence("n=5\nn=7\n").is_err());
        assert!(sequence("n=5\nn=5\n").is_err());
        assert!(sequence("n=x\n").is_err());
        assert!(sequence("5").is_err());
    }
}
