//! The page server against a real userfaultfd and a process that plays Firecracker.

mod firecracker;
mod hostile;
mod points;
mod scene;
mod walks;

use std::process::ExitCode;

fn main() -> ExitCode {
    rekindle_kit::uffd::play_if_asked();
    let stories = [
        points::stories(),
        hostile::stories(),
        walks::stories(),
        firecracker::stories(),
    ];
    rekindle_kit::story::main(stories.into_iter().flatten().collect())
}
