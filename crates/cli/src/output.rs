//! What verbs print: lines for people, JSON for programs, aligned columns for both eyes.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Says a line on standard error. Nobody listens to one that cannot be written to, and what was to be done is done all the same.
pub(crate) fn say(what: impl Display) {
    let _ = io::stderr().write_all(format!("rekindle: {what}\n").as_bytes());
}

/// Prints one line.
pub(crate) fn line(text: impl AsRef<str>) -> Result<()> {
    writeln!(io::stdout(), "{}", text.as_ref())?;
    Ok(())
}

/// Prints a value as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Prints rows under headings, each column as wide as its widest cell.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> Result<()> {
    let mut widths = headings.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = io::stdout().lock();
    let mut print = |cells: [&str; N]| -> io::Result<()> {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        writeln!(out, "{}", text.trim_end())
    };
    print(headings)?;
    for row in rows {
        print(row.each_ref().map(String::as_str))?;
    }
    Ok(())
}

/// Tells a person at a terminal that something takes its time, until this is dropped. Says nothing into a pipe.
pub(crate) fn waiting(what: impl Into<Cow<'static, str>>) -> Waiting {
    let what = what.into();
    let stderr = io::stderr();
    let term = std::env::var("TERM").ok();
    let columns = rustix::termios::tcgetwinsize(&stderr).map_or(0, |size| size.ws_col);
    match Screen::of(stderr.is_terminal(), term.as_deref(), columns) {
        Screen::Live => {
            let bar = ProgressBar::new_spinner().with_message(what);
            bar.enable_steady_tick(Duration::from_millis(120));
            Waiting(Some(bar))
        }
        Screen::Lines => {
            say(&what);
            Waiting(None)
        }
        Screen::None => Waiting(None),
    }
}

/// Clears the line when it is dropped.
#[derive(Debug)]
pub(crate) struct Waiting(Option<ProgressBar>);

impl Waiting {
    /// Says more of it. A screen of whole lines keeps the first.
    pub(crate) fn says(&self, what: impl Into<Cow<'static, str>>) {
        if let Some(bar) = &self.0 {
            bar.set_message(what);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Shows at a terminal how far a transfer is, how fast, and how long it will take. Says nothing into a pipe.
pub(crate) fn transfer(what: String) -> Transfer {
    let shown = waiting(what);
    if let Waiting(Some(bar)) = &shown {
        let style = ProgressStyle::with_template(
            "{spinner} {msg}  {bar:20}  {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
        );
        bar.set_style(style.expect("the template is well-formed"));
    }
    Transfer(shown)
}

/// A transfer that is shown; cleared when it is dropped.
#[derive(Debug)]
pub(crate) struct Transfer(Waiting);

impl Transfer {
    /// So many bytes of so many are done with.
    pub(crate) fn now(&self, done: u64, total: u64) {
        if let Waiting(Some(bar)) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

/// What can be shown to a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Screen {
    /// A line that changes.
    Live,
    /// Whole lines only: a serial console, whose output is a log as often as not.
    Lines,
    /// Nobody looks.
    None,
}

impl Screen {
    fn of(is_terminal: bool, term: Option<&str>, columns: u16) -> Screen {
        match term {
            _ if !is_terminal => Screen::None,
            None | Some("" | "dumb") => Screen::Lines,
            // A serial console does not know its size.
            Some(_) if columns == 0 => Screen::Lines,
            Some(_) => Screen::Live,
        }
    }
}

/// Whether an error is only that nobody reads on.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// A size as people write it.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..=1023 => format!("{bytes} B"),
        1024..=1_048_575 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// Microseconds as milliseconds.
pub(crate) fn millis(micros: u64) -> String {
    format!("{}.{} ms", micros / 1000, micros % 1000 / 100)
}

/// How long ago, roughly.
pub(crate) fn ago(then: jiff::Timestamp) -> String {
    let seconds = jiff::Timestamp::now().duration_since(then).as_secs().max(0);
    match seconds {
        0..=119 => format!("{seconds} s ago"),
        120..=7199 => format!("{} min ago", seconds / 60),
        7200..=172_799 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_drawn_only_where_a_person_sees_it_change() {
        let screen = |term, columns| Screen::of(true, term, columns);
        assert_eq!(screen(Some("xterm-256color"), 80), Screen::Live);
        assert_eq!(screen(Some("linux"), 80), Screen::Live);
        assert_eq!(screen(Some("linux"), 0), Screen::Lines);
        assert_eq!(screen(Some("dumb"), 80), Screen::Lines);
        assert_eq!(screen(None, 80), Screen::Lines);
        assert_eq!(Screen::of(false, Some("xterm"), 80), Screen::None);
    }
}
