//! Fuzzing of what reads a stranger's bytes, with libFuzzer and the stable compiler.
//!
//! ```text
//! fuzz/fuzz_targets/<target>.rs ──built with coverage──► one process a target, one after the other
//!   fuzz/seeds/<target>/             what it starts from
//!   <target dir>/fuzz/corpus/…       inputs that led somewhere new, kept for the next time
//!   <target dir>/fuzz/findings/…     inputs that failed, kept until somebody removes them
//! ```

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::check::files;
use crate::workspace::Workspace;

/// What `cargo fuzz` gives the compiler, without a sanitizer: those need a nightly one.
const COVERAGE: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// An input that takes more of one of these is a finding: bytes, seconds, MiB.
const LIMITS: [&str; 3] = ["-max_len=8192", "-timeout=10", "-rss_limit_mb=256"];

/// For how long `cargo xtask soak` fuzzes each target, unless told otherwise.
pub(crate) const SECONDS: u32 = 600;

/// A target that failed.
pub(crate) struct Finding {
    /// Its name, and how it ended.
    pub(crate) name: String,
    /// The panic, and where the input is that led to it.
    pub(crate) said: Vec<String>,
}

/// What it takes and this machine lacks.
pub(crate) fn lacks() -> Option<String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let silent = Stdio::null;
    let asked = Command::new(&compiler)
        .arg("--version")
        .stdout(silent())
        .stderr(silent())
        .status();
    match asked {
        Ok(status) if status.success() => None,
        _ => Some(format!(
            "libFuzzer needs a C++ compiler, and {compiler} is none"
        )),
    }
}

/// Runs every target for so long, also after one failed; returns what failed.
pub(crate) fn run(workspace: &Workspace, seconds: u32) -> Result<Vec<Finding>> {
    let place = Place {
        sources: workspace.root.join("fuzz"),
        built: workspace.target.join("fuzz"),
        // What runs for seconds is not worth a minute of the compiler's.
        profile: if seconds < SECONDS {
            "brief"
        } else {
            "release"
        },
    };
    place.build(workspace)?;
    let mut failed = Vec::new();
    for target in place.targets()? {
        let fraction = match seconds < SECONDS {
            true => format!(" of the {SECONDS} of cargo xtask soak"),
            false => String::new(),
        };
        eprintln!("\n== fuzzing {target} for {seconds} s{fraction}");
        failed.extend(place.fuzz(&target, seconds)?);
    }
    Ok(failed)
}

struct Place {
    sources: PathBuf,
    built: PathBuf,
    profile: &'static str,
}

impl Place {
    fn targets(&self) -> Result<Vec<String>> {
        let sources = files(&self.sources.join("fuzz_targets"), "rs")?;
        let stems = sources.iter().filter_map(|path| path.file_stem()?.to_str());
        Ok(stems.map(str::to_owned).collect())
    }

    fn build(&self, workspace: &Workspace) -> Result<()> {
        let status = workspace
            .cargo()
            .args(["build", "--profile", self.profile, "--locked", "--bins"])
            // Named, so that build scripts and macros are built without coverage.
            .args(["--target", &triple()])
            .arg("--manifest-path")
            .arg(self.sources.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&self.built)
            .env("RUSTFLAGS", COVERAGE)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .status()?;
        ensure!(status.success(), "the fuzz targets do not build");
        Ok(())
    }

    /// Fuzzes one target; `None` if nothing was found.
    fn fuzz(&self, target: &str, seconds: u32) -> Result<Option<Finding>> {
        let corpus = made(self.built.join("corpus").join(target))?;
        let findings = made(self.built.join("findings").join(target))?;
        let log = self.built.join(format!("{target}.log"));
        let program = self.built.join(triple()).join(self.profile).join(target);
        let status = Command::new(program)
            .args([corpus, self.sources.join("seeds").join(target)])
            .args(LIMITS)
            .arg("-print_final_stats=1")
            .arg(format!("-max_total_time={seconds}"))
            // A directory, which it only takes for one by the slash.
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .stderr(File::create(&log).context("a log of the fuzzer")?)
            .status()
            .with_context(|| format!("cannot run the fuzz target {target}"))?;
        let said = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let said = String::from_utf8_lossy(&said);
        let told = telling(&said, status.success());
        for line in &told {
            eprintln!("{line}");
        }
        Ok((!status.success()).then(|| Finding {
            name: format!("fuzz target {target} ({status})"),
            said: told.into_iter().map(str::to_owned).collect(),
        }))
    }
}

fn made(directory: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

fn triple() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

/// What is worth telling of the fuzzer's many words: its counts, or what it found and where it wrote the input.
fn telling(said: &str, fine: bool) -> Vec<&str> {
    let counts = ["stat::number_of", "stat::slowest", "stat::peak"];
    if fine {
        let is_count = |line: &&str| counts.iter().any(|count| line.starts_with(count));
        return said.lines().filter(is_count).collect();
    }
    let found = |line: &&str| line.contains("panicked at") || line.contains("ERROR: libFuzzer");
    let written = said.lines().find(|line| line.contains("written to "));
    let story = said.lines().skip_while(|line| !found(line)).take(30);
    story.chain(written).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fuzz_target_has_something_to_start_from() {
        let sources = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz"));
        let place = Place {
            built: PathBuf::new(),
            sources,
            profile: "brief",
        };
        let targets = place.targets().unwrap();
        assert!(!targets.is_empty());
        let manifest = fs::read_to_string(place.sources.join("Cargo.toml")).unwrap();
        for target in targets {
            let seeds = place.sources.join("seeds").join(&target);
            assert!(fs::read_dir(seeds).unwrap().count() > 0, "{target}");
            assert!(
                manifest.contains(&format!("name = \"{target}\"")),
                "{target}"
            );
        }
    }

    #[test]
    fn of_the_fuzzers_words_the_counts_or_the_failure_are_told() {
        let said = "INFO: Seed: 1\n#2 INITED cov: 3\n#4 NEW cov: 4\n\
            stat::number_of_executed_units: 4\nstat::new_units_added: 1\n";
        assert_eq!(telling(said, true), ["stat::number_of_executed_units: 4"]);
        let said = "#4 NEW\npanicked at x\nby y\nTest unit written to /z/crash-1\n";
        assert_eq!(telling(said, false)[..2], ["panicked at x", "by y"]);
        assert_eq!(
            telling(said, false).last(),
            Some(&"Test unit written to /z/crash-1")
        );
    }
}
