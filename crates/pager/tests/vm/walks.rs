//! Guests that do as they please, against a plain list of what each page must be.
//!
//! Each walk has another memory, another working set that is replayed meanwhile, and page servers that die or are
//! replaced at other moments. `REKINDLE_WALKS` says how many there are; `REKINDLE_SEED` repeats them.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_kit::dice::{Dice, SEED, setting};
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use rekindle_kit::uffd::{Answer, Build, FakeVm, GuestThread, Order, Zeros, write_memory};
use rekindle_pager::{Ended, Source, Stats};
use rekindle_store::manifest::Kind;
use rekindle_store::unit::PAGE_SIZE;
use rekindle_store::working_set::{Run, Touched, merge_into, read_for};
use rekindle_store::{Root, Snapshot, Store};

use crate::chains::publish;
use crate::scene::{leaves_the_cache, situation};
use crate::server::{Kept, Server, Serving, Takeover};

/// How many walks there are unless `REKINDLE_WALKS` says otherwise.
const WALKS: u64 = 20;
const WALKERS: usize = 4;
/// Pages of each walker.
const SHARE: usize = 256;
const PAGES: usize = WALKERS * SHARE;
/// How many steps a walker takes at the least, and how many more at the most.
const STEPS: (usize, usize) = (100, 1000);

pub(crate) fn stories() -> Vec<Story> {
    let each = Duration::from_secs(5);
    let limit = each * u32::try_from(walks()).unwrap_or(u32::MAX);
    let name =
        "threads that read, write and give back at random see what they must, whoever serves";
    vec![Story::new(name, random_walks).within(Duration::from_secs(60) + limit)]
}

fn walks() -> u64 {
    setting("REKINDLE_WALKS", WALKS)
}

fn random_walks() -> anyhow::Result<()> {
    requires_root()?;
    let first = Dice::new().seed();
    let mut all = Vec::new();
    for n in 0..walks() {
        let seed = first.wrapping_add(n);
        let stats = walk(&mut Dice::of(seed))
            .with_context(|| format!("walk {n}; {SEED}={seed} REKINDLE_WALKS=1 repeats it"))?;
        all.push(stats);
    }
    let sum = |count: fn(&Stats) -> u64| all.iter().map(count).sum::<u64>();
    let sums = [
        ("takeovers", sum(|stats| stats.takeovers)),
        ("removed", sum(|stats| stats.removed)),
        ("demand", sum(|stats| stats.demand)),
        ("replayed", sum(|stats| stats.replayed)),
        ("around", sum(|stats| stats.around)),
        ("zeroed", sum(|stats| stats.zeroed)),
    ];
    // None on a file system that is memory.
    let cold = sum(|stats| stats.cold);
    println!(
        "{} walks from the seed {first}: {sums:?}, cold: {cold}",
        all.len()
    );
    // One walk alone need not have had all of it.
    let had = walks() < WALKS || sums.iter().all(|(_, count)| *count > 0);
    ensure!(had, "{sums:?}, seed {first}");
    Ok(())
}

fn walk(dice: &mut Dice) -> anyhow::Result<Stats> {
    let dir = tempfile::tempdir()?;
    let memory = Memory::make(dice, dir.path())?;
    if dice.up_to(4) == 0 {
        memory
            .files
            .iter()
            .try_for_each(|file| leaves_the_cache(file))?;
    }
    let serving = Serving {
        source: memory.source.clone(),
        socket: dir.path().join("pager.sock"),
        state: dir.path().join("pager.state"),
        stats: dir.path().join("stats.json"),
        set: dir.path().join("working-set"),
        rights: [Kept::Files, Kept::Nothing][dice.up_to(2)],
        deed: None,
    };
    record_runs(dice, &serving.set)?;
    let mut server = Server::start(&serving)?;
    let mut vm = FakeVm::start(&Build {
        regions: regions(dice),
        huge: false,
        blocking: false,
    })?;
    let mut walkers = set_out(dice, &vm, &memory.stamps)?;
    vm.thread()?.ask(&Order::handshake(&serving.socket))?;
    // One that dies before its state is written has no successor: nothing has run by then.
    server.serves()?;
    let mut takeovers = 0;
    for _ in 0..dice.up_to(5) {
        let most = [500, 4_000, 20_000][dice.up_to(3)];
        thread::sleep(Duration::from_micros(u64::try_from(dice.up_to(most))?));
        let how = [Takeover::Dead, Takeover::Dying, Takeover::Replaced][dice.up_to(3)];
        server
            .hand_over(vm.pid(), how)
            .with_context(|| format!("takeover {takeovers}, {how:?}"))?;
        takeovers += 1;
    }
    for walker in &mut walkers {
        let walked = walker.finish().map_err(|e| format!("{e:#}"));
        let right = matches!(walked, Ok(Some(Answer::Done)));
        ensure!(
            right,
            "after {takeovers} takeovers: {walked:?}\n{}",
            situation(vm.pid(), server.state())
        );
    }
    // The last one may not have begun, and a VM that is gone has nothing to take over.
    server.serves()?;
    vm.kill()?;
    vm.wait()?;
    server.end()?;
    let stats: Stats = serde_json::from_slice(&fs::read(&serving.stats)?)?;
    ensure!(stats.ended == Some(Ended::VmExited), "{stats:?}");
    let confined = stats.confinement.is_some_and(|by| by.seccomp);
    ensure!(confined, "{stats:?}");
    // One that is killed may not have begun.
    ensure!(stats.takeovers <= takeovers, "{stats:?}");
    let pages = u64::try_from(PAGES)?;
    read_for(&serving.set, PAGE_SIZE, pages).context("what was recorded")?;
    Ok(stats)
}

/// Each walker begins at once, and waits at its first fault or removal.
fn set_out(dice: &mut Dice, vm: &FakeVm, stamps: &[u64]) -> anyhow::Result<Vec<GuestThread>> {
    let mut walkers = Vec::new();
    for stamps in stamps.chunks(SHARE) {
        let mut walker = vm.thread()?;
        walker.begin(&Order::Random {
            seed: dice.number(),
            steps: STEPS.0 + dice.up_to(STEPS.1),
            page: walkers.len() * SHARE,
            stamps: stamps.into(),
        })?;
        walkers.push(walker);
    }
    Ok(walkers)
}

/// One to four regions, which do not begin and end where the walkers' shares do.
fn regions(dice: &mut Dice) -> Vec<usize> {
    let mut left = PAGES;
    let mut regions = Vec::new();
    for _ in 0..dice.up_to(4) {
        let pages = 1 + dice.up_to(left / 2);
        regions.push(pages);
        left -= pages;
    }
    regions.push(left);
    regions
}

/// Leaves a working set of pages in any order, of none to three runs, each of any length.
fn record_runs(dice: &mut Dice, path: &Path) -> anyhow::Result<()> {
    for _ in 0..dice.up_to(4) {
        let mut faulted = Vec::new();
        let most = [16, PAGES / 4, 2 * PAGES][dice.up_to(3)];
        for _ in 0..dice.up_to(most) {
            faulted.push(Touched {
                page: u64::try_from(dice.up_to(PAGES))?,
                // In units of 1024 µs; those of one unit come in the order of the memory.
                at_us: u32::try_from(dice.up_to(64))? * 1024,
                count: 1,
            });
        }
        let run = Run {
            faulted,
            held_back_untouched: Vec::new(),
        };
        merge_into(path, PAGE_SIZE, u64::try_from(PAGES)?, &run)?;
    }
    Ok(())
}

/// A guest's memory on the disk, and what is in it.
struct Memory {
    source: Source,
    stamps: Vec<u64>,
    files: Vec<PathBuf>,
}

impl Memory {
    fn make(dice: &mut Dice, dir: &Path) -> anyhow::Result<Memory> {
        let stamps: Vec<_> = (0..PAGES).map(|_| stamp(dice)).collect();
        match dice.up_to(3) {
            0 => Self::file(dir, stamps, Zeros::Holes),
            1 => Self::file(dir, stamps, Zeros::Written),
            _ => Self::chain(dice, dir, stamps),
        }
    }

    fn file(dir: &Path, stamps: Vec<u64>, zeros: Zeros) -> anyhow::Result<Memory> {
        let path = dir.join("memory");
        write_memory(&path, &stamps, zeros)?;
        Ok(Memory {
            source: Source::Memory(path.clone()),
            stamps,
            files: vec![path],
        })
    }

    /// One Diff, or two, on top of a Full snapshot.
    fn chain(dice: &mut Dice, dir: &Path, mut stamps: Vec<u64>) -> anyhow::Result<Memory> {
        let store = Store::open(Root::open(dir.join("root"))?);
        let full: Vec<_> = stamps.iter().copied().map(Some).collect();
        let mut tip = publish(&store, Kind::Full, &full, &[])?;
        let mut files = vec![tip.memory_path()];
        for _ in 0..=dice.up_to(2) {
            tip = Self::diff(dice, &store, &tip, &mut stamps)?;
            files.push(tip.memory_path());
        }
        Ok(Memory {
            source: Source::Snapshot(tip.dir().into()),
            stamps,
            files,
        })
    }

    fn diff(
        dice: &mut Dice,
        store: &Store,
        tip: &Snapshot,
        stamps: &mut [u64],
    ) -> anyhow::Result<Snapshot> {
        let mut written = vec![None; PAGES];
        let mut removed = Vec::new();
        for page in 0..PAGES {
            match dice.up_to(8) {
                0 | 1 => {
                    stamps[page] = stamp(dice);
                    written[page] = Some(stamps[page]);
                }
                2 => {
                    stamps[page] = 0;
                    removed.push(u64::try_from(page)?);
                }
                _ => {}
            }
        }
        publish(store, Kind::Diff { parent: tip.id() }, &written, &removed)
    }
}

/// Every fourth page is zeros; no other two are alike.
fn stamp(dice: &mut Dice) -> u64 {
    match dice.number() {
        number if number % 4 == 0 => 0,
        number => number,
    }
}
