//! What the owner of a VM tells the agent around a snapshot: that the guest is another VM from now on, or that it is to
//! stand still.

use std::time::Duration;

use jiff::Timestamp;
use rekindle_agent::{
    Frame, FromAgent, FromHost, Hook, HookEnd, PROTOCOL, Quiesce, Quiesced, Step, Wake, Woken,
};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::connect::{self, Line};
use super::{AgentError, FIRST_PAUSE};
use crate::vm::dir::VmDir;

/// A guest whose host does not thaw it does so itself after this long.
const THAWS_AFTER: Duration = Duration::from_secs(5);

/// So long an agent that took a call may say nothing before it is called anew; each time twice as long. Firecracker up to
/// 1.15 can lose sight of what it has for a guest that was just loaded, until there is something else for it.
const FIRST_PATIENCE: Duration = Duration::from_secs(2);

/// Of what a guest says so much is believed, and kept.
const MOST_ENTRIES: usize = 64;
const LONGEST_TEXT: usize = 200;

/// Why a guest did not do what it was told before it was to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("no answer within {within:?}")]
    Silent {
        within: Duration,
        /// What came of the last call that ended before.
        #[source]
        last: Option<AgentError>,
    },
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// Tells a guest that it is another VM. `wake` is made when there is a connection, with the time that is left.
pub(crate) async fn wake(
    dir: &VmDir,
    within: Duration,
    wake: impl Fn(Duration) -> Wake,
) -> Result<Woken, Failure> {
    let deadline = Instant::now() + within;
    let (mut pause, mut patience) = (FIRST_PAUSE, FIRST_PATIENCE);
    let mut last = None;
    let tells = async {
        loop {
            let asked = FromHost::Wake(Box::new(wake(deadline - Instant::now())));
            match tell(dir, &asked, patience).await {
                Ok(woken) => return Ok(bounded(woken)),
                Err(error @ (AgentError::Refused(_) | AgentError::Nonsense)) => return Err(error),
                Err(error @ AgentError::Unanswered) => {
                    last = Some(error);
                    patience *= 2;
                }
                // A guest that has just been loaded may yet reset a connection, and one that boots has no agent yet.
                // Nothing tells when it does.
                Err(error) => {
                    last = Some(error);
                    sleep(pause).await;
                    pause *= 2;
                }
            }
        }
    };
    let told = timeout_at(deadline, tells).await;
    match told {
        Ok(told) => Ok(told?),
        Err(_) => Err(Failure::Silent { within, last }),
    }
}

async fn tell(dir: &VmDir, asked: &FromHost, patience: Duration) -> Result<Woken, AgentError> {
    let mut line = open(dir).await?;
    let told = async {
        line.send(&asked.frame()).await?;
        loop {
            match next(&mut line).await? {
                FromAgent::WhatTime => line.send(&time().frame()).await?,
                FromAgent::Woken(woken) => return Ok(woken),
                FromAgent::Refused(refusal) => return Err(AgentError::Refused(refusal)),
                _ => return Err(AgentError::Nonsense),
            }
        }
    };
    let told = timeout(patience, told).await;
    told.unwrap_or(Err(AgentError::Unanswered))
}

fn time() -> FromHost {
    let unix_ns = Timestamp::now().as_nanosecond();
    FromHost::Time {
        unix_ns: u64::try_from(unix_ns).unwrap_or_default(),
    }
}

/// A guest whose file systems stand still for as long as this lives, until Firecracker resets the connection, which it
/// does at a snapshot, or until its agent has waited long enough.
#[derive(Debug)]
pub(crate) struct StandsStill {
    pub(crate) quiesced: Quiesced,
    _line: Line,
}

/// Has the file systems of a guest stand still.
pub(crate) async fn quiesce(dir: &VmDir, within: Duration) -> Result<StandsStill, Failure> {
    let millis = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
    let asks = async {
        let mut line = open(dir).await?;
        let quiesce = Quiesce {
            protocol: PROTOCOL,
            within_ms: millis(within),
            thaw_after_ms: millis(THAWS_AFTER),
        };
        line.send(&FromHost::Quiesce(quiesce).frame()).await?;
        match next(&mut line).await? {
            FromAgent::Quiesced(mut quiesced) => {
                shorten(&mut quiesced.frozen);
                shorten(&mut quiesced.problems);
                Ok(StandsStill {
                    quiesced,
                    _line: line,
                })
            }
            FromAgent::Refused(refusal) => Err(AgentError::Refused(refusal)),
            _ => Err(AgentError::Nonsense),
        }
    };
    match tokio::time::timeout(within, asks).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Failure::Silent { within, last: None }),
    }
}

async fn open(dir: &VmDir) -> Result<Line, AgentError> {
    match connect::connect(dir).await {
        Ok(stream) => Ok(Line::new(stream)),
        Err(source) => Err(AgentError::Silent {
            vm: dir.name(),
            source,
        }),
    }
}

async fn next(line: &mut Line) -> Result<FromAgent, AgentError> {
    match line.next().await? {
        Some(Frame::Message(json)) => Ok(FromAgent::parse(&json)?),
        Some(_) => Err(AgentError::Nonsense),
        None => Err(AgentError::HungUp),
    }
}

/// What of a guest's answer goes into a record.
fn bounded(mut woken: Woken) -> Woken {
    woken.steps.truncate(MOST_ENTRIES);
    woken.hooks.truncate(MOST_ENTRIES);
    woken.orphans.truncate(MOST_ENTRIES);
    for Step { problem, .. } in &mut woken.steps {
        problem.iter_mut().for_each(cut);
    }
    for Hook {
        name, end, stderr, ..
    } in &mut woken.hooks
    {
        cut(name);
        cut(stderr);
        if let HookEnd::NotStarted(why) = end {
            cut(why);
        }
    }
    woken
}

fn shorten(texts: &mut Vec<String>) {
    texts.truncate(MOST_ENTRIES);
    texts.iter_mut().for_each(cut);
}

fn cut(text: &mut String) {
    let end = text.floor_char_boundary(LONGEST_TEXT);
    text.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_can_say_only_so_much() {
        let step = Step {
            what: rekindle_agent::What::Clock,
            us: 1,
            problem: Some("ä".repeat(1000)),
        };
        let woken = Woken {
            steps: vec![step; 1000],
            ..Woken::default()
        };
        let kept = bounded(woken);
        assert_eq!(kept.steps.len(), 64);
        assert_eq!(kept.steps[63].problem.as_ref().unwrap().len(), 200);
    }
}
