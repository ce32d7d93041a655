//! The program `rekindle`: one file a verb in `commands`, and the hidden `monitor`.
#![forbid(unsafe_code)]

mod commands;
mod guest;
mod monitor;
mod output;
mod page_server;
mod serial;

use std::process::ExitCode;

fn main() -> ExitCode {
    commands::main()
}
