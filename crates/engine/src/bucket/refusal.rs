//! Why an object store did not do what it was asked, in words that tell what to do next.

use std::time::Duration;

use object_store::Error;
use rekindle_store::causes::with_causes;
use thiserror::Error;

/// Why an object store did not do what it was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The object is not there.
    #[error("it is not there")]
    NotThere,
    /// It ends before what was asked for.
    #[error("it is shorter")]
    Shorter,
    /// Nor is its bucket.
    #[error(
        "there is no such bucket ({said}); it must be made first, and the region must be its own"
    )]
    NoBucket {
        /// What the store said.
        said: String,
    },
    /// The credentials do not suffice.
    #[error(
        "the store does not allow it ({said}); are the credentials in the environment the right ones, and may they read and write here?"
    )]
    NoRights {
        /// What the store said.
        said: String,
    },
    /// There are no credentials.
    #[error(
        "there are no credentials for it ({said}); the environment must have them, AWS_ACCESS_KEY_ID and so on"
    )]
    NoCredentials {
        /// What was tried.
        said: String,
    },
    /// It is not known to be the store: this host trusts nobody who says so.
    #[error(
        "this host does not trust the certificate of the store ({said}); a file that SSL_CERT_FILE names can say whom to trust"
    )]
    NotTrusted {
        /// What is wrong with the certificate.
        said: String,
    },
    /// The store says that the request is wrong.
    #[error(
        "the store takes the request for wrong ({said}); is its region or its endpoint another?"
    )]
    Wrong {
        /// What the store said.
        said: String,
    },
    /// The store, or the way to it, failed.
    #[error("there was no good answer, however often it was asked ({said})")]
    Unwell {
        /// How it failed last.
        said: String,
    },
}

/// What a store answers that is wrong with itself, though it gives it a number of the requester's faults.
const PASSING: [&str; 4] = [
    "status code: 408",
    "status code: 429",
    "<Code>RequestTimeout<",
    "<Code>SlowDown<",
];

impl Refusal {
    pub(super) fn of(error: Error) -> Self {
        let text = with_causes(&error);
        let said = gist(&text);
        match error {
            Error::NotFound { .. }
                if ["NoSuchBucket", "bucket does not exist", "ContainerNotFound"]
                    .iter()
                    .any(|sign| text.contains(sign)) =>
            {
                Self::NoBucket { said }
            }
            Error::NotFound { .. } => Self::NotThere,
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                Self::NoRights { said }
            }
            // The crate looks for credentials at an address that only machines of the cloud know.
            _ if text.contains("169.254.") || text.contains("metadata.google") => {
                Self::NoCredentials { said }
            }
            Error::Generic { .. } if text.contains("invalid peer certificate: ") => {
                Self::NotTrusted { said }
            }
            // To be asked less, or anew.
            Error::Generic { .. } if PASSING.iter().any(|sign| text.contains(sign)) => {
                Self::Unwell { said }
            }
            Error::Generic { .. } if text.contains("status code: 416") => Self::Shorter,
            Error::Generic { .. } if text.contains("status code: 4") => Self::Wrong { said },
            Error::Generic { .. } if text.contains("Received redirect") => Self::Wrong { said },
            Error::Generic { .. } => Self::Unwell { said },
            _ => Self::Wrong { said },
        }
    }

    /// Of one that is `known` to have had credentials: those that are to be had at an address of the cloud come anew every
    /// few hours, and it may be that address that is unwell.
    pub(super) fn of_a_store(self, known: bool) -> Self {
        match self {
            Self::NoCredentials { said } if known => Self::Unwell { said },
            other => other,
        }
    }
}

/// No answer, or not all of it, in so long.
pub(super) fn silence(waited: Duration) -> Error {
    passing(format!("no answer within {} s", waited.as_secs_f32()))
}

/// An answer whose body has another length than its head says.
pub(super) fn length(found: u64, said: u64) -> Error {
    passing(format!("an answer of {found} bytes instead of {said}"))
}

/// Somebody else is writing the same, and it is not there yet.
pub(super) fn contended() -> Error {
    passing("another one is writing the same".to_owned())
}

/// What may be better next time.
fn passing(what: String) -> Error {
    Error::Generic {
        store: "the store",
        source: what.into(),
    }
}

/// How many characters of an answer are repeated.
const LONGEST: usize = 300;

/// What is worth repeating of an error: the code and the sentence of an XML answer, or else the last cause.
///
/// An answer may repeat what the request was signed with, so nothing else of it is told; and it is a stranger's, so it is one
/// line that cannot drive a terminal.
fn gist(text: &str) -> String {
    let said = said(text);
    let line = said.lines().next().unwrap_or_default();
    let plain = line.chars().filter(|letter| !letter.is_control());
    plain.take(LONGEST).collect()
}

fn said(text: &str) -> String {
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        Some(rest.split_once("</")?.0.to_owned())
    };
    match (element("Code"), element("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => match text.split_once("status code: ") {
            // Of a page of HTML, say, the status is all that is known.
            Some((_, rest)) => rest
                .split([':', '<', '\n'])
                .next()
                .unwrap_or(rest)
                .trim()
                .to_owned(),
            None => text.rsplit(": ").next().unwrap_or(text).to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Error {
        Error::Generic {
            store: "S3",
            source: text.to_owned().into(),
        }
    }

    #[test]
    fn only_the_code_and_the_sentence_of_an_answer_are_repeated() {
        let text = "Error performing PUT http://x/ in 1ms - Server returned non-2xx status code: 403 Forbidden: \
            <?xml?><Error><Code>SignatureDoesNotMatch</Code><Message>It differs.</Message>\
            <AWSAccessKeyId>AKIDSECRET</AWSAccessKeyId></Error>";
        assert_eq!(gist(text), "SignatureDoesNotMatch: It differs.");
        let refusal = Refusal::of(Error::PermissionDenied {
            path: "x".into(),
            source: text.into(),
        });
        assert!(matches!(refusal, Refusal::NoRights { .. }));
        assert!(!format!("{refusal} {refusal:?}").contains("AKID"));
    }

    #[test]
    fn an_answer_is_one_short_line_that_cannot_drive_a_terminal() {
        let azures = "<Code>ContainerNotFound</Code><Message>It does not exist.\nRequestId:1\nTime:2</Message>";
        assert_eq!(gist(azures), "ContainerNotFound: It does not exist.");
        let hostile = "<Code>\u{1b}[2JX</Code><Message>\u{9b}31mred\u{7}</Message>";
        assert_eq!(gist(hostile), "[2JX: 31mred");
        assert_eq!(gist(&"x".repeat(10_000)).len(), LONGEST);
    }

    #[test]
    fn what_can_pass_is_told_from_what_cannot() {
        let unwell =
            generic("Server returned non-2xx status code: 500 Internal Server Error: <html>");
        let refusal = Refusal::of(unwell);
        assert!(
            matches!(&refusal, Refusal::Unwell { said } if said == "500 Internal Server Error"),
            "{refusal}"
        );
        let wrong = Refusal::of(generic("status code: 400 Bad Request: "));
        assert!(matches!(wrong, Refusal::Wrong { .. }), "{wrong}");
        let stranger = "error sending request: client error (Connect): invalid peer certificate: UnknownIssuer";
        let refusal = Refusal::of(generic(stranger));
        assert!(
            matches!(&refusal, Refusal::NotTrusted { said } if said == "UnknownIssuer"),
            "{refusal}"
        );
        for passing in [
            "status code: 429 Too Many Requests: <html>",
            "status code: 400 Bad Request: <Code>RequestTimeout</Code><Message>x</Message>",
        ] {
            let refusal = Refusal::of(generic(passing));
            assert!(matches!(refusal, Refusal::Unwell { .. }), "{refusal}");
        }
        let missing = |said: &str| {
            Refusal::of(Error::NotFound {
                path: "x".into(),
                source: said.to_owned().into(),
            })
        };
        assert!(matches!(missing("404"), Refusal::NotThere));
        let beyond = "status code: 416 Requested Range Not Satisfiable: <Code>InvalidRange</Code>";
        assert!(matches!(Refusal::of(generic(beyond)), Refusal::Shorter));
        assert!(matches!(
            missing("<Code>NoSuchBucket</Code>"),
            Refusal::NoBucket { .. }
        ));
        assert!(matches!(
            Refusal::of(silence(Duration::from_secs(1))),
            Refusal::Unwell { said } if said == "no answer within 1 s"
        ));
    }
}
