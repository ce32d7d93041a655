//! `cargo xtask soak`: the stories of which `cargo xtask test` plays a fraction, at length, and fuzzing.

use std::process::{ExitCode, Stdio};
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
    /// How many copies with networks are made and destroyed; 0 for none
    #[arg(long, value_name = "N", default_value_t = 1000)]
    cycles: u32,
    /// How many kills of processes of VMs with networks at random moments; 0 for none
    #[arg(long, value_name = "N", default_value_t = 100)]
    network_kills: u32,
    /// How many copies are restored from an object store over a bad line; 0 for none
    #[arg(long, value_name = "N", default_value_t = 200)]
    remote_restores: u32,
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
    /// How many rounds of write, pause, snapshot, restore and verify in the lab, on one lineage; 0 for none
    #[arg(long, value_name = "N", default_value_t = 100)]
    disk_rounds: u32,
    /// How many copies in the lab that each write, in one tree; 0 for none
    #[arg(long, value_name = "N", default_value_t = 20)]
    disk_clones: u32,
    /// How many files a tree has that is copied into a guest in the lab and back; 0 for none
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    copied_files: u32,
    /// How many MiB go through a guest's `cat` in the lab, across a snapshot and the monitor's death; 0 for none
    #[arg(long, value_name = "N", default_value_t = 100)]
    stream_mib: u32,
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
    if arguments.cycles > 0 || arguments.network_kills > 0 {
        failed.extend(networks(workspace, arguments)?);
    }
    if arguments.remote_restores > 0 {
        failed.extend(remote_restores(workspace, arguments)?);
    }
    if arguments.walks > 0 {
        failed.extend(walks(workspace, arguments)?);
    }
    if arguments.storm > 0 {
        failed.extend(storm(workspace, arguments)?);
    }
    for lab in in_the_lab(arguments) {
        if lab.settings.iter().any(|(_, n)| *n > 0) {
            failed.extend(lab.tell(workspace, arguments)?);
        }
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

/// What is played in the lab, whose guests are Linux and have balloons; not where all its settings are 0.
fn in_the_lab(arguments: &Arguments) -> Vec<InTheLab> {
    let (storm, kills) = (arguments.balloon_storm, arguments.balloon_kills);
    let one = |what, filter, setting, n: u32, seconds| InTheLab {
        what,
        filter,
        settings: vec![(setting, n)],
        seconds,
    };
    let (rounds, clones) = (arguments.disk_rounds, arguments.disk_clones);
    let (files, mib) = (arguments.copied_files, arguments.stream_mib);
    vec![
        InTheLab {
            what: "a balloon in the lab",
            filter: "storm",
            settings: vec![
                ("REKINDLE_BALLOON_STORM", storm),
                ("REKINDLE_BALLOON_KILLS", kills),
            ],
            seconds: 2 * u64::from(storm) + 60 * u64::from(kills),
        },
        one(
            "disks on one lineage",
            "lineage of writes",
            "REKINDLE_ROUNDS",
            rounds,
            60 * u64::from(rounds),
        ),
        one(
            "disks in a tree of copies",
            "tree of copies",
            "REKINDLE_CLONES",
            clones,
            60 * u64::from(clones),
        ),
        one(
            "copies in the lab",
            "copies of a tree",
            "REKINDLE_COPIED_FILES",
            files,
            u64::from(files) / 10,
        ),
        one(
            "a stream through a guest",
            "stream through a guest",
            "REKINDLE_STREAM_MIB",
            mib,
            10 * u64::from(mib),
        ),
    ]
}

/// Stories of the lab of which the tests play a fraction, or nothing.
struct InTheLab {
    what: &'static str,
    /// What their names have and no others'.
    filter: &'static str,
    settings: Vec<(&'static str, u32)>,
    /// What they may take, but for the start.
    seconds: u64,
}

impl InTheLab {
    /// Plays them; returns what failed.
    fn tell(&self, workspace: &Workspace, arguments: &Arguments) -> Result<Option<String>> {
        let assets = assets::open(workspace)?;
        let mut environment = test::environment(workspace, &assets)?;
        let settings = self.settings.iter();
        environment.extend(settings.map(|(name, value)| ((*name).into(), value.to_string())));
        environment.extend(seed(arguments));
        // The lab is slow, and unevenly so; the story has a limit of its own, below this one.
        let timeout = Duration::from_secs(600 + self.seconds);
        let stage = Stage::open(workspace, &assets, environment, timeout)?;
        let why = stage.play_whole(self.filter)?;
        Ok(why.map(|why| format!("{} ({why})", self.what)))
    }
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

fn networks(workspace: &Workspace, arguments: &Arguments) -> Result<Option<String>> {
    let assets = assets::open(workspace)?;
    let mut environment = test::environment(workspace, &assets)?;
    for (setting, count) in [
        ("REKINDLE_CYCLES", arguments.cycles),
        ("REKINDLE_NETWORK_KILLS", arguments.network_kills),
    ] {
        environment.push((setting.into(), count.to_string()));
    }
    let stories = Stories {
        what: "copies with networks, destroyed and killed",
        package: "rekindle-e2e",
        target: "native",
        filter: "jailed copies with networks",
    };
    stories.tell(workspace, arguments, environment)
}

fn remote_restores(workspace: &Workspace, arguments: &Arguments) -> Result<Option<String>> {
    let assets = assets::open(workspace)?;
    let mut environment = test::environment(workspace, &assets)?;
    let restores = arguments.remote_restores.to_string();
    environment.push(("REKINDLE_REMOTE_RESTORES".into(), restores));
    let stories = Stories {
        what: "restores over a bad line",
        package: "rekindle-e2e",
        target: "native",
        filter: "restores over a bad line",
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
        let play = |more: &[&str]| {
            let mut cargo = workspace.cargo();
            cargo
                .args(["test", "--package", package, "--test", target])
                .args(["--", filter])
                .args(more);
            cargo
        };
        // A filter that fits nothing would be a success.
        let listed = play(&["--list"]).stderr(Stdio::inherit()).output()?.stdout;
        if !String::from_utf8_lossy(&listed).contains(": test") {
            return Ok(Some(format!("{what} (no story is called {filter:?})")));
        }
        let status = play(&[]).envs(environment).status()?;
        Ok((!status.success()).then(|| format!("{what} ({status})")))
    }
}
