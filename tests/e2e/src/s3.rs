//! An object store that speaks S3, `s3s-fs`, on a port of the loopback, and a bad line to it.
//!
//! ```text
//!   program ──HTTP, or TLS──► the line: 20 ms, then perhaps a fault ──► s3s: signatures, XML, conditions ──► files
//!                 500 │ 429 │ reset │ cut off │ short │ wrong byte │ silence
//! ```

mod line;
mod tls;

pub use line::{Fault, Line};

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt::set_socket_linger;
use s3s::S3Result;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

/// The credentials that it takes. No message may have the second.
pub const KEY: &str = "AKIDSTORIES";
/// The secret of [`KEY`].
pub const SECRET: &str = "s3cr3t-0f-the-stories";

/// The bucket that it has.
pub const BUCKET: &str = "snapshots";

/// A store; its thread ends when this is dropped.
#[derive(Debug)]
pub struct S3 {
    address: SocketAddr,
    files: PathBuf,
    line: Arc<Line>,
    /// Whom its callers have to believe, if they are to speak TLS.
    certificate: Option<PathBuf>,
    thread: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl S3 {
    /// Starts one that keeps everything in `place`, a new directory, and has the bucket [`BUCKET`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(place: &Path, line: Line) -> anyhow::Result<S3> {
        S3::serve(place, line, None)
    }

    /// As [`S3::start`], but by TLS alone, with a certificate that nobody else has given out.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with_tls(place: &Path, line: Line) -> anyhow::Result<S3> {
        std::fs::create_dir_all(place)?;
        let certificate = place.join("certificate.pem");
        let acceptor = tls::acceptor(&certificate)?;
        let mut s3 = S3::serve(place, line, Some(acceptor))?;
        s3.certificate = Some(certificate);
        Ok(s3)
    }

    fn serve(place: &Path, line: Line, tls: Option<TlsAcceptor>) -> anyhow::Result<S3> {
        std::fs::create_dir_all(place.join(BUCKET))?;
        let files = s3s_fs::FileSystem::new(place)
            .map_err(|error| anyhow::anyhow!("{error:?}"))
            .context("a file system for s3s")?;
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        builder.set_access(OneBucket);
        let service = builder.build();
        let line = Arc::new(line);
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let its = line.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a listener is good");
                tokio::select! {
                    _ = stopped => {}
                    () = accept(listener, service, its, tls) => {}
                }
            });
            // What is stuck in a fault is let go.
            runtime.shutdown_background();
        });
        Ok(S3 {
            address,
            files: place.join(BUCKET),
            line,
            certificate: None,
            thread: Some((stop, thread)),
        })
    }

    /// The URL of a prefix in its bucket.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// The file in which it keeps an object, to damage it.
    pub fn file(&self, object: &str) -> PathBuf {
        self.files.join(object)
    }

    /// The file with its certificate, if it speaks TLS.
    pub fn certificate(&self) -> Option<&Path> {
        self.certificate.as_deref()
    }

    /// The line to it.
    pub fn line(&self) -> &Line {
        &self.line
    }

    /// Lets a program speak with it.
    pub fn known_to<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        match &self.certificate {
            None => command
                .env("AWS_ENDPOINT_URL", format!("http://{}", self.address))
                .env("AWS_ALLOW_HTTP", "true"),
            Some(certificate) => command
                .env(
                    "AWS_ENDPOINT_URL",
                    format!("https://{}:{}", tls::HOST, self.address.port()),
                )
                .env("SSL_CERT_FILE", certificate),
        };
        command
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

/// To `s3s-fs` a bucket that is missing is one without objects, to others it is none.
struct OneBucket;

#[async_trait::async_trait]
impl S3Access for OneBucket {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        match context.s3_path().get_bucket_name() {
            _ if context.credentials().is_none() => Err(s3s::s3_error!(AccessDenied)),
            Some(BUCKET) => Ok(()),
            _ => Err(s3s::s3_error!(NoSuchBucket, "The bucket does not exist.")),
        }
    }
}

async fn accept(
    listener: TcpListener,
    service: s3s::service::S3Service,
    line: Arc<Line>,
    tls: Option<TlsAcceptor>,
) {
    loop {
        let Ok((socket, _)) = listener.accept().await else {
            return;
        };
        // What is closed half way is reset.
        let _ = set_socket_linger(&socket, Some(Duration::ZERO));
        let _ = socket.set_nodelay(true);
        let (service, line, tls) = (service.clone(), line.clone(), tls.clone());
        tokio::spawn(async move {
            match tls {
                None => converse(socket, service, line).await,
                // A caller may not believe who this is.
                Some(tls) => {
                    if let Ok(socket) = tls.accept(socket).await {
                        converse(socket, service, line).await;
                    }
                }
            }
        });
    }
}

async fn converse(
    socket: impl AsyncRead + AsyncWrite + Unpin,
    service: s3s::service::S3Service,
    line: Arc<Line>,
) {
    let answer = service_fn(move |request| {
        let (service, line) = (service.clone(), line.clone());
        async move { line.answer(&service, request).await }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(socket), answer);
    // It ends with an error where a fault is played.
    let _ = connection.await;
}
