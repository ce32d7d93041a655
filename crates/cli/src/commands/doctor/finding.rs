//! One thing that was looked at.

use anyhow::Result;
use serde::Serialize;

use crate::output;

/// What was found, and what to do about it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) what: &'static str,
    pub(super) verdict: Verdict,
    pub(super) found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Good,
    /// Everything works; who has guests of several tenants should do better.
    Advice,
    /// Something does not work, the rest does.
    Limited,
    /// No VM runs.
    Bad,
}

impl Finding {
    pub(super) fn good(what: &'static str, found: impl Into<String>) -> Finding {
        Finding {
            what,
            verdict: Verdict::Good,
            found: found.into(),
            remedy: None,
        }
    }

    /// What is not good has a remedy. An error often has it at its end, and it is said once.
    pub(super) fn other(
        what: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        let (mut found, remedy) = (found.into(), remedy.into());
        if let Some(reason) = found.strip_suffix(&format!(": {remedy}")) {
            let reason = reason.strip_suffix("run").unwrap_or(reason);
            let reason = reason.strip_suffix(", or ").unwrap_or(reason);
            found = reason.trim_end_matches("; ").to_owned();
        }
        Finding {
            what,
            verdict,
            found,
            remedy: Some(remedy),
        }
    }

    pub(super) fn advice(
        what: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        Finding::other(what, Verdict::Advice, found, remedy)
    }

    pub(super) fn print(&self) -> Result<()> {
        let mark = match self.verdict {
            Verdict::Good => "ok  ",
            Verdict::Advice => "note",
            Verdict::Limited => "some",
            Verdict::Bad => "BAD ",
        };
        output::line(format!("{mark}  {:<16} {}", self.what, self.found))?;
        match &self.remedy {
            Some(remedy) => output::line(format!("{:22} -> {remedy}", "")),
            None => Ok(()),
        }
    }
}
