//! A host that lacks something: no KVM, no rights, no room on the disk. Told before anything is changed, or everything is
//! as it was.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rekindle_e2e::{Rekindle, Role, SOON, Said, finish, wait_for};
use rekindle_kit::guest::{Counter, Mib, Ticks};
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use rustix::process::{Pid, Resource, Rlimit};

use crate::bare::counter;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("without /dev/kvm nothing is started", no_kvm),
        story(
            "without rights to /dev/kvm nothing is started",
            no_rights_to_kvm,
        ),
        story(
            "without rights to userfaultfd the file backend is named",
            no_rights_to_userfaultfd,
        ),
        story(
            "a monitor that is out of descriptors answers when it has some",
            out_of_descriptors,
        ),
        story(
            "doctor goes through what Firecracker's makers recommend",
            recommendations,
        ),
        Story::new(
            "a disk that is full in a snapshot leaves the VM running",
            full_in_a_snapshot,
        ),
        Story::new(
            "a disk that is full at a start leaves nothing",
            full_at_a_start,
        ),
        Story::new(
            "a disk that is full while a guest prints costs lines only",
            full_while_it_prints,
        ),
    ]
}

/// A user of no rights.
const NOBODY: u32 = 65_534;

/// What `/dev/kvm` and `/dev/userfaultfd` are for a command.
struct Devices {
    kvm: Option<&'static str>,
    userfaultfd: &'static str,
}

/// A command of the program by a user of no rights, in a mount namespace where `/dev` has only these devices.
fn elsewhere(rekindle: &Rekindle, devices: &Devices, line: &str) -> anyhow::Result<Said> {
    requires_root()?;
    let make = |name: &str, mode: &str| -> anyhow::Result<String> {
        let device = fs::metadata(format!("/dev/{name}"))?.rdev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        Ok(format!("mknod -m {mode} /dev/{name} c {major} {minor}; "))
    };
    let mut script = "set -e; mount -t tmpfs -o mode=755 none /dev; ".to_owned();
    script += &make("null", "666")?;
    script += &make("userfaultfd", devices.userfaultfd)?;
    if let Some(mode) = devices.kvm {
        script += &make("kvm", mode)?;
    }
    let program = reachable(rekindle, rekindle.program(), "its-rekindle")?;
    let firecracker = reachable(rekindle, rekindle.firecracker(), "its-firecracker")?;
    let program = program.display();
    script +=
        &format!("exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups {program} {line}");
    let mut command: Command = rekindle.other("unshare");
    command
        .args(["--mount", "sh", "-c", &script])
        .env("REKINDLE_FIRECRACKER", firecracker);
    finish(command, line)
}

/// A program where the user of no rights can get at it: where it was built may be closed to him.
fn reachable(rekindle: &Rekindle, program: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let copy = rekindle.file(name);
    if !copy.exists() {
        // By a process of its own: a story that forks meanwhile would inherit our descriptor, and nobody can
        // execute a file that somebody may write to.
        let copied = std::process::Command::new("cp")
            .arg(program)
            .arg(&copy)
            .status()?;
        ensure!(copied.success(), "cannot copy {}", program.display());
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    }
    Ok(copy)
}

/// Lets the user of no rights work here.
fn given_away(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let place = rekindle
        .state()
        .parent()
        .context("it is in the story's place")?;
    fs::set_permissions(place, fs::Permissions::from_mode(0o711))?;
    chown(rekindle.state(), Some(NOBODY), Some(NOBODY))?;
    for part in fs::read_dir(rekindle.state())? {
        // One is a link that leads nowhere: the installation's id.
        lchown(part?.path(), Some(NOBODY), Some(NOBODY))?;
    }
    Ok(())
}

fn no_kvm(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    given_away(rekindle)?;
    let devices = Devices {
        kvm: None,
        userfaultfd: "666",
    };
    let said = elsewhere(
        rekindle,
        &devices,
        &format!("run {guest} --name c --detach"),
    )?
    .refused(125)?;
    ensure!(said.contains("there is no /dev/kvm"), "{said}");
    ensure!(rekindle.vms()?.is_empty());
    let said = elsewhere(rekindle, &devices, "doctor")?;
    ensure!(said.out.contains("/dev/kvm"), "{said:?}");
    Ok(())
}

fn no_rights_to_kvm(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    rekindle.boots("original", &counter())?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    let devices = Devices {
        kvm: Some("600"),
        userfaultfd: "666",
    };
    given_away(rekindle)?;
    let mine = rekindle.state().join("snapshots");
    give(&mine)?;
    for (line, status) in [
        (format!("run {guest} --name c --detach"), 125),
        ("restore base --name c".to_owned(), 1),
        ("restore base --name c --backend file".to_owned(), 1),
    ] {
        let said = elsewhere(rekindle, &devices, &line)?.refused(status)?;
        ensure!(said.contains("/dev/kvm may not be opened"), "{said}");
        ensure!(rekindle.vms()?.is_empty(), "`{line}` left a VM");
    }
    Ok(())
}

/// All below a directory goes to the user of no rights.
fn give(directory: &Path) -> anyhow::Result<()> {
    chown(directory, Some(NOBODY), Some(NOBODY))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            give(&entry.path())?;
        } else {
            chown(entry.path(), Some(NOBODY), Some(NOBODY))?;
        }
    }
    Ok(())
}

fn no_rights_to_userfaultfd(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    given_away(rekindle)?;
    let devices = Devices {
        kvm: Some("666"),
        userfaultfd: "600",
    };
    elsewhere(
        rekindle,
        &devices,
        &format!("run {guest} --name c --detach"),
    )?
    .done()?;
    rekindle.follows("c")?.counts(3)?;
    elsewhere(rekindle, &devices, "snapshot create c --name base")?.done()?;
    let said = elsewhere(rekindle, &devices, "restore base --name copy")?.refused(1)?;
    ensure!(
        said.contains("userfaultfd") && said.contains("--backend file"),
        "{said}"
    );
    ensure!(rekindle.vms()?.len() == 1);
    elsewhere(
        rekindle,
        &devices,
        "restore base --name copy --backend file",
    )?
    .done()?;
    rekindle.follows("copy")?.counts(3)?;
    Ok(())
}

fn full_in_a_snapshot() -> anyhow::Result<()> {
    let rekindle = Rekindle::on_a_disk_of(Mib(24))?;
    rekindle.boots("c", &counter())?;
    let mut guest = rekindle.follows("c")?;
    guest.counts(3)?;
    for paused in [false, true, false] {
        if paused {
            rekindle.does("pause c")?;
        }
        let said = rekindle.refuses("snapshot create c --name big")?;
        ensure!(said.contains("No space left"), "{said}");
        let state = rekindle.state_of("c")?;
        ensure!(
            state == if paused { "paused" } else { "running" },
            "{state}"
        );
        rekindle.does("resume c")?;
        guest.counts(5)?;
        let drafts = fs::read_dir(rekindle.state().join("tmp"))?.count();
        ensure!(drafts == 0, "{drafts} drafts are left");
        ensure!(rekindle.tells("snapshot ls --json")? == serde_json::json!([]));
        let names = fs::read_dir(rekindle.state().join("names"))?.count();
        ensure!(names == 0, "the name is taken");
    }
    drop(guest);
    rekindle.leaves_nothing()
}

fn full_at_a_start() -> anyhow::Result<()> {
    let rekindle = Rekindle::on_a_disk_of(Mib(48))?;
    rekindle.boots("original", &counter())?;
    rekindle.does("snapshot create original --name base")?;
    let originals = rekindle.processes()?;
    let guest = rekindle.guest(&counter())?;
    let ballast = rekindle.state().join("ballast");
    // To the last block, and with a little left: for a record, and not for a log, say.
    for left in [0, 4, 8, 12, 16, 24, 32, 48] {
        let free = rustix::fs::statvfs(rekindle.state())?;
        let size = (free.f_bavail * free.f_frsize).saturating_sub(left << 10);
        fs::write(&ballast, vec![1; usize::try_from(size)?])?;
        for (line, status) in [
            (format!("run {guest} --name full --detach"), 125),
            ("restore base --name full".to_owned(), 1),
            ("restore base --name full --backend file".to_owned(), 1),
        ] {
            let said = rekindle.tries(&line)?;
            let label = || format!("{left} KiB left: {said:?}");
            if said.status != Some(0) {
                let error = said.clone().refused(status).with_context(label)?;
                ensure!(error.contains("No space left"), "{}", label());
            }
            fs::remove_file(&ballast)?;
            let vms = rekindle.vms()?;
            ensure!(
                said.status == Some(0) || vms.len() == 1,
                "{}: {vms:?}",
                label()
            );
            if said.status == Some(0) {
                rekindle.does("rm --force full")?;
            }
            for (_, process) in rekindle.processes()? {
                let stays = originals.iter().any(|(_, original)| *original == process);
                ensure!(stays || process.ends(SOON)?, "{}: {process}", label());
            }
            let processes = rekindle.processes()?;
            ensure!(processes == originals, "{}: {processes:?}", label());
            fs::write(&ballast, vec![1; usize::try_from(size)?])?;
        }
        fs::remove_file(&ballast)?;
    }
    rekindle.follows("original")?.counts(5)?;
    rekindle.leaves_nothing()
}

/// A monitor that has no descriptor left for whoever asks, and then has one again.
fn out_of_descriptors(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("c", &counter())?;
    let mut found = rekindle.processes()?.into_iter();
    let monitor = found.find(|(role, _)| *role == Role::Monitor);
    let (_, monitor) = monitor.context("no monitor")?;
    let pid = Pid::from_raw(monitor.pid());
    let before = rustix::process::prlimit(pid, Resource::Nofile, none_left())?;
    let mut pause = rekindle.command("pause c").spawn()?;
    let log = rekindle.vm("c").join("monitor.log");
    let deadline = Instant::now() + SOON;
    while !fs::read_to_string(&log)?.contains("takes nobody") {
        ensure!(Instant::now() < deadline, "it took somebody");
        std::thread::sleep(Duration::from_millis(5));
    }
    rustix::process::prlimit(pid, Resource::Nofile, before)?;
    ensure!(wait_for(&mut pause, SOON)?.success());
    ensure!(rekindle.state_of("c")? == "paused");
    Ok(())
}

/// What is open stays open.
fn none_left() -> Rlimit {
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    Rlimit {
        current: Some(0),
        maximum,
    }
}

/// The guest would stand still for ever if nobody took its output any more.
fn full_while_it_prints() -> anyhow::Result<()> {
    let rekindle = Rekindle::on_a_disk_of(Mib(8))?;
    let talker = Counter {
        memory: Mib(32),
        pause: Ticks(100_000),
    };
    rekindle.boots("c", &talker.guest())?;
    rekindle.follows("c")?.counts(3)?;
    let ballast = rekindle.state().join("ballast");
    let full = fs::write(&ballast, vec![1; 16 << 20]);
    ensure!(full.is_err(), "the disk is not full");
    let room = rekindle.output("c")?.len();
    std::thread::sleep(Duration::from_millis(700));
    let stuck = rekindle.output("c")?.len();
    ensure!(stuck - room <= 4096, "{room} bytes grew to {stuck}");
    let vms = rekindle.vms()?;
    ensure!(vms[0]["state"] == "running", "{vms:?}");
    fs::remove_file(&ballast)?;
    let seen = rekindle.output("c")?.lines().count();
    let mut guest = rekindle.follows("c")?;
    for _ in 0..seen + 5 {
        guest.hears("\n")?;
    }
    drop(guest);
    rekindle.does("pause c")?;
    rekindle.does("stop c")?;
    rekindle.leaves_nothing()
}

/// What is only advice is no failure, and what runs is judged too.
fn recommendations(rekindle: &Rekindle) -> anyhow::Result<()> {
    let disk = rekindle.file("disk");
    fs::write(&disk, [0; 4096])?;
    let guest = rekindle.guest(&counter())?;
    let disk = disk.display();
    rekindle.does(&format!(
        "run {guest} --name slow --disk {disk}:ro,bw=1M --detach"
    ))?;
    let looks = |what: &str| -> anyhow::Result<(String, String)> {
        let findings = rekindle.tells("doctor --json")?;
        let mut findings = findings.as_array().context("a list")?.iter();
        let finding = findings.find(|finding| finding["what"] == what);
        let finding = finding.with_context(|| format!("nothing of {what}"))?;
        let is_advice = finding["verdict"] == "advice";
        ensure!(!is_advice || finding["remedy"].is_string(), "{finding}");
        let text = |field: &str| finding[field].as_str().unwrap_or_default().to_owned();
        Ok((text("verdict"), text("found")))
    };
    let swaps = fs::read_to_string("/proc/swaps")?.lines().count() > 1;
    ensure!(looks("swap")?.0 == if swaps { "advice" } else { "good" });
    ensure!(looks("disk rates")?.0 == "good");
    rekindle.does(&format!(
        "run {guest} --name fast --disk {disk}:ro --detach"
    ))?;
    let (verdict, found) = looks("disk rates")?;
    ensure!(verdict == "advice" && found.contains("fast"), "{found}");
    let said = rekindle.does("doctor")?;
    ensure!(said.contains("note  disk rates"), "{said}");
    Ok(())
}
