//! Guests without an agent, and what is no agent: one clear error each.

use anyhow::ensure;
use rekindle_e2e::Rekindle;
use rekindle_kit::story::Story;

use crate::bare::counter;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![story(
        "exec says what a guest lacks to run a program, and run what it needs",
        lacking,
    )]
}

fn lacking(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    rekindle.does(&format!("run {guest} --name plain --detach"))?;
    let said = rekindle.tries("exec plain -- true")?.refused(125)?;
    ensure!(
        said.contains("no vsock device") && said.contains("--kernel"),
        "{said}"
    );

    rekindle.does(&format!("run {guest} --name deaf --vsock 3 --detach"))?;
    let said = rekindle.tries("exec deaf -- true")?.refused(125)?;
    ensure!(said.contains("the guest of deaf has no agent"), "{said}");

    let said = rekindle.tries("exec nobody -- true")?.refused(125)?;
    ensure!(said.contains("no VM is called nobody"), "{said}");
    rekindle.tries("exec deaf")?.refused(2)?;
    rekindle.tries("exec deaf --tty -- true")?.refused(2)?;
    rekindle.tries("exec deaf --env =x -- true")?.refused(2)?;
    let said = rekindle
        .tries(&format!("run {guest} -- true"))?
        .refused(125)?;
    ensure!(said.contains("-- CMD needs the initrd"), "{said}");

    rekindle.does("stop deaf --grace 0")?;
    let said = rekindle.tries("exec deaf -- true")?.refused(125)?;
    ensure!(said.contains("deaf has ended"), "{said}");
    Ok(())
}
