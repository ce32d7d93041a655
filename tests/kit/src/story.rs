//! The harness of tests that may be skipped, with the reason counted and printed.
//!
//! ```text
//!   story ── Ok ──────────────▶ ok
//!         ── Err(Skipped) ────▶ ignored, and `SKIPPED <story>: <reason>` at the end
//!         ── Err, panic, late ▶ failed; a late one may be told once more
//! ```
//!
//! For test targets with `harness = false`; it takes the arguments that `cargo test` gives.

use std::cmp::Reverse;
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::require::Skipped;

/// What a story may take unless it says otherwise.
const LIMIT: Duration = Duration::from_secs(120);

/// How many seconds a story is thought to take unless it says otherwise.
const USUAL: u32 = 40;

/// A story that takes longer is worth a look, and says so.
const SLOW: Duration = Duration::from_secs(60);

/// What cleaning up after a late one may take. Whatever made it late may hold that up as well.
const CLEAN_UP: Duration = Duration::from_secs(60);

/// A test, told from beginning to end.
pub struct Story {
    name: &'static str,
    limit: Duration,
    tell: Arc<dyn Fn() -> anyhow::Result<()> + Send + Sync>,
    clean_up: Option<fn()>,
    /// How often it may be told.
    tries: u32,
    /// How many seconds it is thought to take.
    takes: u32,
}

impl Story {
    /// A story whose name is a sentence.
    pub fn new(
        name: &'static str,
        tell: impl Fn() -> anyhow::Result<()> + Send + Sync + 'static,
    ) -> Story {
        Story {
            name,
            limit: LIMIT,
            tell: Arc::new(tell),
            clean_up: None,
            tries: 1,
            takes: USUAL,
        }
    }

    /// It is thought to take so many seconds: for who tells stories in several places, and no limit.
    #[must_use]
    pub fn takes(mut self, seconds: u32) -> Story {
        self.takes = seconds;
        self
    }

    /// A story that is told by a future, on a current-thread runtime of its own.
    pub fn future<F>(name: &'static str, tell: impl Fn() -> F + Send + Sync + 'static) -> Story
    where
        F: Future<Output = anyhow::Result<()>>,
    {
        Story::new(name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(tell())
        })
    }

    /// The same, but it fails only when it has not ended after `limit`; two minutes unless set.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Story {
        self.limit = limit;
        self
    }

    /// When it is not over in time, its thread cannot be ended; `clean_up` ends what it has started, so that those
    /// after it have the machine.
    #[must_use]
    pub fn or_else(mut self, clean_up: fn()) -> Story {
        self.clean_up = Some(clean_up);
        self
    }

    /// One that is late is told once more, and says so: where the machine itself loses a guest now and then, which the
    /// story cannot tell from its own fault. One that fails is not.
    #[must_use]
    pub fn again_if_late(mut self) -> Story {
        self.tries = 2;
        self
    }

    fn run(mut self) -> anyhow::Result<()> {
        loop {
            self.tries -= 1;
            match self.try_it() {
                Err(error) if error.is::<Late>() && self.tries > 0 => {
                    println!("{error}; told once more");
                }
                end => return end,
            }
        }
    }

    fn try_it(&self) -> anyhow::Result<()> {
        let (sender, receiver) = mpsc::channel();
        let tell = Arc::clone(&self.tell);
        let teller = thread::Builder::new()
            .name(self.name.to_owned())
            .spawn(move || {
                // Nobody receives when the time is over.
                let _ = sender.send(tell());
            })?;
        match receiver.recv_timeout(self.limit) {
            Ok(end) => end,
            Err(RecvTimeoutError::Timeout) => {
                if let Some(clean_up) = self.clean_up {
                    run_for(CLEAN_UP, clean_up);
                }
                Err(Late(self.limit).into())
            }
            Err(RecvTimeoutError::Disconnected) => match teller.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => anyhow::bail!("it ended without an outcome"),
            },
        }
    }
}

/// A story that was not over in time.
#[derive(Debug, thiserror::Error)]
#[error("not over after {0:?}")]
struct Late(Duration);

/// Runs something, and goes on without it when it takes too long.
fn run_for(time: Duration, what: fn()) {
    let (sender, receiver) = mpsc::channel::<()>();
    thread::spawn(move || {
        what();
        drop(sender);
    });
    let _ = receiver.recv_timeout(time);
}

/// Which of a target's stories are told: `1/2` is about half of them, by how long they take, `2/2` are the others.
const PART: &str = "REKINDLE_PART";

/// Runs the stories as the command line asks, and prints the reason of each that was skipped. With `REKINDLE_PART` they
/// are told in several places at once, in each a part of them.
pub fn main(stories: Vec<Story>) -> ExitCode {
    let stories = match std::env::var(PART) {
        Err(_) => stories,
        Ok(part) => match of_part(&part, stories, |story| story.takes) {
            Some(stories) => stories,
            None => {
                eprintln!("{PART}={part}: not a part of a whole, such as 1/2");
                return ExitCode::FAILURE;
            }
        },
    };
    run(&Arguments::from_args(), stories)
}

/// One after the other, the longest first, each goes to the part that has the least to tell by then.
fn of_part<T>(part: &str, mut stories: Vec<T>, takes: impl Fn(&T) -> u32) -> Option<Vec<T>> {
    let (n, of) = part.split_once('/')?;
    let (n, of): (usize, usize) = (n.parse().ok()?, of.parse().ok()?);
    if !(1..=of).contains(&n) {
        return None;
    }
    stories.sort_by_key(|story| Reverse(takes(story)));
    let mut parts: Vec<(u32, Vec<T>)> = (0..of).map(|_| (0, Vec::new())).collect();
    for story in stories {
        let (sum, its) = parts.iter_mut().min_by_key(|(sum, _)| *sum)?;
        *sum += takes(&story);
        its.push(story);
    }
    Some(parts.swap_remove(n - 1).1)
}

fn run(arguments: &Arguments, stories: Vec<Story>) -> ExitCode {
    let skips = Arc::new(Mutex::new(Vec::new()));
    let trials = stories
        .into_iter()
        .map(|story| {
            let skips = Arc::clone(&skips);
            Trial::ignorable_test(story.name, move || outcome(story, &skips))
        })
        .collect();
    let conclusion = libtest_mimic::run(arguments, trials);
    for skip in &*skips.lock().unwrap_or_else(PoisonError::into_inner) {
        println!("SKIPPED {skip}");
    }
    conclusion.exit_code()
}

fn outcome(story: Story, skips: &Mutex<Vec<String>>) -> Result<Completion, Failed> {
    let name = story.name;
    let begun = Instant::now();
    let end = story.run();
    if begun.elapsed() > SLOW {
        println!("slow: {} s", begun.elapsed().as_secs());
    }
    match end {
        Ok(()) => Ok(Completion::Completed),
        Err(error) if error.is::<Skipped>() => {
            let reason = format!("{error:#}");
            let mut skips = skips.lock().unwrap_or_else(PoisonError::into_inner);
            skips.push(format!("{name}: {reason}"));
            Ok(Completion::ignored_with(reason))
        }
        Err(error) => Err(format!("{error:#}").into()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::Duration;

    use libtest_mimic::Completion;

    use super::{Story, of_part, outcome};
    use crate::require::Skipped;

    #[test]
    fn a_skip_is_no_failure_and_says_why() {
        let skips = Mutex::new(Vec::new());
        let story = Story::new("a guest runs", || Err(Skipped::Root.into()));
        assert!(matches!(
            outcome(story, &skips),
            Ok(Completion::Ignored { reason: Some(reason) }) if reason == "it needs root"
        ));
        assert_eq!(skips.into_inner().unwrap(), ["a guest runs: it needs root"]);
    }

    #[test]
    fn an_error_and_a_story_without_end_are_failures() {
        let skips = Mutex::new(Vec::new());
        let story = Story::new("it fails", || anyhow::bail!("the guest is gone"));
        let failed = outcome(story, &skips).err().unwrap();
        assert_eq!(failed.message(), Some("the guest is gone"));

        let story = Story::new("it hangs", || {
            loop {
                std::thread::park();
            }
        });
        let failed = outcome(story.within(Duration::from_millis(5)), &skips).err();
        assert_eq!(failed.unwrap().message(), Some("not over after 5ms"));
    }

    #[test]
    fn what_a_story_without_end_has_started_is_cleaned_up() {
        static CLEAN: AtomicBool = AtomicBool::new(false);
        let hangs = || {
            loop {
                std::thread::park();
            }
        };
        let clean_up = || CLEAN.store(true, Ordering::Relaxed);
        let ends = Story::new("it ends", || Ok(())).or_else(clean_up);
        ends.run().unwrap();
        assert!(!CLEAN.load(Ordering::Relaxed));
        let hangs = Story::new("it hangs", hangs).within(Duration::from_millis(5));
        hangs.or_else(clean_up).run().unwrap_err();
        assert!(CLEAN.load(Ordering::Relaxed));
    }

    #[test]
    fn only_a_late_story_is_told_again_and_only_where_it_may_be() {
        static TOLD: AtomicU32 = AtomicU32::new(0);
        let late_at_first = || {
            if TOLD.fetch_add(1, Ordering::Relaxed) == 0 {
                std::thread::sleep(Duration::from_secs(5));
            }
            anyhow::bail!("it fails in time")
        };
        let story = || Story::new("it is late", late_at_first).within(Duration::from_millis(50));
        let end = story().again_if_late().run().unwrap_err().to_string();
        assert_eq!(
            (end.as_str(), TOLD.load(Ordering::Relaxed)),
            ("it fails in time", 2)
        );
        TOLD.store(0, Ordering::Relaxed);
        let end = story().run().unwrap_err().to_string();
        assert_eq!(
            (end.as_str(), TOLD.load(Ordering::Relaxed)),
            ("not over after 50ms", 1)
        );
    }

    #[test]
    fn parts_have_each_story_once() {
        let part = |part| of_part(part, vec![1, 9, 2, 3, 4], |takes| *takes);
        assert_eq!(part("1/1"), Some(vec![9, 4, 3, 2, 1]));
        assert_eq!(part("1/2"), Some(vec![9, 1]));
        assert_eq!(part("2/2"), Some(vec![4, 3, 2]));
        assert_eq!(part("3/3"), Some(vec![3, 2]));
        for wrong in ["", "1", "0/2", "3/2", "0/0", "1/0", "-1/2", "1/2/3"] {
            assert_eq!(part(wrong), None, "{wrong}");
        }
    }

    #[test]
    #[should_panic(expected = "a page is wrong")]
    fn a_panic_reaches_the_harness() {
        let _ = Story::new("it panics", || panic!("a page is wrong")).run();
    }

    #[test]
    fn a_future_is_told_to_its_end() {
        let story = Story::future("it sleeps", || async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(())
        });
        story.run().unwrap();
    }
}
