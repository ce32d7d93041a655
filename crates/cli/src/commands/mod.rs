//! The verbs, one file each. A verb parses, asks the engine or a monitor, prints; what it knows beyond that
//! belongs elsewhere.

mod api;
mod bench;
mod console;
mod cp;
mod doctor;
mod exec;
mod gc;
mod image;
mod inspect;
mod logs;
mod monitor;
mod pager;
mod pause;
mod ps;
mod rebuild;
mod restore;
mod resume;
mod rm;
mod run;
mod setup;
mod snapshot;
mod stop;
mod trace;
mod travel;
mod wait;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::builder::FalseyValueParser;
use clap::{Parser, Subcommand};
use rekindle_engine::Engine;
use rekindle_engine::programs::Programs;
use rekindle_engine::store::{Root, VmName};
use rekindle_engine::vm::config::{Isolation, Limits};
use rekindle_engine::vm::dir::VmDir;
use rustix::fs::Mode;

use crate::disks;
use crate::output;

/// Runs Firecracker microVMs from snapshots: boot once, snapshot, and start copies in milliseconds.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage. `run` and `exec` return the guest program's own status, and
/// 125 for their own failures.
#[derive(Debug, Parser)]
#[command(
    name = "rekindle",
    version,
    max_term_width = 79,
    disable_help_subcommand = true
)]
pub(crate) struct Cli {
    /// The state directory [default: /var/lib/rekindle as root, else $XDG_STATE_HOME/rekindle]
    #[arg(long, global = true, env = "REKINDLE_ROOT", value_name = "DIR")]
    root: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Doctor(doctor::Doctor),
    Setup(setup::Setup),
    Run(Box<run::Run>),
    Exec(exec::Exec),
    Cp(cp::Cp),
    Ps(ps::Ps),
    Inspect(inspect::Inspect),
    Logs(logs::Logs),
    Console(console::Console),
    Wait(wait::Wait),
    Trace(trace::Trace),
    Pause(pause::Pause),
    Resume(resume::Resume),
    Stop(stop::Stop),
    Rm(rm::Rm),
    Gc(gc::Gc),
    #[command(subcommand)]
    Snapshot(snapshot::Verb),
    Restore(restore::Restore),
    #[command(subcommand)]
    Image(image::Verb),
    Pager(pager::Pager),
    Api(api::Api),
    #[command(subcommand)]
    Bench(bench::Verb),
    #[command(hide = true)]
    Monitor(monitor::Monitor),
}

/// How a VM is kept from the host.
#[derive(Debug, clap::Args)]
pub(crate) struct JailArgs {
    /// Lock Firecracker in no jail, which root's VMs have otherwise
    ///
    /// In its jail it has a user, a root directory, a pid namespace and control groups of its own, and sees nothing of the host
    /// but its VM's files. Without, whoever breaks out of the guest and past Firecracker's system call filters is root on the
    /// host. Not for guests that you would not give a shell. VMs of other users than root have no jail.
    #[arg(long, env = "REKINDLE_NO_JAIL", value_parser = FalseyValueParser::new())]
    no_jail: bool,
    /// Limit what Firecracker reads from and writes to the disk that the VM is on, each; takes a jail
    ///
    /// So many bytes (10M, 500K) and so many operations a second, of all drives together, and of snapshots that it writes. A
    /// drive's own limit is kept by Firecracker; this one by the kernel, for whoever gets hold of it, too.
    #[arg(long, value_name = "bw=N,iops=N", value_parser = disks::parse_limits)]
    host_io: Option<Limits>,
}

impl JailArgs {
    fn host_io(&self) -> Limits {
        self.host_io.unwrap_or_default()
    }

    /// What is asked for, or what this user's VMs get otherwise.
    fn isolation(&self) -> Isolation {
        match self.no_jail {
            true => Isolation::None,
            false => Isolation::of_this_user(),
        }
    }
}

/// What every verb gets.
#[derive(Debug)]
pub(crate) struct Context {
    root: Option<PathBuf>,
}

impl Context {
    /// The state directory, made if it is not there.
    pub(crate) fn root(&self) -> Result<Root> {
        let path = match &self.root {
            Some(path) => std::path::absolute(path)?,
            None => Root::default_path()?,
        };
        Root::open(&path)
            .with_context(|| format!("cannot use the state directory {}", path.display()))
    }

    /// An engine that can start VMs.
    pub(crate) fn engine(&self) -> Result<Engine> {
        let root = self.root()?;
        let programs = Programs::discover_with(&root, this_program()?)?;
        Ok(Engine::new(root, programs))
    }

    /// An engine for verbs that start no VM afresh, and so need no Firecracker.
    pub(crate) fn engine_for_reading(&self) -> Result<Engine> {
        let rekindle = this_program()?;
        Ok(Engine::new(
            self.root()?,
            Programs {
                firecracker: PathBuf::new(),
                rekindle,
            },
        ))
    }

    /// The directory of a VM that exists.
    pub(crate) fn vm(&self, name: &VmName) -> Result<(Engine, VmDir)> {
        let engine = self.engine_for_reading()?;
        let dir = VmDir::open(engine.root(), name)?;
        Ok((engine, dir))
    }
}

/// A name that nobody has yet, for who gave none.
fn fresh_name(base: &str) -> String {
    let base: String = base
        .chars()
        .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        .take(16)
        .collect();
    let nanos = std::time::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.subsec_nanos());
    format!(
        "{base}-{:05x}",
        (nanos ^ std::process::id().rotate_left(8)) & 0xf_ffff
    )
}

/// `90`, `90s`, `5m`, `2h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) => (number, &text[number.len()..]),
        None => (text, "s"),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not like 30s, 5m or 2h"))?;
    let seconds = match unit {
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3600),
        _ => Some(number),
    };
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| format!("{text:?} is too long"))
}

/// This program, or the newer one that took its place. Of one that was removed the kernel still has the file.
fn this_program() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find this program")?;
    if program.exists() {
        return Ok(program);
    }
    let named = program
        .to_str()
        .and_then(|name| name.strip_suffix(" (deleted)"));
    let newer = named.map(PathBuf::from).filter(|newer| newer.exists());
    Ok(newer.unwrap_or_else(|| PathBuf::from("/proc/self/exe")))
}

/// Runs a future on a runtime of one thread.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(future)
}

pub(crate) fn main() -> ExitCode {
    let Cli { root, verb } = Cli::parse();
    // What this program makes is its user's alone, sockets included.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let failure = if matches!(verb, Verb::Run(_) | Verb::Exec(_)) {
        ExitCode::from(125)
    } else {
        ExitCode::FAILURE
    };
    let reminds = reminds(&verb);
    let context = Context { root };
    let outcome = dispatch(&context, verb);
    if reminds {
        gc::remind(&context);
    }
    match outcome {
        Ok(code) => code,
        Err(e) if output::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            output::say(format_args!("{e:#}"));
            failure
        }
    }
}

/// Whether a verb ends with a word about what is there to be removed: `ps`, and whatever a person types. It takes a look at each
/// VM, which programs that start many should not pay for; and what `run` and `exec` print is their program's.
fn reminds(verb: &Verb) -> bool {
    match verb {
        Verb::Ps(_) => true,
        Verb::Run(_)
        | Verb::Exec(_)
        | Verb::Gc(_)
        | Verb::Pager(_)
        | Verb::Monitor(_)
        | Verb::Bench(_) => false,
        _ => std::io::stderr().is_terminal(),
    }
}

fn dispatch(context: &Context, verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Run(run) => return run.run(context),
        Verb::Exec(exec) => return exec.run(context),
        Verb::Cp(cp) => return cp.run(context),
        Verb::Wait(wait) => return wait.run(context),
        Verb::Doctor(doctor) => return doctor.run(context),
        Verb::Setup(setup) => setup.run(context),
        Verb::Ps(ps) => ps.run(context),
        Verb::Inspect(inspect) => inspect.run(context),
        Verb::Trace(trace) => trace.run(context),
        Verb::Logs(logs) => logs.run(context),
        Verb::Console(console) => console.run(context),
        Verb::Pause(pause) => pause.run(context),
        Verb::Resume(resume) => resume.run(context),
        Verb::Stop(stop) => stop.run(context),
        Verb::Rm(rm) => rm.run(context),
        Verb::Gc(gc) => gc.run(context),
        Verb::Snapshot(snapshot) => snapshot.run(context),
        Verb::Restore(restore) => restore.run(context),
        Verb::Image(image) => image.run(context),
        Verb::Pager(pager) => pager.run(context),
        Verb::Api(api) => api.run(),
        Verb::Bench(bench) => bench.run(context),
        Verb::Monitor(monitor) => monitor.run(context),
    }?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_says_what_it_does() {
        for verb in Cli::command()
            .get_subcommands()
            .filter(|verb| !verb.is_hide_set())
        {
            assert!(
                verb.get_about().is_some(),
                "{} has no description",
                verb.get_name()
            );
        }
    }
}
