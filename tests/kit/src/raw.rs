//! HTTP as Firecracker speaks it, with nothing in between: bytes out, a status in.
//!
//! The floor that an API client is measured against, and the way in which the kit drives Firecracker
//! without any code that is under test.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// One connection to Firecracker's API, kept alive.
#[derive(Debug)]
pub struct RawApi {
    stream: UnixStream,
    request: Vec<u8>,
    answer: Vec<u8>,
    body: usize,
}

impl RawApi {
    /// Connects to a socket that listens already.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(socket: &Path) -> io::Result<RawApi> {
        Ok(RawApi {
            stream: UnixStream::connect(socket)?,
            request: Vec::with_capacity(1024),
            answer: Vec::with_capacity(4096),
            body: 0,
        })
    }

    /// `PUT path` with a body, and the status of the answer.
    ///
    /// # Errors
    /// When the connection breaks or what comes back is no HTTP.
    pub fn put(&mut self, path: &str, json: &str) -> io::Result<u16> {
        self.call("PUT", path, json)
    }

    /// `PATCH path` with a body, and the status of the answer.
    ///
    /// # Errors
    /// As [`RawApi::put`].
    pub fn patch(&mut self, path: &str, json: &str) -> io::Result<u16> {
        self.call("PATCH", path, json)
    }

    /// `GET path`, and the status of the answer; its body is in [`RawApi::body`].
    ///
    /// # Errors
    /// As [`RawApi::put`].
    pub fn get(&mut self, path: &str) -> io::Result<u16> {
        self.call("GET", path, "")
    }

    /// The body of the last answer.
    pub fn body(&self) -> &str {
        std::str::from_utf8(&self.answer[self.body..]).unwrap_or("(not UTF-8)")
    }

    fn call(&mut self, method: &str, path: &str, json: &str) -> io::Result<u16> {
        let mut request = std::mem::take(&mut self.request);
        request.clear();
        request_into(&mut request, method, path, json)?;
        let status = self.exchange(&request);
        self.request = request;
        status
    }

    /// Sends a whole request, made before by [`request`], and reads the answer.
    ///
    /// # Errors
    /// As [`RawApi::put`].
    pub fn exchange(&mut self, request: &[u8]) -> io::Result<u16> {
        self.stream.write_all(request)?;
        self.answer.clear();
        self.body = 0;
        loop {
            let mut piece = [0; 4096];
            let read = self.stream.read(&mut piece)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.answer.extend(&piece[..read]);
            if let Some(head) = Head::read(&self.answer)?
                && self.answer.len() >= head.size + head.body
            {
                self.body = head.size;
                return Ok(head.status);
            }
        }
    }
}

/// The bytes of a request, for [`RawApi::exchange`].
pub fn request(method: &str, path: &str, json: &str) -> Vec<u8> {
    let mut request = Vec::new();
    request_into(&mut request, method, path, json).expect("memory takes what is written");
    request
}

fn request_into(request: &mut Vec<u8>, method: &str, path: &str, json: &str) -> io::Result<()> {
    write!(request, "{method} {path} HTTP/1.1\r\nHost: localhost\r\n")?;
    if !json.is_empty() {
        let length = json.len();
        write!(
            request,
            "Content-Type: application/json\r\nContent-Length: {length}\r\n"
        )?;
    }
    write!(request, "\r\n{json}")
}

/// The part of an answer before its body.
struct Head {
    status: u16,
    /// Where the body begins.
    size: usize,
    /// How long the body is.
    body: usize,
}

impl Head {
    /// `None` while more must come.
    fn read(answer: &[u8]) -> io::Result<Option<Head>> {
        let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else {
            return Ok(None);
        };
        let head = std::str::from_utf8(&answer[..end]).map_err(io::Error::other)?;
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        let status = status.unwrap_or("").parse().map_err(io::Error::other)?;
        let mut body = 0;
        for line in lines {
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                body = value.trim().parse().map_err(io::Error::other)?;
            }
        }
        Ok(Some(Head {
            status,
            size: end + 4,
            body,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::RawApi;

    #[test]
    fn answers_with_and_without_a_body_are_read_from_one_connection() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut seen = Vec::new();
            for answer in [
                &["HTTP/1.1 204 \r\nServer: Firecracker API\r\n", "\r\n"][..],
                &[
                    "HTTP/1.1 400 \r\ncontent-length: 20\r\n\r\n",
                    "{\"fault_message\":\"\"}",
                ],
            ] {
                let mut piece = [0; 1024];
                let read = stream.read(&mut piece).unwrap();
                seen.push(String::from_utf8(piece[..read].to_vec()).unwrap());
                for part in answer {
                    stream.write_all(part.as_bytes()).unwrap();
                }
            }
            seen
        });
        let mut api = RawApi::connect(&socket).unwrap();
        assert_eq!(api.put("/actions", "{}").unwrap(), 204);
        assert_eq!(api.body(), "");
        assert_eq!(api.get("/version").unwrap(), 400);
        assert_eq!(api.body(), "{\"fault_message\":\"\"}");
        let seen = server.join().unwrap();
        assert_eq!(
            seen[0],
            "PUT /actions HTTP/1.1\r\nHost: localhost\r\n\
             Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        );
        assert!(seen[1].starts_with("GET /version HTTP/1.1\r\n"));
    }
}
