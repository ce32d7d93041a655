//! All sessions, and the one who waits for their programs.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::wait::{Id, WaitPidFlag, waitid};
use rekindle_agent::{Exec, Exit, Orphan, Refusal, SessionId, Why};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions};

use crate::session::Session;
use crate::{Place, init, program};

/// More programs than this are not run at once.
const MOST_RUNNING: usize = 256;

/// Of so many that have ended, and whose callers may come back, the outcome is kept.
const MOST_ENDED: usize = 64;

#[derive(Debug)]
pub(crate) struct Sessions {
    place: Place,
    all: Mutex<All>,
    /// There is a program to wait for.
    started: Condvar,
    /// None is left.
    none_left: Condvar,
}

#[derive(Debug, Default)]
struct All {
    sessions: HashMap<SessionId, Arc<Session>>,
    running: HashMap<Pid, Running>,
    /// Those that have ended, the oldest first.
    ended: Vec<SessionId>,
    /// What every program gets.
    environment: Vec<(String, String)>,
    /// How many were begun for the agent itself.
    unheard: u64,
}

#[derive(Debug)]
struct Running {
    id: SessionId,
    session: Arc<Session>,
    /// Its threads wait for this.
    ended: Arc<OwnedFd>,
}

impl Sessions {
    pub(crate) fn new(place: Place) -> Sessions {
        Sessions {
            place,
            all: Mutex::default(),
            started: Condvar::new(),
            none_left: Condvar::new(),
        }
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session of this name, begun if it has to be and can be.
    pub(crate) fn open(
        self: &Arc<Self>,
        id: SessionId,
        exec: Option<&Exec>,
    ) -> Result<Arc<Session>, Refusal> {
        let refuse = |why, words: String| Err(Refusal { why, words });
        // Held while the program starts: who waits for its end must know it first.
        let mut all = self.all();
        all.tidy();
        if let Some(session) = all.sessions.get(&id) {
            if session.is_unheard() {
                let words =
                    format!("the session {id} belongs to the VM that this one is a copy of");
                return refuse(Why::NoSession, words);
            }
            return Ok(session.clone());
        }
        let Some(exec) = exec else {
            return refuse(
                Why::NoSession,
                format!("there is no session {id}: its guest was started anew, or it was given up"),
            );
        };
        self.begin(&mut all, id, exec)
    }

    /// Begins a session that nobody hears.
    pub(crate) fn begin_unheard(self: &Arc<Self>, exec: &Exec) -> Result<Arc<Session>, Refusal> {
        let mut all = self.all();
        let mut names = (all.unheard + 1..).map(|n| {
            let name = format!("agent-{n}").parse::<SessionId>();
            (n, name.expect("it has none but letters, digits and -"))
        });
        let free = names.find(|(_, name)| !all.sessions.contains_key(name));
        let (n, id) = free.expect("there are not so many sessions");
        all.unheard = n;
        let session = self.begin(&mut all, id, exec)?;
        session.unheard();
        Ok(session)
    }

    fn begin(
        self: &Arc<Self>,
        all: &mut All,
        id: SessionId,
        exec: &Exec,
    ) -> Result<Arc<Session>, Refusal> {
        let refuse = |why, words: String| Err(Refusal { why, words });
        if all.running.len() >= MOST_RUNNING {
            return refuse(
                Why::Full,
                format!("{MOST_RUNNING} programs run in the guest, and no more may"),
            );
        }
        if exec.ends_guest && self.place == Place::Apart {
            return refuse(Why::Nonsense, "there is no guest that could go down".into());
        }
        let program = program::start(exec, &all.environment)?;
        let (pid, ended) = (program.pid, program.ended.clone());
        let terminal = program.terminal.clone();
        let session = Arc::new(Session::new(pid, exec, terminal));
        let running = Running {
            id: id.clone(),
            session: session.clone(),
            ended,
        };
        all.running.insert(pid, running);
        self.started.notify_all();
        let attended = program.attend(&session);
        let attended = attended.and_then(|()| match exec.ends_guest {
            true => self.go_down_after(&session),
            false => Ok(()),
        });
        if let Err(error) = attended {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
            return refuse(Why::Full, format!("the guest has no threads left: {error}"));
        }
        all.sessions.insert(id, session.clone());
        Ok(session)
    }

    /// Has the guest go down when a program is over.
    fn go_down_after(self: &Arc<Self>, session: &Arc<Session>) -> io::Result<()> {
        let (sessions, session) = (self.clone(), session.clone());
        let wait = move || {
            session.wait_until_over();
            init::shut_down(&sessions);
        };
        thread::Builder::new().name("last".into()).spawn(wait)?;
        Ok(())
    }

    /// What every program from now on gets, where its own environment says nothing else. In memory and nowhere else.
    pub(crate) fn set_environment(&self, environment: Vec<(String, String)>) {
        self.all().environment = environment;
    }

    /// The guest is another VM from now on: whoever called before is lost.
    pub(crate) fn orphan(&self) -> Vec<Orphan> {
        let all = self.all();
        let mut orphans: Vec<Orphan> = all
            .sessions
            .iter()
            .filter_map(|(id, session)| session.orphan(id))
            .collect();
        drop(all);
        orphans.sort_by_key(|orphan| orphan.pid);
        orphans
    }

    /// Waits for programs, and for the orphans that come to us where we are the guest's init, for ever.
    pub(crate) fn reap(&self) -> io::Result<()> {
        loop {
            // Left as it is, so that its number stays its own until it is known to have ended.
            let pid = match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Ok(status) => status.pid().and_then(|pid| Pid::from_raw(pid.as_raw())),
                Err(nix::errno::Errno::EINTR) => continue,
                Err(nix::errno::Errno::ECHILD) => {
                    self.wait_for_a_start();
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            if let Some(pid) = pid {
                self.ended(pid)?;
            }
        }
    }

    /// Waits until no program of a session runs, so long at the most.
    pub(crate) fn wait_for_none(&self, patience: Duration) {
        let all = self.all();
        let some_run = |all: &mut All| !all.running.is_empty();
        drop(self.none_left.wait_timeout_while(all, patience, some_run));
    }

    fn wait_for_a_start(&self) {
        let all = self.all();
        if all.running.is_empty() {
            drop(self.started.wait(all));
        }
    }

    fn ended(&self, pid: Pid) -> io::Result<()> {
        let mut all = self.all();
        let Some(Running { id, session, ended }) = all.running.remove(&pid) else {
            // An orphan; or a child that could not become its program, whom its starter has waited for.
            return match reap(pid) {
                Err(error) if error.raw_os_error() != Some(Errno::CHILD.raw_os_error()) => {
                    Err(error)
                }
                _ => Ok(()),
            };
        };
        session.reap(|| reap(pid))?;
        // It counts to 1, and never further.
        let _ = rustix::io::write(&*ended, &1u64.to_ne_bytes());
        all.ended.push(id);
        self.none_left.notify_all();
        all.tidy();
        Ok(())
    }
}

/// Waits for a program that has ended.
fn reap(pid: Pid) -> io::Result<Exit> {
    let status =
        rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), WaitOptions::empty()))?;
    let exit = status.map(|(_, status)| match status.exit_status() {
        Some(status) => Exit::Status(status),
        None => Exit::Signal(status.terminating_signal().unwrap_or_default()),
    });
    exit.ok_or_else(|| io::Error::other("a program that has ended has not"))
}

impl All {
    /// Lets go of what nobody can ask for, and of the oldest of what hardly anybody will.
    fn tidy(&mut self) {
        let sessions = &mut self.sessions;
        sessions.retain(|_, session| !(session.is_forgotten() && session.has_exited()));
        self.ended.retain(|id| sessions.contains_key(id));
        let mut surplus = self.ended.len().saturating_sub(MOST_ENDED);
        self.ended.retain(|id| {
            let gone = surplus > 0
                && sessions
                    .get(id)
                    .is_none_or(|session| session.forget_if_idle());
            if gone {
                surplus -= 1;
                sessions.remove(id);
            }
            !gone
        });
    }
}
