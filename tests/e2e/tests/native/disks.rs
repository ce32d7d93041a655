//! Drives as the host sees them: limits, room, and a snapshot that is booted anew.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use rekindle_e2e::Rekindle;
use rekindle_kit::guest::Mib;
use rekindle_kit::story::Story;
use serde_json::{Value, json};

use crate::bare::counter;
use crate::damage::{directory, edit};
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "limits are in the record, the manifest, Firecracker, and in a copy's",
            limits,
        ),
        story("a limit or a size that cannot be is refused", impossible),
        story(
            "siblings restored in every order open drives of their own, the original's removed",
            siblings,
        ),
        story(
            "a snapshot of another state format is booted anew, with its disks as they were",
            rebuilt,
        ),
        Story::new(
            "a disk for which there is no room fails a start and a snapshot, and the VM goes on",
            no_room,
        ),
    ]
}

/// The limiter of the first drive, as the Firecracker of a VM tells it.
fn limiter(rekindle: &Rekindle, vm: &str) -> anyhow::Result<Value> {
    let socket = rekindle.vm(vm).join("api.sock");
    let config = rekindle.tells(&format!("api --socket {} GET /vm/config", socket.display()))?;
    Ok(config["drives"][0]["rate_limiter"].clone())
}

fn bucket(size: u64) -> Value {
    json!({ "size": size, "one_time_burst": null, "refill_time": 1000 })
}

fn limits(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    let disk = rekindle.file("disk");
    fs::write(&disk, [7; 64 << 10])?;
    rekindle.does(&format!(
        "run {guest} --disk {},bw=10M,iops=300 --name original --detach",
        disk.display()
    ))?;
    let told = json!({ "bytes_per_second": 10 << 20, "operations_per_second": 300 });
    let record = rekindle.tells("inspect original")?;
    ensure!(record["machine"]["drives"][0]["limits"] == told, "{record}");
    let original = limiter(rekindle, "original")?;
    ensure!(original["bandwidth"] == bucket(10 << 20), "{original}");
    ensure!(original["ops"] == bucket(300), "{original}");

    rekindle.does("snapshot create original --name base")?;
    let manifest = rekindle.tells("snapshot inspect base")?;
    ensure!(
        manifest["devices"]["drives"][0]["limits"] == told,
        "{manifest}"
    );
    rekindle.does("rm --force original")?;
    rekindle.does("restore base --name copy")?;
    let copy = limiter(rekindle, "copy")?;
    ensure!(copy == original, "{copy}");
    let record = rekindle.tells("inspect copy")?;
    ensure!(record["machine"]["drives"][0]["limits"] == told, "{record}");
    Ok(())
}

fn siblings(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    let (own, read) = (rekindle.file("own"), rekindle.file("read"));
    fs::write(&own, [7; 64 << 10])?;
    fs::write(&read, [8; 64 << 10])?;
    rekindle.does(&format!(
        "run {guest} --disk {} --disk {}:ro --name original --detach",
        own.display(),
        read.display()
    ))?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    fs::remove_file(&own)?;
    for order in [
        ["a", "b", "c"],
        ["a", "c", "b"],
        ["b", "a", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["c", "b", "a"],
    ] {
        for name in order {
            rekindle.does(&format!("restore base --name {name}"))?;
        }
        for name in order {
            // What all read is no drive of its own.
            let drives = rekindle.open_drives(name)?;
            ensure!(drives == ["disk0"], "{order:?}: {name} has {drives:?}");
            rekindle.does(&format!("rm --force {name}"))?;
        }
    }
    Ok(())
}

fn impossible(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    for wrong in [
        "--disk d,bw=0",
        "--disk d:ro,iops=many",
        "--disk d,bw=1,bw=2",
        "--root-limit 10M",
        "--disk-size 8",
        "--disk-size 100T",
    ] {
        let said = rekindle.tries(&format!("run {guest} {wrong}"))?;
        ensure!(said.status == Some(2), "{wrong}: {said:?}");
    }
    for (line, named) in [
        ("--root-limit bw=1M", "no root disk"),
        ("--disk-size 1G", "--disk-size needs the initrd"),
    ] {
        let said = rekindle
            .tries(&format!("run {guest} {line}"))?
            .refused(125)?;
        ensure!(said.contains(named), "{said}");
    }
    ensure!(rekindle.vms()?.is_empty());
    Ok(())
}

fn rebuilt(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = counter();
    let options = rekindle.guest(&guest)?;
    let disk = rekindle.file("disk");
    fs::write(&disk, "as it was when it was booted")?;
    rekindle.does(&format!(
        "run {options} --disk {} --name original --detach",
        disk.display()
    ))?;
    rekindle.follows("original")?.counts(50)?;
    // No guest writes here; what the snapshot has must not be what the file has that it was copied from.
    fs::write(
        rekindle.vm("original").join("disks/disk0"),
        "as it was then",
    )?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    // A copy's snapshot knows as well what the original was booted from.
    rekindle.does("restore base --name copy")?;
    rekindle.does("snapshot create copy --name later")?;
    rekindle.does("rm --force copy")?;
    fs::remove_file(&disk)?;

    for snapshot in ["base", "later"] {
        another_format(&directory(rekindle, snapshot)?)?;
        let refusal = rekindle.refuses(&format!("restore {snapshot} --name none"))?;
        ensure!(refusal.contains("rekindle snapshot rebuild"), "{refusal}");
        rekindle.does(&format!("snapshot rebuild {snapshot} --name anew"))?;
        let first: String = rekindle.follows("anew")?.hears("\n")?;
        ensure!(first.trim() == "n=1", "its memory is old: {first:?}");
        let its = fs::read(rekindle.vm("anew").join("disks/disk0"))?;
        ensure!(its == b"as it was then", "{its:?}");
        rekindle.does("rm --force anew")?;
    }

    let kernel = rekindle.file(guest.name());
    let mut replaced = fs::read(&kernel)?;
    replaced.push(0);
    fs::write(&kernel, &replaced)?;
    let refusal = rekindle.refuses("snapshot rebuild base --name none")?;
    let named = kernel.display().to_string();
    ensure!(
        refusal.contains(&named) && refusal.contains("--kernel"),
        "{refusal}"
    );
    rekindle.does(&format!(
        "snapshot rebuild base --name anew --kernel {named}"
    ))?;
    rekindle.does("rm --force anew")?;
    fs::remove_file(&kernel)?;
    let refusal = rekindle.refuses("snapshot rebuild base --name none")?;
    ensure!(refusal.contains(&named), "{refusal}");
    ensure!(rekindle.vms()?.is_empty());
    Ok(())
}

/// Makes it one that a later Firecracker wrote.
fn another_format(snapshot: &Path) -> anyhow::Result<()> {
    let path = snapshot.join("manifest.json");
    let manifest = fs::read_to_string(&path)?;
    let version = "\"version\": \"1.12.1\"";
    fs::write(&path, edit(&manifest, version, "\"version\": \"1.16.0\"")?)?;
    Ok(())
}

fn no_room() -> anyhow::Result<()> {
    let rekindle = Rekindle::on_a_disk_of(Mib(40))?;
    let guest = rekindle.guest(&counter())?;
    let disk = rekindle.file("disk");
    fs::write(&disk, vec![7; 24 << 20])?;
    let with_disk = |name: &str| {
        format!(
            "run {guest} --disk {} --name {name} --detach",
            disk.display()
        )
    };
    rekindle.does(&with_disk("first"))?;
    let mut first = rekindle.follows("first")?;
    first.counts(3)?;
    let said = rekindle.tries(&with_disk("second"))?.refused(125)?;
    // Firecracker starts while the disk is copied, and fails in its own way where there is no room: that is not told.
    ensure!(
        said.contains("the drive disk0") && said.contains("No space left"),
        "{said}"
    );
    ensure!(rekindle.vms()?.len() == 1, "half a VM is left");

    // The memory is written while the disk is copied: whichever finds no room first is told.
    let said = rekindle.refuses("snapshot create first --name none")?;
    ensure!(said.contains("No space left"), "{said}");
    let drafts = fs::read_dir(rekindle.state().join("tmp"))?.count();
    ensure!(drafts == 0, "{drafts} drafts are left");
    ensure!(rekindle.tells("snapshot ls --json")? == json!([]));
    first.counts(5).context("after the snapshot that failed")?;
    drop(first);
    rekindle.leaves_nothing()
}
