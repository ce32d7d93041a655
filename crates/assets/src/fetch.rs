//! Downloads: resumable where it is HTTP, and never trusted.
//!
//! ```text
//! <downloads>/<name>.part ──Range: bytes=N-──> server ──> <name>.part ──> whole bytes
//! ```
//!
//! What comes back are bytes from a stranger. The callers compare hashes before anything is
//! installed, let alone run.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ureq::Agent;
use ureq::http::{Response, StatusCode, header};

use crate::event::{Event, Report};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A server that sends nothing for that long is given up; what it sent stays for the next try.
const BODY_TIMEOUT: Duration = Duration::from_secs(300);
/// Between two [`Event::Progress`].
const PROGRESS_STEP: u64 = 4 << 20;
/// No asset is anywhere near that; a server that sends more has gone wrong.
const LONGEST_DOWNLOAD: u64 = 1 << 30;

/// Downloads `url` into `part`, going on where an earlier attempt stopped.
///
/// # Errors
/// When the server cannot be reached within three seconds, refuses, or stops before the end. What
/// arrived stays in `part`.
pub(crate) fn http(url: &str, part: &Path, what: &str, report: &Report) -> Result<()> {
    report(&Event::Fetching { what, source: url });
    let agent: Agent = Agent::config_builder()
        .timeout_resolve(Some(CONNECT_TIMEOUT))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_body(Some(BODY_TIMEOUT))
        .http_status_as_error(false)
        .build()
        .into();
    let have = fs::metadata(part).map_or(0, |m| m.len());
    let mut request = agent.get(url);
    if have > 0 {
        request = request.header(header::RANGE, format!("bytes={have}-"));
    }
    let mut response = request.call()?;
    let start = match response.status() {
        StatusCode::OK => 0,
        StatusCode::PARTIAL_CONTENT => {
            let start = range_start(&response);
            ensure!(
                start == Some(have),
                "the server resumes at another place than it was asked to"
            );
            have
        }
        // The earlier attempt got everything, or something else: its caller will see.
        StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => return Ok(()),
        status => bail!("the server answers {status}"),
    };
    let total = length(&response).map(|rest| start + rest);
    let mut file = File::options().create(true).append(true).open(part)?;
    file.set_len(start)?;
    let mut body = response
        .body_mut()
        .with_config()
        .limit(LONGEST_DOWNLOAD)
        .reader();
    let (mut done, mut reported) = (start, start);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = body.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        file.write_all(&buffer[..n])?;
        done += u64::try_from(n)?;
        if done - reported >= PROGRESS_STEP {
            reported = done;
            report(&Event::Progress { what, done, total });
        }
    }
    ensure!(
        total.is_none_or(|total| done == total),
        "the server stopped after {done} bytes"
    );
    Ok(())
}

fn length<T>(response: &Response<T>) -> Option<u64> {
    response
        .headers()
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

/// `Content-Range: bytes 5-9/10` → 5.
fn range_start<T>(response: &Response<T>) -> Option<u64> {
    let range = response
        .headers()
        .get(header::CONTENT_RANGE)?
        .to_str()
        .ok()?;
    range
        .strip_prefix("bytes ")?
        .split_once('-')?
        .0
        .parse()
        .ok()
}

/// Has pip download one wheel into `directory`, without running anything of it.
///
/// # Errors
/// When there is no python3 with pip, or pip fails; its last words are in the error.
pub(crate) fn wheel(requirement: &str, python: &str, directory: &Path) -> Result<PathBuf> {
    let output = Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ])
        .args(["--python-version", python, "--dest"])
        .arg(directory)
        .arg(requirement)
        .output()
        .context("cannot run python3, which brings pip")?;
    ensure!(
        output.status.success(),
        "pip: {}",
        last_line(&output.stderr)
    );
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "whl") {
            return Ok(path);
        }
    }
    bail!("pip reported success and left no wheel")
}

/// The last line that says something.
pub(crate) fn last_line(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    text.lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("no message")
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::thread::{self, JoinHandle};

    /// Answers one request with `response` and hands back the request's lines.
    fn serve(response: &'static str) -> (String, JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/asset", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let lines = reader
                .by_ref()
                .lines()
                .map(Result::unwrap)
                .take_while(|l| !l.is_empty());
            let lines = lines.map(|l| l.to_ascii_lowercase()).collect();
            (&stream).write_all(response.as_bytes()).unwrap();
            lines
        });
        (url, server)
    }

    fn silent() -> Report {
        Box::new(|_| ())
    }

    #[test]
    fn a_partial_file_is_resumed_at_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let part = directory.path().join("asset.part");
        fs::write(&part, "01234").unwrap();
        let (url, server) = serve(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 5-9/10\r\nContent-Length: 5\r\n\r\n56789",
        );
        http(&url, &part, "asset", &silent()).unwrap();
        assert_eq!(fs::read_to_string(&part).unwrap(), "0123456789");
        assert!(
            server
                .join()
                .unwrap()
                .contains(&"range: bytes=5-".to_owned())
        );
    }

    #[test]
    fn a_server_without_ranges_starts_over() {
        let directory = tempfile::tempdir().unwrap();
        let part = directory.path().join("asset.part");
        fs::write(&part, "stale and longer than the asset").unwrap();
        let (url, server) = serve("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789");
        http(&url, &part, "asset", &silent()).unwrap();
        assert_eq!(fs::read_to_string(&part).unwrap(), "0123456789");
        server.join().unwrap();
    }

    #[test]
    fn what_arrived_before_a_cut_stays_for_the_next_try() {
        let directory = tempfile::tempdir().unwrap();
        let part = directory.path().join("asset.part");
        let (url, server) = serve("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n01234");
        assert!(http(&url, &part, "asset", &silent()).is_err());
        assert_eq!(fs::read_to_string(&part).unwrap(), "01234");
        server.join().unwrap();
    }

    #[test]
    fn a_server_that_resumes_elsewhere_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let part = directory.path().join("asset.part");
        fs::write(&part, "01234").unwrap();
        let (url, server) = serve(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-4/10\r\nContent-Length: 5\r\n\r\n01234",
        );
        assert!(http(&url, &part, "asset", &silent()).is_err());
        assert_eq!(fs::read_to_string(&part).unwrap(), "01234");
        server.join().unwrap();
    }

    #[test]
    fn a_refusal_names_the_status() {
        let directory = tempfile::tempdir().unwrap();
        let (url, server) = serve("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        let refusal = http(&url, &directory.path().join("x.part"), "asset", &silent()).unwrap_err();
        assert!(refusal.to_string().contains("404"), "{refusal}");
        server.join().unwrap();
    }
}
