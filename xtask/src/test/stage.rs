//! Where the stories with Linux guests are played: the lab, started anew when its own kernel crashes.

use std::io::{self, LineWriter};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rekindle_assets::lab::{Options, Outcome};
use rekindle_assets::{Assets, Lab};

use super::transcript::Transcript;
use super::{E2E, LAB_TARGET, Target, Tee, e2e_targets};
use crate::workspace::Workspace;
use crate::{assets, lab};

/// How many labs at the most share the stories. A lab has one CPU, and 3 GiB of memory.
const LABS: usize = 2;

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

    /// Plays the stories that have this in their names, and tells what failed. None may be skipped.
    pub(crate) fn play_whole(&self, name: &str) -> Result<Option<String>> {
        let (failure, transcript) = self.play(&[name])?;
        let skipped = transcript.skipped.into_iter().next();
        Ok(failure.or(skipped.map(|story| format!("skipped: {story}"))))
    }

    /// Plays all stories, in labs side by side where there are CPUs for them; what each lab had to tell.
    pub(super) fn play_all(&self) -> Result<Vec<(Option<String>, Transcript)>> {
        let stories = self.stories()?;
        let labs = thread::available_parallelism()?.get().min(LABS);
        thread::scope(|scope| {
            let labs: Vec<_> = (0..labs)
                .map(|lab| others(&stories, lab, labs))
                .map(|others| {
                    scope.spawn(move || {
                        let mut arguments = vec!["--show-output", "--exact"];
                        arguments.extend(others.iter().flat_map(|name| ["--skip", name]));
                        self.play(&arguments)
                    })
                })
                .collect();
            let ends = labs.into_iter().map(|lab| match lab.join() {
                Ok(end) => end,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            ends.collect()
        })
    }

    /// The names of all stories.
    fn stories(&self) -> Result<Vec<String>> {
        let program = &self.target.executable;
        let listed = Command::new(program)
            .args(["--list", "--format=terse"])
            .output()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let text = String::from_utf8(listed.stdout).context("the names of the stories")?;
        let stories: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .map(str::to_owned)
            .collect();
        ensure!(!stories.is_empty(), "{} has no stories", program.display());
        Ok(stories)
    }

    /// Plays what `arguments` choose. What it printed is passed on, and what failed is told in a few words.
    pub(super) fn play(&self, arguments: &[&str]) -> Result<(Option<String>, Transcript)> {
        let mut command = vec![assets::text(&self.target.executable)?];
        command.extend(arguments.iter().map(ToString::to_string));
        // Whole lines, since another lab may speak as well.
        let mut tee = Tee::new(LineWriter::new(io::stdout()));
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

/// What one of so many labs leaves to the others. Stories are dealt out like cards: long ones stand together in a file.
fn others(stories: &[String], lab: usize, labs: usize) -> Vec<&str> {
    let dealt = stories.iter().enumerate();
    dealt
        .filter(|(n, _)| n % labs != lab)
        .map(|(_, name)| name.as_str())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::others;

    #[test]
    fn each_story_is_played_in_one_lab() {
        let stories = ["a", "b", "c"].map(str::to_owned);
        assert_eq!(others(&stories, 0, 2), ["b"]);
        assert_eq!(others(&stories, 1, 2), ["a", "c"]);
        assert_eq!(others(&stories, 0, 1), [""; 0]);
    }
}
