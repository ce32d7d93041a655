//! A Firecracker that is none: it listens on a socket like one and answers as a test tells it to.
//!
//! ```text
//!   client ──▶ socket ──▶ Request ──▶ the test's closure ──▶ Reply: bytes, when the test says so, then close?
//! ```
//!
//! A [`Reply`] is bytes, so that it can be wrong in every way.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

/// A request as it came over the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// On which connection, counted from 0.
    pub connection: usize,
    /// The method.
    pub method: String,
    /// The path.
    pub path: String,
    /// The headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
}

impl Request {
    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(header, _)| header == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Method and path: `PUT /actions`.
    pub fn call(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

/// What to answer.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    bytes: Vec<u8>,
    delay: Duration,
    gate: Option<Arc<Barrier>>,
    closes: bool,
}

impl Reply {
    /// These bytes, HTTP or not.
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Reply {
        Reply {
            bytes: bytes.into(),
            ..Reply::default()
        }
    }

    /// Nothing at all.
    pub fn silence() -> Reply {
        Reply::default()
    }

    /// Status 204.
    pub fn no_content() -> Reply {
        Reply::bytes("HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n")
    }

    /// A body of JSON.
    pub fn json(status: u16, body: &Value) -> Reply {
        Reply::text(status, &body.to_string())
    }

    /// A body of any text.
    pub fn text(status: u16, body: &str) -> Reply {
        Reply::bytes(format!(
            "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    /// Status 400 with a message, in Firecracker's form.
    pub fn fault(message: &str) -> Reply {
        Reply::json(400, &json!({ "fault_message": message }))
    }

    /// What Firecracker `version` answers when all is well: its description, its version, and 204.
    pub fn obliging(request: &Request, version: &str) -> Reply {
        match request.call().as_str() {
            "GET /" => Reply::json(
                200,
                &json!({
                    "app_name": "Firecracker",
                    "id": "fake",
                    "state": "Not started",
                    "vmm_version": version,
                }),
            ),
            "GET /version" => Reply::json(200, &json!({ "firecracker_version": version })),
            _ => Reply::no_content(),
        }
    }

    /// The same, but not before `delay` is over.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Reply {
        self.delay = delay;
        self
    }

    /// The same, but not before the test comes to `gate`, too.
    #[must_use]
    pub fn behind(mut self, gate: &Arc<Barrier>) -> Reply {
        self.gate = Some(Arc::clone(gate));
        self
    }

    /// The same, and then the connection is closed.
    #[must_use]
    pub fn then_close(mut self) -> Reply {
        self.closes = true;
        self
    }
}

/// A socket in a directory of its own, and threads behind it until it is dropped.
#[derive(Debug)]
pub struct FakeFirecracker {
    directory: TempDir,
    socket: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    requests: Mutex<Vec<Request>>,
    streams: Mutex<Vec<UnixStream>>,
    ended: AtomicBool,
}

type Script = Arc<Mutex<dyn FnMut(&Request) -> Reply + Send>>;

impl FakeFirecracker {
    /// One that answers as `script` says, which is asked once for each request.
    ///
    /// # Panics
    /// When there can be no socket.
    pub fn start(script: impl FnMut(&Request) -> Reply + Send + 'static) -> FakeFirecracker {
        let directory = tempfile::tempdir().expect("a directory for the socket");
        let socket = directory.path().join("api.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let shared = Arc::new(Shared::default());
        let script: Script = Arc::new(Mutex::new(script));
        let acceptor = Arc::clone(&shared);
        std::thread::spawn(move || accept(&listener, &acceptor, &script));
        FakeFirecracker {
            directory,
            socket,
            shared,
        }
    }

    /// One that does all it is asked for, and says that it is Firecracker `version`.
    pub fn obliging(version: &str) -> FakeFirecracker {
        let version = version.to_owned();
        FakeFirecracker::start(move |request| Reply::obliging(request, &version))
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The directory of the socket.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What was asked so far.
    pub fn requests(&self) -> Vec<Request> {
        held(&self.shared.requests).clone()
    }

    /// What was asked so far, in short: `["GET /", "PUT /actions"]`.
    pub fn calls(&self) -> Vec<String> {
        held(&self.shared.requests)
            .iter()
            .map(Request::call)
            .collect()
    }

    /// How many connections there were so far.
    pub fn connections(&self) -> usize {
        held(&self.shared.streams).len()
    }
}

impl Drop for FakeFirecracker {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the acceptor; it may be gone.
        let _ = UnixStream::connect(&self.socket);
        for stream in held(&self.shared.streams).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread of the fake panicked")
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, script: &Script) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { return };
        if shared.ended.load(Ordering::SeqCst) {
            return;
        }
        let connection = {
            let mut streams = held(&shared.streams);
            streams.push(stream.try_clone().expect("a second handle of the stream"));
            streams.len() - 1
        };
        let (shared, script) = (Arc::clone(shared), Arc::clone(script));
        std::thread::spawn(move || serve(&stream, connection, &shared, &script));
    }
}

fn serve(stream: &UnixStream, connection: usize, shared: &Shared, script: &Script) {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader, connection) {
        held(&shared.requests).push(request.clone());
        let reply = {
            let mut script = script.lock().expect("no script panicked");
            script(&request)
        };
        std::thread::sleep(reply.delay);
        if let Some(gate) = &reply.gate {
            gate.wait();
        }
        let mut writer = stream;
        if writer.write_all(&reply.bytes).is_err() {
            return;
        }
        if reply.closes {
            // A clone of the stream is kept elsewhere, so that dropping this one would not close it.
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// The next request, unless the other side is gone.
fn read(reader: &mut impl BufRead, connection: usize) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut request = Request {
        connection,
        method,
        path,
        headers,
        body: String::new(),
    };
    let length = match request.header("content-length") {
        Some(length) => length.parse().ok()?,
        None => 0,
    };
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    request.body = String::from_utf8(body).ok()?;
    Some(request)
}
