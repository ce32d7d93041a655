//! A guest counts aloud: it stands still when it is paused, and each copy goes on from the same number.

use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_e2e::{Rekindle, Role, SOON, finish, sequence};
use rekindle_kit::story::Story;

use crate::bare::counter;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a paused guest stands still and a resumed one goes on",
            pause_and_resume,
        ),
        story("a snapshot leaves a VM as it was", as_it_was),
        story("three copies count on from the same number", three_copies),
        story("a diff restores to the later number", the_later_number),
        story("a copy that is restored paused waits", restored_paused),
        story(
            "a VM outlives the shell that started it",
            outlives_the_shell,
        ),
        story(
            "a VM does not hold on to the directory it was started in",
            holds_no_directory,
        ),
        story("what a VM's state forbids is refused", what_is_forbidden),
    ]
}

fn pause_and_resume(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("c", &counter())?;
    rekindle.follows("c")?.hears("n=5\n")?;
    for _ in 0..2 {
        rekindle.does("pause c")?;
        // Asked again, it is so already.
        rekindle.does("pause c")?;
        ensure!(rekindle.state_of("c")? == "paused");
        let still = rekindle.last_output("c")?;
        let (_, last) = sequence(&still)?;
        rekindle.does("resume c")?;
        rekindle.does("resume c")?;
        ensure!(rekindle.state_of("c")? == "running");
        let (first, _) = rekindle.follows("c")?.counts(usize::try_from(last)? + 3)?;
        ensure!(first == 1, "it began anew at {first}");
    }
    Ok(())
}

fn as_it_was(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("c", &counter())?;
    let mut guest = rekindle.follows("c")?;
    guest.counts(3)?;
    let answer = rekindle.tells("snapshot create c --name running --json")?;
    ensure!(answer["paused_us"].as_u64() > Some(0), "{answer}");
    ensure!(
        answer["total_us"].as_u64() >= answer["paused_us"].as_u64(),
        "{answer}"
    );
    ensure!(rekindle.state_of("c")? == "running");
    guest.counts(3)?;

    rekindle.does("pause c")?;
    rekindle.last_output("c")?;
    let answer = rekindle.tells("snapshot create c --name paused --json")?;
    ensure!(answer["paused_us"] == 0, "{answer}");
    ensure!(rekindle.state_of("c")? == "paused");
    rekindle.last_output("c")?;
    let said = rekindle.refuses("snapshot create c --name paused")?;
    ensure!(said.contains("paused"), "{said}");
    ensure!(rekindle.state_of("c")? == "paused");
    rekindle.does("resume c")?;
    let (first, _) = rekindle.follows("c")?.counts(10)?;
    ensure!(first == 1);
    Ok(())
}

fn three_copies(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &counter())?;
    rekindle.follows("original")?.counts(5)?;
    rekindle.does("pause original")?;
    let counted = rekindle.last_output("original")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("stop original --grace 0")?;
    ensure!(rekindle.state_of("original")? == "stopped");

    let said = rekindle.does("restore base --count 3 --name web")?;
    ensure!(said.lines().count() == 3, "{said}");
    for copy in ["web-1", "web-2", "web-3"] {
        rekindle.follows(copy)?.counts(5)?;
        let all = counted.clone() + &rekindle.output(copy)?;
        let (first, last) = sequence(&all)?;
        ensure!(
            first == 1 && last > sequence(&counted)?.1,
            "{copy}: {all:?}"
        );
    }
    // Each has a page server and keepers of its own, and the original has none any more.
    let mut roles: Vec<Role> = rekindle
        .processes()?
        .into_iter()
        .map(|(role, _)| role)
        .collect();
    roles.sort_unstable();
    let each = [Role::Keeper, Role::Monitor, Role::Firecracker, Role::Pager];
    let expected: Vec<Role> = each.into_iter().flat_map(|role| [role; 3]).collect();
    ensure!(roles == expected, "{roles:?}");
    ensure!(rekindle.vms()?.len() == 4);
    let said = rekindle.refuses("snapshot rm base")?;
    ensure!(said.contains("base") || said.contains("in use"), "{said}");
    rekindle.does("rm original")?;
    rekindle.does("stop web-2 --grace 0")?;
    rekindle.follows("web-1")?.counts(10)?;
    Ok(())
}

fn the_later_number(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &counter())?;
    rekindle.follows("original")?.counts(3)?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.follows("original")?.counts(20)?;
    rekindle.does("pause original")?;
    let counted = rekindle.last_output("original")?;
    rekindle.does("snapshot create original --name later --diff")?;
    rekindle.does("rm --force original")?;
    for backend in ["uffd", "file"] {
        rekindle.does(&format!(
            "restore later --name {backend} --backend {backend}"
        ))?;
        rekindle.follows(backend)?.counts(5)?;
        let all = counted.clone() + &rekindle.output(backend)?;
        ensure!(sequence(&all)?.0 == 1, "{all:?}");
    }
    Ok(())
}

fn restored_paused(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &counter())?;
    rekindle.follows("original")?.counts(3)?;
    rekindle.does("snapshot create original --name base")?;
    for backend in ["uffd", "file"] {
        let copies = rekindle.tells(&format!(
            "restore base --name {backend} --backend {backend} --paused --json"
        ))?;
        ensure!(copies[0]["state"] == "paused", "{copies}");
        let said = rekindle.last_output(backend)?;
        ensure!(said.is_empty(), "{said:?}");
        rekindle.does(&format!("resume {backend}"))?;
        rekindle.follows(backend)?.counts(5)?;
    }
    Ok(())
}

/// The shell leads a session, and the whole of it is hung up when it ends, as when a terminal closes.
fn outlives_the_shell(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    let program = rekindle.program().display().to_string();
    let in_a_session = |script: String| {
        let mut shell = rekindle.other("setsid");
        // Whoever runs this test may ignore the signal, which children inherit.
        shell.args(["--wait", "env", "--default-signal=HUP", "sh", "-c", &script]);
        finish(shell, &script)
    };
    let said = in_a_session(format!(
        "{program} run {guest} --name c --detach && kill -HUP 0 && sleep 60"
    ))?;
    ensure!(said.out == "c\n", "{said:?}");
    rekindle.follows("c")?.counts(5)?;
    rekindle.does("snapshot create c --name base")?;
    in_a_session(format!(
        "{program} restore base --name copy && kill -HUP 0 && sleep 60"
    ))?;
    rekindle.follows("copy")?.counts(5)?;
    for (_, process) in rekindle.processes()? {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()))?;
        let terminal = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(4));
        ensure!(
            terminal == Some("0"),
            "{process} has the terminal {terminal:?}"
        );
    }
    std::thread::sleep(Duration::from_millis(100));
    ensure!(rekindle.state_of("c")? == "running");
    ensure!(rekindle.state_of("copy")? == "running");
    Ok(())
}

/// All paths that are given are relative to it.
fn holds_no_directory(rekindle: &Rekindle) -> anyhow::Result<()> {
    let place = rekindle.file("elsewhere");
    std::fs::create_dir(&place)?;
    counter().write(&place.join("counter"))?;
    std::fs::write(place.join("disk"), [0; 4096])?;
    let line = "run --name c --detach --mem 32 --kernel ./counter --disk disk";
    let mut run = rekindle.command(line);
    run.current_dir(&place)
        .env("REKINDLE_ROOT", "../state")
        .env("REKINDLE_FIRECRACKER", "./firecracker");
    std::os::unix::fs::symlink(rekindle.firecracker(), place.join("firecracker"))?;
    finish(run, line)?.done()?;
    rekindle.follows("c")?.counts(2)?;
    for (role, process) in rekindle.processes()? {
        let cwd = std::fs::read_link(format!("/proc/{}/cwd", process.pid()))?;
        ensure!(!cwd.starts_with(&place), "{role:?} is in {}", cwd.display());
    }
    // Who looks after it when its monitor is dead was started there as well.
    let mut found = rekindle.processes()?.into_iter();
    let monitor = found.find(|(role, _)| *role == Role::Monitor);
    monitor.context("no monitor")?.1.kill(SOON)?;
    rekindle.does("pause c")?;
    Ok(())
}

fn what_is_forbidden(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("c", &counter())?;
    let said = rekindle.refuses("rm c")?;
    ensure!(
        said.contains("running") && said.contains("--force"),
        "{said}"
    );
    rekindle.does("stop c --grace 0")?;
    rekindle.does("stop c")?;
    for verb in ["pause", "resume", "snapshot create"] {
        let said = rekindle.refuses(&format!("{verb} c"))?;
        ensure!(said.contains("the VM is stopped"), "{said}");
    }
    let record = rekindle.tells("inspect c --json")?;
    ensure!(
        record["state"] == "stopped" && record["ended"].is_string(),
        "{record}"
    );
    ensure!(record.get("firecracker").is_none(), "{record}");
    // It may have had nothing to say.
    rekindle.does("logs c --vmm")?;
    rekindle.does("rm c")?;
    for verb in [
        "pause",
        "resume",
        "stop",
        "rm",
        "rm --force",
        "inspect",
        "logs",
        "wait",
        "snapshot create",
    ] {
        let said = rekindle.refuses(&format!("{verb} c"))?;
        ensure!(said.contains("no VM is called c"), "{verb}: {said}");
    }
    let first = rekindle.vms()?.first().cloned();
    ensure!(first.is_none(), "{}", first.context("nothing")?);
    Ok(())
}
