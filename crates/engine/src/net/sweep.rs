//! Networks of VMs that are not there any more: somebody removed their directories by hand, or in a way that nothing
//! could be done about.

use rekindle_store::Root;

use super::attachment::{Connection, of_installation, remove};
use super::{NetError, check_rights};
use crate::vm::dir::{DirError, VmDir};

/// What to do about what is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Only find it.
    Report,
    /// Remove it.
    Reclaim,
}

/// The names of links and tables that belong to this state directory, and to none of its VMs. Without the rights to make
/// networks there are none.
pub fn sweep(root: &Root, mode: Mode) -> Result<Vec<String>, NetError> {
    if check_rights().is_err() {
        return Ok(Vec::new());
    }
    // The kernel first: whatever there is now was written down before.
    let mut names = of_installation(root.installation())?;
    // What cannot be looked at is not taken for what is not there.
    for vm in VmDir::list(root)? {
        let dir = match VmDir::open(root, &vm) {
            Err(DirError::Missing { .. }) => continue,
            opened => opened?,
        };
        if let Some(known) = Connection::read(&dir)? {
            names.retain(|name| *name != known.name);
        }
    }
    if mode == Mode::Reclaim {
        names.iter().try_for_each(|name| remove(name))?;
    }
    Ok(names)
}
