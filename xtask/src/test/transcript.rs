//! What test programs say, read as it comes: which tests failed and what they said, which were skipped.
//!
//! ```text
//!   running 2 tests            the same from libtest and from the kit's harness, which a console may colour
//!   test a ... ok
//!   test b ... FAILED
//!   successes:                 what tests that passed printed; only SKIPPED lines of it are for people
//!   failures:
//!   ---- b stdout ----         the kit's harness leaves out `stdout`
//!   failures:
//!       b
//!   test result: FAILED.       without it, the program died
//! ```

use std::collections::VecDeque;

/// How many lines of a failed test are kept: the last ones, where the reason is.
const LINES: usize = 60;

/// The last lines of something.
#[derive(Default)]
pub(super) struct Tail(VecDeque<String>);

impl Tail {
    pub(super) fn push(&mut self, line: &str) {
        if self.0.len() == LINES {
            self.0.pop_front();
        }
        self.0.push_back(line.to_owned());
    }

    pub(super) fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// A test that failed, or a test program that died.
pub(super) struct Failure {
    pub(super) name: String,
    pub(super) said: Tail,
}

/// Where in its output a test program is.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Outside,
    Results,
    Successes,
    Failures,
    Names,
}

/// What was said so far.
#[derive(Default)]
pub(super) struct Transcript {
    part: Part,
    /// What the program said that runs now.
    tail: Tail,
    /// The failure whose output comes.
    current: Option<usize>,
    /// Where the failures of the program that runs now begin.
    begun: usize,
    /// How many tests were begun.
    pub(super) begun_tests: usize,
    pub(super) failures: Vec<Failure>,
    pub(super) skipped: Vec<String>,
}

impl Transcript {
    /// Reads a line.
    pub(super) fn line(&mut self, line: &[u8]) {
        let line = plain(&String::from_utf8_lossy(line));
        if let Some(skipped) = line.trim().strip_prefix("SKIPPED ") {
            self.skipped.push(skipped.to_owned());
        }
        if matches!(self.part, Part::Outside | Part::Results) && is_title(&line) {
            self.end();
            self.part = Part::Results;
            self.begun = self.failures.len();
            self.tail = Tail::default();
        }
        self.tail.push(&line);
        match self.part {
            _ if line.starts_with("test result: ") => self.part = Part::Outside,
            Part::Results if line == "successes:" => self.part = Part::Successes,
            Part::Results | Part::Successes if line == "failures:" => {
                self.part = Part::Failures;
                self.current = None;
            }
            Part::Results => {
                let name = line.strip_prefix("test ");
                self.begun_tests += usize::from(name.is_some());
                if let Some((name, "FAILED")) = name.and_then(|rest| rest.rsplit_once(" ... ")) {
                    self.failed(name);
                }
            }
            Part::Failures if line == "failures:" => self.part = Part::Names,
            Part::Failures => self.of_a_failure(&line),
            Part::Names => {
                if let Some(name) = line.strip_prefix("    ") {
                    self.failed(name);
                }
            }
            Part::Outside | Part::Successes => {}
        }
    }

    /// No more comes. A program that has not told its result died.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.part) != Part::Outside {
            let name = "a test program that ended before its tests did".to_owned();
            let said = std::mem::take(&mut self.tail);
            self.failures.push(Failure { name, said });
        }
    }

    /// What was said last of all.
    pub(super) fn tail(&self) -> impl Iterator<Item = &str> {
        self.tail.lines()
    }

    /// Whether what comes now is for people. What tests that passed have printed would bury the rest.
    pub(super) fn is_shown(&self) -> bool {
        self.part != Part::Successes
    }

    fn of_a_failure(&mut self, line: &str) {
        let title = line.strip_prefix("---- ");
        if let Some(title) = title.and_then(|line| line.strip_suffix(" ----")) {
            self.current = Some(self.failed(title.strip_suffix(" stdout").unwrap_or(title)));
        } else if let Some(current) = self.current {
            self.failures[current].said.push(line);
        }
    }

    /// A failure of the program that runs now; it is named up to three times.
    fn failed(&mut self, name: &str) -> usize {
        let name = name.trim();
        let known = &self.failures[self.begun..];
        if let Some(n) = known.iter().position(|failure| failure.name == name) {
            return self.begun + n;
        }
        self.failures.push(Failure {
            name: name.to_owned(),
            said: Tail::default(),
        });
        self.failures.len() - 1
    }
}

fn is_title(line: &str) -> bool {
    let count = line
        .strip_prefix("running ")
        .and_then(|rest| rest.strip_suffix(" tests").or(rest.strip_suffix(" test")));
    count.is_some_and(|count| count.parse::<u32>().is_ok())
}

/// A line without colours and the ends that a console gives it.
pub(super) fn plain(line: &str) -> String {
    let mut text = String::new();
    let mut rest = line;
    while let Some(at) = rest.find("\x1b[") {
        text.push_str(&rest[..at]);
        rest = rest[at + 2..].trim_start_matches(|c: char| !('@'..='~').contains(&c));
        rest = rest.get(1..).unwrap_or("");
    }
    text.push_str(rest);
    text.truncate(text.trim_end_matches('\r').len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Transcript {
        let mut transcript = Transcript::default();
        for line in text.split('\n') {
            transcript.line(line.as_bytes());
        }
        transcript.end();
        transcript
    }

    fn failures(transcript: &Transcript) -> Vec<(&str, String)> {
        let said = |failure: &Failure| failure.said.lines().collect::<Vec<_>>().join("\n");
        transcript
            .failures
            .iter()
            .map(|failure| (failure.name.as_str(), said(failure).trim().to_owned()))
            .collect()
    }

    #[test]
    fn a_failed_test_of_libtest_is_repeated_with_its_panic() {
        let transcript = read(
            "
running 3 tests
test tests::fine ... ok
test tests::odd ... FAILED
test tests::panics - should panic ... ok

successes:

---- tests::fine stdout ----
SKIPPED fine: no KVM

---- tests::panics stdout ----
thread 'tests::panics' panicked at src/lib.rs:9:5:

successes:
    tests::fine
    tests::panics

failures:

---- tests::odd stdout ----

thread 'tests::odd' panicked at src/lib.rs:3:5:
assertion failed: 1 + 1 == 3
note: run with `RUST_BACKTRACE=1`


failures:
    tests::odd

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out

running 1 test
test tests::odd ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out
",
        );
        let [(name, said)] = &failures(&transcript)[..] else {
            panic!("{:?}", failures(&transcript));
        };
        assert_eq!(*name, "tests::odd");
        assert!(
            said.starts_with("thread 'tests::odd' panicked at src/lib.rs:3:5:"),
            "{said}"
        );
        assert!(said.contains("1 + 1 == 3"), "{said}");
        assert_eq!(transcript.skipped, ["fine: no KVM"]);
        assert_eq!(transcript.begun_tests, 4);
    }

    #[test]
    fn a_failed_story_is_repeated_also_from_a_coloured_console() {
        let transcript = read(
            "running 2 tests\r\n\
             test all is well       ... \x1b[32mok\x1b[0m\r\n\
             test a guest goes on   ... \x1b[31mFAILED\x1b[0m\r\n\
             \r\nfailures:\r\n\r\n\
             ---- a guest goes on ----\r\nthe guest said \"n=3\"\r\n\r\n\r\n\
             failures:\r\n    a guest goes on\r\n\r\n\
             test result: \x1b[1;31mFAILED\x1b[0m. 1 passed; 1 failed\r\n\
             SKIPPED a disk fills: it needs root\r\n",
        );
        let said = "the guest said \"n=3\"".to_owned();
        assert_eq!(failures(&transcript), [("a guest goes on", said)]);
        assert_eq!(transcript.skipped, ["a disk fills: it needs root"]);
    }

    #[test]
    fn a_program_that_died_is_a_failure_with_its_last_lines() {
        let transcript = read(
            "running 2 tests\ntest a ... ok\nterminate: out of luck\n\
             running 1 test\ntest b ... FAILED\nkilled",
        );
        let found = failures(&transcript);
        let [first, b, second] = &found[..] else {
            panic!("{found:?}");
        };
        assert!(first.1.ends_with("terminate: out of luck"), "{found:?}");
        assert_eq!((b.0, b.1.as_str()), ("b", ""));
        assert!(second.1.ends_with("test b ... FAILED\nkilled"), "{found:?}");
        assert!(!second.1.contains("out of luck"), "{found:?}");
    }

    #[test]
    fn of_a_long_output_the_end_is_kept() {
        let mut text = "running 1 test\nfailures:\n---- a stdout ----\n".to_owned();
        for n in 0..1000 {
            text.push_str(&format!("line {n}\n"));
        }
        text.push_str("failures:\n    a\ntest result: FAILED.\n");
        let transcript = read(&text);
        let lines: Vec<_> = transcript.failures[0].said.lines().collect();
        assert_eq!(lines.len(), LINES);
        assert_eq!(lines.last(), Some(&"line 999"));
    }
}
