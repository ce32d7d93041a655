//! Taking up a VM whose owner is gone, from its record alone.

use std::io;

use rekindle_firecracker::model::InstanceState;
use rekindle_firecracker::{
    CallError, IdentifyError, Process, ProcessId, ReadyError, arguments_of, find_by_id,
};

use super::claim::{self, Claim};
use super::console::Console;
use super::crew::{Crew, OnDrop};
use super::dir::{API_SOCKET, DISKS, DirError, MERGED_MEMORY, VmDir};
use super::launch::{self, API_PATIENCE, StartError};
use super::record::{Capturing, Ledger, Origin, Purpose, Record, RecordError};
use super::relay::{Means, Relay};
use super::state::{State, Why};
use super::wake::Environment;
use super::{Parts, Vm, VmError};
use crate::Engine;
use crate::agent::hello::Listener;
use crate::jail::{self, Jail};
use crate::net::Attachment;
use crate::pager::{PagerProcess, collect as collect_left, has_state};
use rekindle_store::Lease;
use rekindle_store::collect::{Mode, collect};

/// What became of a VM whose owner was gone.
#[derive(Debug)]
pub enum Adopted {
    /// It lives, and is owned again.
    Alive(Box<Vm>),
    /// It has ended; its record says how, and nothing of it is left running.
    Over(Box<Record>),
    /// It had not got as far as running: nothing of it is left running, and it can be started in its directory,
    /// which goes when the claim is dropped.
    Unfinished(Claim),
}

/// Why a VM could not be adopted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// Somebody owns it, or its directory cannot be used.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// Its record cannot be read or written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its FIFOs or its API cannot be used.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It was found, and then could not be set right.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// What is left of it cannot be looked for.
    #[error("cannot look for the processes of the VM")]
    Look(#[source] io::Error),
    /// A process could not be watched.
    #[error("cannot watch the processes of the VM")]
    Watch(#[source] IdentifyError),
}

/// Adopts a VM that nobody owns, or tells how it ended.
///
/// `environment` is for a guest that was not woken up before its owner went: what the variables were that it was to get.
pub async fn adopt(
    engine: &Engine,
    dir: VmDir,
    environment: &Environment,
) -> Result<Adopted, AdoptError> {
    let mut claim = Claim::take(dir)?;
    let mut record = match Record::read(claim.dir()) {
        Ok(record) => record,
        Err(RecordError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            // The record is written before anything is started: nothing was.
            claim.on_drop(claim::OnDrop::Remove);
            return Ok(Adopted::Unfinished(claim));
        }
        Err(e) => return Err(e.into()),
    };
    if record.purpose == Purpose::Rehearsal {
        // It was to be ended in any case. Whoever was told to rehearse may begin anew.
        end_leftovers(&record).await.map_err(AdoptError::Look)?;
        clear(claim.dir())?;
        claim.on_drop(claim::OnDrop::Remove);
        return Ok(Adopted::Unfinished(claim));
    }
    match &record.state {
        State::Stopped | State::Failed(_) => Ok(Adopted::Over(Box::new(record))),
        State::Configured => {
            end_leftovers(&record).await.map_err(AdoptError::Look)?;
            clear(claim.dir())?;
            claim.on_drop(claim::OnDrop::Remove);
            Ok(Adopted::Unfinished(claim))
        }
        State::Running | State::Paused => {
            let ledger = Ledger::new(claim.dir(), &record);
            match crew_of(engine, claim.dir(), &record, &ledger).await? {
                Some(crew) => {
                    let adopted = take_up(engine, claim, record, ledger, crew, environment);
                    adopted.await
                }
                None => {
                    let what = missing(&record);
                    end_leftovers(&record).await.map_err(AdoptError::Look)?;
                    let held = leases(engine, &record);
                    collect_left(claim.dir());
                    drop(held);
                    launch::remove_sockets(claim.dir());
                    claim.dir().undo_network()?;
                    record.state = State::Failed(Why::Vanished { what });
                    record.ended = Some(jiff::Timestamp::now());
                    record.firecracker = None;
                    record.pager = None;
                    record.write(claim.dir())?;
                    Ok(Adopted::Over(Box::new(record)))
                }
            }
        }
    }
}

/// The processes that the record names, if all that the guest needs are there. A page server that is dead is replaced.
async fn crew_of(
    engine: &Engine,
    dir: &VmDir,
    record: &Record,
    ledger: &Ledger,
) -> Result<Option<Crew>, AdoptError> {
    let Some(id) = record.firecracker.clone().filter(ProcessId::is_alive) else {
        return Ok(None);
    };
    let pager = match record.pager.clone() {
        None => None,
        Some(id) if id.is_alive() => Some(PagerProcess::adopt(dir, id).ok()),
        Some(_) if !has_state(dir) => return Ok(None),
        Some(_) => Some(None),
    };
    let socket =
        jail::socket(dir, API_SOCKET).map_err(|e| DirError::io(dir.file(API_SOCKET), e))?;
    let firecracker =
        Process::adopt(id.clone(), socket).map_err(|e| AdoptError::Watch(e.source))?;
    let relay = match pager {
        None => None,
        Some(pager) => {
            let pidfd = firecracker.pidfd().try_clone();
            let pidfd = pidfd.map_err(StartError::Watch)?;
            let means = Means {
                program: engine.programs().rekindle.clone(),
                dir: dir.clone(),
                vm_id: record.id.clone(),
                ledger: ledger.clone(),
            };
            Some(Relay::start(means, id, pidfd, pager))
        }
    };
    let client = match firecracker.ready(API_PATIENCE).await {
        Ok(client) => client,
        Err(ReadyError::Died { .. }) => return Ok(None),
        Err(e) => return Err(StartError::from(e).into()),
    };
    // Until it is set right, whoever comes next may try again.
    Ok(Some(Crew::new(
        dir.clone(),
        firecracker,
        client,
        relay,
        OnDrop::LiveOn,
    )))
}

async fn take_up(
    engine: &Engine,
    claim: Claim,
    record: Record,
    ledger: Ledger,
    crew: Crew,
    environment: &Environment,
) -> Result<Adopted, AdoptError> {
    let hello = match record.machine.vsock {
        Some(_) => Some(Listener::start_late(claim.dir(), &ledger).map_err(StartError::Hello)?),
        None => None,
    };
    let mut vm = Vm::assembled(Parts {
        engine: engine.clone(),
        console: Console::open(claim.dir()).map_err(StartError::from)?,
        hello,
        leases: leases(engine, &record),
        network: record
            .machine
            .nat
            .clone()
            .and_then(|nat| Attachment::adopt(claim.dir(), nat)),
        claim,
        record,
        ledger,
        crew,
    });
    vm.live_on();
    vm.environment = environment.clone();
    match set_right(&mut vm).await {
        // Whatever it died of, it is written down by now.
        Err(_) if vm.state().is_over() => return Ok(Adopted::Over(Box::new(vm.record()))),
        set => set?,
    }
    let root = engine.root().clone();
    // Drafts whose builders are dead, as the last owner of this VM may be. Not waited for, and tried again by `gc`.
    tokio::task::spawn_blocking(move || collect(&root, Mode::Reclaim));
    Ok(Adopted::Alive(Box::new(vm)))
}

/// Brings a VM, and its record, into the state that it should be in.
async fn set_right(vm: &mut Vm) -> Result<(), VmError> {
    let seen = match ask_state(vm).await? {
        InstanceState::Paused => State::Paused,
        _ => State::Running,
    };
    vm.record.state = seen;
    // Firecracker answered, so a snapshot that was being written is written, and nobody will publish it.
    if vm.record.capturing.take() == Some(Capturing::WasRunning) {
        vm.call(async |client| client.resume().await).await?;
        vm.record.state = State::Running;
    }
    // A record that cannot be written, on a full disk, is no reason to give up a guest that runs.
    let _ = vm.write_record();
    let _ = vm.wake_if_due().await;
    Ok(())
}

/// Holds the snapshots that the VM runs from. One that was removed while nobody held it is in use all the same, and no
/// reason to give the VM up.
fn leases(engine: &Engine, record: &Record) -> Vec<Lease> {
    let Origin::Restore { snapshot, .. } = &record.origin else {
        return Vec::new();
    };
    let layers = engine
        .store()
        .snapshot(&snapshot.to_string())
        .ok()
        .and_then(|tip| engine.store().chain(tip).ok());
    let layers = layers.unwrap_or_default();
    layers
        .iter()
        .filter_map(|layer| layer.lease().ok())
        .collect()
}

/// The state that Firecracker is in. It answers nothing while it writes a snapshot, however long that takes.
async fn ask_state(vm: &mut Vm) -> Result<InstanceState, VmError> {
    loop {
        match vm.call(async |client| client.describe().await).await {
            Err(VmError::Call(CallError::Deadline { .. })) if vm.record.capturing.is_some() => {}
            answer => return Ok(answer?.state),
        }
    }
}

/// Removes what a start that was cut short left, so that the next one finds nothing in its way.
fn clear(dir: &VmDir) -> Result<(), AdoptError> {
    launch::remove_sockets(dir);
    dir.undo_network()?;
    dir.undo_jail()?;
    let disks = dir.file(DISKS);
    match std::fs::remove_dir_all(&disks) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(AdoptError::Dir(DirError::io(disks, e)));
        }
        _ => {}
    }
    let merged = dir.file(MERGED_MEMORY);
    match std::fs::remove_file(&merged) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(AdoptError::Dir(DirError::io(merged, e)))
        }
        _ => Ok(()),
    }
}

/// What of a VM that should run is not there.
fn missing(record: &Record) -> String {
    let gone = |id: &Option<ProcessId>| id.as_ref().is_some_and(|id| !id.is_alive());
    match (gone(&record.firecracker), gone(&record.pager)) {
        (true, true) => "firecracker and the page server were gone when the VM was looked for",
        (false, true) => "the page server was gone when the VM was looked for; the VM was killed",
        _ => "firecracker was gone when the VM was looked for",
    }
    .to_owned()
}

/// Kills whatever carries the VM's id, also what was started and never written down.
///
/// # Errors
/// If the processes of this host cannot be listed.
pub async fn end_leftovers(record: &Record) -> io::Result<()> {
    for process in find_by_id(&record.id)? {
        if let Ok(pidfd) = process.open_pidfd() {
            let _ = pidfd.kill();
            let _ = pidfd.exited().await;
        }
    }
    Ok(())
}

/// Kills the workers of a VM whose record cannot be read: processes that carry an `--id` and work in its
/// directory. A shell that somebody left there is not touched.
pub async fn end_workers_in(dir: &VmDir) {
    for process in workers_in(dir) {
        if let Ok(pidfd) = process.open_pidfd() {
            let _ = pidfd.kill();
            let _ = pidfd.exited().await;
        }
    }
}

/// The workers that [`end_workers_in`] would kill.
pub fn workers_in(dir: &VmDir) -> Vec<ProcessId> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let jail = Jail::of(dir).ok().flatten();
    let works_here = |pid: &u32| {
        let cwd = std::fs::read_link(format!("/proc/{pid}/cwd"));
        (cwd.is_ok_and(|cwd| cwd == dir.path()) || jail.as_ref().is_some_and(|j| j.holds(*pid)))
            && arguments_of(*pid)
                .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == b"--id"))
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(works_here)
        .filter_map(|pid| ProcessId::of(pid).ok())
        .collect()
}
