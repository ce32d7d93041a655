//! Waking up as another VM: everything that two copies of one guest must not share, before the first command runs.
//!
//! ```text
//!   console ─▶ thaw ─▶ orphans ─▶ clock ─▶ random ─▶ names ─▶ addresses ─▶ environment ─▶ hooks ─▶ woken
//! ```

mod address;
mod hooks;
mod names;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rekindle_agent::{Clock, Refusal, Step, Wake, What, Why, Woken};
use rustix::fs::{Mode, OFlags};
use rustix::termios::{Action, tcflow};
use rustix::time::{ClockId, Timespec};

use crate::freeze::Freezer;
use crate::program;
use crate::sessions::Sessions;
use crate::sys;

/// Firecracker's serial device.
const CONSOLE: &str = "/dev/ttyS0";

/// Who the guest is, and what came of telling it.
#[derive(Debug, Default)]
pub(crate) struct Identity {
    /// Held while the guest wakes up.
    known: Mutex<Option<(String, Woken)>>,
}

/// The time that the host has, and how long its answer took.
pub(crate) struct HostTime {
    pub(crate) unix: Duration,
    pub(crate) answer_took: Duration,
}

impl Identity {
    /// Does all of it. What fails is told in the answer, and stops nothing else.
    ///
    /// Who asks again, as a host does that has heard no answer, gets the answer from before; only the clock is set once
    /// more, as whoever was to tell the time may have been gone.
    pub(crate) fn wake(
        &self,
        wake: &Wake,
        sessions: &Arc<Sessions>,
        freezer: &Freezer,
        ask_time: impl FnOnce() -> io::Result<HostTime>,
    ) -> Result<Woken, Refusal> {
        check(wake)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((id, woken)) = &mut *known
            && *id == wake.vm.id
        {
            if wake.clock == Clock::SetToHost && set_clock(ask_time).is_ok() {
                let clock = |step: &&mut Step| step.what == What::Clock;
                if let Some(step) = woken.steps.iter_mut().find(clock) {
                    step.problem = None;
                }
            }
            return Ok(woken.clone());
        }
        console();
        let mut woken = Woken::default();
        let mut step = |what, does: &mut dyn FnMut() -> Result<(), String>| {
            let begun = Instant::now();
            let problem = does().err();
            let us = micros(begun.elapsed());
            woken.steps.push(Step { what, us, problem });
        };
        step(What::Thaw, &mut || {
            freezer.thaw();
            Ok(())
        });
        let orphans = sessions.orphan();
        if wake.clock == Clock::SetToHost {
            let mut ask_time = Some(ask_time);
            step(What::Clock, &mut || {
                let ask = ask_time.take().expect("once");
                set_clock(ask).map_err(|error| error.to_string())
            });
        }
        if let Some(seed) = &wake.seed {
            step(What::Random, &mut || random(seed));
        }
        let root = Path::new("/");
        if let Some(name) = &wake.hostname {
            step(What::Hostname, &mut || names::hostname(root, name));
        }
        if let Some(id) = &wake.machine_id {
            step(What::MachineId, &mut || names::machine_id(root, id));
        }
        for address in &wake.addresses {
            step(What::Address, &mut || {
                let set = address::set(address);
                set.map_err(|error| format!("{}: {error}", address.interface))
            });
        }
        sessions.set_environment(wake.env.clone());
        woken.hooks = hooks::run(sessions, wake);
        woken.orphans = orphans;
        *known = Some((wake.vm.id.clone(), woken.clone()));
        Ok(woken)
    }
}

fn check(wake: &Wake) -> Result<(), Refusal> {
    let nonsense = |words: String| {
        let why = Why::Nonsense;
        Err(Refusal { why, words })
    };
    if let Some(words) = program::unusable(&wake.env) {
        return nonsense(words);
    }
    if let Some(name) = &wake.hostname
        && !names::is_hostname(name)
    {
        return nonsense(format!("a guest cannot have the name {name:?}"));
    }
    if let Some(id) = &wake.machine_id
        && !names::is_machine_id(id)
    {
        return nonsense(format!("{id:?} is no machine id"));
    }
    Ok(())
}

/// Has the serial console go on. Firecracker's snapshots do not have the registers of its serial device: a console that was
/// cut off in the middle of a text waits in the copy for an interrupt that nobody asked the device for. To stop and start it
/// asks anew.
fn console() {
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    // A guest without one has nothing to go on with.
    if let Ok(console) = rustix::fs::open(CONSOLE, flags, Mode::empty()) {
        let _ = tcflow(&console, Action::OOff);
        let _ = tcflow(&console, Action::OOn);
    }
}

fn set_clock(ask: impl FnOnce() -> io::Result<HostTime>) -> io::Result<()> {
    let time = ask()?;
    let now = time.unix + time.answer_took / 2;
    let now = Timespec::try_from(now).map_err(io::Error::other)?;
    rustix::time::clock_settime(ClockId::Realtime, now)?;
    Ok(())
}

fn random(seed: &str) -> Result<(), String> {
    let bytes = from_hex(seed).ok_or("the seed is not 64 bytes in hexadecimal digits")?;
    let pool = std::fs::File::open("/dev/urandom").map_err(|e| format!("/dev/urandom: {e}"))?;
    sys::add_entropy(&pool, bytes).map_err(|e| format!("the random pool: {e}"))
}

fn from_hex<const LEN: usize>(digits: &str) -> Option<[u8; LEN]> {
    let digits = digits.as_bytes();
    let mut bytes = [0; LEN];
    if digits.len() != 2 * LEN {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes)
}

/// Microseconds, as answers tell them.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_read_whole_or_not_at_all() {
        assert_eq!(from_hex::<3>("00fFa1"), Some([0, 255, 161]));
        for bad in ["", "00fFa", "00fFa1b2", "00fFg1", "00fFé"] {
            assert_eq!(from_hex::<3>(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_no_guest_can_be_is_refused_before_anything_is_done() {
        let refused = |wake: Wake| check(&wake).unwrap_err().words;
        let env = vec![("A=B".to_owned(), String::new())];
        let wake = Wake::default();
        assert!(check(&wake).is_ok());
        assert!(
            refused(Wake {
                env,
                ..wake.clone()
            })
            .contains("A=B")
        );
        let hostname = Some("a/b".to_owned());
        assert!(
            refused(Wake {
                hostname,
                ..wake.clone()
            })
            .contains("a/b")
        );
        let machine_id = Some("12".to_owned());
        assert!(refused(Wake { machine_id, ..wake }).contains("machine id"));
    }
}
