//! A storm of removals beside faults and replay: nobody waits for ever, and nobody sees a page that is gone.
//!
//! ```text
//!   memory   │ the storm: removers and readers on the same pages │ walkers, a share each │
//!            │ ▓▓ replayed ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓ │
//! ```
//!
//! A page can be gone only once, so a storm is many rounds, each with a new VM. `REKINDLE_STORM` says for how many
//! seconds it rages; `REKINDLE_SEED` repeats a round.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rekindle_kit::dice::{Dice, SEED, setting};
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use rekindle_kit::uffd::{Answer, Build, FakeVm, Order, Seen, Storm, Zeros, write_memory};
use rekindle_pager::{Ended, Options, Socket, Source, Stats};
use rekindle_store::unit::PAGE_SIZE;
use rekindle_store::working_set::{Run, Touched, merge_into};

use crate::scene::{Pager, leaves_the_cache, situation};

/// How many seconds it rages unless `REKINDLE_STORM` says otherwise.
const SECONDS: u64 = 2;
/// Pages of the storm.
const STRETCH: usize = 4096;
const WALKERS: usize = 2;
/// Pages of each walker beside it.
const SHARE: usize = 512;
const PAGES: usize = STRETCH + WALKERS * SHARE;

pub(crate) fn stories() -> Vec<Story> {
    let name =
        "a storm of removals beside faults and replay leaves nobody waiting and no page stale";
    vec![Story::new(name, rages).within(Duration::from_secs(120) + length())]
}

fn length() -> Duration {
    Duration::from_secs(setting("REKINDLE_STORM", SECONDS))
}

fn rages() -> anyhow::Result<()> {
    requires_root()?;
    let dir = tempfile::tempdir()?;
    let memory = dir.path().join("memory");
    let stamps: Vec<u64> = (0..PAGES as u64)
        .map(|page| if page % 7 == 0 { 0 } else { page << 20 | 1 })
        .collect();
    write_memory(&memory, &stamps, Zeros::Holes)?;
    let (first, begin) = (Dice::new().seed(), Instant::now());
    let mut rounds = Vec::new();
    while rounds.is_empty() || begin.elapsed() < length() {
        let n = rounds.len();
        let seed = first.wrapping_add(n as u64);
        let over = round(&mut Dice::of(seed), &memory, &stamps).with_context(|| {
            format!("round {n}; {SEED}={seed} REKINDLE_STORM=0 repeats its choices")
        })?;
        rounds.push(over);
    }
    let sum = |count: fn(&(Seen, Stats)) -> u64| rounds.iter().map(count).sum::<u64>();
    let sums = [
        ("looks at kept pages", sum(|(seen, _)| seen.kept)),
        ("at gone ones", sum(|(seen, _)| seen.gone)),
        ("removed", sum(|(_, stats)| stats.removed)),
        ("demand", sum(|(_, stats)| stats.demand)),
        ("replayed", sum(|(_, stats)| stats.replayed)),
        ("zeroed", sum(|(_, stats)| stats.zeroed)),
    ];
    let [going, retries] = [sum(|(seen, _)| seen.going), sum(|(_, s)| s.retries)];
    let slowest = rounds.iter().map(|(_, stats)| stats.latency.max_ns).max();
    println!(
        "{} rounds from the seed {first}: {sums:?}, looks at going pages: {going}, \
         retries: {retries}, slowest answer: {slowest:?} ns",
        rounds.len()
    );
    ensure!(sums.iter().all(|(_, count)| *count > 0), "{sums:?}");
    Ok(())
}

fn round(dice: &mut Dice, memory: &Path, stamps: &[u64]) -> anyhow::Result<(Seen, Stats)> {
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("pager.state");
    if dice.up_to(4) == 0 {
        leaves_the_cache(memory)?;
    }
    let mut options = Options::new(
        Socket::Path(dir.path().join("pager.sock")),
        Source::Memory(memory.into()),
    );
    options.replay = Some(a_set(dice, dir.path())?);
    options.state = Some(state.clone());
    let pager = Pager::start(options)?;
    let mut vm = FakeVm::start(&Build {
        regions: vec![STRETCH / 2 + 100, PAGES - STRETCH / 2 - 100],
        huge: false,
        blocking: false,
    })?;
    let mut walkers = Vec::new();
    for stamps in stamps[STRETCH..].chunks(SHARE) {
        let mut walker = vm.thread()?;
        walker.begin(&Order::Random {
            seed: dice.number(),
            steps: 500,
            page: STRETCH + walkers.len() * SHARE,
            stamps: stamps.into(),
        })?;
        walkers.push(walker);
    }
    let mut storm = vm.thread()?;
    storm.begin(&Order::Storm(Storm {
        seed: dice.number(),
        page: 0,
        stamps: stamps[..STRETCH].into(),
        removers: 2,
        readers: 3,
        removals: 500,
    }))?;
    vm.thread()?.ask(&Order::handshake(&pager.socket()))?;
    let raged = storm.finish().map_err(|e| format!("{e:#}"));
    let Ok(Some(Answer::Seen(seen))) = raged else {
        bail!("{raged:?}\n{}", situation(vm.pid(), &state));
    };
    for walker in &mut walkers {
        let walked = walker.finish().map_err(|e| format!("{e:#}"));
        let right = matches!(walked, Ok(Some(Answer::Done)));
        ensure!(
            right,
            "beside it: {walked:?}\n{}",
            situation(vm.pid(), &state)
        );
    }
    vm.kill()?;
    let stats = pager.end()??;
    ensure!(stats.ended == Some(Ended::VmExited), "{stats:?}");
    ensure!(stats.removed >= seen.removed, "{stats:?}, but {seen:?}");
    Ok((seen, stats))
}

/// A working set of most pages, in any order.
fn a_set(dice: &mut Dice, dir: &Path) -> anyhow::Result<PathBuf> {
    let path = dir.join("working-set");
    let mut faulted = Vec::new();
    for page in 0..u64::try_from(PAGES)? {
        if dice.up_to(8) > 0 {
            faulted.push(Touched {
                page,
                at_us: u32::try_from(dice.up_to(1000))? * 1024,
                count: 1,
            });
        }
    }
    let run = Run {
        faulted,
        held_back_untouched: Vec::new(),
    };
    merge_into(&path, PAGE_SIZE, u64::try_from(PAGES)?, &run)?;
    Ok(path)
}
