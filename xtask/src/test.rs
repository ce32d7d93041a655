//! `cargo xtask test`: every test, and what was skipped.
//!
//! ```text
//! assets ─> cargo test (all but e2e) ─> e2e built ─┬─ each test target ─> here
//!                                                  └─ the one named lab ─> in the lab
//! ```
//!
//! A test that lacks something prints `SKIPPED <test>: <reason>` and passes; the lines are
//! repeated at the end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rekindle_assets::Assets;
use rekindle_assets::lab::{Options, Outcome};
use serde::Deserialize;

use crate::workspace::Workspace;
use crate::{assets, lab};

const E2E: &str = "rekindle-e2e";
const PROGRAM: &str = "rekindle";
/// The test target of [`E2E`] that runs in the lab.
const LAB_TARGET: &str = "lab";
const LAB_TIMEOUT: Duration = Duration::from_secs(15 * 60);

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
    failed: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let start = Instant::now();
    let assets = assets::open(workspace)?;
    let environment = environment(workspace, &assets)?;
    let mut summary = Summary::default();

    let mut cargo = workspace.cargo();
    cargo.args([
        "test",
        "--workspace",
        "--exclude",
        E2E,
        "--no-fail-fast",
        "--",
        "--show-output",
    ]);
    summary.native("cargo test", cargo.envs(environment.iter().cloned()))?;

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
            let lab = assets.lab()?;
            let options = Options {
                cpus: 2,
                memory_mib: 3072,
                share: lab::share(workspace),
                directory: target.directory,
                environment: environment
                    .iter()
                    .cloned()
                    .chain(lab::inherited())
                    .collect(),
                timeout: Some(LAB_TIMEOUT),
                tries: 3,
            };
            let command = [assets::text(&target.executable)?, "--show-output".into()];
            summary.in_lab(&name, &lab, &command, &options)?;
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
    let status = workspace
        .cargo()
        .args(["build", "--workspace", "--bin", PROGRAM])
        .status()?;
    anyhow::ensure!(status.success(), "{PROGRAM} does not build");
    assets::text(&workspace.target.join("debug").join(PROGRAM))
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
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let stdout = child.stdout.take().context("the output is a pipe")?;
        self.pass_on(stdout)?;
        let status = child.wait()?;
        if !status.success() {
            self.failed.push(format!("{name} ({status})"));
        }
        Ok(())
    }

    /// Runs tests in the lab.
    fn in_lab(
        &mut self,
        name: &str,
        lab: &rekindle_assets::Lab,
        command: &[String],
        options: &Options,
    ) -> Result<()> {
        eprintln!("\n== {name}, in the lab");
        let mut tee = Tee::new(io::stdout(), self);
        let outcome = lab.run(command, options, &mut tee)?;
        match outcome {
            Outcome::Exited(0) => {}
            Outcome::Exited(status) => self
                .failed
                .push(format!("{name} (status {status} in the lab)")),
            Outcome::TimedOut => self
                .failed
                .push(format!("{name} (the lab was ended after {LAB_TIMEOUT:?})")),
        }
        Ok(())
    }

    fn pass_on(&mut self, output: impl Read) -> Result<()> {
        let mut tee = Tee::new(io::stdout(), self);
        let mut output = BufReader::new(output);
        loop {
            let chunk = output.fill_buf()?;
            let length = chunk.len();
            if length == 0 {
                return Ok(());
            }
            tee.write_all(chunk)?;
            output.consume(length);
        }
    }

    fn line(&mut self, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        if let Some(skipped) = line.trim().strip_prefix("SKIPPED ") {
            self.skipped.push(skipped.to_owned());
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
        for failed in &self.failed {
            eprintln!("FAILED   {failed}");
        }
        if self.failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Passes output on as it comes, and looks for skipped tests.
struct Tee<'a, W> {
    output: W,
    line: Vec<u8>,
    summary: &'a mut Summary,
}

impl<'a, W> Tee<'a, W> {
    fn new(output: W, summary: &'a mut Summary) -> Self {
        Self {
            output,
            line: Vec::new(),
            summary,
        }
    }
}

impl<W: Write> Write for Tee<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.write_all(bytes)?;
        for byte in bytes {
            if *byte == b'\n' {
                self.summary.line(&std::mem::take(&mut self.line));
            } else {
                self.line.push(*byte);
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

    #[test]
    fn skipped_tests_are_found_however_the_output_is_cut() {
        let mut summary = Summary::default();
        let mut tee = Tee::new(io::sink(), &mut summary);
        for part in [
            "test a ... ok\nSKIP",
            "PED boots_linux: no KVM\r\n",
            "not SKIPPED here\n",
        ] {
            tee.write_all(part.as_bytes()).unwrap();
        }
        assert_eq!(summary.skipped, ["boots_linux: no KVM"]);
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
