//! Programs in a guest through its agent: streams, terminals, ends; across snapshots and the deaths of who watches.

use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_e2e::{Role, SOON, until, wait_for};
use rekindle_kit::dice::{Dice, setting};
use rekindle_kit::story::Story;
use rustix::process::{Pid, Signal, kill_process};

use crate::console::Linux;
use crate::pty::Pty;
use crate::story;

/// How many MiB go through a guest's `cat`; the soak's are 100.
fn stream_mib() -> u64 {
    setting("REKINDLE_STREAM_MIB", 3)
}

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "exec passes streams, ends and errors of a program, also of twenty at once",
            ends,
        ),
        story("exec gives a program the terminal that it has", terminal),
        story(
            "a stream through a guest survives a snapshot and the monitor's death, byte for byte",
            stream,
        )
        .within(Duration::from_secs(600 + 10 * stream_mib())),
        story(
            "a program is killed after its exec is, unless it was left to itself",
            fate,
        ),
    ]
}

/// `exec VM`, with options and a program.
fn exec(linux: &Linux, options: &[&str], program: &[&str]) -> Command {
    let words = ["exec"].into_iter().chain(options.iter().copied());
    let words = words.chain(["--"]).chain(program.iter().copied());
    linux.rekindle.command_of(words)
}

fn sh(linux: &Linux, vm: &str, script: &str) -> anyhow::Result<Output> {
    Ok(exec(linux, &[vm], &["sh", "-c", script]).output()?)
}

fn ends(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("web", "")?;
    let said = sh(linux, "web", "echo out; echo err >&2; exit 3")?;
    ensure!(
        said.stdout == b"out\n" && said.stderr == b"err\n",
        "{said:?}"
    );
    ensure!(said.status.code() == Some(3), "{said:?}");
    let killed = sh(linux, "web", "kill -9 $$")?;
    ensure!(killed.status.code() == Some(128 + 9), "{killed:?}");
    let asked = ["--env", "A=b c", "--dir", "/tmp", "--user", "5:6", "web"];
    let said = exec(
        linux,
        &asked,
        &["sh", "-c", "echo $A; pwd; id -u; id -g; echo $HOME"],
    )
    .output()?;
    ensure!(said.stdout == b"b c\n/tmp\n5\n6\n/\n", "{said:?}");

    let missing = exec(linux, &["web"], &["no-such-program"]).output()?;
    let words = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(missing.status.code() == Some(125), "{missing:?}");
    ensure!(
        words == "rekindle: the guest has no program \"no-such-program\"\n",
        "{words:?}"
    );

    let many: Vec<Child> = (0..20)
        .map(|n| {
            let mut one = exec(
                linux,
                &["web"],
                &["sh", "-c", &format!("echo {n}; exit {n}")],
            );
            one.stdout(Stdio::piped()).spawn()
        })
        .collect::<Result<_, _>>()?;
    for (n, one) in (0..).zip(many) {
        let said = one.wait_with_output()?;
        ensure!(said.status.code() == Some(n), "{n}: {said:?}");
        ensure!(
            said.stdout == format!("{n}\n").into_bytes(),
            "{n}: {said:?}"
        );
    }

    linux.rekindle.does("pause web")?;
    let paused = linux.rekindle.tries("exec web -- true")?.refused(125)?;
    ensure!(paused.contains("rekindle resume web"), "{paused}");
    Ok(())
}

fn terminal(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("web", "")?;
    let mut pty = Pty::open(30, 100)?;
    let mut command = exec(linux, &["-it", "web"], &["sh"]);
    let mut child = pty.spawn(&mut command)?;
    pty.types("stty size; tty\n")?;
    pty.hears("30 100")?;
    pty.hears("/dev/pts/")?;
    pty.resizes(40, 120)?;
    // The kernel tells those whose controlling terminal it is.
    kill_process(Pid::from_child(&child), Signal::WINCH)?;
    // The program is told by a signal, which its shell does not wait for.
    pty.types("until stty size | grep '40 120'; do usleep 10000; done; echo re''sized\n")?;
    pty.hears("resized")?;
    // Ctrl-C ends what the shell runs, and not the shell.
    pty.types("sleep 1000\n")?;
    pty.hears("sleep 1000")?;
    until("the program runs", || {
        Ok(!sh(linux, "web", "pidof sleep")?.stdout.is_empty())
    })?;
    pty.types("\x03")?;
    // What is typed before the prompt is there again goes with Ctrl-C.
    pty.hears("# ")?;
    pty.types("exit 4\n")?;
    ensure!(wait_for(&mut child, SOON)?.code() == Some(4));
    Ok(())
}

/// Bytes that are never twice the same.
fn random(bytes: usize) -> Vec<u8> {
    let mut dice = Dice::of(6);
    let mut all = vec![0; bytes];
    for chunk in all.chunks_mut(8) {
        let word = dice.number().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    all
}

fn stream(linux: &Linux) -> anyhow::Result<()> {
    let sent = random(usize::try_from(stream_mib())? << 20);
    linux.boots("web", "")?;
    let mut cat = exec(linux, &["-i", "web"], &["cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (mut to, mut from) = (
        cat.stdin.take().context("an input")?,
        cat.stdout.take().context("an output")?,
    );
    let (third, bytes) = (sent.len() / 3, sent.clone());
    let (halt, halted) = std::sync::mpsc::channel();
    let (go, goes) = std::sync::mpsc::channel::<()>();
    let writer = thread::spawn(move || -> anyhow::Result<()> {
        for (n, part) in bytes.chunks(third).enumerate() {
            let (first, rest) = part.split_at(part.len() / 2);
            to.write_all(first)?;
            halt.send(n)?;
            // The other half goes while whatever happens happens.
            to.write_all(rest)?;
            goes.recv()?;
        }
        Ok(())
    });
    let reader = thread::spawn(move || -> anyhow::Result<Vec<u8>> {
        let mut all = Vec::new();
        from.read_to_end(&mut all)?;
        Ok(all)
    });
    for n in halted {
        match n {
            0 => drop(linux.rekindle.does("snapshot create web --name warm")?),
            1 => linux.rekindle.one(Role::Monitor)?.kill(SOON)?,
            _ => {}
        }
        go.send(())?;
    }
    writer.join().expect("it writes")?;
    let came = reader.join().expect("it reads")?;
    ensure!(wait_for(&mut cat, SOON)?.success());
    ensure!(came.len() == sent.len(), "{} of {}", came.len(), sent.len());
    ensure!(came == sent, "other bytes came out than went in");

    // The `cat` that was running at the snapshot has lost its caller; copies run others at once.
    linux.rekindle.does("restore warm --count 2 --name copy")?;
    for copy in ["copy-1", "copy-2"] {
        let said = sh(linux, copy, &format!("echo {copy} > /who; cat /who"))?;
        ensure!(said.stdout == format!("{copy}\n").into_bytes(), "{said:?}");
    }
    let agent = linux.rekindle.tells("inspect copy-1")?["agent"]["is"].clone();
    ensure!(agent == "ready", "{agent}");
    Ok(())
}

fn fate(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("web", "")?;
    let runs = |name: &str| -> anyhow::Result<bool> {
        let said = sh(linux, "web", &format!("pidof {name}"))?;
        Ok(!said.stdout.is_empty())
    };
    let mut killed = exec(linux, &["web"], &["sleep", "5000"]).spawn()?;
    until("it runs", || runs("sleep"))?;
    killed.kill()?;
    killed.wait()?;
    let stays = "echo from the depths; tail -f /dev/null";
    let left = exec(linux, &["-d", "web"], &["sh", "-c", stays]).status()?;
    ensure!(left.success());
    until("it is killed", || {
        thread::sleep(Duration::from_millis(200));
        Ok(!runs("sleep")?)
    })?;
    ensure!(runs("tail")?, "what was left to itself was killed");
    linux.rekindle.follows("web")?.hears("from the depths")?;
    Ok(())
}
