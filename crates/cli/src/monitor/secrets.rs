//! The environment that a copy is to get, on its way from the verb to the monitor that wakes the copy up.
//!
//! ```text
//!   verb ── a file in memory, as standard input ──▶ keeper ── the same ──▶ monitor, and the next one if it dies
//! ```
//!
//! It is never on a disk. When the copy is awake the file is emptied, for all who have it open.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use rekindle_engine::vm::wake::Environment;
use rustix::fs::MemfdFlags;

/// As much as a message to the agent can hold.
const MAX_BYTES: usize = 1 << 20;

/// The verb's end: a file for the keeper's standard input; none if there is nothing to keep.
pub(crate) fn keep(environment: &Environment) -> Result<Option<File>> {
    if environment.variables().is_empty() {
        return Ok(None);
    }
    let text = serde_json::to_vec(environment.variables())?;
    let kept = || -> io::Result<File> {
        let file = rustix::fs::memfd_create("environment", MemfdFlags::CLOEXEC)?;
        let file = File::from(file);
        file.write_all_at(&text, 0)?;
        Ok(file)
    };
    Ok(Some(
        kept().context("cannot keep the environment in memory")?,
    ))
}

/// The monitor's end.
#[derive(Debug)]
pub(crate) struct Secrets {
    environment: Environment,
    file: Option<File>,
}

impl Secrets {
    /// What came as standard input, if anything did.
    pub(crate) fn of_stdin() -> Secrets {
        let file = io::stdin().as_fd().try_clone_to_owned().map(File::from);
        let read = file.ok().and_then(|file| Some((read(&file)?, file)));
        match read {
            Some((environment, file)) => Secrets {
                environment,
                file: Some(file),
            },
            None => Secrets {
                environment: Environment::default(),
                file: None,
            },
        }
    }

    pub(crate) fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Nobody needs them any more.
    pub(crate) fn forget(&mut self) {
        self.environment = Environment::default();
        if let Some(file) = self.file.take() {
            // One that cannot be emptied is gone when the keeper ends.
            let _ = file.set_len(0);
        }
    }
}

/// Nothing where it is no file with variables: it may be `/dev/null`, or a terminal.
fn read(file: &File) -> Option<Environment> {
    let mut text = vec![0; MAX_BYTES];
    let mut length = 0;
    loop {
        match file.read_at(&mut text[length..], length.try_into().ok()?) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(_) => return None,
        }
    }
    let variables = serde_json::from_slice(&text[..length]).ok()?;
    Some(Environment::new(variables))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_it_open_reads_it_until_one_empties_it() {
        assert!(keep(&Environment::default()).unwrap().is_none());
        let environment = Environment::new(vec![("KEY".into(), "swordfish".into())]);
        let file = keep(&environment).unwrap().unwrap();
        assert_eq!(read(&file), Some(environment.clone()));
        assert_eq!(read(&file.try_clone().unwrap()), Some(environment.clone()));
        let mut secrets = Secrets {
            environment,
            file: Some(file.try_clone().unwrap()),
        };
        secrets.forget();
        assert_eq!(read(&file), None);
        assert!(secrets.environment().variables().is_empty());
        assert_eq!(read(&File::open("/dev/null").unwrap()), None);
    }
}
