//! Waking up: what a copy must not share with its original is set right before its first command runs.
//!
//! ```text
//!   record "due" ─▶ resume ─▶ agent: clock, random pool, names, addresses, environment, hooks ─▶ record "woken"
//!                                └─ no answer in time ─────────────────────────────────────────▶ record "unanswered"
//! ```
//!
//! Who adopts a VM for which it is due does it. A guest that does not answer is no reason to give it up.

use std::fmt;
use std::time::{Duration, Instant};

pub use rekindle_agent::Address;
use rekindle_agent::{Clock, Hook, HookEnd, PROTOCOL, Vm as Told, Wake, Woken};
use rekindle_store::causes::with_causes;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::record::RecordError;
use super::state::State;
use super::{Vm, micros};
use crate::agent::wake::wake;

/// How long a guest may take to wake up, hooks included, unless said otherwise.
pub const WAKES_WITHIN: Duration = Duration::from_secs(10);

/// What a copy is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WakeConfig {
    /// How long the guest may take.
    pub within: Duration,
    /// Its name; the VM's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Its network addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Address>,
    /// What is added to the environment of its programs. It is written nowhere.
    #[serde(skip)]
    pub env: Environment,
}

impl WakeConfig {
    /// A name and a machine id of its own, the right time, and random numbers that nobody else has.
    pub fn new() -> WakeConfig {
        WakeConfig {
            within: WAKES_WITHIN,
            hostname: None,
            addresses: Vec::new(),
            env: Environment::default(),
        }
    }

    /// Whether it asks for what only a guest with an agent can be.
    pub(crate) fn takes_an_agent(&self) -> bool {
        self.hostname.is_some() || !self.addresses.is_empty() || !self.env.0.is_empty()
    }
}

impl Default for WakeConfig {
    fn default() -> Self {
        WakeConfig::new()
    }
}

/// Variables, which may be secrets: they are shown nowhere, and not written down.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment(Vec<(String, String)>);

impl Environment {
    /// With these names and values.
    pub const fn new(variables: Vec<(String, String)>) -> Environment {
        Environment(variables)
    }

    /// The names and values.
    pub fn variables(&self) -> &[(String, String)] {
        &self.0
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} variables", self.0.len())
    }
}

/// Where a copy is with waking up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
#[non_exhaustive]
pub enum Waking {
    /// It is to be woken as soon as it runs; nothing is run in it before.
    Due {
        /// What it is to be.
        #[serde(flatten)]
        config: WakeConfig,
        /// How many variables it is to get.
        variables: usize,
    },
    /// It was woken.
    Woken {
        /// What was done.
        #[serde(flatten)]
        woken: Woken,
        /// How many variables it got.
        variables: usize,
        /// What it did not get.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        problem: Option<String>,
    },
    /// It runs, and was not woken.
    Unanswered {
        /// Why not.
        why: String,
    },
}

impl Waking {
    /// What is not as it was to be, each in words.
    pub fn problems(&self) -> Vec<String> {
        match self {
            Waking::Due { .. } => Vec::new(),
            Waking::Unanswered { why } => vec![format!("it was not woken up: {why}")],
            Waking::Woken { woken, problem, .. } => {
                let steps = woken.steps.iter().filter_map(|step| step.problem.clone());
                let hooks = woken.hooks.iter().filter_map(hook_problem);
                steps.chain(hooks).chain(problem.clone()).collect()
            }
        }
    }

    pub(crate) fn due(config: &WakeConfig) -> Waking {
        Waking::Due {
            variables: config.env.0.len(),
            config: config.clone(),
        }
    }
}

impl Vm {
    /// Whether the guest is yet to be woken up.
    pub fn is_to_be_woken(&self) -> bool {
        matches!(self.record.waking, Some(Waking::Due { .. }))
    }

    /// Wakes the guest up, if that is due and it runs.
    pub(super) async fn wake_if_due(&mut self) -> Result<(), RecordError> {
        let Some(Waking::Due { config, variables }) = self.record.waking.clone() else {
            return Ok(());
        };
        if self.record.state != State::Running {
            return Ok(());
        }
        let begun = Instant::now();
        let env = std::mem::take(&mut self.environment);
        let told = {
            let asked = |left| self.asked(&config, &env, left);
            tokio::select! {
                told = wake(self.dir(), config.within, asked) => told,
                // Whoever asks next learns how it died.
                () = self.death() => return Ok(()),
            }
        };
        self.record.waking = Some(match told {
            Ok(woken) => Waking::Woken {
                woken,
                variables: env.0.len(),
                problem: (env.0.len() != variables)
                    .then(|| "its environment was lost with the processes that knew it".into()),
            },
            Err(error) => Waking::Unanswered {
                why: with_causes(&error),
            },
        });
        let took = micros(begun);
        self.record.timings.wake_us = Some(took);
        self.record.timings.total_us = self.record.timings.total_us.map(|total| total + took);
        self.write_record()
    }

    fn asked(&self, config: &WakeConfig, env: &Environment, left: Duration) -> Wake {
        let hostname = config.hostname.clone();
        // Time for the answer is left when the hooks have used up theirs.
        let hooks = left - left / 8;
        Wake {
            protocol: PROTOCOL,
            vm: Told {
                name: self.record.name.to_string(),
                id: self.record.id.clone(),
            },
            seed: Some(random_hex::<64>()),
            clock: Clock::SetToHost,
            hostname: Some(hostname.unwrap_or_else(|| self.record.name.to_string())),
            machine_id: Some(random_hex::<16>()),
            addresses: config.addresses.clone(),
            env: env.0.clone(),
            hooks_ms: u32::try_from(hooks.as_millis()).unwrap_or(u32::MAX),
        }
    }
}

fn hook_problem(hook: &Hook) -> Option<String> {
    let end = match &hook.end {
        HookEnd::Status(0) => return None,
        HookEnd::Status(status) => format!("ended with status {status}"),
        HookEnd::Signal(signal) => format!("was ended by signal {signal}"),
        HookEnd::TimedOut => "took too long".to_owned(),
        HookEnd::NotStarted(why) => format!("was not run: {why}"),
    };
    let said = match &*hook.stderr {
        "" => String::new(),
        said => format!(": {said}"),
    };
    Some(format!("the hook {} {end}{said}", hook.name))
}

/// So many bytes that nobody else has.
fn random_hex<const LEN: usize>() -> String {
    let mut bytes = [0; LEN];
    // Up to 256 bytes come whole or not at all.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_neither_shown_nor_written_down() {
        let config = WakeConfig {
            env: Environment::new(vec![("KEY".into(), "swordfish".into())]),
            ..WakeConfig::new()
        };
        let due = Waking::due(&config);
        let json = serde_json::to_string(&due).unwrap();
        assert!(!json.contains("swordfish") && json.contains(r#""variables":1"#));
        assert!(!format!("{due:?}").contains("swordfish"));
        let read: Waking = serde_json::from_str(&json).unwrap();
        let without = WakeConfig::new();
        let expected = Waking::Due {
            config: without,
            variables: 1,
        };
        assert_eq!(read, expected);
        assert_ne!(random_hex::<16>(), random_hex::<16>());
    }
}
