//! How an orphaned Firecracker ended. After its monitor's death it is the keeper's child, and only a parent learns
//! the exit status: the keeper leaves it in the VM's directory for the next monitor.

use std::io;
use std::time::Duration;

use rekindle_firecracker::Exit;
use serde::{Deserialize, Serialize};

use super::dir::VmDir;

const FILE: &str = "reaped.json";

/// The keeper may be told of the death a moment after the monitor; it is waited for that often, that long.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// An exit status, as a parent leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reaped {
    /// Whose it was.
    pub pid: u32,
    /// The status that it exited with.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
}

impl Reaped {
    /// Leaves it for whoever looks after the VM next.
    pub fn leave(&self, dir: &VmDir) -> io::Result<()> {
        dir.replace(FILE, &serde_json::to_vec(self)?)
    }

    fn read(dir: &VmDir, pid: u32) -> Option<Exit> {
        let left: Reaped = serde_json::from_slice(&std::fs::read(dir.file(FILE)).ok()?).ok()?;
        match left {
            Reaped { pid: whose, .. } if whose != pid => None,
            Reaped {
                code: Some(code), ..
            } => Some(Exit::Code(code)),
            Reaped {
                signal: Some(signal),
                ..
            } => Some(Exit::Signal(signal)),
            _ => None,
        }
    }
}

/// What a process that is no child of ours ended with, if its parent says so in time.
pub(crate) async fn exit_of(dir: &VmDir, pid: u32) -> Exit {
    for _ in 0..TRIES {
        if let Some(exit) = Reaped::read(dir, pid) {
            return exit;
        }
        tokio::time::sleep(PAUSE).await;
    }
    Exit::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;
    use rekindle_store::Root;

    #[tokio::test(flavor = "current_thread")]
    async fn an_exit_status_is_found_by_its_pid() {
        let place = tempfile::tempdir().unwrap();
        let root = Root::open(place.path()).unwrap();
        let dir = VmDir::create(&root, &"v".parse().unwrap()).unwrap();
        assert_eq!(exit_of(&dir, 7).await, Exit::Unknown);
        Reaped {
            pid: 7,
            code: Some(0),
            signal: None,
        }
        .leave(&dir)
        .unwrap();
        assert_eq!(exit_of(&dir, 7).await, Exit::Code(0));
        assert_eq!(exit_of(&dir, 8).await, Exit::Unknown);
    }
}
