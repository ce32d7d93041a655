//! The monitor: a small program around one [`Vm`], detached from the terminal, restarted by its keeper.
//!
//! ```text
//!   control.sock ─▶ server ─▶ queue ─▶ one task that owns the Vm ◀─ deaths (pidfd), time to live
//! ```

pub(crate) mod abandoned;
pub(crate) mod client;
pub(crate) mod job;
pub(crate) mod keeper;
pub(crate) mod progress;
pub(crate) mod protocol;
mod rehearsal;
pub(crate) mod secrets;
mod server;
pub(crate) mod start;
pub(crate) mod truth;
pub(crate) mod watchers;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;
use rekindle_engine::Engine;
use rekindle_engine::Vm;
use rekindle_engine::remote::Remote;
use rekindle_engine::store::Snapshot;
use rekindle_engine::vm::Claim;
use rekindle_engine::vm::adopt::{Adopted, adopt};
use rekindle_engine::vm::boot::boot_in;
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::quiesce::Quiesce;
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::restore::{restore_in, restore_remote_in};
use rekindle_engine::vm::snapshot::{CaptureError, SnapshotConfig};
use rekindle_engine::vm::stop::Manner;
use rekindle_engine::vm::{STOP_GRACE, VmError};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, spawn_blocking};

use self::job::{Job, Task};
use self::progress::Progress;
use self::protocol::{CONTROL_SOCKET, SnapshotAnswer, SnapshotRequest, StopRequest};
use self::secrets::Secrets;
use self::server::{Answer, Ask, Request, Server};
use self::truth::Watch;

/// Starts or adopts the VM of a directory and owns it until it has ended.
pub(crate) async fn run(
    engine: &Engine,
    dir: VmDir,
    watch: &Watch,
    progress: &mut Progress,
    mut secrets: Secrets,
) -> Result<()> {
    let (vm, served) = match take(engine, &dir, watch, progress, &mut secrets).await {
        Ok(Taken::Vm(vm, served)) => (*vm, served),
        Ok(Taken::Nothing) => return Ok(()),
        Err(e) => {
            progress.failed(&e);
            return Err(e);
        }
    };
    progress.up(&vm.record());
    let ended = Owner::new(vm, secrets).run(served.requests).await;
    served.server.finish().await;
    let _ = std::fs::remove_file(dir.file(CONTROL_SOCKET));
    progress.over(&ended);
    Ok(())
}

/// The control socket, and what comes through it. Requests wait until the VM is up.
struct Served {
    server: Server,
    requests: mpsc::Receiver<Request>,
}

/// What there is to look after.
enum Taken {
    /// A VM, fresh or adopted, and its control socket.
    Vm(Box<Vm>, Served),
    /// It has ended already.
    Nothing,
}

async fn take(
    engine: &Engine,
    dir: &VmDir,
    watch: &Watch,
    progress: &mut Progress,
    secrets: &mut Secrets,
) -> Result<Taken> {
    match adopt(engine, dir.clone(), secrets.environment()).await? {
        Adopted::Alive(mut vm) => {
            vm.live_on();
            let served = appear(dir, watch)?;
            Ok(Taken::Vm(vm, served))
        }
        Adopted::Over(record) => {
            progress.over(&record);
            Ok(Taken::Nothing)
        }
        Adopted::Unfinished(claim) => {
            let mut task = Job::read(dir)?.task;
            let metadata = secrets.metadata().cloned();
            match &mut task {
                Task::Boot(config) => config.metadata = metadata,
                Task::Restore { config, .. } | Task::RestoreRemote { config, .. } => {
                    config.metadata = metadata;
                    if let Some(wake) = &mut config.wake {
                        wake.env = secrets.environment().clone();
                    }
                }
                Task::Rehearse { .. } => {}
            }
            let mut served = appear(dir, watch)?;
            match start(engine, claim, task, &mut served, progress).await {
                Ok(Some(mut vm)) => {
                    vm.live_on();
                    Ok(Taken::Vm(Box::new(vm), served))
                }
                nothing => {
                    // Who still waits is told that there is no VM.
                    drop(served.requests);
                    served.server.finish().await;
                    nothing.map(|_| Taken::Nothing)
                }
            }
        }
    }
}

/// Makes this monitor known, once the VM is its own: who reads of it can connect to it.
fn appear(dir: &VmDir, watch: &Watch) -> Result<Served> {
    let (server, requests) =
        server::serve(&dir.file(CONTROL_SOCKET)).context("cannot serve the control socket")?;
    watch.write(dir)?;
    Ok(Served { server, requests })
}

/// Starts the VM afresh. If that fails, its directory is gone, and the name is free again. A rehearsal is over when this
/// returns, and leaves no VM.
async fn start(
    engine: &Engine,
    claim: Claim,
    task: Task,
    served: &mut Served,
    progress: &mut Progress,
) -> Result<Option<Vm>> {
    match task {
        Task::Boot(config) => Ok(Some(boot_in(engine, claim, config).await?)),
        Task::Restore { snapshot, config } => {
            let snapshot = engine.snapshot(&snapshot)?;
            Ok(Some(restore_in(engine, claim, &snapshot, config).await?))
        }
        Task::RestoreRemote { remote, config } => {
            let root = engine.root().clone();
            let remote = spawn_blocking(move || Remote::find(&root, remote)).await??;
            Ok(Some(
                restore_remote_in(engine, claim, remote, config).await?,
            ))
        }
        Task::Rehearse { snapshot, config } => {
            let snapshot = engine.snapshot(&snapshot)?;
            let rehearsed =
                rehearsal::run(engine, claim, &snapshot, config, &mut served.requests).await?;
            progress.rehearsed(rehearsed);
            Ok(None)
        }
    }
}

/// The one task that owns the VM.
struct Owner {
    vm: Vm,
    secrets: Secrets,
    publishing: JoinSet<Published>,
}

/// A snapshot that was hashed and published while the guest ran, and who waits for it.
struct Published {
    result: Result<Snapshot>,
    paused: Duration,
    begun: Instant,
    answer: oneshot::Sender<Answer>,
}

impl Owner {
    fn new(vm: Vm, secrets: Secrets) -> Owner {
        Owner {
            vm,
            secrets,
            publishing: JoinSet::new(),
        }
    }

    async fn run(mut self, mut requests: mpsc::Receiver<Request>) -> Record {
        let mut time_is_up = Box::pin(until(self.vm.record().ends_at));
        while !self.vm.state().is_over() {
            if !self.vm.is_to_be_woken() {
                self.secrets.forget();
            }
            tokio::select! {
                () = self.vm.death() => {
                    self.vm.ended().await;
                }
                Some(request) = requests.recv() => self.answer(request).await,
                Some(done) = self.publishing.join_next() => {
                    if let Ok(done) = done {
                        self.published(done);
                    }
                }
                () = &mut time_is_up => {
                    let _ = self.vm.stop(Manner::Ask(STOP_GRACE)).await;
                }
            }
        }
        // Snapshots that are being written outlast the VM.
        while let Some(done) = self.publishing.join_next().await {
            if let Ok(done) = done {
                self.published(done);
            }
        }
        self.vm.record()
    }

    async fn answer(&mut self, request: Request) {
        let Request { ask, answer } = request;
        let done = match ask {
            Ask::Describe => Ok(()),
            Ask::Pause => self.vm.pause().await,
            Ask::Resume => self.vm.resume().await,
            Ask::Stop(StopRequest { grace_ms }) => {
                let manner = match grace_ms {
                    0 => Manner::Kill,
                    ms => Manner::Ask(Duration::from_millis(ms)),
                };
                self.vm.stop(manner).await.map(drop)
            }
            Ask::Snapshot(request) => return self.snapshot(request, answer).await,
        };
        let said = match done {
            Ok(()) => match serde_json::to_value(self.vm.record()) {
                Ok(record) => Answer::Done(record),
                Err(e) => Answer::Failed(e.to_string()),
            },
            Err(e @ VmError::Refused(_)) => Answer::Refused(e.to_string()),
            Err(e) => Answer::Failed(format!("{:#}", anyhow::Error::from(e))),
        };
        // Who asked may be gone; what was asked is done all the same.
        let _ = answer.send(said);
    }

    /// The guest stands still for the capture; hashing and publishing happen on a thread beside it.
    async fn snapshot(&mut self, request: SnapshotRequest, answer: oneshot::Sender<Answer>) {
        let begun = Instant::now();
        let config = SnapshotConfig {
            kind: request.kind,
            name: request.name,
            quiesce: match request.quiesce_ms {
                0 => Quiesce::Off,
                ms => Quiesce::Within(Duration::from_millis(ms)),
            },
        };
        match self.vm.capture(config).await {
            Ok(captured) => {
                self.publishing.spawn_blocking(move || {
                    let paused = captured.paused();
                    let result = captured.publish().map_err(anyhow::Error::from);
                    Published {
                        result,
                        paused,
                        begun,
                        answer,
                    }
                });
            }
            Err(e) => {
                let refused = matches!(
                    e,
                    CaptureError::Refused(_)
                        | CaptureError::NotTracked
                        | CaptureError::NoBase
                        | CaptureError::Balloon
                );
                let text = format!("{:#}", anyhow::Error::from(e));
                let _ = answer.send(if refused {
                    Answer::Refused(text)
                } else {
                    Answer::Failed(text)
                });
            }
        }
    }

    fn published(&mut self, done: Published) {
        let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        let said = match done.result {
            Ok(snapshot) => {
                self.vm.published(&snapshot);
                let answer = SnapshotAnswer {
                    id: snapshot.id().to_string(),
                    paused_us: micros(done.paused),
                    total_us: micros(done.begun.elapsed()),
                };
                match serde_json::to_value(answer) {
                    Ok(value) => Answer::Done(value),
                    Err(e) => Answer::Failed(e.to_string()),
                }
            }
            Err(e) => Answer::Failed(format!("{e:#}")),
        };
        let _ = done.answer.send(said);
    }
}

/// Completes at that time; never if there is none.
async fn until(time: Option<Timestamp>) {
    match time {
        None => std::future::pending().await,
        Some(time) => {
            let left =
                Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or_default();
            tokio::time::sleep(left).await;
        }
    }
}
