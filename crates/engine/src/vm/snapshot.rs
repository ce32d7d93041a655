//! Snapshots: the guest stands still only while Firecracker writes and the disks are copied; hashing comes after.
//!
//! ```text
//!   quiesce ─▶ record "capturing" ─▶ pause ─▶ state + memory ─┬─▶ resume ─▶ Captured ─▶ hash, punch, publish
//!   (if it has an agent)                     disks copied ────┘   (if it ran before)     (a blocking thread)
//! ```

use std::io;
use std::time::{Duration, Instant};

use rekindle_firecracker::CallError;
use rekindle_firecracker::model::SnapshotCreateParams;
use rekindle_pager::{Live, PageRun, StateError};
use rekindle_store::disk::copy_disk;
use rekindle_store::file::FileError;
use rekindle_store::manifest::Kind;
use rekindle_store::publish::{BeginError, PublishError};
use rekindle_store::unit::{PAGE_SIZE, PageCount, PageNumber, PageRange};
use rekindle_store::{Draft, ManifestParts, Snapshot, SnapshotId, SnapshotName};
use serde::{Deserialize, Serialize};

use super::config::{Access, DirtyPages};
use super::dir::{PAGER_STATE, VmDir, disk_path};
use super::portable::{self, Unportable};
use super::quiesce::Quiesce;
use super::record::{Capturing, Origin, Record, RecordError};
use super::state::{Ask, Refusal, State, decide};
use super::{Vm, VmError};
use crate::jail::{Jail, JailError};

/// What is written, as a jailed Firecracker finds it.
const STATE: &str = "vmstate.out";
const MEMORY: &str = "memory.out";

/// How much of the memory a snapshot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// All of it.
    Full,
    /// What changed since the last snapshot.
    Diff,
}

/// What to take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotConfig {
    /// All of the memory, or what changed since the last snapshot.
    pub kind: SnapshotKind,
    /// A name for it, unique under its root.
    pub name: Option<SnapshotName>,
    /// Whether the guest's file systems stand still meanwhile.
    pub quiesce: Quiesce,
}

impl SnapshotConfig {
    /// All of the memory.
    pub fn full() -> Self {
        SnapshotConfig {
            kind: SnapshotKind::Full,
            name: None,
            quiesce: Quiesce::default(),
        }
    }

    /// What changed since the last snapshot. The VM must track dirty pages.
    pub fn diff() -> Self {
        SnapshotConfig {
            kind: SnapshotKind::Diff,
            name: None,
            quiesce: Quiesce::default(),
        }
    }

    /// Gives it a name.
    pub fn name(mut self, name: SnapshotName) -> Self {
        self.name = Some(name);
        self
    }
}

/// Why a snapshot was not taken. The VM is as it was before, and nothing is left in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The VM's state forbids it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A Diff needs dirty-page tracking.
    #[error(
        "this VM does not track dirty pages, which a diff snapshot needs: take a full one, or start the VM with --track-dirty-pages"
    )]
    NotTracked,
    /// A Diff needs a snapshot to build on.
    #[error(
        "there is no snapshot that a diff could build on (none was taken, or the last one failed): take a full one"
    )]
    NoBase,
    /// A Diff needs its parent where it is itself.
    #[error(
        "a diff builds on {url}, which is not in this state directory: pull it first, or take a full one: rekindle snapshot pull {url}"
    )]
    BaseElsewhere {
        /// Where it is.
        url: String,
    },
    /// A Diff needs to know what the balloon took.
    #[error(
        "this VM has a balloon, and nobody knows which pages it took: take a full one (a diff needs a VM that was restored with --backend uffd)"
    )]
    Balloon,
    /// What the balloon took cannot be read.
    #[error("cannot tell which pages the balloon took")]
    Removed(#[from] StateError),
    /// The store cannot take another snapshot.
    #[error(transparent)]
    Begin(#[from] BeginError),
    /// The store could not publish it.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The VM is something that no manifest can describe.
    #[error(transparent)]
    Unportable(#[from] Unportable),
    /// Firecracker refused, or the VM died.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Firecracker cannot be let write out of its jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A drive could not be copied.
    #[error("cannot copy the drive {id}")]
    Drive {
        /// The drive.
        id: String,
        /// Why not.
        #[source]
        source: FileError,
    },
    /// A helper thread was lost.
    #[error("the task that copies the drives was lost")]
    Task(#[source] io::Error),
}

impl From<RecordError> for CaptureError {
    fn from(e: RecordError) -> Self {
        CaptureError::Vm(e.into())
    }
}

/// A snapshot that is on disk and not yet published.
#[derive(Debug)]
pub struct Captured {
    draft: Draft,
    parts: ManifestParts,
    paused: Duration,
}

impl Captured {
    /// Hashes, punches holes, publishes. Blocks; the guest runs meanwhile.
    pub fn publish(self) -> Result<Snapshot, PublishError> {
        self.draft.publish(self.parts)
    }

    /// How long the guest stood still for it; zero if it was paused anyway.
    pub fn paused(&self) -> Duration {
        self.paused
    }

    /// The id that it will have.
    pub fn id(&self) -> SnapshotId {
        self.draft.id()
    }
}

impl Vm {
    /// Takes a snapshot and publishes it. The VM is afterwards in the state it was in before.
    pub async fn snapshot(&mut self, config: SnapshotConfig) -> Result<Snapshot, CaptureError> {
        let captured = self.capture(config).await?;
        let snapshot = tokio::task::spawn_blocking(move || captured.publish())
            .await
            .map_err(|e| CaptureError::Task(io::Error::other(e)))??;
        self.published(&snapshot);
        Ok(snapshot)
    }

    /// The part of taking a snapshot that needs the VM. The rest is [`Captured::publish`], and telling the VM of
    /// its success with [`Vm::published`].
    pub async fn capture(&mut self, config: SnapshotConfig) -> Result<Captured, CaptureError> {
        decide(&self.record.state, Ask::Snapshot)?;
        let kind = self.kind_for(config.kind)?;
        let mut parts = portable::manifest_parts(self.engine.root(), &self.record(), kind)?;
        let draft = self.engine.store().begin(config.name.clone())?;
        let before = self.record.state.clone();
        let (still, words) = self.stand_still(config.quiesce).await;
        parts.notes = words;
        // Firecracker starts a new dirty log with this snapshot: until it is published there is no base.
        let base = self.record.diff_base.take();
        self.captured = Some(draft.id());
        self.record.capturing = Some(match before {
            State::Running => Capturing::WasRunning,
            _ => Capturing::WasPaused,
        });
        if let Err(e) = self.write_record() {
            // Nothing was asked of Firecracker yet.
            self.record.capturing = None;
            self.record.diff_base = base;
            return Err(e.into());
        }

        let begun = Instant::now();
        let mut written = self.write_out(&config, &draft).await;
        if written.is_ok() {
            match self.take_removed() {
                Ok(removed) => parts.removed = removed,
                // The next Diff cannot tell these from what is removed after them: it has no base.
                Err(_) if kind == Kind::Full => self.captured = None,
                Err(e) => written = Err(e.into()),
            }
        }
        // The draft goes first: a disk that it filled then has room for the record.
        let written = written.map(|()| draft);
        let resumed = if before == State::Running {
            // Whatever the record says: a pause that was not answered in time may still have happened.
            self.change(State::Running, async |client| client.resume().await)
                .await
        } else {
            Ok(())
        };
        drop(still);
        let paused = if before == State::Running {
            begun.elapsed()
        } else {
            Duration::ZERO
        };
        self.record.capturing = None;
        let recorded = self.write_record();
        let done = written.and_then(|draft| {
            resumed?;
            recorded?;
            Ok(draft)
        });
        match done {
            Ok(draft) => Ok(Captured {
                draft,
                parts,
                paused,
            }),
            Err(e) => {
                // Now that there is no draft: the VM goes on, and whoever asks must not be told otherwise.
                let _ = self.write_record();
                Err(e)
            }
        }
    }

    /// Tells the VM that a snapshot of it is published: the next Diff builds on it.
    ///
    /// Only the one that was captured last can be: the dirty log began anew with it, also if an earlier one is
    /// published later.
    pub fn published(&mut self, snapshot: &Snapshot) {
        if self.record.machine.dirty_pages == DirtyPages::Tracked
            && self.captured == Some(snapshot.id())
        {
            self.record.diff_base = Some(snapshot.id());
            // A record that was not written costs a Full snapshot where a Diff had done, nothing else.
            let _ = self.write_record();
        }
    }

    fn kind_for(&self, kind: SnapshotKind) -> Result<Kind, CaptureError> {
        match kind {
            SnapshotKind::Full => Ok(Kind::Full),
            SnapshotKind::Diff
                if self.record.machine.balloon.is_some() && self.ledger.pager().is_none() =>
            {
                Err(CaptureError::Balloon)
            }
            SnapshotKind::Diff if self.record.machine.dirty_pages == DirtyPages::Untracked => {
                Err(CaptureError::NotTracked)
            }
            SnapshotKind::Diff => {
                let parent = self.record.diff_base.ok_or(CaptureError::NoBase)?;
                if let Origin::Restore {
                    snapshot,
                    from: Some(url),
                    ..
                } = &self.record.origin
                    && *snapshot == parent
                    && self.engine.store().resolve(&parent.to_string()).is_err()
                {
                    return Err(CaptureError::BaseElsewhere { url: url.clone() });
                }
                Ok(Kind::Diff { parent })
            }
        }
    }

    /// The pages that the balloon took since the last snapshot, which from now on is this one. Dirty logging does not
    /// see them. Only while the guest stands still, after Firecracker has written.
    fn take_removed(&self) -> Result<Vec<PageRange>, StateError> {
        if self.record.machine.balloon.is_none() || self.ledger.pager().is_none() {
            return Ok(Vec::new());
        }
        let live = Live::open(&self.dir().file(PAGER_STATE))?;
        let runs = live.recently_removed();
        live.forget_removed(&runs);
        let pages = live.page_bytes() / PAGE_SIZE;
        let range = |run: &PageRun| PageRange {
            first: PageNumber::new(run.first.get() * pages),
            count: PageCount::new(run.count * pages),
        };
        Ok(runs.iter().map(range).collect())
    }

    /// Pauses, and lets Firecracker write while the disks are copied.
    async fn write_out(
        &mut self,
        config: &SnapshotConfig,
        draft: &Draft,
    ) -> Result<(), CaptureError> {
        self.pause().await?;
        let disks = copy_disks(self.dir(), &self.record, draft);
        let jail = Jail::of(self.dir())?;
        let files = [(draft.vmstate_path(), STATE), (draft.memory_path(), MEMORY)];
        if let Some(jail) = &jail {
            jail.allow_more(self.dir(), u64::from(self.record.machine.memory_mib) << 20)?;
            for (file, name) in &files {
                jail.lend(file, name)?;
            }
        }
        let [state, memory] = files
            .clone()
            .map(|(file, name)| if jail.is_some() { name.into() } else { file });
        let body = match config.kind {
            SnapshotKind::Full => SnapshotCreateParams::full(state, memory),
            SnapshotKind::Diff => SnapshotCreateParams::diff(state, memory),
        };
        let (disks, written) = tokio::join!(
            disks,
            self.call(async |client| -> Result<(), CallError> {
                client.create_snapshot(&body).await
            })
        );
        if let Some(jail) = &jail {
            for (file, name) in &files {
                jail.take_back(file, name)?;
            }
        }
        written?;
        disks
    }
}

/// Copies the drives that the guest may write, on a thread of its own.
fn copy_disks(
    dir: &VmDir,
    record: &Record,
    draft: &Draft,
) -> impl Future<Output = Result<(), CaptureError>> + use<> {
    let jobs: Vec<_> = record
        .machine
        .drives
        .iter()
        .filter(|drive| drive.access == Access::OwnCopy)
        .map(|drive| {
            (
                drive.id.clone(),
                dir.disk(&drive.id),
                draft.dir().join(disk_path(&drive.id)),
            )
        })
        .collect();
    async move {
        if jobs.is_empty() {
            return Ok(());
        }
        tokio::task::spawn_blocking(move || {
            jobs.into_iter().try_for_each(|(id, from, to)| {
                copy_disk(&from, &to)
                    .map(drop)
                    .map_err(|source| CaptureError::Drive { id, source })
            })
        })
        .await
        .map_err(|e| CaptureError::Task(io::Error::other(e)))?
    }
}
