//! Bringing what nobody waits for yet, a slice at a time, between looks at the descriptor.
//!
//! A slice is 64 KiB of copies or 2 MiB of zeros, some 20 µs: so long does a fault wait at the most for what
//! is brought ahead of it. Of a packed working set a slice has a chunk or two that are read and proven first, 20 to 40 µs each.

use super::Server;
use crate::around::Walks;
use crate::backoff::Backoff;
use crate::cold::Readers;
use crate::prefetch::{PIECE, Replay, Zeros};
use crate::state::Count;
use crate::stats::Ended;
use crate::trace::Kind;
use crate::unit::{PageIndex, PageRun};

/// How many pieces may be on their way from the disk.
const FROM_DISK: usize = 16;
/// Or from a repository, where one that is late is not to hold up those behind it.
const FROM_FAR: usize = 256;

/// What is still to be brought.
pub(super) struct Queue {
    pub(super) replay: Option<Replay>,
    pub(super) zeros: Zeros,
    /// Behind where the guest walks.
    pub(super) around: Option<PageRun>,
    pub(super) walks: Walks,
    /// Whether it is the zeros' turn.
    pub(super) zeros_next: bool,
    /// What the kernel put off.
    pub(super) again: Option<(Kind, PageRun)>,
    pub(super) backoff: Backoff,
}

impl Queue {
    pub(super) fn new(replay: Option<Replay>, zeros: Zeros) -> Queue {
        Queue {
            replay,
            zeros,
            around: None,
            walks: Walks::default(),
            zeros_next: false,
            again: None,
            backoff: Backoff::default(),
        }
    }

    fn replay_left(&self) -> bool {
        self.replay.as_ref().is_some_and(|replay| !replay.is_done())
    }
}

impl Server {
    /// Whether there is something that can be brought now.
    pub(super) fn has_ahead(&self) -> bool {
        let from_disk = self.readers.as_ref().map_or(0, Readers::under_way);
        self.ahead.again.is_some()
            || self.ahead.around.is_some()
            || !self.ahead.zeros.is_done()
            || (self.ahead.replay_left() && from_disk < self.at_once())
    }

    fn at_once(&self) -> usize {
        match self.backing.packed() {
            Some(_) => FROM_FAR,
            None => FROM_DISK,
        }
    }

    /// Brings one slice.
    pub(super) fn bring_ahead(&mut self) -> Result<(), Ended> {
        if let Some((kind, run)) = self.ahead.again.take() {
            return self.bring(run, kind).map(drop);
        }
        if let Some(run) = self.ahead.around.take() {
            return self.bring_around(run);
        }
        let zeros = !self.ahead.zeros.is_done();
        self.ahead.zeros_next = !self.ahead.zeros_next;
        if zeros && (self.ahead.zeros_next || !self.ahead.replay_left()) {
            return self.bring_zeros();
        }
        self.bring_set()
    }

    fn bring_set(&mut self) -> Result<(), Ended> {
        let at_once = self.at_once();
        let mut pages = 0;
        while pages < PIECE && self.ahead.again.is_none() {
            let from_disk = self.readers.as_ref().map_or(0, Readers::under_way);
            let Some(replay) = self.ahead.replay.as_mut() else {
                return Ok(());
            };
            if replay.is_done() {
                if from_disk == 0 && self.state.get(Count::ReplayedBy) == 0 {
                    self.state.set(Count::ReplayedBy, self.state.age());
                }
                return Ok(());
            }
            if from_disk >= at_once {
                return Ok(());
            }
            let Some(run) = replay.next() else {
                return Ok(());
            };
            pages += run.count;
            if let Some(cold) = self.bring(run, Kind::Replay)? {
                self.start_reading(cold, Kind::Replay)?;
            }
        }
        Ok(())
    }

    fn bring_zeros(&mut self) -> Result<(), Ended> {
        if let Some(run) = self.ahead.zeros.next(&self.backing) {
            self.bring(run, Kind::Zero)?;
        }
        if self.ahead.zeros.is_done() && self.ahead.again.is_none() {
            self.state.set(Count::ZeroedBy, self.state.age());
        }
        Ok(())
    }

    fn bring_around(&mut self, run: PageRun) -> Result<(), Ended> {
        let piece = PageRun {
            count: run.count.min(PIECE),
            ..run
        };
        let mut cold = self.bring(piece, Kind::Around)?;
        // A walk from request to request would be a slow one.
        if self.backing.packed().is_some()
            && let Some(far) = cold.take()
        {
            self.start_reading(far, Kind::Around)?;
        }
        let rest = PageRun {
            first: run.first.plus(piece.count),
            count: run.count - piece.count,
        };
        // What is on a disk is not worth it; what stands behind that is there neither, mostly.
        if cold.is_none() && rest.count > 0 && self.ahead.around.is_none() {
            self.ahead.around = Some(rest);
        }
        Ok(())
    }

    /// Brings pages that are in memory; tells what is not.
    fn bring(&mut self, run: PageRun, kind: Kind) -> Result<Option<PageRun>, Ended> {
        let mut done = 0;
        while done < run.count {
            let rest = PageRun {
                first: run.first.plus(done),
                count: run.count - done,
            };
            let piece = if kind == Kind::Zero {
                self.together(rest)
            } else {
                self.alike(rest)
            };
            let filled = if kind == Kind::Zero {
                self.fill_zeros(piece)?
            } else {
                self.fill_now(piece, kind)?
            };
            done += filled.done;
            if filled.done < piece.count {
                let left = PageRun {
                    first: run.first.plus(done),
                    count: run.count - done,
                };
                if filled.put_off {
                    self.ahead.again = Some((kind, left));
                    self.ahead.backoff.again();
                    return Ok(None);
                }
                self.ahead.backoff.reset();
                return Ok(Some(left));
            }
        }
        self.ahead.backoff.reset();
        Ok(None)
    }

    /// The guest asked for a page: what follows from that.
    pub(super) fn asked(&mut self, page: PageIndex, now: u64) {
        if let Some(replay) = &mut self.ahead.replay {
            replay.asked(page);
        }
        let Some(ahead) = self.ahead.walks.met(page) else {
            return;
        };
        if let Some(recorder) = &mut self.recorder {
            recorder.passed(ahead.passed, now);
        }
        let left = self
            .state
            .regions()
            .pages()
            .saturating_sub(ahead.bring.first.get());
        let run = PageRun {
            count: ahead.bring.count.min(left),
            ..ahead.bring
        };
        let sampled = self.ahead.replay.as_ref();
        let count = sampled.map_or(run.count, |replay| replay.up_to_sample(run));
        self.ahead.around = (count > 0).then_some(PageRun { count, ..run });
    }
}
