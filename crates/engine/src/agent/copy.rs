//! Files and trees into a guest, and out of it.
//!
//! ```text
//!   copy in    pack ── a thread ══▶ Writer ══▶ session ══▶ the agent's `unpack`
//!   copy out   unpack ── a thread ◀══ Reader ◀══ session ◀══ the agent's `pack`
//! ```
//!
//! What it takes is constant, however much is copied: each arrow holds some hundred KiB, and who is slow stops who is fast.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::path::PathBuf;
use std::pin::Pin;

use rekindle_agent::{Exit, Transfer};
use rekindle_archive::{Owner, PackError, StreamError, Tally, UnpackError, pack, unpack};
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;
use tokio_util::io::SyncIoBridge;

use super::process::Process;
use super::{Agent, AgentError};

/// More words than these are not taken from a guest.
const LONGEST_WORDS: u64 = 4 << 10;

/// Nobody can ignore it.
const SIGKILL: i32 = 9;

/// A copy into a guest, or out of it. Awaited, it is made; dropped before its end, it ends on both sides, and no half
/// file has its final name.
///
/// Where it goes follows the rules of `docker cp`: into a directory that is there, else under that name; of a source that
/// ends with `/.` the content alone.
#[must_use = "nothing is copied until it is awaited"]
pub struct Copy {
    agent: Agent,
    way: Way,
    host: PathBuf,
    guest: String,
    owner: Owner,
    progress: Box<dyn FnMut(&Tally) + Send>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

/// Why something was not copied. Files that were complete before stay.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The guest cannot be asked, or has ended.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// It cannot be read on the host.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// It cannot be written on the host, or what the guest sends is not sound.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// The guest has a reason.
    #[error("in the guest: {words}")]
    Guest {
        /// In the words of its agent.
        words: String,
    },
    /// The program that copies was killed in the guest.
    #[error("signal {signal} ended the copy in the guest; copy again")]
    Killed {
        /// By this.
        signal: i32,
    },
}

impl Agent {
    /// Copies the file or tree `from` on the host to `to` in the guest, where it is root's unless
    /// [asked otherwise](Copy::owner). A relative `to` begins at `/`.
    pub fn copy_in(&self, from: impl Into<PathBuf>, to: impl Into<String>) -> Copy {
        Copy::new(self, Way::In, from.into(), to.into())
    }

    /// Copies the file or tree `from` in the guest to `to` on the host, where it belongs to who runs this unless
    /// [asked otherwise](Copy::owner). The guest may be a stranger: what it sends gets nowhere else.
    pub fn copy_out(&self, from: impl Into<String>, to: impl Into<PathBuf>) -> Copy {
        Copy::new(self, Way::Out, to.into(), from.into())
    }
}

impl Copy {
    fn new(agent: &Agent, way: Way, host: PathBuf, guest: String) -> Copy {
        Copy {
            agent: agent.clone(),
            way,
            host,
            guest,
            owner: Owner::default(),
            progress: Box::new(|_| ()),
        }
    }

    /// Whose the copy is.
    pub fn owner(mut self, owner: Owner) -> Self {
        self.owner = owner;
        self
    }

    /// Is told, on a thread of the copy, after each entry and now and then within a file.
    pub fn progress(mut self, progress: impl FnMut(&Tally) + Send + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }

    async fn into_guest(mut self) -> Result<Tally, CopyError> {
        let transfer = Transfer::In {
            path: self.guest,
            owner: self.owner,
        };
        let mut process = self.agent.exec(transfer.argv()).start().await?;
        let to = process.stdin.take().expect("a program has an input");
        let to = SyncIoBridge::new(to);
        // What it writes to is closed at its end, by which the guest knows.
        let packs = move || pack(&self.host, to, &mut self.progress);
        let packs = tokio::task::spawn_blocking(packs);
        let (ended, packed) = tokio::join!(ended(process), joined(packs));
        match (ended, packed) {
            // The guest's part has ended, so nobody took the rest.
            (Err(error), Ok(_) | Err(PackError::Send(_))) => Err(error),
            (_, packed) => Ok(packed?),
        }
    }

    async fn out_of_guest(mut self) -> Result<Tally, CopyError> {
        let transfer = Transfer::Out { path: self.guest };
        let mut process = self.agent.exec(transfer.argv()).start().await?;
        process.stdin = None;
        let from = process.stdout.take().expect("a program has an output");
        let from = SyncIoBridge::new(from);
        let signals = process.signals();
        let unpacks = move || unpack(from, &self.host, self.owner, &mut self.progress);
        let unpacks = tokio::task::spawn_blocking(unpacks);
        let unpacked = async {
            let unpacked = joined(unpacks).await;
            if unpacked.is_err() {
                // The rest is of no use to anybody.
                signals.send(SIGKILL).await;
            }
            unpacked
        };
        let (ended, unpacked) = tokio::join!(ended(process), unpacked);
        match (ended, unpacked) {
            // Why the rest did not come.
            (Err(error), Ok(_) | Err(UnpackError::Stream(StreamError::Truncated))) => Err(error),
            (_, unpacked) => Ok(unpacked?),
        }
    }
}

impl IntoFuture for Copy {
    type Output = Result<Tally, CopyError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        match self.way {
            Way::In => Box::pin(self.into_guest()),
            Way::Out => Box::pin(self.out_of_guest()),
        }
    }
}

impl fmt::Debug for Copy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = f.debug_struct("Copy");
        all.field("way", &self.way).field("host", &self.host);
        all.field("guest", &self.guest).field("owner", &self.owner);
        all.finish_non_exhaustive()
    }
}

/// Waits for the guest's part. It is an error if it did not do it all.
async fn ended(mut process: Process) -> Result<(), CopyError> {
    let stderr = process.stderr.take();
    let words = async {
        let mut words = Vec::new();
        if let Some(stderr) = stderr {
            // What cannot be read was not said.
            let _ = stderr.take(LONGEST_WORDS).read_to_end(&mut words).await;
        }
        words
    };
    let (exit, words) = tokio::join!(process.outcome(), words);
    match exit? {
        Exit::Status(0) => Ok(()),
        Exit::Status(status) => Err(CopyError::Guest {
            words: readable(&words, status),
        }),
        Exit::Signal(signal) => Err(CopyError::Killed { signal }),
    }
}

/// A stranger's words, which can do nothing to a terminal.
fn readable(words: &[u8], status: i32) -> String {
    let words = String::from_utf8_lossy(words);
    match words.trim() {
        "" => format!("the copy ended with status {status} and no reason"),
        words => words
            .chars()
            .map(|c| match c.is_control() {
                true => c.escape_debug().to_string(),
                false => c.into(),
            })
            .collect(),
    }
}

async fn joined<T>(thread: JoinHandle<T>) -> T {
    match thread.await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::readable;

    #[test]
    fn a_guests_words_are_told_as_they_are_but_for_what_moves_the_cursor() {
        let said = "there is no \"/x/ä\" to copy\n".as_bytes();
        assert_eq!(readable(said, 1), "there is no \"/x/ä\" to copy");
        assert_eq!(
            readable(b"\x1b[2Jboo\nhoo\xff", 1),
            "\\u{1b}[2Jboo\\nhoo\u{fffd}"
        );
        assert_eq!(
            readable(b" \n", 3),
            "the copy ended with status 3 and no reason"
        );
    }
}
