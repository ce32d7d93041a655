//! Starting a keeper, which starts a monitor, which starts the VM; and waiting for the word that it is up.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::dir::{Hold, VmDir};
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::rehearse::Rehearsed;
use rekindle_engine::vm::state::State;

use super::job::Job;
use super::progress::{Line, first_line};
use super::secrets;

/// The monitor's own errors, relative to the VM's directory.
pub(crate) const MONITOR_LOG: &str = "monitor.log";

/// A keeper that was started, and the pipe through which its monitor will tell how it went.
#[derive(Debug)]
pub(crate) struct Starting {
    name: VmName,
    dir: VmDir,
    keeper: Child,
}

/// Makes the VM's directory, writes the job down and starts it.
pub(crate) fn begin(engine: &Engine, name: &VmName, job: &Job) -> Result<Starting> {
    // Until the keeper can be seen, the new directory looks like one that nobody will ever care for.
    let hold = Hold::wait(engine.root())?;
    let dir = VmDir::create(engine.root(), name)?;
    let begun = secrets::keep(job.environment(), job.metadata()).and_then(|kept| {
        job.write(&dir)?;
        spawn(engine, name, &dir, kept)
    });
    begun.inspect_err(|_| {
        let _ = dir.remove(&hold);
    })
}

/// Starts a VM. It is up when this returns, and belongs to its monitor.
pub(crate) fn start(engine: &Engine, name: &VmName, job: &Job) -> Result<Record> {
    begin(engine, name, job)?.up()
}

/// Starts a keeper for a VM whose own is gone, to adopt or to bury it.
pub(crate) fn revive(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<Starting> {
    spawn(engine, name, dir, None)
}

impl Starting {
    /// Waits until the VM is up. One that has failed already is not.
    pub(crate) fn up(self) -> Result<Record> {
        let record = self.wait()?;
        match &record.state {
            State::Failed(why) => bail!("{} failed: {why}", record.name),
            _ => Ok(record),
        }
    }

    /// Waits until the VM is up.
    pub(crate) fn wait(self) -> Result<Record> {
        let name = self.name.clone();
        match self.line()? {
            Line::Up(record) | Line::Over(record) => Ok(*record),
            Line::Failed(error) => bail!("{error}"),
            Line::Rehearsed(_) => bail!("{name} was a rehearsal, and is gone"),
        }
    }

    /// Waits until the rehearsal is over, and gone.
    pub(crate) fn rehearsed(self) -> Result<Rehearsed> {
        let name = self.name.clone();
        match self.line()? {
            Line::Rehearsed(rehearsed) => Ok(rehearsed),
            Line::Failed(error) => bail!("{error}"),
            Line::Up(_) | Line::Over(_) => bail!("{name} is no rehearsal"),
        }
    }

    /// Waits until the monitor says how it went.
    fn line(mut self) -> Result<Line> {
        let pipe = self
            .keeper
            .stdout
            .take()
            .context("the keeper has no standard output")?;
        match first_line(pipe).context("cannot understand the monitor")? {
            Some(line @ Line::Up(_)) => Ok(line),
            Some(line) => {
                // It has nothing left to do.
                let _ = self.keeper.wait();
                Ok(line)
            }
            None => {
                let _ = self.keeper.wait();
                bail!(
                    "the monitor of {name} died before the VM was up; see {}, then: rekindle rm --force {name}",
                    self.dir.file(MONITOR_LOG).display(),
                    name = self.name
                )
            }
        }
    }
}

fn spawn(engine: &Engine, name: &VmName, dir: &VmDir, kept: Option<File>) -> Result<Starting> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(dir.file(MONITOR_LOG))
        .context("cannot open the monitor's log")?;
    let keeper = Command::new(&program)
        .arg("monitor")
        .arg(name.as_str())
        .arg("--root")
        .arg(engine.root().path())
        .stdin(kept.map_or_else(Stdio::null, Stdio::from))
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    Ok(Starting {
        name: name.clone(),
        dir: dir.clone(),
        keeper,
    })
}
