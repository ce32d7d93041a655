//! Builds the agent that the initrd carries: a static program, which is part of this crate as a file.
//!
//! Cargo has no stable way to depend on another package's program, so this runs cargo once more. It has a target
//! directory of its own, so that neither waits for the other's lock, and none of the outer cargo's flags, so that the
//! agent is the same whoever builds it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the outer cargo tells this one about itself, or about how the host's programs are built.
const OUTER: [&str; 9] = [
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_INCREMENTAL",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET_DIR",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
    "__CARGO_DEFAULT_LIB_METADATA",
];

fn main() {
    let crate_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let workspace = crate_dir.join("../..");
    let agent = crate_dir.join("../agent");
    for part in ["Cargo.toml", "Cargo.lock", "crates/agent/Cargo.toml"] {
        rerun_if_changed(&workspace.join(part));
    }
    rerun_if_changed(Path::new("build.rs"));
    let out = PathBuf::from(variable("OUT_DIR"));
    let target = variable("TARGET");
    build(&agent, &out.join("target"), &target);
    let program = out
        .join("target")
        .join(&target)
        .join("agent/rekindle-agent");
    for source in sources(&program) {
        rerun_if_changed(&source);
    }
    let place = out.join("rekindle-agent");
    std::fs::copy(&program, place).expect("the agent was built");
}

/// Our files of which cargo made the program, as it noted beside it, in make's words.
fn sources(program: &Path) -> Vec<PathBuf> {
    let notes = std::fs::read_to_string(program.with_extension("d")).expect("cargo notes it");
    let (_, sources) = notes.split_once(": ").expect("a rule as for make");
    let sources = sources.replace("\\ ", "\0");
    let words = sources.split_whitespace();
    words
        .map(|word| PathBuf::from(word.replace('\0', " ")))
        .collect()
}

fn rerun_if_changed(path: &Path) {
    println!("cargo::rerun-if-changed={}", path.display());
}

fn build(agent: &Path, target_dir: &Path, target: &str) {
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .args([
            "build",
            "--quiet",
            "--profile",
            "agent",
            "--bin",
            "rekindle-agent",
        ])
        .arg("--manifest-path")
        .arg(agent.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        // Also where it is the host's own: what runs while building is not built with the agent's flags then.
        .args(["--target", target]);
    for name in OUTER {
        cargo.env_remove(name);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags());
    let status = cargo.status().expect("cargo can be run again");
    assert!(status.success(), "the agent cannot be built: {status}");
}

/// Static, and without a path of the machine that it was built on.
fn flags() -> String {
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from).or(home);
    if let Some(cargo_home) = cargo_home {
        flags.push(format!(
            "--remap-path-prefix={}=cargo",
            cargo_home.display()
        ));
    }
    flags.join("\x1f")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|e| panic!("cargo sets {name}: {e}"))
}
