//! What a Firecracker that a guest has got hold of may answer: the client takes it or refuses it, in time and in a bound of
//! memory. The first byte says which call is answered.

#![no_main]

use std::fs::OpenOptions;
use std::future::Future;
use std::io::{Read, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use rekindle_firecracker::{CallError, Client, Method};

/// What each call may take; whoever answers has always hung up long before.
const DEADLINE: Duration = Duration::from_secs(2);

fuzz_target!(|data: &[u8]| {
    let Some((call, answer)) = data.split_first() else {
        return;
    };
    let peer = Peer::get();
    peer.answers.send(answer.to_vec()).expect("it listens");
    // One that knows whom it speaks to asks once: each connection gets one answer.
    let version = "1.16.1".parse().expect("a version");
    let client = Client::new(&peer.socket)
        .with_deadline(DEADLINE)
        .with_version(version);
    let begun = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(answered(&client, *call));
    assert!(begun.elapsed() < DEADLINE * 2, "it hangs");
});

async fn answered(client: &Client, call: u8) {
    match call % 10 {
        0 => told(client.describe()).await,
        1 => told(client.version()).await,
        2 => told(client.vm_config()).await,
        3 => told(client.machine_config()).await,
        4 => told(client.balloon()).await,
        5 => told(client.balloon_statistics()).await,
        6 => told(client.mmds()).await,
        7 => told(client.memory_hotplug()).await,
        8 => told(client.pause()).await,
        _ => {
            let raw = client.raw(Method::GET, "/any", None).await;
            if let Ok(raw) = raw {
                assert!(raw.body.len() <= 1 << 20);
            }
        }
    }
}

/// An answer or an error: both can be told.
async fn told<T: std::fmt::Debug>(call: impl Future<Output = Result<T, CallError>>) {
    let told = match call.await {
        Ok(answer) => format!("{answer:?}"),
        Err(error) => format!("{error}"),
    };
    assert!(!told.is_empty());
}

/// Listens in Firecracker's place, and answers each connection once, with what it is sent.
struct Peer {
    socket: PathBuf,
    answers: Sender<Vec<u8>>,
}

impl Peer {
    fn get() -> &'static Peer {
        static PEER: OnceLock<Peer> = OnceLock::new();
        PEER.get_or_init(|| {
            let (listener, socket) = listen().expect("a socket");
            let (answers, sent) = mpsc::channel::<Vec<u8>>();
            std::thread::spawn(move || {
                for answer in sent {
                    let (mut stream, _) = listener.accept().expect("a connection");
                    let _ = stream.read(&mut [0; 4096]);
                    let _ = stream.write_all(&answer);
                }
            });
            Peer { socket, answers }
        })
    }
}

/// A socket, and a path to it that goes with this process.
fn listen() -> std::io::Result<(UnixListener, PathBuf)> {
    const O_PATH: i32 = 0o10_000_000;
    let name = format!("rekindle-fuzz-{}.sock", std::process::id());
    let place = std::env::temp_dir().join(name);
    let listener = UnixListener::bind(&place)?;
    let itself = OpenOptions::new()
        .read(true)
        .custom_flags(O_PATH)
        .open(&place)?;
    std::fs::remove_file(&place)?;
    Ok((
        listener,
        format!("/proc/self/fd/{}", itself.into_raw_fd()).into(),
    ))
}
