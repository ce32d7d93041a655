//! Firecracker, its jailer, and who may change them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use rekindle_engine::programs::Programs;

use super::super::finding::{Finding, Verdict};

/// Upstream supports a jailer only with the Firecracker of the same release.
pub(super) fn jailer(programs: &Programs) -> Finding {
    match programs.jailer() {
        Ok(jailer) => judge_jailer(&programs.firecracker, &jailer),
        Err(e) => Finding::advice("jailer", e.to_string(), "rekindle setup"),
    }
}

fn judge_jailer(firecracker: &Path, jailer: &Path) -> Finding {
    let advice = |found: String| {
        Finding::advice(
            "jailer",
            found,
            "put the jailer of Firecracker's own release archive beside it, or name it in $REKINDLE_JAILER",
        )
    };
    let (Some(its), Some(ours)) = (version(jailer), version(firecracker)) else {
        return advice(format!("{} does not work", jailer.display()));
    };
    if its != ours {
        return advice(format!(
            "{} is of {its}, and Firecracker of {ours}",
            jailer.display()
        ));
    }
    Finding::good(
        "jailer",
        format!("{}, of Firecracker's release", jailer.display()),
    )
}

/// The last word of the first line of what it prints: `Firecracker v1.12.1`, `Jailer v1.12.1`.
fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let word = text.lines().next()?.split_whitespace().last()?;
    word.starts_with('v').then(|| word.to_owned())
}

/// Whoever may write to Firecracker, or rename it away, decides what runs as whoever starts VMs.
pub(super) fn owners(firecracker: &Path) -> Finding {
    let me = rustix::process::geteuid().as_raw();
    let firecracker = fs::canonicalize(firecracker).unwrap_or_else(|_| firecracker.into());
    match firecracker.ancestors().find_map(|path| stranger(path, me)) {
        None => Finding::good(
            "programs' owners",
            format!(
                "nobody but root and you may change {}",
                firecracker.display()
            ),
        ),
        Some(why) => Finding::other(
            "programs' owners",
            Verdict::Limited,
            format!("{why}, and so decides what runs as you"),
            "install Firecracker where only root may write: sudo rekindle setup",
        ),
    }
}

/// Who else may change what is there.
fn stranger(path: &Path, me: u32) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    let shown = path.display();
    if meta.uid() != 0 && meta.uid() != me {
        return Some(format!("{shown} belongs to the user {}", meta.uid()));
    }
    // In a directory with the sticky bit, nobody renames or removes what belongs to another.
    let kept = meta.is_dir() && meta.mode() & 0o1000 != 0;
    let others = meta.mode() & 0o002 != 0;
    // A group of one's own name is the usual umask's; root's group has only root.
    let group = meta.mode() & 0o020 != 0 && meta.gid() != 0 && meta.gid() != me;
    (!kept && (others || group)).then(|| format!("{shown} may be written by others"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn program(path: &Path, text: &str) {
        // By another process: a program that any thread's child has open for writing cannot be started.
        let script = format!("printf '#!/bin/sh\\necho {text}\\n' > \"$0\"; chmod 700 \"$0\"");
        let made = Command::new("sh").arg("-c").arg(script).arg(path).status();
        assert!(made.unwrap().success());
    }

    #[test]
    fn a_jailer_of_another_release_is_no_help() {
        let place = tempfile::tempdir().unwrap();
        let [firecracker, jailer] = ["firecracker", "jailer"].map(|name| place.path().join(name));
        program(&firecracker, "Firecracker v1.12.1");
        let finding = judge_jailer(&firecracker, &jailer);
        assert!(finding.found.contains("does not work"), "{finding:?}");
        program(&jailer, "Jailer v1.11.0");
        let finding = judge_jailer(&firecracker, &jailer);
        assert!(finding.found.contains("is of v1.11.0"), "{finding:?}");
        program(&jailer, "Jailer v1.12.1");
        assert_eq!(judge_jailer(&firecracker, &jailer).verdict, Verdict::Good);
    }

    #[test]
    fn who_else_may_change_firecracker_is_named() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("firecracker");
        fs::write(&path, "").unwrap();
        assert_eq!(owners(&path).verdict, Verdict::Good);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o702)).unwrap();
        let finding = owners(&path);
        assert_eq!(finding.verdict, Verdict::Limited);
        assert!(
            finding.found.contains("firecracker may be written"),
            "{finding:?}"
        );
        let me = rustix::process::geteuid().as_raw();
        if me != 0 {
            return;
        }
        std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
        let finding = owners(&path);
        assert!(finding.found.contains("the user 4711"), "{finding:?}");
    }
}
