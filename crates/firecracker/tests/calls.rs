//! What the client sends, to the byte, and what it refuses to send.

use rekindle_firecracker::model::{
    Balloon, BootSource, Drive, HugePages, MachineConfiguration, MemoryBackend, NetworkInterface,
    NetworkOverride, Pmem, SnapshotCreateParams, SnapshotLoadParams, VsockOverride,
};
use rekindle_firecracker::{CallError, Client, Feature, Method, Version};
use rekindle_kit::fake::{FakeFirecracker, Reply};
use serde_json::json;

/// The one request that the fake got, as method, path and body.
fn only_request(fake: &FakeFirecracker) -> (String, String) {
    let requests = fake.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    (requests[0].call(), requests[0].body.clone())
}

/// Makes one call against a fake and checks what came over the socket.
macro_rules! sends {
    ($client:ident => $call:expr, $line:expr, $body:expr) => {{
        let fake = FakeFirecracker::obliging("1.12.1");
        let $client = Client::new(fake.socket());
        $call.await.expect("the fake agrees");
        assert_eq!(only_request(&fake), ($line.to_owned(), $body.to_owned()));
    }};
}

#[tokio::test]
async fn the_nine_calls_are_sent_to_the_byte() {
    let boot = BootSource::new("vmlinux").boot_args("console=ttyS0 reboot=k");
    sends!(client => client.put_boot_source(&boot), "PUT /boot-source",
        r#"{"kernel_image_path":"vmlinux","boot_args":"console=ttyS0 reboot=k"}"#);
    sends!(client => client.put_boot_source(&boot.clone().initrd_path("initrd")), "PUT /boot-source",
        r#"{"kernel_image_path":"vmlinux","boot_args":"console=ttyS0 reboot=k","initrd_path":"initrd"}"#);
    sends!(client => client.put_drive(&Drive::root("rootfs", "disk").is_read_only(true)), "PUT /drives/rootfs",
        r#"{"drive_id":"rootfs","path_on_host":"disk","is_root_device":true,"is_read_only":true}"#);
    sends!(client => client.put_drive(&Drive::root("rootfs", "disk")), "PUT /drives/rootfs",
        r#"{"drive_id":"rootfs","path_on_host":"disk","is_root_device":true,"is_read_only":false}"#);
    let interface = NetworkInterface::new("eth0", "tap0").guest_mac("06:00:ac:10:00:02");
    sends!(client => client.put_network_interface(&interface), "PUT /network-interfaces/eth0",
        r#"{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"06:00:ac:10:00:02"}"#);
    sends!(client => client.put_machine_config(&MachineConfiguration::new(2, 256)), "PUT /machine-config",
        r#"{"vcpu_count":2,"mem_size_mib":256,"smt":false}"#);
    sends!(client => client.start(), "PUT /actions", r#"{"action_type":"InstanceStart"}"#);
    sends!(client => client.pause(), "PATCH /vm", r#"{"state":"Paused"}"#);
    sends!(client => client.resume(), "PATCH /vm", r#"{"state":"Resumed"}"#);
    sends!(client => client.create_snapshot(&SnapshotCreateParams::full("vmstate", "memory")), "PUT /snapshot/create",
        r#"{"snapshot_type":"Full","snapshot_path":"vmstate","mem_file_path":"memory"}"#);
    let load = SnapshotLoadParams::new("vmstate", MemoryBackend::uffd("uffd.sock"));
    sends!(client => client.load_snapshot(&load), "PUT /snapshot/load",
        r#"{"snapshot_path":"vmstate","resume_vm":false,"mem_backend":{"backend_type":"Uffd","backend_path":"uffd.sock"}}"#);
}

#[tokio::test]
async fn a_body_is_sent_as_json_and_a_call_without_one_sends_none() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let client = Client::new(fake.socket());
    client.start().await.expect("started");
    client.describe().await.expect("described");
    let requests = fake.requests();
    assert_eq!(requests[0].header("content-type"), Some("application/json"));
    assert_eq!(requests[0].header("accept"), Some("application/json"));
    assert_eq!(requests[1].header("content-type"), None);
    assert_eq!(requests[1].body, "");
}

#[tokio::test]
async fn all_calls_share_one_connection() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let client = Client::new(fake.socket());
    let info = client.describe().await.expect("described");
    assert_eq!(
        (info.app_name.as_str(), info.vmm_version.as_str()),
        ("Firecracker", "1.12.1")
    );
    client.start().await.expect("started");
    client.pause().await.expect("paused");
    assert_eq!(
        client.version().await.expect("a version"),
        Version::new(1, 12, 1)
    );
    assert_eq!(fake.connections(), 1);
}

#[tokio::test]
async fn calls_that_need_nothing_new_never_ask_for_the_version() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let client = Client::new(fake.socket());
    let load = SnapshotLoadParams::new("vmstate", MemoryBackend::file("memory"))
        .network_overrides(vec![NetworkOverride::new("eth0", "tap7")]);
    client.load_snapshot(&load).await.expect("loaded");
    assert_eq!(fake.calls(), ["PUT /snapshot/load"]);
}

#[tokio::test]
async fn what_firecracker_is_too_old_for_is_not_sent() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let client = Client::new(fake.socket());
    let load = || SnapshotLoadParams::new("vmstate", MemoryBackend::file("memory"));
    let too_old = |result: Result<(), CallError>| match result {
        Err(CallError::TooOld { feature, found, .. }) => {
            assert_eq!(found, Version::new(1, 12, 1));
            feature
        }
        other => panic!("{other:?}"),
    };

    let moved = load().vsock_override(VsockOverride::new("v.sock"));
    assert_eq!(
        too_old(client.load_snapshot(&moved).await),
        Feature::VsockOverride
    );
    let clock = load().clock_realtime(true);
    assert_eq!(
        too_old(client.load_snapshot(&clock).await),
        Feature::ClockRealtime
    );
    let balloon = Balloon::new(16).free_page_reporting(true);
    assert_eq!(
        too_old(client.put_balloon(&balloon).await),
        Feature::FreePageReporting
    );
    let pages = MachineConfiguration::new(1, 128).huge_pages(HugePages::Transparent);
    assert_eq!(
        too_old(client.put_machine_config(&pages).await),
        Feature::TransparentHugePages
    );
    assert_eq!(
        too_old(client.put_pmem(&Pmem::new("p0", "file")).await),
        Feature::Pmem
    );
    assert_eq!(too_old(client.delete_drive("data").await), Feature::Unplug);
    assert_eq!(
        too_old(client.stop_balloon_hinting().await),
        Feature::BalloonHinting
    );

    // Asked for its version once, and for nothing else.
    assert_eq!(fake.calls(), ["GET /version"]);
    let error = client.put_pmem(&Pmem::new("p0", "file")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "PUT /pmem/p0: PUT /pmem needs Firecracker 1.14.0, this is 1.12.1"
    );
    assert!(error.was_not_sent());
}

#[tokio::test]
async fn a_new_firecracker_is_sent_what_an_old_one_is_not() {
    let fake = FakeFirecracker::obliging("1.17.0-dev");
    let client = Client::new(fake.socket());
    let load = SnapshotLoadParams::new("vmstate", MemoryBackend::uffd("uffd.sock"))
        .vsock_override(VsockOverride::new("v.sock"))
        .clock_realtime(true)
        .track_dirty_pages(true);
    client.load_snapshot(&load).await.expect("loaded");
    client.delete_drive("data").await.expect("deleted");
    assert_eq!(
        fake.calls(),
        ["GET /version", "PUT /snapshot/load", "DELETE /drives/data"]
    );
    let body: serde_json::Value = serde_json::from_str(&fake.requests()[1].body).expect("json");
    assert_eq!(body["vsock_override"], json!({"uds_path": "v.sock"}));
    assert_eq!(body["clock_realtime"], true);
    assert_eq!(body["track_dirty_pages"], true);
    assert_eq!(body.get("enable_diff_snapshots"), None);
}

#[tokio::test]
async fn dirty_tracking_on_load_goes_by_its_older_name_where_that_is_the_only_one() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let client = Client::new(fake.socket()).with_version(Version::new(1, 12, 1));
    let load =
        SnapshotLoadParams::new("vmstate", MemoryBackend::file("memory")).track_dirty_pages(true);
    client.load_snapshot(&load).await.expect("loaded");
    let (line, body) = only_request(&fake);
    assert_eq!(line, "PUT /snapshot/load");
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&body).expect("json"),
        json!({
            "snapshot_path": "vmstate",
            "resume_vm": false,
            "mem_backend": {"backend_type": "File", "backend_path": "memory"},
            "enable_diff_snapshots": true,
        })
    );
}

#[tokio::test]
async fn below_the_baseline_a_known_version_still_counts() {
    let fake = FakeFirecracker::obliging("1.11.0");
    let client = Client::new(fake.socket()).with_version(Version::new(1, 11, 0));
    let load = SnapshotLoadParams::new("vmstate", MemoryBackend::file("memory"))
        .network_overrides(vec![NetworkOverride::new("eth0", "tap7")]);
    let error = client.load_snapshot(&load).await.unwrap_err();
    assert!(matches!(
        error,
        CallError::TooOld {
            feature: Feature::NetworkOverrides,
            ..
        }
    ));
    assert!(fake.calls().is_empty());
}

#[tokio::test]
async fn an_id_stays_in_its_place() {
    let fake = FakeFirecracker::obliging("1.16.1");
    let client = Client::new(fake.socket());
    for id in [
        "",
        "..",
        "a/b",
        "a?b",
        "a#b",
        "a%2fb",
        "a b",
        "ü",
        "a\r\nX: y",
    ] {
        let error = client.put_drive(&Drive::new(id, "disk")).await.unwrap_err();
        assert!(
            matches!(error, CallError::BadId { .. }),
            "{id:?}: {error:?}"
        );
        assert!(error.was_not_sent());
    }
    for path in ["no-slash at all", "/a b", ""] {
        let error = client.raw(Method::GET, path, None).await.unwrap_err();
        assert!(
            matches!(error, CallError::BadPath { .. }),
            "{path:?}: {error:?}"
        );
    }
    assert!(fake.calls().is_empty(), "{:?}", fake.calls());
}

#[tokio::test]
async fn a_path_that_is_not_utf_8_is_refused_before_it_is_sent() {
    use std::os::unix::ffi::OsStrExt;
    let fake = FakeFirecracker::obliging("1.12.1");
    let client = Client::new(fake.socket());
    let odd = std::ffi::OsStr::from_bytes(b"/k\xff");
    let error = client
        .put_boot_source(&BootSource::new(odd))
        .await
        .unwrap_err();
    assert!(matches!(error, CallError::Unsendable { .. }), "{error:?}");
    assert!(fake.calls().is_empty());
}

#[tokio::test]
async fn raw_calls_return_refusals_as_they_are() {
    let fake = FakeFirecracker::start(|request| match request.method.as_str() {
        "GET" => Reply::json(200, &json!({"a": 1})),
        _ => Reply::fault("no such thing"),
    });
    let client = Client::new(fake.socket());
    let yes = client
        .raw(Method::GET, "/anything", None)
        .await
        .expect("an answer");
    assert_eq!(
        (yes.status, yes.body.as_slice()),
        (200, br#"{"a":1}"#.as_slice())
    );
    let no = client
        .raw(Method::PUT, "/anything", Some(json!({"b": [1, 2]})))
        .await
        .expect("an answer");
    assert_eq!(no.status, 400);
    assert_eq!(fake.requests()[1].body, r#"{"b":[1,2]}"#);
}

#[tokio::test]
async fn a_client_is_shared_between_tasks() {
    let fake = FakeFirecracker::obliging("1.12.1");
    let client = std::sync::Arc::new(Client::new(fake.socket()));
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let client = std::sync::Arc::clone(&client);
            tokio::spawn(async move { client.describe().await.map(|info| info.id) })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.expect("no panic").expect("described"), "fake");
    }
    assert_eq!(fake.connections(), 1);
}
