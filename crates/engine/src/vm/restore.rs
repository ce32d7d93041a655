//! Restoring: a copy of a snapshot, running or paused, its memory through userfaultfd or mapped.
//!
//! ```text
//!   socket bound ─▶ pager starts ───────────────┐ connects when it has to
//!                   firecracker starts ─▶ API ──┴─▶ load ─▶ (resume)
//!                   drives copied ──────────────┘
//! ```

mod config;
mod error;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use rekindle_firecracker::Client;
use rekindle_firecracker::model::{MemoryBackend, NetworkOverride, SnapshotLoadParams};
use rekindle_pager::PackedSource;
use rekindle_store::flatten::flatten_to;
use rekindle_store::{Lease, Manifest, Snapshot};

pub use self::config::{
    Check, Clock, Mismatch, Network, Recording, Replay, RestoreConfig, TapOverride, Then,
};
pub use self::error::RestoreError;
use super::boot::{BootError, Drives, attachment, new_record};
use super::claim::Claim;
use super::compat::{self, Incompatible};
use super::config::{Backend, DirtyPages, Pages};
use super::console::Console;
use super::crew::{Crew, Lost, Starting};
use super::dir::{DISKS, MERGED_MEMORY, OUTLINE, PAGER_SOCKET, VmDir};
use super::launch::{StartError, with_last_words};
pub use super::portable::policy;
use super::record::{GuestAgent, Ledger, Origin, Record};
use super::relay::Means;
use super::state::State;
use super::wake::Waking;
use super::{Parts, Vm, micros, portable};
use crate::Engine;
use crate::agent::hello::Listener;
use crate::host;
use crate::jail::{self, Isolation, Jail};
use crate::net::{self, Attachment, NetError, Place};
use crate::pager::{Hints, Memory, PagerProcess, note};
use crate::remote::{Remote, RemoteError};

/// What it is restored from, as a jailed Firecracker finds it.
const VMSTATE: &str = "vmstate";

/// How often a restore is begun whose page server dies before it has the VM.
const ATTEMPTS: u32 = 3;

/// A snapshot that was looked at from all sides, and is held so that nobody removes it.
#[derive(Debug)]
struct Source {
    /// From the Full snapshot to the one that is restored; never empty.
    layers: Arc<[Snapshot]>,
    leases: Vec<Lease>,
    /// What copies touched; there may be no such file.
    working_set: PathBuf,
    /// Where the memory is, if not in the layers.
    packed: Option<PackedSource>,
}

impl Source {
    /// The snapshot that is restored.
    fn tip(&self) -> &Snapshot {
        &self.layers[self.layers.len() - 1]
    }
}

/// Restores a snapshot under a name that is free.
pub(crate) async fn restore(
    engine: &Engine,
    snapshot: &Snapshot,
    config: RestoreConfig,
) -> Result<Vm, RestoreError> {
    let source = examine(engine, snapshot, &config).await?;
    let claim = Claim::new(engine, &config.name)?;
    assemble(engine, claim, source, config).await
}

/// Prepares a copy of a snapshot under a name that is free.
pub(crate) async fn prepare(
    engine: &Engine,
    snapshot: &Snapshot,
    config: RestoreConfig,
) -> Result<Prepared, RestoreError> {
    let source = examine(engine, snapshot, &config).await?;
    let claim = Claim::new(engine, &config.name)?;
    prepare_in(engine, claim, source, config)
}

/// Restores a snapshot in a directory that this process holds.
pub async fn restore_in(
    engine: &Engine,
    claim: Claim,
    snapshot: &Snapshot,
    config: RestoreConfig,
) -> Result<Vm, RestoreError> {
    let source = examine(engine, snapshot, &config).await?;
    assemble(engine, claim, source, config).await
}

/// Restores a snapshot that stays where it is, under a name that is free.
pub(crate) async fn restore_remote(
    engine: &Engine,
    remote: Remote,
    config: RestoreConfig,
) -> Result<Vm, RestoreError> {
    check_remote(&remote, &config)?;
    let claim = Claim::new(engine, &config.name)?;
    restore_remote_in(engine, claim, remote, config).await
}

/// Restores a snapshot that stays where it is, in a directory that this process holds.
pub async fn restore_remote_in(
    engine: &Engine,
    claim: Claim,
    remote: Remote,
    config: RestoreConfig,
) -> Result<Vm, RestoreError> {
    check_remote(&remote, &config)?;
    jail::check(engine, config.isolation, &config.host_io)?;
    let (dir, root) = (claim.dir().file(OUTLINE), engine.root().clone());
    let packed = remote.source(&root, dir.clone());
    let lay = move || {
        let tip = remote.lay(&root, &dir)?;
        let set = remote.working_set(&root, &tip.working_set_path());
        Ok::<_, RemoteError>((tip, set))
    };
    let (tip, working_set) = tokio::task::spawn_blocking(lay)
        .await
        .map_err(|e| BootError::Task(std::io::Error::other(e)))??;
    let source = Source {
        layers: [tip].into(),
        leases: Vec::new(),
        working_set,
        packed: Some(packed),
    };
    assemble(engine, claim, source, config).await
}

/// What can be refused of a snapshot that is somewhere else.
pub fn check_remote(remote: &Remote, config: &RestoreConfig) -> Result<(), RestoreError> {
    check(remote.manifest(), config)?;
    let option = match (config.backend, config.check) {
        (Backend::File, _) => "--backend file",
        (_, Check::Everything) => "--verify",
        (Backend::Uffd, Check::Quick) => return Ok(()),
    };
    Err(RestoreError::NotHere {
        option,
        url: remote.url(),
    })
}

/// Everything that can be refused before anything is made; takes the leases.
async fn examine(
    engine: &Engine,
    snapshot: &Snapshot,
    config: &RestoreConfig,
) -> Result<Source, RestoreError> {
    check(snapshot.manifest(), config)?;
    jail::check(engine, config.isolation, &config.host_io)?;
    // Opened anew: the caller keeps its own, and this one is looked at as it is now.
    let tip = engine.snapshot(&snapshot.id().to_string())?;
    let layers: Arc<[Snapshot]> = engine.store().chain(tip)?.into();
    let leases = layers
        .iter()
        .map(Snapshot::lease)
        .collect::<Result<Vec<_>, _>>()?;
    if config.check == Check::Everything {
        let layers = layers.clone();
        tokio::task::spawn_blocking(move || layers.iter().try_for_each(Snapshot::verify))
            .await
            .map_err(|e| BootError::Task(std::io::Error::other(e)))??;
    }
    Ok(Source {
        working_set: layers[layers.len() - 1].working_set_path(),
        layers,
        leases,
        packed: None,
    })
}

/// What can be refused without reading memory or disks.
pub fn check(manifest: &Manifest, config: &RestoreConfig) -> Result<(), RestoreError> {
    host::check_kvm()?;
    if config.backend == Backend::Uffd {
        host::check_userfaultfd()?;
    }
    if config.mismatch == Mismatch::Refuse {
        compat::check_cpu(manifest.host.cpu_vendor.as_str())
            .map_err(|source| incompatible(manifest, source))?;
    }
    if portable::pages(manifest) == Pages::Huge {
        if config.backend == Backend::File {
            return Err(RestoreError::HugePagesFromFile);
        }
        host::check_huge_pages(manifest.machine.mem_mib)?;
    }
    for wanted in &config.taps {
        if !manifest
            .devices
            .interfaces
            .iter()
            .any(|nic| nic.id.as_str() == wanted.iface_id)
        {
            return Err(RestoreError::NoSuchInterface(wanted.iface_id.clone()));
        }
    }
    if let Some(wake) = &config.wake
        && wake.takes_an_agent()
        && portable::agent(manifest).is_none()
    {
        return Err(RestoreError::NoAgent);
    }
    if config.metadata.is_some() && !manifest.devices.mmds {
        return Err(RestoreError::NoMmds);
    }
    let nat = portable::nat(manifest, config).map_err(NetError::from)?;
    match (&config.network, nat) {
        // Its TAPs are made for it.
        (Network::CutOff, _) if manifest.devices.interfaces.is_empty() => return Ok(()),
        (Network::CutOff, _) => return Ok(net::check_rights()?),
        (Network::Nat(_), None) => return Err(RestoreError::NoNetwork),
        (_, Some(_)) if !config.taps.is_empty() => return Err(RestoreError::OwnTaps),
        (_, Some(nat)) => return Ok(net::check(&nat, manifest.devices.interfaces.len())?),
        (Network::AsBefore, None) => {}
    }
    for nic in &manifest.devices.interfaces {
        let other = config
            .taps
            .iter()
            .find(|wanted| wanted.iface_id == nic.id.as_str());
        let tap = other.map_or(nic.host_dev_name.as_str(), |wanted| &wanted.tap);
        net::check_tap(tap, config.isolation).map_err(|source| RestoreError::Tap {
            iface_id: nic.id.to_string(),
            source,
        })?;
    }
    Ok(())
}

fn incompatible(manifest: &Manifest, source: Incompatible) -> RestoreError {
    RestoreError::Incompatible {
        snapshot: manifest.id,
        source,
    }
}

/// A copy that is ready to be loaded: its directory is there, its page server is starting or waits, its drives are
/// being copied. Dropped, it is undone.
///
/// Who keeps some of these in store pays only for [`Prepared::start`] when a copy is wanted.
#[derive(Debug)]
pub struct Prepared {
    // The order is that of undoing, as in `Vm`.
    /// None while it is being started.
    starting: Option<Starting>,
    /// None once they are in place.
    drives: Option<Drives>,
    console: Console,
    hello: Option<Listener>,
    network: Option<Attachment>,
    record: Record,
    ledger: Ledger,
    claim: Claim,
    source: Source,
    config: RestoreConfig,
    engine: Engine,
    begun: Instant,
}

async fn assemble(
    engine: &Engine,
    claim: Claim,
    source: Source,
    config: RestoreConfig,
) -> Result<Vm, RestoreError> {
    prepare_in(engine, claim, source, config)?.start().await
}

fn prepare_in(
    engine: &Engine,
    claim: Claim,
    source: Source,
    config: RestoreConfig,
) -> Result<Prepared, RestoreError> {
    let begun = Instant::now();
    let origin = Origin::Restore {
        snapshot: source.tip().id(),
        backend: config.backend,
        from: source.packed.as_ref().map(|packed| {
            let id = source.tip().id();
            format!("{}/{id}", packed.place)
        }),
    };
    let machine =
        portable::machine(engine.root(), source.tip(), &config).map_err(NetError::from)?;
    let mut record = new_record(&config.name, origin, machine);
    record.boot = source.tip().manifest().boot.clone();
    record.purpose = config.purpose;
    record.host_io = config.host_io;
    record.agent = portable::agent(source.tip().manifest());
    if let (Some(wake), Some(_)) = (&config.wake, &record.agent) {
        record.waking = Some(Waking::due(wake));
    }
    record.ends_at = config
        .ttl
        .and_then(|ttl| Timestamp::now().checked_add(ttl).ok());
    record.write(claim.dir())?;
    if config.isolation == Isolation::Jailed {
        let jail = Jail::make(claim.dir(), &engine.programs().firecracker, &record.id)?;
        record.jailed_as = Some(jail.uid());
    }
    let network = attachment(engine, claim.dir(), &record)?;
    let console = Console::open(claim.dir()).map_err(StartError::from)?;
    let ledger = Ledger::new(claim.dir(), &record);
    let hello = super::listen(claim.dir(), &record, &ledger)?;
    let mut prepared = Prepared {
        network,
        starting: None,
        drives: None,
        console,
        hello,
        ledger,
        record,
        claim,
        source,
        config,
        engine: engine.clone(),
        begun,
    };
    prepared.starting = Some(prepared.begin()?);
    prepared.drives = Some(Drives::prepare(
        prepared.claim.dir(),
        portable::drives(engine.root(), prepared.source.tip()).into_iter(),
    ));
    Ok(prepared)
}

impl Prepared {
    /// Starts Firecracker, loads the snapshot, and lets the guest run unless it was to stay paused.
    ///
    /// Where the page server dies before it has the VM nothing has run yet, and all is started anew, a few times.
    pub async fn start(mut self) -> Result<Vm, RestoreError> {
        let mut attempt = 1;
        let crew = loop {
            let exit = match self.attempt().await {
                Ok(crew) => break crew,
                Err(Failure::NeverServed { exit }) => exit,
                Err(Failure::Final(error)) => return Err(*error),
            };
            if attempt == ATTEMPTS {
                return Err(self.died(Lost::NeverServed { exit }).await);
            }
            attempt += 1;
            note(
                self.claim.dir(),
                &format!("the page server ended before it had the VM ({exit}); starting anew"),
            );
            self.starting = Some(self.begin()?);
        };
        self.record.started = Some(Timestamp::now());
        self.record.timings.total_us = Some(micros(self.begun));
        self.ledger.write(&mut self.record)?;
        if self.record.agent == Some(GuestAgent::Awaited) && self.record.state == State::Running {
            // Its call may have been cut off by the snapshot.
            let late = Listener::start_late(self.claim.dir(), &self.ledger);
            self.hello = Some(late.map_err(StartError::Hello)?);
        }
        let mut vm = Vm::assembled(Parts {
            engine: self.engine,
            claim: self.claim,
            record: self.record,
            ledger: self.ledger,
            crew,
            network: self.network,
            console: self.console,
            hello: self.hello,
            leases: self.source.leases,
        });
        vm.environment = self.config.wake.unwrap_or_default().env;
        vm.wake_if_due().await?;
        Ok(vm)
    }

    /// Starts the page server, if there is to be one.
    fn begin(&self) -> Result<Starting, RestoreError> {
        let dir = self.claim.dir();
        if self.config.backend == Backend::File {
            return Ok(Starting::new(dir, None));
        }
        let means = Means {
            program: self.engine.programs().rekindle.clone(),
            dir: dir.clone(),
            vm_id: self.record.id.clone(),
            ledger: self.ledger.clone(),
        };
        let tip = self.source.tip();
        let working_set = &*self.source.working_set;
        let hints = Hints {
            replay: (self.config.replay == Replay::On).then_some(working_set),
            record: (self.config.record == Recording::On).then_some(working_set),
        };
        let memory = match &self.source.packed {
            Some(packed) => Memory::Packed(packed),
            None => Memory::Snapshot(tip.dir()),
        };
        let pager = PagerProcess::start(&means.program, dir, &means.vm_id, memory, hints)?;
        self.ledger.note_pager(Some(pager.id().clone()));
        Ok(Starting::new(dir, Some((pager, means))))
    }

    async fn attempt(&mut self) -> Result<Crew, Failure> {
        let mut starting = self.starting.take().expect("it was begun");
        let record = &mut self.record;
        let spawned = Instant::now();
        let place = match (&self.network, &self.config.network) {
            (Some(network), _) => Place::Attached(network),
            (None, Network::CutOff) if !record.machine.nics.is_empty() => {
                let nics = record.machine.nics.iter();
                Place::CutOff(nics.map(|nic| nic.tap.as_str()).collect())
            }
            (None, _) => Place::without_network(record),
        };
        let launched = starting.launch(&self.engine, record, &place);
        let start = async {
            record.firecracker = Some(launched?);
            self.ledger.write(record)?;
            match starting.ready().await {
                Ok(crew) => Ok(crew),
                Err(failure) => Err(with_last_words(failure, &mut self.console).await.into()),
            }
        };
        let mut crew = match start.await {
            Ok(crew) => crew,
            Err(failure) => {
                let reason = match self.drives.take() {
                    Some(drives) => drives.failed().await,
                    None => None,
                };
                return Err(reason.map_or(failure, Failure::from));
            }
        };
        if let Some(drives) = self.drives.take() {
            drives.ready().await?;
            if self.source.packed.is_some() {
                // They were fetched for this VM, which has its own now. What cannot be removed goes with it.
                let _ = std::fs::remove_dir_all(self.source.tip().dir().join(DISKS));
            }
        }
        let memory = memory_file(self.claim.dir(), &self.source, self.config.backend).await?;
        let (source, config, network) = (&self.source, &self.config, self.network.as_ref());
        let state = jail::seen(self.claim.dir(), &source.tip().vmstate_path(), VMSTATE)?;
        let loaded = crew
            .guard(async |client| {
                record.firecracker_version = Some(client.describe().await?.vmm_version);
                record.timings.api_us = Some(micros(spawned));
                load(client, source, config, (&state, &memory), record, network).await?;
                record.timings.spawn_to_guest_us = Some(micros(spawned));
                Ok::<(), RestoreError>(())
            })
            .await;
        match loaded {
            Ok(Ok(())) => Ok(crew),
            Ok(Err(error)) => Err(error.into()),
            Err(Lost::NeverServed { exit }) => Err(Failure::NeverServed { exit }),
            Err(lost) => Err(self.died(lost).await.into()),
        }
    }

    async fn died(&mut self, lost: Lost) -> RestoreError {
        self.console.finish().await;
        match lost {
            Lost::Firecracker { exit, .. } => RestoreError::Died {
                who: "firecracker",
                exit,
                log: self.console.last_log_lines(super::LOG_LINES),
            },
            Lost::Pager { exit } | Lost::NeverServed { exit } => RestoreError::Died {
                who: "the page server",
                exit,
                log: Vec::new(),
            },
        }
    }
}

/// Why an attempt came to nothing.
enum Failure {
    /// The page server died before it had the VM.
    NeverServed { exit: String },
    /// Another attempt would fare no better.
    Final(Box<RestoreError>),
}

impl<E: Into<RestoreError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Final(Box::new(error.into()))
    }
}

/// The file that Firecracker maps: the snapshot's own, or a Diff chain merged into the VM's directory.
async fn memory_file(
    dir: &VmDir,
    source: &Source,
    backend: Backend,
) -> Result<MemoryBackend, RestoreError> {
    if backend == Backend::Uffd {
        return Ok(MemoryBackend::uffd(PAGER_SOCKET));
    }
    if source.layers.len() == 1 {
        let memory = jail::seen(dir, &source.tip().memory_path(), MERGED_MEMORY)?;
        return Ok(MemoryBackend::file(memory));
    }
    let layers = source.layers.clone();
    let merged = dir.file(MERGED_MEMORY);
    let target = merged.clone();
    tokio::task::spawn_blocking(move || flatten_to(&layers, &target))
        .await
        .map_err(|e| BootError::Task(std::io::Error::other(e)))?
        .map_err(|e| RestoreError::Merge {
            snapshot: source.tip().id().to_string(),
            source: e,
        })?;
    Ok(MemoryBackend::file(jail::seen(
        dir,
        &merged,
        MERGED_MEMORY,
    )?))
}

async fn load(
    client: &Client,
    source: &Source,
    config: &RestoreConfig,
    (state, memory): (&Path, &MemoryBackend),
    record: &mut Record,
    network: Option<&Attachment>,
) -> Result<(), RestoreError> {
    if let (Mismatch::Refuse, Some(ours)) = (config.mismatch, &record.firecracker_version) {
        let theirs = source.tip().manifest().firecracker.version.as_str();
        compat::check_format(theirs, ours).map_err(|e| incompatible(source.tip().manifest(), e))?;
    }
    let begun = Instant::now();
    let mut body = SnapshotLoadParams::new(state, memory.clone()).resume_vm(false);
    if config.dirty_pages == DirtyPages::Tracked {
        body = body.track_dirty_pages(true);
    }
    if !config.taps.is_empty() {
        let taps = config
            .taps
            .iter()
            .map(|t| NetworkOverride::new(&t.iface_id, &t.tap));
        body = body.network_overrides(taps.collect::<Vec<_>>());
    }
    if config.clock == Clock::SetToHost {
        body = body.clock_realtime(true);
    }
    client.load_snapshot(&body).await?;
    record.timings.load_us = Some(micros(begun));
    record.state = State::Paused;
    if let Some(metadata) = &config.metadata {
        client.put_mmds(metadata.contents()).await?;
    }
    if let Some(network) = network {
        network.connected()?;
    }
    if config.then == Then::Run {
        let begun = Instant::now();
        client.resume().await?;
        record.timings.start_us = Some(micros(begun));
        record.state = State::Running;
    }
    if config.dirty_pages == DirtyPages::Tracked {
        record.diff_base = Some(source.tip().id());
    }
    Ok(())
}
