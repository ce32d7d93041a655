//! Stories with Linux guests: in the lab, and wherever else KVM runs an unmodified Linux.

mod balloon;
mod console;
mod copies;
mod disks;
mod exec;
mod images;
mod jail;
mod lineage;
mod marks;
mod networks;
mod programs;
mod pty;
mod storm;
mod tree;
mod waking;

use std::process::ExitCode;

use console::Linux;
use rekindle_kit::story::{Story, main as run};

fn main() -> ExitCode {
    let stories = [
        balloon::stories(),
        storm::stories(),
        programs::stories(),
        exec::stories(),
        lineage::stories(),
        disks::stories(),
        tree::stories(),
        images::stories(),
        waking::stories(),
        copies::stories(),
        networks::stories(),
        jail::stories(),
    ];
    run(stories.into_iter().flatten().collect())
}

/// A story with Linux guests in a state directory of its own, which must be left empty.
fn story(name: &'static str, tell: fn(&Linux) -> anyhow::Result<()>) -> Story {
    Story::new(name, move || {
        let linux = Linux::new()?;
        tell(&linux)?;
        linux.rekindle.leaves_nothing()
    })
    .or_else(rekindle_e2e::end_all)
    // QEMU loses a guest now and then, which is silent then (docs/lab.md).
    .again_if_late()
    .within(std::time::Duration::from_secs(600))
}
