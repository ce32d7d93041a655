//! Agents that are none, at the sockets where Firecracker would be.

use rekindle_agent::{Decoder, Frame, FromAgent, FromHost, Hello, PROTOCOL, Wake, Woken};
use rekindle_firecracker::ProcessId;
use rekindle_store::Root;
use rekindle_store::causes::with_causes;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::connect::Near;
use super::hello::{self, Listener};
use super::*;
use crate::vm::boot::new_record;
use crate::vm::config::{Machine, Vsock};
use crate::vm::dir::VSOCK_SOCKET;
use crate::vm::record::{Ledger, Origin};

/// A VM that this process plays.
struct Scene {
    _place: TempDir,
    record: Record,
    dir: VmDir,
}

impl Scene {
    fn new(agent: Option<GuestAgent>) -> Scene {
        let place = tempfile::tempdir().unwrap();
        // Longer than the path of a socket may be.
        let root = Root::open(place.path().join("x".repeat(90))).unwrap();
        let dir = VmDir::create(&root, &"v".parse().unwrap()).unwrap();
        let origin = Origin::Boot {
            kernel: "k".into(),
            initrd: None,
            boot_args: None,
        };
        let machine = Machine {
            vsock: Some(Vsock { guest_cid: 3 }),
            ..Machine::default()
        };
        let mut record = new_record(&"v".parse().unwrap(), origin, machine);
        record.state = State::Running;
        record.agent = agent;
        record.firecracker = Some(ProcessId::of(std::process::id()).unwrap());
        record.write(&dir).unwrap();
        Scene {
            _place: place,
            record,
            dir,
        }
    }

    fn agent(&self) -> Agent {
        Agent::of(&self.dir)
    }

    /// Takes one call, as Firecracker does, and lets somebody answer.
    fn answers(&self, answer: impl AsyncFn(UnixStream) + 'static) {
        let socket = Near::of(&self.dir.file(VSOCK_SOCKET)).unwrap();
        let listener = UnixListener::bind(socket.path()).unwrap();
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = [0; 13];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(&line, b"CONNECT 5252\n");
                answer(stream).await;
            }
        });
    }
}

async fn says(stream: &mut UnixStream, message: &FromAgent) {
    let mut bytes = Vec::new();
    message.frame().encode(&mut bytes);
    stream.write_all(&bytes).await.unwrap();
}

async fn hears(stream: &mut UnixStream) -> FromHost {
    let mut decoder = Decoder::default();
    loop {
        if let Some(Frame::Message(json)) = decoder.next_frame().unwrap() {
            return FromHost::parse(&json).unwrap();
        }
        let mut buffer = [0; 1000];
        let count = stream.read(&mut buffer).await.unwrap();
        decoder.feed(&buffer[..count]);
    }
}

fn hello(protocol: u32) -> Hello {
    let version = "9.9".to_owned();
    Hello { protocol, version }
}

fn on_one_thread(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

#[test]
fn an_agent_answers_a_ping_and_one_of_another_protocol_is_told() {
    on_one_thread(async {
        for protocol in [PROTOCOL, 7] {
            let scene = Scene::new(None);
            scene.answers(async move |mut stream| {
                stream.write_all(b"OK 1073741824\n").await.unwrap();
                assert_eq!(hears(&mut stream).await, FromHost::Ping);
                says(&mut stream, &FromAgent::Pong(hello(protocol))).await;
            });
            match scene.agent().ready().await {
                Ok(found) => assert_eq!((found, protocol), (hello(PROTOCOL), PROTOCOL)),
                Err(error) => {
                    let error = error.to_string();
                    assert!(
                        error.contains("speaks version 7 of the protocol"),
                        "{error}"
                    );
                    assert!(error.contains("9.9"), "{error}");
                }
            }
        }
    });
}

#[test]
fn who_hangs_up_or_talks_nonsense_is_no_agent() {
    on_one_thread(async {
        let answers: [&[u8]; 4] = [b"", b"NO\n", b"OK 1\n\x01\0\0\0\x09", b"OK 1\n"];
        for answer in answers {
            let scene = Scene::new(None);
            scene.answers(async move |mut stream| {
                if answer.is_empty() {
                    return;
                }
                stream.write_all(answer).await.unwrap();
                let _ = stream.read(&mut [0; 100]).await;
                // A frame of no kind that there is.
                let _ = stream.write_all(b"\x01\0\0\0\x09").await;
            });
            let error = scene.agent().ping().await.unwrap_err();
            match answer {
                b"OK 1\n" => assert!(matches!(error, AgentError::Frame(_)), "{error:?}"),
                _ => assert!(matches!(error, AgentError::NoAgent { .. }), "{error:?}"),
            }
        }
    });
}

#[test]
fn who_waits_for_an_agent_is_told_of_its_call_and_of_the_end() {
    on_one_thread(async {
        let scene = Scene::new(Some(GuestAgent::Awaited));
        let ledger = Ledger::new(&scene.dir, &scene.record);
        let _listener = Listener::start(&scene.dir, &ledger).unwrap();
        let agent = scene.agent();
        let waits = tokio::task::spawn_local(async move { agent.ready().await });
        let socket = Near::of(&scene.dir.file(hello::socket())).unwrap();
        // Those who say something else are not believed.
        let mut liar = UnixStream::connect(socket.path()).await.unwrap();
        says(&mut liar, &FromAgent::Pong(hello(PROTOCOL))).await;
        drop(liar);
        let mut calls = UnixStream::connect(socket.path()).await.unwrap();
        says(&mut calls, &FromAgent::Hello(hello(PROTOCOL))).await;
        assert_eq!(waits.await.unwrap().unwrap(), hello(PROTOCOL));

        let scene = Scene::new(Some(GuestAgent::Awaited));
        let agent = scene.agent();
        let waits = tokio::task::spawn_local(async move { agent.ready().await });
        let mut over = scene.record.clone();
        over.state = State::Stopped;
        over.write(&scene.dir).unwrap();
        let error = waits.await.unwrap().unwrap_err();
        assert!(matches!(error, AgentError::Ended { .. }), "{error:?}");
    });
}

#[test]
fn a_paused_guest_is_not_asked() {
    on_one_thread(async {
        let mut scene = Scene::new(None);
        scene.record.state = State::Paused;
        scene.record.write(&scene.dir).unwrap();
        let error = scene.agent().exec(["true"]).start().await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "v is paused; let it run with: rekindle resume v"
        );
    });
}

#[test]
fn a_guest_that_takes_a_call_and_says_nothing_is_called_anew() {
    on_one_thread(async {
        let scene = Scene::new(None);
        let silent = std::cell::RefCell::new(None);
        scene.answers(async move |mut stream| {
            stream.write_all(b"OK 1\n").await.unwrap();
            let FromHost::Wake(_) = hears(&mut stream).await else {
                panic!("something else");
            };
            if silent.borrow().is_some() {
                return says(&mut stream, &FromAgent::Woken(Woken::default())).await;
            }
            silent.replace(Some(stream));
        });
        let within = Duration::from_secs(60);
        let woken = wake::wake(&scene.dir, within, |_| Wake::default()).await;
        assert_eq!(woken.unwrap(), Woken::default());
    });
}

#[test]
fn who_is_not_woken_in_time_is_told_why() {
    on_one_thread(async {
        let within = Duration::from_millis(100);
        let scene = Scene::new(None);
        let woken = wake::wake(&scene.dir, within, |_| Wake::default()).await;
        let why = with_causes(&woken.unwrap_err());
        assert!(why.starts_with("no answer within 100ms: "), "{why}");
        assert!(
            why.ends_with("No such file or directory (os error 2)"),
            "{why}"
        );
    });
}
