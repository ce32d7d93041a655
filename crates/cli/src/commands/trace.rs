//! `rekindle trace`.

mod picture;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rekindle_engine::store::VmName;
use rekindle_engine::vm::config::Backend;
use rekindle_engine::vm::record::{Origin, Record};
use rekindle_pager::{Piece, Stats};
use serde::Serialize;

use self::picture::Picture;
use super::Context;
use crate::monitor::truth::{Truth, look};
use crate::{output, page_server};

/// Shows which memory of a VM came in when, and why
///
/// The page server remembers the first 32,768 pieces; neighbours that came in together are one piece.
/// They can be looked at while the VM runs, and after its end until it is removed.
#[derive(Debug, clap::Args)]
pub(crate) struct Trace {
    /// The VM
    vm: VmName,
    /// Draw it into this file; - is the standard output
    #[arg(long, value_name = "F", required_unless_present = "json")]
    svg: Option<PathBuf>,
    /// Draw so many milliseconds [default: until nearly all of it was in]
    #[arg(long, value_name = "N", requires = "svg", value_parser = clap::value_parser!(u64).range(1..))]
    span: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Traced<'a> {
    vm: &'a VmName,
    stats: &'a Stats,
    /// In order of time.
    pieces: &'a [Piece],
}

impl Trace {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        let Truth::Known(record) = look(&engine, &self.vm, &dir)? else {
            bail!("{} is still being started", self.vm);
        };
        let live = match page_server::live(&dir) {
            Some(live) => live?,
            None => bail!("{}", why_not(&record)),
        };
        let (stats, pieces) = (live.stats(), live.trace());
        if pieces.is_empty() {
            bail!("nothing of {} came in yet", self.vm);
        }
        if let Some(path) = &self.svg {
            let span = self.span.map(Duration::from_millis);
            let text = Picture::new(&stats, &pieces, span).draw(&title(&record));
            if path.as_os_str() == "-" {
                output::line(text.trim_end())?;
            } else {
                std::fs::write(path, text)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        if self.json {
            output::json(&Traced {
                vm: &self.vm,
                stats: &stats,
                pieces: &pieces,
            })?;
        }
        Ok(())
    }
}

fn title(record: &Record) -> String {
    match &record.origin {
        Origin::Restore { snapshot, .. } => format!("{}, restored from {snapshot}", record.name),
        _ => record.name.to_string(),
    }
}

/// Why a VM has no trace.
fn why_not(record: &Record) -> String {
    let name = &record.name;
    match &record.origin {
        Origin::Boot { .. } => {
            format!("{name} was booted, not restored: no page server brings its memory in")
        }
        Origin::Restore {
            backend: Backend::File,
            ..
        } => format!(
            "{name} was restored with --backend file: Firecracker maps its memory, no page server brings it in"
        ),
        _ => format!("the page server of {name} kept no trace"),
    }
}
