//! Every guest in a real Firecracker: it prints what it promises, and a restored copy goes on.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_kit::fixture::TempRoot;
use rekindle_kit::guest::{Counter, Echo, Mib, Pattern, Scatter, Sweep, Ticks, Touch};
use rekindle_kit::invariant::{Belongings, Change, Thing};
use rekindle_kit::machine::{Machine, SnapshotFiles, SnapshotKind, Tracking};
use rekindle_kit::require::{requires_firecracker, requires_kvm};
use rekindle_kit::story::{Story, main as run};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

const SOON: Duration = Duration::from_secs(20);
const PAGE: u64 = 4096;

fn main() -> ExitCode {
    run(vec![
        Story::new("a copy of the counter counts on", a_copy_counts_on),
        Story::new("a pattern is right in a copy", a_pattern_is_right),
        Story::new("a pattern is right after a diff", a_pattern_after_a_diff),
        Story::new("a wrong word in a pattern is found", a_wrong_word),
        Story::new("a sweep changes every page", a_sweep_changes_every_page),
        Story::new("a scatter changes its pages only", a_scatter),
        Story::new("a touched guest takes no time", a_touched_guest),
        Story::new("an echo says what it is told", an_echo),
    ])
}

/// A root with a directory for each machine of a story and for its snapshots.
struct Bench {
    root: TempRoot,
    firecracker: PathBuf,
}

impl Bench {
    fn new() -> anyhow::Result<Bench> {
        let firecracker = requires_firecracker()?;
        requires_kvm()?;
        let root = TempRoot::new()?;
        Ok(Bench { root, firecracker })
    }

    fn machine(&self, name: &str) -> anyhow::Result<Machine> {
        Machine::start(&self.firecracker, &self.root.directory(name)?)
    }

    fn copy(&self, name: &str, files: &SnapshotFiles) -> anyhow::Result<Machine> {
        let mut copy = self.machine(name)?;
        copy.load(files, Tracking::Off)?;
        Ok(copy)
    }

    fn snapshot(
        &self,
        machine: &mut Machine,
        name: &str,
        kind: SnapshotKind,
    ) -> anyhow::Result<SnapshotFiles> {
        let files = SnapshotFiles::inside(&self.root.directory(name)?);
        machine.pause()?;
        machine.snapshot(kind, &files)?;
        Ok(files)
    }
}

fn a_copy_counts_on() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    let before = Belongings::of(bench.root.path(), "rekindle-none")?;
    let mut original = bench.machine("original")?;
    original.boot(&Counter::default().guest(), Tracking::Off)?;
    original.serial().wait_for("n=1\nn=2\nn=3\n", SOON)?;
    let files = bench.snapshot(&mut original, "snapshot", SnapshotKind::Full)?;
    let counted = original.serial().take()?;
    original
        .serial()
        .expect_silence(Duration::from_millis(100))?;
    drop(original);

    let mut copy = bench.copy("copy", &files)?;
    copy.serial().expect_silence(Duration::from_millis(50))?;
    copy.resume()?;
    let said = copy.serial().wait_for("\n", SOON)? + &copy.serial().wait_for("\n", SOON)?;
    let joined = counted + &said;
    let numbers: Vec<u32> = joined
        .lines()
        .map(|line| Ok(line.trim_start_matches("n=").parse()?))
        .collect::<anyhow::Result<_>>()?;
    ensure!(numbers.first() == Some(&4), "it went on to {joined:?}");
    let in_sequence = numbers.windows(2).all(|pair| pair[1] == pair[0] + 1);
    ensure!(in_sequence, "{joined:?}");

    drop(copy);
    let left = before.changes()?;
    let processes = left
        .iter()
        .filter(|change| matches!(change, Change::New(Thing::Process(_))));
    ensure!(processes.count() == 0, "{left:?}");
    Ok(())
}

/// Small enough to be filled and checked in an instant, and with a hole in every eighth page.
fn pattern() -> Pattern {
    Pattern {
        range: Mib(32)..Mib(48),
        ..Pattern::default()
    }
}

/// Two passes that begin after the restore.
fn verifies(copy: &mut Machine) -> anyhow::Result<()> {
    copy.resume()?;
    for _ in 0..2 {
        let said = copy.serial().wait_for("v", SOON)?;
        ensure!(!said.contains('X'), "{said:?}");
    }
    Ok(())
}

fn a_pattern_is_right() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    let mut original = bench.machine("original")?;
    original.boot(&pattern().guest(), Tracking::Off)?;
    let said = original.serial().wait_for("vvg", SOON)?;
    ensure!(said == "Fvvg", "{said:?}");
    let files = bench.snapshot(&mut original, "snapshot", SnapshotKind::Full)?;

    let memory = File::open(&files.memory)?;
    let address = pattern().range.start.bytes() + PAGE;
    let word = read_word(&memory, address)?;
    ensure!(word == Pattern::word(address, 1), "{word:#x}");
    let zero_page = pattern().range.start.bytes() + 7 * PAGE;
    ensure!(
        read_word(&memory, zero_page)? == 0,
        "the last class is zero"
    );

    verifies(&mut bench.copy("copy", &files)?)
}

fn a_pattern_after_a_diff() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    let mut original = bench.machine("original")?;
    original.boot(&pattern().guest(), Tracking::On)?;
    original.serial().wait_for("vg", SOON)?;
    let full = bench.snapshot(&mut original, "full", SnapshotKind::Full)?;
    original.resume()?;
    original.serial().wait_for("vg", SOON)?;
    let diff = bench.snapshot(&mut original, "diff", SnapshotKind::Diff)?;
    drop(original);

    let written = overlay(&diff, &full)?;
    let class = pattern().range.end.0 - pattern().range.start.0;
    let class = (class << 20) / u64::from(pattern().classes);
    ensure!(
        (class..8 * class).contains(&written),
        "{written} bytes for a class of {class}"
    );
    let both = SnapshotFiles {
        vmstate: diff.vmstate,
        memory: full.memory,
    };
    verifies(&mut bench.copy("copy", &both)?)
}

fn a_wrong_word() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    let mut original = bench.machine("original")?;
    original.boot(&pattern().guest(), Tracking::Off)?;
    original.serial().wait_for("Fv", SOON)?;
    let files = bench.snapshot(&mut original, "snapshot", SnapshotKind::Full)?;
    let memory = File::options().write(true).open(&files.memory)?;
    // Of the class that stays zero, so that no new generation mends it.
    memory.write_all_at(&[1], (45 << 20) + 7 * PAGE)?;

    let mut copy = bench.copy("copy", &files)?;
    copy.resume()?;
    let said = copy.serial().wait_for("\n", SOON)?;
    ensure!(said.ends_with("X02d07000\n"), "{said:?}");
    copy.serial().expect_silence(Duration::from_millis(100))
}

fn a_sweep_changes_every_page() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    let sweep = Sweep::default();
    let mut machine = bench.machine("machine")?;
    machine.boot(&sweep.guest(), Tracking::Off)?;
    machine.serial().wait_for("..", SOON)?;
    let files = bench.snapshot(&mut machine, "snapshot", SnapshotKind::Full)?;
    let memory = File::open(&files.memory)?;
    for page in (sweep.range.start.bytes()..sweep.range.end.bytes()).step_by(4096) {
        let passes = read_word(&memory, page)?;
        ensure!(passes >= 2, "{passes} passes over {page:#x}");
    }
    ensure!(read_word(&memory, sweep.range.end.bytes())? == 0);
    let mut copy = bench.copy("copy", &files)?;
    copy.resume()?;
    copy.serial().wait_for("..", SOON)?;
    Ok(())
}

fn a_scatter() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    let scatter = Scatter::default();
    let mut machine = bench.machine("machine")?;
    machine.boot(&scatter.guest(), Tracking::Off)?;
    machine.serial().wait_for(".", SOON)?;
    let files = bench.snapshot(&mut machine, "snapshot", SnapshotKind::Full)?;
    let memory = File::open(&files.memory)?;
    let mut expected: Vec<u64> = scatter.order().map(u64::from).collect();
    expected.sort_unstable();
    let mut changed = Vec::new();
    for page in 0..1 << scatter.range_bits {
        if read_word(&memory, scatter.from.bytes() + page * PAGE)? != 0 {
            changed.push(page);
        }
    }
    ensure!(changed == expected, "{} pages changed", changed.len());
    let mut copy = bench.copy("copy", &files)?;
    copy.resume()?;
    copy.serial().wait_for("..", SOON)?;
    Ok(())
}

fn a_touched_guest() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    let touch = Touch {
        pause: Ticks(200_000_000),
        ..Touch::default()
    };
    let mut original = bench.machine("original")?;
    original.boot(&touch.guest(), Tracking::Off)?;
    original.serial().wait_for("R", SOON)?;
    let files = bench.snapshot(&mut original, "snapshot", SnapshotKind::Full)?;
    let touched = touch.range.start.bytes();
    ensure!(read_word(&File::open(&files.memory)?, touched)? == 0);

    let mut copy = bench.copy("copy", &files)?;
    copy.resume()?;
    let said = copy.serial().wait_for("T", SOON)?;
    ensure!(said == "T", "{said:?}");
    let before = processor_ticks(copy.pid())?;
    copy.serial().expect_silence(Duration::from_millis(300))?;
    let ticks = processor_ticks(copy.pid())? - before;
    ensure!(ticks <= 3, "{ticks} ticks of 10 ms while it halts");
    let after = bench.snapshot(&mut copy, "after", SnapshotKind::Full)?;
    ensure!(read_word(&File::open(&after.memory)?, touched)? == 1);
    Ok(())
}

fn an_echo() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    let mut machine = bench.machine("machine")?;
    machine.boot(&Echo::default().guest(), Tracking::Off)?;
    machine.serial().wait_for(">", SOON)?;
    machine.keyboard().write_all(b"hello")?;
    let said = machine.serial().wait_for("o", SOON)?;
    ensure!(said == "hello", "{said:?}");
    Ok(())
}

fn read_word(memory: &File, address: u64) -> anyhow::Result<u64> {
    let mut word = [0; 8];
    memory.read_exact_at(&mut word, address)?;
    Ok(u64::from_le_bytes(word))
}

/// Writes what a Diff snapshot has over a Full one, and says how much that was.
fn overlay(diff: &SnapshotFiles, full: &SnapshotFiles) -> anyhow::Result<u64> {
    let from = File::open(&diff.memory)?;
    let to = File::options().write(true).open(&full.memory)?;
    let mut written = 0;
    let mut hole = 0;
    loop {
        let data = match rustix::fs::seek(&from, SeekFrom::Data(hole)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(written),
            Err(error) => return Err(error).context("look for data in the diff"),
        };
        hole = rustix::fs::seek(&from, SeekFrom::Hole(data))?;
        let mut piece = vec![0; usize::try_from(hole - data)?];
        from.read_exact_at(&mut piece, data)?;
        to.write_all_at(&piece, data)?;
        written += hole - data;
    }
}

/// The 14th and 15th field of `stat`: time in user and in kernel mode.
fn processor_ticks(pid: u32) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("a name in parentheses")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3).context("a field is missing");
    Ok(ticks(14)?.parse::<u64>()? + ticks(15)?.parse::<u64>()?)
}
