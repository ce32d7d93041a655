//! The fake VM's side: its memory, and threads that obey.

mod storm;

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::{Answer, Build, Handed, Handshake, Order, PAGE, WORDS, page_of, word_of};
use crate::dice::Dice;
use crate::sys::{Blocking, Mapping, Pages, Uffd};

pub(super) fn play(build: &Build) -> anyhow::Result<()> {
    let guest = Arc::new(Guest::new(build)?);
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    loop {
        let (stream, _) = listener.accept()?;
        let guest = Arc::clone(&guest);
        thread::spawn(move || guest.obey(stream));
    }
}

struct Guest {
    regions: Vec<Mapping>,
    page_size: usize,
    uffd: Mutex<Option<Uffd>>,
    connections: Mutex<Vec<UnixStream>>,
}

impl Guest {
    fn new(build: &Build) -> anyhow::Result<Guest> {
        let pages = if build.huge {
            Pages::Huge
        } else {
            Pages::Small
        };
        let blocking = if build.blocking {
            Blocking::Yes
        } else {
            Blocking::No
        };
        let uffd = Uffd::new(blocking).context("cannot make a userfaultfd")?;
        let mut regions = Vec::new();
        for length in &build.regions {
            let mapping = Mapping::new(length * PAGE, pages).context("cannot map guest memory")?;
            uffd.register(&mapping)
                .context("cannot register guest memory")?;
            regions.push(mapping);
        }
        Ok(Guest {
            regions,
            page_size: if build.huge { 2 << 20 } else { PAGE },
            uffd: Mutex::new(Some(uffd)),
            connections: Mutex::new(Vec::new()),
        })
    }

    /// One thread of the guest: obeys until the test hangs up.
    fn obey(self: &Arc<Guest>, stream: UnixStream) {
        let mut orders = BufReader::new(stream);
        let mut line = String::new();
        while orders.read_line(&mut line).is_ok_and(|n| n > 0) {
            let order = serde_json::from_str(&line).expect("the test speaks our JSON");
            let answer = self
                .follow(order)
                .unwrap_or_else(|e| Answer::Failed(format!("{e:#}")));
            let mut answer = serde_json::to_vec(&answer).expect("answers are JSON");
            answer.push(b'\n');
            if orders.get_mut().write_all(&answer).is_err() {
                return;
            }
            line.clear();
        }
    }

    fn follow(self: &Arc<Guest>, order: Order) -> anyhow::Result<Answer> {
        match order {
            Order::Handshake(handshake) => self.shake_hands(&handshake)?,
            Order::Describe => return Ok(Answer::Text(self.description())),
            Order::Read { page, count } => {
                return Ok(Answer::Stamps(
                    (page..page + count).map(|page| self.look(page)).collect(),
                ));
            }
            Order::Write { page, stamp } => self.fill(page, stamp),
            Order::Remove { page, count } => self.drop_pages(page, count)?,
            Order::Flood { page, times } => {
                (0..times).try_for_each(|_| self.drop_pages(page, 1))?;
            }
            Order::Slip { page, stamp } => {
                let (region, offset) = self.locate(page);
                let address = region.address() + u64::try_from(offset)?;
                let uffd = self.uffd.lock().unwrap_or_else(PoisonError::into_inner);
                let uffd = uffd.as_ref().context("the descriptor is closed")?;
                uffd.copy_without_wake(address, &page_of(stamp))?;
            }
            Order::Dump { path } => {
                let file = File::create_new(path)?;
                self.regions
                    .iter()
                    .try_for_each(|region| region.write_to(&file))?;
            }
            Order::CloseDescriptor => {
                *self.uffd.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
            Order::HangUp => {
                self.connections
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clear();
            }
            Order::Random {
                seed,
                steps,
                page,
                stamps,
            } => self.walk(seed, steps, page, stamps)?,
            Order::Storm(storm) => return Ok(Answer::Seen(storm::rage(self, storm)?)),
            Order::Time { page, count } => return Ok(Answer::Times(self.time(page, count))),
        }
        Ok(Answer::Done)
    }

    /// The regions as Firecracker 1.12 describes them.
    fn description(&self) -> String {
        let mut offset = 0;
        let regions = self.regions.iter().map(|region| {
            let size = region.len();
            let json = serde_json::json!({
                "base_host_virt_addr": region.address(),
                "size": size,
                "offset": offset,
                "page_size": self.page_size,
                "page_size_kib": self.page_size,
            });
            offset += size;
            json
        });
        serde_json::Value::Array(regions.collect()).to_string()
    }

    fn shake_hands(&self, handshake: &Handshake) -> anyhow::Result<()> {
        let message = handshake
            .message
            .clone()
            .unwrap_or_else(|| self.description());
        let null = File::open("/dev/null")?;
        let uffd = self.uffd.lock().unwrap_or_else(PoisonError::into_inner);
        let descriptors = handshake
            .hand
            .iter()
            .map(|handed| match handed {
                Handed::Uffd => uffd
                    .as_ref()
                    .map(AsFd::as_fd)
                    .context("the descriptor is closed"),
                Handed::Null => Ok(null.as_fd()),
            })
            .collect::<anyhow::Result<Vec<BorrowedFd<'_>>>>()?;
        let stream = UnixStream::connect(&handshake.socket)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ensure!(
                control.push(SendAncillaryMessage::ScmRights(&descriptors)),
                "too many descriptors"
            );
        }
        let message = [IoSlice::new(message.as_bytes())];
        sendmsg(&stream, &message, &mut control, SendFlags::NOSIGNAL)?;
        // Firecracker says nothing more, and keeps the connection for as long as it lives.
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(stream);
        Ok(())
    }

    fn locate(&self, page: usize) -> (&Mapping, usize) {
        let mut offset = page * PAGE;
        for region in &self.regions {
            if offset < region.len() {
                return (region, offset);
            }
            offset -= region.len();
        }
        panic!("page {page} is beyond the guest's memory");
    }

    /// Gives pages back; regions are apart in this process, so each needs a call of its own.
    fn drop_pages(&self, mut page: usize, count: usize) -> io::Result<()> {
        let end = page + count;
        while page < end {
            let (region, offset) = self.locate(page);
            let here = ((region.len() - offset) / PAGE).min(end - page);
            region.drop_pages(offset, here * PAGE)?;
            page += here;
        }
        Ok(())
    }

    /// The stamp of a page, if all its words follow from one.
    fn look(&self, page: usize) -> Option<u64> {
        let (region, offset) = self.locate(page);
        let stamp = region.load(offset);
        (0..WORDS)
            .all(|at| region.load(offset + at * 8) == word_of(stamp, at))
            .then_some(stamp)
    }

    fn fill(&self, page: usize, stamp: u64) {
        let (region, offset) = self.locate(page);
        for at in 0..WORDS {
            region.store(offset + at * 8, word_of(stamp, at));
        }
    }

    /// Does as it pleases with pages that are its own, and checks them against a plain list of what they must be.
    fn walk(
        &self,
        seed: u64,
        steps: usize,
        first: usize,
        mut model: Vec<u64>,
    ) -> anyhow::Result<()> {
        let mut dice = Dice::of(seed);
        for step in 0..steps {
            let at = dice.up_to(model.len());
            let kind = dice.up_to(32);
            let most = match kind {
                0..=3 => 8,
                4 => 48,
                5..=8 => 24,
                _ => 1,
            };
            let pages = at..(at + 1 + dice.up_to(most)).min(model.len());
            match kind {
                0..=4 => {
                    self.drop_pages(first + at, pages.len())?;
                    model[pages].fill(0);
                }
                9..=15 => {
                    let stamp = u64::try_from(step)? << 32 | u64::try_from(first + at)? | 1 << 63;
                    self.fill(first + at, stamp);
                    model[at] = stamp;
                }
                _ => self
                    .compare(first + at, &model[pages])
                    .with_context(|| format!("step {step}"))?,
            }
        }
        self.compare(first, &model).context("in the end")
    }

    /// Looks at pages, and says which of them is not what it must be.
    fn compare(&self, first: usize, stamps: &[u64]) -> anyhow::Result<()> {
        for (page, stamp) in (first..).zip(stamps) {
            let seen = self.look(page);
            ensure!(
                seen == Some(*stamp),
                "page {page} is {seen:x?}, not {stamp:x}"
            );
        }
        Ok(())
    }

    fn time(&self, first: usize, count: usize) -> Vec<u64> {
        // A step that shares no factor with the count visits each page once, and no two neighbours in turn.
        let step = (count / 2..)
            .find(|step| gcd(*step, count) == 1)
            .unwrap_or(1);
        let mut times = Vec::with_capacity(count);
        for n in 0..count {
            let (region, offset) = self.locate(first + n * step % count);
            let begin = Instant::now();
            region.load(offset);
            times.push(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
        times
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
