//! One connection to one Firecracker, and one method for each of its endpoints.
//!
//! ```text
//!   method ── lock ── (version needed? ask) ── connection ── request ──▶ response ──▶ value or CallError
//!              │                                   │
//!        one at a time               kept alive; opened anew if it was closed,
//!     (so does Firecracker)          dropped after a deadline or a broken answer
//! ```
//!
//! Nothing runs between calls: the connection is driven by the call that uses it, so a client needs no task
//! and no thread of its own, and works on any tokio runtime with I/O and time.

mod calls;
mod connection;
mod error;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

pub use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::model::Uses;
use crate::version::{Feature, Version};
pub(crate) use connection::connect;
use connection::{Answer, Connection};
pub use error::CallError;

/// How long a call may take unless set otherwise.
const DEADLINE: Duration = Duration::from_secs(10);

/// Speaks to one Firecracker through its API socket.
///
/// Calls are made one at a time, in the order they were asked for: Firecracker works on one at a time
/// anyway. A call whose future is dropped, or that runs into its deadline, may or may not have been carried
/// out; its connection is dropped, and the next call opens another.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    connection: Mutex<Option<Connection>>,
    deadline: Duration,
    snapshot_deadline: Option<Duration>,
    version: OnceLock<Version>,
}

/// What Firecracker answered, as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawResponse {
    /// The HTTP status.
    pub status: u16,
    /// The body, at most 1 MiB; empty with status 204.
    pub body: Vec<u8>,
}

impl Client {
    /// A client for the Firecracker that listens on `socket`. Nothing is connected before the first call.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client {
            socket: socket.into(),
            connection: Mutex::new(None),
            deadline: DEADLINE,
            snapshot_deadline: None,
            version: OnceLock::new(),
        }
    }

    /// A client that uses a connection somebody made already.
    pub(crate) fn connected(socket: PathBuf, stream: UnixStream) -> Client {
        let connection = Connection::over(stream).ok();
        Client {
            connection: Mutex::new(connection),
            ..Client::new(socket)
        }
    }

    /// How long a call may take, waiting for its turn included; 10 s unless set.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Client {
        self.deadline = deadline;
        self
    }

    /// How long creating or loading a snapshot may take, and starting a guest; as long as it takes unless set.
    #[must_use]
    pub fn with_snapshot_deadline(mut self, deadline: Duration) -> Client {
        self.snapshot_deadline = Some(deadline);
        self
    }

    /// Says which Firecracker it is, so that it is never asked.
    #[must_use]
    pub fn with_version(mut self, version: Version) -> Client {
        self.version = OnceLock::from(version);
        self
    }

    /// The API socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends any request and returns the answer as it is, a refusal too: `rekindle api`.
    ///
    /// `path` begins with `/`. Nothing is checked against Firecracker's version.
    pub async fn raw(
        &self,
        method: Method,
        path: &str,
        body: Option<serde_json::Value>,
    ) -> Result<RawResponse, CallError> {
        let request = Request {
            method,
            path: path.to_owned(),
            body: body.map(|body| body.to_string().into_bytes()),
        };
        let answer = self.exchange(&request, Some(self.deadline)).await?;
        if answer.is_cut {
            return Err(request.too_large());
        }
        Ok(RawResponse {
            status: answer.status,
            body: answer.body,
        })
    }

    /// Asks for something.
    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        let request = Request {
            method: Method::GET,
            path: path.to_owned(),
            body: None,
        };
        let answer = self.accepted(&request, Some(self.deadline)).await?;
        serde_json::from_slice(&answer.body).map_err(|source| CallError::Malformed {
            method: request.method,
            path: request.path,
            status: answer.status,
            source,
        })
    }

    /// Tells something, within the deadline of ordinary calls.
    async fn tell(
        &self,
        method: Method,
        path: String,
        body: &(impl Serialize + Uses),
    ) -> Result<(), CallError> {
        self.tell_within(Some(self.deadline), method, path, body)
            .await
    }

    /// Tells something, once Firecracker is known to understand it.
    async fn tell_within(
        &self,
        deadline: Option<Duration>,
        method: Method,
        path: String,
        body: &(impl Serialize + Uses),
    ) -> Result<(), CallError> {
        let mut features = Vec::new();
        body.uses(&mut |feature| features.push(feature));
        for feature in features {
            self.require(feature, &method, &path).await?;
        }
        let body = match serde_json::to_vec(body) {
            Ok(body) => body,
            Err(source) => {
                return Err(CallError::Unsendable {
                    method,
                    path,
                    source,
                });
            }
        };
        let request = Request {
            method,
            path,
            body: Some(body),
        };
        self.accepted(&request, deadline).await.map(drop)
    }

    /// A call without a body.
    async fn ask(&self, method: Method, path: String) -> Result<(), CallError> {
        let request = Request {
            method,
            path,
            body: None,
        };
        self.accepted(&request, Some(self.deadline)).await.map(drop)
    }

    /// Refuses what this Firecracker is too old for. It is asked for its version at most once, and only for
    /// something newer than the baseline.
    async fn require(
        &self,
        feature: Feature,
        method: &Method,
        path: &str,
    ) -> Result<(), CallError> {
        let found = match self.version.get() {
            Some(known) => *known,
            None if feature.first() <= Version::BASELINE => return Ok(()),
            None => self.learn_version().await?,
        };
        if found.has(feature) {
            return Ok(());
        }
        Err(CallError::TooOld {
            method: method.clone(),
            path: path.to_owned(),
            feature,
            found,
        })
    }

    /// Firecracker's version, asked for once.
    async fn learn_version(&self) -> Result<Version, CallError> {
        match self.version.get() {
            Some(known) => Ok(*known),
            None => self.version().await,
        }
    }

    /// An answer that is not a refusal.
    async fn accepted(
        &self,
        request: &Request,
        deadline: Option<Duration>,
    ) -> Result<Answer, CallError> {
        let answer = self.exchange(request, deadline).await?;
        if answer.status >= 300 {
            return Err(request.refused(&answer));
        }
        if answer.is_cut {
            return Err(request.too_large());
        }
        Ok(answer)
    }

    /// One request and its answer, in turn.
    async fn exchange(
        &self,
        request: &Request,
        deadline: Option<Duration>,
    ) -> Result<Answer, CallError> {
        let exchange = self.exchange_in_turn(request);
        match deadline {
            None => exchange.await,
            Some(deadline) => match tokio::time::timeout(deadline, exchange).await {
                Ok(answer) => answer,
                Err(_) => Err(CallError::Deadline {
                    method: request.method.clone(),
                    path: request.path.clone(),
                    deadline,
                }),
            },
        }
    }

    /// The connection is taken out while it is in use, so that dropping this future drops it too.
    async fn exchange_in_turn(&self, request: &Request) -> Result<Answer, CallError> {
        let message = request.to_http()?;
        let mut slot = self.connection.lock().await;
        let mut connection = match slot.take().filter(Connection::is_idle) {
            Some(kept) => kept,
            None => connection::connect(&self.socket)
                .await
                .and_then(Connection::over)
                .map_err(|source| CallError::Connect {
                    method: request.method.clone(),
                    path: request.path.clone(),
                    socket: self.socket.clone(),
                    source,
                })?,
        };
        let answer =
            connection
                .exchange(message)
                .await
                .map_err(|source| CallError::Connection {
                    method: request.method.clone(),
                    path: request.path.clone(),
                    source,
                })?;
        if answer.keeps_alive() {
            *slot = Some(connection);
        }
        Ok(answer)
    }
}

/// What is sent.
struct Request {
    method: Method,
    path: String,
    body: Option<Vec<u8>>,
}
