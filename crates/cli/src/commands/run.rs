//! `rekindle run`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use rekindle_engine::Engine;
use rekindle_engine::agent::{AgentError, Exit};
use rekindle_engine::net::policy::Policy;
use rekindle_engine::store::{Root, VmName};
use rekindle_engine::vm::boot::check;
use rekindle_engine::vm::config::{BootConfig, Drive, Limits, NetRate, Nic};
use rekindle_engine::vm::dir::{SERIAL, VmDir};
use rekindle_engine::vm::follow::Follower;
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::state::State;
use rekindle_firecracker::tail;
use rekindle_image::Program;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::{Context, JailArgs, block_on, fresh_name, parse_duration, rm};
use crate::attach::{Passing, Streams, exit_code, leave_alone};
use crate::disks::{self, DiskArgument};
use crate::guest::{First, Guest};
use crate::monitor::job::{Job, Task};
use crate::monitor::start::{self, Starting};
use crate::network::{self, NetworkArgs, kernel_arguments, parse_rate, resolvers};
use crate::output;
use crate::program::{Wanted, exec_in};
use crate::serial::follow;

/// How long a guest may take to go down after its program has ended.
const GOING_DOWN: Duration = Duration::from_secs(60);

/// How much of the console is told when a guest ended too soon.
const CONSOLE_LINES: usize = 12;
const CONSOLE_BYTES: u64 = 4 << 10;

/// Boots a microVM, and runs a program in it or shows its serial console until it ends
///
/// Without --kernel it boots the kernel and the base image that `rekindle setup` made. With CMD, or an image that says what
/// to run in it, nothing else runs in it, and it ends with that program, whose exit status is the exit status; 125 is a
/// failure of rekindle's own. Otherwise the image's init runs, a shell on the console in the base image: `rekindle console`
/// types into it. A VM without --name and without --detach is removed when it has ended.
#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// The VM's name; it is kept when it has ended
    #[arg(long)]
    name: Option<VmName>,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    mem: u32,
    /// An uncompressed ELF kernel (vmlinux), or another ELF guest
    #[arg(long, value_name = "F")]
    kernel: Option<PathBuf>,
    /// An initial RAM disk
    #[arg(long, value_name = "F")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "S")]
    boot_args: Option<String>,
    /// The root image: a name that `rekindle setup` made, or a path
    ///
    /// All VMs read the one file, and each writes to a layer of its own. With --kernel or --initrd, which know nothing
    /// of layers, the VM gets a copy of it.
    #[arg(long, value_name = "I")]
    image: Option<String>,
    /// How much the guest can write beside its image; on the host only what it writes takes room [default: 8G]
    #[arg(long, value_name = "SIZE", value_parser = disks::parse_layer_size)]
    disk_size: Option<u64>,
    /// Another disk; the VM gets a copy of it, or with :ro reads the file itself
    ///
    /// It can be limited to so many bytes (10M, 500K) and so many operations a second, read and written together.
    #[arg(long, value_name = "F[:ro][,bw=N][,iops=N]")]
    disk: Vec<DiskArgument>,
    /// Limit the root disk, image and layer each, to so many bytes and operations a second
    #[arg(long, value_name = "bw=N,iops=N", value_parser = disks::parse_limits)]
    root_limit: Option<Limits>,
    /// A network interface on this TAP device, which must exist; with a MAC address if given
    #[arg(long, value_name = "NAME[,MAC]")]
    tap: Vec<String>,
    /// The guest's network: none, or one of its own with a way out
    #[arg(long, value_enum, default_value_t = Net::None, conflicts_with = "tap")]
    net: Net,
    /// With --net nat: this many network interfaces
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    interfaces: u8,
    /// With --net nat: what the guest may receive, and send, in megabits a second
    #[arg(long, value_name = "DOWN[:UP]", value_parser = parse_rate)]
    net_rate: Option<NetRate>,
    #[command(flatten)]
    network: NetworkArgs,
    /// Let the guest ask for what this JSON object says, at 169.254.169.254 (MMDS, version 2: with a token)
    ///
    /// Firecracker answers by itself; nothing of it leaves the VM. The guest needs a route there: ip route add
    /// 169.254.169.254 dev eth0. It is in no snapshot; a copy is given its own with rekindle restore --mmds.
    #[arg(long, value_name = "FILE")]
    mmds: Option<PathBuf>,
    /// A vsock device with this guest CID; its socket is v.sock in the VM's directory
    #[arg(long, value_name = "CID")]
    vsock: Option<u32>,
    /// A balloon that holds this much of the memory at the start; `rekindle api` changes it later
    #[arg(long, value_name = "MIB")]
    balloon: Option<u32>,
    /// Back the memory with pages of 2 MiB, which the host must have
    #[arg(long)]
    huge_pages: bool,
    #[command(flatten)]
    jail: JailArgs,
    /// Track dirty pages, which diff snapshots need
    #[arg(long)]
    track_dirty_pages: bool,
    /// End the VM after this long (30s, 5m, 2h)
    #[arg(long, value_name = "T", value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// Print the VM's name and leave it running; what CMD writes goes to its console (`rekindle logs`)
    #[arg(long, short)]
    detach: bool,
    /// With --detach: print the VM's record as JSON
    #[arg(long, requires = "detach")]
    json: bool,
    #[command(flatten)]
    streams: Streams,
    #[command(flatten)]
    wanted: Wanted,
}

impl Run {
    pub(crate) fn run(self, context: &Context) -> Result<ExitCode> {
        let engine = context.engine()?;
        let name = match &self.name {
            Some(name) => name.clone(),
            None => fresh_name("vm").parse()?,
        };
        let guest = Guest::choose(
            engine.root(),
            self.kernel.as_deref(),
            self.initrd.as_deref(),
            self.image.as_deref(),
        )?;
        let program = self.wanted.with(&guest.config);
        let config = self.config(engine.root(), name.clone(), &guest, program.is_some())?;
        check(&config)?;
        let job = Job::new(engine.programs().firecracker.clone(), Task::Boot(config));
        if self.detach {
            let record = start::start(&engine, &name, &job)?;
            leave_running(&engine, &name, program)?;
            match self.json {
                true => output::json(&record)?,
                false => output::line(name.as_str())?,
            }
            return Ok(ExitCode::SUCCESS);
        }
        let ended = block_on(async {
            // Listened for before there is a VM: whenever it comes, none is left.
            let mut asked = AskedToEnd::listen()?;
            let starting = start::begin(&engine, &name, &job)?;
            Ok(tokio::select! {
                ended = self.attend(&engine, &name, starting, program) => ended,
                () = asked.asked() => Ok(Ended::Interrupted),
            })
        })?;
        let interrupted = matches!(ended, Ok(Ended::Interrupted));
        if (self.name.is_none() || interrupted)
            && let Ok(dir) = VmDir::open(engine.root(), &name)
        {
            // Whatever the guest did, nothing of an unnamed VM stays.
            rm::remove(&engine, &name, &dir, true)?;
        }
        match ended? {
            Ended::Interrupted => Ok(ExitCode::from(130)),
            Ended::Program(exit) => Ok(exit_code(exit)),
            Ended::Guest => Ok(ExitCode::SUCCESS),
        }
    }

    /// Waits until the VM is up, then stays with the program or the console until the end.
    async fn attend(
        &self,
        engine: &Engine,
        name: &VmName,
        starting: Starting,
        program: Option<Program>,
    ) -> Result<Ended> {
        up(starting).await?;
        let dir = VmDir::open(engine.root(), name)?;
        let Some(program) = program else {
            return show(engine, name, &dir).await;
        };
        let exec = exec_in(&dir, program).ends_guest();
        let exit = match self.streams.run(exec, Passing::Nothing).await {
            Ok(exit) => exit,
            Err(e) => return Err(with_console(e, &dir)),
        };
        if self.name.is_some() {
            // It stays, and is to be whole.
            let follower = Follower::from_start(&dir.file(SERIAL));
            let mut ignore = |_: &[u8]| -> Result<()> { Ok(()) };
            let ended = follow(engine, name, &dir, follower, &mut ignore);
            let ended = tokio::time::timeout(GOING_DOWN, ended).await;
            ended.with_context(|| {
                format!("{name} does not go down; end it with: rekindle stop {name}")
            })??;
        }
        Ok(Ended::Program(exit))
    }

    fn config(
        &self,
        root: &Root,
        name: VmName,
        guest: &Guest,
        has_program: bool,
    ) -> Result<BootConfig> {
        let mut config = BootConfig::new(name.clone(), guest.kernel.clone())
            .vcpus(self.vcpus)
            .memory_mib(self.mem);
        match self.net {
            Net::None => self.network.none()?,
            Net::Nat => {
                config = config.network(self.network.nat(Policy::default()), self.interfaces)
            }
        }
        if let Some(rate) = self.net_rate {
            config = config.net_rate(rate);
        }
        if has_program && !guest.is_ours() {
            bail!(
                "-- CMD needs the initrd that `rekindle setup` made: leave out --kernel and --initrd"
            );
        }
        if let Some(initrd) = &guest.initrd {
            config = config.initrd(initrd);
        }
        let first = match has_program {
            true => First::Agent,
            false => First::OfTheImage,
        };
        let mut args = guest.boot_args(self.boot_args.as_deref(), first, &name);
        for drive in self.drives(root, guest, &mut args)? {
            config = config.drive(drive);
        }
        if let Some(mut args) = args {
            if self.net == Net::Nat && guest.is_ours() {
                args.push_str(&kernel_arguments(self.interfaces, &resolvers()));
            }
            config = config.boot_args(args);
        }
        for (n, tap) in self.tap.iter().enumerate() {
            let (tap, mac) = match tap.split_once(',') {
                Some((tap, mac)) => (tap, Some(mac.to_owned())),
                None => (tap.as_str(), None),
            };
            config = config.nic(Nic {
                id: format!("eth{n}"),
                tap: tap.to_owned(),
                mac,
            });
        }
        if let Some(file) = &self.mmds {
            config = config.metadata(network::metadata(file)?);
        }
        if let Some(cid) = self.vsock {
            config = config.vsock(cid);
        }
        if guest.is_ours() {
            config = config.with_agent();
        }
        if let Some(mib) = self.balloon {
            config = config.balloon(mib);
        }
        if self.huge_pages {
            config = config.huge_pages();
        }
        config = config
            .isolation(self.jail.isolation())
            .host_io(self.jail.host_io());
        if self.track_dirty_pages {
            config = config.track_dirty_pages();
        }
        if let Some(ttl) = self.ttl {
            config = config.ttl(ttl);
        }
        Ok(config)
    }

    /// The drives in the order of their names in the guest; which one is the layer is said in `args`.
    fn drives(&self, root: &Root, guest: &Guest, args: &mut Option<String>) -> Result<Vec<Drive>> {
        let limits = self.root_limit.unwrap_or_default();
        let mut drives = Vec::new();
        if let Some(image) = &guest.image {
            let image = Drive::root(image).limits(limits);
            drives.push(match guest.is_ours() {
                true => image.read_only(),
                false => image,
            });
        } else if self.root_limit.is_some() {
            bail!("--root-limit: there is no root disk; give an --image");
        }
        for (n, disk) in self.disk.iter().enumerate() {
            drives.push(disk.drive(n)?);
        }
        if let (true, Some(image)) = (guest.is_ours(), &guest.image) {
            disks::check_image(image)?;
            let mib = self.disk_size.unwrap_or(disks::LAYER_MIB);
            let (layer, argument) = disks::layer(root, mib, drives.len())?;
            drives.push(layer.limits(limits));
            let args = args.get_or_insert_default();
            args.push(' ');
            args.push_str(&argument);
        } else if self.disk_size.is_some() {
            bail!(
                "--disk-size needs the initrd that `rekindle setup` made: leave out --kernel and --initrd"
            );
        }
        Ok(drives)
    }
}

/// What a guest's network interfaces are connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Net {
    /// Nothing, but for what --tap says
    None,
    /// The host, and by way of it the world; takes root
    Nat,
}

/// How a run came to its end.
enum Ended {
    /// Its program ended.
    Program(Exit),
    /// The guest ended, which had none.
    Guest,
    /// Ctrl-C, or a polite kill.
    Interrupted,
}

/// Ctrl-C, and a polite kill.
struct AskedToEnd {
    interrupt: Signal,
    terminate: Signal,
}

impl AskedToEnd {
    fn listen() -> Result<AskedToEnd> {
        Ok(AskedToEnd {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Completes at once if it was asked before.
    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Starts the program, and leaves it to itself. Without it there is to be no VM.
fn leave_running(engine: &Engine, name: &VmName, program: Option<Program>) -> Result<()> {
    let Some(program) = program else {
        return Ok(());
    };
    let dir = VmDir::open(engine.root(), name)?;
    let started = block_on(leave_alone(exec_in(&dir, program).ends_guest()));
    if started.is_err() {
        rm::remove(engine, name, &dir, true)?;
    }
    started
}

/// Waits until the VM is up.
async fn up(starting: Starting) -> Result<Record> {
    let (sender, up) = oneshot::channel();
    // On a thread that is not waited for: it ends with the keeper, or with this process.
    std::thread::Builder::new().spawn(move || {
        let _ = sender.send(starting.wait());
    })?;
    up.await.context("the wait for the start was lost")?
}

/// Shows the serial console until the VM ends.
async fn show(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<Ended> {
    let mut show = |bytes: &[u8]| -> Result<()> {
        let mut out = io::stdout();
        out.write_all(bytes)?;
        out.flush()?;
        Ok(())
    };
    let follower = Follower::from_start(&dir.file(SERIAL));
    match follow(engine, name, dir, follower, &mut show).await? {
        None => bail!("the VM was removed by somebody else"),
        Some(Record {
            state: State::Failed(why),
            ..
        }) => bail!("the VM failed: {why}"),
        Some(_) => Ok(Ended::Guest),
    }
}

/// An error, and what the guest said last: it may be why.
fn with_console(error: anyhow::Error, dir: &VmDir) -> anyhow::Error {
    let said = tail(&dir.file(SERIAL), CONSOLE_BYTES).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    match error.downcast_ref() {
        Some(AgentError::Ended { .. }) if !lines.is_empty() => {
            let last = &lines[lines.len().saturating_sub(CONSOLE_LINES)..];
            anyhow!("{error:#}; its console ends:\n  {}", last.join("\n  "))
        }
        _ => error,
    }
}
