//! What Firecracker's metrics say: one line of JSON each time.
//!
//! Only what a user of snapshots asks for has a name here; everything else stays as it came. Counters count
//! from one line to the next, stored values (all of those named here) from the start.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One line of metrics.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MetricsLine {
    /// When it was written, in milliseconds since 1970.
    #[serde(default)]
    pub utc_timestamp_ms: u64,
    /// How long things took.
    #[serde(default)]
    pub latencies_us: Latencies,
    /// How long Firecracker took to start.
    #[serde(default)]
    pub api_server: ApiServer,
    /// Everything else, as it came.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// How long the last of each took, in microseconds; 0 when there was none.
///
/// Two of each: as the API saw it, and without the way there (`vmm_…`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Latencies {
    /// Creating a Full snapshot.
    pub full_create_snapshot: u64,
    /// Creating a Diff snapshot.
    pub diff_create_snapshot: u64,
    /// Loading a snapshot.
    pub load_snapshot: u64,
    /// Pausing.
    pub pause_vm: u64,
    /// Resuming.
    pub resume_vm: u64,
    /// Creating a Full snapshot, without the API.
    pub vmm_full_create_snapshot: u64,
    /// Creating a Diff snapshot, without the API.
    pub vmm_diff_create_snapshot: u64,
    /// Loading a snapshot, without the API.
    pub vmm_load_snapshot: u64,
    /// Pausing, without the API.
    pub vmm_pause_vm: u64,
    /// Resuming, without the API.
    pub vmm_resume_vm: u64,
    /// Everything else, as it came.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// How long Firecracker took to start; known only when it was told when that began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ApiServer {
    /// From the start to the API's first readiness, in microseconds.
    pub process_startup_time_us: u64,
    /// Processor time spent on it, in microseconds.
    pub process_startup_time_cpu_us: u64,
    /// Everything else, as it came.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl MetricsLine {
    /// Reads one line.
    pub fn parse(line: &[u8]) -> serde_json::Result<MetricsLine> {
        serde_json::from_slice(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_name_is_found_and_the_rest_is_kept() {
        let line = br#"{"utc_timestamp_ms":1700000000000,
            "latencies_us":{"load_snapshot":1234,"vmm_load_snapshot":1200,"new_thing":7},
            "api_server":{"process_startup_time_us":9000},
            "vcpu":{"exit_io_out":3}}"#;
        let metrics = MetricsLine::parse(line).expect("a line");
        assert_eq!(metrics.latencies_us.load_snapshot, 1234);
        assert_eq!(metrics.latencies_us.vmm_load_snapshot, 1200);
        assert_eq!(metrics.latencies_us.pause_vm, 0);
        assert_eq!(metrics.latencies_us.rest["new_thing"], 7);
        assert_eq!(metrics.api_server.process_startup_time_us, 9000);
        assert_eq!(metrics.rest["vcpu"]["exit_io_out"], 3);
        let again = serde_json::to_vec(&metrics).expect("json");
        assert_eq!(MetricsLine::parse(&again).expect("a line"), metrics);
    }

    #[test]
    fn half_a_line_is_an_error() {
        assert!(MetricsLine::parse(br#"{"utc_timestamp_ms":17000"#).is_err());
        assert!(MetricsLine::parse(b"").is_err());
    }
}
