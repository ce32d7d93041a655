//! A monitor's work where the VM is a throw-away copy.

use anyhow::{Result, bail};
use rekindle_engine::Engine;
use rekindle_engine::store::Snapshot;
use rekindle_engine::vm::Claim;
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::rehearse::{RehearseConfig, Rehearsed, rehearse_in};
use rekindle_engine::vm::state::State;
use tokio::sync::mpsc;

use super::server::{Answer, Ask, Request};

/// Rehearses. The copy can be looked at and ended; whoever asks anything else of it is refused.
pub(super) async fn run(
    engine: &Engine,
    claim: Claim,
    snapshot: &Snapshot,
    config: RehearseConfig,
    requests: &mut mpsc::Receiver<Request>,
) -> Result<Rehearsed> {
    let name = config.name.clone();
    let dir = VmDir::open(engine.root(), &name)?;
    let mut rehearsal = Box::pin(rehearse_in(engine, claim, snapshot, config));
    loop {
        let Request { ask, answer } = tokio::select! {
            rehearsed = &mut rehearsal => return Ok(rehearsed?),
            Some(request) = requests.recv() => request,
        };
        // Who asked may be gone.
        let _ = match ask {
            Ask::Describe => answer.send(described(Record::read(&dir)?)),
            Ask::Stop(_) => {
                let record = Record::read(&dir);
                // That ends the copy, and removes all of it.
                drop(rehearsal);
                let mut record = record?;
                record.state = State::Stopped;
                let _ = answer.send(described(record));
                bail!("{name} was stopped");
            }
            _ => answer.send(Answer::Refused(format!(
                "{name} is a rehearsal, which can only be stopped"
            ))),
        };
    }
}

fn described(record: Record) -> Answer {
    match serde_json::to_value(record) {
        Ok(record) => Answer::Done(record),
        Err(e) => Answer::Failed(e.to_string()),
    }
}
