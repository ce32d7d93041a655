//! Reading what is not in memory, on threads of their own, so that a slow disk delays only who waits for it.
//!
//! ```text
//!   server ── Job ──► queue ──► a few threads, blocked in pread
//!      ◄── eventfd, Done ───────────┤
//!      ◄── eventfd, Done ── fetched ┘ what is packed and not on this host (`far.rs`)
//! ```
//!
//! The threads are started when the first page turns out to be on the disk; mostly that is never.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::source::Backing;
use crate::stats::KillReason;
use crate::trace::Kind;
use crate::unit::{MemoryOffset, PageRun};

/// As many reads are under way at once.
const THREADS: usize = 4;

/// Pages to be read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    pub(crate) run: PageRun,
    pub(crate) kind: Kind,
    pub(crate) offset: MemoryOffset,
    pub(crate) bytes: u64,
}

/// Pages that were read.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) run: PageRun,
    pub(crate) kind: Kind,
    pub(crate) bytes: Result<Vec<u8>, KillReason>,
}

/// The threads.
#[derive(Debug)]
pub(crate) struct Readers {
    jobs: Sender<Job>,
    done: Receiver<Done>,
    wake: Arc<OwnedFd>,
    under_way: usize,
}

impl Readers {
    pub(crate) fn start(backing: &Arc<Backing>) -> Result<Readers, Errno> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (jobs, queue) = channel();
        let (out, done) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..THREADS {
            let (backing, queue) = (Arc::clone(backing), Arc::clone(&queue));
            let (out, wake) = (out.clone(), Arc::clone(&wake));
            thread::Builder::new()
                .name("pager-disk".into())
                .stack_size(128 * 1024)
                .spawn(move || read_all(&backing, &queue, &out, &wake))
                .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::AGAIN))?;
        }
        Ok(Readers {
            jobs,
            done,
            wake,
            under_way: 0,
        })
    }

    pub(crate) fn read(&mut self, job: Job) {
        // The threads end when this end is dropped, not before.
        self.jobs.send(job).expect("the readers live");
        self.under_way += 1;
    }

    pub(crate) fn under_way(&self) -> usize {
        self.under_way
    }

    /// Something that was read, if there is any.
    pub(crate) fn next(&mut self) -> Option<Done> {
        let done = self.done.try_recv().ok()?;
        self.under_way -= 1;
        Some(done)
    }

    /// Makes the descriptor silent until more is read.
    pub(crate) fn rearm(&self) {
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
    }
}

impl AsFd for Readers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.wake).as_fd()
    }
}

fn read_all(
    backing: &Backing,
    queue: &Mutex<Receiver<Job>>,
    out: &Sender<Done>,
    wake: &Arc<OwnedFd>,
) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job {
            run,
            kind,
            offset,
            bytes,
        }) = job
        else {
            return;
        };
        let mut owed = Owed {
            run,
            kind,
            out: out.clone(),
            wake: Arc::clone(wake),
            is_paid: false,
        };
        backing.fetch(offset, bytes, kind.into(), move |bytes| owed.pay(bytes));
    }
}

/// Pages that the server waits for. However their reading ends, it does not wait for ever.
struct Owed {
    run: PageRun,
    kind: Kind,
    out: Sender<Done>,
    wake: Arc<OwnedFd>,
    is_paid: bool,
}

impl Owed {
    fn pay(&mut self, bytes: Result<Vec<u8>, KillReason>) {
        let (run, kind) = (self.run, self.kind);
        self.is_paid = true;
        // Once the server has ended nobody wants it.
        let _ = self.out.send(Done { run, kind, bytes });
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if !self.is_paid {
            self.pay(Err(KillReason::Unfetched {
                page: self.run.first.get(),
                said: "the thread that read it panicked".to_owned(),
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::PageIndex;

    #[test]
    fn what_nobody_reads_to_the_end_is_answered_all_the_same() {
        let (out, done) = channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let owed = Owed {
            run: PageRun {
                first: PageIndex::new(7),
                count: 1,
            },
            kind: Kind::Demand,
            out,
            wake: Arc::clone(&wake),
            is_paid: false,
        };
        let dies = thread::spawn(move || {
            let _owed = owed;
            panic!("on purpose");
        });
        assert!(dies.join().is_err());
        let Done { bytes, .. } = done.try_recv().unwrap();
        assert!(matches!(bytes, Err(KillReason::Unfetched { page: 7, .. })));
        assert_eq!(rustix::io::read(&*wake, &mut [0; 8]), Ok(8));
        assert!(done.try_recv().is_err());
    }
}
