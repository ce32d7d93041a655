//! The hook directory: programs of the image that set right what only they know of.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rekindle_agent::{Exec, Fate, Hook, HookEnd, Wake};

use super::micros;
use crate::sessions::Sessions;

/// Where they are.
const DIRECTORY: &str = "/etc/rekindle/wake.d";

/// The `PATH` that they get.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// More complaints than the last so many bytes are nobody's business.
const MOST_STDERR: usize = 1 << 10;

/// Runs all of them, one after the other in the order of their names, whatever becomes of each.
pub(super) fn run(sessions: &Arc<Sessions>, wake: &Wake) -> Vec<Hook> {
    run_in(Path::new(DIRECTORY), sessions, wake)
}

fn run_in(directory: &Path, sessions: &Arc<Sessions>, wake: &Wake) -> Vec<Hook> {
    if wake.hooks_ms == 0 {
        return Vec::new();
    }
    let deadline = Instant::now() + Duration::from_millis(wake.hooks_ms.into());
    executables(directory)
        .iter()
        .map(|program| hook(program, sessions, wake, deadline))
        .collect()
}

fn hook(program: &Path, sessions: &Arc<Sessions>, wake: &Wake, deadline: Instant) -> Hook {
    let begun = Instant::now();
    let mut stderr = String::new();
    let end = if begun >= deadline {
        HookEnd::NotStarted("the time for all was over".into())
    } else {
        match sessions.begin_unheard(&exec(program, wake)) {
            Ok(session) => {
                let exit = session.outlast(deadline);
                stderr = last(&session.complaints());
                session.forget();
                exit.map_or(HookEnd::TimedOut, HookEnd::from)
            }
            Err(refusal) => HookEnd::NotStarted(refusal.words),
        }
    };
    let name = program.file_name().unwrap_or_default();
    Hook {
        name: name.to_string_lossy().into_owned(),
        us: micros(begun.elapsed()),
        end,
        stderr,
    }
}

fn exec(program: &Path, wake: &Wake) -> Exec {
    let mut env = vec![
        ("PATH".to_owned(), PATH.to_owned()),
        ("REKINDLE_VM_NAME".to_owned(), wake.vm.name.clone()),
        ("REKINDLE_VM_ID".to_owned(), wake.vm.id.clone()),
    ];
    let hostname = wake.hostname.clone();
    env.extend(hostname.map(|name| ("REKINDLE_HOSTNAME".to_owned(), name)));
    Exec {
        argv: vec![program.to_string_lossy().into_owned()],
        env,
        fate: Fate::LivesOn,
        ..Exec::default()
    }
}

/// The files of a directory that can be run, hidden ones apart. A directory that is not there has none.
fn executables(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
        .map(|entry| entry.path())
        .filter(|path| {
            fs::metadata(path)
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
        .collect();
    found.sort();
    found
}

fn last(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(MOST_STDERR);
    String::from_utf8_lossy(&bytes[from..])
        .trim_end()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::Place;

    fn write(directory: &Path, name: &str, mode: u32, script: &str) {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn run(directory: &Path, sessions: &Arc<Sessions>, hooks_ms: u32) -> Vec<Hook> {
        let mut wake = Wake {
            hooks_ms,
            ..Wake::default()
        };
        wake.vm.name = "web".into();
        run_in(directory, sessions, &wake)
    }

    // One test, as there can be one reaper in a process: two would take each other's programs.
    #[test]
    fn hooks_run_in_order_within_their_time_and_none_stops_another() {
        let sessions = Arc::new(Sessions::new(Place::Apart));
        let reaps = sessions.clone();
        thread::spawn(move || reaps.reap());
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out");
        let directory = place.path().join("wake.d");
        assert_eq!(run(&directory, &sessions, 60_000), []);
        fs::create_dir(&directory).unwrap();
        let out = out.display();
        write(
            &directory,
            "20-b",
            0o755,
            &format!("echo b $REKINDLE_VM_NAME >> {out}"),
        );
        write(
            &directory,
            "10-a",
            0o755,
            &format!("echo a >> {out}; echo broken >&2; exit 3"),
        );
        write(&directory, "30-not", 0o644, &format!("echo not >> {out}"));
        write(
            &directory,
            ".40-not",
            0o755,
            &format!("echo hidden >> {out}"),
        );
        let hooks = run(&directory, &sessions, 60_000);
        let ends: Vec<_> = hooks
            .iter()
            .map(|h| (&*h.name, &h.end, &*h.stderr))
            .collect();
        let expected = [
            ("10-a", &HookEnd::Status(3), "broken"),
            ("20-b", &HookEnd::Status(0), ""),
        ];
        assert_eq!(ends, expected);
        let written = fs::read_to_string(place.path().join("out")).unwrap();
        assert_eq!(written, "a\nb web\n");

        write(
            &directory,
            "10-a",
            0o755,
            "head -c 1000000 /dev/zero >&2; sleep 1000",
        );
        let hooks = run(&directory, &sessions, 200);
        assert_eq!(hooks[0].end, HookEnd::TimedOut);
        assert!(matches!(hooks[1].end, HookEnd::NotStarted(_)), "{hooks:?}");
        assert_eq!(run(&directory, &sessions, 0), []);
    }
}
