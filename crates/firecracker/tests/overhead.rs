//! What the client costs beside the same bytes written to and read from a socket by hand.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rekindle_firecracker::Client;
use rekindle_kit::fake::FakeFirecracker;

const CALLS: usize = 400;

/// The issue's bound is for optimised builds; an unoptimised one is slower by its nature.
const BOUND: Duration = Duration::from_micros(if cfg!(debug_assertions) { 600 } else { 60 });

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn a_call_costs_little_more_than_its_bytes() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let client = Client::new(fake.socket());
    let mut raw = UnixStream::connect(fake.socket()).expect("connected");
    let body = r#"{"state":"Paused"}"#;
    let request = format!(
        "PATCH /vm HTTP/1.1\r\nhost: localhost\r\naccept: application/json\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut buffer = [0_u8; 4096];
    let (mut by_hand, mut by_client) = (Vec::new(), Vec::new());
    runtime.block_on(async {
        for _ in 0..CALLS {
            let began = Instant::now();
            raw.write_all(request.as_bytes()).expect("written");
            let read = raw.read(&mut buffer).expect("read");
            by_hand.push(began.elapsed());
            assert!(buffer[..read].ends_with(b"\r\n\r\n"));

            let began = Instant::now();
            client.pause().await.expect("paused");
            by_client.push(began.elapsed());
        }
    });
    let (by_hand, by_client) = (median(by_hand), median(by_client));
    println!("by hand {by_hand:?}, by the client {by_client:?}");
    assert!(
        by_client < by_hand + BOUND,
        "by hand {by_hand:?}, by the client {by_client:?}"
    );
}
