//! SHA-256 of what is read, as OCI names blobs by it.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use ring::digest::{Context, SHA256};
use serde::Deserialize;
use thiserror::Error;

/// `sha256:` and 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Sha256(String);

/// A text is no digest that this program can check.
#[derive(Debug, Error)]
#[error("{0:?} is no digest of the form sha256:<64 hex digits>")]
pub struct InvalidSha256(String);

impl Sha256 {
    /// Of some bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self::finish(&ring::digest::digest(&SHA256, bytes))
    }

    fn finish(digest: &ring::digest::Digest) -> Self {
        let mut text = String::from("sha256:");
        for byte in digest.as_ref() {
            text.push_str(&format!("{byte:02x}"));
        }
        Self(text)
    }

    /// The digits alone, which are a file's name in an OCI layout.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Sha256 {
    type Err = InvalidSha256;

    fn from_str(text: &str) -> Result<Self, InvalidSha256> {
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        match text.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && hex.bytes().all(is_hex) => Ok(Self(text.to_owned())),
            _ => Err(InvalidSha256(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Sha256 {
    type Error = InvalidSha256;

    fn try_from(text: String) -> Result<Self, InvalidSha256> {
        text.parse()
    }
}

/// A stream that is hashed, and counted, as it is read.
pub(crate) struct Hashing<R> {
    stream: R,
    context: Context,
    bytes: u64,
}

impl<R: Read> Hashing<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self {
            stream,
            context: Context::new(&SHA256),
            bytes: 0,
        }
    }

    /// The digest and the length of what was read.
    pub(crate) fn finish(self) -> (Sha256, u64) {
        (Sha256::finish(&self.context.finish()), self.bytes)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.context.update(&buffer[..read]);
        self.bytes += crate::spool::length(read);
        Ok(read)
    }
}
