//! What the agent says where nobody asked it.

use std::fmt::Display;
use std::io::{self, Write};

/// Says a line on standard error, which is a guest's console where the agent is its first program. A console that takes nothing
/// is no reason to end.
pub(crate) fn say(what: impl Display) {
    let _ = io::stderr().write_all(format!("{what}\n").as_bytes());
}
