//! Rehearsals: a throw-away copy of a snapshot runs for a moment, so that the first copy that matters is fast already.
//!
//! ```text
//!   Claim ─▶ restore, cut off from every network ─▶ until it is ready, or time is up ─▶ SIGKILL
//!                     page server ── what the guest touches ──────────────────────────────┴─▶ working-set
//! ```
//!
//! The copy is marked in its record as one that nobody wants to keep. Whoever finds it without its owner ends it
//! instead of adopting it.

use std::time::{Duration, Instant};

use rekindle_store::working_set::{self, WorkingSet, WorkingSetError};
use rekindle_store::{Snapshot, VmName};
use serde::{Deserialize, Serialize};

use super::claim::Claim;
use super::config::Machine;
use super::dir::{
    DirError, PAGER_LOG, PAGER_PLAN, PAGER_STATE, PAGER_STATS, PAGER_TOUCHED, SERIAL, VmDir,
};
use super::follow::{Changes, FollowError, Follower};
use super::record::{Purpose, fresh_id};
use super::restore::{RestoreConfig, RestoreError, check, restore_in};
use super::state::{State, Why};
use super::stop::Manner;
use super::{Vm, VmError};
use crate::{Engine, host, net};

/// How long a rehearsal runs at the most: what a guest touches later is not recorded.
pub const LONGEST: Duration = Duration::from_secs(10);

/// How to rehearse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RehearseConfig {
    /// What the copy is called while it runs.
    pub name: VmName,
    /// How long it runs; [`LONGEST`] at the most.
    pub limit: Duration,
    /// It has done enough when the guest prints this to its serial console.
    pub ready_on: Option<String>,
}

impl RehearseConfig {
    /// Runs as long as anything is recorded, under a name that nobody has.
    pub fn new() -> Self {
        let name = format!("rehearsal-{}", fresh_id());
        RehearseConfig {
            name: name.parse().expect("letters, digits and '-', 18 of them"),
            limit: LONGEST,
            ready_on: None,
        }
    }

    /// Runs no longer than this.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Ends when the guest has printed this; it is looked for in what the copy prints, in one line.
    pub fn ready_on(mut self, text: impl Into<String>) -> Self {
        self.ready_on = Some(text.into());
        self
    }
}

impl Default for RehearseConfig {
    fn default() -> Self {
        Self::new()
    }
}

/// What a rehearsal came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearsed {
    /// How many pages the snapshot's working set has now.
    pub pages: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// How long the copy ran, in microseconds.
    pub ran_us: u64,
    /// Why it ran no longer.
    pub ended: Ending,
}

/// Why a rehearsal was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The guest printed what was waited for.
    Ready,
    /// Its time was up.
    TimeIsUp,
    /// The guest shut itself down.
    GuestEnded,
}

/// Why a snapshot was not rehearsed. The snapshot is as it was, or knows some pages more; of the copy nothing is left.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RehearseError {
    /// The copy's directory could not be made or removed.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The copy did not start.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// What it prints cannot be read.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// It could not be ended.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// It died.
    #[error("the copy died: {0}")]
    Died(Why),
    /// It ran, and nobody took down what it touched.
    #[error("nothing was recorded{}", words(.log))]
    Unrecorded {
        /// What the page server said.
        log: Vec<String>,
    },
    /// The working set cannot be read.
    #[error(transparent)]
    WorkingSet(#[from] WorkingSetError),
}

fn words(log: &[String]) -> String {
    log.iter().map(|line| format!("; {line}")).collect()
}

/// Refuses, before a snapshot is taken, a machine of which this process could rehearse none.
pub fn check_machine(machine: &Machine) -> Result<(), RehearseError> {
    host::check_userfaultfd().map_err(RestoreError::from)?;
    if machine.nics.is_empty() {
        return Ok(());
    }
    Ok(net::check_rights().map_err(RestoreError::from)?)
}

/// Rehearses under a name that is free.
pub(crate) async fn rehearse(
    engine: &Engine,
    snapshot: &Snapshot,
    config: RehearseConfig,
) -> Result<Rehearsed, RehearseError> {
    check(snapshot.manifest(), &copy_of(&config))?;
    let claim = Claim::new(engine, &config.name)?;
    rehearse_in(engine, claim, snapshot, config).await
}

/// Rehearses in a directory that this process holds, which is gone afterwards. Dropped half-way, it leaves nothing.
pub async fn rehearse_in(
    engine: &Engine,
    claim: Claim,
    snapshot: &Snapshot,
    config: RehearseConfig,
) -> Result<Rehearsed, RehearseError> {
    forget_earlier(claim.dir())?;
    let runs = |set: &Option<WorkingSet>| set.as_ref().map_or(0, WorkingSet::runs);
    let path = snapshot.working_set_path();
    // One that is damaged is replaced by what is recorded now.
    let before = working_set::read(&path).unwrap_or_default();

    let mut vm = restore_in(engine, claim, snapshot, copy_of(&config)).await?;
    let begun = Instant::now();
    let ended = watch(&mut vm, &config).await;
    let ran = begun.elapsed();
    // The page server writes the working set when the guest is gone; that is waited for.
    vm.stop(Manner::Kill).await?;
    let state = vm.state().clone();
    let log = last_words(vm.dir());
    vm.remove().await?;

    let ended = ended?;
    if let State::Failed(why) = state {
        return Err(RehearseError::Died(why));
    }
    let after = working_set::read(&path)?;
    match &after {
        Some(set) if set.runs() != runs(&before) => {
            let pages = u64::try_from(set.touched().len()).unwrap_or(u64::MAX);
            Ok(Rehearsed {
                pages,
                bytes: pages.saturating_mul(set.page_size()),
                ran_us: u64::try_from(ran.as_micros()).unwrap_or(u64::MAX),
                ended,
            })
        }
        _ => Err(RehearseError::Unrecorded { log }),
    }
}

/// The copy that is restored. It replays nothing, so that all that it touches is seen.
fn copy_of(config: &RehearseConfig) -> RestoreConfig {
    let mut copy = RestoreConfig::new(config.name.clone())
        .cut_off()
        .no_replay();
    copy.purpose = Purpose::Rehearsal;
    copy
}

/// Removes what the copy printed, and what its page server left, when it was tried before.
fn forget_earlier(dir: &VmDir) -> Result<(), DirError> {
    let of_pager = [
        PAGER_STATS,
        PAGER_STATE,
        PAGER_PLAN,
        PAGER_TOUCHED,
        PAGER_LOG,
    ];
    for name in [SERIAL].into_iter().chain(of_pager) {
        let path = dir.file(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(DirError::io(path, e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Waits until the copy has done enough.
async fn watch(vm: &mut Vm, config: &RehearseConfig) -> Result<Ending, FollowError> {
    let time_is_up = tokio::time::sleep(config.limit.min(LONGEST));
    let Some(text) = &config.ready_on else {
        return Ok(tokio::select! {
            () = time_is_up => Ending::TimeIsUp,
            () = vm.death() => end_of(vm).await,
        });
    };
    let mut listener = Listener::new(vm.dir(), text);
    let mut changes = Changes::of(vm.dir())?;
    tokio::pin!(time_is_up);
    loop {
        if listener.heard()? {
            return Ok(Ending::Ready);
        }
        tokio::select! {
            changed = changes.next() => changed?,
            () = &mut time_is_up => return Ok(Ending::TimeIsUp),
            () = vm.death() => {
                let end = end_of(vm).await;
                // What it said last is out now.
                return Ok(if listener.heard()? { Ending::Ready } else { end });
            }
        }
    }
}

async fn end_of(vm: &mut Vm) -> Ending {
    vm.ended().await;
    Ending::GuestEnded
}

/// Looks for a text in what a guest prints.
struct Listener {
    follower: Follower,
    text: Vec<u8>,
    /// What came last, as much as may be the beginning of the text.
    tail: Vec<u8>,
}

impl Listener {
    fn new(dir: &VmDir, text: &str) -> Listener {
        Listener {
            follower: Follower::from_start(&dir.file(SERIAL)),
            text: text.as_bytes().to_vec(),
            tail: Vec::new(),
        }
    }

    /// Whether the text has come by now.
    fn heard(&mut self) -> Result<bool, FollowError> {
        let mut heard = false;
        let Listener {
            follower,
            text,
            tail,
        } = self;
        follower.read_new(&mut |bytes| -> Result<(), FollowError> {
            heard |= contains(tail, text, bytes);
            Ok(())
        })?;
        Ok(heard)
    }
}

/// Adds `bytes` to `tail`, and tells whether `text` is in it now. Keeps as much as may be the beginning of it.
fn contains(tail: &mut Vec<u8>, text: &[u8], bytes: &[u8]) -> bool {
    tail.extend_from_slice(bytes);
    let found = text.is_empty() || tail.windows(text.len()).any(|part| part == text);
    let kept = text.len().saturating_sub(1).min(tail.len());
    tail.drain(..tail.len() - kept);
    found
}

fn last_words(dir: &VmDir) -> Vec<String> {
    let log = std::fs::read_to_string(dir.file(PAGER_LOG)).unwrap_or_default();
    log.lines().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_however_it_is_cut() {
        let printed = b"booting...\nserver is ready\n$ ";
        for size in 1..=printed.len() {
            let mut tail = Vec::new();
            let mut chunks = printed.chunks(size);
            assert!(chunks.any(|bytes| contains(&mut tail, b"is ready", bytes)));
            let mut tail = Vec::new();
            let mut chunks = printed.chunks(size);
            assert!(!chunks.any(|bytes| contains(&mut tail, b"is steady", bytes)));
            assert!(tail.len() < 9, "{tail:?}");
        }
    }

    #[test]
    fn rehearsals_have_names_of_their_own() {
        let (a, b) = (RehearseConfig::new(), RehearseConfig::new());
        assert_ne!(a.name, b.name);
        assert_eq!(a.limit, LONGEST);
    }
}
