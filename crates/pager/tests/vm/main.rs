//! The page server against a real userfaultfd and a process that plays Firecracker.

mod chains;
mod firecracker;
mod hostile;
mod packed;
mod points;
mod sandbox;
mod scene;
mod server;
mod storm;
mod walks;

use std::process::ExitCode;

fn main() -> ExitCode {
    rekindle_kit::uffd::play_if_asked();
    server::serve_if_asked();
    let stories = [
        points::stories(),
        hostile::stories(),
        sandbox::stories(),
        chains::stories(),
        packed::stories(),
        walks::stories(),
        storm::stories(),
        firecracker::stories(),
    ];
    rekindle_kit::story::main(stories.into_iter().flatten().collect())
}
