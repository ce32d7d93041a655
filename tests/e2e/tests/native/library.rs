//! The library, without the program's monitor: a VM is a value that this process owns.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rekindle_e2e::{Rekindle, SOON, is_drained, sequence};
use rekindle_engine::programs::Programs;
use rekindle_engine::store::Root;
use rekindle_engine::vm::adopt::{Adopted, adopt};
use rekindle_engine::vm::config::{Backend, BootConfig};
use rekindle_engine::vm::restore::RestoreConfig;
use rekindle_engine::vm::snapshot::SnapshotConfig;
use rekindle_engine::vm::state::{State, Why};
use rekindle_engine::vm::stop::Manner;
use rekindle_engine::vm::wake::Environment;
use rekindle_engine::{Engine, Vm};
use rekindle_kit::story::Story;

use crate::bare::counter;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a VM of the library lives as long as its owner",
            as_long_as_its_owner,
        ),
        story("a VM of the library is let go and taken up again", let_go),
        story("the library tells of a VM that died", a_vm_that_died),
        story(
            "a diff builds on the snapshot that was captured last, not published last",
            captured_last,
        ),
    ]
}

fn story<F>(name: &'static str, tell: fn(Stage) -> F) -> Story
where
    F: Future<Output = anyhow::Result<Stage>> + 'static,
{
    Story::future(name, move || async move {
        let stage = tell(Stage::new()?).await?;
        stage.rekindle.leaves_nothing()
    })
}

/// An engine, and the program that works in the same state directory.
struct Stage {
    rekindle: Rekindle,
    engine: Engine,
}

impl Stage {
    fn new() -> anyhow::Result<Stage> {
        let rekindle = Rekindle::new()?;
        let programs = Programs {
            firecracker: rekindle.firecracker().to_owned(),
            rekindle: rekindle.program().to_owned(),
        };
        let engine = Engine::new(Root::open(rekindle.state())?, programs);
        Ok(Stage { rekindle, engine })
    }

    async fn boots(&self, name: &str) -> anyhow::Result<Vm> {
        let kernel = self.rekindle.file("counter");
        counter().write(&kernel)?;
        let config = BootConfig::new(name.parse()?, kernel).memory_mib(32);
        Ok(self.engine.boot(config).await?)
    }
}

/// Waits, letting the runtime drain the guest's output, until `lines` are there.
async fn counts(vm: &Path, lines: usize) -> anyhow::Result<String> {
    let deadline = Instant::now() + SOON;
    loop {
        let text = std::fs::read_to_string(vm.join("serial")).unwrap_or_default();
        if text.lines().count() >= lines {
            return Ok(text);
        }
        ensure!(Instant::now() < deadline, "only {text:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits, letting the runtime drain it, until all that a paused guest has printed is in its file.
async fn drained(vm: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    while !is_drained(vm)? {
        ensure!(Instant::now() < deadline, "nobody drains it");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

async fn as_long_as_its_owner(stage: Stage) -> anyhow::Result<Stage> {
    let mut vm = stage.boots("vm").await?;
    ensure!(*vm.state() == State::Running);
    let dir = vm.dir().path().to_owned();
    counts(&dir, 3).await?;
    vm.pause().await?;
    drained(&dir).await?;
    let counted = counts(&dir, 3).await?;
    let snapshot = vm
        .snapshot(SnapshotConfig::full().name("base".parse()?))
        .await?;
    ensure!(*vm.state() == State::Paused);
    ensure!(vm.pause().await.is_ok());
    drop(vm);
    ensure!(!dir.exists(), "{} is still there", dir.display());
    let left = stage.rekindle.processes()?;
    ensure!(left.is_empty(), "{left:?}");

    for backend in [Backend::Uffd, Backend::File] {
        let config = RestoreConfig::new("copy".parse()?).backend(backend);
        let mut copy = stage.engine.restore(&snapshot, config).await?;
        let went_on = counts(copy.dir().path(), 3).await?;
        ensure!(sequence(&(counted.clone() + &went_on))?.0 == 1);
        ensure!(copy.stop(Manner::Kill).await? == State::Stopped);
        ensure!(copy.pause().await.is_err());
        copy.remove().await?;
    }
    Ok(stage)
}

async fn let_go(stage: Stage) -> anyhow::Result<Stage> {
    let original = stage.boots("vm").await?;
    counts(original.dir().path(), 3).await?;
    original.detach();

    let none = Environment::default();
    let Adopted::Alive(mut vm) = adopt(&stage.engine, dir(&stage, "vm")?, &none).await? else {
        bail!("it was not taken up");
    };
    ensure!(*vm.state() == State::Running);
    let seen = counts(vm.dir().path(), 3).await?.lines().count();
    let said = stage.rekindle.tries("ps --json")?;
    ensure!(said.err.is_empty(), "{said:?}");
    ensure!(said.json()?[0]["state"] == "running");
    let said = stage.rekindle.refuses("pause vm")?;
    ensure!(said.contains("takes no requests"), "{said}");
    let again = adopt(&stage.engine, dir(&stage, "vm")?, &none).await;
    ensure!(again.is_err(), "it was taken up twice");
    let text = counts(vm.dir().path(), seen + 5).await?;
    ensure!(sequence(&text)?.0 == 1);
    vm.pause().await?;
    vm.detach();

    // The program finds what the library let go, and looks after it from now on.
    let said = stage.rekindle.tries("ps --json")?;
    ensure!(said.err.contains("the VM is paused now"), "{said:?}");
    ensure!(said.json()?[0]["state"] == "paused");
    stage.rekindle.does("resume vm")?;
    let mut guest = stage.rekindle.follows("vm")?;
    guest.counts(seen + 10)?;
    Ok(stage)
}

fn dir(stage: &Stage, name: &str) -> anyhow::Result<rekindle_engine::vm::dir::VmDir> {
    let dir = rekindle_engine::vm::dir::VmDir::open(stage.engine.root(), &name.parse()?);
    dir.context("its directory")
}

async fn a_vm_that_died(stage: Stage) -> anyhow::Result<Stage> {
    let mut vm = stage.boots("vm").await?;
    for (_, process) in stage.rekindle.processes()? {
        process.kill(SOON)?;
    }
    let state = vm.ended().await;
    let State::Failed(Why::FirecrackerDied { exit, .. }) = state else {
        bail!("it ended as {state}");
    };
    ensure!(exit.contains('9'), "{exit}");
    ensure!(vm.resume().await.is_err());
    Ok(stage)
}

/// The dirty log begins anew with each capture: what is published out of turn must not become a Diff's base.
async fn captured_last(stage: Stage) -> anyhow::Result<Stage> {
    let kernel = stage.rekindle.file("counter");
    counter().write(&kernel)?;
    let config = BootConfig::new("c".parse()?, kernel)
        .memory_mib(32)
        .track_dirty_pages();
    let mut vm = stage.engine.boot(config).await?;
    let first = vm.capture(SnapshotConfig::full()).await?;
    let second = vm.capture(SnapshotConfig::full()).await?;
    let (first_id, second_id) = (first.id(), second.id());
    let second = second.publish()?;
    vm.published(&second);
    let first = first.publish()?;
    vm.published(&first);
    ensure!(first.id() == first_id && second.id() == second_id);
    let diff = vm.snapshot(SnapshotConfig::diff()).await?;
    ensure!(
        diff.manifest().parent() == Some(second_id),
        "it builds on {:?}",
        diff.manifest().parent()
    );
    vm.remove().await?;
    drop((first, second, diff));
    Ok(stage)
}
