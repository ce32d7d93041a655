//! Snapshots whose guest is about to touch its memory, and rests after that.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rekindle_engine::net::plan::Nat;
use rekindle_engine::net::policy::Policy;
use rekindle_engine::store::Snapshot;
use rekindle_engine::vm::config::BootConfig;
use rekindle_engine::vm::dir::SERIAL;
use rekindle_engine::vm::restore::RestoreConfig;
use rekindle_engine::vm::snapshot::SnapshotConfig;
use rekindle_engine::{Engine, Vm};

use super::super::super::block_on;
use super::super::guest;
use super::super::machine::Place;
use super::{Kind, name};

/// How many pages a clone touches: 1 MiB.
const PAGES: u32 = 256;
/// How many rounds a guest waits before it touches them, at first, and how many times as many the next one waits. The
/// snapshot has to come before, and what is left of the wait keeps each clone's CPU busy.
const WAIT: u32 = 1000;
const LONGER: u32 = 4;
/// How often that is tried.
const TRIES: u32 = 10;
/// How long a clone may take to touch its pages.
const PATIENCE: Duration = Duration::from_secs(1);

/// One without an interface, and where there are networks one with an interface. Removed when this is dropped.
pub(super) struct Originals {
    engine: Engine,
    plain: Snapshot,
    network: Option<Snapshot>,
}

impl Originals {
    pub(super) fn take(engine: &Engine, with_network: bool) -> Result<Originals> {
        let place = Place::of(engine)?;
        let plain = block_on(take(engine, place.dir(), None))?;
        let mut originals = Originals {
            engine: engine.clone(),
            plain,
            network: None,
        };
        if with_network {
            let nat = Nat::new(Policy::default());
            originals.network = Some(block_on(take(engine, place.dir(), Some(nat)))?);
        }
        Ok(originals)
    }

    pub(super) fn of(&self, kind: Kind) -> &Snapshot {
        match &self.network {
            Some(network) if kind.network => network,
            _ => &self.plain,
        }
    }
}

impl Drop for Originals {
    fn drop(&mut self) {
        for snapshot in [Some(&self.plain), self.network.as_ref()]
            .into_iter()
            .flatten()
        {
            // It can be removed by hand.
            let _ = self.engine.store().remove(snapshot.id());
        }
    }
}

/// Boots guests that wait longer and longer, until a copy of one has the touching before it.
async fn take(engine: &Engine, place: &Path, nat: Option<Nat>) -> Result<Snapshot> {
    let kernel = place.join("once.elf");
    let mut wait = WAIT;
    for _ in 0..TRIES {
        let guest = guest::once(PAGES, wait);
        std::fs::write(&kernel, &guest.elf)?;
        let mut config = BootConfig::new(name(0)?, &kernel).memory_mib(guest.memory_mib);
        if let Some(nat) = &nat {
            config = config.network(nat.clone(), 1);
        }
        let mut original = engine.boot(config).await?;
        let snapshot = original.snapshot(SnapshotConfig::full()).await?;
        original.remove().await?;
        // The first copy records what those that follow replay.
        let mut config = RestoreConfig::new(name(0)?);
        if let Some(nat) = &nat {
            config = config.network(nat.clone());
        }
        let copy = engine.restore(&snapshot, config).await?;
        let touched = touches(&copy).await;
        copy.remove().await?;
        if touched {
            return Ok(snapshot);
        }
        engine.store().remove(snapshot.id())?;
        wait = wait.saturating_mul(LONGER);
    }
    bail!("the guest of the bench is faster than its snapshot");
}

async fn touches(copy: &Vm) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if has_touched(copy.dir().file(SERIAL)) {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    false
}

/// Whether a guest has printed its dot.
pub(super) fn has_touched(serial: impl AsRef<Path>) -> bool {
    std::fs::read(serial).is_ok_and(|output| output.contains(&b'.'))
}
