//! `cargo xtask check`: what a change must pass before anybody reads it.
//!
//! Every check runs, also after one failed; the findings are listed at the end.

mod arrows;
mod paths;
mod programs;
mod sizes;
mod unused;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// What is wrong, one line each.
type Findings = Vec<String>;

pub(crate) fn run(workspace: &Workspace) -> Result<ExitCode> {
    let mut fmt = workspace.cargo();
    fmt.args(["fmt", "--all", "--check"]);
    let mut clippy = workspace.cargo();
    clippy.args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    // A workspace of its own. libFuzzer is not needed to look at it.
    let fuzz = workspace.root.join("fuzz/Cargo.toml");
    let mut fuzz_fmt = workspace.cargo();
    fuzz_fmt
        .args(["fmt", "--check", "--manifest-path"])
        .arg(&fuzz);
    let mut fuzz_clippy = workspace.cargo();
    fuzz_clippy
        .args([
            "clippy",
            "--quiet",
            "--locked",
            "--no-default-features",
            "--manifest-path",
        ])
        .arg(&fuzz)
        .arg("--target-dir")
        .arg(&workspace.target)
        .args(["--", "-D", "warnings"]);
    let mut doc = workspace.cargo();
    doc.args(["doc", "--quiet", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings");

    let checks = [
        ("format", program(&mut fmt)?),
        ("lints", program(&mut clippy)?),
        ("format of the fuzz targets", program(&mut fuzz_fmt)?),
        ("lints of the fuzz targets", program(&mut fuzz_clippy)?),
        ("docs", program(&mut doc)?),
        ("dependency arrows", arrows::check(workspace)),
        ("unused dependencies", unused::check(workspace)?),
        ("paths named in docs", paths::check(workspace)?),
        ("programs started", programs::check(workspace)?),
        ("file sizes", sizes::check(workspace)?),
    ];
    let mut code = ExitCode::SUCCESS;
    for (name, findings) in checks {
        if findings.is_empty() {
            eprintln!("ok      {name}");
            continue;
        }
        code = ExitCode::FAILURE;
        eprintln!("FAILED  {name}");
        for finding in findings {
            eprintln!("        {finding}");
        }
    }
    Ok(code)
}

/// A check that is a program: it has said itself what it found.
fn program(command: &mut Command) -> Result<Findings> {
    let status = command.status().context("cannot run cargo")?;
    Ok(if status.success() {
        Vec::new()
    } else {
        vec![format!("see above ({status})")]
    })
}

/// Every file below `directory` with that ending, without what is built or hidden.
pub(crate) fn files(directory: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory)
            .with_context(|| format!("cannot look into {}", directory.display()))?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            if name == "target" || name.to_string_lossy().starts_with('.') {
                continue;
            }
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A file as seen from the workspace's root.
fn shown<'a>(workspace: &Workspace, file: &'a Path) -> &'a Path {
    file.strip_prefix(&workspace.root).unwrap_or(file)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
