//! One direction of one stream, across connections: what was sent and may be asked for again, what came and goes on.

use std::collections::VecDeque;

use thiserror::Error;

use crate::frame::MAX_DATA;

/// The most bytes of a stream that are under way and not acknowledged.
pub const WINDOW: usize = 256 << 10;

/// The other side broke the rules. Nothing that it says can be relied on.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Offence {
    /// It acknowledged what was never sent, or took an acknowledgement back.
    #[error("byte {offset} is acknowledged; {from} to {to} can be")]
    Ack {
        /// What it said.
        offset: u64,
        /// What was acknowledged before.
        from: u64,
        /// What was sent.
        to: u64,
    },
    /// Bytes are missing, or more came than there is room for.
    #[error("bytes {offset} to {end} came; {expected} comes next, and there is room up to {room}")]
    Data {
        /// The first that came.
        offset: u64,
        /// Behind the last.
        end: u64,
        /// The next that can be used.
        expected: u64,
        /// Behind the last for which there is room.
        room: u64,
    },
    /// A stream went on after its end, or ended elsewhere than before.
    #[error("the stream ended at byte {end}, and byte {offset} is spoken of")]
    BehindTheEnd {
        /// Where it ended.
        end: u64,
        /// What it said.
        offset: u64,
    },
}

/// What is to be sent: kept until it is acknowledged.
#[derive(Debug, Default)]
pub struct Outbox {
    /// How many bytes were acknowledged. The first one kept has this offset.
    acked: u64,
    kept: VecDeque<u8>,
    /// How many of those kept were sent through the present connection.
    sent: usize,
    ended: bool,
    end_sent: bool,
}

impl Outbox {
    /// How many bytes can be pushed.
    pub fn room(&self) -> usize {
        WINDOW - self.kept.len()
    }

    /// Adds bytes.
    ///
    /// # Panics
    /// When there is no room for them, or the stream has ended.
    pub fn push(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.room() && !self.ended, "nobody asked");
        self.kept.extend(bytes);
    }

    /// No more will be pushed.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Whether no more will be pushed.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// What to send next, and its offset; at most [`MAX_DATA`] bytes.
    pub fn next_data(&mut self) -> Option<(u64, Vec<u8>)> {
        let count = (self.kept.len() - self.sent).min(MAX_DATA);
        if count == 0 {
            return None;
        }
        let offset = self.offset_of(self.sent);
        let bytes = self
            .kept
            .range(self.sent..self.sent + count)
            .copied()
            .collect();
        self.sent += count;
        Some((offset, bytes))
    }

    /// The stream's end, if that is what to send next.
    pub fn next_end(&mut self) -> Option<u64> {
        let due = self.ended && !self.end_sent && self.sent == self.kept.len();
        due.then(|| {
            self.end_sent = true;
            self.offset_of(self.sent)
        })
    }

    /// Whether all of it was sent through the present connection, its end too.
    pub fn is_sent(&self) -> bool {
        self.end_sent
    }

    /// The other side has all bytes before `offset`.
    pub fn acknowledged(&mut self, offset: u64) -> Result<(), Offence> {
        let taken = self.taken(offset, self.sent)?;
        self.kept.drain(..taken);
        self.sent -= taken;
        self.acked = offset;
        Ok(())
    }

    /// There is a new connection, and the other side has all bytes before `offset`. The rest is sent again.
    pub fn again_from(&mut self, offset: u64) -> Result<(), Offence> {
        let taken = self.taken(offset, self.kept.len())?;
        self.kept.drain(..taken);
        self.acked = offset;
        self.sent = 0;
        self.end_sent = false;
        Ok(())
    }

    fn taken(&self, offset: u64, most: usize) -> Result<usize, Offence> {
        let taken = offset.checked_sub(self.acked);
        let taken = taken.and_then(|taken| usize::try_from(taken).ok());
        taken.filter(|taken| *taken <= most).ok_or(Offence::Ack {
            offset,
            from: self.acked,
            to: self.offset_of(most),
        })
    }

    fn offset_of(&self, place: usize) -> u64 {
        self.acked + length(place)
    }
}

/// What came: kept until it is taken.
#[derive(Debug, Default)]
pub struct Inbox {
    /// How many bytes were taken.
    taken: u64,
    kept: VecDeque<u8>,
    /// Where the stream ends.
    end: Option<u64>,
    told: u64,
}

impl Inbox {
    /// Bytes came. What came before is passed over.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Offence> {
        let expected = self.received();
        let end = offset.saturating_add(length(bytes.len()));
        if let Some(at) = self.end
            && end > at
        {
            let offset = end;
            return Err(Offence::BehindTheEnd { end: at, offset });
        }
        let room = self.taken + length(WINDOW);
        if offset > expected || end > room {
            return Err(Offence::Data {
                offset,
                end,
                expected,
                room,
            });
        }
        let known = usize::try_from(expected - offset).unwrap_or(usize::MAX);
        self.kept.extend(bytes.get(known..).unwrap_or_default());
        Ok(())
    }

    /// The stream's end came.
    pub fn end(&mut self, offset: u64) -> Result<(), Offence> {
        let expected = self.received();
        match self.end {
            Some(end) if end == offset => Ok(()),
            Some(end) => Err(Offence::BehindTheEnd { end, offset }),
            None if offset == expected => {
                self.end = Some(offset);
                Ok(())
            }
            None => Err(Offence::Data {
                offset,
                end: offset,
                expected,
                room: self.taken + length(WINDOW),
            }),
        }
    }

    /// How many bytes were taken so far: a new connection goes on from there. What came and was not taken is let go of
    /// and comes again, so that both sides are of one mind about what there is and what has room.
    pub fn resume(&mut self) -> u64 {
        self.kept.clear();
        self.told = self.taken;
        self.taken
    }

    /// How many bytes came so far, those taken included.
    fn received(&self) -> u64 {
        self.taken + length(self.kept.len())
    }

    /// Takes what came, `most` bytes of it.
    pub fn take(&mut self, most: usize) -> Vec<u8> {
        let count = self.kept.len().min(most);
        self.taken += length(count);
        self.kept.drain(..count).collect()
    }

    /// Whether everything has come and was taken.
    pub fn is_over(&self) -> bool {
        self.end == Some(self.taken)
    }

    /// What is to be acknowledged, if it is worth a frame: the other side waits for room.
    pub fn next_ack(&mut self) -> Option<u64> {
        let due = self.taken - self.told >= length(WINDOW / 4)
            || (self.taken > self.told && self.kept.is_empty());
        due.then(|| {
            self.told = self.taken;
            self.taken
        })
    }
}

fn length(count: usize) -> u64 {
    u64::try_from(count).expect("a length fits in 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What one side pushes, in what order the two work, and where connections break.
    #[derive(Clone, Debug)]
    enum Step {
        Push(usize),
        Send,
        Take(usize),
        Ack,
        Break,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1..200_000usize).prop_map(Step::Push),
            Just(Step::Send),
            Just(Step::Send),
            (1..100_000usize).prop_map(Step::Take),
            Just(Step::Ack),
            Just(Step::Break),
        ];
        proptest::collection::vec(step, 1..120)
    }

    /// Two ends of a stream; what is under way is lost when the connection breaks.
    #[derive(Default)]
    struct Pipe {
        outbox: Outbox,
        inbox: Inbox,
        pushed: Vec<u8>,
        taken: Vec<u8>,
        next: u8,
    }

    impl Pipe {
        fn push(&mut self, count: usize) {
            let count = count.min(self.outbox.room());
            let bytes: Vec<u8> = (0..count)
                .map(|_| {
                    self.next = self.next.wrapping_mul(5).wrapping_add(17);
                    self.next
                })
                .collect();
            self.outbox.push(&bytes);
            self.pushed.extend(bytes);
        }

        fn send(&mut self) {
            if let Some((offset, bytes)) = self.outbox.next_data() {
                self.inbox.data(offset, &bytes).unwrap();
            }
            if let Some(end) = self.outbox.next_end() {
                self.inbox.end(end).unwrap();
            }
        }

        fn take(&mut self, count: usize) {
            self.taken.extend(self.inbox.take(count));
        }

        fn ack(&mut self) {
            if let Some(offset) = self.inbox.next_ack() {
                self.outbox.acknowledged(offset).unwrap();
            }
        }

        fn breaks(&mut self) {
            // Sent, and never came.
            let _ = self.outbox.next_data();
            self.outbox.again_from(self.inbox.resume()).unwrap();
        }
    }

    proptest! {
        #[test]
        fn every_byte_comes_once_wherever_connections_break(steps in steps()) {
            let mut pipe = Pipe::default();
            for step in steps {
                match step {
                    Step::Push(count) => pipe.push(count),
                    Step::Send => pipe.send(),
                    Step::Take(count) => pipe.take(count),
                    Step::Ack => pipe.ack(),
                    Step::Break => pipe.breaks(),
                }
                prop_assert!(pipe.pushed.starts_with(&pipe.taken));
            }
            pipe.outbox.end();
            pipe.breaks();
            for _ in 0..100 {
                pipe.send();
                pipe.take(usize::MAX);
                pipe.ack();
            }
            prop_assert!(pipe.inbox.is_over() && pipe.outbox.is_sent());
            prop_assert_eq!(pipe.taken, pipe.pushed);
        }
    }

    #[test]
    fn who_does_not_read_stops_who_writes() {
        let mut pipe = Pipe::default();
        pipe.push(usize::MAX);
        for _ in 0..10 {
            pipe.send();
        }
        assert_eq!(pipe.outbox.room(), 0);
        pipe.take(WINDOW / 2);
        pipe.ack();
        assert_eq!(pipe.outbox.room(), WINDOW / 2);
    }

    #[test]
    fn who_breaks_the_rules_is_found_out() {
        let mut outbox = Outbox::default();
        outbox.push(b"abc");
        assert!(outbox.acknowledged(1).is_err(), "it was not sent yet");
        assert_eq!(outbox.next_data(), Some((0, b"abc".to_vec())));
        assert_eq!(outbox.acknowledged(2), Ok(()));
        assert!(outbox.acknowledged(1).is_err(), "it was taken back");
        assert!(outbox.again_from(4).is_err(), "there is no such byte");
        assert!(outbox.again_from(u64::MAX).is_err());

        let mut inbox = Inbox::default();
        assert!(inbox.data(1, b"b").is_err(), "a byte is missing");
        assert!(inbox.data(0, &vec![0; WINDOW + 1]).is_err());
        assert!(inbox.data(u64::MAX, b"x").is_err());
        assert_eq!(inbox.data(0, b"ab"), Ok(()));
        assert_eq!(inbox.data(0, b"abc"), Ok(()), "two of these are known");
        assert!(inbox.end(2).is_err());
        assert_eq!(inbox.end(3), Ok(()));
        assert_eq!(inbox.end(3), Ok(()));
        assert!(inbox.data(3, b"d").is_err(), "it ended");
        assert_eq!(inbox.take(10), b"abc");
        assert!(inbox.is_over());
    }
}
