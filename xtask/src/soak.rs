//! `cargo xtask soak`: the stories of which `cargo xtask test` plays a fraction, at length.

use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::workspace::Workspace;
use crate::{assets, test};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How many kills at random moments
    #[arg(long, default_value_t = 500)]
    kills: u32,
    /// The seed of an earlier run, to play it again
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let assets = assets::open(workspace)?;
    let mut environment = test::environment(workspace, &assets)?;
    environment.push(("REKINDLE_KILLS".into(), arguments.kills.to_string()));
    if let Some(seed) = arguments.seed {
        environment.push(("REKINDLE_SEED".into(), seed.to_string()));
    }
    let status = workspace
        .cargo()
        .args([
            "test",
            "--package",
            "rekindle-e2e",
            "--test",
            "native",
            "--",
            "random",
        ])
        .envs(environment)
        .status()?;
    ensure!(status.success(), "the soak failed");
    Ok(ExitCode::SUCCESS)
}
