//! Many clones that are started at once.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rekindle_engine::Engine;
use rekindle_engine::store::{Snapshot, VmName};
use rekindle_engine::vm::dir::{SERIAL, VmDir};

use super::super::super::rm;
use super::super::memory::private_dirty;
use super::super::raw::micros;
use super::super::stats::Samples;
use super::original::has_touched;
use super::{AtOnce, Kind, name};
use crate::monitor::job::{Job, Task};
use crate::monitor::start;
use crate::output;

/// How long all of them may take to touch their pages.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long they rest before they are weighed.
const REST: Duration = Duration::from_secs(2);

/// They are removed when this is dropped.
pub(super) struct Flock<'a> {
    engine: &'a Engine,
    kind: Kind,
    begun: Instant,
    /// Those that run.
    names: Vec<VmName>,
    restores: Samples,
    failed: usize,
    running: f64,
}

impl<'a> Flock<'a> {
    /// All of them run when this returns, but for those that failed.
    pub(super) fn start(
        engine: &'a Engine,
        snapshot: &Snapshot,
        kind: Kind,
        count: u32,
    ) -> Result<Flock<'a>> {
        let mut flock = Flock {
            engine,
            kind,
            begun: Instant::now(),
            names: Vec::new(),
            restores: Samples::default(),
            failed: 0,
            running: 0.0,
        };
        let mut starting = Vec::new();
        for n in 1..=count {
            let name = name(n)?;
            let task = Task::Restore {
                snapshot: snapshot.id().to_string(),
                config: kind.config(name.clone()),
            };
            let job = Job::new(engine.programs().firecracker.clone(), task);
            starting.push(start::begin(engine, &name, &job)?);
            flock.names.push(name);
        }
        let mut first_failure = None;
        for (starting, name) in starting.into_iter().zip(flock.names.clone()) {
            match starting.up() {
                Ok(record) => {
                    let micros = record.timings.total_us.unwrap_or_default();
                    flock
                        .restores
                        .push(Duration::from_micros(micros).as_secs_f64() * 1e6);
                }
                Err(e) => {
                    flock.failed += 1;
                    flock.names.retain(|other| *other != name);
                    first_failure.get_or_insert(e);
                }
            }
        }
        flock.running = micros(flock.begun);
        if let Some(e) = first_failure {
            output::say(format_args!(
                "{}: {} of {count} failed, the first: {e:#}",
                kind.what, flock.failed
            ));
            ensure!(!flock.names.is_empty(), "none of the clones runs");
        }
        Ok(flock)
    }

    /// Waits until all have touched their pages, weighs them, and removes them.
    pub(super) fn measure(mut self) -> Result<AtOnce> {
        let touched = self.touched()?;
        std::thread::sleep(REST);
        let mut kib = Samples::default();
        for name in &self.names {
            let of = private_dirty(self.engine.root(), name)?;
            kib.push(of.keeper + of.monitor + of.pager);
        }
        let begun = Instant::now();
        self.remove()?;
        Ok(AtOnce {
            what: self.kind.what,
            failed: self.failed,
            restore: self.restores.summary(),
            running_us: self.running,
            touched_us: touched,
            private_dirty_kib: kib.spread(),
            removed_us: micros(begun),
        })
    }

    fn touched(&self) -> Result<f64> {
        let mut left = self.names.clone();
        loop {
            left.retain(|name| {
                let dir = VmDir::open(self.engine.root(), name);
                dir.is_ok_and(|dir| !has_touched(dir.file(SERIAL)))
            });
            if left.is_empty() {
                return Ok(micros(self.begun));
            }
            if self.begun.elapsed() > PATIENCE {
                bail!(
                    "{} clones have not touched their memory in {PATIENCE:?}",
                    left.len()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn remove(&mut self) -> Result<()> {
        while let Some(name) = self.names.pop() {
            let dir = VmDir::open(self.engine.root(), &name)?;
            rm::remove(self.engine, &name, &dir, true)
                .with_context(|| format!("cannot remove {name}"))?;
        }
        Ok(())
    }
}

impl Drop for Flock<'_> {
    fn drop(&mut self) {
        // What is left is to be seen by ps.
        while !self.names.is_empty() {
            let _ = self.remove();
        }
    }
}
