//! The terminal that this program was started on.

use std::io::{self, IsTerminal, Write};

use anyhow::{Context as _, Result};
use rekindle_engine::agent::Size;
use rustix::termios::{self, OptionalActions, Termios};

/// The terminal passes every key on while this lives.
pub(crate) struct RawTerminal {
    before: Option<Termios>,
}

impl RawTerminal {
    /// Does nothing where the standard input is no terminal.
    pub(crate) fn enter() -> Result<RawTerminal> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(RawTerminal { before: None });
        }
        let before = termios::tcgetattr(&stdin).context("cannot read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&stdin, OptionalActions::Now, &raw)
            .context("cannot set the terminal to raw")?;
        Ok(RawTerminal {
            before: Some(before),
        })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, before);
            let _ = writeln!(io::stderr());
        }
    }
}

/// The size of the terminal that is the standard input.
pub(crate) fn size() -> Result<Size> {
    let size = termios::tcgetwinsize(io::stdin()).context("cannot tell the terminal's size")?;
    Ok(Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}
