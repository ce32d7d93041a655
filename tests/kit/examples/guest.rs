//! Writes a bare-metal guest into a file: `cargo run -p rekindle-kit --example guest -- sweep FILE`.
//!
//! Boot it with `rekindle run --kernel FILE --mem MIB`; the memory that it needs is printed.

use std::path::Path;
use std::process::ExitCode;

use rekindle_kit::guest::{Counter, Echo, Pattern, Scatter, Sweep, Touch};

fn main() -> ExitCode {
    let guests = [
        Counter::default().guest(),
        Echo::default().guest(),
        Pattern::default().guest(),
        Scatter::default().guest(),
        Sweep::default().guest(),
        Touch::default().guest(),
    ];
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [name, file] = arguments.as_slice()
        && let Some(guest) = guests.iter().find(|guest| guest.name() == name)
    {
        return match guest.write(Path::new(file)) {
            Ok(()) => {
                println!("{}", guest.memory().0);
                ExitCode::SUCCESS
            }
            Err(why) => {
                eprintln!("cannot write {file}: {why}");
                ExitCode::FAILURE
            }
        };
    }
    eprintln!("usage: guest NAME FILE, with one of:");
    for guest in &guests {
        eprintln!(
            "  {:<8} {} MiB, prints {}",
            guest.name(),
            guest.memory().0,
            guest.prints()
        );
    }
    ExitCode::from(2)
}
