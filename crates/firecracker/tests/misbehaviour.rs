//! A Firecracker that is slow, broken, or hostile, and what the client makes of it.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use rekindle_firecracker::model::{MemoryBackend, SnapshotCreateParams, SnapshotLoadParams};
use rekindle_firecracker::{CallError, Client, Method};
use rekindle_kit::fake::{FakeFirecracker, Reply, Request};
use serde_json::json;

/// More than any call takes.
const LONG: Duration = Duration::from_secs(60);

/// One that answers its first request in a way of its own, and all others well.
fn first(reply: impl Fn() -> Reply + Send + 'static) -> FakeFirecracker {
    let mut is_first = true;
    FakeFirecracker::start(
        move |request: &Request| match std::mem::take(&mut is_first) {
            true => reply(),
            false => Reply::obliging(request, "1.12.1"),
        },
    )
}

/// The first call fails, and the client works again with the next.
async fn fails_once(fake: &FakeFirecracker, client: &Client) -> CallError {
    let error = client.start().await.expect_err("a misbehaving Firecracker");
    client.describe().await.expect("all is well again");
    assert_eq!(fake.calls(), ["PUT /actions", "GET /"], "{error}");
    error
}

#[tokio::test]
async fn a_refusal_holds_firecrackers_own_words() {
    let fake = first(|| Reply::fault("The kernel file cannot be opened: No such file."));
    let client = Client::new(fake.socket());
    let error = fails_once(&fake, &client).await;
    assert_eq!(error.status(), Some(400));
    assert_eq!(
        error.fault_message(),
        Some("The kernel file cannot be opened: No such file.")
    );
    assert_eq!(
        error.to_string(),
        "PUT /actions: refused with 400: The kernel file cannot be opened: No such file."
    );
    assert_eq!(
        fake.connections(),
        1,
        "a refusal is no reason to connect anew"
    );
}

#[tokio::test]
async fn the_other_form_of_a_refusal_is_read_too() {
    let fake = first(|| Reply::json(400, &json!({"error": "Invalid header."})));
    let client = Client::new(fake.socket());
    let error = fails_once(&fake, &client).await;
    assert_eq!(error.fault_message(), Some("Invalid header."));
    assert!(
        matches!(error, CallError::Refused { body, .. } if body == r#"{"error":"Invalid header."}"#)
    );
}

#[tokio::test]
async fn one_connection_too_many_is_a_refusal() {
    let fake = first(|| {
        let body = r#"{ "error": "Too many open connections" }"#;
        let head = "HTTP/1.1 503 \r\nServer: Firecracker API\r\nConnection: close\r\n";
        Reply::bytes(format!(
            "{head}Content-Length: {}\r\n\r\n{body}",
            body.len()
        ))
        .then_close()
    });
    let client = Client::new(fake.socket());
    let error = fails_once(&fake, &client).await;
    assert_eq!(error.status(), Some(503));
    assert_eq!(error.fault_message(), Some("Too many open connections"));
    assert_eq!(fake.connections(), 2);
}

#[tokio::test]
async fn statuses_of_300_and_above_are_refusals_whatever_they_hold() {
    for status in [300, 304, 404, 500, 599] {
        let fake =
            first(move || Reply::text(status, if status == 304 { "" } else { "plain words" }));
        let client = Client::new(fake.socket());
        let error = client.start().await.expect_err("a refusal");
        assert_eq!(error.status(), Some(status));
        if status != 304 {
            assert_eq!(error.fault_message(), Some("plain words"));
        }
    }
}

#[tokio::test]
async fn a_megabyte_of_error_text_is_cut() {
    let long = || "ä".repeat(1 << 19);
    let fake = first(move || Reply::fault(&long()));
    let client = Client::new(fake.socket());
    let error = fails_once(&fake, &client).await;
    let CallError::Refused {
        fault_message,
        body,
        ..
    } = &error
    else {
        panic!("{error:?}");
    };
    assert!(fault_message.len() <= 4096 && body.len() <= 4096);
    assert!(fault_message.ends_with('ä'));
}

#[tokio::test]
async fn an_answer_beyond_all_bounds_is_not_read_to_its_end() {
    let fake = FakeFirecracker::start(|request| match request.path.as_str() {
        "/" => Reply::json(200, &json!({ "a": "b".repeat(8 << 20) })),
        _ => Reply::text(400, &"c".repeat(8 << 20)),
    });
    let client = Client::new(fake.socket());
    let error = client.describe().await.unwrap_err();
    assert!(
        matches!(error, CallError::TooLarge { limit, .. } if limit == 1 << 20),
        "{error:?}"
    );
    let error = client.start().await.unwrap_err();
    assert!(
        matches!(&error, CallError::Refused { fault_message, .. } if fault_message.len() == 4096)
    );
    assert_eq!(fake.connections(), 2);
}

#[tokio::test]
async fn half_an_answer_is_a_broken_connection() {
    for half in [
        "HTTP/1.1 204",
        "HTTP/1.1 200 \r\nContent-Length: 100\r\n\r\n{\"app_name\"",
        "HTTP/1.1 200 \r\nContent-Type: appl",
        "",
    ] {
        let fake = first(move || Reply::bytes(half).then_close());
        let client = Client::new(fake.socket());
        let error = fails_once(&fake, &client).await;
        assert!(
            matches!(error, CallError::Connection { .. }),
            "{half:?}: {error:?}"
        );
    }
}

#[tokio::test]
async fn garbage_is_no_answer() {
    for garbage in [
        "SSH-2.0-OpenSSH_9.2\r\n".as_bytes(),
        b"\0\xff\xfe\r\n\r\n".as_slice(),
        b"HTTP/1.1 abc \r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: many\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
    ] {
        let fake = first(move || Reply::bytes(garbage));
        let client = Client::new(fake.socket());
        let error = fails_once(&fake, &client).await;
        assert!(
            matches!(error, CallError::Connection { .. }),
            "{garbage:?}: {error:?}"
        );
    }
}

#[tokio::test]
async fn an_answer_of_the_wrong_form_is_malformed() {
    for body in ["", "{", "[]", "{}", r#"{"app_name":1}"#] {
        let fake = FakeFirecracker::start(move |_| Reply::text(200, body));
        let client = Client::new(fake.socket());
        let error = client.describe().await.unwrap_err();
        assert!(
            matches!(error, CallError::Malformed { status: 200, .. }),
            "{body:?}: {error:?}"
        );
    }
    let fake = FakeFirecracker::start(|_| Reply::json(200, &json!({"firecracker_version": "new"})));
    let error = Client::new(fake.socket()).version().await.unwrap_err();
    assert!(matches!(error, CallError::NoVersion { .. }), "{error:?}");
}

#[tokio::test]
async fn a_connection_closed_between_calls_is_opened_anew() {
    let fake = FakeFirecracker::start(|request| Reply::obliging(request, "1.12.1").then_close());
    let client = Client::new(fake.socket());
    for call in 0..20 {
        client.describe().await.expect("an answer");
        // Now and then the close comes after the next call began.
        if call % 2 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(fake.connections(), 20);
}

#[tokio::test]
async fn an_answer_nobody_asked_for_is_not_taken_for_the_next() {
    let twice = "HTTP/1.1 204 \r\n\r\nHTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}";
    let fake = first(move || Reply::bytes(twice));
    let client = Client::new(fake.socket());
    client.start().await.expect("its own answer");
    // The connection may be given up before or while it is used; the stray answer is never believed.
    match client.describe().await {
        Ok(info) => assert_eq!(info.id, "fake"),
        Err(error) => assert!(matches!(error, CallError::Connection { .. }), "{error:?}"),
    }
    assert_eq!(
        client.describe().await.expect("all is well again").id,
        "fake"
    );
}

#[tokio::test]
async fn a_slow_answer_runs_into_the_deadline_and_is_never_taken_for_another() {
    let gate = Arc::new(Barrier::new(2));
    let late = Arc::clone(&gate);
    let fake = first(move || Reply::fault("too late").behind(&late));
    let client = Client::new(fake.socket()).with_deadline(Duration::from_millis(60));
    let error = client.flush_metrics().await.unwrap_err();
    assert!(matches!(error, CallError::Deadline { deadline, .. } if deadline.as_millis() == 60));
    gate.wait();
    let client = client.with_deadline(LONG);
    client.describe().await.expect("all is well again");
    assert_eq!(fake.connections(), 2);
}

#[tokio::test]
async fn silence_and_dripping_run_into_the_deadline_too() {
    let replies: [fn() -> Reply; 2] = [Reply::silence, || {
        Reply::bytes("HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{")
    }];
    for reply in replies {
        let fake = first(reply);
        let client = Client::new(fake.socket()).with_deadline(Duration::from_millis(50));
        let error = client.flush_metrics().await.expect_err("no answer");
        assert!(matches!(error, CallError::Deadline { .. }), "{error:?}");
        let client = client.with_deadline(LONG);
        client.describe().await.expect("all is well again");
        assert_eq!(fake.calls(), ["PUT /actions", "GET /"]);
    }
}

#[tokio::test]
async fn snapshots_and_a_start_have_a_deadline_of_their_own() {
    let create = SnapshotCreateParams::full("vmstate", "memory");
    let load = SnapshotLoadParams::new("vmstate", MemoryBackend::file("memory"));

    let fake = FakeFirecracker::start(|_| Reply::no_content().after(Duration::from_millis(150)));
    let client = Client::new(fake.socket()).with_deadline(Duration::from_millis(20));
    client
        .create_snapshot(&create)
        .await
        .expect("as long as it takes");
    client
        .load_snapshot(&load)
        .await
        .expect("as long as it takes");
    client.start().await.expect("as long as it takes");

    let fake = first(Reply::silence);
    let client = Client::new(fake.socket()).with_snapshot_deadline(Duration::from_millis(20));
    let error = client.create_snapshot(&create).await.unwrap_err();
    assert!(matches!(error, CallError::Deadline { .. }), "{error:?}");
    client
        .flush_metrics()
        .await
        .expect("ordinary calls have 10 s");
}

/// Waits until the first request has come.
async fn asked(fake: &FakeFirecracker) {
    while fake.calls().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_dropped_call_takes_its_connection_with_it() {
    let gate = Arc::new(Barrier::new(2));
    let late = Arc::clone(&gate);
    let fake = first(move || Reply::fault("for nobody").behind(&late));
    let client = Client::new(fake.socket());
    tokio::select! {
        biased;
        answer = client.start() => panic!("{answer:?}"),
        () = asked(&fake) => {}
    }
    gate.wait();
    client.describe().await.expect("its own answer");
    assert_eq!(fake.connections(), 2);
}

#[tokio::test]
async fn calls_made_at_once_are_answered_each() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let client = Client::new(fake.socket());
    let (info, version, start, pause) = tokio::join!(
        client.describe(),
        client.version(),
        client.start(),
        client.pause()
    );
    assert_eq!(info.expect("described").id, "fake");
    assert_eq!(version.expect("a version").to_string(), "1.12.1");
    start.expect("started");
    pause.expect("paused");
    assert_eq!(fake.connections(), 1);
}

#[tokio::test]
async fn nobody_at_the_socket_is_told_from_a_refusal() {
    let directory = tempfile::tempdir().expect("a directory");
    let absent = directory.path().join("api.sock");
    let error = Client::new(&absent).start().await.unwrap_err();
    assert!(
        matches!(&error, CallError::Connect { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
    assert!(error.was_not_sent());
}

#[tokio::test]
async fn a_socket_deep_down_is_reached_all_the_same() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let deep = fake.directory().join("d".repeat(100)).join("e".repeat(100));
    std::fs::create_dir_all(&deep).expect("directories");
    let socket = deep.join("api.sock");
    std::fs::rename(fake.socket(), &socket).expect("moved");
    assert!(socket.as_os_str().len() > 200);
    Client::new(&socket).describe().await.expect("an answer");
    // So that the fake finds its own socket when it ends.
    std::fs::rename(&socket, fake.socket()).expect("moved back");
}

#[tokio::test]
async fn what_the_fuzzer_starts_from_is_answers() {
    let seeds = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../fuzz/seeds/api_responses"
    );
    let mut count = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        let path = seed.unwrap().path();
        // The first byte is the fuzzer's own.
        let answer = std::fs::read(&path).unwrap()[1..].to_vec();
        let fake = FakeFirecracker::start(move |_| Reply::bytes(answer.clone()));
        let told = Client::new(fake.socket())
            .raw(Method::GET, "/any", None)
            .await;
        assert!(told.is_ok(), "{path:?}: {told:?}");
        count += 1;
    }
    assert!(count > 0);
}
