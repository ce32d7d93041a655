//! What the agent does when it was started to copy: between its standard streams and the guest's file systems.

use std::error::Error;
use std::fs::File;
use std::io::{self, stdin, stdout};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;

use rekindle_agent::Transfer;
use rekindle_archive::{pack, unpack};

use crate::log::say;

/// Does it, and says why if it cannot be done.
pub(crate) fn run(transfer: &Transfer) -> ExitCode {
    match copy(transfer) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn with_causes(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", with_causes(cause)),
        None => error.to_string(),
    }
}

fn copy(transfer: &Transfer) -> Result<(), Box<dyn Error>> {
    match transfer {
        Transfer::Out { path } => {
            pack(Path::new(path), plain(stdout().as_fd())?, &mut |_| ())?;
        }
        Transfer::In { path, owner } => {
            let from = plain(stdin().as_fd())?;
            unpack(from, Path::new(path), *owner, &mut |_| ())?;
        }
    }
    Ok(())
}

/// A standard stream without the standard library's buffer, which ends with every line.
fn plain(stream: BorrowedFd<'_>) -> io::Result<File> {
    Ok(stream.try_clone_to_owned()?.into())
}
