//! Having a guest's file systems stand still while it is snapshotted, so that its disks are whole without a replay of
//! their journals. A guest that does not answer is snapshotted all the same, and the manifest says so.

use std::time::Duration;

use rekindle_agent::Quiesced;
use rekindle_store::manifest::field::Note;

use super::Vm;
use super::record::GuestAgent;
use super::state::State;
use crate::agent::wake::{StandsStill, quiesce};

/// How long a guest may take to stand still, unless said otherwise.
pub const STANDS_STILL_WITHIN: Duration = Duration::from_secs(2);

/// Whether a guest's file systems stand still for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiesce {
    /// They are as they happen to be, as after a power cut.
    Off,
    /// They stand still, if the guest has an agent that sees to it in this time.
    Within(Duration),
}

impl Default for Quiesce {
    fn default() -> Self {
        Quiesce::Within(STANDS_STILL_WITHIN)
    }
}

impl Vm {
    /// Has the guest stand still until the returned value is dropped, at the latest, and says in words what came of it.
    pub(super) async fn stand_still(&self, asked: Quiesce) -> (Option<StandsStill>, Note) {
        let (still, words) = match (asked, self.ledger.agent(), &self.record.state) {
            (_, None | Some(GuestAgent::Awaited), _) => (None, String::new()),
            (Quiesce::Off, ..) => (None, "the guest was not asked to stand still".to_owned()),
            (Quiesce::Within(limit), _, State::Running) => match quiesce(self.dir(), limit).await {
                Ok(still) => {
                    let words = in_words(&still.quiesced);
                    (Some(still), words)
                }
                Err(error) => (None, format!("the guest did not stand still: {error}")),
            },
            _ => {
                let words = "the guest was paused, and could not be asked to stand still";
                (None, words.to_owned())
            }
        };
        (still, note(&words))
    }
}

fn in_words(quiesced: &Quiesced) -> String {
    let frozen = match quiesced.frozen.as_slice() {
        [] => "no file system can be frozen".to_owned(),
        frozen => format!("frozen: {}", frozen.join(", ")),
    };
    let problems = quiesced.problems.iter();
    let problems: Vec<String> = problems.map(|p| format!("not frozen: {p}")).collect();
    let parts: Vec<String> = std::iter::once(frozen).chain(problems).collect();
    parts.join("; ")
}

/// What a guest says may hold anything.
fn note(words: &str) -> Note {
    let plain: String = words.chars().filter(|c| !c.is_control()).collect();
    plain.parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_says_what_stood_still_whatever_the_guest_calls_it() {
        let quiesced = Quiesced {
            frozen: vec!["/".into(), "/da\u{7}ta".into()],
            problems: vec!["/x: busy".into()],
            ..Quiesced::default()
        };
        let note = note(&in_words(&quiesced));
        assert_eq!(note.as_str(), "frozen: /, /data; not frozen: /x: busy");
    }
}
