//! What a command came to.

use std::process::{Child, Output};

use anyhow::{Context, ensure};

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct Said {
    /// The command, as it was given.
    pub line: String,
    /// Its exit status; absent if a signal ended it.
    pub status: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Said {
    pub(crate) fn new(line: String, output: &Output) -> Said {
        Said {
            line,
            status: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// What a command that was started with its output piped comes to; waits for its end.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn of(child: Child, line: String) -> anyhow::Result<Said> {
        let output = child.wait_with_output()?;
        Ok(Said::new(line, &output))
    }

    /// Its output, if it did what it was told.
    ///
    /// # Errors
    /// When it did not, with what it said instead.
    pub fn done(self) -> anyhow::Result<String> {
        ensure!(self.status == Some(0), "{self:?}");
        Ok(self.out)
    }

    /// Its output as JSON, if it did what it was told.
    ///
    /// # Errors
    /// When it did not, or it is no JSON.
    pub fn json(self) -> anyhow::Result<serde_json::Value> {
        let line = self.line.clone();
        let out = self.done()?;
        serde_json::from_str(&out).with_context(|| format!("`{line}` printed no JSON: {out:?}"))
    }

    /// Its error, if it refused with that status: one message on standard error, nothing on standard output.
    ///
    /// # Errors
    /// When it did otherwise.
    pub fn refused(self, status: i32) -> anyhow::Result<String> {
        ensure!(self.status == Some(status), "not status {status}: {self:?}");
        ensure!(self.out.is_empty(), "a refusal printed {:?}", self.out);
        // Wrong usage is told by the parser, in its own way.
        if status != 2 {
            let lines: Vec<&str> = self.err.lines().collect();
            ensure!(lines.len() == 1, "not one line: {:?}", self.err);
            ensure!(lines[0].starts_with("rekindle: "), "{:?}", self.err);
            ensure!(!repeats(lines[0]), "it repeats itself: {:?}", self.err);
        }
        Ok(self.err)
    }
}

/// Whether an error's chain says the same twice.
fn repeats(error: &str) -> bool {
    let parts: Vec<&str> = error.split(": ").collect();
    parts.windows(2).any(|pair| pair[0] == pair[1])
}

#[cfg(test)]
mod tests {
    use super::{Said, repeats};

    fn said(status: i32, out: &str, err: &str) -> Said {
        Said {
            line: "ps".into(),
            status: Some(status),
            out: out.into(),
            err: err.into(),
        }
    }

    #[test]
    fn a_refusal_is_one_message_with_the_right_status() {
        assert!(
            said(1, "", "rekindle: no VM is called x\n")
                .refused(1)
                .is_ok()
        );
        assert!(
            said(1, "", "rekindle: no VM is called x\n")
                .refused(125)
                .is_err()
        );
        assert!(said(1, "x\n", "rekindle: no\n").refused(1).is_err());
        assert!(said(1, "", "rekindle: one\ntwo\n").refused(1).is_err());
        assert!(said(1, "", "panicked at x.rs\n").refused(1).is_err());
        assert!(said(0, "[]", "").json().is_ok());
    }

    #[test]
    fn an_error_that_repeats_its_cause_is_seen() {
        assert!(repeats("rekindle: cannot read x: cannot read x: gone"));
        assert!(!repeats("rekindle: cannot read x: gone"));
    }
}
