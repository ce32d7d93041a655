//! Measures what a chain of 64 Diffs costs beside the same memory in one snapshot: opening it, and reading its pages.
//!
//! ```text
//! cargo run --release -p rekindle-store --example deep_chain [DIRECTORY]
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rekindle_store::flatten::{Flat, Source};
use rekindle_store::manifest::{
    BootInfo, Devices, FirecrackerInfo, HostInfo, HugePages, Kind, MachineConfig, MemoryLayout,
};
use rekindle_store::unit::{ByteSize, PAGE_SIZE, PageNumber};
use rekindle_store::{ManifestParts, Root, Snapshot, SnapshotId, Store};

const DEPTH: u64 = 64;
const MIB: u32 = 512;
const PAGES: u64 = (MIB as u64) << 20 >> 12;
/// What a Diff changes.
const CHANGED: u64 = 512;
const ROUNDS: usize = 9;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let place = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let root = std::path::Path::new(&place).join("deep-chain.tmp");
    let store = Store::open(Root::open(&root)?);
    let measured = measure(&store);
    std::fs::remove_dir_all(root)?;
    measured
}

fn measure(store: &Store) -> Result<(), Failure> {
    let mut dice = Dice(7);
    let mut tip = layer(store, Kind::Full, (0..PAGES).step_by(2))?;
    for _ in 0..DEPTH {
        let pages: Vec<u64> = (0..CHANGED).map(|_| dice.next() % PAGES).collect();
        tip = layer(store, Kind::Diff { parent: tip }, pages.into_iter())?;
    }
    let flat = store
        .flatten(store.snapshot(&tip.to_string())?, None, |_| {})?
        .id();
    for (what, id) in [("flat", flat), ("64 Diffs deep", tip)] {
        let load = median(|| open(store, id).map(drop))?;
        let (map, files) = open(store, id)?;
        let read = median(|| read_at_random(&map, &files))?;
        println!(
            "{what:>14}: opened in {:.2} ms, a page at random in {} ns",
            load.as_secs_f64() * 1e3,
            read.as_nanos() / u128::from(PAGES)
        );
    }
    Ok(())
}

fn open(store: &Store, id: SnapshotId) -> Result<(Flat, Vec<File>), Failure> {
    let chain = store.chain(store.snapshot(&id.to_string())?)?;
    let pages: Vec<_> = chain.iter().map(Snapshot::pages).collect();
    let files = chain
        .iter()
        .map(Snapshot::open_memory)
        .collect::<Result<_, _>>()?;
    Ok((Flat::of(&pages)?, files))
}

fn read_at_random(map: &Flat, files: &[File]) -> Result<(), Failure> {
    let mut dice = Dice(3);
    let mut page = [0; 4096];
    for _ in 0..PAGES {
        let number = PageNumber::new(dice.next() % PAGES);
        if let Some(Source::Layer(layer)) = map.source(number) {
            files[layer.get()].read_exact_at(&mut page, number.offset().get())?;
        }
    }
    Ok(())
}

fn median(mut what: impl FnMut() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        what()?;
        times.push(begun.elapsed());
    }
    times.sort();
    Ok(times[ROUNDS / 2])
}

fn layer(
    store: &Store,
    kind: Kind,
    pages: impl Iterator<Item = u64>,
) -> Result<SnapshotId, Failure> {
    let draft = store.begin(None)?;
    std::fs::write(draft.vmstate_path(), vec![7; 32 << 10])?;
    let memory = File::create_new(draft.memory_path())?;
    memory.set_len(PAGES * PAGE_SIZE)?;
    for page in pages {
        memory.write_all_at(&[1; 4096], page * PAGE_SIZE)?;
    }
    Ok(draft.publish(parts(kind)?)?.id())
}

fn parts(kind: Kind) -> Result<ManifestParts, Failure> {
    Ok(ManifestParts {
        kind,
        firecracker: FirecrackerInfo {
            version: "1.12.1".parse()?,
            snapshot_format: "6.0.0".parse()?,
        },
        host: HostInfo {
            cpu_vendor: "GenuineIntel".parse()?,
            cpu_model: "none".parse()?,
            kernel: "6.1.0".parse()?,
        },
        machine: MachineConfig {
            vcpus: 1,
            mem_mib: MIB,
            smt: false,
            track_dirty_pages: true,
            huge_pages: HugePages::None,
        },
        boot: BootInfo::default(),
        devices: Devices::default(),
        memory: MemoryLayout {
            size: ByteSize::new(PAGES * PAGE_SIZE),
            page_size: ByteSize::new(PAGE_SIZE),
            regions: Vec::new(),
        },
        removed: Vec::new(),
        notes: "".parse()?,
    })
}

/// Numbers that look like chance, the same in each run.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        self.0 >> 33
    }
}
