//! The client and the process beside a real Firecracker, 1.12 or newer.
//!
//! `REKINDLE_FIRECRACKER` names the program; without it these tests say so and pass. They boot no guest.

mod place;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rekindle_firecracker::model::{
    Balloon, BootSource, Drive, InstanceState, Level, MachineConfiguration,
    MachineConfigurationUpdate, MemoryBackend, MmdsConfig, Pmem, SnapshotLoadParams, Vsock,
};
use rekindle_firecracker::{
    CallError, Client, Exit, Feature, Launch, Method, Process, ReadyError, Ring, Version,
    drain_rest, find_by_id, tail,
};
use serde_json::json;

use place::Place;

const LONG: Duration = Duration::from_secs(20);

/// The program, or the reason to skip.
fn program(test: &str) -> Option<PathBuf> {
    let named = std::env::var_os("REKINDLE_FIRECRACKER").map(PathBuf::from);
    if named.is_none() {
        eprintln!("skipped: {test}: REKINDLE_FIRECRACKER does not name a Firecracker");
    }
    named
}

fn id(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

fn launch(program: &Path, id: &str, directory: &Path) -> Launch {
    std::fs::write(directory.join("log"), "").expect("a log");
    Launch::new(program, id, directory).log("log", Level::Info)
}

async fn started(program: &Path, id: &str, directory: &Path) -> (Process, Client) {
    let process = launch(program, id, directory).spawn().expect("started");
    let client = process.ready(LONG).await.expect("ready");
    (process, client)
}

async fn end(process: &Process) {
    process.kill().expect("killed");
    assert_eq!(process.wait().await.expect("waited"), Exit::Signal(9));
}

#[tokio::test]
async fn it_starts_says_who_it_is_and_takes_its_configuration() {
    let Some(program) = program("it_starts_says_who_it_is_and_takes_its_configuration") else {
        return;
    };
    let place = Place::new();
    let (process, client) = started(&program, "who-1", place.path()).await;
    let info = client.describe().await.expect("described");
    assert_eq!(
        (info.app_name.as_str(), info.id.as_str()),
        ("Firecracker", "who-1")
    );
    assert_eq!(info.state, InstanceState::NotStarted);
    let version = client.version().await.expect("a version");
    assert!(version >= Version::BASELINE, "{version}");

    let machine = MachineConfiguration::new(2, 256).track_dirty_pages(true);
    client
        .put_machine_config(&machine)
        .await
        .expect("configured");
    let update = MachineConfigurationUpdate::default().mem_size_mib(512);
    client
        .patch_machine_config(&update)
        .await
        .expect("configured");
    std::fs::write(place.path().join("disk"), [0; 4096]).expect("a disk");
    client
        .put_drive(&Drive::new("data", "disk").is_read_only(true))
        .await
        .expect("a drive");
    client
        .put_balloon(&Balloon::new(8).deflate_on_oom(true))
        .await
        .expect("a balloon");
    client
        .put_vsock(&Vsock::new(3, "v.sock"))
        .await
        .expect("a vsock");
    let contents = json!({"latest": {"id": 7}});
    client
        .put_mmds(contents.as_object().expect("an object"))
        .await
        .expect("put");
    assert_eq!(
        serde_json::Value::Object(client.mmds().await.expect("read")),
        contents
    );

    let config = client.vm_config().await.expect("a configuration");
    let machine = config.machine_config.expect("a machine");
    assert_eq!((machine.vcpu_count, machine.mem_size_mib), (2, 512));
    assert_eq!(
        (machine.smt, machine.track_dirty_pages),
        (Some(false), Some(true))
    );
    assert_eq!(machine, client.machine_config().await.expect("a machine"));
    assert_eq!(config.drives[0].drive_id, "data");
    assert_eq!(config.drives[0].is_read_only, Some(true));
    assert_eq!(
        config.balloon,
        Some(client.balloon().await.expect("a balloon"))
    );
    assert_eq!(config.vsock.expect("a vsock").guest_cid, 3);
    end(&process).await;
}

#[tokio::test]
async fn a_refused_call_holds_its_fault_message_and_leaves_the_connection_open() {
    let Some(program) =
        program("a_refused_call_holds_its_fault_message_and_leaves_the_connection_open")
    else {
        return;
    };
    let place = Place::new();
    let (process, client) = started(&program, "refused", place.path()).await;

    let error = client
        .put_boot_source(&BootSource::new("no-such-kernel"))
        .await
        .unwrap_err();
    assert_eq!(error.status(), Some(400), "{error:?}");
    assert!(
        error
            .fault_message()
            .expect("a message")
            .contains("No such file"),
        "{error}"
    );
    let error = client
        .put_machine_config(&MachineConfiguration::new(64, 128))
        .await
        .unwrap_err();
    assert_eq!(error.status(), Some(400), "{error:?}");
    let error = client
        .put_mmds_config(&MmdsConfig::new(["absent"]))
        .await
        .unwrap_err();
    assert!(error.fault_message().is_some(), "{error:?}");
    for result in [client.start().await, client.pause().await] {
        assert_eq!(result.unwrap_err().status(), Some(400));
    }
    let version = client.version().await.expect("a version");
    if !version.has(Feature::Pmem) {
        let error = client.put_pmem(&Pmem::new("p0", "disk")).await.unwrap_err();
        assert!(matches!(error, CallError::TooOld { .. }), "{error:?}");
    }
    let raw = client
        .raw(Method::PUT, "/no/such/thing", Some(json!({})))
        .await
        .expect("an answer");
    assert_eq!(raw.status, 400);
    client.describe().await.expect("all is well");
    end(&process).await;
}

#[tokio::test]
async fn a_load_that_fails_ends_firecracker_and_both_are_noticed() {
    let Some(program) = program("a_load_that_fails_ends_firecracker_and_both_are_noticed") else {
        return;
    };
    let place = Place::new();
    let (process, client) = started(&program, "load", place.path()).await;
    let load = SnapshotLoadParams::new("no-vmstate", MemoryBackend::uffd("no.sock"));
    let error = client.load_snapshot(&load).await.unwrap_err();
    assert!(
        error
            .fault_message()
            .expect("a message")
            .contains("No such file"),
        "{error}"
    );
    let exit = tokio::time::timeout(LONG, process.wait())
        .await
        .expect("it ends")
        .expect("waited");
    assert!(!exit.is_success(), "{exit}");
    let error = client.describe().await.unwrap_err();
    assert!(matches!(error, CallError::Connect { .. }), "{error:?}");
}

#[tokio::test]
async fn arguments_it_cannot_use_are_told_by_its_exit() {
    let Some(program) = program("arguments_it_cannot_use_are_told_by_its_exit") else {
        return;
    };
    let place = Place::new();
    let process = launch(&program, "args", place.path())
        .arg("--no-such-flag")
        .spawn()
        .expect("started");
    let error = process.ready(LONG).await.unwrap_err();
    assert!(
        matches!(
            error,
            ReadyError::Died {
                exit: Exit::Code(153)
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn one_that_lost_its_parent_is_found_by_its_id_adopted_and_ended() {
    let Some(program) = program("one_that_lost_its_parent_is_found_by_its_id_adopted_and_ended")
    else {
        return;
    };
    let place = Place::new();
    let name = id("lost");
    let (process, client) = started(&program, &name, place.path()).await;
    client
        .put_machine_config(&MachineConfiguration::new(1, 64))
        .await
        .expect("configured");
    let socket = process.socket().to_owned();
    drop((process, client));

    let found = find_by_id(&name).expect("searched");
    assert_eq!(found.len(), 1, "{found:?}");
    let adopted = Process::adopt(found[0].clone(), &socket).expect("adopted");
    let client = adopted.ready(LONG).await.expect("it still answers");
    assert_eq!(
        client
            .machine_config()
            .await
            .expect("a machine")
            .mem_size_mib,
        64
    );
    adopted.kill().expect("killed");
    adopted.wait().await.expect("waited");
    assert!(find_by_id(&name).expect("searched").is_empty());
}

#[tokio::test]
async fn sigterm_ends_it_at_once() {
    let Some(program) = program("sigterm_ends_it_at_once") else {
        return;
    };
    let place = Place::new();
    let (process, _) = started(&program, "term", place.path()).await;
    process.pidfd().terminate().expect("asked to end");
    let exit = tokio::time::timeout(LONG, process.wait())
        .await
        .expect("it ends")
        .expect("waited");
    assert_eq!(exit, Exit::Signal(15));
}

#[tokio::test]
async fn it_is_ready_ten_times_in_a_row() {
    let Some(program) = program("it_is_ready_ten_times_in_a_row") else {
        return;
    };
    for _ in 0..10 {
        let place = Place::new();
        let (process, client) = started(&program, "ready", place.path()).await;
        client.describe().await.expect("described");
        end(&process).await;
    }
}

#[tokio::test]
async fn its_log_goes_through_a_fifo_to_disk() {
    let Some(program) = program("its_log_goes_through_a_fifo_to_disk") else {
        return;
    };
    let place = Place::new();
    let fifo = rekindle_firecracker::Fifo::open(place.path().join("log.fifo")).expect("made");
    let size = std::num::NonZeroU64::new(1 << 16).expect("not zero");
    let mut ring = Ring::open(place.path().join("log"), size).expect("opened");
    let process = Launch::new(&program, "fifo", place.path())
        .log("log.fifo", Level::Info)
        .stdout(fifo.writer().expect("a writer"))
        .spawn()
        .expect("started");
    process.ready(LONG).await.expect("ready");
    end(&process).await;
    drain_rest(&fifo, &mut ring).expect("moved");
    let log = String::from_utf8(tail(ring.path(), 1 << 16).expect("read")).expect("text");
    assert!(log.contains("Running Firecracker"), "{log:?}");
}
