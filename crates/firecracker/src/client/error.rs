//! Why a call failed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Method;
use serde::Deserialize;
use thiserror::Error;

use super::Request;
use super::connection::{Answer, BODY_LIMIT};
use crate::version::{Feature, Version};

/// How much of a refusal's text is kept, in bytes.
const MESSAGE_LIMIT: usize = 4096;

/// A call to Firecracker failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CallError {
    /// Firecracker said no.
    #[error("{method} {path}: refused with {status}: {fault_message}")]
    Refused {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// The HTTP status, 300 or above.
        status: u16,
        /// Firecracker's own words; the body where it is not in Firecracker's form. At most 4 KiB.
        fault_message: String,
        /// The body as text, at most 4 KiB of it.
        body: String,
    },
    /// This Firecracker does not know what the call needs. Nothing was sent.
    #[error("{method} {path}: {feature} needs Firecracker {}, this is {found}", feature.first())]
    TooOld {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// What it does not know.
        feature: Feature,
        /// Its version.
        found: Version,
    },
    /// No connection could be made. Nothing was sent.
    #[error("{method} {path}: cannot connect to {socket:?}")]
    Connect {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// Firecracker's API socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or what came was not HTTP. The call may have been carried out.
    #[error("{method} {path}: the connection failed")]
    Connection {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// Why.
        source: hyper::Error,
    },
    /// No answer came in time. The call may have been carried out, or may be yet.
    #[error("{method} {path}: no answer within {deadline:?}")]
    Deadline {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// The time it had.
        deadline: Duration,
    },
    /// The answer is not what this call returns.
    #[error("{method} {path}: the answer with status {status} cannot be read")]
    Malformed {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// The HTTP status.
        status: u16,
        /// Why.
        source: serde_json::Error,
    },
    /// Firecracker names a version that is none.
    #[error("{method} {path}: the answer names no version")]
    NoVersion {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// Why.
        source: crate::ParseVersionError,
    },
    /// The answer is larger than any of Firecracker's.
    #[error("{method} {path}: the answer is larger than {limit} bytes")]
    TooLarge {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// The limit.
        limit: usize,
    },
    /// The body has no form in JSON (a path that is not UTF-8). Nothing was sent.
    #[error("{method} {path}: the body cannot be sent as JSON")]
    Unsendable {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The path cannot stand in a request. Nothing was sent.
    #[error("{method} {path:?}: not a path of the API")]
    BadPath {
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// Why.
        source: hyper::http::Error,
    },
    /// An id would change the path it stands in. Nothing was sent.
    #[error("{method} {collection}: {id:?} cannot be an id")]
    BadId {
        /// The request's method.
        method: Method,
        /// The path before the id.
        collection: &'static str,
        /// The id.
        id: String,
    },
}

/// The two forms in which Firecracker says no: its own, and its HTTP server's.
#[derive(Deserialize)]
struct Fault {
    #[serde(alias = "error")]
    fault_message: String,
}

impl Request {
    /// The error for an answer that says no.
    pub(super) fn refused(&self, answer: &Answer) -> CallError {
        let body = clip(&String::from_utf8_lossy(&answer.body));
        let fault_message = match serde_json::from_slice::<Fault>(&answer.body) {
            Ok(fault) => clip(&fault.fault_message),
            Err(_) => body.clone(),
        };
        CallError::Refused {
            method: self.method.clone(),
            path: self.path.clone(),
            status: answer.status,
            fault_message,
            body,
        }
    }

    /// The error for an answer beyond the limit.
    pub(super) fn too_large(&self) -> CallError {
        CallError::TooLarge {
            method: self.method.clone(),
            path: self.path.clone(),
            limit: BODY_LIMIT,
        }
    }
}

/// At most [`MESSAGE_LIMIT`] bytes, cut between characters.
fn clip(text: &str) -> String {
    let end = text.floor_char_boundary(MESSAGE_LIMIT);
    text[..end].trim_end().to_owned()
}

impl CallError {
    /// The HTTP status, where there was an answer.
    pub fn status(&self) -> Option<u16> {
        match self {
            CallError::Refused { status, .. } | CallError::Malformed { status, .. } => {
                Some(*status)
            }
            _ => None,
        }
    }

    /// Firecracker's own words, where it said no.
    pub fn fault_message(&self) -> Option<&str> {
        match self {
            CallError::Refused { fault_message, .. } => Some(fault_message),
            _ => None,
        }
    }

    /// Whether Firecracker cannot have seen the request.
    pub fn was_not_sent(&self) -> bool {
        matches!(
            self,
            CallError::TooOld { .. }
                | CallError::Connect { .. }
                | CallError::Unsendable { .. }
                | CallError::BadPath { .. }
                | CallError::BadId { .. }
        )
    }
}
