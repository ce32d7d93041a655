//! `rekindle gc`.

use anyhow::Result;
use rekindle_engine::Engine;
use rekindle_engine::images::users;
use rekindle_engine::jail;
use rekindle_engine::net::sweep;
use rekindle_engine::store::collect::{Leftover, Mode, collect};
use rekindle_engine::store::image;
use rekindle_engine::store::packed::Cache;
use rekindle_engine::store::store::Listed;
use rekindle_engine::store::unit::ByteSize;
use rekindle_engine::store::{Snapshot, SnapshotId};
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::{Origin, Record};
use serde::Serialize;

use super::Context;
use super::travel::CacheSize;
use crate::monitor::abandoned::{self, Standing};
use crate::output;

/// Removes what nobody can want any more, and says what it keeps and why
///
/// Removed are: VMs whose monitor was killed and of which nothing runs any more, with their disks and
/// output; what killed commands left; networks, users and control groups of no VM; images that have no name and that nobody
/// needs; of the chunks that were fetched from object stores what was not wanted for longest. A VM that
/// ended while somebody looked after it stays until rekindle rm, and so does every snapshot.
#[derive(Debug, clap::Args)]
pub(crate) struct Gc {
    #[command(flatten)]
    cache: CacheSize,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// What is removed, or would be.
    removed: Vec<Thing>,
    kept: Vec<Thing>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<CacheReport>,
}

#[derive(Debug, Serialize)]
struct Thing {
    what: String,
    why: String,
}

/// The chunks that were fetched from object stores.
#[derive(Debug, Serialize)]
struct CacheReport {
    bytes: u64,
    limit_bytes: u64,
    removed_bytes: u64,
}

impl Gc {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let mode = if self.dry_run {
            Mode::Report
        } else {
            Mode::Reclaim
        };
        let engine = context.engine_for_reading()?;
        let mut report = Report::default();
        // Before what they need.
        report.vms(&engine, mode)?;
        report.snapshots(&engine, mode)?;
        report.images(&engine, mode)?;
        report.networks(&engine, mode)?;
        for what in jail::sweep(engine.root(), mode)? {
            report.removes(what, "its jailed VM is not there");
        }
        let limit = ByteSize::new(self.cache.mib.saturating_mul(1 << 20));
        report.cache = trim(&engine, limit, mode)?;
        if self.json {
            return output::json(&report);
        }
        report.print(mode)
    }
}

/// Tells whoever types other verbs that there is something to remove. What cannot be looked at is no matter of theirs.
pub(super) fn remind(context: &Context) {
    let count = context
        .engine_for_reading()
        .and_then(|engine| Report::leftovers(&engine));
    if let Ok(count @ 1..) = count {
        let things = if count == 1 { "thing is" } else { "things are" };
        output::say(format_args!(
            "{count} {things} left of what was killed or removed by hand; rekindle gc removes, gc --dry-run tells"
        ));
    }
}

impl Report {
    /// How many things would be removed, without those that take long to find: images and chunks.
    fn leftovers(engine: &Engine) -> Result<usize> {
        let mut report = Report::default();
        report.vms(engine, Mode::Report)?;
        let drafts = collect(engine.root(), Mode::Report)?.len();
        let outside = jail::sweep(engine.root(), Mode::Report)?.len();
        // Without the rights for networks there are none.
        let networks =
            sweep::sweep(engine.root(), sweep::Mode::Report).map_or(0, |found| found.len());
        Ok(report.removed.len() + drafts + outside + networks)
    }

    fn removes(&mut self, what: String, why: impl Into<String>) {
        let why = why.into();
        self.removed.push(Thing { what, why });
    }

    fn keeps(&mut self, what: String, why: impl Into<String>) {
        let why = why.into();
        self.kept.push(Thing { what, why });
    }

    fn vms(&mut self, engine: &Engine, mode: Mode) -> Result<()> {
        for (name, standing) in abandoned::sweep(engine, mode)? {
            let what = format!("VM {name}");
            match standing {
                Standing::Watched => {}
                Standing::Kept(why) => self.keeps(what, why),
                Standing::Abandoned(why) => self.removes(what, why),
            }
        }
        Ok(())
    }

    fn snapshots(&mut self, engine: &Engine, mode: Mode) -> Result<()> {
        for leftover in collect(engine.root(), mode)? {
            match leftover {
                Leftover::Draft { id } => {
                    self.removes(
                        format!("unfinished snapshot {id}"),
                        "who made it was killed",
                    );
                }
                Leftover::Name { name, id } => {
                    self.removes(
                        format!("name {name}"),
                        format!("its snapshot {id} is not there"),
                    );
                }
            }
        }
        let listed = engine.store().list()?;
        let whole: Vec<&Snapshot> = listed
            .iter()
            .filter_map(|listed| match listed {
                Listed::Whole(snapshot) => Some(&**snapshot),
                Listed::Broken(_) => None,
            })
            .collect();
        let origins = origins(engine)?;
        for snapshot in whole.iter().filter(|it| it.manifest().name.is_none()) {
            let id = snapshot.id();
            let diffs = whole.iter().filter(|it| it.manifest().parent() == Some(id));
            let diffs = diffs.map(|diff| format!("the snapshot {} builds on it", diff.id()));
            let copies = origins.iter().filter(|(_, origin)| *origin == id);
            let copies = copies.map(|(vm, _)| format!("the VM {vm} was restored from it"));
            let why: Vec<String> = diffs.chain(copies).collect();
            let why = match why.is_empty() {
                true => format!(
                    "it has no name, and may be wanted by its id: rekindle snapshot rm {id}"
                ),
                false => why.join(", "),
            };
            self.keeps(format!("snapshot {id}"), why);
        }
        Ok(())
    }

    fn images(&mut self, engine: &Engine, mode: Mode) -> Result<()> {
        let users = |contents: &image::ImageName| users(engine, contents);
        for path in image::collect(engine.root(), mode, &users)? {
            self.removes(
                format!("image {}", path.display()),
                "it has no name, and nobody needs it",
            );
        }
        for (contents, users) in image::nameless_in_use(engine.root(), &users)? {
            let users: Vec<String> = users.iter().map(ToString::to_string).collect();
            self.keeps(
                format!("image {contents}"),
                format!("it has no name, and is needed by {}", users.join(", ")),
            );
        }
        Ok(())
    }

    fn networks(&mut self, engine: &Engine, mode: Mode) -> Result<()> {
        let mode = match mode {
            Mode::Report => sweep::Mode::Report,
            Mode::Reclaim => sweep::Mode::Reclaim,
        };
        for name in sweep::sweep(engine.root(), mode)? {
            self.removes(format!("network {name}"), "its VM is not there");
        }
        Ok(())
    }

    fn print(&self, mode: Mode) -> Result<()> {
        let (goes, went) = match mode {
            Mode::Report => ("would go", "would go"),
            Mode::Reclaim => ("removed ", "removed"),
        };
        for Thing { what, why } in &self.removed {
            output::line(format!("{goes}  {what}: {why}"))?;
        }
        for Thing { what, why } in &self.kept {
            output::line(format!("kept      {what}: {why}"))?;
        }
        let Some(cache) = &self.cache else {
            return Ok(());
        };
        let size = output::size;
        let removed = match cache.removed_bytes {
            0 => String::new(),
            bytes => format!(", {} {went}", size(bytes)),
        };
        output::line(format!(
            "cache     {} of chunks fetched from object stores, of at most {}{removed}",
            size(cache.bytes),
            size(cache.limit_bytes),
        ))
    }
}

/// What the VMs that have not ended were restored from.
fn origins(engine: &Engine) -> Result<Vec<(String, SnapshotId)>> {
    let names = VmDir::list(engine.root())?.into_iter();
    let records = names.filter_map(|name| {
        let dir = VmDir::open(engine.root(), &name).ok()?;
        Record::read(&dir).ok()
    });
    let of = |record: Record| match record.origin {
        Origin::Restore { snapshot, .. } if !record.state.is_over() => {
            Some((record.name.to_string(), snapshot))
        }
        _ => None,
    };
    Ok(records.filter_map(of).collect())
}

/// Brings the cache within its limit. Where nothing was ever fetched there is none.
fn trim(engine: &Engine, limit: ByteSize, mode: Mode) -> Result<Option<CacheReport>> {
    if !engine.root().cache().exists() {
        return Ok(None);
    }
    let cache = Cache::open(engine.root(), limit)?;
    let before = cache.size().get();
    let bytes = match mode {
        Mode::Report => before.min(limit.get()),
        Mode::Reclaim => {
            cache.trim();
            cache.size().get()
        }
    };
    Ok(Some(CacheReport {
        bytes,
        limit_bytes: limit.get(),
        removed_bytes: before.saturating_sub(bytes),
    }))
}
