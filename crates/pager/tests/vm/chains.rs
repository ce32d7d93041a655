//! Memories that are chains of Diffs, published as a snapshot is.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::ensure;
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use rekindle_kit::uffd::{Build, FakeVm, Order, Zeros, write_memory};
use rekindle_pager::Ended;
use rekindle_store::manifest::{
    BootInfo, Devices, FirecrackerInfo, HostInfo, HugePages, Kind, MachineConfig, MemoryLayout,
};
use rekindle_store::store::RemoveError;
use rekindle_store::unit::{ByteSize, PAGE_SIZE, PageCount, PageNumber, PageRange};
use rekindle_store::{ManifestParts, Root, Snapshot, Store};

use crate::points::serve_snapshot;
use crate::scene::mixed;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        Story::new("a chain of Diffs is one memory", a_chain_of_diffs),
        Story::new("a snapshot cannot be removed while it is served", leased),
    ]
}

fn text<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    text.parse().expect("a plain text")
}

/// A machine without a device, of this much memory.
fn parts(kind: Kind, pages: usize, removed: Vec<PageRange>) -> ManifestParts {
    let size = ByteSize::new(pages as u64 * PAGE_SIZE);
    ManifestParts {
        kind,
        firecracker: FirecrackerInfo {
            version: text("1.12.1"),
            snapshot_format: text("6.0.0"),
        },
        host: HostInfo {
            cpu_vendor: text("v"),
            cpu_model: text("m"),
            kernel: text("k"),
        },
        machine: MachineConfig {
            vcpus: 1,
            mem_mib: u32::try_from(pages / 256).expect("a small machine"),
            smt: false,
            track_dirty_pages: true,
            huge_pages: HugePages::None,
        },
        boot: BootInfo::default(),
        devices: Devices::default(),
        memory: MemoryLayout {
            size,
            page_size: ByteSize::new(PAGE_SIZE),
            regions: Vec::new(),
        },
        removed,
        notes: text(""),
    }
}

/// Publishes what Firecracker would have written: a page that is `None` was not.
pub(crate) fn publish(
    store: &Store,
    kind: Kind,
    pages: &[Option<u64>],
    removed: &[u64],
) -> anyhow::Result<Snapshot> {
    use std::os::unix::fs::FileExt;
    let draft = store.begin(None)?;
    fs::write(draft.vmstate_path(), "the state of a VM")?;
    let bare: Vec<u64> = pages.iter().map(|stamp| stamp.unwrap_or(0)).collect();
    write_memory(&draft.memory_path(), &bare, Zeros::Holes)?;
    // A written page of zeros is not a hole.
    let file = fs::File::options().write(true).open(draft.memory_path())?;
    for (at, stamp) in (0..).zip(pages) {
        if *stamp == Some(0) {
            file.write_all_at(&[0; 4096], at * PAGE_SIZE)?;
        }
    }
    let range = |&page| PageRange {
        first: PageNumber::new(page),
        count: PageCount::new(1),
    };
    let removed = removed.iter().map(range).collect();
    Ok(draft.publish(parts(kind, pages.len(), removed))?)
}

/// A Full snapshot of 512 pages and two Diffs; the last of them, and what each page is there.
pub(crate) fn a_chain(store: &Store) -> anyhow::Result<(Snapshot, Vec<u64>)> {
    let base: Vec<u64> = mixed(512);
    let full: Vec<_> = base.iter().copied().map(Some).collect();
    let base_id = publish(store, Kind::Full, &full, &[])?.id();
    let mut model = base;
    let mut diff = vec![None; 512];
    let mut first = diff.clone();
    // Page 10 was zero and is written; 11 was written and is zero, and stays so; 13 was given back.
    for (page, stamp) in [(10, 1000), (11, 0), (12, 1200)] {
        first[page] = Some(stamp);
        model[page] = stamp;
    }
    model[13] = 0;
    let first_id = publish(store, Kind::Diff { parent: base_id }, &first, &[13])?.id();
    for (page, stamp) in [(12, 1201), (300, 3000), (511, 0)] {
        diff[page] = Some(stamp);
        model[page] = stamp;
    }
    let tip = publish(store, Kind::Diff { parent: first_id }, &diff, &[])?;
    Ok((tip, model))
}

pub(crate) fn a_chain_of_diffs() -> anyhow::Result<()> {
    requires_root()?;
    let dir = tempfile::tempdir()?;
    let store = Store::open(Root::open(dir.path().join("root"))?);
    let (tip, model) = a_chain(&store)?;
    let pager = serve_snapshot(dir.path(), tip.dir())?;
    let mut vm = FakeVm::start(&Build {
        regions: vec![512],
        huge: false,
        blocking: false,
    })?;
    let mut thread = vm.thread()?;
    thread.ask(&Order::handshake(&pager.socket()))?;
    let seen = thread.read(0, 512)?;
    let wrong: Vec<_> = (0..512).filter(|&page| seen[page] != model[page]).collect();
    ensure!(wrong.is_empty(), "pages {wrong:?} are wrong");
    vm.kill()?;
    let stats = pager.end()??;
    ensure!(stats.ended == Some(Ended::VmExited));
    let zeros = model.iter().filter(|&&stamp| stamp == 0).count();
    ensure!(stats.zeroed == zeros as u64, "{stats:?}");
    Ok(())
}

fn leased() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::open(Root::open(dir.path().join("root"))?);
    let full: Vec<_> = mixed(256).into_iter().map(Some).collect();
    let snapshot = publish(&store, Kind::Full, &full, &[])?;
    let pager = serve_snapshot(dir.path(), snapshot.dir())?;
    ensure!(
        store.remove(snapshot.id()).is_err(),
        "it was removed under the page server"
    );
    let mut vm = FakeVm::start(&Build {
        regions: vec![256],
        huge: false,
        blocking: false,
    })?;
    vm.thread()?.ask(&Order::handshake(&pager.socket()))?;
    vm.kill()?;
    pager.end()??;
    // A program that another story is just starting holds all descriptors of this process, until it runs.
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(error) = store.remove(snapshot.id()) {
        ensure!(
            matches!(error, RemoveError::InUse { .. }) && Instant::now() < deadline,
            "{error}"
        );
        sleep(Duration::from_millis(1));
    }
    Ok(())
}
