//! `rekindle restore`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rekindle_engine::Engine;
use rekindle_engine::remote::{Remote, RemoteConfig};
use rekindle_engine::store::{Manifest, Snapshot, VmName};
use rekindle_engine::vm::config::Backend;
use rekindle_engine::vm::dir::{DirError, VmDir};
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::restore::{
    Clock, Mismatch, RestoreConfig, RestoreError, TapOverride, check, check_remote, policy,
};
use rekindle_engine::vm::wake::{Address, Environment, WakeConfig, Waking};

use rekindle_pager::Prefetch;

use super::travel::{CacheSize, Waits};
use super::{Context, JailArgs, parse_duration};
use crate::monitor::job::{Job, Task};
use crate::monitor::start;
use crate::network::{self, NetworkArgs};
use crate::output;
use crate::program::parse_variable;

/// Starts copies of a snapshot; each runs at once, its memory comes in as the guest touches it
///
/// By the URL that `rekindle snapshot push` told, the snapshot stays where it is: its disks are fetched first, then the copy
/// runs, and its memory is fetched as it is wanted, the pages that earlier copies touched first. What was fetched stays in a
/// cache that all copies on this host share. Credentials: see `rekindle snapshot push --help`.
#[derive(Debug, clap::Args)]
pub(crate) struct Restore {
    /// The snapshot: its name or id, or the URL of one that was pushed
    snapshot: String,
    /// The copy's name; with --count 3, NAME-1 to NAME-3
    #[arg(long)]
    name: Option<String>,
    /// How many copies
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// How memory comes in
    #[arg(long, value_enum, default_value_t = BackendName::Uffd)]
    backend: BackendName,
    /// Load, and leave the guest paused
    #[arg(long)]
    paused: bool,
    /// Put a network interface on this TAP device, for one copy [ID=]TAP
    #[arg(long, value_name = "[ID=]TAP")]
    tap: Vec<String>,
    /// What the copies' network interfaces are connected to [default: what the snapshot's were]
    #[arg(long, value_enum)]
    net: Option<Net>,
    #[command(flatten)]
    network: NetworkArgs,
    /// Let the guests ask for what this JSON object says, if the original was run with --mmds
    #[arg(long, value_name = "FILE")]
    mmds: Option<PathBuf>,
    #[command(flatten)]
    jail: JailArgs,
    /// Set the guest's clock to the host's (Firecracker 1.16, 1.15.1, 1.14.4 and newer)
    #[arg(long)]
    set_clock: bool,
    /// Track dirty pages, which diff snapshots of the copy need
    #[arg(long)]
    track_dirty_pages: bool,
    /// Bring no page before the guest asks for it, though earlier copies told which it will
    #[arg(long)]
    no_replay: bool,
    /// Do not take down which pages the guest touches in its first ten seconds
    #[arg(long)]
    no_record: bool,
    /// Compare all contents with their checksums first
    #[arg(long)]
    verify: bool,
    /// Try a snapshot that was made on another kind of host
    #[arg(long)]
    force: bool,
    /// Add a variable to the environment of whatever is run in the copy; alone, K is taken from here
    ///
    /// It is in the agent's memory only: on no disk of this host, and not in the snapshot.
    #[arg(long, short, value_name = "K[=V]", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// The guest's hostname [default: the copy's name]
    #[arg(long, value_name = "H")]
    hostname: Option<String>,
    /// Give an interface of the guest another address
    #[arg(long, value_name = "IFACE=ADDR/BITS[,GATEWAY]", value_parser = parse_address)]
    address: Vec<Address>,
    /// How long the guest may take to wake up, hooks included (30s, 5m)
    #[arg(long, value_name = "T", default_value = "10s", value_parser = parse_duration)]
    wake_within: Duration,
    /// Fail where not everything about waking up went well; the copy runs all the same
    #[arg(long)]
    must_wake: bool,
    /// Tell the guest nothing: it takes itself for the original
    #[arg(long, conflicts_with_all = ["env", "hostname", "address", "must_wake"])]
    no_wake: bool,
    #[command(flatten)]
    patience: Waits,
    #[command(flatten)]
    cache: CacheSize,
    /// What of a snapshot that is somewhere else is fetched before the guest asks
    #[arg(long, value_enum, default_value_t = Ahead::WorkingSet)]
    prefetch: Ahead,
    /// End the copy after this long (30s, 5m, 2h)
    #[arg(long, value_name = "T", value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Net {
    /// Nothing: no packet gets out of the copy
    None,
    /// A network of the copy's own, as the snapshot's VM had one; takes root
    Nat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BackendName {
    /// Through userfaultfd, page by page
    Uffd,
    /// Firecracker maps the memory file
    File,
}

/// What is fetched before the guest asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Ahead {
    /// The pages that earlier copies touched first
    WorkingSet,
    /// After those all others, into the cache
    All,
}

impl From<Ahead> for Prefetch {
    fn from(ahead: Ahead) -> Prefetch {
        match ahead {
            Ahead::WorkingSet => Prefetch::WorkingSet,
            Ahead::All => Prefetch::All,
        }
    }
}

/// A snapshot that is to be restored: here, or where it was pushed to.
enum Wanted {
    Here(Box<Snapshot>),
    Elsewhere(Box<Remote>),
}

impl Wanted {
    fn manifest(&self) -> &Manifest {
        match self {
            Wanted::Here(snapshot) => snapshot.manifest(),
            Wanted::Elsewhere(remote) => remote.manifest(),
        }
    }

    fn check(&self, config: &RestoreConfig) -> Result<(), RestoreError> {
        match self {
            Wanted::Here(snapshot) => check(snapshot.manifest(), config),
            Wanted::Elsewhere(remote) => check_remote(remote, config),
        }
    }

    fn task(&self, config: RestoreConfig) -> Task {
        match self {
            Wanted::Here(snapshot) => Task::Restore {
                snapshot: snapshot.id().to_string(),
                config,
            },
            Wanted::Elsewhere(remote) => Task::RestoreRemote {
                remote: remote.config(),
                config,
            },
        }
    }
}

impl From<BackendName> for Backend {
    fn from(name: BackendName) -> Backend {
        match name {
            BackendName::Uffd => Backend::Uffd,
            BackendName::File => Backend::File,
        }
    }
}

impl Restore {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let engine = context.engine()?;
        let snapshot = self.find(&engine)?;
        let names = self.names()?;
        let records = self.start(&engine, &snapshot, &names)?;
        let mut problems = Vec::new();
        for record in &records {
            let waking = record.waking.iter().flat_map(Waking::problems);
            problems.extend(waking.map(|problem| format!("{}: {problem}", record.name)));
        }
        if self.must_wake && !problems.is_empty() {
            bail!("{}; the copies run all the same", problems.join("; "));
        }
        for problem in &problems {
            output::say(problem);
        }
        if self.json {
            output::json(&records)?;
        } else {
            for record in &records {
                let took = record
                    .timings
                    .total_us
                    .map_or_else(String::new, output::millis);
                output::line(format!("{}  {}  {took}", record.name, record.state))?;
            }
        }
        Ok(())
    }

    fn find(&self, engine: &Engine) -> Result<Wanted> {
        if !self.snapshot.contains("://") {
            if self.prefetch == Ahead::All {
                bail!(
                    "--prefetch all is for snapshots by URL; all of {} is here",
                    self.snapshot
                );
            }
            return Ok(Wanted::Here(Box::new(engine.snapshot(&self.snapshot)?)));
        }
        let mut config = RemoteConfig::new(&self.snapshot);
        config.patience = self.patience.patience;
        config.cache_mib = self.cache.mib;
        config.prefetch = self.prefetch.into();
        Ok(Wanted::Elsewhere(Box::new(Remote::find(
            engine.root(),
            config,
        )?)))
    }

    fn names(&self) -> Result<Vec<VmName>> {
        let base = match &self.name {
            Some(name) => name.clone(),
            None => {
                let url = self.snapshot.trim_end_matches('/');
                super::fresh_name(url.rsplit('/').next().unwrap_or(url))
            }
        };
        if self.count == 1 {
            return Ok(vec![
                base.parse().with_context(|| format!("the name {base:?}"))?,
            ]);
        }
        (1..=self.count)
            .map(|n| format!("{base}-{n}"))
            .map(|name| name.parse().with_context(|| format!("the name {name:?}")))
            .collect()
    }

    /// All are checked before the first is started; if one fails, the error says which ones run.
    fn start(&self, engine: &Engine, snapshot: &Wanted, names: &[VmName]) -> Result<Vec<Record>> {
        let manifest = snapshot.manifest();
        let configs: Vec<RestoreConfig> = names
            .iter()
            .map(|name| self.config(name.clone(), manifest))
            .collect::<Result<_>>()?;
        for config in &configs {
            snapshot.check(config)?;
            check_free(engine, &config.name)?;
        }
        let on_taps = self.net != Some(Net::None) && manifest.devices.egress.is_none();
        if names.len() > 1 && on_taps && !manifest.devices.interfaces.is_empty() {
            bail!(
                "{} has network interfaces, and a TAP device serves one VM: restore copies one by one, \
                 each with --tap",
                self.snapshot
            );
        }
        let mut starting = Vec::new();
        let mut failed = None;
        for config in configs {
            let name = config.name.clone();
            let job = Job::new(engine.programs().firecracker.clone(), snapshot.task(config));
            match start::begin(engine, &name, &job) {
                Ok(begun) => starting.push((name, begun)),
                Err(e) => {
                    failed = Some((name, e));
                    break;
                }
            }
        }
        let mut records: Vec<Record> = Vec::new();
        for (name, begun) in starting {
            match begun.up() {
                Ok(record) => records.push(record),
                Err(e) => failed = failed.or(Some((name, e))),
            }
        }
        match failed {
            None => Ok(records),
            Some((_, e)) if records.is_empty() => Err(e),
            Some((name, e)) => {
                let up: Vec<_> = records.iter().map(|record| record.name.as_str()).collect();
                Err(e.context(format!("{name} failed; {} run", up.join(", "))))
            }
        }
    }

    fn config(&self, name: VmName, manifest: &Manifest) -> Result<RestoreConfig> {
        let mut config = RestoreConfig::new(name).backend(self.backend.into());
        if self.paused {
            config = config.paused();
        }
        if self.track_dirty_pages {
            config = config.track_dirty_pages();
        }
        if self.no_replay {
            config = config.no_replay();
        }
        if self.no_record {
            config = config.no_record();
        }
        if self.verify {
            config = config.verify();
        }
        config.wake = (!self.no_wake).then(|| {
            let mut wake = WakeConfig::new();
            wake.within = self.wake_within;
            wake.hostname = self.hostname.clone();
            wake.addresses = self.address.clone();
            wake.env = Environment::new(self.env.clone());
            wake
        });
        for tap in &self.tap {
            config.taps.push(tap_override(tap, manifest)?);
        }
        config = match (self.net, policy(manifest)?) {
            (Some(Net::None), _) => {
                self.network.none()?;
                config.cut_off()
            }
            (None, None) => {
                self.network.none()?;
                config
            }
            (Some(Net::Nat) | None, before) => {
                config.network(self.network.nat(before.unwrap_or_default()))
            }
        };
        if let Some(file) = &self.mmds {
            config = config.metadata(network::metadata(file)?);
        }
        config = config
            .isolation(self.jail.isolation())
            .host_io(self.jail.host_io());
        config.ttl = self.ttl;
        if self.set_clock {
            config.clock = Clock::SetToHost;
        }
        if self.force {
            config.mismatch = Mismatch::TryAnyway;
        }
        Ok(config)
    }
}

/// The value of `--tap`: a TAP device, and which interface it is for unless there is but one.
pub(super) fn tap_override(text: &str, manifest: &Manifest) -> Result<TapOverride> {
    let (iface_id, tap) = match text.split_once('=') {
        Some((id, tap)) => (id, tap),
        None => match manifest.devices.interfaces.as_slice() {
            [only] => (only.id.as_str(), text),
            all => bail!(
                "--tap {text}: the snapshot has {} network interfaces, say which: --tap ID={text}",
                all.len()
            ),
        },
    };
    Ok(TapOverride {
        iface_id: iface_id.to_owned(),
        tap: tap.to_owned(),
    })
}

fn parse_address(text: &str) -> Result<Address, String> {
    let parse = || {
        let (interface, rest) = text.split_once('=')?;
        let (own, gateway) = match rest.split_once(',') {
            Some((own, gateway)) => (own, Some(gateway.parse::<IpAddr>().ok()?)),
            None => (rest, None),
        };
        let (address, prefix) = own.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let same_kind = gateway.is_none_or(|gateway| gateway.is_ipv4() == address.is_ipv4());
        (!interface.is_empty() && prefix <= most && same_kind).then(|| Address {
            interface: interface.to_owned(),
            address,
            prefix,
            gateway,
        })
    };
    parse().ok_or_else(|| format!("{text:?} is not like eth0=10.0.0.2/24,10.0.0.1"))
}

/// Refuses a name that is taken. Who takes it from now on is found out at the start.
fn check_free(engine: &Engine, name: &VmName) -> Result<()> {
    match VmDir::open(engine.root(), name) {
        Ok(dir) => Err(DirError::Taken {
            name: name.clone(),
            path: dir.path().to_owned(),
        }
        .into()),
        Err(DirError::Missing { .. }) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
