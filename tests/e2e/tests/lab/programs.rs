//! A program in a fresh guest, and how it ends.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, ensure};
use rekindle_e2e::Listener;
use rekindle_kit::story::Story;
use rustix::process::{Pid, Signal, kill_process};

use crate::console::Linux;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "run returns what the guest's program printed, and its status",
            status,
        ),
        story("a guest that is asked to stop shuts itself down", shutdown),
    ]
}

fn status(linux: &Linux) -> anyhow::Result<()> {
    let script = "echo \"it's\" $((6 * 7)); cat; echo err >&2; exit 3";
    let said = said(run(linux, &["-i"], script), b"a\0b\r\n")?;
    ensure!(said.status.code() == Some(3), "{said:?}");
    ensure!(said.stdout == b"it's 42\na\0b\r\n", "{said:?}");
    ensure!(said.stderr == b"err\n", "{said:?}");
    ensure!(linux.rekindle.vms()?.is_empty(), "an unnamed VM stayed");

    let mut interrupted = run(linux, &[], "echo begun; sleep 5000");
    let mut listener = Listener::new(interrupted.stdout(Stdio::piped()).spawn()?)?;
    listener.hears("begun")?;
    kill_process(Pid::from_child(listener.child()), Signal::INT)?;
    ensure!(listener.ends()?.0 == Some(130));
    ensure!(linux.rekindle.vms()?.is_empty(), "an interrupted VM stayed");

    let words = ["-d", "--name", "job"];
    ensure!(run(linux, &words, "echo worked").status()?.success());
    linux.rekindle.follows("job")?.hears("worked")?;
    linux.rekindle.does("wait job")?;
    ensure!(linux.rekindle.state_of("job")? == "stopped");
    Ok(())
}

/// `run`, with options, of a shell's script.
fn run(linux: &Linux, options: &[&str], script: &str) -> Command {
    let run = linux.run();
    let words = run.split(' ').chain(options.iter().copied());
    let words = words.chain(["--", "sh", "-c", script]);
    linux.rekindle.command_of(words)
}

/// What came of a command that was given this to read.
fn said(mut command: Command, input: &[u8]) -> anyhow::Result<Output> {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("an input")?;
    stdin.write_all(input)?;
    drop(stdin);
    Ok(child.wait_with_output()?)
}

fn shutdown(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("polite", "")?;
    linux.rekindle.does("stop polite --grace 50")?;
    ensure!(linux.rekindle.state_of("polite")? == "stopped");
    let output = linux.rekindle.output("polite")?;
    ensure!(
        output.contains("Restarting system"),
        "it was killed, not asked: {output}"
    );
    Ok(())
}
