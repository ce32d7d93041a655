//! What is said over a VM's control socket: HTTP/1.1 with JSON, version in the path.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/vm` | | the VM's record |
//! | `PUT /v1/pause`, `PUT /v1/resume` | | the record |
//! | `PUT /v1/snapshot` | [`SnapshotRequest`] | [`SnapshotAnswer`] |
//! | `PUT /v1/stop` | [`StopRequest`] | the record |
//!
//! A request that the VM's state forbids is answered with 409, any other failure with 500; the body is then
//! [`Failure`].

use rekindle_engine::store::SnapshotName;
use rekindle_engine::vm::quiesce::STANDS_STILL_WITHIN;
use rekindle_engine::vm::snapshot::SnapshotKind;
use serde::{Deserialize, Serialize};

/// The control socket, relative to the VM's directory.
pub(crate) const CONTROL_SOCKET: &str = "control.sock";

/// The paths.
pub(crate) const VM: &str = "/v1/vm";
pub(crate) const PAUSE: &str = "/v1/pause";
pub(crate) const RESUME: &str = "/v1/resume";
pub(crate) const SNAPSHOT: &str = "/v1/snapshot";
pub(crate) const STOP: &str = "/v1/stop";

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotRequest {
    pub(crate) kind: SnapshotKind,
    pub(crate) name: Option<SnapshotName>,
    /// How long the guest may take to stand still, in milliseconds; 0 does not ask it.
    #[serde(default = "stands_still_ms")]
    pub(crate) quiesce_ms: u64,
}

pub(crate) fn stands_still_ms() -> u64 {
    u64::try_from(STANDS_STILL_WITHIN.as_millis()).unwrap_or(u64::MAX)
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotAnswer {
    /// The snapshot's id.
    pub(crate) id: String,
    /// How long the guest stood still, in microseconds.
    pub(crate) paused_us: u64,
    /// From the request to the published snapshot, in microseconds.
    pub(crate) total_us: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StopRequest {
    /// How long the guest may take to end by itself, in milliseconds; 0 kills it at once.
    pub(crate) grace_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) error: String,
}
