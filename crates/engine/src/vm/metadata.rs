//! What a guest may ask Firecracker's metadata service for: MMDS, of version 2, which answers whoever has fetched a token.

use std::fmt;

use rekindle_firecracker::model::MmdsContentsObject;

/// As much as a Firecracker keeps that was not told otherwise, as JSON without blanks (its `--mmds-size-limit`).
pub const MAX_BYTES: usize = 51_200;

/// A JSON object, which may have secrets in it: it is shown nowhere, and not written down, into no snapshot either.
#[derive(Clone, PartialEq, Eq)]
pub struct Metadata(MmdsContentsObject);

/// Why a text is no metadata.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// It is something else.
    #[error("it is not a JSON object")]
    NotAnObject(#[source] serde_json::Error),
    /// Firecracker would refuse it.
    #[error("{0} bytes are more than Firecracker takes, which is {MAX_BYTES}")]
    TooLarge(usize),
}

impl Metadata {
    /// Of a text that is one JSON object.
    pub fn parse(text: &[u8]) -> Result<Metadata, MetadataError> {
        Metadata::of(serde_json::from_slice(text).map_err(MetadataError::NotAnObject)?)
    }

    /// Of such an object.
    pub fn of(contents: MmdsContentsObject) -> Result<Metadata, MetadataError> {
        let size = serde_json::to_vec(&contents)
            .map_err(MetadataError::NotAnObject)?
            .len();
        if size > MAX_BYTES {
            return Err(MetadataError::TooLarge(size));
        }
        Ok(Metadata(contents))
    }

    /// The object.
    pub fn contents(&self) -> &MmdsContentsObject {
        &self.0
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_object_that_is_small_enough_is_metadata() {
        let metadata = Metadata::parse(br#" {"key": "swordfish"} "#).unwrap();
        assert!(!format!("{metadata:?}").contains("swordfish"));
        for bad in ["", "[]", "1", "{", r#"{"a":1} {}"#] {
            let refused = Metadata::parse(bad.as_bytes());
            assert!(
                matches!(refused, Err(MetadataError::NotAnObject(_))),
                "{bad}"
            );
        }
        let of = |size: usize| format!(r#"{{"k":"{}"}}"#, "x".repeat(size - 8));
        assert!(Metadata::parse(of(MAX_BYTES).as_bytes()).is_ok());
        let refused = Metadata::parse(of(MAX_BYTES + 1).as_bytes());
        assert!(matches!(refused, Err(MetadataError::TooLarge(size)) if size == MAX_BYTES + 1));
    }
}
