//! SIGKILL for any process of a VM, at any moment of its life: the next command tells the truth, what can go on goes
//! on, and nothing stays behind.
//!
//! `REKINDLE_KILLS` says how many kills at random moments there are; `REKINDLE_SEED` repeats a run.

use std::fmt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_e2e::{Rekindle, Role, SOON, until, wait_for};
use rekindle_kit::dice::{Dice, setting};
use rekindle_kit::story::Story;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bare::{counter, pattern};
use crate::story;

/// How many kills at random moments there are unless `REKINDLE_KILLS` says otherwise.
const KILLS: u64 = 12;

pub(crate) fn stories() -> Vec<Story> {
    let soak = Duration::from_secs(120)
        + Duration::from_secs(10) * u32::try_from(kills()).unwrap_or(u32::MAX);
    vec![
        story(
            "a killed monitor is replaced and the guest goes on",
            a_killed_monitor,
        ),
        story(
            "a monitor without its keeper is replaced by the next command",
            keeper_and_monitor,
        ),
        story(
            "a killed page server is replaced and the guest goes on",
            a_killed_pager,
        ),
        story(
            "a VM whose snapshot is gone is taken up after a kill",
            without_its_snapshot,
        ),
        story("all that runs is killed in one instant", all_at_once),
        story(
            "who waits for a VM is told when all of it is killed in one instant",
            told_by_nobody,
        ),
        story(
            "a killed firecracker is told by the next command",
            nobody_left_to_tell,
        ),
        story(
            "gc reclaims VMs that nobody can have back, and says what it keeps and why",
            abandoned,
        ),
        story(
            "a monitor killed in a snapshot leaves the guest running",
            killed_in_a_snapshot,
        ),
        story(
            "a start killed at each step is finished or gone",
            each_step_of_a_start,
        ),
        story(
            "a process killed at a random moment leaves nothing",
            random_moments,
        )
        .within(soak),
    ]
}

fn kills() -> u64 {
    setting("REKINDLE_KILLS", KILLS)
}

/// Whom a kill hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    /// The verb that was typed.
    Verb,
    /// One process of the VM.
    One(Role),
    /// All at once.
    All,
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Victim::Verb => f.write_str("the verb"),
            Victim::One(role) => write!(f, "the {role:?}"),
            Victim::All => f.write_str("everything"),
        }
    }
}

const VICTIMS: [Victim; 6] = [
    Victim::Verb,
    Victim::One(Role::Keeper),
    Victim::One(Role::Monitor),
    Victim::One(Role::Firecracker),
    Victim::One(Role::Pager),
    Victim::All,
];

/// Kills it if it is there; says whether it was.
fn kill(rekindle: &Rekindle, victim: Victim) -> anyhow::Result<bool> {
    let meant = |role: Role| match victim {
        Victim::Verb => role == Role::Verb,
        Victim::One(one) => role == one,
        Victim::All => true,
    };
    let mut found = false;
    // The keeper first: it starts others.
    for (role, process) in rekindle.processes()? {
        if meant(role) {
            // It may have ended by itself meanwhile.
            found |= process.kill(SOON).is_ok();
        }
    }
    Ok(found)
}

/// What the next command says, which must be true.
fn truth(rekindle: &Rekindle) -> anyhow::Result<Vec<Value>> {
    let vms = asked(rekindle)?;
    let is_starting = |vm: &Value| vm["state"] == "starting" || vm["state"] == "configured";
    if vms.iter().any(is_starting) && rekindle.processes()?.is_empty() {
        // It was, and has failed since.
        let vms = asked(rekindle)?;
        ensure!(!vms.iter().any(is_starting), "nobody starts it: {vms:?}");
        return Ok(vms);
    }
    Ok(vms)
}

/// Asks once, and compares what is said with what is: states that are alive have their processes, and nobody else
/// has any.
fn asked(rekindle: &Rekindle) -> anyhow::Result<Vec<Value>> {
    let said = rekindle.tries("ps --json")?;
    let Value::Array(vms) = said.clone().json()? else {
        anyhow::bail!("{said:?}");
    };
    let processes = rekindle.processes()?;
    for vm in &vms {
        let state = vm["state"].as_str().context("a state")?;
        let is_there = |id: &Value| {
            let pid = id["pid"].as_i64();
            processes
                .iter()
                .any(|(_, process)| Some(i64::from(process.pid())) == pid)
        };
        match state {
            "running" | "paused" => {
                ensure!(is_there(&vm["firecracker"]), "{vm}, but {processes:?}");
                let has_pager = !vm["pager"].is_null();
                ensure!(
                    !has_pager || is_there(&vm["pager"]),
                    "{vm}, but {processes:?}"
                );
            }
            "starting" | "configured" => {}
            "stopped" | "failed" => {
                ensure!(
                    !is_there(&vm["firecracker"]) && !is_there(&vm["pager"]),
                    "{vm}, but {processes:?}"
                );
            }
            other => anyhow::bail!("{other}: {said:?}"),
        }
    }
    // A verb may be about to start one.
    if vms.is_empty() && !processes.iter().any(|(role, _)| *role == Role::Verb) {
        let left = rekindle.processes()?;
        ensure!(left.is_empty(), "no VM, but {left:?}");
    }
    Ok(vms)
}

/// The guest prints lines that it had not printed. What a killed monitor was about to write down may be missing.
fn goes_on(rekindle: &Rekindle, vm: &str) -> anyhow::Result<()> {
    let seen = rekindle.output(vm)?.matches('\n').count();
    let mut guest = rekindle.follows(vm)?;
    for _ in 0..seen + 2 {
        guest.hears("\n")?;
    }
    Ok(())
}

/// A running original, a snapshot of it, and a lazily restored copy of that.
fn a_copy(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    rekindle.does("restore base --name copy --track-dirty-pages")?;
    goes_on(rekindle, "copy")
}

fn a_snapshot(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &counter())?;
    rekindle.follows("original")?.counts(2)?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    Ok(())
}

fn a_killed_monitor(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    for _ in 0..3 {
        let monitor = rekindle.one(Role::Monitor)?;
        let firecracker = rekindle.one(Role::Firecracker)?;
        monitor.kill(SOON)?;
        let vms = truth(rekindle)?;
        ensure!(vms[0]["state"] == "running", "{vms:?}");
        ensure!(rekindle.one(Role::Firecracker)? == firecracker);
        ensure!(rekindle.one(Role::Monitor)?.pid() != monitor.pid());
        goes_on(rekindle, "copy")?;
    }
    // Every verb works on what was taken up.
    rekindle.does("pause copy")?;
    rekindle.one(Role::Monitor)?.kill(SOON)?;
    rekindle.does("resume copy")?;
    rekindle.does("snapshot create copy")?;
    rekindle.one(Role::Monitor)?.kill(SOON)?;
    rekindle.does("stop copy --grace 0")?;
    ensure!(rekindle.state_of("copy")? == "stopped");
    Ok(())
}

fn keeper_and_monitor(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    rekindle.one(Role::Keeper)?.kill(SOON)?;
    goes_on(rekindle, "copy")?;
    truth(rekindle)?;
    rekindle.one(Role::Monitor)?.kill(SOON)?;
    let said = rekindle.tries("ps --json")?;
    ensure!(
        said.err
            .contains("the monitor of copy was dead; the VM is running now"),
        "{said:?}"
    );
    ensure!(said.json()?[0]["state"] == "running");
    goes_on(rekindle, "copy")?;
    rekindle.one(Role::Keeper)?;
    let said = rekindle.tries("ps --json")?;
    ensure!(said.err.is_empty(), "{said:?}");
    Ok(())
}

/// With the File backend nobody but the monitor holds the snapshot, so it can be removed while there is none.
fn without_its_snapshot(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    rekindle.does("restore base --name copy --backend file")?;
    rekindle.refuses("snapshot rm base")?;
    for role in [Role::Keeper, Role::Monitor] {
        rekindle.one(role)?.kill(SOON)?;
    }
    rekindle.does("snapshot rm base")?;
    ensure!(truth(rekindle)?[0]["state"] == "running");
    goes_on(rekindle, "copy")?;
    rekindle.does("snapshot create copy --name again")?;
    rekindle.does("snapshot verify again")?;
    Ok(())
}

fn a_killed_pager(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    let pager = rekindle.one(Role::Pager)?;
    pager.kill(SOON)?;
    let vms = truth(rekindle)?;
    ensure!(vms[0]["state"] == "running", "{vms:?}");
    ensure!(vms[0]["pager"]["pid"] != pager.pid(), "{vms:?}");
    goes_on(rekindle, "copy")
}

fn all_at_once(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    kill(rekindle, Victim::All)?;
    let vms = truth(rekindle)?;
    ensure!(
        vms[0]["state"] == "failed" && vms[0]["why"]["kind"] == "vanished",
        "{vms:?}"
    );
    rekindle.does("rm copy")?;
    rekindle.does("restore base --name copy")?;
    goes_on(rekindle, "copy")
}

/// No process of the VM is left that could write down that it ended.
fn told_by_nobody(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    let mut run = rekindle.listens(&format!("run {guest} --name c"))?;
    run.hears("n=2\n")?;
    let mut follower = rekindle.follows("c")?;
    follower.counts(2)?;
    let mut waiter = rekindle.listens("wait c --json")?;
    // It holds what it waits for once it watches the directory.
    until("it waits", || watches(waiter.child().id()))?;
    for (role, process) in rekindle.processes()? {
        if role != Role::Verb {
            let pid = Pid::from_raw(process.pid()).context("0 is no process")?;
            kill_process(pid, Signal::KILL)?;
        }
    }
    let (status, _) = run.ends().context("run")?;
    ensure!(status == Some(125), "run ended with {status:?}");
    let (status, _) = follower.ends().context("logs -f")?;
    ensure!(status == Some(0), "logs -f ended with {status:?}");
    let (status, said) = waiter.ends().context("wait")?;
    ensure!(status == Some(1) && said.contains("\"failed\""), "{said}");
    Ok(())
}

/// Whether a process watches files.
fn watches(pid: u32) -> anyhow::Result<bool> {
    let held = std::fs::read_dir(format!("/proc/{pid}/fd"))?;
    let mut held = held.flatten().filter_map(|fd| fd.path().read_link().ok());
    Ok(held.any(|file| file.to_string_lossy().contains("inotify")))
}

/// Firecracker dies when its monitor and keeper are dead already.
fn nobody_left_to_tell(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    for role in [Role::Keeper, Role::Monitor, Role::Firecracker] {
        rekindle.one(role)?.kill(SOON)?;
    }
    let vms = truth(rekindle)?;
    ensure!(
        vms[0]["state"] == "failed" && vms[0]["why"]["kind"] == "vanished",
        "{vms:?}"
    );
    Ok(())
}

fn abandoned(rekindle: &Rekindle) -> anyhow::Result<()> {
    let says = |line: &str, word: &str| -> anyhow::Result<()> {
        let said = rekindle.does(line)?;
        ensure!(
            said.contains(word),
            "`{line}` does not say {word:?}: {said}"
        );
        Ok(())
    };
    a_copy(rekindle)?;
    kill(rekindle, Victim::All)?;
    says("gc --dry-run", "would go  VM copy: its monitor was killed")?;
    ensure!(rekindle.vm("copy").exists());
    says("gc", "removed   VM copy: its monitor was killed")?;
    ensure!(!rekindle.vm("copy").exists() && rekindle.vms()?.is_empty());
    // One that another command has found dead before.
    rekindle.does("restore base --name copy")?;
    kill(rekindle, Victim::All)?;
    ensure!(truth(rekindle)?[0]["why"]["kind"] == "vanished");
    says("gc", "removed   VM copy: firecracker")?;
    // One that runs is nobody's to remove, with or without its monitor.
    rekindle.does("restore base --name copy")?;
    ensure!(rekindle.does("gc")?.is_empty());
    for role in [Role::Keeper, Role::Monitor] {
        rekindle.one(role)?.kill(SOON)?;
    }
    says("gc", "kept      VM copy: it runs without its monitor")?;
    ensure!(truth(rekindle)?[0]["state"] == "running");
    goes_on(rekindle, "copy")?;
    // What ended while somebody looked is read by somebody.
    let made = rekindle.tells("snapshot create copy --json")?;
    rekindle.does("stop copy --grace 0")?;
    says("gc", "kept      VM copy: it has ended")?;
    let id = made["id"].as_str().context("an id")?;
    says("gc", &format!("kept      snapshot {id}: it has no name"))?;
    // Of what was fetched, as much as is allowed.
    let cache = rekindle.state().join("cache");
    std::fs::create_dir_all(&cache)?;
    std::fs::write(cache.join("chunk"), vec![1; 3 << 20])?;
    says("gc --dry-run --cache 2", "1 MiB would go")?;
    says("gc", "cache     3 MiB of chunks")?;
    let said = rekindle.tells("gc --cache 2 --json")?;
    ensure!(said["cache"]["removed_bytes"] == 3 << 20, "{said}");
    ensure!(said["kept"][0]["what"] == "VM copy", "{said}");
    Ok(())
}

fn killed_in_a_snapshot(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("c", &pattern())?;
    rekindle.follows("c")?.hears("vg")?;
    for delay in [0, 3, 6, 12, 25, 50] {
        let before = rekindle.output("c")?.len();
        let mut create = rekindle.command("snapshot create c --name torn");
        let mut create = create.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        until("the snapshot has begun", || {
            Ok(begun(rekindle)? || create.try_wait()?.is_some())
        })?;
        std::thread::sleep(Duration::from_millis(delay));
        rekindle.one(Role::Monitor)?.kill(SOON)?;
        let status = wait_for(&mut create, SOON)?;
        let vms = truth(rekindle)?;
        ensure!(vms[0]["state"] == "running", "after {delay} ms: {vms:?}");
        let mut guest = rekindle.follows("c")?;
        let mut heard = guest.hears("v")?;
        while heard.len() <= before + 1 {
            heard += &guest.hears("v")?;
        }
        // What was begun is whole, or not there, and its name is free.
        let listed = rekindle.tells("snapshot ls --json")?;
        let names = listed.as_array().context("a list")?;
        ensure!(names.iter().all(|row| row["error"].is_null()), "{listed}");
        ensure!(
            !status.success() || names.len() == 1,
            "it was said to be done: {listed}"
        );
        if names.is_empty() {
            rekindle.does("snapshot create c --name torn")?;
        }
        rekindle.does("snapshot verify torn")?;
        rekindle.does("snapshot rm torn")?;
        until("the draft is gone", || Ok(!begun(rekindle)?))?;
    }
    Ok(())
}

/// Whether a snapshot is being made.
fn begun(rekindle: &Rekindle) -> anyhow::Result<bool> {
    Ok(std::fs::read_dir(rekindle.state().join("tmp"))?
        .next()
        .is_some())
}

/// What appears in a VM's directory while it starts, in about this order.
const STEPS: [&str; 9] = [
    "",
    "job.json",
    "monitor.log",
    "lock",
    "control.sock",
    "record.json",
    "serial.fifo",
    "uffd.sock",
    "api.sock",
];

fn each_step_of_a_start(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    let mut dice = Dice::new();
    for (n, step) in STEPS.into_iter().enumerate() {
        // Every victim would take too long; the random moments see to the rest.
        for victim in [
            VICTIMS[n % VICTIMS.len()],
            Victim::All,
            VICTIMS[dice.up_to(6)],
        ] {
            let mut verb = match n % 4 {
                3 => boot(rekindle, "")?,
                _ => copy(rekindle, "")?,
            };
            let path = rekindle.vm("k").join(step);
            until("the step is reached", || {
                Ok(path.exists() || verb.try_wait()?.is_some())
            })?;
            survives(rekindle, &mut verb, victim)
                .with_context(|| format!("{victim} at {step:?}"))?;
        }
    }
    Ok(())
}

fn random_moments(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    let at = Moments {
        times: kills(),
        within: Duration::from_millis(150),
        boots: "",
        copies: "",
    };
    at.play(rekindle, |_| Ok(()))
}

/// Kills at random moments, of random processes, of VMs that are started.
pub(crate) struct Moments<'a> {
    /// How many.
    pub(crate) times: u64,
    /// How long after the start at the latest.
    pub(crate) within: Duration,
    /// With what options VMs are booted, …
    pub(crate) boots: &'a str,
    /// … and with what options copies of `base` are restored; what the snapshot says, they have anyway.
    pub(crate) copies: &'a str,
}

impl Moments<'_> {
    /// Starts, kills, and sees that nothing is left; `after` looks too.
    pub(crate) fn play(
        &self,
        rekindle: &Rekindle,
        after: impl Fn(&Rekindle) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut dice = Dice::new();
        // Told at once: whoever compares afterwards may panic.
        println!("{} kills, REKINDLE_SEED={}", self.times, dice.seed());
        let micros = usize::try_from(self.within.as_micros())?;
        for n in 0..self.times {
            let victim = VICTIMS[dice.up_to(VICTIMS.len())];
            let delay = Duration::from_micros(dice.up_to(micros) as u64);
            let boots = dice.up_to(2) == 0;
            let mut verb = match boots {
                true => boot(rekindle, self.boots)?,
                false => copy(rekindle, self.copies)?,
            };
            std::thread::sleep(delay);
            let survived = survives(rekindle, &mut verb, victim).and_then(|()| after(rekindle));
            survived
                .with_context(|| format!("kill {n}: {victim} after {delay:?}, boots: {boots}"))?;
        }
        Ok(())
    }
}

/// Starts `k`, from a kernel, with these options.
fn boot(rekindle: &Rekindle, options: &str) -> anyhow::Result<Child> {
    let guest = rekindle.guest(&counter())?;
    begin(rekindle.command(&format!("run {guest} --name k --detach {options}")))
}

/// Starts `k`, from the snapshot, with these options.
fn copy(rekindle: &Rekindle, options: &str) -> anyhow::Result<Child> {
    begin(rekindle.command(&format!("restore base --name k {options}")))
}

fn begin(mut verb: Command) -> anyhow::Result<Child> {
    Ok(verb.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

/// Kills, asks, checks that what is said to run does, and removes it.
fn survives(rekindle: &Rekindle, verb: &mut Child, victim: Victim) -> anyhow::Result<()> {
    kill(rekindle, victim)?;
    let vms = truth(rekindle)?;
    wait_for(verb, SOON).context("the verb hangs")?;
    let was_there = !vms.is_empty();
    // Whoever was starting it is done now, or will never be.
    until("the start is over", || {
        let vms = truth(rekindle)?;
        Ok(vms
            .iter()
            .all(|vm| vm["state"] != "starting" && vm["state"] != "configured"))
    })?;
    let vms = truth(rekindle)?;
    if vms.iter().any(|vm| vm["state"] == "running") {
        goes_on(rekindle, "k")?;
    }
    if was_there || !vms.is_empty() {
        rekindle.tries("rm --force k")?;
    }
    ensure!(rekindle.vms()?.is_empty());
    until("no process is left", || {
        Ok(rekindle.processes()?.is_empty())
    })?;
    ensure!(!rekindle.vm("k").exists(), "its directory is left");
    Ok(())
}
