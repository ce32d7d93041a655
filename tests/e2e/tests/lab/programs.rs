//! A program in a fresh guest, and how it ends.

use anyhow::ensure;
use rekindle_kit::story::Story;

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
    let mut words: Vec<String> = linux.run().split(' ').map(str::to_owned).collect();
    words.extend(["--", "sh", "-c", "echo \"it's\" $((6 * 7)); exit 3"].map(str::to_owned));
    let said = linux
        .rekindle
        .command_of(words.iter().map(String::as_str))
        .output()?;
    let output = String::from_utf8_lossy(&said.stdout).replace('\r', "");
    ensure!(said.status.code() == Some(3), "{said:?}");
    ensure!(output.ends_with("it's 42\n"), "{output:?}");
    ensure!(linux.rekindle.vms()?.is_empty(), "an unnamed VM stayed");
    Ok(())
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
