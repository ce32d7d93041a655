//! What an agent says: in any pieces the same frames, and nothing that brings a caller down.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rekindle_agent::{Caller, Decoder, Exec, Frame, FromAgent, FromHost, Stream, WINDOW};

fuzz_target!(|data: &[u8]| {
    let (size, bytes) = match data.split_first() {
        Some((size, bytes)) => (usize::from(*size).max(1), bytes),
        None => return,
    };
    let (frames, is_sound) = decode([bytes].into_iter());
    assert_eq!(
        (&frames, is_sound),
        (&decode(bytes.chunks(size)).0, is_sound)
    );
    let mut again = Vec::new();
    for frame in &frames {
        frame.encode(&mut again);
    }
    assert!(bytes.starts_with(&again), "a frame has one form");
    parse(&frames);
    call(frames);
});

/// The frames, and whether nothing but frames came.
fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, bool) {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return (frames, false),
            }
        }
    }
    (frames, true)
}

fn parse(frames: &[Frame]) {
    for frame in frames {
        let Frame::Message(json) = frame else {
            continue;
        };
        if let Ok(message) = FromAgent::parse(json) {
            assert_eq!(said(&message.frame(), FromAgent::parse), message);
        }
        if let Ok(message) = FromHost::parse(json) {
            assert_eq!(said(&message.frame(), FromHost::parse), message);
        }
    }
}

fn said<T, E: std::fmt::Debug>(frame: &Frame, parse: impl Fn(&[u8]) -> Result<T, E>) -> T {
    match frame {
        Frame::Message(json) => parse(json).expect("its own words"),
        other => panic!("{other:?}"),
    }
}

/// A caller takes all of it, through two connections, and never keeps more than it has to.
fn call(frames: Vec<Frame>) {
    let session = "s".parse().expect("a name");
    let mut caller = Caller::new(session, Exec::default());
    let input = vec![7; WINDOW];
    let half = frames.len() / 2;
    let mut read = 0;
    for (n, frame) in frames.into_iter().enumerate() {
        if n == 0 || n == half {
            caller.open();
        }
        caller.write(&input[..caller.room()]);
        if caller.receive(frame).is_err() {
            return;
        }
        while let Some(frame) = caller.next_frame() {
            frame.encode(&mut Vec::new());
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            let came = caller.read(stream, 1000);
            assert!(came.len() <= 1000);
            read += came.len();
        }
    }
    assert!(caller.outcome().is_none() || caller.read(Stream::Stdout, read).is_empty());
}
