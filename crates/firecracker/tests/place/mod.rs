//! A directory for one test, which leaves no process behind, whatever became of the test.

use std::path::Path;

use rekindle_firecracker::ProcessId;
use tempfile::TempDir;

/// A temporary directory; when it is dropped, what works in it is killed.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Place {
        Place(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// The processes that have their working directory here.
    pub(crate) fn processes(&self) -> Vec<ProcessId> {
        let pids = std::fs::read_dir("/proc")
            .expect("/proc")
            .filter_map(|entry| {
                let pid = entry.ok()?.file_name().to_str()?.parse::<u32>().ok()?;
                let directory = std::fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
                (directory == self.path()).then_some(pid)
            });
        pids.filter_map(|pid| ProcessId::of(pid).ok()).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for process in self.processes() {
            // It may have ended by itself.
            let _ = process.open_pidfd().map(|pidfd| pidfd.kill());
        }
    }
}
