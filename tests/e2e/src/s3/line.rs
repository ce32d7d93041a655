//! A line that is slow, and sometimes bad.

use std::future::pending;
use std::io;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::CONTENT_LENGTH;
use hyper::{Request, Response, StatusCode};
use rekindle_kit::dice::Dice;
use s3s::service::S3Service;

/// What can go wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The store has an internal error.
    Internal,
    /// The store is asked too much.
    Busy,
    /// The connection is reset before the answer.
    Reset,
    /// The answer ends half way.
    CutOff,
    /// A part of an object has fewer bytes than the answer says, and nothing else is wrong with it.
    Short,
    /// A byte of the answer is another.
    Wrong,
    /// No answer comes.
    Silence,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 7] = [
        Fault::Internal,
        Fault::Busy,
        Fault::Reset,
        Fault::CutOff,
        Fault::Short,
        Fault::Wrong,
        Fault::Silence,
    ];
}

/// How requests and answers fare.
#[derive(Debug)]
pub struct Line {
    latency: Duration,
    faults: Mutex<Faults>,
    requests: AtomicU64,
    packs: AtomicU64,
}

#[derive(Debug)]
struct Faults {
    dice: Dice,
    of_100: usize,
    kinds: Vec<Fault>,
}

impl Line {
    /// So much is added to each request, and nothing goes wrong.
    pub fn of(latency: Duration) -> Line {
        Line {
            latency,
            faults: Mutex::new(Faults {
                dice: Dice::new(),
                of_100: 0,
                kinds: Vec::new(),
            }),
            requests: AtomicU64::new(0),
            packs: AtomicU64::new(0),
        }
    }

    /// From now on one of these happens to so many of 100 requests. Tells the seed that repeats it.
    ///
    /// # Panics
    /// When a request panicked.
    pub fn goes_wrong(&self, of_100: usize, kinds: &[Fault]) -> u64 {
        let mut faults = self.faults.lock().expect("nobody panics with it");
        faults.of_100 = of_100;
        faults.kinds = kinds.to_vec();
        faults.dice.seed()
    }

    /// How many requests there were.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// How many bytes of packs were read.
    pub fn packs_read(&self) -> u64 {
        self.packs.load(Ordering::Relaxed)
    }

    fn next(&self) -> (Option<Fault>, usize) {
        let mut faults = self.faults.lock().expect("nobody panics with it");
        let happens = faults.of_100 > faults.dice.up_to(100) && !faults.kinds.is_empty();
        let kinds = faults.kinds.len().max(1);
        let kind = faults.dice.up_to(kinds);
        let fault = happens.then(|| faults.kinds[kind]);
        (fault, faults.dice.up_to(1 << 30))
    }

    pub(super) async fn answer(
        &self,
        service: &S3Service,
        request: Request<Incoming>,
    ) -> io::Result<Response<Cut>> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.latency).await;
        let (fault, any) = self.next();
        match fault {
            Some(Fault::Silence) => return pending().await,
            Some(Fault::Reset) if any % 2 == 0 => return Err(reset()),
            Some(Fault::Internal) => return Ok(bare(StatusCode::INTERNAL_SERVER_ERROR)),
            Some(Fault::Busy) => return Ok(bare(StatusCode::TOO_MANY_REQUESTS)),
            _ => {}
        }
        let is_pack = request.uri().path().contains("/packs/");
        let answer = service.call(request.map(s3s::Body::from)).await;
        let answer = answer.map_err(|error| io::Error::other(format!("{error:?}")))?;
        let (mut head, body) = answer.into_parts();
        let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
        if is_pack {
            let size = body.len().try_into().unwrap_or(0);
            self.packs.fetch_add(size, Ordering::Relaxed);
        }
        let cut = match fault {
            // It was done, but nobody is told.
            Some(Fault::Reset) => return Err(reset()),
            Some(Fault::CutOff) if !body.is_empty() => Cut {
                size: body.len(),
                rest: Some(body.slice(..any % body.len())),
                breaks: true,
            },
            Some(Fault::Short) if head.status == StatusCode::PARTIAL_CONTENT => {
                let left = any % body.len().max(1);
                head.headers.insert(CONTENT_LENGTH, left.into());
                Cut::whole(body.slice(..left))
            }
            Some(Fault::Wrong) if !body.is_empty() => {
                let mut bytes = body.to_vec();
                let at = any % bytes.len();
                bytes[at] ^= 1 << (any % 8);
                Cut::whole(bytes.into())
            }
            _ => Cut::whole(body),
        };
        Ok(Response::from_parts(head, cut))
    }
}

fn bare(status: StatusCode) -> Response<Cut> {
    let mut answer = Response::new(Cut::whole(Bytes::from_static(b"oh")));
    *answer.status_mut() = status;
    answer
}

fn reset() -> io::Error {
    io::Error::from(io::ErrorKind::ConnectionReset)
}

/// A body that may break off.
#[derive(Debug)]
pub(super) struct Cut {
    size: usize,
    rest: Option<Bytes>,
    breaks: bool,
}

impl Cut {
    fn whole(bytes: Bytes) -> Cut {
        Cut {
            size: bytes.len(),
            rest: Some(bytes).filter(|bytes| !bytes.is_empty()),
            breaks: false,
        }
    }
}

impl Body for Cut {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        Poll::Ready(match self.rest.take() {
            Some(bytes) => Some(Ok(Frame::data(bytes))),
            None if self.breaks => Some(Err(reset())),
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_none() && !self.breaks
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.size.try_into().unwrap_or(0))
    }
}
