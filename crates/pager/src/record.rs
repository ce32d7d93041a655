//! Which pages this run of the guest touched first, for the next run's replay.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rekindle_store::working_set::{Run, Touched, WorkingSetError, merge_into};

use crate::region::RegionMap;
use crate::touched;
use crate::unit::{PageIndex, PageRun, index};

/// How long after the first fault pages are taken down; what is touched later is no part of waking up.
const WINDOW_NS: u64 = 10_000_000_000;

/// Where it goes.
#[derive(Debug)]
pub(crate) enum Outlet {
    /// Into this working set.
    Set(PathBuf),
    /// To the owner, who merges it.
    Owner {
        /// A file that is open already.
        left: File,
        /// Closed when all is written: a sign to the owner.
        sign: Option<OwnedFd>,
    },
}

/// Why it could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error(transparent)]
    Set(#[from] WorkingSetError),
    #[error("cannot leave it for the owner")]
    Leave(#[from] io::Error),
}

/// What was touched so far.
#[derive(Debug)]
pub(crate) struct Recorder {
    outlet: Outlet,
    page_size: u64,
    pages: u64,
    faulted: Vec<Touched>,
    /// Left out of the replay, and not asked for so far; and when earlier runs asked.
    held_back: HashMap<u64, u32>,
    /// When the first fault came, in nanoseconds after the handshake.
    first: Option<u64>,
}

impl Recorder {
    pub(crate) fn new(outlet: Outlet, regions: &RegionMap, held_back: &[Touched]) -> Recorder {
        Recorder {
            outlet,
            page_size: regions.page_size().bytes(),
            pages: regions.pages(),
            faulted: Vec::new(),
            held_back: held_back
                .iter()
                .map(|held| (held.page, held.at_us))
                .collect(),
            first: None,
        }
    }

    /// The guest asked for a page; tells whether it was one of the sample.
    pub(crate) fn faulted(&mut self, page: PageIndex, now: u64) -> bool {
        let first = *self.first.get_or_insert(now);
        // A page can fault again once it was given back; there is no use for more than each page once.
        if self.faulted.len() < index(self.pages) {
            self.faulted.push(Touched {
                page: page.get(),
                at_us: u32::try_from((now - first) / 1000).unwrap_or(u32::MAX),
                count: 1,
            });
        }
        self.held_back.remove(&page.get()).is_some()
    }

    /// The guest walked over pages that had been brought ahead of it.
    pub(crate) fn passed(&mut self, run: PageRun, now: u64) {
        for n in 0..run.count {
            self.faulted(run.first.plus(n), now);
        }
    }

    /// Whether the time for taking down is over.
    pub(crate) fn is_over(&self, now: u64) -> bool {
        self.first.is_some_and(|first| now - first >= WINDOW_NS)
    }

    /// How many nanoseconds are left.
    pub(crate) fn left(&self, now: u64) -> Option<u64> {
        Some(WINDOW_NS.saturating_sub(now - self.first?))
    }

    /// Adds what was seen to the file. A guest that never asked for anything says nothing about its set, and
    /// one that ended early nothing about what it would have asked for later.
    pub(crate) fn write(self, now: u64) -> Result<(), RecordError> {
        let Some(first) = self.first else {
            return Ok(());
        };
        let lived = u32::try_from((now - first) / 1000).unwrap_or(u32::MAX);
        let run = Run {
            faulted: self.faulted,
            held_back_untouched: self
                .held_back
                .into_iter()
                .filter(|(_, at_us)| *at_us < lived)
                .map(|(page, _)| page)
                .collect(),
        };
        match self.outlet {
            Outlet::Set(path) => drop(merge_into(&path, self.page_size, self.pages, &run)?),
            Outlet::Owner { left, sign } => {
                touched::write(&left, self.page_size, self.pages, &run)?;
                drop(sign);
            }
        }
        Ok(())
    }
}
