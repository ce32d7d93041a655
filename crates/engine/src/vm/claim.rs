//! The first phase of every start: a directory that is this VM's and this process's.

use super::dir::{DirError, Hold, Ownership, VmDir};
use crate::Engine;
use rekindle_store::VmName;

/// An owned directory. Dropped while armed, it is removed.
#[derive(Debug)]
pub struct Claim {
    dir: VmDir,
    ownership: Ownership,
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
        let hold = Hold::wait(engine.root())?;
        let dir = VmDir::create(engine.root(), name)?;
        match dir.own() {
            Ok(ownership) => Ok(Claim {
                dir,
                ownership,
                on_drop: OnDrop::Remove,
            }),
            Err(e) => {
                let _ = dir.remove(&hold);
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
            ownership,
            on_drop: OnDrop::Keep,
        })
    }

    pub(crate) fn dir(&self) -> &VmDir {
        &self.dir
    }

    /// Removes the directory, unless it is gone already and the name is another's.
    pub(crate) fn remove(&self) -> Result<(), DirError> {
        let hold = self.dir.hold()?;
        if self.ownership.is_of(&self.dir) {
            self.dir.remove(&hold)?;
        }
        Ok(())
    }

    pub(crate) fn on_drop(&mut self, on_drop: OnDrop) {
        self.on_drop = on_drop;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.on_drop == OnDrop::Remove {
            let _ = self.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use super::*;
    use crate::programs::Programs;
    use rekindle_store::Root;

    fn engine(place: &tempfile::TempDir) -> Engine {
        let programs = Programs {
            firecracker: "firecracker".into(),
            rekindle: "rekindle".into(),
        };
        Engine::new(Root::open(place.path()).unwrap(), programs)
    }

    #[test]
    fn a_directory_that_got_the_name_since_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let engine = engine(&place);
        let name = "v".parse().unwrap();
        let claim = Claim::new(&engine, &name).unwrap();
        // As `rm --force` does when the owner hangs.
        claim.dir().remove(&claim.dir().hold().unwrap()).unwrap();
        let other = Claim::new(&engine, &name).unwrap();
        claim.remove().unwrap();
        drop(claim);
        assert!(other.dir().path().exists());
        let path = other.dir().path().to_owned();
        drop(other);
        assert!(!path.exists());
    }

    #[test]
    fn nothing_is_removed_while_somebody_looks() {
        let place = tempfile::tempdir().unwrap();
        let engine = engine(&place);
        let claim = Claim::new(&engine, &"v".parse().unwrap()).unwrap();
        let path = claim.dir().path().to_owned();
        let looking = Hold::wait(engine.root()).unwrap();
        let (done, removed) = channel();
        std::thread::spawn(move || {
            drop(claim);
            done.send(()).unwrap();
        });
        let early = removed.recv_timeout(Duration::from_millis(50));
        assert_eq!(early, Err(RecvTimeoutError::Timeout));
        assert!(path.exists());
        drop(looking);
        removed.recv().unwrap();
        assert!(!path.exists());
    }
}
