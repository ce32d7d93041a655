//! Copies that wake up as somebody else, and guests that stand still for a snapshot.

use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use rekindle_e2e::{Role, SOON, until, wait_for};
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::console::Linux;
use crate::story;

/// What the clocks of host and guest may differ by, in seconds; the lab is slow.
const SECONDS: u64 = 5;

/// A hook that tells that it ran, and for whom; not with which secret.
const HOOK: &str = "mkdir -p /etc/rekindle/wake.d && cd /etc/rekindle/wake.d && \
    printf '#!/bin/sh\\necho $REKINDLE_VM_NAME ${SECRET:+knows} > /hooked\\n' > 10-tell && \
    printf '#!/bin/sh\\necho broken >&2; exit 3\\n' > 20-fails && chmod 755 * && \
    echo 00000000000000000000000000000000 > /etc/machine-id";

/// Counts on the disk, and writes down where.
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo $n > /n.new; mv /n.new /n; \
    read h < /proc/sys/kernel/hostname; echo $h > /h.new; mv /h.new /h; sleep 0.1; done";

/// Makes, fills, renames and removes files without a pause.
const WRITE: &str = "mkdir /w; n=0; while :; do n=$((n+1)); head -c 50000 /dev/urandom > /w/new; \
    mv /w/new /w/$((n % 20)); echo $n > /w/n.new; mv /w/n.new /w/n; done";

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "two copies share neither random numbers, names nor environment, and know the time",
            two_copies,
        ),
        story(
            "a copy whose monitor is killed while it wakes up is woken by the next one",
            killed_while_waking,
        ),
        story(
            "the file system of a guest that writes all the time is whole in a snapshot",
            stands_still,
        ),
        story(
            "an agent that is stopped holds up neither a snapshot nor a restore",
            stopped_agent,
        ),
        story(
            "a console that a snapshot cuts off in the middle of a text goes on in the copy",
            console_goes_on,
        ),
    ]
}

/// Runs a shell line through the agent, and returns what it prints.
fn sh(linux: &Linux, vm: &str, line: &str) -> anyhow::Result<String> {
    let output = exec(linux, vm, line).output()?;
    ensure!(output.status.success(), "{vm}: {line}: {output:?}");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn exec(linux: &Linux, vm: &str, line: &str) -> Command {
    linux
        .rekindle
        .command_of(["exec", vm, "--", "sh", "-c", line])
}

/// A program in a guest, and its caller; it is killed when this is dropped.
struct Running(Child);

impl Running {
    fn start(linux: &Linux, vm: &str, line: &str) -> anyhow::Result<Running> {
        let mut command = exec(linux, vm, line);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Running(command.spawn()?))
    }

    fn goes_on(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn number(linux: &Linux, vm: &str, file: &str) -> anyhow::Result<u64> {
    let said = sh(linux, vm, &format!("cat {file}"))?;
    said.parse().with_context(|| format!("{vm} said {said:?}"))
}

fn grows(linux: &Linux, vm: &str, file: &str) -> anyhow::Result<()> {
    let before = number(linux, vm, file)?;
    until(&format!("{vm} writes {file}"), || {
        Ok(number(linux, vm, file)? > before)
    })
}

fn waking(linux: &Linux, vm: &str) -> anyhow::Result<Value> {
    let record = linux.rekindle.tells(&format!("inspect {vm}"))?;
    Ok(record["waking"].clone())
}

fn now() -> anyhow::Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

fn two_copies(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("base", "")?;
    sh(linux, "base", HOOK)?;
    sh(linux, "base", "date -s 200102030405")?;
    let mut counts = Running::start(linux, "base", COUNT)?;
    until("it counts", || Ok(sh(linux, "base", "ls /n").is_ok()))?;
    linux.rekindle.does("snapshot create base --name base")?;
    let random = "head -c 16 /dev/urandom | od -An -tx1";
    let mut drawn = vec![sh(linux, "base", random)?];
    grows(linux, "base", "/n")?;
    ensure!(counts.goes_on()?, "the original lost its program");

    for copy in ["copy-1", "copy-2"] {
        let secret = format!("swordfish-of-{copy}");
        let said = linux.rekindle.tries(&format!(
            "restore base --name {copy} --env SECRET={secret} --wake-within 60s"
        ))?;
        ensure!(
            said.err.contains("20-fails ended with status 3: broken"),
            "{said:?}"
        );
        said.done()?;
        let told = waking(linux, copy)?;
        ensure!(told["is"] == "woken", "{told}");
        ensure!(told["orphans"][0]["ends_after_ms"] == 10_000, "{told}");
        let pid = &told["orphans"][0]["pid"];
        until("its fate meets it", || {
            Ok(sh(linux, copy, &format!("[ ! -e /proc/{pid} ]")).is_ok())
        })?;
        // Until then it went on.
        ensure!(sh(linux, copy, "cat /h")? == copy);
        let theirs: u64 = sh(linux, copy, "date +%s")?.parse()?;
        let off = now()?.abs_diff(theirs);
        ensure!(off <= SECONDS, "{copy} is {off} s off");
        ensure!(sh(linux, copy, "hostname; cat /etc/hostname")? == format!("{copy}\n{copy}"));
        ensure!(sh(linux, copy, "echo $SECRET")? == secret);
        ensure!(sh(linux, copy, "cat /hooked")? == format!("{copy} knows"));
        drawn.push(sh(linux, copy, random)?);
        drawn.push(sh(linux, copy, "cat /etc/machine-id")?);
    }
    let all = drawn.len();
    drawn.sort();
    drawn.dedup();
    ensure!(drawn.len() == all, "something is the same twice: {drawn:?}");
    ensure!(sh(linux, "base", "echo ${SECRET:-none}; hostname")? == "none\nrekindle");
    let found = Command::new("grep")
        .args(["-rl", "--devices=skip", "swordfish"])
        .arg(linux.rekindle.state())
        .output()?;
    ensure!(
        found.stdout.is_empty(),
        "the secret is on a disk: {found:?}"
    );
    let said = linux
        .rekindle
        .does("restore base --name asleep --no-wake")?;
    ensure!(sh(linux, "asleep", "hostname")? == "rekindle", "{said}");
    Ok(())
}

fn killed_while_waking(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("base", "")?;
    let slow = "mkdir -p /etc/rekindle/wake.d && cd /etc/rekindle/wake.d && \
        printf '#!/bin/sh\\necho x >> /hooked; sleep 5\\n' > slow && chmod 755 slow";
    sh(linux, "base", slow)?;
    linux.rekindle.does("snapshot create base --name base")?;
    linux.rekindle.does("rm --force base")?;
    let mut restore = linux
        .rekindle
        .command("restore base --name copy --env SECRET=swordfish --wake-within 60s")
        .spawn()?;
    until("it is being woken up", || {
        let text = std::fs::read(linux.rekindle.vm("copy").join("record.json"));
        let record: Value = serde_json::from_slice(&text.unwrap_or_default()).unwrap_or_default();
        Ok(record["state"] == "running" && record["waking"]["is"] == "due")
    })?;
    linux.rekindle.one(Role::Monitor)?.kill(SOON)?;
    ensure!(wait_for(&mut restore, SOON)?.success(), "it was given up");
    let told = waking(linux, "copy")?;
    ensure!(told["is"] == "woken" && told["problem"].is_null(), "{told}");
    ensure!(sh(linux, "copy", "echo $SECRET; cat /hooked")? == "swordfish\nx");
    Ok(())
}

fn stands_still(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("base", "")?;
    let mut writes = Running::start(linux, "base", WRITE)?;
    until("it writes", || Ok(sh(linux, "base", "ls /w/19").is_ok()))?;
    for (name, quiesce) in [("still", "30"), ("torn", "off")] {
        linux.rekindle.does(&format!(
            "snapshot create base --name {name} --quiesce {quiesce}"
        ))?;
        // Whoever stood still goes on.
        grows(linux, "base", "/w/n")?;
        ensure!(writes.goes_on()?, "the original lost its program");
    }
    let manifest = linux.rekindle.tells("snapshot inspect still")?;
    let notes = manifest["notes"].as_str().context("notes")?;
    ensure!(notes.starts_with("frozen: /"), "{notes}");
    ensure!(
        !needs_recovery(linux, "still")?,
        "its journal must be replayed"
    );
    fsck(linux, "still")?;
    // Which shows that the guest wrote, and that the difference can be seen.
    ensure!(needs_recovery(linux, "torn")?, "it stood still by itself");
    linux
        .rekindle
        .does("restore still --name copy --wake-within 60s")?;
    sh(linux, "copy", "echo written > /after && sync")?;
    Ok(())
}

fn disk(linux: &Linux, snapshot: &str) -> anyhow::Result<std::path::PathBuf> {
    let manifest = linux
        .rekindle
        .tells(&format!("snapshot inspect {snapshot}"))?;
    let id = manifest["id"].as_str().context("an id")?;
    let drives = manifest["devices"]["drives"].as_array();
    let mut written = drives.into_iter().flatten();
    let file = written.find_map(|drive| drive["backing"]["file"].as_str());
    let file = file.context("a disk that is written")?;
    Ok(linux.rekindle.state().join("snapshots").join(id).join(file))
}

fn needs_recovery(linux: &Linux, snapshot: &str) -> anyhow::Result<bool> {
    let said = Command::new("dumpe2fs")
        .arg("-h")
        .arg(disk(linux, snapshot)?)
        .output()?;
    ensure!(said.status.success(), "{said:?}");
    Ok(String::from_utf8_lossy(&said.stdout).contains("needs_recovery"))
}

fn fsck(linux: &Linux, snapshot: &str) -> anyhow::Result<()> {
    let said = Command::new("e2fsck")
        .arg("-fn")
        .arg(disk(linux, snapshot)?)
        .output()?;
    ensure!(said.status.code() == Some(0), "{said:?}");
    Ok(())
}

fn stopped_agent(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("base", "")?;
    // The parent of what it runs is the agent.
    let pid = sh(linux, "base", "echo $PPID")?;
    linux.types("base", &format!("kill -STOP {pid}\n"))?;
    let state = format!("cut -d' ' -f3 /proc/{pid}/stat");
    ensure!(linux.asks("base", &state)? == "T", "it was not stopped");
    linux
        .rekindle
        .does("snapshot create base --name base --quiesce 1")?;
    let manifest = linux.rekindle.tells("snapshot inspect base")?;
    let notes = manifest["notes"].as_str().context("notes")?;
    ensure!(notes.contains("no answer within 1s"), "{notes}");
    let said = linux
        .rekindle
        .tries("restore base --name copy --wake-within 2s")?;
    ensure!(said.err.contains("no answer within 2s"), "{said:?}");
    said.done()?;
    let told = waking(linux, "copy")?;
    ensure!(told["is"] == "unanswered", "{told}");
    ensure!(linux.asks("copy", "echo it runs")? == "it runs");
    let said = linux
        .rekindle
        .refuses("restore base --name strict --wake-within 2s --must-wake")?;
    ensure!(said.contains("strict: it was not woken up"), "{said}");
    ensure!(linux.rekindle.state_of("strict")? == "running");
    Ok(())
}

fn console_goes_on(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("base", "")?;
    linux.types(
        "base",
        &format!("yes {} | head -c 40000\n", "words".repeat(16)),
    )?;
    linux.rekindle.follows("base")?.hears("words\r\nwords")?;
    linux.rekindle.does("snapshot create base --name talking")?;
    linux.rekindle.does("rm --force base")?;
    linux
        .rekindle
        .does("restore talking --name copy --wake-within 60s --must-wake")?;
    // Much more than the few bytes that the device itself holds.
    let mut output = linux.rekindle.follows("copy")?;
    for _ in 0..10 {
        output.hears("words\r\nwords")?;
    }
    Ok(())
}
