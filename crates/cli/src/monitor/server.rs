//! The monitor's side of the control socket: turns HTTP requests into [`Request`]s for the one task that owns
//! the VM.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::protocol::{Failure, PAUSE, RESUME, SNAPSHOT, STOP, SnapshotRequest, StopRequest, VM};
use crate::output;

/// The largest body that is read.
const MAX_BODY: usize = 64 << 10;
/// How long the last answers may take to be read.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long the socket takes nobody after it could not take somebody.
const RECOVERY: Duration = Duration::from_millis(50);
/// How many requests may wait for the VM's task.
const QUEUE: usize = 16;

/// What can be asked of the VM's task.
#[derive(Debug)]
pub(crate) enum Ask {
    Describe,
    Pause,
    Resume,
    Snapshot(SnapshotRequest),
    Stop(StopRequest),
}

/// A request, and where its answer goes.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) ask: Ask,
    pub(crate) answer: oneshot::Sender<Answer>,
}

/// What a request came to.
#[derive(Debug)]
pub(crate) enum Answer {
    Done(Value),
    /// The VM's state forbids it.
    Refused(String),
    Failed(String),
}

/// A control socket that is being served.
#[derive(Debug)]
pub(crate) struct Server {
    stop: watch::Sender<()>,
    task: JoinHandle<()>,
}

/// Binds the socket and serves it on the current runtime.
pub(crate) fn serve(socket: &Path) -> io::Result<(Server, mpsc::Receiver<Request>)> {
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // Bound under a temporary name: who sees the socket can connect to it.
    let next = socket.with_extension("next");
    let _ = std::fs::remove_file(&next);
    let listener = UnixListener::bind(&next)?;
    std::fs::rename(&next, socket)?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let (stop, stopped) = watch::channel(());
    let task = tokio::spawn(accept(listener, sender, stopped));
    Ok((Server { stop, task }, receiver))
}

impl Server {
    /// Takes no more requests, and waits until the answers to those that came are sent.
    pub(crate) async fn finish(self) {
        drop(self.stop);
        let _ = tokio::time::timeout(FAREWELL, self.task).await;
    }
}

async fn accept(
    listener: UnixListener,
    sender: mpsc::Sender<Request>,
    mut stopped: watch::Receiver<()>,
) {
    let mut connections = JoinSet::new();
    let mut told = false;
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    told = false;
                    stream
                }
                // Too few descriptors or too little memory, which pass. Nothing tells when; who asked waits.
                Err(e) => {
                    if !std::mem::replace(&mut told, true) {
                        output::say(format_args!("the control socket takes nobody until this passes: {e}"));
                    }
                    tokio::time::sleep(RECOVERY).await;
                    continue;
                }
            },
            _ = stopped.changed() => break,
            Some(_) = connections.join_next() => continue,
        };
        connections.spawn(converse(stream, sender.clone(), stopped.clone()));
    }
    while connections.join_next().await.is_some() {}
}

/// Answers on one connection, until it is closed or the server stops.
async fn converse(
    stream: UnixStream,
    sender: mpsc::Sender<Request>,
    mut stopped: watch::Receiver<()>,
) {
    let service = service_fn(|request| respond(request, &sender));
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopped.changed() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

async fn respond(
    request: hyper::Request<Incoming>,
    sender: &mpsc::Sender<Request>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match understand(request).await {
        Ok(ask) => match put(ask, sender).await {
            Answer::Done(value) => (StatusCode::OK, value.to_string()),
            Answer::Refused(error) => (StatusCode::CONFLICT, failure(error)),
            Answer::Failed(error) => (StatusCode::INTERNAL_SERVER_ERROR, failure(error)),
        },
        Err((status, error)) => (status, failure(error)),
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(
        hyper::header::CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/json"),
    );
    Ok(response)
}

async fn put(ask: Ask, sender: &mpsc::Sender<Request>) -> Answer {
    let (answer, answered) = oneshot::channel();
    if sender.send(Request { ask, answer }).await.is_err() {
        return Answer::Refused("the VM has ended".to_owned());
    }
    answered
        .await
        .unwrap_or_else(|_| Answer::Refused("the VM has ended".to_owned()))
}

async fn understand(request: hyper::Request<Incoming>) -> Result<Ask, (StatusCode, String)> {
    let (head, body) = request.into_parts();
    let bad = |e: String| (StatusCode::BAD_REQUEST, e);
    let body = Limited::new(body, MAX_BODY)
        .collect()
        .await
        .map_err(|e| bad(e.to_string()))?;
    let body = body.to_bytes();
    let malformed = |e: serde_json::Error| bad(format!("the body makes no sense: {e}"));
    match (head.method, head.uri.path()) {
        (Method::GET, VM) => Ok(Ask::Describe),
        (Method::PUT, PAUSE) => Ok(Ask::Pause),
        (Method::PUT, RESUME) => Ok(Ask::Resume),
        (Method::PUT, SNAPSHOT) => serde_json::from_slice(&body)
            .map(Ask::Snapshot)
            .map_err(malformed),
        (Method::PUT, STOP) => serde_json::from_slice(&body)
            .map(Ask::Stop)
            .map_err(malformed),
        (method, path) => Err((
            StatusCode::NOT_FOUND,
            format!("there is no {method} {path}"),
        )),
    }
}

fn failure(error: String) -> String {
    serde_json::to_string(&Failure { error }).unwrap_or_default()
}
