//! Serving one VM: one thread, one loop.
//!
//! ```text
//!        ┌──────────────────────────────────────────────────────────────┐
//!        ▼                                                              │
//!   wait: userfaultfd, VM's pidfd, its connection, the disk readers      │
//!        │        (not at all while there is something to bring ahead)   │
//!        ▼                                                              │
//!   drain:  REMOVE ─► the set `removed`        fault ─► `pending`         │
//!        ▼                                                              │
//!   answer: neighbours together ─► removed or hole: ZEROPAGE ─┬─ done ──┤
//!        │                         data: read, COPY           └─ EAGAIN: stays pending, timer set
//!        ▼                                                              │
//!   ahead:  one slice of what nobody waits for yet ─────────────────────┘
//! ```
//!
//! The kernel hands out faults before events, whatever happened first, but while a removal is under way, from
//! before its event can be read until a moment after, every COPY and ZEROPAGE fails with EAGAIN. So an
//! operation that succeeds was not overtaken by a removal that we have not applied. That holds because one
//! thread reads events and fills pages: a second one that fills pages could look whether a page is removed,
//! be overtaken by the removal that the first one reads, and then fill the page all the same.

mod ahead;
mod fill;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::backoff::Backoff;
use crate::cold::Readers;
use crate::log::say;
use crate::prefetch::{Replay, Zeros};
use crate::record::Recorder;
use crate::source::{Backing, Content};
use crate::spin::Spin;
use crate::state::{Count, State};
use crate::stats::{Ended, KillReason, Operation, Stats};
use crate::sys::{Message, Uffd};
use crate::unit::{PageIndex, PageRun, PageSize, index};
use crate::vm::Vm;

use self::ahead::Queue;
use self::fill::Buffers;

/// How many messages are read before faults are answered, so that a flood of removals cannot starve them.
/// That is safe although there may be more: see the module's second paragraph.
const DRAIN_LIMIT: usize = 4096;
/// While there is something to bring ahead, every so many turns the VM is looked at.
const LOOK_AROUND: u32 = 64;
/// More threads than Firecracker has: 32 virtual CPUs and a few.
const MOST_THREADS: u32 = 64;

/// A page that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pending {
    page: PageIndex,
    since: Instant,
}

/// What a server is made of.
pub(crate) struct Parts {
    pub(crate) vm: Vm,
    pub(crate) uffd: Uffd,
    pub(crate) connection: Option<OwnedFd>,
    pub(crate) state: State,
    pub(crate) backing: Arc<Backing>,
    pub(crate) replay: Option<Replay>,
    pub(crate) recorder: Option<Recorder>,
}

pub(crate) struct Server {
    /// First, so that it is dropped, and the VM killed, before the descriptor closes.
    vm: Vm,
    uffd: Uffd,
    state: State,
    backing: Arc<Backing>,
    /// `None` once it has hung up.
    connection: Option<OwnedFd>,
    pending: Vec<Pending>,
    /// Those of them that are being read from the disk.
    reading: Vec<Pending>,
    readers: Option<Readers>,
    backoff: Backoff,
    spin: Spin,
    last_answer: Instant,
    turns: u32,
    /// Huge pages that are there already, one after the other, and none placed in between.
    present_in_a_row: u32,
    buffers: Buffers,
    ahead: Queue,
    recorder: Option<Recorder>,
    /// Another page server was here before.
    inherited: bool,
}

impl Server {
    pub(crate) fn new(parts: Parts) -> Server {
        let Parts {
            vm,
            uffd,
            connection,
            state,
            backing,
            replay,
            recorder,
        } = parts;
        let page_size = state.regions().page_size();
        let held_back = replay.as_ref().map_or(0, |replay| replay.held_back().len());
        state.set(Count::HeldBack, crate::unit::length(held_back));
        let ahead = Queue::new(replay, Zeros::of(state.regions().pages(), page_size));
        Server {
            vm,
            uffd,
            backing,
            connection,
            pending: Vec::new(),
            reading: Vec::new(),
            readers: None,
            backoff: Backoff::default(),
            spin: Spin::default(),
            last_answer: Instant::now(),
            turns: 0,
            present_in_a_row: 0,
            buffers: Buffers::new(page_size),
            ahead,
            recorder,
            inherited: false,
            state,
        }
    }

    /// Takes up what another page server left: what it had read and not applied, and who still waits.
    pub(crate) fn succeed(&mut self) {
        self.inherited = true;
    }

    fn take_up(&mut self) -> Result<(), Ended> {
        for at in 0..State::MESSAGES {
            let message = Message::parse(self.state.message(at));
            if matches!(message, Message::Remove { .. }) {
                self.take(message, Instant::now())?;
            }
        }
        self.state.set_reading(false);
        for region in self.state.regions().regions() {
            self.uffd
                .wake(region.base, region.size)
                .map_err(|errno| self.refused(Operation::Wake, None, errno))?;
        }
        Ok(())
    }

    /// Where the counts are to be left.
    pub(crate) fn stats_file(&self) -> Option<PathBuf> {
        self.state.saved().plan.stats.clone()
    }

    /// Serves until the VM has ended, or has to.
    ///
    /// The VM is dead when this returns, or it is an error: it could not be killed.
    pub(crate) fn run(mut self) -> io::Result<Stats> {
        let ended = self.serve();
        // Before the descriptor goes: if ours is the last, missing pages would read as zeros.
        self.vm.kill()?;
        self.end_of_record();
        self.state.set_ended(&ended);
        Ok(Stats::of(&self.state, Some(ended)))
    }

    fn serve(&mut self) -> Ended {
        if self.inherited
            && let Err(ended) = self.take_up()
        {
            return ended;
        }
        loop {
            if let Err(ended) = self.turn() {
                return ended;
            }
        }
    }

    fn turn(&mut self) -> Result<(), Ended> {
        self.wait()?;
        self.drain()?;
        self.collect()?;
        self.answer()?;
        self.bring_ahead()
    }

    /// Waits until there is something to do.
    fn wait(&mut self) -> Result<(), Ended> {
        let busy = self.pauses().is_none() && self.has_ahead();
        if busy {
            self.turns = self.turns.wrapping_add(1);
            return if self.turns.is_multiple_of(LOOK_AROUND) {
                self.poll(Some(Duration::ZERO))
            } else {
                Ok(())
            };
        }
        if self.pauses().is_none() && self.stay_awake()? {
            return Ok(());
        }
        let now = self.state.age();
        if self.recorder.as_ref().is_some_and(|r| r.is_over(now)) {
            self.end_of_record();
        }
        let record = self.recorder.as_ref().and_then(|r| r.left(now));
        let pauses = [self.pauses(), record.map(Duration::from_nanos)];
        self.poll(pauses.into_iter().flatten().min())
    }

    /// Reads again and again for a moment; tells whether something came.
    fn stay_awake(&mut self) -> Result<bool, Ended> {
        let Some(moment) = self.spin.moment() else {
            return Ok(false);
        };
        let start = Instant::now();
        while start.elapsed() < moment {
            self.drain()?;
            if !self.pending.is_empty() {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        self.spin.was_in_vain();
        Ok(false)
    }

    fn poll(&mut self, limit: Option<Duration>) -> Result<(), Ended> {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = vec![
            PollFd::new(&self.uffd, PollFlags::IN),
            PollFd::new(&self.vm, PollFlags::IN),
        ];
        fds.extend(
            self.readers
                .as_ref()
                .map(|readers| PollFd::new(readers, PollFlags::IN)),
        );
        let connection_at = fds.len();
        // Asks for nothing: a hang-up is always told.
        fds.extend(
            self.connection
                .as_ref()
                .map(|fd| PollFd::new(fd, PollFlags::empty())),
        );
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(self.refused(Operation::Poll, None, errno)),
        }
        let [uffd, vm] = [fds[0].revents(), fds[1].revents()];
        let hung_up = fds
            .get(connection_at)
            .is_some_and(|fd| !fd.revents().is_empty());
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

    /// Reads and applies what the kernel has to say.
    fn drain(&mut self) -> Result<(), Ended> {
        for _ in 0..DRAIN_LIMIT / State::MESSAGES {
            self.state.set_reading(true);
            let read = match self.uffd.read(self.state.inbox()) {
                Ok(read) => read,
                Err(Errno::AGAIN) => 0,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(self.refused(Operation::Read, None, errno)),
            };
            let since = Instant::now();
            for at in 0..read {
                self.take(Message::parse(self.state.message(at)), since)?;
            }
            self.state.set_reading(false);
            if read < State::MESSAGES {
                break;
            }
        }
        Ok(())
    }

    fn take(&mut self, message: Message, since: Instant) -> Result<(), Ended> {
        match message {
            Message::Missing { address } => {
                self.state.add(Count::Faults, 1);
                let reason = KillReason::StrayFault {
                    address: address.get(),
                };
                let page = self
                    .state
                    .regions()
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
                    .state
                    .regions()
                    .runs(start, end)
                    .ok_or(Ended::VmKilled { reason })?
                {
                    self.state.removed().insert(run);
                    self.state.recently_removed().insert(run);
                    self.state.add(Count::Removed, run.count);
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
        if self.pending.is_empty() {
            return Ok(());
        }
        // The same page may have been reported twice; the earlier report sorts first and is kept.
        self.pending.sort_unstable();
        self.pending.dedup_by_key(|pending| pending.page);
        let since = self.pending[0].since;
        self.spin
            .came_after(since.saturating_duration_since(self.last_answer));
        let mut done = 0;
        while let Some(run) = self.next_run(done) {
            let filled = self.fill_now(run, crate::trace::Kind::Demand)?;
            let end = done + index(filled.done);
            for at in done..end {
                self.answered(self.pending[at]);
            }
            done = end;
            if filled.done == run.count {
                continue;
            }
            if filled.put_off {
                // A removal is under way, and that holds for the whole address space: to go on is in vain.
                self.state.add(Count::Retries, 1);
                break;
            }
            done += self.read_from_disk(done, run.count - filled.done)?;
        }
        self.pending.drain(..done);
        let now = Instant::now();
        self.spin.answered(now - self.last_answer);
        self.last_answer = now;
        if self.pending.is_empty() {
            self.backoff.reset();
        } else {
            self.backoff.again();
        }
        Ok(())
    }

    /// A page is in place that somebody waited for.
    fn answered(&mut self, pending: Pending) {
        let ns = pending.since.elapsed().as_nanos();
        let ns = u64::try_from(ns).unwrap_or(u64::MAX);
        self.state.histogram().record(ns);
        let now = self.state.age();
        let data = self.is_data(pending.page);
        if let (true, Some(recorder)) = (data, &mut self.recorder)
            && recorder.faulted(pending.page, now)
        {
            self.state.add(Count::HeldBackTouched, 1);
        }
        self.asked(pending.page, now);
    }

    /// Whether a page comes from a file. Zeros need no working set.
    fn is_data(&self, page: PageIndex) -> bool {
        let bytes = self.page_bytes();
        let offset = self.state.regions().offset(page);
        !self.state.removed().contains(page)
            && self.backing.content(offset, bytes, bytes).0 == Content::Data
    }

    fn end_of_record(&mut self) {
        if let Some(recorder) = self.recorder.take()
            && let Err(error) = recorder.write(self.state.age())
        {
            // The next run is slower; this one is none the worse.
            say(format_args!("cannot record the working set: {error}"));
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

    /// A huge page was there already, says the kernel. It says the same, again and again, where the host has none left.
    /// Each thread of the VM can find one that was placed while it waited, and more than once in a row it cannot.
    fn found_present(&mut self, page: PageIndex) -> Result<(), Ended> {
        if self.page_size() == PageSize::Small {
            return Ok(());
        }
        self.present_in_a_row += 1;
        if self.present_in_a_row <= MOST_THREADS {
            return Ok(());
        }
        let page = page.get();
        Err(Ended::VmKilled {
            reason: KillReason::NoHugePage { page },
        })
    }

    fn page_size(&self) -> PageSize {
        self.state.regions().page_size()
    }

    fn page_bytes(&self) -> u64 {
        self.page_size().bytes()
    }

    /// As many of a run's pages as follow each other in Firecracker too.
    fn together(&self, run: PageRun) -> PageRun {
        let (_, count) = self
            .state
            .regions()
            .place(run)
            .expect("the run is of these regions");
        PageRun {
            first: run.first,
            count,
        }
    }
}
