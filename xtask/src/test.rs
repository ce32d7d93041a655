//! `cargo xtask test`: every test, and what was skipped.
//!
//! ```text
//! assets ─> cargo test (all but e2e) ─> fuzz targets, briefly ─> e2e built ─┬─ each test target ─> here
//!                                                                            └─ the one named lab ─> in two labs
//! ```
//!
//! A test that lacks something prints `SKIPPED <test>: <reason>` and passes; the lines are
//! repeated at the end, and after them each failed test with what it said.

mod stage;
mod transcript;

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rekindle_assets::Assets;
use serde::Deserialize;

pub(crate) use self::stage::Stage;
use self::transcript::{Failure, Tail, Transcript, plain};
use crate::workspace::{Package, Workspace};
use crate::{assets, fuzz};

const E2E: &str = "rekindle-e2e";
const PROGRAM: &str = "rekindle";
/// The test target of [`E2E`] that runs in the lab.
const LAB_TARGET: &str = "lab";
const LAB_TIMEOUT: Duration = Duration::from_secs(70 * 60);
/// For how long each target is fuzzed; the soak takes longer.
const FUZZ_SECONDS: u32 = 5;
/// Of so many failures the output is repeated; more would bury it again.
const REPEATED: usize = 20;
/// How long standard error may stay open behind a step, in hands that outlived it.
const LAST_WORDS: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Leaves out the stories in the lab
    #[arg(long)]
    no_lab: bool,
}

/// What is told at the end.
#[derive(Default)]
struct Summary {
    skipped: Vec<String>,
    failed: Vec<Step>,
}

/// A step that failed.
struct Step {
    /// Its name, and how it ended.
    name: String,
    failures: Vec<Failure>,
    /// The last lines of all.
    last: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let start = Instant::now();
    let assets = assets::open(workspace)?;
    let environment = environment(workspace, &assets)?;
    let mut summary = Summary::default();

    let mut cargo = workspace.cargo();
    // All packages, for the same features: leaving one out would build what they depend on once more.
    cargo.args(["test", "--workspace", "--no-fail-fast", "--lib", "--bins"]);
    for name in other_tests(&workspace.packages) {
        cargo.args(["--test", name]);
    }
    cargo.args(["--", "--show-output"]);
    summary.native("cargo test", cargo.envs(environment.iter().cloned()))?;
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--workspace", "--no-fail-fast", "--doc"]);
    summary.native("cargo test --doc", cargo.envs(environment.iter().cloned()))?;

    summary.fuzz(workspace);

    let targets = e2e_targets(workspace)?;
    if !targets.iter().any(|target| target.name == LAB_TARGET) {
        let reason = format!("{E2E}, {LAB_TARGET}: there is no such test target");
        summary.skipped.push(reason);
    }
    for target in targets {
        let name = format!("{E2E}, {}", target.name);
        if target.name != LAB_TARGET {
            let mut test = Command::new(&target.executable);
            test.arg("--show-output").current_dir(&target.directory);
            summary.native(&name, test.envs(environment.iter().cloned()))?;
        } else if arguments.no_lab {
            summary.skipped.push(format!("{name}: --no-lab was given"));
        } else {
            let environment = environment.clone();
            let stage = Stage::of(workspace, &assets, target, environment, LAB_TIMEOUT)?;
            summary.in_lab(&name, &stage)?;
        }
    }
    Ok(summary.tell(start.elapsed()))
}

/// What the tests find everything by, the program under test included.
pub(crate) fn environment(workspace: &Workspace, assets: &Assets) -> Result<Vec<(String, String)>> {
    let mut environment = assets::environment(workspace, assets)?;
    environment.push(("REKINDLE_BIN".into(), build_program(workspace)?));
    Ok(environment)
}

/// Builds the program, which the stories run, and tells where it is.
fn build_program(workspace: &Workspace) -> Result<String> {
    // With all tests: alone it would need other features of what both depend on, and that be built twice.
    let status = workspace
        .cargo()
        .args(["build", "--workspace", "--bin", PROGRAM, "--tests"])
        .status()?;
    anyhow::ensure!(status.success(), "{PROGRAM} does not build");
    assets::text(&workspace.target.join("debug").join(PROGRAM))
}

/// The test targets of all packages but the e2e one.
fn other_tests(packages: &[Package]) -> impl Iterator<Item = &str> {
    let others = packages.iter().filter(|package| package.name != E2E);
    let targets = others.flat_map(|package| &package.targets);
    let tests = targets.filter(|target| target.kind.iter().any(|kind| kind == "test"));
    tests.map(|target| target.name.as_str())
}

/// A test program of the e2e package.
struct Target {
    name: String,
    executable: PathBuf,
    directory: PathBuf,
}

#[derive(Deserialize)]
struct Message {
    manifest_path: Option<PathBuf>,
    target: Option<MessageTarget>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct MessageTarget {
    name: String,
    kind: Vec<String>,
}

/// Everything is built in one go, so that all share what they depend on.
fn is_of_e2e(manifest: &Path) -> bool {
    manifest.ends_with("tests/e2e/Cargo.toml")
}

fn e2e_targets(workspace: &Workspace) -> Result<Vec<Target>> {
    let output = workspace
        .cargo()
        .args([
            "test",
            "--workspace",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .stderr(Stdio::inherit())
        .output()?;
    anyhow::ensure!(output.status.success(), "{E2E} does not build");
    targets(&output.stdout)
}

fn targets(messages: &[u8]) -> Result<Vec<Target>> {
    let mut found = Vec::new();
    for line in messages.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let message = serde_json::from_slice::<Message>(line).context("cargo's messages")?;
        if let (Some(manifest), Some(target), Some(executable)) =
            (message.manifest_path, message.target, message.executable)
            && is_of_e2e(&manifest)
            && target.kind.iter().any(|kind| kind == "test")
        {
            let directory = manifest
                .parent()
                .context("a manifest lies in a directory")?
                .to_owned();
            found.push(Target {
                name: target.name,
                executable,
                directory,
            });
        }
    }
    Ok(found)
}

impl Summary {
    /// Runs tests here.
    fn native(&mut self, name: &str, command: &mut Command) -> Result<()> {
        eprintln!("\n== {name}");
        if io::stderr().is_terminal() {
            // What it says passes through a pipe, and is still for this terminal.
            command.env("CARGO_TERM_COLOR", "always");
        }
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let errors = pass_on_errors(&mut child)?;
        let stdout = child.stdout.take().context("the output is a pipe")?;
        let transcript = pass_on(stdout, io::stdout())?;
        let status = child.wait()?;
        let errors = errors.recv_timeout(LAST_WORDS).unwrap_or_default();
        let failure = (!status.success()).then(|| format!("{name} ({status})"));
        self.add(transcript, failure, errors);
        Ok(())
    }

    /// Fuzzes each target for a moment.
    fn fuzz(&mut self, workspace: &Workspace) {
        if let Some(lacks) = fuzz::lacks() {
            self.skipped.push(format!("fuzz targets: {lacks}"));
            return;
        }
        let step = |name, last| Step {
            name,
            failures: Vec::new(),
            last,
        };
        match fuzz::run(workspace, FUZZ_SECONDS) {
            Ok(found) => self
                .failed
                .extend(found.into_iter().map(|found| step(found.name, found.said))),
            Err(why) => self
                .failed
                .push(step("fuzz targets".into(), vec![format!("{why:#}")])),
        }
    }

    /// Runs tests in the lab.
    fn in_lab(&mut self, name: &str, stage: &Stage) -> Result<()> {
        eprintln!("\n== {name}, in the lab");
        for (failure, transcript) in stage.play_all()? {
            let failure = failure.map(|why| format!("{name} ({why})"));
            self.add(transcript, failure, Tail::default());
        }
        Ok(())
    }

    /// Keeps of a step what is told at the end.
    fn add(&mut self, transcript: Transcript, failure: Option<String>, errors: Tail) {
        let mut last: Vec<String> = errors.lines().map(str::to_owned).collect();
        if transcript.failures.is_empty() {
            last.extend(transcript.tail().map(str::to_owned));
        }
        self.skipped.extend(transcript.skipped);
        if let Some(name) = failure {
            self.failed.push(Step {
                name,
                failures: transcript.failures,
                last,
            });
        }
    }

    fn tell(mut self, took: Duration) -> ExitCode {
        self.skipped.sort();
        self.skipped.dedup();
        eprintln!(
            "\n== done in {} s; skipped: {}",
            took.as_secs(),
            self.skipped.len()
        );
        for skipped in &self.skipped {
            eprintln!("skipped  {skipped}");
        }
        eprint!("{}", repeat(&self.failed));
        if self.failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Everything that failed and what it said, and all names once more behind that: whoever sees the last lines of an
/// output learns what failed, and a few lines above why.
fn repeat(failed: &[Step]) -> String {
    let mut text = String::new();
    let mut left = REPEATED;
    for step in failed {
        for failure in step.failures.iter().take(left) {
            text += &format!("\n== {}: {}\n", step.name, failure.name);
            text.extend(failure.said.lines().map(|line| format!("   {line}\n")));
        }
        left = left.saturating_sub(step.failures.len());
        if !step.last.is_empty() {
            text += &format!("\n== {}: its last lines\n", step.name);
            text.extend(step.last.iter().map(|line| format!("   {line}\n")));
        }
    }
    if !failed.is_empty() {
        text.push('\n');
    }
    for step in failed {
        for failure in &step.failures {
            text += &format!("FAILED   {}: {}\n", step.name, failure.name);
        }
        if step.failures.is_empty() {
            text += &format!("FAILED   {}\n", step.name);
        }
    }
    text
}

/// Passes standard error on as it comes, on a thread; its last lines are sent when it ends.
fn pass_on_errors(child: &mut Child) -> Result<mpsc::Receiver<Tail>> {
    let mut errors = BufReader::new(child.stderr.take().context("standard error is a pipe")?);
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut tail = Tail::default();
        let mut line = Vec::new();
        while errors.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let _ = io::stderr().write_all(&line);
            tail.push(&plain(String::from_utf8_lossy(&line).trim_end()));
            line.clear();
        }
        // Nobody waits for it behind the end of the step.
        let _ = sender.send(tail);
    });
    Ok(receiver)
}

/// Passes output on as it comes, to its end.
fn pass_on(mut from: impl Read, to: impl Write) -> Result<Transcript> {
    let mut tee = Tee::new(to);
    io::copy(&mut from, &mut tee)?;
    Ok(tee.end())
}

/// Passes output on as it comes, without what tests that passed have printed, and reads it.
struct Tee<W> {
    output: W,
    line: Vec<u8>,
    transcript: Transcript,
}

impl<W: Write> Tee<W> {
    fn new(output: W) -> Self {
        Self {
            output,
            line: Vec::new(),
            transcript: Transcript::default(),
        }
    }

    fn end(mut self) -> Transcript {
        if !self.line.is_empty() {
            self.transcript.line(&self.line);
        }
        self.transcript.end();
        self.transcript
    }

    /// A line is whole, and was shown as it came unless it is `hidden`.
    fn line(&mut self, hidden: bool) -> io::Result<()> {
        let line = std::mem::take(&mut self.line);
        let known = self.transcript.skipped.len();
        self.transcript.line(&line);
        let is_skip = self.transcript.skipped.len() > known;
        if hidden && (is_skip || self.transcript.is_shown()) {
            self.output.write_all(&line)?;
            self.output.write_all(b"\n")?;
        }
        Ok(())
    }
}

impl<W: Write> Write for Tee<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let hidden = !self.transcript.is_shown();
            if !hidden {
                self.output.write_all(piece)?;
            }
            match piece.strip_suffix(b"\n") {
                None => self.line.extend_from_slice(piece),
                Some(end) => {
                    self.line.extend_from_slice(end);
                    self.line(hidden)?;
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tee(parts: &[&str]) -> (String, Transcript) {
        let mut output = Vec::new();
        let mut tee = Tee::new(&mut output);
        for part in parts {
            tee.write_all(part.as_bytes()).unwrap();
        }
        let transcript = tee.end();
        (String::from_utf8(output).unwrap(), transcript)
    }

    #[test]
    fn skipped_tests_are_found_however_the_output_is_cut() {
        let parts = [
            "test a ... ok\nSKIP",
            "PED boots_linux: no KVM\r\n",
            "not SKIPPED here\n",
        ];
        let (output, transcript) = tee(&parts);
        assert_eq!(transcript.skipped, ["boots_linux: no KVM"]);
        assert_eq!(output, parts.concat());
    }

    #[test]
    fn what_tests_that_passed_have_printed_is_left_out() {
        let (output, _) = tee(&[
            "running 2 tests\ntest a ... ok\ntest b ... ok\n\nsuccesses:\n\n---- a stdout ----\npan",
            "icked at x.rs\n---- b stdout ----\nSKIPPED b: no KVM\n\nsuccesses:\n    a\n",
            "\ntest result: ok. 2 passed\n",
        ]);
        assert_eq!(
            output,
            "running 2 tests\ntest a ... ok\ntest b ... ok\n\nsuccesses:\nSKIPPED b: no KVM\n\
             test result: ok. 2 passed\n"
        );
    }

    #[test]
    fn the_last_lines_name_what_failed_and_above_them_is_why() {
        let (_, transcript) = tee(&[
            "running 1 test\ntest a ... FAILED\n\nfailures:\n\n---- a stdout ----\nno guest\n",
            "\nfailures:\n    a\n\ntest result: FAILED.\n",
        ]);
        let mut summary = Summary::default();
        summary.add(transcript, Some("unit (1)".into()), Tail::default());
        let mut errors = Tail::default();
        errors.push("error: does not build");
        summary.add(Transcript::default(), Some("e2e (101)".into()), errors);
        summary.add(Transcript::default(), None, Tail::default());
        let text = repeat(&summary.failed);
        assert!(text.contains("== unit (1): a\n   no guest\n"), "{text}");
        assert!(text.contains("   error: does not build\n"), "{text}");
        assert!(
            text.ends_with("\nFAILED   unit (1): a\nFAILED   e2e (101)\n"),
            "{text}"
        );
        assert_eq!(repeat(&[]), "");
    }

    #[test]
    fn test_programs_are_found_among_cargos_messages() {
        let messages = br#"
{"reason":"compiler-artifact","manifest_path":"/r/tests/e2e/Cargo.toml","target":{"name":"rekindle_e2e","kind":["lib"]},"executable":"/t/rekindle_e2e-1"}
{"reason":"compiler-artifact","manifest_path":"/r/tests/e2e/Cargo.toml","target":{"name":"lab","kind":["test"]},"executable":"/t/lab-1"}
{"reason":"compiler-artifact","manifest_path":"/r/tests/kit/Cargo.toml","target":{"name":"guests","kind":["test"]},"executable":"/t/guests-1"}
{"reason":"build-finished","success":true}
"#;
        let targets = targets(messages).unwrap();
        let [lab] = &targets[..] else {
            panic!("{} targets", targets.len())
        };
        assert_eq!(
            (lab.name.as_str(), lab.executable.to_str()),
            ("lab", Some("/t/lab-1"))
        );
        assert_eq!(lab.directory.to_str(), Some("/r/tests/e2e"));
    }
}
