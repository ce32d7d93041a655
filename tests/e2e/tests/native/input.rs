//! What cannot work is refused before anything is made, with one error that names the thing and the reason.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rekindle_e2e::Rekindle;
use rekindle_kit::require::requires_linux_kvm;
use rekindle_kit::story::Story;

use crate::bare::counter;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a kernel that is none is refused", kernels),
        story(
            "a kernel with a flipped bit is refused or boots",
            a_flipped_kernel,
        ),
        story(
            "a Linux kernel is refused where it cannot run",
            a_linux_kernel,
        ),
        story("an image that is none is refused", images),
        story("memory and vCPUs out of range are refused", sizes),
        story("names that are taken or climb are refused", names),
        story("a network link that is none is refused", links),
        story("wrong usage is told with status 2", usage),
        story(
            "a standard error that takes nothing changes no status",
            unheard,
        ),
        story("facts are printed as JSON", json),
        story("a firecracker that is none is refused", firecrackers),
    ]
}

/// `run` refuses with its own status, names `thing`, and nothing was made.
fn run_refuses(rekindle: &Rekindle, line: &str, named: &[&str]) -> anyhow::Result<()> {
    for line in [
        format!("run {line}"),
        format!("run {line} --detach --name refused"),
    ] {
        let said = rekindle.tries(&line)?.refused(125)?;
        for thing in named {
            ensure!(
                said.contains(thing),
                "`{line}` does not name {thing:?}: {said}"
            );
        }
        ensure!(rekindle.vms()?.is_empty(), "`{line}` left a VM");
    }
    Ok(())
}

fn write(rekindle: &Rekindle, name: &str, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    let path = rekindle.file(name);
    fs::write(&path, bytes)?;
    Ok(path)
}

fn kernel(path: &Path) -> String {
    format!("--kernel {} --mem 32", path.display())
}

fn kernels(rekindle: &Rekindle) -> anyhow::Result<()> {
    run_refuses(
        rekindle,
        "--kernel /nonexistent/vmlinux",
        &["kernel", "/nonexistent/vmlinux"],
    )?;
    run_refuses(rekindle, "--kernel /tmp", &["kernel", "/tmp", "directory"])?;
    run_refuses(rekindle, "--kernel /dev/zero", &["kernel", "/dev/zero"])?;
    let whole = counter();
    let whole = whole.elf();
    let empty = write(rekindle, "empty-kernel", b"")?;
    run_refuses(
        rekindle,
        &kernel(&empty),
        &["kernel", "empty-kernel", "empty"],
    )?;
    for length in [1, 40, 100, whole.len() - 1] {
        let cut = write(rekindle, "cut-kernel", &whole[..length])?;
        run_refuses(rekindle, &kernel(&cut), &["kernel", "cut-kernel"])?;
    }
    let text = write(rekindle, "text-kernel", b"#!/bin/sh\necho no kernel\n")?;
    run_refuses(rekindle, &kernel(&text), &["kernel", "text-kernel", "ELF"])?;
    let mut arm = whole.to_vec();
    arm[18] = 183;
    let arm = write(rekindle, "arm-kernel", &arm)?;
    run_refuses(rekindle, &kernel(&arm), &["arm-kernel", "processor"])?;
    let good = write(rekindle, "good", whole)?;
    run_refuses(
        rekindle,
        &format!("{} --initrd /nonexistent/initrd", kernel(&good)),
        &["initrd", "/nonexistent/initrd"],
    )?;
    run_refuses(rekindle, "", &["no guest kernel", "rekindle setup"])
}

/// Each bit of the headers in turn would take long: every byte, one bit. What Firecracker takes has to run or to be
/// ended; what it refuses leaves nothing.
fn a_flipped_kernel(rekindle: &Rekindle) -> anyhow::Result<()> {
    let whole = counter();
    for (n, at) in (0..120).step_by(5).enumerate() {
        let mut flipped = whole.elf().to_vec();
        flipped[at] ^= 1 << (n % 8);
        let path = write(rekindle, "flipped", &flipped)?;
        let said = rekindle.tries(&format!("run {} --detach --name flipped", kernel(&path)))?;
        if said.status == Some(0) {
            rekindle.does("rm --force flipped")?;
        } else {
            let said = said.refused(125)?;
            ensure!(
                said.contains("kernel") || said.contains("firecracker"),
                "byte {at}: {said}"
            );
        }
        ensure!(rekindle.vms()?.is_empty(), "byte {at} left a VM");
    }
    Ok(())
}

fn a_linux_kernel(rekindle: &Rekindle) -> anyhow::Result<()> {
    let mut bzimage = vec![0; 4096];
    bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let bzimage = write(rekindle, "bzImage", &bzimage)?;
    run_refuses(rekindle, &kernel(&bzimage), &["bzImage", "vmlinux"])?;
    if requires_linux_kvm().is_ok() {
        // Here Linux runs.
        return Ok(());
    }
    let linux = write(rekindle, "vmlinux", &with_linux_note(counter().elf())?)?;
    run_refuses(
        rekindle,
        &kernel(&linux),
        &["paravirtual", "vmx", "cargo xtask lab"],
    )
}

/// The same program with one more program header, for a note that says `Linux`.
fn with_linux_note(elf: &[u8]) -> anyhow::Result<Vec<u8>> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    const NOTE: u32 = 4;
    let mut linux = elf.to_vec();
    ensure!(
        elf[56] == 1 && elf[32] == 64,
        "one program header, right behind the ELF header"
    );
    // Headers and note go to the end, where there is room.
    let table = linux.len().next_multiple_of(8);
    linux.resize(table, 0);
    linux.extend(&elf[HEADER..HEADER + PROGRAM_HEADER]);
    let mut note = vec![0; 20];
    note[0] = 6;
    note[4] = 0;
    note[8] = 1;
    note[12..17].copy_from_slice(b"Linux");
    let size = u64::try_from(note.len())?;
    let offset = u64::try_from(table + 2 * PROGRAM_HEADER)?;
    linux.extend(NOTE.to_le_bytes());
    linux.extend([0; 4]);
    for field in [offset, 0, 0, size, size, 4] {
        linux.extend(field.to_le_bytes());
    }
    linux.extend(note);
    linux[32..40].copy_from_slice(&u64::try_from(table)?.to_le_bytes());
    linux[56] = 2;
    Ok(linux)
}

fn images(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    let image = |image: &str| format!("{guest} --image {image}");
    run_refuses(
        rekindle,
        &image("/nonexistent/root.ext4"),
        &["/nonexistent/root.ext4"],
    )?;
    run_refuses(rekindle, &image("nosuchimage"), &["nosuchimage"])?;
    run_refuses(rekindle, &image(".."), &["\"..\""])?;
    run_refuses(rekindle, &image("/tmp"), &["/tmp", "directory"])?;
    let empty = write(rekindle, "empty-image", b"")?;
    run_refuses(
        rekindle,
        &image(&empty.display().to_string()),
        &["empty-image", "empty"],
    )?;
    let disk = format!("{guest} --disk /nonexistent/disk:ro");
    run_refuses(rekindle, &disk, &["/nonexistent/disk"])?;
    // Its contents are the guest's affair: a truncated or flipped one is a disk like any other.
    let half = write(rekindle, "half-image", &[0; 1000])?;
    let said = rekindle.tries(&format!(
        "run {} --detach --name half",
        image(&half.display().to_string())
    ))?;
    if said.status != Some(0) {
        said.refused(125)?;
        ensure!(rekindle.vms()?.is_empty(), "it left a VM");
    }
    Ok(())
}

fn sizes(rekindle: &Rekindle) -> anyhow::Result<()> {
    let path = write(rekindle, "counter", counter().elf())?;
    let sized =
        |mem: &str, vcpus: &str| format!("--kernel {} --mem {mem} --vcpus {vcpus}", path.display());
    run_refuses(rekindle, &sized("0", "1"), &["0 MiB"])?;
    run_refuses(rekindle, &sized("1000000", "1"), &["1000000 MiB"])?;
    run_refuses(rekindle, &sized("32", "0"), &["0 vCPUs", "1 to 32"])?;
    run_refuses(rekindle, &sized("32", "64"), &["64 vCPUs", "1 to 32"])?;
    for (mem, vcpus) in [
        ("-1", "1"),
        ("x", "1"),
        ("99999999999", "1"),
        ("32", "300"),
        ("32", "-1"),
    ] {
        let said = rekindle.tries(&format!("run {}", sized(mem, vcpus)))?;
        said.refused(2)?;
    }
    // 1 MiB has no room for the guest at 16 MiB: whoever refuses it names the reason.
    let said = rekindle
        .tries(&format!("run {} --detach", sized("1", "1")))?
        .refused(125)?;
    ensure!(said.contains("memory") || said.contains("emory"), "{said}");
    ensure!(rekindle.vms()?.is_empty());
    rekindle.does(&format!("run {} --detach --name two", sized("32", "2")))?;
    rekindle.follows("two")?.counts(3)?;
    Ok(())
}

fn names(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    rekindle.boots("taken", &counter())?;
    rekindle.follows("taken")?.counts(3)?;
    let said = rekindle
        .tries(&format!("run {guest} --name taken --detach"))?
        .refused(125)?;
    ensure!(
        said.contains("taken") && said.contains("rekindle rm taken"),
        "{said}"
    );
    rekindle.does("snapshot create taken --name base")?;
    let said = rekindle.refuses("snapshot create taken --name base")?;
    ensure!(said.contains("base"), "{said}");
    let said = rekindle.refuses("restore base --name taken")?;
    ensure!(said.contains("rekindle rm taken"), "{said}");
    rekindle.follows("taken")?.counts(5)?;

    for bad in [
        "..",
        "../x",
        "a/b",
        "/tmp/x",
        ".",
        "-x",
        "X",
        "x_y",
        "a.b",
        &"a".repeat(33),
    ] {
        for line in [
            format!("run {guest} --detach --name={bad}"),
            format!("pause -- {bad}"),
            format!("rm --force -- {bad}"),
            format!("snapshot create taken --name={bad}"),
        ] {
            rekindle.tries(&line)?.refused(2)?;
        }
        for line in [
            format!("restore base --name={bad}"),
            format!("restore base --count 2 --name={bad}"),
            format!("restore -- {bad}"),
            format!("snapshot inspect -- {bad}"),
            format!("snapshot rm -- {bad}"),
        ] {
            let said = rekindle.tries(&line)?.refused(1)?;
            ensure!(said.contains(bad), "`{line}`: {said}");
        }
    }
    for line in [
        "restore nosuch",
        "snapshot verify nosuch",
        "snapshot rm 0123456789abcdef",
    ] {
        let said = rekindle.refuses(line)?;
        ensure!(said.contains("there is no snapshot"), "{said}");
    }
    // One name of several is taken: none of the others is started.
    rekindle.does("restore base --name web-2 --paused")?;
    let said = rekindle.refuses("restore base --count 3 --name web")?;
    ensure!(said.contains("web-2"), "{said}");
    let vms = rekindle.vms()?;
    ensure!(vms.len() == 2, "{vms:?}");
    Ok(())
}

fn links(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    for (link, why) in [
        ("nosuchtap0", "no network link called nosuchtap0"),
        ("lo", "not a TAP"),
        ("a/b", "cannot be the name"),
        ("sixteen-letters-x", "cannot be the name"),
    ] {
        run_refuses(rekindle, &format!("{guest} --tap {link}"), &[link, why])?;
    }
    rekindle.boots("c", &counter())?;
    rekindle.does("snapshot create c --name base")?;
    let said = rekindle.refuses("restore base --tap tap0")?;
    ensure!(said.contains("0 network interfaces"), "{said}");
    let said = rekindle.refuses("restore base --tap eth0=tap0")?;
    ensure!(said.contains("eth0"), "{said}");
    let said = rekindle.refuses("restore base --name x --set-clock")?;
    ensure!(said.contains("1.16") || said.contains("1.14.4"), "{said}");
    ensure!(rekindle.vms()?.len() == 1);
    Ok(())
}

fn usage(rekindle: &Rekindle) -> anyhow::Result<()> {
    for line in [
        "",
        "fly",
        "run --nonsense",
        "run --mem",
        "pause",
        "restore",
        "restore x --count 0",
        "restore x --backend nfs",
        "snapshot",
        "snapshot create",
        "rm",
        "run --ttl 5parsecs --kernel x",
        "pager --socket x",
        "api",
    ] {
        let said = rekindle.tries(line)?.refused(2)?;
        ensure!(
            said.contains("Usage") || said.contains("error"),
            "`{line}`: {said}"
        );
    }
    for line in ["--help", "--version", "run --help"] {
        let out = rekindle.does(line)?;
        ensure!(out.lines().all(|line| line.chars().count() <= 79), "{out}");
    }
    Ok(())
}

fn unheard(rekindle: &Rekindle) -> anyhow::Result<()> {
    for (line, status) in [
        ("inspect nobody", 1),
        ("run --kernel nothing --detach", 125),
        ("ps", 0),
    ] {
        let full = File::options().write(true).open("/dev/full")?;
        let ended = rekindle.command(line).stderr(full).status()?;
        ensure!(ended.code() == Some(status), "`{line}` ended: {ended}");
    }
    Ok(())
}

fn json(rekindle: &Rekindle) -> anyhow::Result<()> {
    ensure!(rekindle.tells("ps --json")? == serde_json::json!([]));
    ensure!(rekindle.tells("snapshot ls --json")? == serde_json::json!([]));
    let guest = rekindle.guest(&counter())?;
    let record = rekindle.tells(&format!("run {guest} --name c --detach --json"))?;
    ensure!(
        record["name"] == "c" && record["state"] == "running",
        "{record}"
    );
    ensure!(record["timings"]["total_us"].as_u64() > Some(0), "{record}");
    let created = rekindle.tells("snapshot create c --name base --json")?;
    let copies = rekindle.tells("restore base --count 2 --name web --json")?;
    ensure!(copies.as_array().context("a list")?.len() == 2, "{copies}");
    ensure!(
        copies[1]["name"] == "web-2" && copies[1]["origin"]["restore"]["snapshot"] == created["id"]
    );
    ensure!(
        rekindle
            .tells("ps --json")?
            .as_array()
            .context("a list")?
            .len()
            == 3
    );
    ensure!(rekindle.tells("inspect c --json")?["id"] == record["id"]);
    ensure!(rekindle.tells("inspect c")?["id"] == record["id"]);
    ensure!(rekindle.tells("snapshot ls --json")?[0]["name"] == "base");
    ensure!(rekindle.tells("snapshot inspect base --json")?["id"] == created["id"]);
    ensure!(rekindle.tells("snapshot verify base --json")?["verified"][0] == created["id"]);
    rekindle.tells("gc --json")?;
    rekindle.does("stop c --grace 0")?;
    ensure!(rekindle.tells("wait c --json")?["state"] == "stopped");
    let doctor = rekindle.tries("doctor --json")?;
    serde_json::from_str::<serde_json::Value>(&doctor.out)
        .with_context(|| format!("{doctor:?}"))?;
    Ok(())
}

fn firecrackers(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    let text = write(rekindle, "firecracker-text", b"no program")?;
    let liar = write(rekindle, "firecracker-liar", b"#!/bin/sh\nexit 3\n")?;
    fs::set_permissions(&liar, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    let is_refused = |program: &Path, options: &str, why: &str| -> anyhow::Result<()> {
        let line = format!("run {guest} {options} --name c --detach");
        let mut command = rekindle.command(&line);
        command.env("REKINDLE_FIRECRACKER", program);
        let said = rekindle_e2e::finish(command, &line)?.refused(125)?;
        ensure!(said.contains(why), "{said}");
        ensure!(rekindle.vms()?.is_empty(), "{}", program.display());
        Ok(())
    };
    for (program, why) in [
        (
            Path::new("/nonexistent/firecracker"),
            "/nonexistent/firecracker",
        ),
        (Path::new("/tmp"), "/tmp"),
        (&text, "firecracker-text"),
        (&liar, "3"),
    ] {
        is_refused(program, "--no-jail", why)?;
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    // In a jail the jailer says it, and has to be able to.
    let other = write(rekindle, "vmm", b"no program")?;
    is_refused(&other, "", "--no-jail")?;
    is_refused(&text, "", "the jailer cannot start firecracker")
}
