//! Where the stories with Linux guests are played: the lab, started anew when its own kernel crashes.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result};
use rekindle_assets::lab::{Options, Outcome};
use rekindle_assets::{Assets, Lab};

use super::transcript::Transcript;
use super::{E2E, LAB_TARGET, Target, Tee, e2e_targets};
use crate::workspace::Workspace;
use crate::{assets, lab};

/// What it takes to play the test target [`LAB_TARGET`].
pub(crate) struct Stage {
    target: Target,
    lab: Lab,
    options: Options,
}

impl Stage {
    /// For the target as it is built now.
    pub(crate) fn open(
        workspace: &Workspace,
        assets: &Assets,
        environment: Vec<(String, String)>,
        timeout: Duration,
    ) -> Result<Stage> {
        let target = e2e_targets(workspace)?
            .into_iter()
            .find(|target| target.name == LAB_TARGET)
            .with_context(|| format!("{E2E} has no test target {LAB_TARGET}"))?;
        Stage::of(workspace, assets, target, environment, timeout)
    }

    /// For this target; `timeout` is for each start of the lab.
    pub(super) fn of(
        workspace: &Workspace,
        assets: &Assets,
        target: Target,
        mut environment: Vec<(String, String)>,
        timeout: Duration,
    ) -> Result<Stage> {
        environment.extend(lab::inherited());
        let options = Options {
            directory: target.directory.clone(),
            timeout: Some(timeout),
            ..lab::options(workspace, environment)
        };
        let lab = assets.lab()?;
        Ok(Stage {
            target,
            lab,
            options,
        })
    }

    /// Plays the stories that have this in their names, and tells what failed. There has to be one, and none may be
    /// skipped.
    pub(crate) fn play_whole(&self, name: &str) -> Result<Option<String>> {
        let (failure, transcript) = self.play(&[name])?;
        let none = || format!("no story is called {name:?}");
        let failure = failure.or((transcript.begun_tests == 0).then(none));
        let skipped = transcript.skipped.into_iter().next();
        Ok(failure.or(skipped.map(|story| format!("skipped: {story}"))))
    }

    /// Plays what `arguments` choose. What it printed is passed on, and what failed is told in a few words.
    pub(super) fn play(&self, arguments: &[&str]) -> Result<(Option<String>, Transcript)> {
        let mut command = vec![assets::text(&self.target.executable)?];
        command.extend(arguments.iter().map(ToString::to_string));
        let mut tee = Tee::new(io::stdout());
        let why = match self.lab.run(&command, &self.options, &mut tee)? {
            Outcome::Exited(0) => None,
            Outcome::Exited(status) => Some(format!("status {status} in the lab")),
            Outcome::TimedOut => {
                let timeout = self.options.timeout.unwrap_or_default();
                Some(format!("the lab was ended after {timeout:?}"))
            }
        };
        Ok((why, tee.end()))
    }
}
