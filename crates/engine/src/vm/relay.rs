//! The page servers of one VM, one after the other: where one dies the next one takes over, and the guest only waits.
//!
//! ```text
//!   page server ended ─▶ had it a VM yet? ── no ──▶ nothing has run: the restore starts again
//!                            │ yes
//!                            ├─ another one serves (an upgrade by hand) ──▶ that one is watched
//!                            ├─ too many deaths, or nobody can take over ─▶ firecracker is killed, the reason kept
//!                            └─ userfaultfd from firecracker ─▶ `rekindle pager --adopt` ─▶ recorded, watched
//! ```
//!
//! It goes on beside whatever the VM's owner does: a call that waits for a page simply gets its answer later.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rekindle_firecracker::{Pidfd, ProcessId};
use rekindle_pager::{living_server_of, server_of, take_descriptor};
use rekindle_store::causes::with_causes;
use tokio::net::unix::pipe::Receiver;
use tokio::task::JoinHandle;

use super::dir::{PAGER_STATE, VmDir};
use super::record::Ledger;
use crate::pager::{self, Epitaph, PagerProcess};

/// More deaths than this within [`WINDOW`] are no accident.
const MAX_DEATHS: usize = 5;
const WINDOW: Duration = Duration::from_secs(10);

/// How long a successor may take to take over; it takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a page server whose end cannot be waited for is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Why a VM has no page server any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The VM ended first, or is not ours any more.
    WithTheVm,
    /// It would not have the VM, and told why; it kills one that it had got hold of. Firecracker has ended.
    Refused(String),
    /// It died before it had a VM. Nothing has run, and Firecracker was killed.
    NeverServed(String),
    /// It died, and nobody took its place. Firecracker was killed.
    GaveUp(String),
}

/// What it takes to start a successor.
#[derive(Debug)]
pub(crate) struct Means {
    pub(crate) program: PathBuf,
    pub(crate) dir: VmDir,
    /// What the VM's processes carry as `--id`.
    pub(crate) vm_id: String,
    pub(crate) ledger: Ledger,
}

/// The row of page servers, attended by a task. Dropped, it is not attended any more, and who serves goes on.
#[derive(Debug)]
pub(crate) struct Relay {
    shared: Arc<Shared>,
    task: JoinHandle<Verdict>,
    verdict: Option<Verdict>,
}

#[derive(Debug)]
struct Shared {
    means: Means,
    vm: ProcessId,
    vm_pidfd: Pidfd,
    row: Mutex<Row>,
    /// Whether nothing is collected any more; held by whoever collects what page servers leave.
    collected: Mutex<bool>,
}

#[derive(Debug)]
struct Row {
    /// Who serves, or is about to. None only while there is nobody, or when the row is closed.
    now: Option<PagerProcess>,
    deaths: VecDeque<Instant>,
    /// How the one ended that served last, while its successor has not taken over yet.
    before: Option<String>,
    /// Whether the one that is to serve was killed because it never began.
    late: bool,
    open: bool,
}

impl Relay {
    /// Attends a VM and the page server that it has, or had: `None` for one that is dead already.
    pub(crate) fn start(
        means: Means,
        vm: ProcessId,
        vm_pidfd: Pidfd,
        pager: Option<PagerProcess>,
    ) -> Relay {
        let is_dead = pager.is_none();
        let shared = Arc::new(Shared {
            means,
            vm,
            vm_pidfd,
            row: Mutex::new(Row {
                now: pager,
                deaths: VecDeque::new(),
                before: None,
                late: false,
                open: true,
            }),
            collected: Mutex::new(false),
        });
        // At once, so that whoever asks next finds it written down.
        let begun = if is_dead { shared.replace() } else { Ok(()) };
        let task = tokio::spawn(attend(shared.clone(), begun));
        Relay {
            shared,
            task,
            verdict: None,
        }
    }

    /// Waits until there is no page server any more, and says why. May be dropped and called again.
    pub(crate) async fn over(&mut self) -> Verdict {
        if let Some(verdict) = &self.verdict {
            return verdict.clone();
        }
        // A task that was lost with its runtime has nothing to say.
        let verdict = (&mut self.task).await.unwrap_or(Verdict::WithTheVm);
        self.verdict.insert(verdict).clone()
    }

    /// Whether the page server died before it had the VM, so that Firecracker is about to be killed.
    pub(crate) fn is_lost(&self) -> bool {
        let serves = |pager: &PagerProcess| pager.pidfd().has_exited().is_ok_and(|ended| !ended);
        !pager::has_state(&self.shared.means.dir)
            && !self.shared.row().now.as_ref().is_some_and(serves)
    }

    /// Ends who serves, and lets nobody follow. Only after Firecracker has ended. Nothing writes to the VM's directory for
    /// it from then on, so that it can be removed.
    pub(crate) fn end(&mut self) {
        if let Some(mut pager) = self.shared.close() {
            pager.kill();
            pager.reap();
        }
        *self.shared.collected() = true;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.close();
        self.task.abort();
    }
}

async fn attend(shared: Arc<Shared>, begun: Result<(), Verdict>) -> Verdict {
    let mut next = begun;
    loop {
        match next {
            Ok(()) => {}
            Err(verdict) => {
                if verdict != Verdict::WithTheVm {
                    // At once: nobody answers its page faults.
                    let _ = shared.vm_pidfd.kill();
                }
                return verdict;
            }
        }
        shared.watch().await;
        next = shared.replace();
    }
}

impl Shared {
    /// Waits until who serves has ended. What it leaves before that is collected when it says so.
    async fn watch(self: &Arc<Self>) {
        let Some((process, pidfd)) = self.now() else {
            return;
        };
        let sign = self.row().now.as_mut().and_then(PagerProcess::take_sign);
        let collected = async {
            if let Some(sign) = sign {
                closed(sign).await;
                let shared = self.clone();
                // It goes on if its end comes first.
                let _ = tokio::task::spawn_blocking(move || shared.collect()).await;
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            () = self.until_ended(&process, &pidfd) => {}
            () = collected => {}
        }
    }

    /// Waits until who serves has ended, or has failed to take over in time and was ended.
    async fn until_ended(&self, process: &ProcessId, pidfd: &Pidfd) {
        let ended = exited(pidfd);
        tokio::pin!(ended);
        if tokio::time::timeout(PATIENCE, &mut ended).await.is_ok() {
            return;
        }
        // Before the handshake there is nothing to take over, and it may wait for it as long as it has to.
        if pager::has_state(&self.means.dir) && !self.has_taken_over(process) {
            self.row().late = true;
            let _ = pidfd.kill();
        }
        ended.await;
    }

    fn collect(&self) {
        let over = self.collected();
        if !*over {
            pager::collect(&self.means.dir);
        }
    }

    fn collected(&self) -> MutexGuard<'_, bool> {
        self.collected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Option<(ProcessId, Arc<Pidfd>)> {
        let row = self.row();
        row.now
            .as_ref()
            .map(|pager| (pager.id().clone(), pager.pidfd()))
    }

    /// Whether this page server has had the VM.
    fn has_taken_over(&self, pager: &ProcessId) -> bool {
        let state = self.means.dir.file(PAGER_STATE);
        server_of(&state).is_ok_and(|server| server == pager.pid)
    }

    /// Finds another page server for one that has ended.
    fn replace(&self) -> Result<(), Verdict> {
        let mut row = self.row();
        if !row.open {
            return Err(Verdict::WithTheVm);
        }
        let dir = &self.means.dir;
        let dead = row.now.take();
        // Before another one leaves its own.
        self.collect();
        let had_it = dead
            .as_ref()
            .is_none_or(|pager| self.has_taken_over(pager.id()));
        let (pid, end) = match dead {
            Some(mut pager) => (Some(pager.id().pid), pager.epitaph(dir)),
            None => (None, nobody_looked()),
        };
        let vm_ended = self.vm_pidfd.has_exited().unwrap_or(false);
        if !pager::has_state(dir) {
            return Err(match end.gave_up {
                true => Verdict::Refused(end.words),
                false => Verdict::NeverServed(end.words),
            });
        }
        if vm_ended {
            return Err(Verdict::WithTheVm);
        }
        if let Some(other) = self.another(pid) {
            let next = other.id().pid;
            self.note(&end, &format!("process {next} serves now"));
            self.hand_over(&mut row, other);
            row.before = None;
            return Ok(());
        }
        let words = match row.before.take() {
            Some(before) if !had_it => format!("{before}; its successor: {}", end.words),
            _ => end.words.clone(),
        };
        if !had_it && row.late {
            let patience = PATIENCE.as_secs();
            let words = format!("{words}; it had not taken over after {patience} s");
            return Err(Verdict::GaveUp(words));
        }
        if !had_it && end.gave_up {
            return Err(Verdict::GaveUp(words));
        }
        row.count_death()
            .map_err(|often| Verdict::GaveUp(format!("{words}; {often}")))?;
        self.note(&end, "another one takes over");
        match self.successor() {
            Ok(successor) => self.hand_over(&mut row, successor),
            Err(_) if self.vm_pidfd.has_exited().unwrap_or(false) => {
                return Err(Verdict::WithTheVm);
            }
            Err(why) => {
                let words = format!("{words}; no other can take over: {why}");
                return Err(Verdict::GaveUp(words));
            }
        }
        row.before = Some(words);
        Ok(())
    }

    /// A page server that took the place of this one, started by somebody else.
    fn another(&self, than: Option<u32>) -> Option<PagerProcess> {
        let dir = &self.means.dir;
        let serves = living_server_of(&dir.file(PAGER_STATE)).ok().flatten()?;
        let process = ProcessId::of(serves).ok()?;
        (than != Some(serves))
            .then(|| PagerProcess::adopt(dir, process).ok())
            .flatten()
    }

    fn hand_over(&self, row: &mut Row, next: PagerProcess) {
        self.means.ledger.write_pager(next.id().clone());
        row.now = Some(next);
    }

    fn note(&self, end: &Epitaph, next: &str) {
        let line = format!("the page server ended ({}); {next}", end.words);
        pager::note(&self.means.dir, &line);
    }

    fn successor(&self) -> Result<PagerProcess, String> {
        let pid = i32::try_from(self.vm.pid).map_err(|e| with_causes(&e))?;
        let userfaultfd = take_descriptor(pid).map_err(|e| with_causes(&e))?;
        // The number is still Firecracker's if Firecracker still lives.
        if self.vm_pidfd.has_exited().unwrap_or(false) {
            return Err("firecracker has ended".to_owned());
        }
        let Means {
            program,
            dir,
            vm_id,
            ..
        } = &self.means;
        PagerProcess::succeed(program, dir, vm_id, &self.vm, userfaultfd)
            .map_err(|e| with_causes(&e))
    }

    /// Lets nobody follow, and tells who serves.
    fn close(&self) -> Option<PagerProcess> {
        let mut row = self.row();
        row.open = false;
        row.now.take()
    }

    fn row(&self) -> MutexGuard<'_, Row> {
        self.row.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Row {
    /// Counts a death; more than a few in a short time are an error, in words.
    fn count_death(&mut self) -> Result<(), String> {
        self.deaths.retain(|death| death.elapsed() < WINDOW);
        self.deaths.push_back(Instant::now());
        match self.deaths.len() {
            often if often > MAX_DEATHS => Err(format!(
                "it is the {often}th to end within {} s",
                WINDOW.as_secs()
            )),
            _ => Ok(()),
        }
    }
}

/// Waits until a process is dead.
async fn exited(pidfd: &Pidfd) {
    // Where it cannot be waited for, a guest must not wait for ever either.
    while pidfd.exited().await.is_err() {
        if pidfd.has_exited().unwrap_or(false) {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until a pipe is closed at its other end, or something comes through it: no more than that is asked of a page
/// server, which may be somebody else's by now.
async fn closed(pipe: OwnedFd) {
    if let Ok(pipe) = Receiver::from_owned_fd(pipe) {
        let _ = pipe.readable().await;
    }
}

fn nobody_looked() -> Epitaph {
    Epitaph {
        words: "it was gone when the VM was looked for".to_owned(),
        gave_up: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_deaths_are_borne_and_many_are_not() {
        let mut row = Row {
            now: None,
            deaths: VecDeque::new(),
            before: None,
            late: false,
            open: true,
        };
        let Some(long_ago) = Instant::now().checked_sub(WINDOW) else {
            return;
        };
        row.deaths.extend([long_ago; 20]);
        for _ in 0..MAX_DEATHS {
            assert_eq!(row.count_death(), Ok(()));
        }
        let often = row.count_death().unwrap_err();
        assert_eq!(often, "it is the 6th to end within 10 s");
    }
}
