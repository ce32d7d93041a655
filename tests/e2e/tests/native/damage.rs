//! A snapshot that was damaged or tampered with is refused by name, and is as it was once the damage is undone.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rekindle_e2e::Rekindle;
use rekindle_kit::story::Story;

use crate::bare::counter;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a damaged file of a snapshot is named", damaged_files),
        story("flipped bits of memory are found", flipped_memory),
        story("a manifest that lies is refused", lying_manifests),
        story(
            "a snapshot of another kind of host is refused",
            another_host,
        ),
        story(
            "a diff whose parent is damaged or gone is refused",
            a_broken_chain,
        ),
        story("a record or a job that is none is told", broken_records),
    ]
}

/// The snapshot `base`, of a VM with a disk of its own, and its directory.
fn a_snapshot(rekindle: &Rekindle) -> anyhow::Result<PathBuf> {
    let guest = rekindle.guest(&counter())?;
    let disk = rekindle.file("disk");
    fs::write(&disk, [7; 64 << 10])?;
    rekindle.does(&format!(
        "run {guest} --disk {} --track-dirty-pages --name original --detach",
        disk.display()
    ))?;
    rekindle.follows("original")?.counts(3)?;
    rekindle.does("snapshot create original --name base")?;
    directory(rekindle, "base")
}

pub(crate) fn directory(rekindle: &Rekindle, snapshot: &str) -> anyhow::Result<PathBuf> {
    let manifest = rekindle.tells(&format!("snapshot inspect {snapshot}"))?;
    let id = manifest["id"].as_str().context("an id")?.to_owned();
    Ok(rekindle.state().join("snapshots").join(id))
}

/// A restore is refused, names all that is given, and leaves nothing.
fn restore_refuses(rekindle: &Rekindle, line: &str, named: &[&str]) -> anyhow::Result<()> {
    let before = rekindle.vms()?.len();
    for backend in ["uffd", "file"] {
        let line = format!("restore {line} --name refused --backend {backend}");
        let said = rekindle.refuses(&line)?;
        for thing in named {
            ensure!(
                said.contains(thing),
                "`{line}` does not name {thing:?}: {said}"
            );
        }
        ensure!(rekindle.vms()?.len() == before, "`{line}` left a VM");
    }
    Ok(())
}

/// It restores, and the copy counts.
fn restores(rekindle: &Rekindle, snapshot: &str) -> anyhow::Result<()> {
    rekindle.does(&format!("restore {snapshot} --name whole"))?;
    rekindle.follows("whole")?.counts(3)?;
    rekindle.does("rm --force whole")?;
    Ok(())
}

/// What happens to a file.
type Spoil = fn(&Path) -> anyhow::Result<()>;

fn resize(path: &Path, length: u64) -> anyhow::Result<()> {
    Ok(fs::File::options()
        .write(true)
        .open(path)?
        .set_len(length)?)
}

fn flip(path: &Path, at: u64) -> anyhow::Result<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    byte[0] ^= 0x10;
    Ok(file.write_all_at(&byte, at)?)
}

const SPOILS: [(&str, Spoil); 5] = [
    ("missing", |path| Ok(fs::remove_file(path)?)),
    ("empty", |path| resize(path, 0)),
    ("truncated", |path| {
        resize(path, fs::metadata(path)?.len() - 1)
    }),
    ("half", |path| resize(path, fs::metadata(path)?.len() / 2)),
    ("flipped", |path| flip(path, fs::metadata(path)?.len() / 3)),
];

fn damaged_files(rekindle: &Rekindle) -> anyhow::Result<()> {
    let dir = a_snapshot(rekindle)?;
    rekindle.does("rm --force original")?;
    for file in ["manifest.json", "vmstate", "pages", "memory", "disks/disk0"] {
        let path = dir.join(file);
        let (backup, is_large) = (
            fs::read(&path)?,
            !matches!(file, "manifest.json" | "vmstate" | "pages"),
        );
        for (damage, spoil) in SPOILS {
            // Large files are compared with their checksums only on request.
            let unseen = damage == "flipped" && is_large;
            spoil(&path)?;
            let told = || -> anyhow::Result<()> {
                if !unseen {
                    restore_refuses(rekindle, "base", &[file])?;
                }
                restore_refuses(rekindle, "base --verify", &[file])?;
                let said = rekindle.refuses("snapshot verify base")?;
                ensure!(said.contains(file), "{said}");
                let listed = rekindle.tells("snapshot ls --json")?;
                let row = listed.get(0).context("it is listed")?;
                ensure!(row["name"] == "base" || file == "manifest.json", "{listed}");
                ensure!(unseen == row["error"].is_null(), "{listed}");
                Ok(())
            };
            told().with_context(|| format!("{damage}: {file}"))?;
            fs::write(&path, &backup)?;
        }
    }
    rekindle.does("snapshot verify base")?;
    restores(rekindle, "base")?;
    // What is broken can be removed all the same.
    fs::remove_file(dir.join("manifest.json"))?;
    rekindle.does("snapshot rm base")?;
    ensure!(!dir.exists());
    Ok(())
}

fn flipped_memory(rekindle: &Rekindle) -> anyhow::Result<()> {
    let memory = a_snapshot(rekindle)?.join("memory");
    rekindle.does("rm --force original")?;
    // In the guest's code, and in the middle of zeros.
    for at in [(16 << 20) + 100, 30 << 20] {
        flip(&memory, at)?;
        let said = rekindle.refuses("snapshot verify base")?;
        let place = [at >> 16 << 16, at / 4096 * 4096, at / 4096].map(|place| place.to_string());
        ensure!(said.contains("memory"), "{said}");
        ensure!(
            place.iter().any(|place| said.contains(place)),
            "{at:#x}: {said}"
        );
        restore_refuses(rekindle, "base --verify", &["damaged", "memory"])?;
        flip(&memory, at)?;
        rekindle.does("snapshot verify base")?;
    }
    restores(rekindle, "base --verify")
}

/// Edits a manifest and seals it anew, so that the checksum is right.
pub(crate) fn edit(manifest: &str, from: &str, to: &str) -> anyhow::Result<String> {
    ensure!(
        manifest.matches(from).count() >= 1,
        "no {from:?} in {manifest}"
    );
    let end = manifest.rfind(",\n  \"checksum\"").context("a checksum")?;
    let body = manifest[..end].replace(from, to);
    let checksum = blake3::hash(body.as_bytes());
    Ok(format!("{body},\n  \"checksum\": \"{checksum}\"\n}}\n"))
}

fn lying_manifests(rekindle: &Rekindle) -> anyhow::Result<()> {
    let dir = a_snapshot(rekindle)?;
    rekindle.does("rm --force original")?;
    let path = dir.join("manifest.json");
    let truth = fs::read_to_string(&path)?;
    let other = "\"id\": \"0123456789abcdef\"";
    let id = format!(
        "\"id\": \"{}\"",
        dir.file_name().context("a name")?.to_string_lossy()
    );
    let lies: [(&str, &str, &[&str]); 10] = [
        (
            "\"format_version\": 2",
            "\"format_version\": 3",
            &["manifest.json", "3", "2"],
        ),
        (
            "\"path\": \"disks/disk0\"",
            "\"path\": \"../../disk\"",
            &["manifest.json", ".."],
        ),
        (
            "\"path\": \"disks/disk0\"",
            "\"path\": \"/etc/passwd\"",
            &["manifest.json", "absolute"],
        ),
        (
            "\"file\": \"disks/disk0\"",
            "\"file\": \"../../names/x\"",
            &["manifest.json"],
        ),
        (
            "\"file\": \"disks/disk0\"",
            "\"file\": \"/etc/passwd\"",
            &["manifest.json"],
        ),
        (
            "\"id\": \"disk0\"",
            "\"id\": \"../disk0\"",
            &["manifest.json"],
        ),
        (
            "\"mem_mib\": 32",
            "\"mem_mib\": 64",
            &["manifest.json", "mem_mib"],
        ),
        ("\"vcpus\": 1", "\"vcpus\": 64", &["manifest.json", "vcpus"]),
        (
            "\"name\": \"base\"",
            "\"name\": \"../base\"",
            &["manifest.json"],
        ),
        (&id, other, &[]),
    ];
    for (from, to, named) in lies {
        fs::write(&path, edit(&truth, from, to)?)?;
        restore_refuses(rekindle, "base", named).with_context(|| to.to_owned())?;
        fs::write(&path, &truth)?;
    }
    // Edited, and not sealed anew.
    fs::write(&path, truth.replace("\"vcpus\": 1", "\"vcpus\": 2"))?;
    restore_refuses(rekindle, "base", &["manifest.json", "checksum"])?;
    fs::write(&path, &truth)?;
    restores(rekindle, "base")
}

fn another_host(rekindle: &Rekindle) -> anyhow::Result<()> {
    let dir = a_snapshot(rekindle)?;
    rekindle.does("rm --force original")?;
    let path = dir.join("manifest.json");
    let truth = fs::read_to_string(&path)?;
    let manifest = rekindle.tells("snapshot inspect base")?;
    let vendor = manifest["host"]["cpu_vendor"]
        .as_str()
        .context("a vendor")?;
    let version = manifest["firecracker"]["version"]
        .as_str()
        .context("a version")?;

    fs::write(
        &path,
        edit(&truth, &format!("\"{vendor}\""), "\"CentaurHauls\"")?,
    )?;
    restore_refuses(rekindle, "base", &["CentaurHauls", vendor, "--force"])?;
    restores(rekindle, "base --force")?;
    fs::write(
        &path,
        edit(
            &truth,
            &format!("\"version\": \"{version}\""),
            "\"version\": \"1.99.0\"",
        )?,
    )?;
    let said = rekindle.tries("restore base --name newer")?;
    if said.status == Some(0) {
        // A release that nobody knows is left to Firecracker, which could read it.
        rekindle.does("rm --force newer")?;
    }
    fs::write(
        &path,
        edit(
            &truth,
            &format!("\"version\": \"{version}\""),
            "\"version\": \"1.15.0\"",
        )?,
    )?;
    restore_refuses(rekindle, "base", &["1.15.0", version, "--force"])?;
    fs::write(&path, &truth)?;
    restores(rekindle, "base")
}

fn a_broken_chain(rekindle: &Rekindle) -> anyhow::Result<()> {
    let base = a_snapshot(rekindle)?;
    rekindle.does("snapshot create original --name later --diff")?;
    rekindle.does("rm --force original")?;
    let id = base
        .file_name()
        .context("a name")?
        .to_string_lossy()
        .into_owned();

    let pages = fs::read(base.join("pages"))?;
    fs::write(base.join("pages"), &pages[..pages.len() / 2])?;
    restore_refuses(rekindle, "later", &[&id, "pages"])?;
    fs::write(base.join("pages"), pages)?;

    flip(&base.join("memory"), 16 << 20)?;
    let said = rekindle.refuses("snapshot verify later")?;
    ensure!(said.contains(&id) && said.contains("memory"), "{said}");
    flip(&base.join("memory"), 16 << 20)?;
    restores(rekindle, "later --verify")?;

    let away = rekindle.file("away");
    fs::rename(&base, &away)?;
    restore_refuses(rekindle, "later", &[&id])?;
    fs::rename(&away, &base)?;
    restores(rekindle, "later")
}

/// A VM whose record somebody overwrote is told, can be removed by force, and disturbs no other.
fn broken_records(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("good", &counter())?;
    rekindle.boots("bad", &counter())?;
    rekindle.follows("bad")?.counts(3)?;
    for text in ["", "{", "{\"version\": 99}", "[]"] {
        fs::write(rekindle.vm("bad").join("record.json"), text)?;
        let vms = rekindle.vms()?;
        ensure!(vms.len() == 2, "{vms:?}");
        let bad = vms
            .iter()
            .find(|vm| vm["name"] == "bad")
            .context("it is listed")?;
        ensure!(bad["state"] == "unknown", "{bad}");
        ensure!(
            bad["error"]
                .as_str()
                .is_some_and(|error| error.contains("record.json")),
            "{bad}"
        );
        let said = rekindle.refuses("pause bad")?;
        ensure!(said.contains("record.json"), "{said}");
        rekindle.refuses("rm bad")?;
    }
    rekindle.does("rm --force bad")?;
    ensure!(rekindle.vms()?.len() == 1);
    fs::create_dir(rekindle.vm("bare"))?;
    let vms = rekindle.vms()?;
    ensure!(vms.len() == 1, "{vms:?}");
    ensure!(
        !rekindle.vm("bare").exists(),
        "what nobody starts is cleared away"
    );
    rekindle.follows("good")?.counts(5)?;
    Ok(())
}
