//! Firecracker's log.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Level {
    /// What failed.
    Error,
    /// And what is strange.
    Warning,
    /// And what happened.
    Info,
    /// And how.
    Debug,
    /// And everything else.
    Trace,
    /// Nothing.
    Off,
}

impl Level {
    /// As the API and the command line spell it.
    pub fn name(self) -> &'static str {
        match self {
            Level::Error => "Error",
            Level::Warning => "Warning",
            Level::Info => "Info",
            Level::Debug => "Debug",
            Level::Trace => "Trace",
            Level::Off => "Off",
        }
    }
}

body! {
    /// Where Firecracker's log goes and what is in it.
    #[derive(Default, Eq)]
    pub struct Logger {}
    optional {
        /// A file or FIFO. Before Firecracker 1.14 it must exist.
        log_path: PathBuf [into],
        /// How much is logged; a call without it sets [`Level::Info`].
        level: Level,
        /// Whether a line says its level.
        show_level: bool,
        /// Whether a line says the file and line it comes from.
        show_log_origin: bool,
        /// Only what comes from this module, such as `api_server::request`.
        module: String [into],
    }
}
