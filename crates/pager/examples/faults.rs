//! Measures demand faults: `cargo run --release -p rekindle-pager --example faults`, as root.
//!
//! One process plays the VM, one is the page server, as with a real Firecracker but without KVM in between.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use rekindle_kit::uffd::{Answer, Build, FakeVm, Order, Zeros, play_if_asked, write_memory};
use rekindle_pager::{Options, Ready, Socket, Source, Stats, serve};

const PAGES: usize = 65_536;
const TOUCHED: usize = 20_000;

fn main() -> anyhow::Result<()> {
    play_if_asked();
    match std::env::args_os().nth(1) {
        Some(dir) => be_the_page_server(Path::new(&dir)),
        None => measure(),
    }
}

fn be_the_page_server(dir: &Path) -> anyhow::Result<()> {
    let socket = Socket::Path(dir.join("pager.sock"));
    let mut options = Options::new(socket, Source::Memory(dir.join("memory")));
    options.stats = Some(dir.join("stats.json"));
    serve(options, |ready| {
        println!("{}", serde_json::to_string(ready).expect("it is JSON"))
    })?;
    Ok(())
}

fn measure() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let stamps: Vec<u64> = (1..).take(PAGES).collect();
    write_memory(&dir.path().join("memory"), &stamps, Zeros::Holes)?;
    let mut server = Command::new(std::env::current_exe()?)
        .arg(dir.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().context("it has a pipe")?).read_line(&mut line)?;
    let ready: Ready = serde_json::from_str(&line)?;
    println!(
        "waiting for a VM      {:>8} KiB private dirty",
        private_dirty(ready.pid)?
    );

    let mut vm = FakeVm::start(&Build {
        regions: vec![PAGES],
        huge: false,
        blocking: false,
    })?;
    let mut thread = vm.thread()?;
    thread.ask(&Order::handshake(&ready.listening))?;
    let times = match thread.ask(&Order::Time {
        page: 0,
        count: TOUCHED,
    })? {
        Answer::Times(times) => times,
        other => bail!("{other:?}"),
    };
    println!(
        "after {TOUCHED} faults   {:>8} KiB private dirty",
        private_dirty(ready.pid)?
    );
    vm.kill()?;
    server.wait()?;
    let stats: Stats = serde_json::from_slice(&fs::read(dir.path().join("stats.json"))?)?;

    let row = |name, p50, p99| println!("{name:<32} p50 {p50:>8} ns   p99 {p99:>8} ns");
    let (p50, p99) = quantiles(times);
    row("touch to value, in the VM", p50, p99);
    row(
        "read to in place, page server",
        stats.latency.p50_ns,
        stats.latency.p99_ns,
    );
    let (p50, p99) = quantiles(time_reads(&dir.path().join("memory"))?);
    row("of that, reading the file", p50, p99);
    Ok(())
}

/// How long it takes to read each of the pages that were touched, all of them in the page cache.
fn time_reads(memory: &PathBuf) -> anyhow::Result<Vec<u64>> {
    let file = File::open(memory)?;
    let mut buffer = [0; 4096];
    let mut times = Vec::with_capacity(TOUCHED);
    for n in 0..TOUCHED as u64 {
        let begin = Instant::now();
        file.read_exact_at(&mut buffer, n * 7919 % PAGES as u64 * 4096)?;
        times.push(u64::try_from(begin.elapsed().as_nanos())?);
    }
    Ok(times)
}

fn quantiles(mut times: Vec<u64>) -> (u64, u64) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

fn private_dirty(pid: u32) -> anyhow::Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup
        .lines()
        .find(|line| line.starts_with("Private_Dirty:"))
        .context("no such line")?;
    Ok(line
        .split_whitespace()
        .nth(1)
        .context("no number")?
        .parse()?)
}
