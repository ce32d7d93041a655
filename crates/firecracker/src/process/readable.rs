//! Waiting until a descriptor has something to say.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor known to the runtime.
pub(super) struct Readable(AsyncFd<OwnedFd>);

impl Readable {
    /// The runtime takes a descriptor number once: give it one that nobody else waits for.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Readable> {
        #[expect(
            deprecated,
            reason = "unsound only for types whose descriptor changes, which an OwnedFd's does not; its \
                      successor is an unsafe function"
        )]
        AsyncFd::with_interest(fd, Interest::READABLE).map(Readable)
    }

    /// Waits until it can be read; `take` then reads all there is.
    pub(super) async fn wait(&self, take: impl FnOnce(BorrowedFd<'_>)) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        take(self.0.get_ref().as_fd());
        ready.clear_ready();
        Ok(())
    }

    /// The descriptor, unknown to the runtime again.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.0.into_inner()
    }
}
