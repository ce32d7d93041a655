//! Booting: a fresh machine from a kernel.

use std::io;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rekindle_firecracker::model::{
    Balloon as BalloonBody, BootSource, Drive as DriveBody, HugePages, MachineConfiguration,
    MmdsConfig, MmdsVersion, NetworkInterface, RateLimiter, TokenBucket, Vsock as VsockBody,
};
use rekindle_firecracker::{CallError, Client};
use rekindle_store::manifest::BootInfo;
use tokio::sync::oneshot;

use super::claim::Claim;
use super::config::{
    Access, Agent, BootConfig, ConfigError, DirtyPages, Limits, Machine, Mmds, Pages, Role,
};
use super::console::Console;
use super::crew::{Lost, Starting};
use super::dir::{DirError, VSOCK_SOCKET, VmDir, disk_path};
use super::launch::{StartError, with_last_words};
use super::rebuild::{self, BootedError};
use super::record::{
    GuestAgent, Ledger, Origin, Purpose, RECORD_VERSION, Record, RecordError, Timings,
};
use super::state::State;
use super::{Parts, Vm, micros};
use crate::drives::{self, DriveError, DriveSource};
use crate::host::{self, HostError};
use crate::jail::{self, Isolation, Jail, JailError};
use crate::net::{self, Attachment, Place};
use crate::{Engine, NetError, TapError};

/// How often a balloon asks the guest how much memory it has left, in seconds. It cannot be switched on later.
const BALLOON_STATS_S: u16 = 5;

/// The time in which a network interface may use up its rate, in milliseconds.
const RATE_PERIOD_MS: u64 = 1000;

/// How long a start that has failed waits for what its drives have to say about it.
const REASON_PATIENCE: Duration = Duration::from_millis(100);

/// What is booted, as a jailed Firecracker finds it.
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";

/// Why a VM did not boot. Everything that was made for it is gone again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// This host cannot run it.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A TAP device cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Its network cannot be made.
    #[error(transparent)]
    Net(#[from] NetError),
    /// It cannot be jailed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Its directory could not be made.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// Its record could not be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A drive could not be prepared.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// Firecracker did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Firecracker refused the configuration.
    #[error("firecracker refused the VM")]
    Call(#[from] CallError),
    /// Firecracker ended while it was configured.
    #[error("firecracker ended while it started the VM ({exit}){}", log_tail(.log))]
    Died {
        /// How it ended.
        exit: String,
        /// The last lines of its log.
        log: Vec<String>,
    },
    /// The kernel or the initrd cannot be read, or is called what no manifest can hold.
    #[error(transparent)]
    Booted(#[from] BootedError),
    /// A helper thread was lost.
    #[error("a task that prepares the start was lost")]
    Task(#[source] io::Error),
}

/// Boots a VM under a name that is free.
pub(crate) async fn boot(engine: &Engine, config: BootConfig) -> Result<Vm, BootError> {
    check(&config)?;
    jail::check(engine, config.isolation, &config.host_io)?;
    let claim = Claim::new(engine, &config.name)?;
    assemble(engine, claim, config).await
}

/// Boots a VM in a directory that this process holds.
pub async fn boot_in(engine: &Engine, claim: Claim, config: BootConfig) -> Result<Vm, BootError> {
    check(&config)?;
    jail::check(engine, config.isolation, &config.host_io)?;
    assemble(engine, claim, config).await
}

/// Everything that can be refused before anything is made.
pub fn check(config: &BootConfig) -> Result<(), BootError> {
    config.check(host::memory_mib())?;
    host::check(super::kernel::check(&config.kernel).map_err(ConfigError::from)?)?;
    if config.machine.pages == Pages::Huge {
        host::check_huge_pages(config.machine.memory_mib)?;
    }
    if let Some(nat) = &config.machine.nat {
        return Ok(net::check(nat, config.machine.nics.len())?);
    }
    for nic in &config.machine.nics {
        net::check_tap(&nic.tap, config.isolation)?;
    }
    Ok(())
}

async fn assemble(engine: &Engine, claim: Claim, mut config: BootConfig) -> Result<Vm, BootError> {
    let begun = Instant::now();
    let origin = Origin::Boot {
        kernel: config.kernel.clone(),
        initrd: config.initrd.clone(),
        boot_args: config.boot_args.clone(),
    };
    let mut record = new_record(&config.name, origin, config.machine.clone());
    record.ends_at = config
        .ttl
        .and_then(|ttl| Timestamp::now().checked_add(ttl).ok());
    record.host_io = config.host_io;
    if config.agent == Agent::Expected {
        record.agent = Some(GuestAgent::Awaited);
    }
    record.write(claim.dir())?;

    let (kernel, initrd) = (config.kernel.clone(), config.initrd.clone());
    if config.isolation == Isolation::Jailed {
        record.jailed_as = Some(lock_up(engine, claim.dir(), &record, &mut config)?);
    }
    let ledger = Ledger::new(claim.dir(), &record);
    let hello = super::listen(claim.dir(), &record, &ledger)?;
    let network = attachment(engine, claim.dir(), &record)?;
    let mut console = Console::open(claim.dir()).map_err(StartError::from)?;
    let drives = Drives::prepare(
        claim.dir(),
        config.machine.drives.iter().map(DriveSource::from),
    );
    let mut starting = Starting::new(claim.dir(), None);
    let spawned = Instant::now();
    let place = match &network {
        Some(network) => Place::Attached(network),
        None => Place::without_network(&record),
    };
    let booted = booted(kernel, initrd, config.boot_args.clone());
    let start = async {
        record.firecracker = Some(starting.launch(engine, &record, &place)?);
        ledger.write(&mut record)?;
        match starting.ready().await {
            Ok(crew) => Ok(crew),
            Err(failure) => Err(with_last_words(failure, &mut console).await.into()),
        }
    };
    let mut crew = match start.await {
        Ok(crew) => crew,
        Err(failure) => return Err(drives.failed().await.unwrap_or(failure)),
    };
    drives.ready().await?;
    record.boot = booted.await?;
    if let Some(network) = &network {
        network.connected()?;
    }

    let configured = Instant::now();
    let done = crew
        .guard(async |client| {
            record.firecracker_version = Some(client.describe().await?.vmm_version);
            record.timings.api_us = Some(micros(spawned));
            configure(client, &config).await?;
            record.timings.configure_us = Some(micros(configured));
            let started = Instant::now();
            client.start().await?;
            record.timings.start_us = Some(micros(started));
            record.timings.spawn_to_guest_us = Some(micros(spawned));
            Ok(())
        })
        .await;
    match done {
        Ok(answer) => answer.map_err(BootError::Call)?,
        Err(lost) => return Err(died(lost, &mut console).await),
    }
    record.state = State::Running;
    record.started = Some(Timestamp::now());
    record.timings.total_us = Some(micros(begun));
    ledger.write(&mut record)?;
    Ok(Vm::assembled(Parts {
        engine: engine.clone(),
        claim,
        record,
        ledger,
        crew,
        network,
        console,
        hello,
        leases: Vec::new(),
    }))
}

/// Makes the jail, with what is booted in it, and tells whose it is; the configuration has the paths inside then.
fn lock_up(
    engine: &Engine,
    dir: &VmDir,
    record: &Record,
    config: &mut BootConfig,
) -> Result<u32, JailError> {
    let jail = Jail::make(dir, &engine.programs().firecracker, &record.id)?;
    jail.show(&config.kernel, KERNEL)?;
    config.kernel = KERNEL.into();
    if let Some(initrd) = &mut config.initrd {
        jail.show(initrd, INITRD)?;
        *initrd = INITRD.into();
    }
    Ok(jail.uid())
}

/// The connection of a VM's own network with the host, announced, if it has such a network.
pub(crate) fn attachment(
    engine: &Engine,
    dir: &VmDir,
    record: &Record,
) -> Result<Option<Attachment>, NetError> {
    let Some(nat) = record.machine.nat.clone() else {
        return Ok(None);
    };
    let taps = u8::try_from(record.machine.nics.len()).unwrap_or(u8::MAX);
    Attachment::announce(dir, engine.root().installation(), &record.id, nat, taps).map(Some)
}

pub(crate) fn new_record(
    name: &rekindle_store::VmName,
    origin: Origin,
    machine: Machine,
) -> Record {
    Record {
        version: RECORD_VERSION,
        name: name.clone(),
        id: super::record::fresh_id(),
        state: State::Configured,
        created: Timestamp::now(),
        started: None,
        ended: None,
        ends_at: None,
        origin,
        boot: BootInfo::default(),
        jailed_as: None,
        host_io: Limits::default(),
        purpose: Purpose::Lasting,
        machine,
        firecracker: None,
        firecracker_version: None,
        pager: None,
        diff_base: None,
        agent: None,
        waking: None,
        capturing: None,
        timings: Timings::default(),
    }
}

/// Drives that are being copied and linked, on a thread of its own, while other things go on. Dropped, it gives that up
/// and waits until the thread has ended: the directory that it works in may be removed next.
#[derive(Debug)]
pub(crate) struct Drives(Option<Copying>);

#[derive(Debug)]
struct Copying {
    given_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    outcome: oneshot::Receiver<Result<(), DriveError>>,
}

impl Drives {
    pub(crate) fn prepare(dir: &VmDir, sources: impl Iterator<Item = DriveSource>) -> Drives {
        let sources: Vec<DriveSource> = sources.collect();
        if sources.is_empty() {
            return Drives(None);
        }
        let dir = dir.clone();
        let given_up = Arc::new(AtomicBool::new(false));
        let is_given_up = Arc::clone(&given_up);
        let (sender, outcome) = oneshot::channel();
        let prepare = move || {
            // Nobody receives when it was given up.
            let _ = sender.send(drives::prepare(&dir, &sources, &is_given_up));
        };
        // If there can be no thread, there is no outcome, and `ready` says so.
        let thread = thread::Builder::new().name("drives".into()).spawn(prepare);
        Drives(Some(Copying {
            given_up,
            thread: thread.ok(),
            outcome,
        }))
    }

    /// Waits until they are in place.
    pub(crate) async fn ready(mut self) -> Result<(), BootError> {
        let Some(copying) = &mut self.0 else {
            return Ok(());
        };
        let outcome = (&mut copying.outcome).await;
        outcome.map_err(|e| BootError::Task(io::Error::other(e)))??;
        Ok(())
    }

    /// Why they cannot be prepared, if that is known or will be in a moment: a Firecracker that does not start on a disk
    /// that they have filled tells anything but that.
    pub(crate) async fn failed(mut self) -> Option<BootError> {
        let copying = self.0.as_mut()?;
        let outcome = tokio::time::timeout(REASON_PATIENCE, &mut copying.outcome).await;
        Some(outcome.ok()?.ok()?.err()?.into())
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn configure(client: &Client, config: &BootConfig) -> Result<(), CallError> {
    let machine = &config.machine;
    let mut body = MachineConfiguration::new(machine.vcpus, machine.memory_mib);
    if machine.dirty_pages == DirtyPages::Tracked {
        body = body.track_dirty_pages(true);
    }
    if machine.pages == Pages::Huge {
        body = body.huge_pages(HugePages::Hugetlbfs2M);
    }
    client.put_machine_config(&body).await?;
    let mut boot = BootSource::new(&config.kernel);
    if let Some(initrd) = &config.initrd {
        boot = boot.initrd_path(initrd);
    }
    if let Some(args) = &config.boot_args {
        boot = boot.boot_args(args);
    }
    client.put_boot_source(&boot).await?;
    for drive in &machine.drives {
        let body = DriveBody::new(&drive.id, disk_path(&drive.id))
            .is_root_device(drive.role == Role::Root)
            .is_read_only(drive.access == Access::ReadOnly);
        let body = match rate_limiter(drive.limits) {
            Some(limiter) => body.rate_limiter(limiter),
            None => body,
        };
        client.put_drive(&body).await?;
    }
    for nic in &machine.nics {
        let mut body = NetworkInterface::new(&nic.id, &nic.tap);
        if let Some(mac) = &nic.mac {
            body = body.guest_mac(mac);
        }
        if let Some(rate) = machine.net_rate {
            let limit = |bytes: NonZeroU64| {
                RateLimiter::default().bandwidth(TokenBucket::new(bytes.get(), RATE_PERIOD_MS))
            };
            body = body
                .rx_rate_limiter(limit(rate.down))
                .tx_rate_limiter(limit(rate.up));
        }
        client.put_network_interface(&body).await?;
    }
    if machine.mmds == Mmds::V2 {
        let nics = machine.nics.iter().map(|nic| &*nic.id);
        let body = MmdsConfig::new(nics).version(MmdsVersion::V2);
        client.put_mmds_config(&body).await?;
    }
    if let Some(metadata) = &config.metadata {
        client.put_mmds(metadata.contents()).await?;
    }
    if let Some(vsock) = machine.vsock {
        client
            .put_vsock(&VsockBody::new(vsock.guest_cid, VSOCK_SOCKET))
            .await?;
    }
    if let Some(mib) = machine.balloon.and_then(|balloon| balloon.amount_mib) {
        let body = BalloonBody::new(mib)
            .deflate_on_oom(true)
            .stats_polling_interval_s(BALLOON_STATS_S);
        client.put_balloon(&body).await?;
    }
    Ok(())
}

/// What it is booted from, read on a thread of its own. A boot that fails earlier does not wait for that.
fn booted(
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    args: Option<String>,
) -> impl Future<Output = Result<BootInfo, BootError>> + use<> {
    let read = tokio::task::spawn_blocking(move || {
        rebuild::booted(&kernel, initrd.as_deref(), args.as_deref())
    });
    async move {
        Ok(read
            .await
            .map_err(|e| BootError::Task(io::Error::other(e)))??)
    }
}

/// A second's worth is let through at once; less would round small limits to nothing.
fn rate_limiter(limits: Limits) -> Option<RateLimiter> {
    let bucket = |tokens| TokenBucket::new(tokens, 1000);
    let mut limiter = RateLimiter::default();
    if let Some(bytes) = limits.bytes_per_second {
        limiter = limiter.bandwidth(bucket(bytes));
    }
    if let Some(operations) = limits.operations_per_second {
        limiter = limiter.ops(bucket(operations));
    }
    (!limits.are_none()).then_some(limiter)
}

async fn died(lost: Lost, console: &mut Console) -> BootError {
    console.finish().await;
    let exit = match lost {
        Lost::Firecracker { exit, .. } | Lost::Pager { exit } | Lost::NeverServed { exit } => exit,
    };
    BootError::Died {
        exit,
        log: console.last_log_lines(super::LOG_LINES),
    }
}

/// The log's last lines, as the end of an error.
pub(crate) fn log_tail(log: &[String]) -> String {
    if log.is_empty() {
        String::new()
    } else {
        format!("; its log ends:\n  {}", log.join("\n  "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rekindle_store::Root;

    #[test]
    fn a_start_that_is_dropped_copies_no_more() {
        let place = tempfile::tempdir().unwrap();
        // Never shared between two file systems, so that it takes a while.
        let shm = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = place.path().join("disk");
        std::fs::write(&file, vec![1; 64 << 20]).unwrap();
        let root = Root::open(shm.path()).unwrap();
        let dir = VmDir::create(&root, &"v".parse().unwrap()).unwrap();
        let drives = Drives::prepare(
            &dir,
            (0..4).map(|n| DriveSource {
                id: format!("disk{n}"),
                file: file.clone(),
                access: Access::OwnCopy,
            }),
        );
        let held_by_the_thread = Arc::clone(&drives.0.as_ref().unwrap().given_up);
        drop(drives);
        assert_eq!(Arc::strong_count(&held_by_the_thread), 1);
        dir.remove(&dir.hold().unwrap()).unwrap();
        assert!(!dir.path().exists());
    }
}
