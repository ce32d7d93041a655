//! Where Firecracker's metrics go. What is in them: [`crate::metrics`].

use std::collections::BTreeMap;
use std::path::PathBuf;

body! {
    /// Where the metrics go: a line of JSON a minute, and one when asked. Can be set once.
    #[derive(Eq)]
    pub struct Metrics {
        /// A file or FIFO. Before Firecracker 1.14 it must exist.
        metrics_path: PathBuf,
    }
    optional {
        /// Whether a line names the VM, as `id`. Firecracker ≥ 1.17.
        emit_id: bool [since MetricsEmitId],
        /// What every line says besides, under `properties`. Firecracker ≥ 1.17.
        properties: BTreeMap<String, String> [since MetricsProperties],
    }
}

impl Metrics {
    /// Metrics into this file or FIFO.
    pub fn new(metrics_path: impl Into<PathBuf>) -> Metrics {
        Metrics {
            metrics_path: metrics_path.into(),
            emit_id: None,
            properties: None,
        }
    }
}
