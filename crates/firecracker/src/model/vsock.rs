//! Sockets between host and guest.

use std::path::PathBuf;

body! {
    /// A vsock device. The host connects to its Unix socket and names a port; the guest's connections go to
    /// `<socket>_<port>`.
    #[derive(Eq)]
    pub struct Vsock {
        /// The guest's address, 3 or above.
        guest_cid: u32,
        /// The Unix socket that Firecracker listens on; nothing may be there yet.
        uds_path: PathBuf,
    }
    optional {
        /// A name. Deprecated since Firecracker 1.0.
        vsock_id: String [into],
    }
}

impl Vsock {
    /// The guest's address is `guest_cid`, the host's way to it `uds_path`.
    pub fn new(guest_cid: u32, uds_path: impl Into<PathBuf>) -> Vsock {
        Vsock {
            guest_cid,
            uds_path: uds_path.into(),
            vsock_id: None,
        }
    }
}
