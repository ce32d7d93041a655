//! `cargo xtask lab -- CMD`: runs a command where `/dev/kvm` works.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use rekindle_assets::lab::{Options, Outcome};

use crate::assets;
use crate::workspace::Workspace;

/// What `timeout` and shells say when time ran out.
const TIMED_OUT: u8 = 124;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// CPUs of the lab
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Memory of the lab, in MiB
    #[arg(long, default_value_t = 3072, value_name = "MIB")]
    memory: u32,
    /// Ends the lab after that many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Directory that the command can write to for good, at the same path
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// The command
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, arguments: Arguments) -> Result<ExitCode> {
    let assets = assets::open(workspace)?;
    let lab = assets.lab()?;
    let mut environment = assets::environment(workspace, &assets)?;
    environment.extend(inherited());
    let options = Options {
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        share: arguments.share.unwrap_or_else(|| share(workspace)),
        directory: std::env::current_dir()?,
        environment,
        terminal: true,
        timeout: arguments.timeout.map(Duration::from_secs),
        tries: 1,
    };
    let outcome = lab.run(&arguments.command, &options, &mut io::stdout())?;
    match outcome {
        Outcome::Exited(status) => Ok(u8::try_from(status)
            .context("a status is at most 255")?
            .into()),
        Outcome::TimedOut => {
            eprintln!("xtask: the lab was ended after its time was up");
            Ok(TIMED_OUT.into())
        }
    }
}

/// The lab in which Linux guests run, started anew when its own kernel crashes; in the workspace, without a limit.
pub(crate) fn options(workspace: &Workspace, environment: Vec<(String, String)>) -> Options {
    Options {
        // With two, QEMU mixes up the state of host and guest now and then (docs/lab.md).
        cpus: 1,
        memory_mib: 3072,
        share: share(workspace),
        directory: workspace.root.clone(),
        environment,
        terminal: true,
        timeout: None,
        tries: 3,
    }
}

/// Where the lab can leave results.
pub(crate) fn share(workspace: &Workspace) -> PathBuf {
    workspace.root.join("target/lab")
}

/// What a person sets for tests and expects inside as well.
pub(crate) fn inherited() -> impl Iterator<Item = (String, String)> {
    std::env::vars().filter(|(name, _)| {
        matches!(
            name.as_str(),
            "RUST_BACKTRACE" | "RUST_LOG" | "REKINDLE_KEEP"
        )
    })
}
