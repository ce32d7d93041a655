//! `cargo xtask soak`: the stories of which `cargo xtask test` plays a fraction, at length, and fuzzing.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::test::Stage;
use crate::workspace::Workspace;
use crate::{assets, fuzz, test};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How many kills at random moments; 0 for none
    #[arg(long, default_value_t = 500)]
    kills: u32,
    /// How many kills of page servers at random moments, while the guest reads its memory
    #[arg(long, default_value_t = 300)]
    takeovers: u32,
    /// How many random walks through memory, beside replay and page servers that die; 0 for none
    #[arg(long, value_name = "N", default_value_t = 3000)]
    walks: u32,
    /// For how long removals rage beside faults and replay; 0 for not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    storm: u32,
    /// How many kills of page servers at random moments in the lab, while a balloon moves; 0 for none
    #[arg(long, value_name = "N", default_value_t = 20)]
    balloon_kills: u32,
    /// For how long a balloon in the lab never rests, beside faults and replay; 0 for not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    balloon_storm: u32,
    /// The seed of an earlier run, to play it again
    #[arg(long)]
    seed: Option<u64>,
    /// How long to fuzz each of the parsers that face a stranger; 0 for not at all
    #[arg(long, value_name = "S", default_value_t = fuzz::SECONDS)]
    fuzz_seconds: u32,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let mut failed = Vec::new();
    if arguments.kills > 0 {
        failed.extend(kills(workspace, arguments)?);
    }
    if arguments.walks > 0 {
        failed.extend(walks(workspace, arguments)?);
    }
    if arguments.storm > 0 {
        failed.extend(storm(workspace, arguments)?);
    }
    if arguments.balloon_kills > 0 || arguments.balloon_storm > 0 {
        failed.extend(balloon(workspace, arguments)?);
    }
    if arguments.fuzz_seconds > 0 {
        if let Some(lacks) = fuzz::lacks() {
            bail!("cannot fuzz: {lacks}");
        }
        let found = fuzz::run(workspace, arguments.fuzz_seconds)?;
        failed.extend(found.into_iter().map(|finding| finding.name));
    }
    for what in &failed {
        eprintln!("FAILED   {what}");
    }
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// In the lab, whose guests are Linux and have balloons.
fn balloon(workspace: &Workspace, arguments: &Arguments) -> Result<Option<String>> {
    let (storm, kills) = (arguments.balloon_storm, arguments.balloon_kills);
    let assets = assets::open(workspace)?;
    let mut environment = test::environment(workspace, &assets)?;
    environment.push(("REKINDLE_BALLOON_STORM".into(), storm.to_string()));
    environment.push(("REKINDLE_BALLOON_KILLS".into(), kills.to_string()));
    environment.extend(seed(arguments));
    // The lab is slow, and unevenly so; the story has a limit of its own, below this one.
    let timeout = Duration::from_secs(600 + 2 * u64::from(storm) + 60 * u64::from(kills));
    let stage = Stage::open(workspace, &assets, environment, timeout)?;
    let why = stage.play_whole("storm")?;
    Ok(why.map(|why| format!("a balloon in the lab ({why})")))
}

/// What repeats an earlier run.
fn seed(arguments: &Arguments) -> Option<(String, String)> {
    let seed = arguments.seed?;
    Some(("REKINDLE_SEED".into(), seed.to_string()))
}

fn kills(workspace: &Workspace, arguments: &Arguments) -> Result<Option<String>> {
    let assets = assets::open(workspace)?;
    let mut environment = test::environment(workspace, &assets)?;
    environment.push(("REKINDLE_KILLS".into(), arguments.kills.to_string()));
    environment.push(("REKINDLE_TAKEOVERS".into(), arguments.takeovers.to_string()));
    let stories = Stories {
        what: "kills at random moments",
        package: "rekindle-e2e",
        target: "native",
        filter: "random",
    };
    stories.tell(workspace, arguments, environment)
}

fn walks(workspace: &Workspace, arguments: &Arguments) -> Result<Option<String>> {
    let environment = vec![("REKINDLE_WALKS".into(), arguments.walks.to_string())];
    let stories = Stories {
        what: "random walks",
        package: "rekindle-pager",
        target: "vm",
        filter: "random",
    };
    stories.tell(workspace, arguments, environment)
}

fn storm(workspace: &Workspace, arguments: &Arguments) -> Result<Option<String>> {
    let environment = vec![("REKINDLE_STORM".into(), arguments.storm.to_string())];
    let stories = Stories {
        what: "a storm of removals",
        package: "rekindle-pager",
        target: "vm",
        filter: "storm",
    };
    stories.tell(workspace, arguments, environment)
}

/// Stories of which the tests play a fraction.
struct Stories {
    what: &'static str,
    package: &'static str,
    target: &'static str,
    /// What their names have and no others'.
    filter: &'static str,
}

impl Stories {
    /// Plays them at the length that the environment says; returns what failed.
    fn tell(
        &self,
        workspace: &Workspace,
        arguments: &Arguments,
        mut environment: Vec<(String, String)>,
    ) -> Result<Option<String>> {
        let Stories {
            what,
            package,
            target,
            filter,
        } = self;
        environment.extend(seed(arguments));
        eprintln!("\n== {what}");
        let status = workspace
            .cargo()
            .args(["test", "--package", package, "--test", target])
            .args(["--", filter])
            .envs(environment)
            .status()?;
        Ok((!status.success()).then(|| format!("{what} ({status})")))
    }
}
