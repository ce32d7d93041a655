//! What a starting monitor tells the verb that waits for it: one JSON object a line, on its standard output.
//!
//! The pipe is held by keeper and monitor alone, so its end means that nobody is left who could start the VM.

use std::io::{self, BufRead, BufReader, Read, Write};

use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::rehearse::Rehearsed;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    /// The VM runs, or is loaded, and its monitor takes requests.
    Up(Box<Record>),
    /// It could not be started; nothing of it is left.
    Failed(String),
    /// It has ended already.
    Over(Box<Record>),
    /// It was a rehearsal; nothing of it is left.
    Rehearsed(Rehearsed),
}

/// The monitor's end. Whoever listened may be gone; that stops nothing.
#[derive(Debug)]
pub(crate) struct Progress {
    told: bool,
}

impl Progress {
    pub(crate) fn new() -> Progress {
        Progress { told: false }
    }

    pub(crate) fn up(&mut self, record: &Record) {
        self.tell(&Line::Up(Box::new(record.clone())));
    }

    pub(crate) fn failed(&mut self, error: &anyhow::Error) {
        self.tell(&Line::Failed(format!("{error:#}")));
    }

    /// The end is told only where the beginning was not.
    pub(crate) fn over(&mut self, record: &Record) {
        self.tell(&Line::Over(Box::new(record.clone())));
    }

    pub(crate) fn rehearsed(&mut self, rehearsed: Rehearsed) {
        self.tell(&Line::Rehearsed(rehearsed));
    }

    fn tell(&mut self, line: &Line) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        if let Ok(mut text) = serde_json::to_vec(line) {
            text.push(b'\n');
            let _ = io::stdout()
                .write_all(&text)
                .and_then(|()| io::stdout().flush());
        }
    }
}

/// The verb's end: the first line that a monitor says, or nothing if all that could say one are dead.
pub(crate) fn first_line(pipe: impl Read) -> io::Result<Option<Line>> {
    let mut line = String::new();
    if BufReader::new(pipe).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}
