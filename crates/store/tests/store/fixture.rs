//! A store in a directory of its own, and snapshots with a memory that a test can predict.

use proptest::collection::vec;
use proptest::prelude::*;
use rekindle_store::manifest::{
    Agent, BackingParts, BootInfo, Devices, DriveParts, Egress, FirecrackerInfo, HostInfo,
    HugePages, Interface, Kind, MachineConfig, MemoryLayout, Vsock,
};
use rekindle_store::packed::{PullError, Pulled, PushError, Pushed, Repository};
use rekindle_store::unit::{ByteSize, PAGE_SIZE};
use rekindle_store::{Draft, ManifestParts, Root, Snapshot, SnapshotId, Store};
use rustix::fs::{SeekFrom, seek};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How many pages a test's memory has: 1 MiB, which is whole MiB, as a machine's.
pub(crate) const PAGES: usize = 256;

/// What Firecracker wrote for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    /// Nothing: a hole.
    Nothing,
    /// A page of zeros.
    Zeros,
    /// A page that depends on this number.
    Data(u8),
}

pub(crate) struct Fixture {
    // Removed last.
    pub(crate) store: Store,
    _temp: Option<tempfile::TempDir>,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        Self {
            store: Store::open(Root::open(temp.path()).unwrap()),
            _temp: Some(temp),
        }
    }

    pub(crate) fn at(path: &Path) -> Self {
        Self {
            store: Store::open(Root::open(path).unwrap()),
            _temp: None,
        }
    }

    /// A draft with a state, this memory and a disk.
    pub(crate) fn draft(&self, name: Option<&str>, memory: &[Written]) -> Draft {
        let draft = self
            .store
            .begin(name.map(|name| name.parse().unwrap()))
            .unwrap();
        fill(&draft, memory);
        draft
    }

    pub(crate) fn full(&self, name: Option<&str>, memory: &[Written]) -> Snapshot {
        self.draft(name, memory).publish(parts(Kind::Full)).unwrap()
    }

    pub(crate) fn diff(&self, parent: SnapshotId, memory: &[Written]) -> Snapshot {
        self.draft(None, memory)
            .publish(parts(Kind::Diff { parent }))
            .unwrap()
    }

    /// Everything in the state directory, relative to it, but for its fixed parts.
    pub(crate) fn entries(&self) -> Vec<String> {
        let root = self.store.root().path();
        let mut found = Vec::new();
        walk(root, &mut found);
        let relative = |path: &PathBuf| {
            path.strip_prefix(root)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        };
        let mut found: Vec<String> = found
            .iter()
            .map(relative)
            .filter(|path| path.contains('/'))
            .collect();
        found.sort();
        found
    }
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() {
            walk(&path, found);
        }
        found.push(path);
    }
}

pub(crate) fn fill(draft: &Draft, memory: &[Written]) {
    std::fs::write(draft.vmstate_path(), "the state of a VM").unwrap();
    write_memory(&draft.memory_path(), memory);
    std::fs::write(
        draft.disk_path(&"rootfs".parse().unwrap()),
        "the contents of a disk",
    )
    .unwrap();
}

pub(crate) fn write_memory(path: &Path, memory: &[Written]) {
    assert_eq!(memory.len(), PAGES);
    let file = File::create_new(path).unwrap();
    file.set_len(PAGES as u64 * PAGE_SIZE).unwrap();
    for (page, written) in (0..).zip(memory) {
        if *written != Written::Nothing {
            file.write_all_at(&contents(*written), page * PAGE_SIZE)
                .unwrap();
        }
    }
}

pub(crate) fn contents(written: Written) -> [u8; 4096] {
    match written {
        Written::Nothing | Written::Zeros => [0; 4096],
        Written::Data(seed) => {
            let mut page = [seed; 4096];
            // A page that differs from zeros in its last byte alone is data as well.
            if seed == 0 {
                page[4095] = 1;
            }
            page
        }
    }
}

/// The pages that a file has data for.
pub(crate) fn data_pages(path: &Path) -> Vec<u64> {
    let file = File::open(path).unwrap();
    let mut pages = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(start)).unwrap();
        assert!(
            start.is_multiple_of(PAGE_SIZE) && at.is_multiple_of(PAGE_SIZE),
            "{start} to {at}"
        );
        pages.extend(start / PAGE_SIZE..at / PAGE_SIZE);
    }
    pages
}

/// The pages of a memory that were given data.
pub(crate) fn given_data(memory: &[Written]) -> Vec<u64> {
    let given = (0..)
        .zip(memory)
        .filter(|(_, written)| matches!(written, Written::Data(_)));
    given.map(|(page, _)| page).collect()
}

/// A memory with a bit of everything in it.
pub(crate) fn mixed() -> Vec<Written> {
    let kind = |page: usize| match page % 40 {
        0..20 => Written::Nothing,
        20..25 => Written::Zeros,
        seed => Written::Data(u8::try_from(seed).unwrap()),
    };
    (0..PAGES).map(kind).collect()
}

pub(crate) fn parts(kind: Kind) -> ManifestParts {
    ManifestParts {
        kind,
        firecracker: FirecrackerInfo {
            version: "1.12.1".parse().unwrap(),
            snapshot_format: "6.0.0".parse().unwrap(),
        },
        host: HostInfo {
            cpu_vendor: "GenuineIntel".parse().unwrap(),
            cpu_model: "A CPU @ 3.00GHz".parse().unwrap(),
            kernel: "6.1.0".parse().unwrap(),
        },
        machine: MachineConfig {
            vcpus: 1,
            mem_mib: 1,
            smt: false,
            track_dirty_pages: true,
            huge_pages: HugePages::None,
        },
        boot: BootInfo {
            kernel: Some("/boot/vmlinux".parse().unwrap()),
            ..BootInfo::default()
        },
        devices: Devices {
            drives: vec![DriveParts {
                id: "rootfs".parse().unwrap(),
                path: "disk".parse().unwrap(),
                read_only: false,
                root: true,
                limits: None,
                backing: BackingParts::Layer,
            }],
            interfaces: vec![Interface {
                id: "eth0".parse().unwrap(),
                host_dev_name: "tap0".parse().unwrap(),
                guest_mac: Some("06:00:ac:10:00:02".parse().unwrap()),
            }],
            vsock: Some(Vsock {
                uds_path: "v.sock".parse().unwrap(),
                cid: 3,
                agent: Some(Agent::Ready {
                    protocol: 1,
                    version: "0.1.0".parse().unwrap(),
                }),
            }),
            balloon: false,
            mmds: true,
            egress: Some(Egress {
                outbound: true,
                allow: Vec::new(),
                deny: vec!["10.0.0.0/8".parse().unwrap()],
            }),
        },
        memory: MemoryLayout {
            size: ByteSize::new(PAGES as u64 * PAGE_SIZE),
            page_size: ByteSize::new(PAGE_SIZE),
            regions: Vec::new(),
        },
        removed: Vec::new(),
        notes: "two\nlines".parse().unwrap(),
    }
}

/// A Full snapshot called base, and a Diff on it called tip.
pub(crate) fn lineage(fixture: &Fixture) -> [Snapshot; 2] {
    let base = fixture.full(Some("base"), &noisy());
    let draft = fixture.draft(Some("tip"), &mixed());
    let kind = Kind::Diff { parent: base.id() };
    [base, draft.publish(parts(kind)).unwrap()]
}

fn noisy() -> Vec<Written> {
    let seed = |page: usize| Written::Data(u8::try_from(page % 251).unwrap());
    (0..PAGES).map(seed).collect()
}

pub(crate) fn push(fixture: &Fixture, to: &Path, key: &str) -> Result<Pushed, PushError> {
    let tip = fixture.store.snapshot(key).unwrap();
    Repository::directory(to).push(&fixture.store, tip, None, &|_| {})
}

pub(crate) fn pull(fixture: &Fixture, from: &Path, key: &str) -> Result<Pulled, PullError> {
    Repository::directory(from).pull(&fixture.store, key, None, None, &|_| {})
}

pub(crate) fn assert_same(ours: &Snapshot, there: &Fixture) {
    let theirs = there.store.snapshot(&ours.id().to_string()).unwrap();
    theirs.verify().unwrap();
    let facts = |snapshot: &Snapshot| {
        (
            snapshot.manifest().files,
            snapshot.manifest().devices.clone(),
        )
    };
    assert_eq!(facts(&theirs), facts(ours));
}

/// The memory of a snapshot, or what a Diff changes.
pub(crate) fn memory() -> impl Strategy<Value = Vec<Written>> {
    let written = prop_oneof![
        Just(Written::Nothing),
        Just(Written::Zeros),
        any::<u8>().prop_map(Written::Data)
    ];
    vec((written, 1..60_usize), 1..20).prop_map(|runs| {
        let pages = runs
            .into_iter()
            .flat_map(|(written, count)| vec![written; count]);
        pages
            .chain(std::iter::repeat(Written::Nothing))
            .take(PAGES)
            .collect()
    })
}
