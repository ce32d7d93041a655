//! The keeper: starts a VM's monitor, and starts it again when it dies. It does nothing else, so that nothing in it
//! can break.
//!
//! ```text
//!   rekindle restore ──spawn──▶ keeper ──spawn──▶ monitor ──▶ firecracker, pager
//!        ▲                        │  again, when it died          │ (orphans come to the keeper,
//!        └── progress (a pipe) ───┴───────────────────────────────┘  a child subreaper, to be reaped)
//! ```

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rekindle_engine::store::{Root, VmName};
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::reaped::Reaped;
use rekindle_engine::vm::record::Record;
use rustix::process::{Pid, WaitOptions, WaitStatus};

use crate::output;

/// More deaths than this within [`WINDOW`] are no accident.
const MAX_DEATHS: usize = 5;
const WINDOW: Duration = Duration::from_secs(30);

/// Runs until the monitor has done its work, or dies too often.
pub(crate) fn run(name: &VmName, root: &Root, dir: &VmDir) -> Result<()> {
    // A session of its own: neither the terminal's hang-up nor its Ctrl-C reaches the VM.
    let _ = rustix::process::setsid();
    // And no directory of whoever started it, which could not be unmounted as long as the VM lives. Paths that came
    // from there were made absolute before.
    std::env::set_current_dir("/").context("cannot leave the working directory")?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .context("cannot become a child subreaper")?;
    let mut deaths: Vec<Instant> = Vec::new();
    loop {
        // This very program, also when its file was replaced by a newer one meanwhile.
        let monitor = Command::new("/proc/self/exe")
            .arg0("rekindle")
            .args(["monitor", name.as_str(), "--kept", "--root"])
            .arg(root.path())
            // What the monitor must know and no disk may hold.
            .stdin(Stdio::inherit())
            .spawn()
            .context("cannot start the monitor")?;
        let status = wait_for(&monitor, dir)?;
        if status.success() || (status.code().is_some() && !is_alive(dir)) {
            return Ok(());
        }
        output::say(format_args!(
            "the monitor of {} died ({status}), starting it again",
            dir.path().display()
        ));
        deaths.retain(|death| death.elapsed() < WINDOW);
        deaths.push(Instant::now());
        if deaths.len() > MAX_DEATHS {
            bail!(
                "the monitor of {} died {MAX_DEATHS} times in {WINDOW:?}",
                dir.path().display()
            );
        }
    }
}

/// Whether there is a guest that a monitor, which gave up, left alone.
fn is_alive(dir: &VmDir) -> bool {
    Record::read(dir).is_ok_and(|record| {
        record.state.is_alive() && record.firecracker.is_some_and(|process| process.is_alive())
    })
}

/// Waits for the monitor, and reaps the orphans that it left to this process.
fn wait_for(monitor: &Child, dir: &VmDir) -> Result<ExitStatus> {
    let pid = i32::try_from(monitor.id()).ok().and_then(Pid::from_raw);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if Some(ended) == pid => {
                return Ok(ExitStatus::from_raw(status.as_raw()));
            }
            Ok(Some((orphan, status))) => leave(dir, orphan, status),
            Ok(None) => {}
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context("cannot wait for the monitor"),
        }
    }
}

/// Leaves an orphan's exit status to the monitor, which is not its parent. What cannot be left is unknown then.
fn leave(dir: &VmDir, orphan: Pid, status: WaitStatus) {
    let Ok(pid) = u32::try_from(orphan.as_raw_nonzero().get()) else {
        return;
    };
    let reaped = Reaped {
        pid,
        code: status.exit_status(),
        signal: status.terminating_signal(),
    };
    let _ = reaped.leave(dir);
}
