//! A program that is killed right before one of the calls by which it changes files: SIGKILL at every step, none missed.
//!
//! ```text
//!   runs ─► its next system call ─► changes a file below the place? ─► counted ─► the nth: SIGKILL to all its threads
//! ```
//!
//! A file that is written to in a thousand pieces has two steps, the first and the second: those in between leave what the
//! second leaves, only more of it. What changes names counts each time.
//!
//! By ptrace, so one thread does it all, and nobody else can trace the program meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How a traced program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Before this step, which it did not do.
    Killed(String),
    /// By itself, with this status; it had fewer steps. −1 for a signal.
    Itself(i32),
}

/// Runs a program to its `nth` step below `place`, counted from 0, and kills it there. Its output is dropped.
///
/// # Errors
/// When it cannot be started or traced.
pub fn kill_before(command: &Command, place: &Path, nth: u64) -> anyhow::Result<End> {
    let mut stopped = Command::new("sh");
    stopped
        .args(["-c", r#"kill -STOP $$; exec "$@""#, "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => stopped.env(name, value),
            None => stopped.env_remove(name),
        };
    }
    on_a_thread(|| {
        let mut child = stopped.spawn()?;
        let pid = Pid::from_raw(child.id().try_into()?);
        let end = waitpid(pid, Some(WaitPidFlag::WUNTRACED))
            .map_err(anyhow::Error::from)
            .and_then(|_| Traced::seize(pid, place, nth))
            .and_then(|traced| {
                kill(pid, Signal::SIGCONT)?;
                traced.follow()
            });
        if end.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        end
    })
}

/// Lets a program that runs go on to its `nth` step below `place` from now on, and kills it there.
///
/// # Errors
/// When it cannot be traced.
pub fn kill_running_before(pid: i32, place: &Path, nth: u64) -> anyhow::Result<End> {
    on_a_thread(|| {
        let traced = Traced::seize(Pid::from_raw(pid), place, nth)?;
        traced.follow()
    })
}

/// Whom it traces a thread may wait for, and nobody else's children.
fn on_a_thread<T: Send>(what: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    thread::scope(|scope| scope.spawn(what).join().expect("it does not panic"))
}

struct Traced<'a> {
    leader: Pid,
    place: &'a Path,
    nth: u64,
    seen: u64,
    /// What was written to last, and how often in a row.
    written: Option<(&'static str, PathBuf, u32)>,
    killed: Option<String>,
}

impl<'a> Traced<'a> {
    fn seize(leader: Pid, place: &'a Path, nth: u64) -> anyhow::Result<Traced<'a>> {
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
        for task in fs::read_dir(format!("/proc/{leader}/task"))? {
            let task: i32 = task?.file_name().to_string_lossy().parse()?;
            let task = Pid::from_raw(task);
            ptrace::seize(task, options).context("trace it")?;
            ptrace::interrupt(task)?;
        }
        Ok(Traced {
            leader,
            place,
            nth,
            seen: 0,
            written: None,
            killed: None,
        })
    }

    fn follow(mut self) -> anyhow::Result<End> {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::from_bits_retain(libc::__WNOTHREAD);
        loop {
            match waitpid(None, Some(flags))? {
                WaitStatus::Exited(pid, status) if pid == self.leader => {
                    return Ok(self.end(status));
                }
                WaitStatus::Signaled(pid, ..) if pid == self.leader => return Ok(self.end(-1)),
                WaitStatus::PtraceSyscall(task) => {
                    if self.killed.is_none() && self.is_to_die(task)? {
                        kill(self.leader, Signal::SIGKILL)?;
                    }
                    go_on(task, None)?;
                }
                WaitStatus::Stopped(task, signal) => go_on(task, Some(signal))?,
                WaitStatus::PtraceEvent(task, ..) => go_on(task, None)?,
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {}
                other => bail!("{other:?}"),
            }
        }
    }

    fn end(self, status: i32) -> End {
        self.killed.map_or(End::Itself(status), End::Killed)
    }

    /// Whether the call that a task is at is its last.
    fn is_to_die(&mut self, task: Pid) -> anyhow::Result<bool> {
        let Some(step) = self.step(task)? else {
            return Ok(false);
        };
        self.seen += 1;
        if self.seen <= self.nth {
            return Ok(false);
        }
        self.killed = Some(step);
        Ok(true)
    }

    /// The step that a task is about to make, if it is one.
    fn step(&mut self, task: Pid) -> anyhow::Result<Option<String>> {
        let registers = match ptrace::getregs(task) {
            // It is dead already.
            Err(Errno::ESRCH) => return Ok(None),
            other => other?,
        };
        // What a call returns has the same stop; at its beginning this is what stands there.
        let at_the_beginning = registers.rax.cast_signed() == i64::from(-libc::ENOSYS);
        let number = registers.orig_rax.cast_signed();
        let Some((_, name, on)) = CALLS.iter().find(|call| call.0 == number) else {
            return Ok(None);
        };
        if !at_the_beginning {
            return Ok(None);
        }
        let arguments = [registers.rdi, registers.rsi, registers.rdx];
        match on {
            On::Name => {
                self.written = None;
                Ok(Some((*name).to_owned()))
            }
            On::NewName(flags) => {
                let makes = libc::O_CREAT | libc::O_TRUNC;
                let flags = arguments[*flags] & u64::from(makes.cast_unsigned());
                Ok((flags != 0).then(|| (*name).to_owned()))
            }
            On::File(fd) => Ok(self.write(task, name, arguments[*fd])),
        }
    }

    fn write(&mut self, task: Pid, name: &'static str, fd: u64) -> Option<String> {
        let link = PathBuf::from(format!("/proc/{task}/fd/{fd}"));
        let path = fs::read_link(&link).ok()?;
        if !path.starts_with(self.place) || !fs::metadata(&link).is_ok_and(|file| file.is_file()) {
            return None;
        }
        let step = format!("{name} {}", path.display());
        let times = match self.written.take() {
            Some((last, file, times)) if last == name && file == path => times + 1,
            _ => 1,
        };
        self.written = Some((name, path, times));
        (times <= 2).then_some(step)
    }
}

fn go_on(task: Pid, signal: Option<Signal>) -> anyhow::Result<()> {
    match ptrace::syscall(task, signal) {
        // It was killed meanwhile.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// What a call changes.
enum On {
    /// Names.
    Name,
    /// Names, if the flags in this argument say so.
    NewName(usize),
    /// The open file that this argument tells.
    File(usize),
}

const CALLS: [(i64, &str, On); 32] = [
    (libc::SYS_open, "open", On::NewName(1)),
    (libc::SYS_openat, "openat", On::NewName(2)),
    (libc::SYS_creat, "creat", On::Name),
    (libc::SYS_mkdir, "mkdir", On::Name),
    (libc::SYS_mkdirat, "mkdirat", On::Name),
    (libc::SYS_rmdir, "rmdir", On::Name),
    (libc::SYS_link, "link", On::Name),
    (libc::SYS_linkat, "linkat", On::Name),
    (libc::SYS_symlink, "symlink", On::Name),
    (libc::SYS_symlinkat, "symlinkat", On::Name),
    (libc::SYS_unlink, "unlink", On::Name),
    (libc::SYS_unlinkat, "unlinkat", On::Name),
    (libc::SYS_rename, "rename", On::Name),
    (libc::SYS_renameat, "renameat", On::Name),
    (libc::SYS_renameat2, "renameat2", On::Name),
    (libc::SYS_truncate, "truncate", On::Name),
    (libc::SYS_write, "write", On::File(0)),
    (libc::SYS_pwrite64, "pwrite", On::File(0)),
    (libc::SYS_writev, "writev", On::File(0)),
    (libc::SYS_pwritev, "pwritev", On::File(0)),
    (libc::SYS_pwritev2, "pwritev2", On::File(0)),
    (libc::SYS_ftruncate, "ftruncate", On::File(0)),
    (libc::SYS_fallocate, "fallocate", On::File(0)),
    (libc::SYS_fsync, "fsync", On::File(0)),
    (libc::SYS_fdatasync, "fdatasync", On::File(0)),
    (libc::SYS_fchmod, "fchmod", On::File(0)),
    (libc::SYS_fchown, "fchown", On::File(0)),
    (libc::SYS_utimensat, "utimensat", On::Name),
    (libc::SYS_ioctl, "ioctl", On::File(0)),
    (libc::SYS_sendfile, "sendfile", On::File(0)),
    (libc::SYS_copy_file_range, "copy_file_range", On::File(2)),
    (libc::SYS_splice, "splice", On::File(2)),
];

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::{End, kill_before, kill_running_before};

    #[test]
    fn a_program_is_killed_before_each_of_its_steps_and_then_ends_by_itself() {
        let place = tempfile::tempdir().unwrap();
        let script = "echo one >a; mv a b; exit 3";
        let mut steps = Vec::new();
        loop {
            let _ = fs::remove_file(place.path().join("a"));
            let _ = fs::remove_file(place.path().join("b"));
            let mut command = Command::new("sh");
            command.args(["-c", &format!("cd {} && {script}", place.path().display())]);
            let nth = u64::try_from(steps.len()).unwrap();
            match kill_before(&command, place.path(), nth).unwrap() {
                End::Killed(step) => steps.push(step),
                End::Itself(status) => {
                    assert_eq!(status, 3);
                    break;
                }
            }
        }
        let path = place.path().join("a");
        // `mv` is another process, which is not traced.
        assert_eq!(steps.len(), 2, "{steps:?}");
        assert!(steps[0].starts_with("open"), "{steps:?}");
        assert_eq!(steps[1], format!("write {}", path.display()));
        assert_eq!(fs::read_to_string(place.path().join("b")).unwrap(), "one\n");
    }

    #[test]
    fn one_that_runs_already_is_killed_too() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("x");
        let script = format!("while :; do echo x >>{}; done", file.display());
        let mut child = Command::new("sh").args(["-c", &script]).spawn().unwrap();
        while !file.exists() {
            std::thread::yield_now();
        }
        let pid = child.id().try_into().unwrap();
        let end = kill_running_before(pid, place.path(), 1).unwrap();
        assert!(matches!(end, End::Killed(_)), "{end:?}");
        // Who traced it was its parent, too, and has its status.
        let _ = child.wait();
    }
}
