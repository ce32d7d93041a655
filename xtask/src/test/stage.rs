//! Where the stories with Linux guests are played: a lab for each processor, at the most two, started anew when its own
//! kernel crashes.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rekindle_assets::lab::{Options, Outcome};
use rekindle_assets::{Assets, Lab};

use super::transcript::Transcript;
use super::{E2E, LAB_TARGET, Target, Tee, e2e_targets};
use crate::workspace::Workspace;
use crate::{assets, lab};

/// More labs at once are not worth their memory.
const MOST_LABS: usize = 2;
/// What tells a test program of ours which part of its stories it plays.
const PART: &str = "REKINDLE_PART";

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
            // There may be two, and they have nothing to ask.
            terminal: false,
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
    fn play(&self, arguments: &[&str]) -> Result<(Option<String>, Transcript)> {
        self.play_in(&self.options, arguments, io::stdout())
    }

    /// Plays all stories, each lab a part of them at the same time. Tells of each what [`Stage::play`] does.
    pub(super) fn play_all(&self) -> Result<Vec<(Option<String>, Transcript)>> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let parts = processors.min(MOST_LABS);
        let play = |n: usize| {
            let mut options = self.options.clone();
            let part = (PART.to_owned(), format!("{n}/{parts}"));
            options.environment.push(part);
            self.play_in(&options, &["--show-output"], Lines::default())
        };
        thread::scope(|scope| {
            let labs: Vec<_> = (1..=parts).map(|n| scope.spawn(move || play(n))).collect();
            let ends = labs.into_iter().map(|lab| lab.join());
            ends.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }

    fn play_in(
        &self,
        options: &Options,
        arguments: &[&str],
        output: impl Write,
    ) -> Result<(Option<String>, Transcript)> {
        let mut command = vec![assets::text(&self.target.executable)?];
        command.extend(arguments.iter().map(ToString::to_string));
        let mut tee = Tee::new(output);
        let why = match self.lab.run(&command, options, &mut tee)? {
            Outcome::Exited(0) => None,
            Outcome::Exited(status) => Some(format!("status {status} in the lab")),
            Outcome::TimedOut => {
                let timeout = options.timeout.unwrap_or_default();
                Some(format!("the lab was ended after {timeout:?}"))
            }
        };
        Ok((why, tee.end()))
    }
}

/// Standard output, a line at a time: two labs print at once.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        if let Some(end) = self.0.iter().rposition(|byte| *byte == b'\n') {
            let lines: Vec<u8> = self.0.drain(..=end).collect();
            io::stdout().lock().write_all(&lines)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        // A lab that died in the middle of a line.
        let _ = io::stdout().write_all(&self.0);
    }
}
