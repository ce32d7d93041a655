//! The floor: the same restore with nothing of ours but the page server. Fixed bytes on a raw socket, no client, no
//! records, no drains.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use rekindle_engine::store::Snapshot;

use super::raw::{self, Guard, micros};

/// How long each step took, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    pub(super) api: f64,
    pub(super) load: f64,
    pub(super) resume: f64,
    /// From the spawn of Firecracker to the running guest.
    pub(super) total: f64,
    /// All that the caller waits for.
    pub(super) call: f64,
}

/// Restores a snapshot in `dir`, and ends it again. The page server listens before the clock starts.
pub(super) fn restore(
    firecracker: &Path,
    rekindle: &Path,
    snapshot: &Snapshot,
    dir: &Path,
) -> Result<Steps> {
    let mut pager = Guard(
        Command::new(rekindle)
            .args(["pager", "--socket", "uffd.sock", "--snapshot"])
            .arg(snapshot.dir())
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the page server")?,
    );
    let mut ready = String::new();
    BufReader::new(pager.0.stdout.take().context("no pipe")?).read_line(&mut ready)?;
    ensure!(!ready.is_empty(), "the page server did not start");

    let begun = Instant::now();
    let serial = File::options().write(true).open("/dev/null")?;
    let (vm, mut raw) = raw::start(firecracker, dir, serial.into())?;
    let api = micros(begun);

    let body = format!(
        "{{\"snapshot_path\":{:?},\"resume_vm\":false,\"mem_backend\":{{\"backend_type\":\"Uffd\",\"backend_path\":\"uffd.sock\"}}}}",
        snapshot.vmstate_path()
    );
    let (_, load) = raw.timed("PUT", "/snapshot/load", &body)?;
    let (_, resume) = raw.timed("PATCH", "/vm", r#"{"state":"Resumed"}"#)?;
    let total = micros(begun);
    drop(vm);
    drop(pager);
    for socket in ["api.sock", "uffd.sock", "v.sock"] {
        let _ = std::fs::remove_file(dir.join(socket));
    }
    Ok(Steps {
        api,
        load,
        resume,
        total,
        call: total,
    })
}
