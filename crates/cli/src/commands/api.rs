//! `rekindle api`.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use hyper::Method;
use rekindle_firecracker::Client;

use super::block_on;
use crate::output;

/// Sends one request to a Firecracker's API socket and prints the answer
///
/// For any Firecracker, also one that rekindle did not start:
///
///   rekindle api --socket /run/firecracker.socket GET /version
#[derive(Debug, clap::Args)]
pub(crate) struct Api {
    /// Firecracker's API socket
    #[arg(long, value_name = "P")]
    socket: PathBuf,
    /// GET, PUT, PATCH or DELETE
    method: Method,
    /// The path, beginning with /
    path: String,
    /// The body
    #[arg(value_name = "JSON")]
    body: Option<String>,
}

impl Api {
    pub(crate) fn run(self) -> Result<()> {
        let body = match &self.body {
            Some(text) => Some(serde_json::from_str(text).context("the body is not JSON")?),
            None => None,
        };
        let answer = block_on(async {
            Ok(Client::new(&self.socket)
                .raw(self.method.clone(), &self.path, body)
                .await?)
        })?;
        let text = String::from_utf8_lossy(&answer.body);
        if answer.status >= 300 {
            bail!(
                "{} {}: {} {}",
                self.method,
                self.path,
                answer.status,
                text.trim_end()
            );
        }
        if text.is_empty() {
            Ok(())
        } else {
            output::line(text.trim_end())
        }
    }
}
