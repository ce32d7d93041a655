//! What a page server was told, for its successor, in a file beside the state.
//!
//! It is written before a stranger is listened to, and a page server without rights cannot write it again. So whoever got
//! hold of one cannot have its successor, which begins with more rights, open or write anything else: of the state nothing is
//! taken that this says, too.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::source::Source;
use crate::state::{StateError, create};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) source: Source,
    pub(crate) stats: Option<PathBuf>,
    pub(crate) record: Option<PathBuf>,
    pub(crate) replay: Option<PathBuf>,
}

impl Plan {
    /// Replaces what an earlier page server was told.
    pub(crate) fn write(&self, state: &Path) -> Result<(), StateError> {
        let path = path(state);
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(self)?;
            create(&path)?.write_all(&text)
        };
        write().map_err(|source| StateError::Io {
            path: path.clone(),
            source,
        })
    }

    /// What stands beside a state; an earlier version's has it inside.
    pub(crate) fn read(state: &Path) -> Result<Option<Plan>, StateError> {
        let path = path(state);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StateError::Io { path, source }),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| StateError::Saved { path, source })
    }
}

fn path(state: &Path) -> PathBuf {
    state.with_extension("plan")
}
