//! Who needs the contents of an image.

use rekindle_store::file::FileError;
use rekindle_store::image::{ImageName, User, snapshots_on};

use crate::Engine;
use crate::vm::dir::VmDir;
use crate::vm::record::Record;

/// The VMs that have not ended, and the snapshots, that need those contents. A VM whose record cannot be read counts
/// as one of them.
///
/// # Errors
/// If they cannot be listed.
pub fn users(engine: &Engine, contents: &ImageName) -> Result<Vec<User>, FileError> {
    let path = contents.path(engine.root());
    let mut users = Vec::new();
    for name in VmDir::list(engine.root()).map_err(|error| list_error(engine, error))? {
        // One that was removed meanwhile needs nothing.
        let Ok(dir) = VmDir::open(engine.root(), &name) else {
            continue;
        };
        let needs = match Record::read(&dir) {
            Ok(record) => {
                let drives = &record.machine.drives;
                !record.state.is_over() && drives.iter().any(|drive| drive.source == path)
            }
            Err(_) => dir.path().exists(),
        };
        if needs {
            users.push(User::Vm(name.to_string()));
        }
    }
    let snapshots = snapshots_on(engine.store(), contents)?;
    users.extend(snapshots.into_iter().map(User::Snapshot));
    Ok(users)
}

fn list_error(engine: &Engine, error: crate::vm::dir::DirError) -> FileError {
    FileError::Io {
        action: "list",
        path: engine.root().vms(),
        source: std::io::Error::other(error),
    }
}
