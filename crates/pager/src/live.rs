//! What a page server has done so far, read from its state by anybody who may.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::state::{Count, State, StateError};
use crate::stats::Stats;
use crate::sys::Message;
use crate::trace::Piece;
use crate::unit::{PageIndex, PageRun};

/// How long a message may take from being read to being applied; it takes microseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// A page server's state, looked at from outside. The page server may be dead; its counts stay.
#[derive(Debug)]
pub struct Live {
    state: State,
}

impl Live {
    /// Opens the state that a page server keeps at this path.
    pub fn open(path: &Path) -> Result<Live, StateError> {
        Ok(Live {
            state: State::open(path)?,
        })
    }

    /// The page server's process; it may be gone.
    pub fn server(&self) -> u32 {
        u32::try_from(self.state.get(Count::Server)).unwrap_or(0)
    }

    /// The counts up to now, and how it ended, if it has.
    pub fn stats(&self) -> Stats {
        Stats::of(&self.state, self.state.ended())
    }

    /// What came in when: the first pieces only, as many as there is room for.
    pub fn trace(&self) -> Vec<Piece> {
        self.state.trace().pieces().collect()
    }

    /// Pages that the VM gave back since [`Live::forget_removed`], as runs in order.
    ///
    /// All of them, if the VM stands still: then none is on its way.
    pub fn recently_removed(&self) -> Vec<PageRun> {
        self.settle();
        let set = self.state.recently_removed();
        let pages = self.state.regions().pages();
        let mut runs = Vec::new();
        let mut at = 0;
        while at < pages {
            let (removed, count) = set.alike(PageRun {
                first: PageIndex::new(at),
                count: pages - at,
            });
            if removed {
                runs.push(PageRun {
                    first: PageIndex::new(at),
                    count,
                });
            }
            at += count;
        }
        runs
    }

    /// Takes these out of the recently removed pages: a snapshot has them. Only while the VM stands still.
    pub fn forget_removed(&self, runs: &[PageRun]) {
        for run in runs {
            self.state.recently_removed().remove(*run);
        }
    }

    /// How many bytes a page of the VM has.
    pub fn page_bytes(&self) -> u64 {
        self.state.regions().page_size().bytes()
    }

    /// Waits until what was read is applied. A page server that died in between left it in the inbox.
    fn settle(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.state.is_reading() && Instant::now() < deadline {
            thread::sleep(Duration::from_micros(50));
        }
        if !self.state.is_reading() {
            return;
        }
        for at in 0..State::MESSAGES {
            if let Message::Remove { start, end } = Message::parse(self.state.message(at)) {
                for run in self.state.regions().runs(start, end).into_iter().flatten() {
                    self.state.removed().insert(run);
                    self.state.recently_removed().insert(run);
                }
            }
        }
    }
}
