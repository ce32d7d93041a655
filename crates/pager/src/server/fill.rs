//! Getting pages into the guest: where their bytes come from, and what the kernel answers.

use std::time::Duration;

use rustix::io::Errno;

use super::{Pending, Server};
use crate::cold::{Done, Job, Readers};
use crate::prefetch::PIECE;
use crate::source::Content;
use crate::state::Count;
use crate::stats::{Ended, KillReason, Operation};
use crate::trace::Kind;
use crate::unit::{HostAddr, PageRun, PageSize, index, length};

/// Memory to read into.
pub(super) struct Buffers {
    /// A piece of small pages, or one large page.
    data: Vec<u8>,
    /// A large page of zeros, never written to, so the kernel's own zero page stands behind it.
    zeros: Vec<u8>,
}

impl Buffers {
    pub(super) fn new(page_size: PageSize) -> Buffers {
        let (data, zeros) = match page_size {
            PageSize::Small => (PIECE * PageSize::Small.bytes(), 0),
            PageSize::Huge => (PageSize::Huge.bytes(), PageSize::Huge.bytes()),
        };
        Buffers {
            data: vec![0; index(data)],
            zeros: vec![0; index(zeros)],
        }
    }
}

/// How far filling a run of pages got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Filled {
    /// Pages that are in place.
    pub(super) done: u64,
    /// The kernel wants us to come back later; otherwise what is left is on the disk.
    pub(super) put_off: bool,
}

/// What pages are filled with.
#[derive(Debug, Clone, Copy)]
enum Filling<'a> {
    Zeros,
    Bytes(&'a [u8]),
}

impl Server {
    /// The neighbouring pages from here on in the list that can be answered in one go.
    pub(super) fn next_run(&self, at: usize) -> Option<PageRun> {
        let rest = self.pending.get(at..)?;
        let first = rest.first()?.page;
        let follows = |(n, pending): &(u64, &Pending)| pending.page == first.plus(*n);
        let neighbours = (0..).zip(rest).take_while(follows).count();
        let run = PageRun {
            first,
            count: length(neighbours),
        };
        Some(self.alike(run))
    }

    /// The first pages of a run that are filled in one way, as many as one operation takes.
    pub(super) fn alike(&self, run: PageRun) -> PageRun {
        let limit = (PIECE * PageSize::Small.bytes() / self.page_bytes()).max(1);
        let run = self.together(PageRun {
            count: run.count.min(limit),
            ..run
        });
        let (removed, count) = self.state.removed().alike(run);
        if removed {
            return PageRun { count, ..run };
        }
        let page = self.page_bytes();
        let offset = self.state.regions().offset(run.first);
        let (content, bytes) = self.backing.content(offset, page, count * page);
        let bytes = match content {
            Content::Zero => bytes,
            Content::Data => self.backing.come_together(offset, page, bytes),
        };
        PageRun {
            count: bytes / page,
            ..run
        }
    }

    /// Fills pages that [`Server::alike`] found to belong together, without waiting for a disk.
    pub(super) fn fill_now(&mut self, run: PageRun, kind: Kind) -> Result<Filled, Ended> {
        let page = self.page_bytes();
        let offset = self.state.regions().offset(run.first);
        if self.state.removed().contains(run.first)
            || self.backing.content(offset, page, page).0 == Content::Zero
        {
            let done = self.place(run, Filling::Zeros, kind)?;
            let put_off = done < run.count;
            return Ok(Filled { done, put_off });
        }
        let mut data = std::mem::take(&mut self.buffers.data);
        let bytes = &mut data[..index(run.count * page)];
        // Where the file system cannot tell, whoever waits is served best by reading at once.
        let read = if kind == Kind::Demand && self.backing.is_mute() {
            self.backing.read(offset, bytes).map(|()| bytes.len())
        } else {
            self.backing.read_resident(offset, kind.into(), bytes)
        };
        let filled = match read {
            Ok(read) => self.fill_with(run, &data[..read], kind),
            Err(bad) if kind == Kind::Demand => Err(Ended::VmKilled {
                reason: KillReason::BadPage(bad),
            }),
            // The guest may never ask for it; when it does, it has to die.
            Err(_) => Ok(Filled {
                done: 0,
                put_off: false,
            }),
        };
        self.buffers.data = data;
        filled
    }

    /// Fills pages that are known to be zero, any number.
    pub(super) fn fill_zeros(&mut self, run: PageRun) -> Result<Filled, Ended> {
        let done = self.place(run, Filling::Zeros, Kind::Zero)?;
        let put_off = done < run.count;
        Ok(Filled { done, put_off })
    }

    /// Fills the first pages of a run with bytes, as far as these go.
    fn fill_with(&mut self, run: PageRun, bytes: &[u8], kind: Kind) -> Result<Filled, Ended> {
        let page = index(self.page_bytes());
        let count = length(bytes.len() / page);
        let mut done = 0;
        while done < count {
            let rest = &bytes[index(done) * page..index(count) * page];
            let (filling, pages) = self.next_filling(rest);
            let piece = PageRun {
                first: run.first.plus(done),
                count: pages,
            };
            let placed = self.place(piece, filling, kind)?;
            done += placed;
            if placed < pages {
                let put_off = true;
                return Ok(Filled { done, put_off });
            }
        }
        let put_off = false;
        Ok(Filled { done, put_off })
    }

    /// How to fill the first pages of `rest`. A file without holes still holds pages of zeros, and those need
    /// no memory.
    fn next_filling<'a>(&self, rest: &'a [u8]) -> (Filling<'a>, u64) {
        let page = index(self.page_bytes());
        if self.page_size() == PageSize::Huge {
            return (Filling::Bytes(&rest[..page]), 1);
        }
        let zero = is_zero(&rest[..page]);
        let count = rest
            .chunks(page)
            .take_while(|page| is_zero(page) == zero)
            .count();
        let filling = if zero {
            Filling::Zeros
        } else {
            Filling::Bytes(&rest[..count * page])
        };
        (filling, length(count))
    }

    /// Brings pages into the guest one way, past those that are there, until the kernel puts us off.
    fn place(&mut self, run: PageRun, filling: Filling<'_>, kind: Kind) -> Result<u64, Ended> {
        let page = self.page_bytes();
        let (start, _) = self
            .state
            .regions()
            .place(run)
            .expect("the run is of these regions");
        let mut done = 0;
        while done < run.count {
            let at = HostAddr::new(start.get() + done * page);
            let here = run.first.plus(done);
            let (operation, result) = self.fill(at, done * page, run.count - done, filling);
            match result {
                Ok(bytes) => {
                    let placed = PageRun {
                        first: here,
                        count: bytes / page,
                    };
                    self.count(placed, bytes, filling, kind);
                    self.present_in_a_row = 0;
                    done += placed.count;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::EXIST) => {
                    if kind == Kind::Demand {
                        // Whoever brought it may not have woken those who wait for it.
                        self.uffd
                            .wake(at, page)
                            .map_err(|e| self.refused(Operation::Wake, Some(here), e))?;
                        self.state.add(Count::Present, 1);
                        self.found_present(here)?;
                    }
                    done += 1;
                }
                // The guest may never ask for it.
                Err(Errno::NOMEM) if self.page_size() == PageSize::Huge && kind != Kind::Demand => {
                    done += 1;
                }
                Err(Errno::NOMEM) if self.page_size() == PageSize::Huge => {
                    let page = here.get();
                    return Err(Ended::VmKilled {
                        reason: KillReason::NoHugePage { page },
                    });
                }
                Err(errno) => return Err(self.refused(operation, Some(here), errno)),
            }
        }
        Ok(done)
    }

    fn fill(
        &self,
        at: HostAddr,
        from: u64,
        pages: u64,
        filling: Filling<'_>,
    ) -> (Operation, Result<u64, Errno>) {
        let bytes = pages * self.page_bytes();
        match (filling, self.page_size()) {
            (Filling::Zeros, PageSize::Small) => {
                (Operation::Zeropage, self.uffd.zeropage(at, bytes))
            }
            // hugetlbfs has no ZEROPAGE.
            (Filling::Zeros, PageSize::Huge) => {
                (Operation::Copy, self.uffd.copy(at, &self.buffers.zeros))
            }
            (Filling::Bytes(data), _) => {
                let data = &data[index(from)..index(from + bytes)];
                (Operation::Copy, self.uffd.copy(at, data))
            }
        }
    }

    fn count(&self, placed: PageRun, bytes: u64, filling: Filling<'_>, kind: Kind) {
        let kind_of_data = match kind {
            Kind::Demand => Count::Demand,
            Kind::Around => Count::Around,
            Kind::Replay | Kind::Zero => Count::Replayed,
        };
        match filling {
            Filling::Zeros => self.state.add(Count::Zeroed, placed.count),
            Filling::Bytes(_) => {
                self.state.add(kind_of_data, placed.count);
                self.state.add(Count::Bytes, bytes);
            }
        }
        self.state
            .trace()
            .push(self.state.age() / 1000, kind, placed);
    }

    /// Has some of what is pending read from the disk; tells how many.
    pub(super) fn read_from_disk(&mut self, from: usize, count: u64) -> Result<usize, Ended> {
        let pending = &self.pending[from..from + index(count)];
        let run = PageRun {
            first: pending[0].page,
            count,
        };
        self.reading.extend_from_slice(pending);
        self.start_reading(run, Kind::Demand)?;
        Ok(index(count))
    }

    pub(super) fn start_reading(&mut self, run: PageRun, kind: Kind) -> Result<(), Ended> {
        let job = Job {
            run,
            kind,
            offset: self.state.regions().offset(run.first),
            bytes: run.count * self.page_bytes(),
        };
        if self.readers.is_none() {
            let readers = Readers::start(&self.backing)
                .map_err(|errno| self.refused(Operation::Read, Some(run.first), errno))?;
            self.readers = Some(readers);
        }
        if let Some(readers) = &mut self.readers {
            readers.read(job);
        }
        Ok(())
    }

    /// Takes what has come from the disk.
    pub(super) fn collect(&mut self) -> Result<(), Ended> {
        let Some(readers) = &self.readers else {
            return Ok(());
        };
        if readers.under_way() == 0 {
            return Ok(());
        }
        readers.rearm();
        if let Some(packed) = self.backing.packed() {
            let (bytes, requests) = packed.fetched();
            self.state.add(Count::FetchedBytes, bytes);
            self.state.add(Count::FetchedRequests, requests);
        }
        while let Some(done) = self.readers.as_mut().and_then(Readers::next) {
            self.take_read(done)?;
        }
        Ok(())
    }

    fn take_read(&mut self, Done { run, kind, bytes }: Done) -> Result<(), Ended> {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(_) if kind != Kind::Demand => return Ok(()),
            Err(reason) => return Err(Ended::VmKilled { reason }),
        };
        let page = self.page_bytes();
        let mut done = 0;
        while done < run.count {
            // It may have been given back while it was read.
            let rest = self.alike(PageRun {
                first: run.first.plus(done),
                count: run.count - done,
            });
            let filled = if self.state.removed().contains(rest.first) {
                self.fill_now(rest, kind)?
            } else {
                let from = index(done * page);
                let bytes = &bytes[from..from + index(rest.count * page)];
                self.state.add(Count::Cold, rest.count);
                self.fill_with(rest, bytes, kind)?
            };
            done += filled.done;
            if filled.done < rest.count {
                break;
            }
        }
        let placed = |pending: &Pending| {
            let at = pending.page.get().wrapping_sub(run.first.get());
            at < run.count
        };
        let (of_run, others) = std::mem::take(&mut self.reading)
            .into_iter()
            .partition(placed);
        self.reading = others;
        for pending in of_run {
            if pending.page.get() < run.first.get() + done {
                self.answered(pending);
            } else {
                // Put off; by now it is in memory.
                self.pending.push(pending);
            }
        }
        Ok(())
    }

    /// How long until what was put off may be tried again.
    pub(super) fn pauses(&self) -> Option<Duration> {
        [self.backoff.pause(), self.ahead.backoff.pause()]
            .into_iter()
            .flatten()
            .min()
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_makes_a_page_data() {
        let mut page = [0; 4096];
        assert!(is_zero(&page));
        page[4095] = 1;
        assert!(!is_zero(&page));
    }
}
