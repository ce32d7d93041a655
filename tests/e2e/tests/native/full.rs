//! A disk that is full: one clear error that names the thing, nothing half there, and the next run, with room, completes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_e2e::s3::{Line, S3};
use rekindle_e2e::{Rekindle, Role, until};
use rekindle_kit::fixture::SmallDisk;
use rekindle_kit::guest::Mib;
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;

use crate::bare::large_pattern;
use crate::buckets::{lineage, tries};
use crate::memory::{copies_are_right, filled, goes_on};
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    let own = |name, tell: fn() -> anyhow::Result<()>| {
        Story::new(name, tell).or_else(rekindle_e2e::end_all)
    };
    vec![
        story("a push to a directory on a full disk", push),
        own("a pull, a flatten and a diff on a full disk", snapshots),
        own("a remote copy that is started on a full disk", laid_out),
        own(
            "a remote copy whose cache has no room left goes on",
            goes_on_without_a_cache,
        ),
    ]
}

/// Takes all the room that is left on a disk, but for so much; gone when it is dropped.
struct Ballast(PathBuf);

impl Ballast {
    fn leaving(dir: &Path, kib: u64) -> anyhow::Result<Ballast> {
        let path = dir.join("ballast");
        let mut file = File::create(&path)?;
        let free = rustix::fs::statvfs(dir)?;
        let size = (free.f_bavail * free.f_frsize).saturating_sub(kib << 10);
        let piece = vec![1; 64 << 10];
        let mut left = usize::try_from(size)?;
        while left > 0 {
            let now = left.min(piece.len());
            file.write_all(&piece[..now])?;
            left -= now;
        }
        Ok(Ballast(path))
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// How much room is left in these cases, in KiB.
const LEFT: [u64; 6] = [0, 4, 16, 64, 512, 4096];

/// A message names the thing and the reason.
fn is_clear(said: &str, thing: &str) -> anyhow::Result<()> {
    let reason = said.contains("no space left") || said.contains("No space left");
    ensure!(reason && said.contains(thing), "{said}");
    Ok(())
}

fn push(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    lineage(rekindle)?;
    let place = rekindle.file("place");
    fs::create_dir(&place)?;
    let disk = SmallDisk::mount(&place, Mib(64))?;
    let line = format!("snapshot push later file://{}", place.display());
    for left in LEFT {
        let ballast = Ballast::leaving(disk.path(), left)?;
        let said = rekindle.refuses(&line)?;
        is_clear(&said, &place.display().to_string())?;
        ensure!(!place.join("names/later").exists());
        for pack in fs::read_dir(place.join("packs")).into_iter().flatten() {
            let path = pack?.path();
            let digest = blake3::hash(&fs::read(&path)?).to_string();
            ensure!(path.ends_with(digest), "{} is half there", path.display());
        }
        drop(ballast);
    }
    rekindle.does(&line)?;
    let elsewhere = Rekindle::new()?;
    elsewhere.does(&format!("snapshot pull file://{}/later", place.display()))?;
    elsewhere.does("snapshot verify later")?;
    elsewhere.leaves_nothing()
}

fn drafts(rekindle: &Rekindle) -> anyhow::Result<usize> {
    Ok(fs::read_dir(rekindle.state().join("tmp"))?.count())
}

fn names(rekindle: &Rekindle) -> anyhow::Result<Vec<String>> {
    let names = fs::read_dir(rekindle.state().join("names"))?;
    let names = names.map(|name| Ok(name?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<anyhow::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn snapshots() -> anyhow::Result<()> {
    let origin = Rekindle::new()?;
    filled(&origin, "original")?;
    origin.does("snapshot create original --name base")?;
    goes_on(&origin, "original")?;
    origin.does("snapshot create original --name later --diff")?;
    origin.does("rm --force original")?;
    let s3 = S3::start(&origin.file("s3"), Line::of(Duration::ZERO))?;
    let url = s3.url("a/prefix");
    tries(&origin, &s3, &format!("snapshot push later {url}"))?.done()?;
    origin.leaves_nothing()?;

    let rekindle = Rekindle::on_a_disk_of(Mib(96))?;
    let fails = |line: &str| -> anyhow::Result<()> {
        let before = names(&rekindle)?;
        for left in [0, 4, 16, 64, 512, 2048] {
            let ballast = Ballast::leaving(rekindle.state(), left)?;
            let said = tries(&rekindle, &s3, line)?.refused(1);
            let said = said.with_context(|| format!("{left} KiB left"))?;
            is_clear(&said, &rekindle.state().display().to_string())
                .with_context(|| format!("{left} KiB left"))?;
            drop(ballast);
            let drafts = drafts(&rekindle)?;
            ensure!(drafts == 0, "{drafts} drafts, {left} KiB left");
            ensure!(names(&rekindle)? == before);
        }
        tries(&rekindle, &s3, line)?.done().map(drop)
    };
    fails(&format!("snapshot pull {url}/later"))?;
    rekindle.does("snapshot verify later")?;
    fails("snapshot flatten later --name flat")?;
    rekindle.does("snapshot verify flat")?;
    // Each less than the MiB that the guest has changed by then.
    for left in [0, 4, 64, 512] {
        rekindle.does("restore flat --name copy --track-dirty-pages")?;
        goes_on(&rekindle, "copy")?;
        let ballast = Ballast::leaving(rekindle.state(), left)?;
        let said = rekindle.refuses("snapshot create copy --name diff --diff")?;
        // It may be Firecracker that has no room, and says so.
        is_clear(&said, "")?;
        drop(ballast);
        ensure!(drafts(&rekindle)? == 0 && names(&rekindle)? == ["flat", "later"]);
        goes_on(&rekindle, "copy")?;
        // What changed is known no more, if Firecracker had begun.
        let said = rekindle.tries("snapshot create copy --name diff --diff")?;
        if said.status != Some(0) {
            ensure!(said.refused(1)?.contains("take a full one"));
            rekindle.does("snapshot create copy --name diff")?;
        }
        rekindle.does("rm --force copy")?;
        rekindle.does("snapshot verify diff")?;
        copies_are_right(&rekindle, "diff")?;
        rekindle.does("snapshot rm diff")?;
    }
    rekindle.leaves_nothing()
}

fn laid_out() -> anyhow::Result<()> {
    let origin = Rekindle::new()?;
    lineage(&origin)?;
    let s3 = S3::start(&origin.file("s3"), Line::of(Duration::ZERO))?;
    let url = s3.url("a/prefix");
    tries(&origin, &s3, &format!("snapshot push later {url}"))?.done()?;
    origin.leaves_nothing()?;

    let rekindle = Rekindle::on_a_disk_of(Mib(96))?;
    let line = format!("restore {url}/later --name copy");
    for left in LEFT {
        let ballast = Ballast::leaving(rekindle.state(), left)?;
        let said = tries(&rekindle, &s3, &line)?.refused(1);
        let said = said.with_context(|| format!("{left} KiB left"))?;
        is_clear(&said, &rekindle.state().display().to_string())
            .with_context(|| format!("{left} KiB left"))?;
        drop(ballast);
        ensure!(rekindle.vms()?.is_empty());
        until("no process is left", || {
            Ok(rekindle.processes()?.is_empty())
        })?;
        ensure!(!rekindle.vm("copy").exists(), "{left} KiB left");
    }
    tries(&rekindle, &s3, &line)?.done()?;
    goes_on(&rekindle, "copy")?;
    rekindle.leaves_nothing()
}

fn goes_on_without_a_cache() -> anyhow::Result<()> {
    let origin = Rekindle::new()?;
    origin.boots("original", &large_pattern())?;
    goes_on(&origin, "original")?;
    origin.does("snapshot create original --name base")?;
    origin.does("rm --force original")?;
    let s3 = S3::start(&origin.file("s3"), Line::of(Duration::from_millis(2)))?;
    let url = s3.url("a/prefix");
    tries(&origin, &s3, &format!("snapshot push base {url}"))?.done()?;
    origin.leaves_nothing()?;

    let rekindle = Rekindle::on_a_disk_of(Mib(96))?;
    let restore = format!("restore {url}/base --name copy --paused");
    tries(&rekindle, &s3, &restore)?.done()?;
    // A record is written still, and no chunk.
    let ballast = Ballast::leaving(rekindle.state(), 24)?;
    let cached = || anyhow::Ok(fs::read_dir(rekindle.state().join("cache"))?.count());
    let before = cached()?;
    rekindle.does("resume copy")?;
    // Its output has no room either: what it prints is not kept, and it goes on all the same.
    let passes = || {
        let told = rekindle.tells("inspect copy")?;
        ensure!(told["state"] == "running", "{told}");
        let pager = &told["pager"];
        Ok(pager["copied"].as_u64() >= Some((32 << 8) / 8 * 7))
    };
    until("it has all of its pages", passes)?;
    ensure!(cached()? == before, "something was cached");
    rekindle.one(Role::Pager)?;
    drop(ballast);
    goes_on(&rekindle, "copy")?;
    rekindle.does("rm --force copy")?;
    // With room, what the next one fetches is kept.
    tries(&rekindle, &s3, &format!("restore {url}/base --name next"))?.done()?;
    goes_on(&rekindle, "next")?;
    ensure!(cached()? > before);
    rekindle.leaves_nothing()
}
