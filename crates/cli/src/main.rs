//! The program `rekindle`: one file a verb in `commands`, and the hidden `monitor`.
#![forbid(unsafe_code)]

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
