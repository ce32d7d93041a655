//! A verb's side of the control socket.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper::Method;
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::store::collect::{Mode, collect};
use rekindle_engine::vm::adopt::end_workers_in;
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::state::{Ask, State, decide};
use rekindle_firecracker::{CallError, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::commands::block_on;

use super::protocol::{CONTROL_SOCKET, Failure, STOP, StopRequest};
use super::truth::{Truth, Watch, look};
use super::watchers::{Farewell, end_watchers};

/// A snapshot of a large VM to a slow disk takes its time; the monitor's death ends the wait at once.
const PATIENCE: Duration = Duration::from_hours(24);

/// To kill a VM takes its monitor milliseconds, unless it does something else: a capture, or a grace period that it
/// grants. Who wants the VM killed does not wait for that.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// Tells the monitor of a VM to do something, and waits until it is done.
pub(crate) fn tell<T: DeserializeOwned>(
    engine: &Engine,
    name: &VmName,
    dir: &VmDir,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<T> {
    tell_within(PATIENCE, engine, name, dir, path, body)
}

/// Whose work it was that a VM was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Killed {
    /// Its monitor did it, and ends by itself.
    Asked,
    /// Its monitor had no time for it, or died over it, and is dead. Nobody has written down that the VM ended.
    Overruled,
}

/// Has a VM killed by its monitor; kills keeper, monitor and VM if that takes too long.
pub(crate) fn kill(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<Killed> {
    let at_once = Some(&StopRequest { grace_ms: 0 });
    match tell_within::<Record>(KILL_PATIENCE, engine, name, dir, STOP, at_once) {
        Ok(_) => return Ok(Killed::Asked),
        Err(e) if !e.is::<CallError>() => return Err(e),
        Err(_) => {}
    }
    end_watchers(engine.root(), name, Farewell::None)?;
    block_on(async {
        end_workers_in(dir).await;
        Ok(())
    })?;
    // A snapshot that was being taken will not be there. Its draft, if it stays now, goes with the next `gc`.
    let _ = collect(engine.root(), Mode::Reclaim);
    Ok(Killed::Overruled)
}

fn tell_within<T: DeserializeOwned>(
    patience: Duration,
    engine: &Engine,
    name: &VmName,
    dir: &VmDir,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<T> {
    match look(engine, name, dir)? {
        // Refused here in the engine's words: an ended VM has no monitor that could.
        Truth::Known(record) if record.state.is_over() => {
            decide(&record.state, ask_of(path))?;
        }
        Truth::Known(record) if record.state == State::Configured => {
            bail!("{name} is still being started")
        }
        Truth::Known(_) if Watch::read(dir).is_none() => {
            bail!("{name} belongs to a program that takes no requests")
        }
        Truth::Known(_) => {}
        Truth::Starting => bail!("{name} is still being started"),
    }
    let body = body.map(serde_json::to_value).transpose()?;
    let client = Client::new(dir.file(CONTROL_SOCKET)).with_deadline(patience);
    let answer = block_on(async { Ok(client.raw(Method::PUT, path, body).await?) })
        .with_context(|| format!("the monitor of {name} does not answer"))?;
    if answer.status >= 300 {
        match serde_json::from_slice::<Failure>(&answer.body) {
            Ok(failure) => bail!("{}", failure.error),
            Err(_) => bail!("the monitor of {name} answered {} to {path}", answer.status),
        }
    }
    serde_json::from_slice(&answer.body)
        .with_context(|| format!("the answer of {name}'s monitor to {path} makes no sense"))
}

fn ask_of(path: &str) -> Ask {
    match path {
        super::protocol::PAUSE => Ask::Pause,
        super::protocol::RESUME => Ask::Resume,
        super::protocol::SNAPSHOT => Ask::Snapshot,
        _ => Ask::Stop,
    }
}
