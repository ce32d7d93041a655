//! Waiting for a guest to say something.

use std::io::Read;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// What of an output is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until<'a> {
    /// This text, wherever it ends: a prompt.
    Text(&'a str),
    /// A line with this text, whole.
    Line(&'a str),
}

/// Reads until it was said, within `patience`; returns the text and what stands behind it in its line.
pub(crate) fn wait(
    mut output: impl Read + Send + 'static,
    wanted: Until<'_>,
    patience: Duration,
) -> Result<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n) = output.read(&mut buffer) {
            if n == 0 || sender.send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    let until = Instant::now() + patience;
    let mut seen = Vec::new();
    loop {
        if let Some(line) = find(&seen, wanted) {
            return Ok(line);
        }
        match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(bytes) => seen.extend(bytes),
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "within {patience:?}; it said:\n{}",
                    String::from_utf8_lossy(&seen)
                )
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!(
                    "before it ended; it said:\n{}",
                    String::from_utf8_lossy(&seen)
                )
            }
        }
    }
}

fn find(seen: &[u8], wanted: Until<'_>) -> Option<String> {
    let seen = String::from_utf8_lossy(seen);
    match wanted {
        Until::Text(text) => seen.contains(text).then(|| text.to_owned()),
        Until::Line(text) => {
            let rest = &seen[seen.find(text)?..];
            rest.find('\n').map(|end| rest[..end].trim_end().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_when_it_is_whole() {
        let line = Until::Line("copy 1: ");
        assert_eq!(find(b"a\ncopy 1: 5", line), None);
        assert_eq!(
            find(b"a\ncopy 1: 5\r\n", line).as_deref(),
            Some("copy 1: 5")
        );
    }

    #[test]
    fn a_prompt_is_found_without_an_end() {
        assert_eq!(
            find(b"x\n/ # \x1b[6n", Until::Text("/ # ")).as_deref(),
            Some("/ # ")
        );
        assert_eq!(find(b"x\n/ ", Until::Text("/ # ")), None);
    }

    #[test]
    fn the_end_of_the_output_is_an_error_with_what_was_said() {
        let error = wait(
            &b"hello\n"[..],
            Until::Text("world"),
            Duration::from_secs(5),
        )
        .unwrap_err();
        assert!(error.to_string().contains("hello"), "{error}");
    }
}
