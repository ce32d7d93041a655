//! The project's own commands, one file each.
//!
//! ```text
//! cargo xtask demo    the main job on a real guest
//! cargo xtask check   what a change must pass before anybody reads it
//! cargo xtask test    every test, native and in the lab; says what was skipped and why
//! cargo xtask soak    what takes too long for test
//! cargo xtask bench   figures, each beside its baseline
//! cargo xtask lab     a command inside the lab, a Linux with KVM on a machine without
//! ```

#![forbid(unsafe_code)]

mod assets;
mod bench;
mod check;
mod console;
mod demo;
mod fuzz;
mod lab;
mod soak;
mod test;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own commands")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows the main job: boot Linux, snapshot it, restore three copies lazily
    Demo,
    #[command(hide = true)]
    DemoStory(demo::StoryArguments),
    /// Checks format, lints, docs, dependencies, named paths, and file sizes
    Check,
    /// Runs every test, native and in the lab
    Test(test::Arguments),
    /// Runs what takes too long for `test`: kills, walks and removals at random, and fuzzing
    Soak(soak::Arguments),
    /// Measures this host: the figures of docs/benchmarks.md
    Bench(bench::Arguments),
    /// Runs a command in the lab: a Linux with KVM, emulated by QEMU
    Lab(lab::Arguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("xtask: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    // In the lab there is no cargo that could tell.
    if let Command::DemoStory(story) = command {
        return story.run();
    }
    let workspace = Workspace::find()?;
    match command {
        Command::Demo => demo::run(&workspace),
        Command::DemoStory(_) => unreachable!("told above"),
        Command::Check => check::run(&workspace),
        Command::Test(arguments) => test::run(&workspace, &arguments),
        Command::Soak(arguments) => soak::run(&workspace, &arguments),
        Command::Bench(arguments) => bench::run(&workspace, &arguments),
        Command::Lab(arguments) => lab::run(&workspace, arguments),
    }
}
