//! The program `rekindle`: one file a verb in `commands`, and the hidden `monitor`.
#![forbid(unsafe_code)]
// It panics where standard error takes nothing; `output::say` does not.
#![deny(clippy::print_stderr)]

mod attach;
mod commands;
mod disks;
mod guest;
mod monitor;
mod network;
mod output;
mod page_server;
mod program;
mod serial;
mod terminal;

use std::process::ExitCode;

fn main() -> ExitCode {
    commands::main()
}
