//! Boots a guest, snapshots it, starts copies of it, and prints what took how long.
//!
//! ```text
//! cargo run --release -p rekindle-engine --example snapshot_and_clone -- KERNEL [COPIES] [INITRD]
//!
//!   boot ─▶ a second to warm up ─▶ snapshot ─▶ stop ─▶ copies, side by side in memory ─▶ all removed
//! ```
//!
//! It needs `rekindle` in `$PATH` (its verb `pager` is the page server), and Firecracker as [`Programs::discover`]
//! finds it. After `rekindle setup`, a kernel and an initrd are in `/var/lib/rekindle/assets/bin`.

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rekindle_engine::programs::Programs;
use rekindle_engine::store::{Root, Snapshot, VmName};
use rekindle_engine::vm::config::BootConfig;
use rekindle_engine::vm::dir::PAGER_STATS;
use rekindle_engine::vm::record::Timings;
use rekindle_engine::vm::restore::RestoreConfig;
use rekindle_engine::vm::snapshot::SnapshotConfig;
use rekindle_engine::vm::stop::Manner;
use rekindle_engine::{Engine, Vm};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MEMORY_MIB: u32 = 128;
/// How long the original may warm up, and the copies may run.
const A_WHILE: Duration = Duration::from_secs(1);

// One thread is enough: Firecracker and the page servers are processes of their own.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let kernel = arguments
        .next()
        .ok_or("usage: snapshot_and_clone KERNEL [COPIES] [INITRD]")?;
    let copies: u32 = arguments.next().map_or(Ok(3), |count| count.parse())?;
    let initrd = arguments.next();

    // The state directory is the program's: `rekindle ps` in another terminal shows what this one does.
    let root = env::var_os("REKINDLE_ROOT").map(PathBuf::from);
    let root = Root::open(&root.map_or_else(Root::default_path, Ok)?)?;
    let programs = Programs::discover(&root)?;
    let engine = Engine::new(root, programs);

    let snapshot = warm_snapshot(&engine, kernel, initrd).await?;
    // Whatever becomes of the copies, the snapshot goes; a VM that is dropped is ended and removed.
    let told = clones(&engine, &snapshot, copies).await;
    engine.store().remove(snapshot.id())?;
    told
}

/// Boots the guest, lets it warm up, and keeps what it has become by then.
async fn warm_snapshot(
    engine: &Engine,
    kernel: String,
    initrd: Option<String>,
) -> Result<Snapshot> {
    let mut config = BootConfig::new(name("original")?, kernel).memory_mib(MEMORY_MIB);
    if let Some(initrd) = initrd {
        // A bare-metal guest is content with Firecracker's own command line; Linux wants a console.
        config = config
            .initrd(initrd)
            .boot_args("console=ttyS0 reboot=k panic=1 pci=off quiet");
    }
    let mut original = engine.boot(config).await?;
    println!("boot       {}", timings(original.record().timings));
    tokio::time::sleep(A_WHILE).await;

    let begun = Instant::now();
    let snapshot = original.snapshot(SnapshotConfig::full()).await?;
    println!(
        "snapshot   written, hashed and published in {:?}",
        begun.elapsed()
    );
    original.remove().await?;
    Ok(snapshot)
}

/// Starts the copies, lets them run, and tells how much of their memory came in meanwhile.
async fn clones(engine: &Engine, snapshot: &Snapshot, copies: u32) -> Result<()> {
    let mut running = Vec::new();
    for n in 1..=copies {
        let config = RestoreConfig::new(name(&format!("copy-{n}"))?);
        let copy = engine.restore(snapshot, config).await?;
        println!("copy {n:<5} {}", timings(copy.record().timings));
        running.push(copy);
    }
    tokio::time::sleep(A_WHILE).await;
    for (n, mut copy) in (1..).zip(running) {
        copy.stop(Manner::Kill).await?;
        println!("copy {n:<5} {}", pages(&copy)?);
        copy.remove().await?;
    }
    Ok(())
}

/// A name that another run of this program does not take.
fn name(what: &str) -> Result<VmName> {
    Ok(format!("{what}-{}", std::process::id()).parse()?)
}

fn timings(took: Timings) -> String {
    let step = |name: &str, us: Option<u64>| {
        us.map_or_else(String::new, |us| {
            format!("{name} {:?}  ", Duration::from_micros(us))
        })
    };
    [
        step("API", took.api_us),
        step("configure", took.configure_us),
        step("load", took.load_us),
        step("start", took.start_us),
        step("total", took.total_us),
    ]
    .concat()
}

/// What the page server left in the VM's directory when the VM had ended.
fn pages(copy: &Vm) -> Result<String> {
    let stats = std::fs::read(copy.dir().file(PAGER_STATS))?;
    let stats: serde_json::Value = serde_json::from_slice(&stats)?;
    let all = u64::from(MEMORY_MIB) << 8;
    Ok(format!(
        "{} pages copied, {} zeroed, of {all}",
        stats["copied"], stats["zeroed"]
    ))
}
