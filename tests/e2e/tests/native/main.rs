//! Stories with bare-metal guests, at full speed on any KVM.

mod adopt;
mod agent;
mod bare;
mod buckets;
mod damage;
mod disks;
mod ends;
mod foreign;
mod full;
mod host;
mod huge;
mod images;
mod input;
mod jail;
mod kills;
mod library;
mod life;
mod memory;
mod networks;
mod rehearse;
mod remote;
mod replay;
mod steps;
mod takeover;
mod trace;
mod travel;

use std::process::ExitCode;

use rekindle_e2e::Rekindle;
use rekindle_kit::story::{Story, main as run};

fn main() -> ExitCode {
    let stories = [
        memory::stories(),
        replay::stories(),
        rehearse::stories(),
        trace::stories(),
        travel::stories(),
        buckets::stories(),
        remote::stories(),
        life::stories(),
        ends::stories(),
        kills::stories(),
        steps::stories(),
        full::stories(),
        takeover::stories(),
        input::stories(),
        damage::stories(),
        disks::stories(),
        host::stories(),
        huge::stories(),
        images::stories(),
        foreign::stories(),
        adopt::stories(),
        agent::stories(),
        library::stories(),
        networks::stories(),
        jail::stories(),
    ];
    run(stories.into_iter().flatten().collect())
}

/// A story in a state directory of its own, which must be left empty.
fn story(name: &'static str, tell: fn(&Rekindle) -> anyhow::Result<()>) -> Story {
    Story::new(name, move || {
        let rekindle = Rekindle::new()?;
        tell(&rekindle)?;
        rekindle.leaves_nothing()
    })
    .or_else(rekindle_e2e::end_all)
}
