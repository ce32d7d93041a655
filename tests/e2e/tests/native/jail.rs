//! Jailed VMs: what they are locked in, what goes in and out, and that nothing of it is left.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::Instant;

use anyhow::{Context, ensure};
use rekindle_e2e::{Rekindle, Role, SOON};
use rekindle_kit::processes::Process;
use rekindle_kit::require::{Skipped, requires_root};
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::bare::counter;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a jailed VM has a user, a root, process numbers and limits of its own",
            locked_in,
        ),
        story(
            "a page server has no right but to kill its VM, nor has its successor",
            no_rights,
        ),
        story(
            "snapshots go in and out of jails, with disks and diffs",
            in_and_out,
        ),
        story(
            "a jailed VM that is killed at any moment leaves nothing outside",
            killed,
        ),
        story(
            "what a jailed VM does to its disk is limited where that is asked for",
            host_io,
        ),
        story(
            "a link in a jail leads nobody out of it",
            links_lead_nowhere,
        ),
        story(
            "what cannot be jailed is said before anything is made",
            refusals,
        ),
    ]
}

/// What the kernel tells of a process, by field.
fn status(pid: i32) -> anyhow::Result<HashMap<String, String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    Ok(fields
        .map(|(name, value)| {
            (
                name.to_owned(),
                value.split_whitespace().collect::<Vec<_>>().join(" "),
            )
        })
        .collect())
}

fn nothing_outside(rekindle: &Rekindle) -> anyhow::Result<()> {
    let groups = rekindle.control_groups()?;
    ensure!(groups.is_empty(), "{groups:?}");
    let users = fs::read_dir(rekindle.state().join("uids"))?.count();
    ensure!(users == 0, "{users} users are taken");
    Ok(())
}

fn locked_in(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let guest = rekindle.guest(&counter())?;
    let mut users = Vec::new();
    for name in ["a", "b"] {
        rekindle.does(&format!("run {guest} --name {name} --detach"))?;
        rekindle.follows(name)?.hears("n=3\n")?;
        let record = rekindle.tells(&format!("inspect {name}"))?;
        let user = record["jailed_as"].as_u64().context("a user")?;
        let pid = i32::try_from(record["firecracker"]["pid"].as_u64().context("a pid")?)?;
        let status = status(pid)?;
        let same = vec![user.to_string(); 4].join(" ");
        ensure!(status["Uid"] == same && status["Gid"] == same, "{status:?}");
        ensure!(status["Groups"].is_empty(), "{status:?}");
        ensure!(status["CapEff"] == "0000000000000000", "{status:?}");
        ensure!(status["NSpid"] == format!("{pid} 1"), "{status:?}");
        // SIGPIPE stays blocked: a client that hangs up must not cost the guest.
        let blocked = u64::from_str_radix(&status["SigBlk"], 16)?;
        ensure!(blocked >> (13 - 1) & 1 == 1, "{status:?}");
        // Upstream's filters, once the guest runs.
        ensure!(status["Seccomp"] == "2", "{status:?}");
        // It has no interface, so there is none to be seen.
        let links = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        let links: Vec<&str> = links.lines().skip(2).collect();
        ensure!(links.len() == 1 && links[0].contains("lo:"), "{links:?}");
        let (inside, jail) = (
            fs::metadata(format!("/proc/{pid}/root"))?,
            fs::metadata(rekindle.vm(name).join("jail"))?,
        );
        ensure!((inside.dev(), inside.ino()) == (jail.dev(), jail.ino()));
        // Beside it there is nothing of ours: what it sees is what it was given.
        let seen: Vec<_> = fs::read_dir(format!("/proc/{pid}/root"))?
            .flatten()
            .collect();
        ensure!(seen.iter().all(|entry| entry.file_name() != "record.json"));
        let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let limit = |name: &str| limits.lines().find(|line| line.starts_with(name));
        let files = limit("Max open files").context("a limit")?;
        ensure!(files.contains("2048"), "{files}");
        let size = limit("Max file size").context("a limit")?;
        ensure!(!size.contains("unlimited"), "{size}");
        limited(rekindle, name, pid)?;
        users.push(user);
    }
    ensure!(users[0] != users[1], "both are {}", users[0]);
    rekindle.does("rm --force a b")?;
    nothing_outside(rekindle)
}

/// Each controller that this host has holds the VM's process in a group of its own, with a limit.
fn limited(rekindle: &Rekindle, name: &str, pid: i32) -> anyhow::Result<()> {
    let noted = fs::read_to_string(rekindle.vm(name).join("cgroups"))?;
    ensure!(!noted.is_empty(), "this host has no control groups");
    let mut limits = 0;
    for group in noted.lines() {
        let held = fs::read_to_string(format!("{group}/cgroup.procs"))?;
        // Beside it may be the kernel's own threads that work for this VM.
        let pid = pid.to_string();
        ensure!(held.lines().any(|line| line == pid), "{group}: {held}");
        for file in [
            "pids.max",
            "memory.max",
            "memory.limit_in_bytes",
            "cpu.max",
            "cpu.cfs_quota_us",
        ] {
            let Ok(limit) = fs::read_to_string(format!("{group}/{file}")) else {
                continue;
            };
            let first = limit.split_whitespace().next().context("a limit")?;
            let number: u64 = first
                .parse()
                .with_context(|| format!("{group}/{file}: {limit}"))?;
            ensure!(number > 0 && number < 1 << 40, "{group}/{file}: {limit}");
            limits += 1;
        }
    }
    ensure!(limits >= 3, "{noted}: {limits} limits");
    Ok(())
}

fn host_io(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let guest = rekindle.guest(&counter())?;
    let limit = "--host-io bw=5M,iops=100";
    let run = format!("run {guest} {limit} --name a --detach");
    let said = rekindle.tries(&run)?;
    if said.err.contains("is on no single disk") {
        return Err(Skipped::Disk.into());
    }
    ensure!(said.status == Some(0), "{said:?}");
    rekindle.does("snapshot create a --name s")?;
    rekindle.does(&format!("restore s {limit} --name b"))?;
    rekindle.does("restore s --name c")?;
    for name in ["a", "b"] {
        let set = throttled(rekindle, name)?;
        ensure!(!set.is_empty(), "{name} is not limited");
        for limit in &set {
            ensure!(
                limit.contains("5242880") || limit.ends_with(" 100"),
                "{set:?}"
            );
        }
    }
    ensure!(throttled(rekindle, "c")?.is_empty());
    let said = rekindle.refuses(&format!("restore s {limit} --no-jail --name d"))?;
    ensure!(said.contains("--host-io takes a jail"), "{said}");
    rekindle.does("rm --force a b c")?;
    nothing_outside(rekindle)
}

/// What the control groups of a VM say of disks, in either version.
fn throttled(rekindle: &Rekindle, name: &str) -> anyhow::Result<Vec<String>> {
    let noted = fs::read_to_string(rekindle.vm(name).join("cgroups"))?;
    let files = [
        "io.max",
        "blkio.throttle.read_bps_device",
        "blkio.throttle.write_bps_device",
        "blkio.throttle.read_iops_device",
        "blkio.throttle.write_iops_device",
    ];
    let paths = noted
        .lines()
        .flat_map(|group| files.map(|file| format!("{group}/{file}")));
    let texts = paths.filter_map(|path| fs::read_to_string(path).ok());
    Ok(texts
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect())
}

fn no_rights(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let guest = rekindle.guest(&counter())?;
    rekindle.does(&format!("run {guest} --name base --detach"))?;
    rekindle.follows("base")?.hears("n=3\n")?;
    rekindle.does("snapshot create base --name s")?;
    rekindle.does("rm --force base")?;
    for jail in ["", "--no-jail"] {
        rekindle.does(&format!("restore s {jail} --name copy"))?;
        let first = rekindle.one(Role::Pager)?;
        has_no_rights(rekindle, first.pid())?;
        first.kill(SOON)?;
        rekindle.follows("copy")?.hears("n=")?;
        let deadline = Instant::now() + SOON;
        let next = loop {
            match rekindle.one(Role::Pager) {
                Ok(next) if next.pid() != first.pid() => break next,
                _ => ensure!(Instant::now() < deadline, "it has no successor"),
            }
        };
        while rekindle.tells("inspect copy")?["pager"]["takeovers"] != 1 {
            ensure!(Instant::now() < deadline, "its successor does not serve");
        }
        has_no_rights(rekindle, next.pid())?;
        rekindle.does("stop copy --grace 0")?;
        let left = fs::read(rekindle.vm("copy").join("pager.json"))?;
        let left: Value = serde_json::from_slice(&left)?;
        ensure!(left["ended"]["how"] == "vm_exited", "{left}");
        rekindle.does("rm copy")?;
    }
    nothing_outside(rekindle)
}

fn has_no_rights(rekindle: &Rekindle, pager: i32) -> anyhow::Result<()> {
    let firecracker = status(rekindle.one(Role::Firecracker)?.pid())?;
    let user = 1_904_000_000 + pager;
    // It is told once the handshake is had, and confined a moment before.
    let deadline = Instant::now() + SOON;
    let by = loop {
        let known = rekindle.tells("inspect copy")?;
        if known["pager"]["confinement"]["user"] == user {
            break known["pager"]["confinement"].clone();
        }
        ensure!(Instant::now() < deadline, "{}", known["pager"]);
    };
    ensure!(by["seccomp"] == true, "{by}");
    let status = status(pager)?;
    let same = vec![user.to_string(); 4].join(" ");
    ensure!(status["Uid"] == same && status["Gid"] == same, "{status:?}");
    ensure!(status["Uid"] != firecracker["Uid"]);
    ensure!(status["Groups"].is_empty(), "{status:?}");
    // CAP_KILL.
    ensure!(status["CapEff"] == "0000000000000020", "{status:?}");
    ensure!(status["CapPrm"] == status["CapEff"], "{status:?}");
    ensure!(status["NoNewPrivs"] == "1", "{status:?}");
    ensure!(status["Seccomp"] == "2", "{status:?}");
    Ok(())
}

fn in_and_out(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let guest = rekindle.guest(&counter())?;
    let (own, read) = (rekindle.file("own"), rekindle.file("read"));
    fs::write(&own, [7; 64 << 10])?;
    fs::write(&read, [8; 64 << 10])?;
    rekindle.does(&format!(
        "run {guest} --track-dirty-pages --disk {} --disk {}:ro --name first --detach",
        own.display(),
        read.display(),
    ))?;
    rekindle.follows("first")?.hears("n=3\n")?;
    rekindle.does("snapshot create first --name full")?;
    rekindle.does("snapshot create first --diff --name diff")?;
    rekindle.does("rm --force first")?;
    for snapshot in ["full", "diff"] {
        rekindle.does(&format!("snapshot verify {snapshot}"))?;
    }
    // A file that was lent to a jail is root's again.
    for entry in fs::read_dir(rekindle.state().join("snapshots"))? {
        for file in ["memory", "vmstate"] {
            let meta = fs::metadata(entry.as_ref().ok().context("a snapshot")?.path().join(file))?;
            ensure!((meta.uid(), meta.nlink()) == (0, 1), "{entry:?} {file}");
        }
    }
    for (snapshot, options) in [
        ("full", ""),
        ("diff", ""),
        ("diff", "--no-jail"),
        ("full", "--backend file"),
        ("diff", "--backend file"),
    ] {
        rekindle.does(&format!("restore {snapshot} {options} --name copy"))?;
        let mut listener = rekindle.follows("copy")?;
        listener.hears("n=")?;
        let drives = rekindle.open_drives("copy")?;
        ensure!(drives == ["disk0"], "{snapshot} {options}: {drives:?}");
        // A jail's copy is the beginning of another's.
        rekindle.does("snapshot create copy --name again")?;
        rekindle.does("rm --force copy")?;
        rekindle.does("restore again --name copy")?;
        rekindle.follows("copy")?.hears("n=")?;
        rekindle.does("rm --force copy")?;
        rekindle.does("snapshot rm again")?;
    }
    nothing_outside(rekindle)
}

fn killed(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let guest = rekindle.guest(&counter())?;
    rekindle.does(&format!("run {guest} --name base --detach"))?;
    rekindle.does("snapshot create base --name s")?;
    rekindle.does("rm --force base")?;
    for roles in [
        &[Role::Firecracker][..],
        &[Role::Monitor],
        &[Role::Pager],
        &[Role::Keeper, Role::Monitor, Role::Pager, Role::Firecracker],
    ] {
        rekindle.does("restore s --name copy")?;
        for role in roles {
            rekindle.one(*role)?.kill(rekindle_e2e::SOON)?;
        }
        let said = rekindle.tries("ps")?;
        // What nobody was left to look after is for `gc`.
        let is_for_gc = roles.contains(&Role::Keeper);
        ensure!(said.err.contains("rekindle gc") == is_for_gc, "{said:?}");
        rekindle.does("rm --force copy")?;
        nothing_outside(rekindle)?;
    }
    // Somebody removes a directory by hand: what is outside it is found all the same.
    rekindle.does("restore s --name copy")?;
    for role in [Role::Keeper, Role::Monitor, Role::Pager, Role::Firecracker] {
        rekindle.one(role)?.kill(rekindle_e2e::SOON)?;
    }
    fs::remove_dir_all(rekindle.vm("copy"))?;
    let found = rekindle.does("gc --dry-run")?;
    ensure!(
        found.contains("user ") && found.contains("control group "),
        "{found}"
    );
    rekindle.does("gc")?;
    nothing_outside(rekindle)
}

/// As if a guest had got hold of its Firecracker, and of more than its filters let it do.
fn links_lead_nowhere(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let guest = rekindle.guest(&counter())?;
    for name in ["mine", "yours"] {
        rekindle.does(&format!("run {guest} --vsock 3 --name {name} --detach"))?;
    }
    let jail = rekindle.vm("mine").join("jail");
    for socket in ["v.sock", "api.sock"] {
        fs::remove_file(jail.join(socket))?;
        let yours = fs::canonicalize(rekindle.vm("yours").join("jail"))?.join(socket);
        symlink(yours, jail.join(socket))?;
    }
    let said = rekindle.tries("exec mine -- true")?;
    ensure!(
        said.status == Some(125) && said.err.contains("it is a link"),
        "{said:?}"
    );
    // Nor does a new monitor take another's Firecracker for its own.
    let of_mine = |(role, process): &(Role, Process)| {
        *role == Role::Monitor && process.command().contains("mine")
    };
    let monitor = rekindle
        .processes()?
        .into_iter()
        .find(of_mine)
        .context("a monitor")?
        .1;
    monitor.kill(rekindle_e2e::SOON)?;
    let said = rekindle.tries("pause mine")?;
    ensure!(said.status != Some(0), "{said:?}");
    ensure!(rekindle.state_of("yours")? == "running");
    rekindle.does("rm --force mine yours")?;
    nothing_outside(rekindle)
}

fn refusals(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let guest = rekindle.guest(&counter())?;
    let with = |variable: &str, value: &str| -> anyhow::Result<String> {
        let mut command = rekindle.command(&format!("run {guest} --name no --detach"));
        command.env(variable, value);
        rekindle_e2e::finish(command, "run")?.refused(125)
    };
    let said = with("REKINDLE_JAILER", "/nowhere")?;
    ensure!(
        said.contains("REKINDLE_JAILER") && said.contains("/nowhere"),
        "{said}"
    );
    let said = with("REKINDLE_JAIL_UIDS", "0-5")?;
    ensure!(
        said.contains("REKINDLE_JAIL_UIDS") && said.contains("0-5"),
        "{said}"
    );
    // A jailer that is none says so itself.
    let said = with("REKINDLE_JAILER", "/bin/false")?;
    ensure!(said.contains("died before its API answered"), "{said}");
    ensure!(rekindle.vms()?.is_empty());
    nothing_outside(rekindle)
}
