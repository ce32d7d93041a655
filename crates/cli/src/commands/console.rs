//! `rekindle console`.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context as _, Result, bail};
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::dir::{INPUT_FIFO, SERIAL, VmDir};
use rekindle_engine::vm::follow::Follower;
use rustix::fs::OFlags;
use tokio::sync::oneshot;

use super::{Context, block_on};
use crate::monitor::truth::{Truth, look};
use crate::output;
use crate::serial::follow;
use crate::terminal::RawTerminal;

/// Ctrl-]
const DETACH: u8 = 0x1d;

/// Connects the terminal to a guest's serial console; Ctrl-] leaves it
///
/// Shows what is kept of the output, then what comes. The guest runs on when you leave.
#[derive(Debug, clap::Args)]
pub(crate) struct Console {
    /// The VM
    vm: VmName,
}

impl Console {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        match look(&engine, &self.vm, &dir)? {
            Truth::Known(record) if record.state.is_over() => {
                bail!(
                    "{} is {}: see rekindle logs {}",
                    self.vm,
                    record.state.word(),
                    self.vm
                )
            }
            Truth::Known(_) => {}
            Truth::Starting => bail!("{} is still being started", self.vm),
        }
        let input = open_input(&dir)?;
        if io::stdin().is_terminal() {
            output::say(format_args!(
                "connected to {}; Ctrl-] leaves, the guest runs on",
                self.vm
            ));
        }
        let _raw = RawTerminal::enter()?;
        block_on(attach(&engine, &self.vm, &dir, input))
    }
}

/// Firecracker holds the other end; without it this fails instead of waiting.
fn open_input(dir: &VmDir) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(dir.file(INPUT_FIFO))
        .context("the guest's serial port takes no input")
}

async fn attach(engine: &Engine, name: &VmName, dir: &VmDir, input: File) -> Result<()> {
    let (left, leaves) = oneshot::channel();
    // Reading a terminal cannot be given up; the thread ends with the process.
    std::thread::spawn(move || {
        let _ = left.send(type_in(input));
    });
    let mut show = |bytes: &[u8]| -> Result<()> {
        let mut out = io::stdout();
        out.write_all(bytes)?;
        out.flush()?;
        Ok(())
    };
    let follower = Follower::from_start(&dir.file(SERIAL));
    tokio::select! {
        ended = follow(engine, name, dir, follower, &mut show) => {
            ended?;
        }
        Ok(typed) = leaves => typed?,
    }
    Ok(())
}

/// What is typed goes into the FIFO, until the detach key or the end of the input.
fn type_in(mut input: File) -> Result<()> {
    let mut typed = [0; 256];
    loop {
        let n = io::stdin().read(&mut typed)?;
        let keys = &typed[..n];
        let (keys, leaves) = match keys.iter().position(|key| *key == DETACH) {
            Some(at) => (&keys[..at], true),
            None => (keys, n == 0),
        };
        // A guest that reads nothing has 1 MiB of input waiting; what is more is lost, as on any serial line.
        match input.write_all(keys) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e.into()),
            _ => {}
        }
        if leaves {
            return Ok(());
        }
    }
}
