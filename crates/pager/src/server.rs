//! Serving one VM: one thread, one loop.
//!
//! ```text
//!        ┌──────────────────────────────────────────────────────────────┐
//!        ▼                                                              │
//!   wait: userfaultfd, VM's pidfd, its connection, own timer             │
//!        ▼                                                              │
//!   drain: read until empty;  REMOVE ─► the page set `removed`           │
//!        │                    fault  ─► `pending`                        │
//!        ▼                                                              │
//!   answer: neighbours together ─► removed or hole: ZEROPAGE ─┬─ done ──┤
//!                                  data: pread, COPY          └─ EAGAIN: stays pending, timer set
//! ```
//!
//! The kernel hands out faults before events, whatever happened first, but while a removal is under way, from
//! before its event can be read until a moment after, every COPY and ZEROPAGE fails with EAGAIN. So an
//! operation that succeeds was not overtaken by a removal that we have not applied.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::handshake::Guest;
use crate::page_set::PageSet;
use crate::region::RegionMap;
use crate::source::{Backing, Content};
use crate::stats::{Ended, Histogram, KillReason, Operation, Stats};
use crate::sys::{Message, Uffd};
use crate::unit::{HostAddr, PageIndex, PageRun, PageSize, index, length};
use crate::vm::Vm;

/// The most that is read and copied at once, in small pages; 64 KiB gives nearly all that batching can.
const BATCH: u64 = 16;
/// How many messages are read before faults are answered, so that a flood of removals cannot starve them.
/// That is safe although there may be more: see the module's second paragraph.
const DRAIN_LIMIT: usize = 4096;

/// A page that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pending {
    page: PageIndex,
    since: Instant,
}

pub(crate) struct Server {
    /// First, so that it is dropped, and the VM killed, before the descriptor closes.
    vm: Vm,
    uffd: Uffd,
    regions: RegionMap,
    backing: Backing,
    /// `None` once it has hung up.
    connection: Option<OwnedFd>,
    /// Given back by the guest: zero from now on, never the file's again.
    removed: PageSet,
    pending: Vec<Pending>,
    messages: Vec<Message>,
    backoff: Backoff,
    /// A batch of small pages, or one large page.
    buffer: Vec<u8>,
    /// A large page of zeros, never written to, so the kernel's own zero page stands behind it.
    zeros: Vec<u8>,
    counts: Counts,
    latency: Histogram,
}

#[derive(Default)]
struct Counts {
    faults: u64,
    copied: u64,
    zeroed: u64,
    present: u64,
    removed: u64,
    bytes: u64,
    retries: u64,
}

impl Server {
    pub(crate) fn new(guest: Guest, backing: Backing) -> Server {
        let Guest {
            vm,
            uffd,
            regions,
            connection,
        } = guest;
        let (buffer, zeros) = match regions.page_size() {
            PageSize::Small => (BATCH * PageSize::Small.bytes(), 0),
            PageSize::Huge => (PageSize::Huge.bytes(), PageSize::Huge.bytes()),
        };
        Server {
            vm,
            uffd,
            backing,
            connection: Some(connection),
            removed: PageSet::new(regions.pages()),
            regions,
            pending: Vec::new(),
            messages: Vec::new(),
            backoff: Backoff::default(),
            buffer: vec![0; index(buffer)],
            zeros: vec![0; index(zeros)],
            counts: Counts::default(),
            latency: Histogram::new(),
        }
    }

    /// Serves until the VM has ended, or has to.
    ///
    /// The VM is dead when this returns, or it is an error: it could not be killed.
    pub(crate) fn run(mut self) -> io::Result<Stats> {
        let ended = loop {
            if let Err(ended) = self.turn() {
                break ended;
            }
        };
        // Before the descriptor goes: if ours is the last, missing pages would read as zeros.
        self.vm.kill()?;
        Ok(self.stats(ended))
    }

    fn stats(&self, ended: Ended) -> Stats {
        let Counts {
            faults,
            copied,
            zeroed,
            present,
            removed,
            bytes,
            retries,
        } = self.counts;
        Stats {
            vm_pid: self.vm.pid().as_raw_pid(),
            memory_bytes: self.regions.bytes(),
            page_size: self.page_bytes(),
            faults,
            copied,
            zeroed,
            present,
            removed,
            bytes,
            retries,
            latency: self.latency.latency(),
            ended,
        }
    }

    fn turn(&mut self) -> Result<(), Ended> {
        self.wait()?;
        self.drain()?;
        self.answer()
    }

    fn wait(&mut self) -> Result<(), Ended> {
        let pause = self
            .backoff
            .pause()
            .and_then(|pause| Timespec::try_from(pause).ok());
        let mut fds = vec![
            PollFd::new(&self.uffd, PollFlags::IN),
            PollFd::new(&self.vm, PollFlags::IN),
        ];
        // Asks for nothing: a hang-up is always told.
        fds.extend(
            self.connection
                .as_ref()
                .map(|fd| PollFd::new(fd, PollFlags::empty())),
        );
        match poll(&mut fds, pause.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(self.refused(Operation::Poll, None, errno)),
        }
        let [uffd, vm] = [fds[0].revents(), fds[1].revents()];
        let hung_up = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
        if !vm.is_empty() {
            return Err(Ended::VmExited);
        }
        if uffd.intersects(PollFlags::ERR | PollFlags::NVAL) {
            return Err(self.refused(Operation::Poll, None, Errno::BADF));
        }
        if hung_up {
            // Up to 1.11 Firecracker hangs up at once and lives on; the pidfd tells them apart. Dying, it closes the
            // connection a moment before the pidfd says so.
            self.connection = None;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Ended> {
        let mut messages = std::mem::take(&mut self.messages);
        messages.clear();
        let read = loop {
            match self.uffd.read(&mut messages) {
                Ok(()) if messages.len() < DRAIN_LIMIT => {}
                Ok(()) | Err(Errno::AGAIN) => break Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => break Err(self.refused(Operation::Read, None, errno)),
            }
        };
        let since = Instant::now();
        for &message in &messages {
            self.take(message, since)?;
        }
        self.messages = messages;
        read
    }

    fn take(&mut self, message: Message, since: Instant) -> Result<(), Ended> {
        match message {
            Message::Missing { address } => {
                self.counts.faults += 1;
                let reason = KillReason::StrayFault {
                    address: address.get(),
                };
                let page = self
                    .regions
                    .page_at(address)
                    .ok_or(Ended::VmKilled { reason })?;
                self.pending.push(Pending { page, since });
            }
            Message::Remove { start, end } => {
                let reason = KillReason::StrayRemove {
                    start: start.get(),
                    end: end.get(),
                };
                for run in self
                    .regions
                    .runs(start, end)
                    .ok_or(Ended::VmKilled { reason })?
                {
                    self.removed.insert(run);
                    self.counts.removed += run.count;
                }
            }
            Message::Other { event } => {
                return Err(Ended::VmKilled {
                    reason: KillReason::UnexpectedEvent { event },
                });
            }
        }
        Ok(())
    }

    /// Answers what is pending, or as much as the kernel lets pass now.
    fn answer(&mut self) -> Result<(), Ended> {
        // The same page may have been reported twice; the earlier report sorts first and is kept.
        self.pending.sort_unstable();
        self.pending.dedup_by_key(|pending| pending.page);
        let mut answered = 0;
        while let Some(run) = self.next_run(answered) {
            let placed = self.install(run)?;
            let now = Instant::now();
            let end = answered + index(placed);
            for pending in &self.pending[answered..end] {
                let ns = now.duration_since(pending.since).as_nanos();
                self.latency.record(u64::try_from(ns).unwrap_or(u64::MAX));
            }
            answered = end;
            if placed < run.count {
                // A removal is under way, and that holds for the whole address space: to go on is in vain.
                self.counts.retries += 1;
                break;
            }
        }
        self.pending.drain(..answered);
        if self.pending.is_empty() {
            self.backoff.reset()
        } else {
            self.backoff.again()
        }
        Ok(())
    }

    /// The neighbouring pages from here on in the list that can be answered in one go.
    fn next_run(&self, at: usize) -> Option<PageRun> {
        let rest = self.pending.get(at..)?;
        let first = rest.first()?.page;
        let limit = index(BATCH * PageSize::Small.bytes() / self.page_bytes()).max(1);
        let removed = self.removed.contains(first);
        let follows = |(n, pending): &(u64, &Pending)| {
            pending.page == first.plus(*n) && self.removed.contains(pending.page) == removed
        };
        let neighbours = (0..).zip(rest).take(limit).take_while(follows).count();
        let run = PageRun {
            first,
            count: length(neighbours),
        };
        let (_, together) = self
            .regions
            .place(run)
            .expect("pending pages come from these regions");
        let count = if removed {
            together
        } else {
            self.alike(PageRun {
                first,
                count: together,
            })
        };
        Some(PageRun { first, count })
    }

    /// How many of these pages are all zero, or all data, as far as the source can tell.
    fn alike(&self, run: PageRun) -> u64 {
        let page = self.page_bytes();
        let (_, bytes) =
            self.backing
                .content(self.regions.offset(run.first), page, run.count * page);
        bytes / page
    }

    /// Fills pages that `next_run` found to belong together; tells how many of them are in place now.
    fn install(&mut self, run: PageRun) -> Result<u64, Ended> {
        let page = self.page_bytes();
        let offset = self.regions.offset(run.first);
        if self.removed.contains(run.first)
            || self.backing.content(offset, page, page).0 == Content::Zero
        {
            return self.place(run, Filling::Zeros);
        }
        let bytes = index(run.count * page);
        if let Err(bad) = self.backing.read(offset, &mut self.buffer[..bytes]) {
            return Err(Ended::VmKilled {
                reason: KillReason::BadPage(bad),
            });
        }
        let mut done = 0;
        while done < run.count {
            let rest = &self.buffer[index(done * page)..bytes];
            let (filling, count) = self.next_filling(rest, index(done * page));
            let piece = PageRun {
                first: run.first.plus(done),
                count,
            };
            let placed = self.place(piece, filling)?;
            done += placed;
            if placed < count {
                break;
            }
        }
        Ok(done)
    }

    /// How to fill the first pages of `rest`, which starts at `from` in the buffer. A file without holes
    /// still holds pages of zeros, and those need no memory.
    fn next_filling(&self, rest: &[u8], from: usize) -> (Filling, u64) {
        let page = index(self.page_bytes());
        if self.regions.page_size() == PageSize::Huge {
            return (Filling::Buffer { from }, 1);
        }
        let zero = is_zero(&rest[..page]);
        let count = rest
            .chunks(page)
            .take_while(|page| is_zero(page) == zero)
            .count();
        let filling = if zero {
            Filling::Zeros
        } else {
            Filling::Buffer { from }
        };
        (filling, length(count))
    }

    /// Brings pages into the guest one way, past those that are there, until the kernel puts us off.
    fn place(&mut self, run: PageRun, filling: Filling) -> Result<u64, Ended> {
        let page = self.page_bytes();
        let (start, _) = self
            .regions
            .place(run)
            .expect("the run is of these regions");
        let mut done = 0;
        while done < run.count {
            let at = HostAddr::new(start.get() + done * page);
            let (operation, result) =
                self.fill(at, done * page, (run.count - done) * page, filling);
            match result {
                Ok(bytes) => {
                    done += bytes / page;
                    match filling {
                        Filling::Zeros => self.counts.zeroed += bytes / page,
                        Filling::Buffer { .. } => {
                            self.counts.copied += bytes / page;
                            self.counts.bytes += bytes;
                        }
                    }
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::EXIST) => {
                    // Whoever brought it may not have woken those who wait for it.
                    let woken = self.uffd.wake(at, page);
                    woken.map_err(|e| {
                        self.refused(Operation::Wake, Some(run.first.plus(done)), e)
                    })?;
                    self.counts.present += 1;
                    done += 1;
                }
                Err(errno) => {
                    return Err(self.refused(operation, Some(run.first.plus(done)), errno));
                }
            }
        }
        Ok(done)
    }

    fn fill(
        &self,
        at: HostAddr,
        done: u64,
        bytes: u64,
        filling: Filling,
    ) -> (Operation, Result<u64, Errno>) {
        match (filling, self.regions.page_size()) {
            (Filling::Zeros, PageSize::Small) => {
                (Operation::Zeropage, self.uffd.zeropage(at, bytes))
            }
            // hugetlbfs has no ZEROPAGE.
            (Filling::Zeros, PageSize::Huge) => (Operation::Copy, self.uffd.copy(at, &self.zeros)),
            (Filling::Buffer { from }, _) => {
                let from = from + index(done);
                (
                    Operation::Copy,
                    self.uffd.copy(at, &self.buffer[from..from + index(bytes)]),
                )
            }
        }
    }

    /// What it means that the kernel refused: mostly that the VM has ended, which ESRCH says before the pidfd.
    fn refused(&self, operation: Operation, page: Option<PageIndex>, errno: Errno) -> Ended {
        if errno == Errno::SRCH || self.vm.has_exited() {
            return Ended::VmExited;
        }
        let page = page.map(PageIndex::get);
        Ended::VmKilled {
            reason: KillReason::Refused {
                operation,
                page,
                errno: errno.raw_os_error(),
            },
        }
    }

    fn page_bytes(&self) -> u64 {
        self.regions.page_size().bytes()
    }
}

/// What pages are filled with.
#[derive(Debug, Clone, Copy)]
enum Filling {
    Zeros,
    /// Bytes of the buffer, from here on.
    Buffer {
        from: usize,
    },
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}

/// How long to wait for a removal to be over, which nothing announces. It mostly takes microseconds.
#[derive(Debug, Default)]
struct Backoff {
    attempts: u32,
}

impl Backoff {
    const SPINS: u32 = 20;
    const FIRST: Duration = Duration::from_micros(50);
    const LAST: Duration = Duration::from_millis(2);

    fn again(&mut self) {
        self.attempts = self.attempts.saturating_add(1);
    }

    fn reset(&mut self) {
        self.attempts = 0;
    }

    /// `None` when nothing waits for us.
    fn pause(&self) -> Option<Duration> {
        match self.attempts {
            0 => None,
            1..=Self::SPINS => Some(Duration::ZERO),
            n => {
                Some(Self::LAST.min(Self::FIRST.saturating_mul(1 << (n - Self::SPINS - 1).min(16))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_under_way_is_first_spun_for_then_slept_for() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.pause(), None);
        let pauses: Vec<_> = (0..1000)
            .map(|_| {
                backoff.again();
                backoff.pause().unwrap()
            })
            .collect();
        assert!(pauses[..20].iter().all(Duration::is_zero));
        assert_eq!(pauses[20], Duration::from_micros(50));
        assert!(pauses.is_sorted());
        assert_eq!(pauses[999], Duration::from_millis(2));
        backoff.reset();
        assert_eq!(backoff.pause(), None);
    }

    #[test]
    fn one_byte_makes_a_page_data() {
        let mut page = [0; 4096];
        assert!(is_zero(&page));
        page[4095] = 1;
        assert!(!is_zero(&page));
    }
}
