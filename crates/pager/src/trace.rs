//! What came in when, for who wants to look at it afterwards: the first pages only, in a bounded space.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::unit::{PageIndex, PageRun, index, length};

/// How many pieces are remembered; a page of the working set without neighbours is a piece.
const PIECES: usize = 32 * 1024;
/// The words of one piece: time and how; first page and number.
const WORDS: usize = 2;
/// The words of a whole trace.
pub(crate) const TRACE_WORDS: usize = PIECES * WORDS;
/// The bits of a first page; as many as 4 KiB pages can be in any address space. The rest is the number.
const PAGE_BITS: u32 = 48;
/// The bits of a time in microseconds.
const TIME_BITS: u32 = 56;

/// Why a page came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// The guest waited for it.
    Demand,
    /// It stands beside one that the guest waited for.
    Around,
    /// It is of the working set.
    Replay,
    /// It is of a known run of zeros.
    Zero,
}

/// A piece of memory that came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// When, in microseconds after the handshake.
    pub at_us: u64,
    /// Why.
    pub kind: Kind,
    /// The first page, counted from the start of the guest's memory in pages of its size.
    pub page: u64,
    /// How many.
    pub count: u64,
}

/// The trace in a page server's state.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trace<'a> {
    words: &'a [AtomicU64],
    taken: &'a AtomicU64,
}

impl<'a> Trace<'a> {
    pub(crate) fn new(words: &'a [AtomicU64], taken: &'a AtomicU64) -> Self {
        Self { words, taken }
    }

    /// Remembers a piece, if there is room. More pages than a piece can say are cut off.
    pub(crate) fn push(self, at_us: u64, kind: Kind, run: PageRun) {
        let at = self.taken.load(Ordering::Relaxed);
        if at >= length(PIECES) {
            return;
        }
        let limit = u64::MAX >> PAGE_BITS;
        let words = &self.words[index(at) * WORDS..];
        let time = at_us.min(u64::MAX >> (64 - TIME_BITS));
        words[0].store(time | number_of(kind) << TIME_BITS, Ordering::Relaxed);
        let pages = run.first.get() | run.count.min(limit) << PAGE_BITS;
        words[1].store(pages, Ordering::Relaxed);
        self.taken.store(at + 1, Ordering::Release);
    }

    /// What is remembered, in order of time.
    pub(crate) fn pieces(self) -> impl Iterator<Item = Piece> + 'a {
        let taken = index(self.taken.load(Ordering::Acquire)).min(PIECES);
        self.words[..taken * WORDS]
            .chunks_exact(WORDS)
            .filter_map(|words| {
                let [when, what] = [0, 1].map(|at: usize| words[at].load(Ordering::Relaxed));
                Some(Piece {
                    at_us: when & (u64::MAX >> (64 - TIME_BITS)),
                    kind: kind_of(when >> TIME_BITS)?,
                    page: what & (u64::MAX >> (64 - PAGE_BITS)),
                    count: what >> PAGE_BITS,
                })
            })
    }
}

fn number_of(kind: Kind) -> u64 {
    match kind {
        Kind::Demand => 1,
        Kind::Around => 2,
        Kind::Replay => 3,
        Kind::Zero => 4,
    }
}

fn kind_of(number: u64) -> Option<Kind> {
    [Kind::Demand, Kind::Around, Kind::Replay, Kind::Zero]
        .into_iter()
        .find(|kind| number_of(*kind) == number)
}

/// One run, as a piece's pages.
impl From<Piece> for PageRun {
    fn from(piece: Piece) -> PageRun {
        PageRun {
            first: PageIndex::new(piece.page),
            count: piece.count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_remembered_until_there_is_no_room() {
        let words: Vec<AtomicU64> = (0..TRACE_WORDS).map(|_| 0.into()).collect();
        let taken = AtomicU64::new(0);
        let trace = Trace::new(&words, &taken);
        let run = |first, count| PageRun {
            first: PageIndex::new(first),
            count,
        };
        trace.push(7, Kind::Demand, run((1 << 40) + 3, 1));
        trace.push(9, Kind::Zero, run(5, 1 << 20));
        let pieces: Vec<_> = trace.pieces().collect();
        let piece = |at_us, kind, page, count| Piece {
            at_us,
            kind,
            page,
            count,
        };
        assert_eq!(
            pieces,
            [
                piece(7, Kind::Demand, (1 << 40) + 3, 1),
                piece(9, Kind::Zero, 5, 65535)
            ]
        );
        for _ in 0..PIECES + 10 {
            trace.push(10, Kind::Around, run(1, 1));
        }
        assert_eq!(trace.pieces().count(), PIECES);
    }
}
