//! `rekindle snapshot push` and `rekindle snapshot pull`.

use std::time::{Duration, Instant};

use anyhow::Result;
use rekindle_engine::bucket::{self, Location, Patience};
use rekindle_engine::store::SnapshotName;
use rekindle_engine::store::packed::{Progress, Repository};
use serde_json::json;

use super::Context;
use crate::output;

/// Packs a snapshot, and what it builds on, into a directory or an object store
///
/// What is there already is not sent again, also not after a push that was killed. The snapshot appears there
/// last, and whole.
///
/// Credentials are taken from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and for
/// stores that only speak like Amazon's AWS_ENDPOINT_URL, with AWS_ALLOW_HTTP=true if it has no TLS;
/// GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY. SSL_CERT_FILE names whom to trust
/// if the host's certificates do not.
#[derive(Debug, clap::Args)]
pub(crate) struct Push {
    /// The snapshot, by name or id
    snapshot: String,
    /// Where to: file:///directory, which is made, or s3://bucket/prefix, gs://…, az://…
    url: String,
    #[command(flatten)]
    patience: Waits,
    /// Its name there, instead of the one that it has here
    #[arg(long, value_name = "N")]
    name: Option<SnapshotName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Unpacks a snapshot, and what it builds on, from a directory or an object store
///
/// What is here already is not fetched again, also not after a pull that was killed: what comes from an
/// object store stays in a cache of the state directory. Credentials: see `rekindle snapshot push --help`.
#[derive(Debug, clap::Args)]
pub(crate) struct Pull {
    /// Where from: the URL that it was pushed to, a slash, and its name there or its id
    url: String,
    #[command(flatten)]
    patience: Waits,
    #[command(flatten)]
    cache: CacheSize,
    /// Its name here, instead of the one that it has there
    #[arg(long, value_name = "N")]
    name: Option<SnapshotName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How much room what is fetched may have.
#[derive(Debug, clap::Args)]
pub(super) struct CacheSize {
    /// How much of the disk the cache may take, about, in MiB
    #[arg(
        long = "cache",
        value_name = "MIB",
        env = "REKINDLE_CACHE_MIB",
        default_value_t = 4096
    )]
    pub(super) mib: u64,
}

/// How long an object store may take.
#[derive(Debug, clap::Args)]
pub(super) struct Waits {
    /// Give up when the store has not done one thing for so long, as 30s or 2m; longer for what is large
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = super::parse_duration)]
    pub(super) patience: Duration,
}

impl Waits {
    fn repository(&self, location: &Location) -> Result<Repository> {
        Ok(bucket::repository(location, Patience::of(self.patience))?)
    }
}

impl Push {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let location: Location = self.url.parse()?;
        let repository = self.patience.repository(&location)?;
        let engine = context.engine_for_reading()?;
        let tip = engine.snapshot(&self.snapshot)?;
        let id = tip.id();
        let name = self.name.or_else(|| tip.manifest().name.clone());
        let bar = output::transfer(format!("pushing {}", self.snapshot));
        let begun = Instant::now();
        let report = |now: Progress| bar.now(now.done, now.total);
        let pushed = repository.push(engine.store(), tip, name.clone(), &report)?;
        drop(bar);
        let key = name.map_or_else(|| id.to_string(), |name| name.to_string());
        let url = format!("{location}/{key}");
        if self.json {
            return output::json(&json!({
                "id": id, "url": url, "snapshots": pushed.snapshots, "bytes": pushed.bytes,
            }));
        }
        let wrote = format!("  {} written", output::size(pushed.bytes));
        output::line(url + &told(pushed.snapshots, &wrote, begun.elapsed()))
    }
}

impl Pull {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (location, key) = Location::of_snapshot(&self.url)?;
        let repository = self.patience.repository(&location)?;
        let engine = context.engine_for_reading()?;
        let bar = output::transfer(format!("pulling {key}"));
        let begun = Instant::now();
        let report = |now: Progress| bar.now(now.done, now.total);
        let cache = bucket::cache(engine.root(), &location, self.cache.mib)?;
        let pulled = repository.pull(engine.store(), &key, self.name, cache.as_ref(), &report)?;
        drop(bar);
        if self.json {
            return output::json(&json!({
                "id": pulled.id, "name": pulled.name, "snapshots": pulled.snapshots,
            }));
        }
        let name = pulled
            .name
            .map_or_else(String::new, |name| format!("  {name}"));
        let what = format!("{}{name}", pulled.id);
        output::line(what + &told(pulled.snapshots, "", begun.elapsed()))
    }
}

fn told(snapshots: usize, how: &str, took: Duration) -> String {
    let took = took.as_secs_f64();
    match snapshots {
        0 => "  was there already".into(),
        1 => format!("{how}  in {took:.1} s"),
        n => format!("  with {} that it builds on{how}  in {took:.1} s", n - 1),
    }
}
