//! Working sets: the one to replay and the one to record, opened while that takes no right that is given up later. Neither is
//! worth a VM: what cannot be used is told, and left.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rekindle_store::file::open_regular;
use rekindle_store::working_set::read_opened;

use crate::log::say;
use crate::plan::Plan;
use crate::prefetch::Replay;
use crate::record::{Outlet, Recorder};
use crate::sandbox::Rights;
use crate::state::{State, create};
use crate::touched;

#[derive(Debug)]
pub(crate) struct Hints {
    replay: Option<(File, PathBuf)>,
    outlet: Option<Outlet>,
}

impl Hints {
    /// Opens what there is. `sign` is closed when what was touched is there for the owner, or will never be.
    pub(crate) fn open(
        plan: &Plan,
        state: Option<&Path>,
        rights: Rights,
        sign: Option<OwnedFd>,
    ) -> Hints {
        Hints {
            replay: plan.replay.as_deref().and_then(open),
            outlet: plan
                .record
                .as_deref()
                .and_then(|set| outlet(set, state, rights, sign)),
        }
    }

    /// What to replay and what to record, now that the memory is known.
    pub(crate) fn of(self, state: &State) -> (Option<Replay>, Option<Recorder>) {
        let regions = state.regions();
        let page_size = regions.page_size();
        let set = self.replay.and_then(|(file, path)| {
            read_opened(file, &path, page_size.bytes(), regions.pages())
                .inspect_err(|error| say(format_args!("cannot replay {}: {error}", path.display())))
                .ok()
        });
        let replay = set.map(|set| Replay::of(&set, page_size));
        let held_back = replay.as_ref().map_or(&[][..], Replay::held_back);
        let recorder = self
            .outlet
            .map(|outlet| Recorder::new(outlet, regions, held_back));
        (replay, recorder)
    }
}

fn open(path: &Path) -> Option<(File, PathBuf)> {
    match open_regular(path) {
        Ok(file) => Some((file, path.into())),
        Err(error) if error.is_not_found() => None,
        Err(error) => {
            say(format_args!("cannot replay {}: {error}", path.display()));
            None
        }
    }
}

fn outlet(
    set: &Path,
    state: Option<&Path>,
    rights: Rights,
    sign: Option<OwnedFd>,
) -> Option<Outlet> {
    if rights != Rights::None {
        return Some(Outlet::Set(set.into()));
    }
    let left = touched::path(state?);
    match create(&left) {
        Ok(left) => Some(Outlet::Owner { left, sign }),
        Err(error) => {
            say(format_args!(
                "cannot leave what is touched in {}: {error}",
                left.display()
            ));
            None
        }
    }
}
