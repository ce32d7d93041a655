//! A real Firecracker, whose guest checks its own memory.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_kit::guest::{Mib, Pattern};
use rekindle_kit::machine::{Machine, SnapshotFiles, SnapshotKind, Tracking};
use rekindle_kit::require::{requires_firecracker, requires_kvm, requires_root};
use rekindle_kit::story::Story;
use rekindle_pager::{Ended, KillReason, Options, Socket, Source, Stats};

use crate::scene::Pager;

const SOON: Duration = Duration::from_secs(20);

pub(crate) fn stories() -> Vec<Story> {
    vec![
        Story::new("a real guest finds every page right", every_page_is_right),
        Story::new(
            "a real guest snapshotted through the page server is the same again",
            snapshot_again,
        ),
        Story::new(
            "a real guest whose memory file is cut short dies",
            real_cut_short,
        ),
    ]
}

/// A directory with a snapshot of a guest that fills 16 MiB and then checks them for ever.
fn snapshotted() -> anyhow::Result<(tempfile::TempDir, SnapshotFiles)> {
    requires_root()?;
    requires_kvm()?;
    let firecracker = requires_firecracker()?;
    let dir = tempfile::tempdir()?;
    let pattern = Pattern {
        range: Mib(32)..Mib(48),
        ..Pattern::default()
    };
    let mut original = Machine::start(&firecracker, &make(&dir, "original")?)?;
    original.boot(&pattern.guest(), Tracking::Off)?;
    original.serial().wait_for("vg", SOON)?;
    let files = SnapshotFiles::inside(&make(&dir, "snapshot")?);
    original.pause()?;
    original.snapshot(SnapshotKind::Full, &files)?;
    Ok((dir, files))
}

fn make(dir: &tempfile::TempDir, name: &str) -> anyhow::Result<std::path::PathBuf> {
    let path = dir.path().join(name);
    std::fs::create_dir(&path)?;
    Ok(path)
}

/// A copy whose memory comes from a page server of its own.
fn restored(dir: &Path, files: &SnapshotFiles) -> anyhow::Result<(Machine, Pager)> {
    std::fs::create_dir(dir)?;
    let socket = Socket::Path(dir.join("pager.sock"));
    let pager = Pager::start(Options::new(socket, Source::Memory(files.memory.clone())))?;
    let mut copy = Machine::start(&requires_firecracker()?, dir)?;
    copy.load_uffd(files, Tracking::Off, &pager.socket())?;
    Ok((copy, pager))
}

/// Several passes over all of the guest's pages, each of which was right.
fn verifies(copy: &mut Machine) -> anyhow::Result<()> {
    copy.resume()?;
    for _ in 0..4 {
        let said = copy.serial().wait_for("v", SOON)?;
        ensure!(!said.contains('X'), "{said:?}");
    }
    Ok(())
}

fn ends(copy: Machine, pager: Pager) -> anyhow::Result<Stats> {
    drop(copy);
    let stats = pager.end()??;
    ensure!(stats.ended == Some(Ended::VmExited), "{:?}", stats.ended);
    Ok(stats)
}

fn every_page_is_right() -> anyhow::Result<()> {
    let (dir, files) = snapshotted()?;
    let (mut copy, pager) = restored(&dir.path().join("copy"), &files)?;
    verifies(&mut copy)?;
    let stats = ends(copy, pager)?;
    let touched = stats.copied + stats.zeroed;
    ensure!((4096..8192).contains(&touched), "{stats:?}");
    ensure!(stats.zeroed >= 512, "{stats:?}");
    Ok(())
}

fn snapshot_again() -> anyhow::Result<()> {
    let (dir, files) = snapshotted()?;
    let (mut copy, pager) = restored(&dir.path().join("copy"), &files)?;
    verifies(&mut copy)?;
    copy.pause()?;
    let again = SnapshotFiles::inside(&make(&dir, "again")?);
    // Reads all 128 MiB through the page server.
    copy.snapshot(SnapshotKind::Full, &again)?;
    let stats = ends(copy, pager)?;
    ensure!(
        stats.copied + stats.zeroed + stats.present == 128 << 8,
        "{stats:?}"
    );
    let (mut third, pager) = restored(&dir.path().join("third"), &again)?;
    verifies(&mut third)?;
    ends(third, pager)?;
    Ok(())
}

fn real_cut_short() -> anyhow::Result<()> {
    let (dir, files) = snapshotted()?;
    let (mut copy, pager) = restored(&dir.path().join("copy"), &files)?;
    let file = File::options()
        .write(true)
        .open(&files.memory)
        .context("open the memory")?;
    file.set_len((40 << 20) + 100)?;
    copy.resume()?;
    let stats = pager.end()??;
    let Some(Ended::VmKilled {
        reason: KillReason::BadPage(bad),
    }) = &stats.ended
    else {
        anyhow::bail!("{:?}", stats.ended);
    };
    ensure!(bad.page >= 40 << 8 && bad.file == files.memory, "{bad:?}");
    let said = copy.serial().take()?;
    ensure!(!said.contains('X'), "{said:?}");
    Ok(())
}
