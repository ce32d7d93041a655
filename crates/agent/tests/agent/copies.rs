//! Files and trees in and out, by the agent's own programs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rekindle_agent::{Exec, Exit, Fate, Transfer};
use rekindle_archive::{Owner, pack, unpack};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Agent, Call, until};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn into(path: &Path) -> Transfer {
    Transfer::In {
        path: text(path),
        owner: Owner::Unpacker,
    }
}

fn out_of(path: &Path) -> Transfer {
    Transfer::Out { path: text(path) }
}

/// The program of one direction.
fn exec(transfer: &Transfer) -> Exec {
    Exec {
        argv: transfer.argv(),
        ..Exec::default()
    }
}

fn packed(path: &Path) -> Vec<u8> {
    let mut stream = Vec::new();
    pack(path, &mut stream, &mut |_| ()).unwrap();
    stream
}

/// A file of so many bytes, which are not all the same.
fn file(path: PathBuf, length: usize) -> PathBuf {
    let bytes: Vec<u8> = (0..length)
        .map(|n| (n / 7 % 251).to_le_bytes()[0])
        .collect();
    fs::write(&path, bytes).unwrap();
    path
}

impl Call<'_> {
    /// Gives the program `input`, until it has read all of it but for what is on the way. Its connection breaks after
    /// each `breaks` frames.
    fn feed(&mut self, mut input: &[u8], breaks: usize) {
        for step in 1.. {
            let count = self.caller.room().min(input.len());
            self.caller.write(&input[..count]);
            input = &input[count..];
            if input.is_empty() {
                break;
            }
            if step % breaks == 0 {
                self.breaks();
            }
            self.step().unwrap();
        }
    }

    fn failure(self) -> String {
        let (exit, _, err) = self.finish();
        assert_eq!(exit, Exit::Status(1), "{err}");
        err
    }
}

/// The program that the agent runs.
fn program(agent: &Agent) -> Pid {
    let tasks = format!("/proc/{}/task", agent.child.id());
    let mut found = None;
    until("the agent runs a program", || {
        found = fs::read_dir(&tasks).unwrap().find_map(|task| {
            let children = fs::read_to_string(task.unwrap().path().join("children")).ok()?;
            children
                .split(' ')
                .next()?
                .parse()
                .ok()
                .and_then(Pid::from_raw)
        });
        found.is_some()
    });
    found.unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn directories(agent: &Agent) -> [PathBuf; 3] {
    ["host", "guest", "back"].map(|name| {
        let path = agent.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    })
}

#[test]
fn a_tree_goes_in_and_comes_out_wherever_connections_break() {
    let agent = Agent::start();
    let [host, guest, back] = directories(&agent);
    let tree = host.join("tree");
    fs::create_dir_all(tree.join("empty")).unwrap();
    let big = fs::read(file(tree.join("big"), 3 << 20)).unwrap();
    symlink("../big", tree.join("empty/link")).unwrap();

    let mut call = agent.call("in", exec(&into(&guest)));
    call.feed(&packed(&tree), 7);
    let (exit, out, err) = call.finish();
    assert_eq!((exit, &*out, &*err), (Exit::Status(0), "", ""));
    assert_eq!(fs::read(guest.join("tree/big")).unwrap(), big);

    let mut call = agent.call("out", exec(&out_of(&guest.join("tree"))));
    for step in 1.. {
        if call.caller.outcome().is_some() {
            break;
        }
        if step % 7 == 0 {
            call.breaks();
        }
        call.step().unwrap();
    }
    assert_eq!(call.caller.outcome(), Some(Exit::Status(0)));
    unpack(&call.out[..], &back, Owner::Unpacker, &mut |_| ()).unwrap();
    assert_eq!(fs::read(back.join("tree/big")).unwrap(), big);
    assert_eq!(
        fs::read_link(back.join("tree/empty/link")).unwrap(),
        Path::new("../big")
    );
    assert_eq!(names(&back.join("tree")), ["big", "empty"]);
}

#[test]
fn a_copy_that_cannot_be_says_why() {
    let agent = Agent::start();
    let [host, guest, _] = directories(&agent);
    let stream = packed(&file(host.join("f"), 10));
    let nowhere = guest.join("none/x");
    let mut call = agent.call("a", exec(&into(&nowhere)));
    call.caller.write(&stream);
    let expected = format!(
        "there is no directory {:?} to copy to; make it first\n",
        guest.join("none")
    );
    assert_eq!(call.failure(), expected);
    let call = agent.call("b", exec(&out_of(&nowhere)));
    assert_eq!(call.failure(), format!("there is no {nowhere:?} to copy\n"));
    let mut call = agent.call("c", exec(&into(&guest)));
    call.caller.write(&stream[..stream.len() - 1]);
    assert_eq!(call.failure(), "the copy breaks off\n");
    assert_eq!(names(&guest), [""; 0]);
    if rustix::process::geteuid().is_root() {
        let mut exec = exec(&into(&guest));
        exec.user = Some("65534".into());
        fs::set_permissions(&guest, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut call = agent.call("d", exec);
        call.caller.write(&stream);
        let said = call.failure();
        assert!(
            said.ends_with(": Permission denied (os error 13)\n"),
            "{said}"
        );
    }
}

#[test]
fn a_copy_whose_program_is_killed_leaves_no_half_file_and_the_next_one_removes_what_is_left() {
    let agent = Agent::start();
    let [host, guest, _] = directories(&agent);
    let stream = packed(&file(host.join("f"), 4 << 20));
    let mut call = agent.call("a", exec(&into(&guest)));
    call.feed(&stream[..2 << 20], usize::MAX);
    kill_process(program(&agent), Signal::KILL).unwrap();
    let (exit, _, err) = call.finish();
    assert_eq!((exit, &*err), (Exit::Signal(9), ""));
    assert_eq!(names(&guest), [".rekindle-copy-0"]);

    let mut call = agent.call("b", exec(&into(&guest)));
    call.feed(&stream, usize::MAX);
    assert_eq!(call.finish().0, Exit::Status(0));
    assert_eq!(names(&guest), ["f"]);
}

#[test]
fn a_copy_whose_caller_is_gone_ends_and_leaves_no_half_file() {
    let agent = Agent::start();
    let [host, guest, _] = directories(&agent);
    let stream = packed(&file(host.join("f"), 4 << 20));
    for (name, transfer) in [("in", into(&guest)), ("out", out_of(&host.join("f")))] {
        let mut exec = exec(&transfer);
        exec.fate = Fate::EndsAfterMs(0);
        let mut call = agent.call(name, exec);
        match transfer {
            Transfer::In { .. } => call.feed(&stream[..2 << 20], usize::MAX),
            Transfer::Out { .. } => (0..20).for_each(|_| call.step().unwrap()),
        }
        let proc = PathBuf::from(format!("/proc/{}", program(&agent).as_raw_nonzero()));
        drop(call);
        until("the program is gone", || !proc.exists());
        assert!(!guest.join("f").exists());
    }
}

#[test]
fn a_copy_takes_little_memory_however_long_it_is() {
    let agent = Agent::start();
    let [host, guest, _] = directories(&agent);
    let stream = packed(&file(host.join("f"), 32 << 20));
    let mut call = agent.call("in", exec(&into(&guest)));
    call.feed(&stream[..31 << 20], usize::MAX);
    let into_guest = peak(program(&agent));
    call.feed(&stream[31 << 20..], usize::MAX);
    assert_eq!(call.finish().0, Exit::Status(0));
    let mut call = agent.call("out", exec(&out_of(&guest.join("f"))));
    while call.out.len() < 31 << 20 {
        call.step().unwrap();
    }
    let out_of_guest = peak(program(&agent));
    while call.caller.outcome().is_none() {
        call.step().unwrap();
    }
    for kib in [into_guest, out_of_guest] {
        assert!(kib < 8 << 10, "{into_guest} KiB in, {out_of_guest} KiB out");
    }
}

/// The most memory that a process has had, in KiB.
fn peak(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap()
        .trim()
        .strip_suffix(" kB")
        .unwrap()
        .parse()
        .unwrap()
}
