//! The first phase of every start: a directory that is this VM's and this process's.

use super::dir::{DirError, Hold, Ownership, VmDir};
use crate::Engine;
use rekindle_store::VmName;

/// An owned directory. Dropped while armed, it is removed.
#[derive(Debug)]
pub struct Claim {
    dir: VmDir,
    _ownership: Ownership,
    on_drop: OnDrop,
}

/// What happens to the directory when its owner lets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnDrop {
    /// It is removed.
    Remove,
    /// It stays.
    Keep,
}

impl Claim {
    /// Makes a directory under a name that is free.
    pub(crate) fn new(engine: &Engine, name: &VmName) -> Result<Claim, DirError> {
        let _hold = Hold::wait(engine.root())?;
        let dir = VmDir::create(engine.root(), name)?;
        match dir.own() {
            Ok(ownership) => Ok(Claim {
                dir,
                _ownership: ownership,
                on_drop: OnDrop::Remove,
            }),
            Err(e) => {
                let _ = dir.remove();
                Err(e)
            }
        }
    }

    /// Takes over a directory that exists and that nobody owns.
    pub(crate) fn take(dir: VmDir) -> Result<Claim, DirError> {
        let _hold = dir.hold()?;
        let ownership = dir.own()?;
        Ok(Claim {
            dir,
            _ownership: ownership,
            on_drop: OnDrop::Keep,
        })
    }

    pub(crate) fn dir(&self) -> &VmDir {
        &self.dir
    }

    pub(crate) fn on_drop(&mut self, on_drop: OnDrop) {
        self.on_drop = on_drop;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.on_drop == OnDrop::Remove {
            let _ = self.dir.remove();
        }
    }
}
