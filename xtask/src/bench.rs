//! `cargo xtask bench`: the figures of `docs/benchmarks.md`, measured here.
//!
//! ```text
//! release build ─> bare-metal guest ─> boot ─> snapshot ─> rekindle bench restore, takeover, clones
//! ```
//!
//! The guest is a bare-metal one, so that it runs on any KVM, paravirtual ones included.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::assets;
use crate::workspace::Workspace;

/// What the bench's VM and snapshot are called.
const NAME: &str = "bench";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How many rounds
    #[arg(long, default_value_t = 50)]
    rounds: u32,
    /// How many clones at once
    #[arg(long, default_value_t = 50)]
    clones: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let firecracker = assets::open(workspace)?.firecracker(None)?;
    let build = ["build", "--release", "--package", "rekindle"];
    ensure!(
        workspace.cargo().args(build).status()?.success(),
        "rekindle does not build"
    );
    let place = Place {
        rekindle: &workspace.target.join("release/rekindle"),
        root: &workspace.root.join("target/bench"),
        firecracker: &firecracker.firecracker,
    };
    std::fs::create_dir_all(place.root)?;
    let kernel = place.root.join("sweep.elf");
    let memory = write_guest(workspace, "sweep", &kernel)?;

    // What a bench before this one left behind.
    let _ = place
        .command(&["rm", "--force", NAME])
        .stderr(Stdio::null())
        .status()?;
    let _ = place
        .command(&["snapshot", "rm", NAME])
        .stderr(Stdio::null())
        .status()?;
    let kernel = assets::text(&kernel)?;
    place.must(&[
        "run", "--kernel", &kernel, "--mem", &memory, "--name", NAME, "--detach",
    ])?;
    // The guest has been through its memory at least once by then.
    thread::sleep(Duration::from_secs(2));
    place.must(&["snapshot", "create", NAME, "--name", NAME])?;
    place.must(&["rm", "--force", NAME])?;
    let rounds = arguments.rounds.to_string();
    let clones = arguments.clones.to_string();
    let benches: [&[&str]; 3] = [
        &["restore", NAME, "--rounds", &rounds],
        &["takeover", NAME],
        &["clones", "--rounds", &rounds, "--count", &clones],
    ];
    let mut failed = Vec::new();
    for bench in benches {
        let mut command = place.command(&["bench"]);
        command.args(bench);
        if arguments.json {
            command.arg("--json");
        }
        if !command.status()?.success() {
            failed.push(bench[0]);
        }
    }
    place.must(&["snapshot", "rm", NAME])?;
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(ExitCode::SUCCESS)
}

/// Writes a bare-metal guest of the test kit, and tells the memory that it needs, in MiB.
fn write_guest(workspace: &Workspace, name: &str, file: &Path) -> Result<String> {
    let output = workspace
        .cargo()
        .args([
            "run",
            "--quiet",
            "--package",
            "rekindle-kit",
            "--example",
            "guest",
            "--",
            name,
        ])
        .arg(file)
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the guest {name} cannot be made");
    Ok(String::from_utf8(output.stdout)
        .context("a number")?
        .trim()
        .to_owned())
}

/// Which program works where.
struct Place<'a> {
    rekindle: &'a Path,
    root: &'a Path,
    firecracker: &'a Path,
}

impl Place<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.rekindle);
        command
            .args(arguments)
            .env("REKINDLE_ROOT", self.root)
            .env("REKINDLE_FIRECRACKER", self.firecracker);
        command
    }

    /// What must work; its output goes to standard error, where it does not mix with the figures.
    fn must(&self, arguments: &[&str]) -> Result<()> {
        let output = self.command(arguments).stderr(Stdio::inherit()).output()?;
        eprint!("{}", String::from_utf8_lossy(&output.stdout));
        ensure!(
            output.status.success(),
            "rekindle {} failed",
            arguments.join(" ")
        );
        Ok(())
    }
}
