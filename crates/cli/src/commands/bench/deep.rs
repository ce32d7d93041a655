//! A chain of snapshots that is the same memory as one of them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Result;
use rekindle_engine::Engine;
use rekindle_engine::store::manifest::{Devices, Kind};
use rekindle_engine::store::{Manifest, ManifestParts, Snapshot};

/// How many snapshots it has, the base among them.
pub(super) const DEPTH: u64 = 64;
const PAGE: u64 = 4096;

/// The id of a snapshot with the memory of `flat`, a Full one without drives, spread over [`DEPTH`]: page `n` is in the
/// snapshot `n % DEPTH`, so that neighbours are in different files.
pub(super) fn deepened(engine: &Engine, flat: &Snapshot) -> Result<String> {
    let from = File::open(flat.memory_path())?;
    let size = from.metadata()?.len();
    let mut parent = flat.id();
    let mut page = vec![0; usize::try_from(PAGE)?];
    for layer in 1..DEPTH {
        let draft = engine.store().begin(None)?;
        std::fs::copy(flat.vmstate_path(), draft.vmstate_path())?;
        let memory = File::create_new(draft.memory_path())?;
        memory.set_len(size)?;
        for at in (layer * PAGE..size).step_by(usize::try_from(DEPTH * PAGE)?) {
            from.read_exact_at(&mut page, at)?;
            memory.write_all_at(&page, at)?;
        }
        parent = draft
            .publish(parts(flat.manifest(), Kind::Diff { parent }))?
            .id();
    }
    Ok(parent.to_string())
}

/// What a snapshot of the same VM without drives is made of.
pub(super) fn parts(of: &Manifest, kind: Kind) -> ManifestParts {
    let Manifest {
        firecracker,
        host,
        machine,
        boot,
        memory,
        notes,
        ..
    } = of.clone();
    ManifestParts {
        kind,
        firecracker,
        host,
        machine,
        boot,
        devices: Devices::default(),
        memory,
        removed: Vec::new(),
        notes,
    }
}
