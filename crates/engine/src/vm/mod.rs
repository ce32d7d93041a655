//! A VM's life: read [`state`] first.
//!
//! ```text
//!   boot     Claim ─▶ Crew + Console ─▶ configure ─▶ start ──┐
//!   restore  Claim ─▶ Crew + Console ─▶ load ─▶ (resume) ────┼─▶ Vm ─▶ pause, resume, snapshot, stop
//!   adopt    Claim ─▶ what the record names ─────────────────┘
//! ```
//!
//! Each phase is a type that undoes itself when it is dropped: [`claim::Claim`] the directory,
//! `crew::Crew` the processes, `console::Console` the drains of serial port, log and metrics.

pub mod adopt;
pub mod boot;
mod claim;
mod compat;
pub mod config;
mod console;
mod crew;
pub mod dir;
pub mod follow;
pub mod kernel;
mod launch;
pub mod metadata;
mod portable;
pub mod quiesce;
pub mod reaped;
pub mod rebuild;
pub mod record;
pub mod rehearse;
mod relay;
pub mod restore;
pub mod snapshot;
pub mod state;
pub mod stop;
pub mod wake;

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use rekindle_firecracker::CallError;
use rekindle_firecracker::model::InstanceState;

pub use self::claim::Claim;
use self::console::Console;
use self::crew::{Crew, Lost};
use self::dir::VmDir;
use self::launch::StartError;
use self::record::{Ledger, Record, RecordError};
use self::state::{Ask, Refusal, State, Step, Why, decide};
use crate::Engine;
use crate::agent::hello::Listener;
use crate::agent::{Agent, Copy, Exec};
use crate::net::Attachment;

/// How many of Firecracker's last log lines a failure keeps.
const LOG_LINES: usize = 12;

/// A VM that this process owns. Dropping it ends the guest and removes the VM's directory, unless it was
/// [detached](Vm::detach).
#[derive(Debug)]
pub struct Vm {
    // The order is that of undoing: processes end before what they write to goes away.
    crew: Option<Crew>,
    network: Option<Attachment>,
    console: Console,
    hello: Option<Listener>,
    /// All of it but who serves page faults and what the agent said, which changes beside what the owner does.
    record: Record,
    ledger: Ledger,
    claim: Claim,
    leases: Vec<rekindle_store::Lease>,
    /// The snapshot that Firecracker's dirty log began with: none but it can be a Diff's base.
    captured: Option<rekindle_store::SnapshotId>,
    /// What the guest's programs are to get once it is woken up; nowhere else.
    environment: wake::Environment,
    engine: Engine,
}

/// Why a request to a VM failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The VM's state forbids it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Firecracker refused, or did not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The VM died meanwhile.
    #[error("the VM died: {0}")]
    Died(Why),
    /// Its record could not be written.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl Vm {
    /// What is known of it; the same is in its directory.
    pub fn record(&self) -> Record {
        Record {
            pager: self.ledger.pager(),
            agent: self.ledger.agent(),
            ..self.record.clone()
        }
    }

    /// Where it is in its life.
    pub fn state(&self) -> &State {
        &self.record.state
    }

    /// The agent in its guest.
    pub fn agent(&self) -> Agent {
        Agent::of(self.dir())
    }

    /// A program to run in the guest, through its agent: its name and its arguments. Awaited, it is started.
    ///
    /// ```no_run
    /// # async fn example(vm: &rekindle_engine::Vm) -> Result<(), rekindle_engine::agent::AgentError> {
    /// let said = vm.exec(["uname", "-a"]).output().await?;
    /// assert_eq!(said.exit, rekindle_engine::agent::Exit::Status(0));
    /// # Ok(())
    /// # }
    /// ```
    pub fn exec<I>(&self, argv: I) -> Exec
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.agent().exec(argv)
    }

    /// Copies a file or tree of the host into the guest; see [`Agent::copy_in`].
    ///
    /// ```no_run
    /// # async fn example(vm: &rekindle_engine::Vm) -> Result<(), rekindle_engine::agent::CopyError> {
    /// let copied = vm.copy_in("www", "/srv").await?;
    /// println!("{} files are in /srv/www", copied.files);
    /// # Ok(())
    /// # }
    /// ```
    pub fn copy_in(&self, from: impl Into<PathBuf>, to: impl Into<String>) -> Copy {
        self.agent().copy_in(from, to)
    }

    /// Copies a file or tree of the guest to the host; see [`Agent::copy_out`].
    pub fn copy_out(&self, from: impl Into<String>, to: impl Into<PathBuf>) -> Copy {
        self.agent().copy_out(from, to)
    }

    /// Its directory.
    pub fn dir(&self) -> &VmDir {
        self.claim.dir()
    }

    /// Stops the guest's virtual CPUs. `Ok` if they stand still already.
    pub async fn pause(&mut self) -> Result<(), VmError> {
        match decide(&self.record.state, Ask::Pause)? {
            Step::Already => Ok(()),
            Step::Do => {
                self.change(State::Paused, async |client| client.pause().await)
                    .await
            }
        }
    }

    /// Lets the guest's virtual CPUs run. `Ok` if they run already.
    pub async fn resume(&mut self) -> Result<(), VmError> {
        match decide(&self.record.state, Ask::Resume)? {
            Step::Already => Ok(()),
            Step::Do => {
                self.change(State::Running, async |client| client.resume().await)
                    .await?;
                Ok(self.wake_if_due().await?)
            }
        }
    }

    /// Completes when the VM has died; [`Vm::ended`] then says how. May be dropped and called again. Never completes
    /// once the VM is over.
    ///
    /// A page server that dies is no death of the VM: another one takes its place, on the runtime that the VM was
    /// started on, whether anybody waits here or not.
    pub async fn death(&self) {
        match &self.crew {
            None => std::future::pending().await,
            Some(crew) => crew.first_death().await,
        }
    }

    /// Waits until the VM has ended by itself, cleans up after it, and tells the state that it ended in. To wait for
    /// something else at the same time, wait for [`Vm::death`]: this is not to be dropped half-way. Never completes
    /// once the VM is over.
    pub async fn ended(&mut self) -> State {
        match &mut self.crew {
            None => std::future::pending().await,
            Some(crew) => {
                let lost = crew.lost().await;
                self.bury(lost).await
            }
        }
    }

    /// Lets the VM live on when this is dropped; [`adopt::adopt`] takes it up again. Its serial output and
    /// log wait in their FIFOs meanwhile, up to 1 MiB each; what is more is lost.
    pub fn detach(mut self) {
        self.live_on();
    }

    /// Keeps the directory, and the processes, whatever happens to this value from now on.
    pub fn live_on(&mut self) {
        self.claim.on_drop(claim::OnDrop::Keep);
        if let Some(crew) = &mut self.crew {
            crew.on_drop(crew::OnDrop::LiveOn);
        }
        if let Some(network) = &mut self.network {
            network.live_on();
        }
    }

    fn assembled(parts: Parts) -> Vm {
        let Parts {
            engine,
            claim,
            record,
            ledger,
            crew,
            network,
            console,
            hello,
            leases,
        } = parts;
        Vm {
            crew: Some(crew),
            network,
            console,
            hello,
            record,
            ledger,
            claim,
            leases,
            captured: None,
            environment: Default::default(),
            engine,
        }
    }

    /// Runs an API call that a dead page server or a dead Firecracker cannot hang.
    async fn call<T>(
        &mut self,
        call: impl AsyncFnOnce(&rekindle_firecracker::Client) -> Result<T, CallError>,
    ) -> Result<T, VmError> {
        let Some(crew) = &mut self.crew else {
            return Err(VmError::Refused(Refusal::NotStarted(Ask::Stop)));
        };
        match crew.guard(call).await {
            Ok(answer) => Ok(answer?),
            Err(lost) => match self.bury(lost).await {
                State::Failed(why) => Err(VmError::Died(why)),
                _ => Err(VmError::Refused(Refusal::Stopped(Ask::Pause))),
            },
        }
    }

    /// Changes the state. A call that was not answered may have been carried out all the same: what is so is asked.
    async fn change(
        &mut self,
        to: State,
        call: impl AsyncFnOnce(&rekindle_firecracker::Client) -> Result<(), CallError>,
    ) -> Result<(), VmError> {
        let error = match self.call(call).await {
            Ok(()) => return self.enter(to),
            Err(error) => error,
        };
        if matches!(&error, VmError::Call(call) if call.status().is_none())
            && let Ok(info) = self.call(async |client| client.describe().await).await
        {
            self.enter(match info.state {
                InstanceState::Paused => State::Paused,
                _ => State::Running,
            })?;
        }
        Err(error)
    }

    /// Writes a new state down.
    fn enter(&mut self, state: State) -> Result<(), VmError> {
        self.record.state = state;
        self.write_record()?;
        Ok(())
    }

    fn write_record(&mut self) -> Result<(), RecordError> {
        self.ledger.write(&mut self.record)
    }

    /// Cleans up after processes that ended by themselves.
    async fn bury(&mut self, lost: Lost) -> State {
        self.finish(End::Lost(lost)).await
    }

    /// The end, however it came: processes gone, output drained, sockets removed, record written.
    async fn finish(&mut self, end: End) -> State {
        if let Some(mut crew) = self.crew.take() {
            crew.kill().await;
        }
        self.network = None;
        // If it cannot be, it is still written down, for whoever removes the directory.
        let _ = self.claim.dir().undo_network();
        self.console.finish().await;
        self.record.state = match end {
            End::Asked | End::Lost(Lost::Firecracker { clean: true, .. }) => State::Stopped,
            End::Lost(lost) => State::Failed(lost.why(self.console.last_log_lines(LOG_LINES))),
        };
        self.record.ended = Some(Timestamp::now());
        self.record.capturing = None;
        self.record.firecracker = None;
        self.ledger.note_pager(None);
        self.hello = None;
        launch::remove_sockets(self.claim.dir());
        self.leases.clear();
        // The caller learns the state either way; a record that cannot be written is set right by the next
        // command, which finds no process.
        let _ = self.write_record();
        self.record.state.clone()
    }
}

/// Listens to the guest's agent, where the guest can call.
fn listen(dir: &VmDir, record: &Record, ledger: &Ledger) -> Result<Option<Listener>, StartError> {
    if record.machine.vsock.is_none() {
        return Ok(None);
    }
    let listener = Listener::start(dir, ledger).map_err(StartError::Hello)?;
    Ok(Some(listener))
}

/// What a VM is made of.
struct Parts {
    engine: Engine,
    claim: Claim,
    record: Record,
    ledger: Ledger,
    crew: Crew,
    network: Option<Attachment>,
    console: Console,
    hello: Option<Listener>,
    leases: Vec<rekindle_store::Lease>,
}

/// How a VM came to its end.
enum End {
    Asked,
    Lost(Lost),
}

/// Microseconds since an instant, for the record's timings.
fn micros(since: std::time::Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// How long a guest gets to end by itself when it is asked to, unless said otherwise.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
