//! What a VM's layer is copied from: an empty ext4, of which little more than its holes is there.
//!
//! ```text
//! mke2fs ─> DIR/layer-1-8192.ext4 (8 GiB, 0.2 MiB on disk) ─ copied for each VM ─> vms/NAME/disks/layer
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::image::path_with_sbin;
use crate::{create_directory, debian};

/// To be raised when this file makes another file system.
const BUILDER: u32 = 1;
/// How large a layer can be, in MiB. Below, there is no room for its journal.
pub const LAYER_MIB: std::ops::RangeInclusive<u64> = 64..=1 << 20;
const UUID: &str = "72656b69-6e64-4c65-8000-6c6179657201";

/// An empty file system of so many MiB in this directory, made if it is not there; what is there is whole.
///
/// # Errors
/// When the size is out of range, when `mke2fs` is missing or fails, or the directory cannot be written.
pub fn layer(directory: &Path, mib: u64) -> Result<PathBuf> {
    ensure!(
        LAYER_MIB.contains(&mib),
        "a layer of {mib} MiB: {} to {} MiB are possible",
        LAYER_MIB.start(),
        LAYER_MIB.end()
    );
    let place = directory.join(format!("layer-{BUILDER}-{mib}.ext4"));
    if place.is_file() {
        return Ok(place);
    }
    make(&place, mib)
        .with_context(|| format!("cannot make the empty layer {}", place.display()))?;
    Ok(place)
}

fn make(place: &Path, mib: u64) -> Result<()> {
    let directory = create_directory(place.parent().context("no directory")?.to_owned())?;
    let new = tempfile::Builder::new()
        .prefix(".new-")
        .tempfile_in(directory)?;
    // A small journal, as all of it will have been written to soon; tables that are never written are never copied.
    debian::run(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"])
            .args(["-J", "size=16", "-O", "^resize_inode"])
            .args(["-L", "rekindle-layer", "-U", UUID])
            .arg("-E")
            .arg(format!(
                "hash_seed={UUID},root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1"
            ))
            .arg(new.path())
            .arg(format!("{mib}M"))
            .env("PATH", path_with_sbin()),
    )
    .context("it takes the package e2fsprogs")?;
    new.as_file().sync_all()?;
    // Others may have made the same meanwhile.
    new.persist(place)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_layer_is_large_takes_little_is_made_once_and_is_sound() {
        let place = tempfile::tempdir().unwrap();
        let made = layer(place.path(), 8192).unwrap();
        let meta = made.metadata().unwrap();
        assert_eq!(meta.len(), 8 << 30);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        assert_eq!(layer(place.path(), 8192).unwrap(), made);
        assert_eq!(made.metadata().unwrap().ino(), meta.ino());
        assert_eq!(place.path().read_dir().unwrap().count(), 1);
        debian::run(
            Command::new("e2fsck")
                .arg("-fn")
                .arg(&made)
                .env("PATH", path_with_sbin()),
        )
        .unwrap();
    }

    #[test]
    fn the_smallest_and_the_largest_can_be_made_and_none_beyond() {
        let place = tempfile::tempdir().unwrap();
        for mib in [*LAYER_MIB.start(), *LAYER_MIB.end()] {
            layer(place.path(), mib).unwrap();
        }
        for mib in [0, 63, LAYER_MIB.end() + 1, u64::MAX] {
            let error = layer(place.path(), mib).unwrap_err();
            assert!(error.to_string().contains("64 to"), "{error}");
        }
    }
}
