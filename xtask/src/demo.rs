//! `cargo xtask demo`: the main job, shown on a real Linux guest.
//!
//! ```text
//! assets ─> build ─> rekindle setup ─> the story ─> table
//!                                        └ here where KVM runs Linux, else in the lab
//! ```
//!
//! The story is this program again, with `demo-story`: the lab runs one command.

mod evidence;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rekindle_assets::lab::{Options, Outcome};
use serde_json::Value;

use crate::console::Until;
use crate::workspace::Workspace;
use crate::{assets, console, lab};

const COPIES: usize = 3;
/// Plenty for the base image, and half of what the lab would need time for otherwise.
const MEMORY_MIB: &str = "128";
const LAB_TIMEOUT: Duration = Duration::from_secs(4 * 60);
/// How long a guest may take to say something; the lab's are slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Prepares everything, then tells the story where it can run.
pub(crate) fn run(workspace: &Workspace) -> Result<ExitCode> {
    let begun = Instant::now();
    let assets = assets::open(workspace)?;
    let rekindle = build(workspace)?;
    let root = workspace.root.join("target/demo");
    // What a demo before this one left behind.
    Story::new(&rekindle, &root).sweep()?;

    say("rekindle setup: firecracker, Debian's kernel, a base image");
    let environment = assets::environment(workspace, &assets)?;
    let status = Command::new(&rekindle)
        .arg("setup")
        .arg("--root")
        .arg(&root)
        .arg("--cache")
        .arg(assets::cache(workspace))
        .stdout(Stdio::null())
        .status()?;
    ensure!(status.success(), "rekindle setup failed");

    let code = if can_run_linux(&rekindle, &root)? {
        say("this host's KVM runs Linux: here we go");
        story(&rekindle, &root)?;
        ExitCode::SUCCESS
    } else {
        say(
            "this host's KVM cannot run Linux (see `rekindle doctor`): the same in the lab, a QEMU that",
        );
        say(
            "emulates a machine with KVM. It shows what works, not how fast: its figures mean nothing.",
        );
        in_lab(workspace, &assets, &rekindle, &root, environment)?
    };
    say(&format!("the demo took {} s", begun.elapsed().as_secs()));
    next_steps(&rekindle);
    Ok(code)
}

/// Optimised: figures need it natively, and patience in the lab, where every instruction is emulated.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    say("building rekindle (release); the first time this takes some minutes");
    let arguments = ["build", "--package", "rekindle", "--release"];
    let status = workspace.cargo().args(arguments).status()?;
    ensure!(status.success(), "rekindle does not build");
    Ok(workspace.target.join("release").join("rekindle"))
}

fn in_lab(
    workspace: &Workspace,
    assets: &rekindle_assets::Assets,
    rekindle: &Path,
    root: &Path,
    environment: Vec<(String, String)>,
) -> Result<ExitCode> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let command = [
        assets::text(&program)?,
        "demo-story".into(),
        assets::text(rekindle)?,
        assets::text(root)?,
    ];
    let options = Options {
        timeout: Some(LAB_TIMEOUT),
        ..lab::options(workspace, environment)
    };
    match assets.lab()?.run(&command, &options, &mut io::stdout())? {
        Outcome::Exited(0) => Ok(ExitCode::SUCCESS),
        Outcome::Exited(status) => bail!("the demo failed in the lab with status {status}"),
        Outcome::TimedOut => bail!("the demo did not end within {LAB_TIMEOUT:?} in the lab"),
    }
}

fn can_run_linux(rekindle: &Path, root: &Path) -> Result<bool> {
    let output = Command::new(rekindle)
        .args(["doctor", "--json", "--root"])
        .arg(root)
        .output()?;
    let findings: Vec<Value> =
        serde_json::from_slice(&output.stdout).context("rekindle doctor --json")?;
    Ok(findings
        .iter()
        .any(|f| f["what"] == "kvm" && f["verdict"] == "good"))
}

fn next_steps(rekindle: &Path) {
    let name = rekindle.display();
    println!(
        "
What to try next
  {name} doctor                     what this host can do
  {name} setup                      Firecracker, a kernel and an image of your own
  {name} run -- uname -a            a program in a microVM
  {name} run --name base --detach   a VM that stays; then: snapshot create, restore, console
  cargo xtask lab -- CMD            any command on a machine with KVM, emulated
  cargo xtask bench                 figures for this host, beside their baselines"
    );
}

fn say(text: &str) {
    eprintln!("demo: {text}");
}

/// The part that runs where guests can.
pub(crate) fn story(rekindle: &Path, root: &Path) -> Result<()> {
    let story = Story::new(rekindle, root);
    let told = story.tell();
    if told.is_err() {
        // Why it failed comes first if this fails as well.
        let _ = story.show_evidence();
    }
    let swept = story.sweep();
    told.and(swept)
}

/// One step, how long it took, what is to be said of it.
struct Step {
    what: String,
    took: String,
    note: String,
}

struct Story<'a> {
    rekindle: &'a Path,
    root: &'a Path,
}

impl<'a> Story<'a> {
    fn new(rekindle: &'a Path, root: &'a Path) -> Story<'a> {
        Story { rekindle, root }
    }

    fn tell(&self) -> Result<()> {
        let mut steps = Vec::new();

        say("a program in a fresh microVM: rekindle run -- uname -a");
        let begun = Instant::now();
        let output = self.rekindle(&["run", "--", "uname", "-a"])?;
        print!("{output}");
        steps.push(step("boot, run a program, power off", begun, ""));

        say("a VM that stays, counting: rekindle run --name base --detach");
        let begun = Instant::now();
        self.rekindle(&["run", "--name", "base", "--mem", MEMORY_MIB, "--detach"])?;
        self.wait_for("base", Until::Text("/ # "))?;
        steps.push(step("boot Debian's kernel to a shell", begun, ""));
        self.type_in(
            "base",
            "n=0; while sleep 0.1; do n=$((n+1)); echo $n > /n.new; mv /n.new /n; done &\n",
        )?;
        self.type_in(
            "base",
            "while [ ! -s /n ]; do sleep 0.1; done; echo count\"ing\"\n",
        )?;
        self.wait_for("base", Until::Text("counting"))?;

        say("pause it, snapshot it, stop it");
        let begun = Instant::now();
        self.rekindle(&["pause", "base"])?;
        steps.push(step("pause", begun, ""));
        let begun = Instant::now();
        self.rekindle(&["snapshot", "create", "base", "--name", "warm"])?;
        steps.push(step(
            &format!("snapshot {MEMORY_MIB} MiB"),
            begun,
            "written, hashed, published",
        ));
        self.rekindle(&["rm", "--force", "base"])?;

        say("three copies: rekindle restore warm --count 3 --name copy");
        let begun = Instant::now();
        let records: Vec<Value> = serde_json::from_str(&self.rekindle(&[
            "restore", "warm", "--count", "3", "--name", "copy", "--json",
        ])?)?;
        steps.push(step(
            "restore three copies",
            begun,
            "side by side, memory still on disk",
        ));
        let mut pages = BTreeMap::new();
        for (copy, record) in (1..=COPIES).zip(&records) {
            let name = format!("copy-{copy}");
            let begun = Instant::now();
            self.type_in(&name, &format!("echo \"copy {copy}\" counts on: $(cat /n), up $(cut -d' ' -f1 /proc/uptime) s\n"))?;
            let line = self.wait_for(&name, Until::Line(&format!("copy {copy} counts on: ")))?;
            println!("{name}: {line}");
            let load = record["timings"]["load_us"].as_u64().unwrap_or(0);
            let resume = record["timings"]["start_us"].as_u64().unwrap_or(0);
            steps.push(Step {
                what: format!("{name}: load, resume"),
                took: format!("{:.1} ms", millis(load + resume)),
                note: String::new(),
            });
            steps.push(step(&format!("{name}: a command in it"), begun, ""));
            pages.insert(name, steps.len() - 1);
        }
        for (name, at) in pages {
            self.rekindle(&["stop", "--grace", "0", &name])?;
            steps[at].note = self.pages_of(&name)?;
        }
        table(&steps)
    }

    /// What the page server did for a VM that has ended.
    fn pages_of(&self, name: &str) -> Result<String> {
        let path = self.root.join("vms").join(name).join("pager.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let stats: Value = serde_json::from_slice(&text)?;
        let of = stats["memory_bytes"].as_u64().unwrap_or(0) >> 12;
        let (copied, zeroed) = (&stats["copied"], &stats["zeroed"]);
        Ok(format!("{copied} pages copied, {zeroed} zeroed, of {of}"))
    }

    fn vms(&self) -> Result<Vec<Value>> {
        Ok(serde_json::from_str(&self.rekindle(&["ps", "--json"])?)?)
    }

    /// Shows what the VMs are and said, a mute one and one that ended most of all.
    fn show_evidence(&self) -> Result<()> {
        for vm in self.vms()? {
            let name = vm["name"].as_str().context("a VM has a name")?;
            let state = vm["state"].as_str().unwrap_or("unknown");
            let state = match &vm["why"] {
                Value::Null => state.to_owned(),
                why => format!("{state}: {why}"),
            };
            let printed = self.command(&["logs", name]).output()?.stdout;
            let printed = String::from_utf8_lossy(&printed);
            let dir = self.root.join("vms").join(name);
            eprint!("{}", evidence::of(name, &state, &printed, &dir));
        }
        Ok(())
    }

    /// Removes what a story leaves, also one that was killed.
    fn sweep(&self) -> Result<()> {
        for vm in self.vms()? {
            let name = vm["name"].as_str().context("a VM has a name")?;
            self.rekindle(&["rm", "--force", name])?;
        }
        let listed: Vec<Value> =
            serde_json::from_str(&self.rekindle(&["snapshot", "ls", "--json"])?)?;
        for snapshot in listed {
            let id = snapshot["id"].as_str().context("a snapshot has an id")?;
            self.rekindle(&["snapshot", "rm", id])?;
        }
        self.rekindle(&["gc"]).map(drop)
    }

    fn rekindle(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .command(arguments)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {}", self.rekindle.display()))?;
        ensure!(
            output.status.success(),
            "rekindle {} failed: {}",
            arguments.join(" "),
            output.status
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        // Before the verb: what stands behind `--` is the guest's.
        let mut command = Command::new(self.rekindle);
        command.arg("--root").arg(self.root).args(arguments);
        command
    }

    /// Types into a guest's console.
    fn type_in(&self, vm: &str, text: &str) -> Result<()> {
        let mut console = self
            .command(&["console", vm])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        console
            .stdin
            .take()
            .context("the console has an input")?
            .write_all(text.as_bytes())?;
        ensure!(console.wait()?.success(), "cannot type into {vm}");
        Ok(())
    }

    /// Follows a guest's output until it said what is wanted.
    fn wait_for(&self, vm: &str, wanted: Until<'_>) -> Result<String> {
        let mut logs = self
            .command(&["logs", "-f", vm])
            .stdout(Stdio::piped())
            .spawn()?;
        let output = logs.stdout.take().context("logs have an output")?;
        let found = console::wait(output, wanted, PATIENCE);
        let _ = logs.kill();
        let _ = logs.wait();
        found.with_context(|| format!("{vm} did not say {wanted:?}"))
    }
}

fn step(what: &str, begun: Instant, note: &str) -> Step {
    let took = begun.elapsed();
    let took = if took >= Duration::from_secs(1) {
        format!("{:.1} s", took.as_secs_f64())
    } else {
        format!("{:.1} ms", took.as_secs_f64() * 1000.0)
    };
    Step {
        what: what.into(),
        took,
        note: note.into(),
    }
}

fn millis(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64() * 1000.0
}

fn table(steps: &[Step]) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out)?;
    for Step { what, took, note } in steps {
        writeln!(out, "  {what:<34} {took:>10}  {note}")?;
    }
    Ok(())
}

/// The arguments of the part that the lab runs.
#[derive(clap::Args)]
pub(crate) struct StoryArguments {
    rekindle: PathBuf,
    root: PathBuf,
}

impl StoryArguments {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        story(&self.rekindle, &self.root)?;
        Ok(ExitCode::SUCCESS)
    }
}
