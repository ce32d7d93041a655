//! The metadata service: a small store that the guest reads over HTTP.

use serde::{Deserialize, Serialize};

/// The contents of the store: any JSON object, 51,200 bytes unless Firecracker was started otherwise.
pub type MmdsContentsObject = serde_json::Map<String, serde_json::Value>;

/// Which protocol the guest speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MmdsVersion {
    /// Plain GET. Deprecated since Firecracker 1.1.
    V1,
    /// With a token.
    V2,
}

body! {
    /// How the guest reaches the metadata service.
    #[derive(Eq)]
    pub struct MmdsConfig {
        /// The interfaces that answer it, by their ids; they must exist.
        network_interfaces: Vec<String>,
    }
    optional {
        /// Which protocol; [`MmdsVersion::V1`] unless set.
        version: MmdsVersion,
        /// The address, link-local; 169.254.169.254 unless set.
        ipv4_address: String [into],
        /// Whether answers are plain text whatever the guest accepts, as EC2 does. Firecracker ≥ 1.13.
        imds_compat: bool [since ImdsCompat],
    }
}

impl MmdsConfig {
    /// The service on these interfaces.
    pub fn new<Id: Into<String>>(network_interfaces: impl IntoIterator<Item = Id>) -> MmdsConfig {
        MmdsConfig {
            network_interfaces: network_interfaces.into_iter().map(Into::into).collect(),
            version: None,
            ipv4_address: None,
            imds_compat: None,
        }
    }
}
