//! `rekindle cp`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::CommandFactory;
use clap::error::ErrorKind;
use rekindle_engine::agent::{Agent, Copy, Owner, Tally};
use rekindle_engine::store::VmName;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::{Cli, Context, block_on};
use crate::monitor::truth::{Truth, look};
use crate::output;

/// Copies files and directories into a guest, or out of it
///
/// One of the two is VM:PATH, the other a path here; ./a:b is one here too. A directory goes into DST if that is one, by
/// its name, else it becomes DST; SRC/. copies its content alone. Links are copied, not followed. Kept are permissions,
/// times and holes; what is copied belongs to root in the guest and to you here, and is not setuid. A file has its name
/// once it is complete. When this command is killed, what it left half done is removed by the next copy to that place.
#[derive(Debug, clap::Args)]
pub(crate) struct Cp {
    /// What to copy
    #[arg(value_name = "SRC")]
    from: Place,
    /// Where to
    #[arg(value_name = "DST")]
    to: Place,
    /// Keep the numbers of owners and groups, and with them setuid and setgid; takes root
    #[arg(long, short = 'a')]
    archive: bool,
    /// Print what was copied as JSON
    #[arg(long)]
    json: bool,
}

/// A path here, or in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    In(VmName, String),
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        if text.is_empty() {
            return Err("a path has at least one character".into());
        }
        match text.split_once(':') {
            Some((name, _)) if name.contains('/') => Ok(Place::Here(text.into())),
            Some((_, "")) => Err(format!("name a path in the guest: {text}/")),
            Some((name, path)) => match name.parse() {
                Ok(vm) => Ok(Place::In(vm, path.to_owned())),
                Err(error) => Err(format!("{error}; a path here would be ./{text}")),
            },
            None => Ok(Place::Here(text.into())),
        }
    }
}

impl Cp {
    pub(crate) fn run(self, context: &Context) -> Result<ExitCode> {
        let (vm, copy): (VmName, Box<dyn FnOnce(Agent) -> Copy>) = match (self.from, self.to) {
            (Place::Here(from), Place::In(vm, to)) => {
                (vm, Box::new(|agent| agent.copy_in(from, to)))
            }
            (Place::In(vm, from), Place::Here(to)) => {
                (vm, Box::new(|agent| agent.copy_out(from, to)))
            }
            _ => wrong_usage(),
        };
        let (engine, dir) = context.vm(&vm)?;
        if let Truth::Starting = look(&engine, &vm, &dir)? {
            bail!("{vm} is still being started");
        }
        let owner = match self.archive {
            true => Owner::Kept,
            false => Owner::Unpacker,
        };
        let copy = copy(Agent::of(&dir)).owner(owner);
        let Some(tally) = block_on(attend(copy))? else {
            return Ok(ExitCode::from(INTERRUPTED));
        };
        for (path, what) in &tally.examples {
            output::say(format_args!("left out: {path:?} is {what}"));
        }
        match self.json {
            true => output::json(&Copied::of(&tally))?,
            false => output::line(told(&tally))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What a shell says of who was interrupted.
const INTERRUPTED: u8 = 130;

/// What takes no longer is not told of.
const PATIENCE: Duration = Duration::from_secs(1);

fn wrong_usage() -> ! {
    let words = "one of SRC and DST is VM:PATH, and the other a path here";
    Cli::command()
        .error(ErrorKind::ValueValidation, words)
        .exit()
}

/// Makes a copy, and shows how far it is. None if it was interrupted: its half file is gone then.
async fn attend(copy: Copy) -> Result<Option<Tally>> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    let mut ends = signal(SignalKind::terminate())?;
    let (files, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (seen_files, seen_bytes) = (files.clone(), bytes.clone());
    let copy = copy.progress(move |tally| {
        seen_files.store(tally.files, Ordering::Relaxed);
        seen_bytes.store(tally.bytes, Ordering::Relaxed);
    });
    let shows = async {
        tokio::time::sleep(PATIENCE).await;
        let waiting = output::waiting("copying");
        loop {
            let (files, bytes) = (files.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed));
            waiting.says(format!("copying: {files} files, {}", output::size(bytes)));
            tokio::time::sleep(PATIENCE / 4).await;
        }
    };
    tokio::select! {
        copied = copy.into_future() => Ok(Some(copied.context("not copied")?)),
        () = shows => Ok(None),
        _ = interrupts.recv() => Ok(None),
        _ = ends.recv() => Ok(None),
    }
}

/// What was copied, for programs.
#[derive(Debug, Serialize)]
struct Copied {
    files: u64,
    directories: u64,
    links: u64,
    bytes: u64,
    left_out: u64,
}

impl Copied {
    fn of(tally: &Tally) -> Copied {
        Copied {
            files: tally.files,
            directories: tally.directories,
            links: tally.links,
            bytes: tally.bytes,
            left_out: tally.skipped,
        }
    }
}

/// What was copied, for people.
fn told(tally: &Tally) -> String {
    let some = |count: u64, one: &str, more: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        _ => Some(format!("{count} {more}")),
    };
    let parts = [
        some(tally.files, "file", "files"),
        some(tally.directories, "directory", "directories"),
        some(tally.links, "link", "links"),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    let left_out = match tally.skipped {
        0 => String::new(),
        count => format!(", {count} left out"),
    };
    format!(
        "copied {}, {} of data{left_out}",
        parts.join(", "),
        output::size(tally.bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_here_or_in_a_guest() {
        let vm = |text: &str| text.parse::<VmName>().unwrap();
        let guest = |name, path: &str| Ok(Place::In(vm(name), path.to_owned()));
        assert_eq!("web:/srv".parse(), guest("web", "/srv"));
        assert_eq!("web-1:a:b".parse(), guest("web-1", "a:b"));
        for here in ["web", "./web:/srv", "/a:b", ".", "../x/"] {
            assert_eq!(here.parse(), Ok(Place::Here(here.into())));
        }
        for neither in ["", "web:", "Web:/srv", ":/srv"] {
            assert!(neither.parse::<Place>().is_err(), "{neither:?}");
        }
    }

    #[test]
    fn what_was_copied_is_told_in_a_line() {
        let mut tally = Tally::default();
        tally.files = 1;
        tally.bytes = 5 << 10;
        assert_eq!(told(&tally), "copied 1 file, 5 KiB of data");
        (tally.directories, tally.links, tally.skipped) = (2, 1, 3);
        assert_eq!(
            told(&tally),
            "copied 1 file, 2 directories, 1 link, 5 KiB of data, 3 left out"
        );
    }
}
