//! One HTTP connection over a Unix socket, driven by whoever uses it.

use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::Poll;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST, HeaderValue};
use hyper_util::rt::TokioIo;
use rustix::fs::{Mode, OFlags};
use rustix::net::RecvFlags;
use tokio::net::UnixStream;

use super::{CallError, Request};

/// How much of an answer is read.
pub(super) const BODY_LIMIT: usize = 1 << 20;

/// How large an answer's head may be; Firecracker's have some hundred bytes.
const HEAD_LIMIT: usize = 64 << 10;

/// The longest path a Unix socket's address holds.
const SOCKET_PATH_LIMIT: usize = 107;

type Http = http1::Connection<TokioIo<UnixStream>, Full<Bytes>>;

/// A connection that can carry one exchange after another.
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// None once it carries nothing any more.
    http: Option<Pin<Box<Http>>>,
    /// The same socket once more, to look at it without taking anything from it.
    probe: OwnedFd,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("fd", &self.probe.as_raw_fd())
            .finish_non_exhaustive()
    }
}

/// An answer, read to its end or to the limit.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
    /// Whether there was more than the limit.
    pub(super) is_cut: bool,
    is_last: bool,
}

impl Answer {
    /// Whether the connection can carry another exchange.
    pub(super) fn keeps_alive(&self) -> bool {
        !self.is_cut && !self.is_last
    }
}

impl Request {
    /// The request as HTTP.
    pub(super) fn to_http(&self) -> Result<hyper::Request<Full<Bytes>>, CallError> {
        let json = HeaderValue::from_static("application/json");
        let request = hyper::Request::builder()
            .method(self.method.clone())
            .uri(self.path.as_str())
            .header(HOST, HeaderValue::from_static("localhost"))
            .header(ACCEPT, json.clone());
        let request = match &self.body {
            Some(body) => request
                .header(CONTENT_TYPE, json)
                .body(Full::new(Bytes::copy_from_slice(body))),
            None => request.body(Full::default()),
        };
        request.map_err(|source| CallError::BadPath {
            method: self.method.clone(),
            path: self.path.clone(),
            source,
        })
    }
}

/// Connects to `socket`, however long its path is.
pub(crate) async fn connect(socket: &Path) -> io::Result<UnixStream> {
    if socket.as_os_str().as_bytes().len() <= SOCKET_PATH_LIMIT {
        return UnixStream::connect(socket).await;
    }
    let (Some(directory), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    let mut short = PathBuf::from("/proc/self/fd");
    short.push(directory.as_raw_fd().to_string());
    short.push(name);
    UnixStream::connect(short).await
}

impl Connection {
    /// HTTP over this stream.
    pub(super) fn over(stream: UnixStream) -> io::Result<Connection> {
        let probe = rustix::io::fcntl_dupfd_cloexec(&stream, 0)?;
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_LIMIT);
        // The handshake of HTTP/1 exchanges nothing; it is a future in form only.
        let handshake = std::pin::pin!(builder.handshake(TokioIo::new(stream)));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match handshake.poll(&mut context) {
            Poll::Ready(Ok((sender, http))) => Ok(Connection {
                sender,
                http: Some(Box::pin(http)),
                probe,
            }),
            Poll::Ready(Err(source)) => Err(io::Error::other(source)),
            Poll::Pending => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Whether the other side neither closed it nor said anything unasked.
    ///
    /// The socket itself is asked: the runtime may not have heard yet.
    pub(super) fn is_idle(&self) -> bool {
        if self.http.is_none() {
            return false;
        }
        let mut byte = [0_u8; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let nothing = rustix::net::recv(&self.probe, &mut byte, flags);
        matches!(nothing, Err(rustix::io::Errno::AGAIN))
    }

    /// Sends one request and reads its answer.
    pub(super) async fn exchange(
        &mut self,
        request: hyper::Request<Full<Bytes>>,
    ) -> Result<Answer, hyper::Error> {
        let Connection { sender, http, .. } = self;
        let work = async {
            sender.ready().await?;
            read(sender.send_request(request).await?).await
        };
        drive(http, work).await
    }
}

/// Reads an answer to its end, or to the limit.
async fn read(
    mut response: hyper::Response<hyper::body::Incoming>,
) -> Result<Answer, hyper::Error> {
    let says_close = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"close");
    let mut answer = Answer {
        status: response.status().as_u16(),
        body: Vec::new(),
        is_cut: false,
        is_last: response.headers().get(CONNECTION).is_some_and(says_close),
    };
    while let Some(frame) = response.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        let room = BODY_LIMIT - answer.body.len();
        answer.body.extend_from_slice(&data[..data.len().min(room)]);
        if data.len() > room {
            answer.is_cut = true;
            break;
        }
    }
    Ok(answer)
}

/// Runs `work`, which waits for the connection, and the connection, which nobody else drives.
async fn drive<T>(
    http: &mut Option<Pin<Box<Http>>>,
    work: impl Future<Output = Result<T, hyper::Error>>,
) -> Result<T, hyper::Error> {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|context| {
        if let Poll::Ready(done) = work.as_mut().poll(context) {
            return Poll::Ready(done);
        }
        let Some(driven) = http else {
            return Poll::Pending;
        };
        let Poll::Ready(end) = driven.as_mut().poll(context) else {
            // What it did may be what the work waits for; that wakes it.
            return Poll::Pending;
        };
        // It is over. Dropping it tells the work so, if it waits for more than it was handed already, and
        // the work's own word counts first.
        *http = None;
        match (work.as_mut().poll(context), end) {
            (Poll::Pending, Err(error)) => Poll::Ready(Err(error)),
            (answer, _) => answer,
        }
    })
    .await
}
