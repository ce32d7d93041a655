//! The environment and the metadata that a VM is to get, on their way from the verb to the monitor that starts it.
//!
//! ```text
//!   verb ── a file in memory, as standard input ──▶ keeper ── the same ──▶ monitor, and the next one if it dies
//! ```
//!
//! They are never on a disk. When a copy is awake the file is emptied, for all who have it open.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use rekindle_engine::vm::metadata::{MAX_BYTES as METADATA_BYTES, Metadata};
use rekindle_engine::vm::wake::Environment;
use rustix::fs::MemfdFlags;
use serde_json::{Map, Value};

/// As much as a message to the agent can hold, and the metadata service.
const MAX_BYTES: usize = (1 << 20) + METADATA_BYTES;

/// The file's contents: what variables there are, and what metadata.
type Kept = (Vec<(String, String)>, Option<Map<String, Value>>);

/// The verb's end: a file for the keeper's standard input; none if there is nothing to keep.
pub(crate) fn keep(environment: &Environment, metadata: Option<&Metadata>) -> Result<Option<File>> {
    if environment.variables().is_empty() && metadata.is_none() {
        return Ok(None);
    }
    let text = serde_json::to_vec(&(environment.variables(), metadata.map(Metadata::contents)))?;
    let kept = || -> io::Result<File> {
        let file = rustix::fs::memfd_create("secrets", MemfdFlags::CLOEXEC)?;
        let file = File::from(file);
        file.write_all_at(&text, 0)?;
        Ok(file)
    };
    Ok(Some(kept().context(
        "cannot keep environment and metadata in memory",
    )?))
}

/// The monitor's end.
#[derive(Debug, Default)]
pub(crate) struct Secrets {
    environment: Environment,
    metadata: Option<Metadata>,
    file: Option<File>,
}

impl Secrets {
    /// What came as standard input, if anything did.
    pub(crate) fn of_stdin() -> Secrets {
        let file = io::stdin().as_fd().try_clone_to_owned().map(File::from);
        let read = file.ok().and_then(|file| Some((read(&file)?, file)));
        let Some(((environment, metadata), file)) = read else {
            return Secrets::default();
        };
        Secrets {
            environment,
            metadata,
            file: Some(file),
        }
    }

    pub(crate) fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    pub(crate) fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Nobody needs them any more.
    pub(crate) fn forget(&mut self) {
        self.environment = Environment::default();
        self.metadata = None;
        if let Some(file) = self.file.take() {
            // One that cannot be emptied is gone when the keeper ends.
            let _ = file.set_len(0);
        }
    }
}

/// Nothing where it is no such file: it may be `/dev/null`, or a terminal.
fn read(file: &File) -> Option<(Environment, Option<Metadata>)> {
    let mut text = vec![0; MAX_BYTES];
    let mut length = 0;
    loop {
        match file.read_at(&mut text[length..], length.try_into().ok()?) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(_) => return None,
        }
    }
    let (variables, metadata): Kept = serde_json::from_slice(&text[..length]).ok()?;
    let metadata = metadata.map(Metadata::of).transpose().ok()?;
    Some((Environment::new(variables), metadata))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_it_open_reads_it_until_one_empties_it() {
        assert!(keep(&Environment::default(), None).unwrap().is_none());
        let environment = Environment::new(vec![("KEY".into(), "swordfish".into())]);
        let metadata = Metadata::parse(br#"{"key":"swordfish"}"#).unwrap();
        let file = keep(&Environment::default(), Some(&metadata))
            .unwrap()
            .unwrap();
        assert_eq!(read(&file), Some((Environment::default(), Some(metadata))));
        let file = keep(&environment, None).unwrap().unwrap();
        assert_eq!(read(&file), Some((environment.clone(), None)));
        assert_eq!(
            read(&file.try_clone().unwrap()),
            Some((environment.clone(), None))
        );
        let mut secrets = Secrets {
            environment,
            metadata: None,
            file: Some(file.try_clone().unwrap()),
        };
        secrets.forget();
        assert_eq!(read(&file), None);
        assert!(secrets.environment().variables().is_empty());
        assert_eq!(read(&File::open("/dev/null").unwrap()), None);
    }
}
