//! `rekindle snapshot push` and `rekindle snapshot pull`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rekindle_engine::store::SnapshotName;
use rekindle_engine::store::packed::{Directory, Progress};
use serde_json::json;

use super::Context;
use crate::output;

/// Packs a snapshot, and what it builds on, into a directory
///
/// What is there already is not written again, also not after a push that was killed.
#[derive(Debug, clap::Args)]
pub(crate) struct Push {
    /// The snapshot, by name or id
    snapshot: String,
    /// Where to, as file:///directory; it is made if it is missing
    url: String,
    /// Its name there, instead of the one that it has here
    #[arg(long, value_name = "N")]
    name: Option<SnapshotName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Unpacks a snapshot, and what it builds on, from a directory
#[derive(Debug, clap::Args)]
pub(crate) struct Pull {
    /// Where from: the URL that it was pushed to, a slash, and its name there or its id
    url: String,
    /// Its name here, instead of the one that it has there
    #[arg(long, value_name = "N")]
    name: Option<SnapshotName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Push {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let directory = Directory::at(directory(&self.url)?);
        let engine = context.engine_for_reading()?;
        let tip = engine.snapshot(&self.snapshot)?;
        let id = tip.id();
        let name = self.name.or_else(|| tip.manifest().name.clone());
        let bar = output::transfer(format!("pushing {}", self.snapshot));
        let begun = Instant::now();
        let report = |now: Progress| bar.now(now.done, now.total);
        let pushed = directory.push(engine.store(), tip, name.clone(), &report)?;
        drop(bar);
        let key = name.map_or_else(|| id.to_string(), |name| name.to_string());
        let url = format!("{}/{key}", self.url.trim_end_matches('/'));
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
        let url = self.url.trim_end_matches('/');
        let (place, key) = url
            .rsplit_once('/')
            .with_context(|| format!("{url:?} is no URL of a snapshot, file:///directory/name"))?;
        let directory = Directory::at(directory(place)?);
        let engine = context.engine_for_reading()?;
        let bar = output::transfer(format!("pulling {key}"));
        let begun = Instant::now();
        let report = |now: Progress| bar.now(now.done, now.total);
        let pulled = directory.pull(engine.store(), key, self.name, &report)?;
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

/// The directory of a URL.
fn directory(url: &str) -> Result<PathBuf> {
    match url.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        Some(_) => bail!("{url:?} has two slashes too few: file:///directory"),
        None => bail!("{url:?} is not like file:///directory, which is all that is known so far"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_with_a_typo_is_refused() {
        assert_eq!(directory("file:///a/b").unwrap(), PathBuf::from("/a/b"));
        for (url, said) in [
            ("file://a/b", "slashes"),
            ("fiel:///a", "file:///directory"),
            ("/a/b", "file:///directory"),
            ("s3://bucket/x", "file:///directory"),
        ] {
            let error = directory(url).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains(url), "{error}");
        }
    }
}
