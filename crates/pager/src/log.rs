//! What a page server says in its log.

use std::fmt::Display;
use std::io::{self, Write};

/// Says a line on standard error, which the owner of the VM leads to a file. One that takes nothing, as on a full disk, is no
/// reason to leave a guest without its pages.
pub(crate) fn say(what: impl Display) {
    let _ = io::stderr().write_all(format!("{what}\n").as_bytes());
}
