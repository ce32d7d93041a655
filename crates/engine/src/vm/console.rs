//! The guest's serial port, Firecracker's log and its metrics: each a FIFO drained into a bounded file.
//!
//! ```text
//!   firecracker stdout ─▶ serial.fifo ─▶ serial (and serial.old)      input.fifo ─▶ firecracker stdin
//!   firecracker log ────▶ log.fifo ────▶ log      metrics ─▶ metrics.fifo ─▶ metrics
//! ```

use std::convert::Infallible;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rekindle_firecracker::{Fifo, FifoError, drain, drain_rest};
use rekindle_firecracker::{Ring, tail};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::jail::{self, JailError};

use super::dir::{INPUT_FIFO, LOG, LOG_FIFO, METRICS, METRICS_FIFO, SERIAL, SERIAL_FIFO, VmDir};

/// How much of the serial output is kept, twice at the most.
const SERIAL_BYTES: NonZeroU64 = NonZeroU64::new(4 << 20).unwrap();
/// How much of log and metrics is kept, twice at the most.
const LOG_BYTES: NonZeroU64 = NonZeroU64::new(512 << 10).unwrap();
/// How long output waits after a piece of it could not be written.
const PAUSE: Duration = Duration::from_millis(50);
/// How much of the log's end is looked through for its last lines.
const TAIL_BYTES: u64 = 8 << 10;

/// Why the FIFOs or the files behind them cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// A FIFO cannot be put into the VM's jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A FIFO.
    #[error(transparent)]
    Fifo(#[from] FifoError),
    /// A file.
    #[error("cannot open {path}")]
    Ring {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The drains of one VM. Dropped, they take out what is there and end.
#[derive(Debug)]
pub(crate) struct Console {
    dir: VmDir,
    drains: Vec<Drain>,
}

#[derive(Debug)]
struct Drain {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Console {
    /// Makes the FIFOs, or takes those that are there, and drains them from now on.
    pub(crate) fn open(dir: &VmDir) -> Result<Console, ConsoleError> {
        // Opened and kept by Firecracker; made here so that it is there.
        drop(Fifo::open(dir.file(INPUT_FIFO))?);
        let drains = [
            (SERIAL_FIFO, SERIAL, SERIAL_BYTES),
            (LOG_FIFO, LOG, LOG_BYTES),
            (METRICS_FIFO, METRICS, LOG_BYTES),
        ];
        let drains = drains
            .into_iter()
            .map(|(fifo, file, bytes)| Drain::start(dir, fifo, file, bytes))
            .collect::<Result<_, _>>()?;
        for fifo in [LOG_FIFO, METRICS_FIFO] {
            jail::give(dir, fifo)?;
        }
        Ok(Console {
            dir: dir.clone(),
            drains,
        })
    }

    /// What Firecracker gets as standard input: what is written into the FIFO is typed into the serial port.
    pub(crate) fn guest_input(dir: &VmDir) -> Result<OwnedFd, ConsoleError> {
        Ok(Fifo::open(dir.file(INPUT_FIFO))?.writer()?)
    }

    /// What Firecracker gets as standard output: the guest's serial port.
    pub(crate) fn guest_output(dir: &VmDir) -> Result<OwnedFd, ConsoleError> {
        Ok(Fifo::open(dir.file(SERIAL_FIFO))?.writer()?)
    }

    /// Takes out what is left, now that Firecracker has ended, and removes the FIFOs.
    pub(crate) async fn finish(&mut self) {
        for drain in self.drains.drain(..) {
            let _ = drain.stop.send(());
            let _ = drain.task.await;
        }
        for fifo in [INPUT_FIFO, SERIAL_FIFO, LOG_FIFO, METRICS_FIFO] {
            let _ = std::fs::remove_file(self.dir.file(fifo));
        }
    }

    /// The last lines of Firecracker's log.
    pub(crate) fn last_log_lines(&self, lines: usize) -> Vec<String> {
        self.last_lines(LOG, lines)
    }

    /// The last lines that were said on the guest's serial port, or before there was a guest.
    pub(crate) fn last_output_lines(&self, lines: usize) -> Vec<String> {
        self.last_lines(SERIAL, lines)
    }

    fn last_lines(&self, file: &str, lines: usize) -> Vec<String> {
        let bytes = tail(&self.dir.file(file), TAIL_BYTES).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..]
            .iter()
            .map(|line| (*line).to_owned())
            .collect()
    }
}

impl Drain {
    fn start(
        dir: &VmDir,
        fifo: &str,
        file: &str,
        bytes: NonZeroU64,
    ) -> Result<Drain, ConsoleError> {
        let fifo = Fifo::open(dir.file(fifo))?;
        let path = dir.file(file);
        let mut ring =
            Ring::open(&path, bytes).map_err(|source| ConsoleError::Ring { path, source })?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            tokio::select! {
                never = drain_for_ever(&fifo, &mut ring) => match never {},
                _ = stopped => {}
            }
            let _ = drain_rest(&fifo, &mut ring);
        });
        Ok(Drain { stop, task })
    }
}

/// A full disk costs output and never the guest, which would stand still once its FIFO is full.
async fn drain_for_ever(fifo: &Fifo, ring: &mut Ring) -> Infallible {
    let mut told = false;
    loop {
        let error = drain(fifo, ring).await;
        if !told {
            tracing::warn!(%error, fifo = %fifo.path().display(), "output is lost");
            told = true;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
