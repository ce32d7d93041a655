//! `rekindle gc`.

use anyhow::Result;
use rekindle_engine::images::users;
use rekindle_engine::jail;
use rekindle_engine::net::sweep;
use rekindle_engine::store::collect::{Leftover, Mode, collect};
use rekindle_engine::store::image;

use super::Context;
use crate::output;

/// Removes what killed commands left, networks of no VM, and images that have no name and that nobody needs
#[derive(Debug, clap::Args)]
pub(crate) struct Gc {
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Gc {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let mode = if self.dry_run {
            Mode::Report
        } else {
            Mode::Reclaim
        };
        let engine = context.engine_for_reading()?;
        let mut found: Vec<String> = collect(engine.root(), mode)?.iter().map(describe).collect();
        let unused = image::collect(engine.root(), mode, &|contents| users(&engine, contents))?;
        found.extend(
            unused
                .iter()
                .map(|path| format!("image {}", path.display())),
        );
        let networks = match mode {
            Mode::Report => sweep::Mode::Report,
            Mode::Reclaim => sweep::Mode::Reclaim,
        };
        found.extend(
            sweep::sweep(engine.root(), networks)?
                .iter()
                .map(|name| format!("network {name} of a VM that is not there")),
        );
        found.extend(
            jail::sweep(engine.root(), mode)?
                .iter()
                .map(|what| format!("{what} of a jailed VM that is not there")),
        );
        if self.json {
            return output::json(&found);
        }
        found.iter().try_for_each(output::line)
    }
}

fn describe(leftover: &Leftover) -> String {
    match leftover {
        Leftover::Draft { id } => format!("unfinished snapshot {id}"),
        Leftover::Name { name, id } => format!("name {name} of {id}, which is not there"),
    }
}
