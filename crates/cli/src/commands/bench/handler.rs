//! The hidden `rekindle bench handler`: a baseline as a process of its own, so that the scheduler treats it as it does a
//! real one.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use rekindle_pager::Socket;
use rekindle_pager::baseline::{self, Handler, Wait};

/// Serves one VM as simply as Firecracker's examples do
#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    memory: PathBuf,
    #[arg(long)]
    kind: Kind,
}

/// Which baseline.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum Kind {
    Page,
    Spin,
    Whole,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Page => "page",
            Kind::Spin => "spin",
            Kind::Whole => "whole",
        }
    }

    fn handler(self) -> Handler {
        match self {
            Kind::Page => Handler::PageAtATime { wait: Wait::Block },
            Kind::Spin => Handler::PageAtATime { wait: Wait::Spin },
            Kind::Whole => Handler::CopyEverything,
        }
    }
}

impl Serve {
    pub(super) fn run(&self) -> Result<()> {
        let socket = Socket::Path(self.socket.clone());
        baseline::serve(self.kind.handler(), socket, &self.memory, |ready| {
            let mut out = io::stdout();
            let line = serde_json::to_string(ready).unwrap_or_default();
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn a_kind_is_called_what_the_command_line_calls_it() {
        for kind in Kind::value_variants() {
            assert_eq!(kind.to_possible_value().unwrap().get_name(), kind.name());
        }
    }
}
