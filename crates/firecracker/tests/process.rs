//! Processes: started, watched, found, adopted, ended. With programs that are not Firecracker.

mod place;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use rekindle_firecracker::model::Level;
use rekindle_firecracker::{
    Exit, IdentifyError, Launch, Process, ProcessId, ReadyError, SpawnError, find_by_id,
};
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, FileType, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use place::Place;

const LONG: Duration = Duration::from_secs(20);

/// A program of a few lines, which does not run yet.
fn script(directory: &Path, lines: &str) -> PathBuf {
    let path = directory.join("program");
    fs::write(&path, format!("#!/bin/sh\n{lines}\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("executable");
    path
}

/// Starts a program of a few lines, as `how` says.
fn start(
    directory: &Path,
    id: &str,
    lines: &str,
    how: impl FnOnce(Launch) -> Launch,
) -> Result<Process, SpawnError> {
    // A program that anybody holds open for writing cannot be started, and a child that another test forks
    // in the meantime would hold it open for a moment.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().expect("no panic");
    how(Launch::new(script(directory, lines), id, directory)).spawn()
}

/// A process that runs these lines.
fn runs(directory: &Path, lines: &str) -> Process {
    start(directory, "a", lines, |launch| launch).expect("started")
}

/// A process that does nothing for a long time.
fn idle(directory: &Path) -> Process {
    runs(directory, "exec sleep 600")
}

/// Kills it, and waits.
async fn end(process: &Process) -> Exit {
    process.kill().expect("killed");
    process.wait().await.expect("waited")
}

#[tokio::test]
async fn a_process_that_dies_at_once_is_noticed_and_says_why() {
    let place = Place::new();
    let process = runs(place.path(), "exit 153");
    let error = process.ready(LONG).await.expect_err("it died");
    assert!(
        matches!(
            error,
            ReadyError::Died {
                exit: Exit::Code(153)
            }
        ),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        "firecracker died before its API answered: exit status 153: arguments it cannot use"
    );
    assert_eq!(process.wait().await.expect("waited"), Exit::Code(153));
    assert_eq!(process.try_wait().expect("known"), Some(Exit::Code(153)));
    process
        .kill()
        .expect("the dead cannot be killed, and that is no error");
}

#[tokio::test]
async fn arguments_and_working_directory_are_as_asked() {
    let place = Place::new();
    let output = place.path().join("output");
    let file = fs::File::create(&output).expect("a file");
    let lines = "pwd; printf '<%s>' \"$@\"";
    let process = start(place.path(), "vm-1", lines, |launch| {
        launch
            .log("log", Level::Debug)
            .metrics("metrics")
            .arg("--enable-pci")
            .stdout(file)
    })
    .expect("started");
    assert_eq!(process.wait().await.expect("waited"), Exit::Code(0));
    assert_eq!(process.socket(), place.path().join("api.sock"));
    let directory = place.path().canonicalize().expect("a directory");
    assert_eq!(
        fs::read_to_string(output).expect("output"),
        format!(
            "{}\n<--id><vm-1><--api-sock><api.sock><--log-path><log><--level><Debug>\
             <--metrics-path><metrics><--enable-pci>",
            directory.display()
        )
    );
}

#[tokio::test]
async fn a_program_that_is_not_there_and_a_socket_that_is_are_refused() {
    let place = Place::new();
    let error = Launch::new(place.path().join("nothing"), "a", place.path())
        .spawn()
        .unwrap_err();
    assert!(matches!(error, SpawnError::Start { .. }), "{error:?}");

    fs::write(place.path().join("api.sock"), "").expect("written");
    let error = start(place.path(), "a", "touch started", |launch| launch).unwrap_err();
    assert!(matches!(error, SpawnError::SocketTaken { .. }), "{error:?}");
    assert!(!place.path().join("started").exists());
}

#[tokio::test]
async fn waiting_can_be_given_up_and_taken_up_by_several() {
    let place = Place::new();
    let process = idle(place.path());
    for _ in 0..3 {
        let gave_up = tokio::time::timeout(Duration::from_millis(5), process.wait()).await;
        assert!(gave_up.is_err());
    }
    assert_eq!(process.try_wait().expect("alive"), None);
    assert!(process.id().is_alive());
    let watcher = process.pidfd().try_clone().expect("a second hold");
    let (one, two, three, _) =
        tokio::join!(process.wait(), process.wait(), watcher.exited(), async {
            process.kill().expect("killed")
        });
    assert_eq!(one.expect("waited"), Exit::Signal(9));
    assert_eq!(two.expect("waited"), Exit::Signal(9));
    three.expect("watched");
    assert!(!process.id().is_alive());
}

#[tokio::test]
async fn a_dead_process_is_gone_for_good() {
    let place = Place::new();
    let process = idle(place.path());
    let id = process.id().clone();
    assert_eq!(end(&process).await, Exit::Signal(9));
    assert!(!id.is_alive());
    assert!(matches!(id.open_pidfd(), Err(IdentifyError::Gone { .. })));
    assert!(matches!(
        ProcessId::of(id.pid),
        Err(IdentifyError::Gone { .. })
    ));
    assert!(Process::adopt(id, place.path().join("api.sock")).is_err());
}

#[tokio::test]
async fn a_zombie_is_dead_and_still_tells_its_parent_why() {
    let place = Place::new();
    let process = runs(place.path(), "exit 7");
    process.pidfd().exited().await.expect("dead");
    let id = process.id().clone();
    assert!(!id.is_alive());
    let adopted = Process::adopt(id, process.socket()).expect("a zombie can be taken on");
    assert_eq!(adopted.wait().await.expect("waited"), Exit::Code(7));
    // It was reaped once; whoever comes second cannot know.
    assert_eq!(process.wait().await.expect("waited"), Exit::Unknown);
}

#[tokio::test]
async fn dropping_kills_nobody_and_reaps_the_dead() {
    let place = Place::new();
    let process = idle(place.path());
    let id = process.id().clone();
    let pidfd = process.pidfd().try_clone().expect("a second hold");
    drop(process);
    assert!(id.is_alive());

    let again = Process::adopt(id.clone(), place.path().join("api.sock")).expect("adopted");
    pidfd.terminate().expect("asked to end");
    pidfd.exited().await.expect("dead");
    drop(again);
    assert!(
        matches!(ProcessId::of(id.pid), Err(IdentifyError::Gone { .. })),
        "no zombie is left"
    );
}

#[tokio::test]
async fn somebody_elses_child_is_watched_though_its_exit_is_unknown() {
    let place = Place::new();
    // The shell ends at once; its child, which holds the pid file, is nobody's here.
    let parent = runs(
        place.path(),
        "sleep 600 > /dev/null 2>&1 &\necho $! > pid.new; mv pid.new pid",
    );
    parent.wait().await.expect("waited");
    let pid = fs::read_to_string(place.path().join("pid")).expect("a pid");
    let id = ProcessId::of(pid.trim().parse().expect("a number")).expect("it runs");
    let adopted = Process::adopt(id, place.path().join("api.sock")).expect("adopted");
    assert_eq!(adopted.try_wait().expect("alive"), None);
    assert_eq!(end(&adopted).await, Exit::Unknown);
}

#[tokio::test]
async fn a_process_is_found_by_its_id_and_by_no_other() {
    let place = Place::new();
    let name = format!("find-{}", std::process::id());
    // It waits at a gate that nobody opens, and starts no child, which would have its arguments for a moment.
    rustix::fs::mknodat(
        CWD,
        place.path().join("gate"),
        FileType::Fifo,
        Mode::RUSR,
        0,
    )
    .expect("a gate");
    let lines = "read line < gate";
    let process = start(place.path(), &name, lines, |launch| launch).expect("started");
    // It has its arguments a moment after it was started.
    let found = loop {
        let found = find_by_id(&name).expect("searched");
        if !found.is_empty() {
            break found;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    assert_eq!(found, [process.id().clone()]);
    assert_eq!(find_by_id(&name[1..]).expect("searched"), []);
    assert_eq!(find_by_id(&format!("{name}0")).expect("searched"), []);
    process.pidfd().terminate().expect("asked to end");
    process.wait().await.expect("waited");
    assert_eq!(find_by_id(&name).expect("searched"), []);
}

/// Binds a socket that nobody listens on yet.
fn bind(path: &Path) -> OwnedFd {
    let address = SocketAddrUnix::new(path).expect("an address");
    let socket =
        rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&socket, &address).expect("bound");
    socket
}

#[tokio::test]
async fn a_socket_that_is_bound_but_not_listened_on_is_waited_for() {
    let place = Place::new();
    let process = idle(place.path());
    let socket = process.socket().to_owned();
    let late = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        // Something else in the directory is no socket, and no reason to stop.
        fs::write(place.path().join("other"), "").expect("written");
        tokio::time::sleep(Duration::from_millis(10)).await;
        let socket = bind(&socket);
        tokio::time::sleep(Duration::from_millis(40)).await;
        rustix::net::listen(&socket, 1).expect("listening");
        socket
    };
    let (ready, _listener) = tokio::join!(process.ready(LONG), late);
    ready.expect("ready");
    end(&process).await;
}

#[tokio::test]
async fn what_never_listens_runs_into_the_deadline() {
    let place = Place::new();
    let process = idle(place.path());
    let error = process.ready(Duration::from_millis(30)).await.unwrap_err();
    assert!(matches!(error, ReadyError::Deadline { .. }), "{error:?}");
    let _mute = bind(process.socket());
    let error = process.ready(Duration::from_millis(30)).await.unwrap_err();
    assert!(matches!(error, ReadyError::Deadline { .. }), "{error:?}");
    end(&process).await;
}

#[tokio::test]
async fn death_while_nobody_listens_yet_is_noticed() {
    let place = Place::new();
    let process = runs(place.path(), "sleep 0.05; kill -9 $$");
    let _mute = bind(process.socket());
    let error = process.ready(LONG).await.unwrap_err();
    assert!(
        matches!(
            error,
            ReadyError::Died {
                exit: Exit::Signal(9)
            }
        ),
        "{error:?}"
    );
}
