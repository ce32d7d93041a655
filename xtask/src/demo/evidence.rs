//! What a demo that failed leaves to look at: of each VM its state, what the guest printed, and the logs.

use std::fmt::Write;
use std::fs;
use std::path::Path;

/// How much of each text is shown: its end.
const LINES: usize = 40;

/// What a VM's directory tells. `printed` is what `rekindle logs` says.
pub(super) fn of(name: &str, state: &str, printed: &str, dir: &Path) -> String {
    let mut text = format!("{name} is {state}\n");
    section(&mut text, "what it printed", printed);
    for (file, what) in [
        ("log", "firecracker's log"),
        ("pager.log", "the page server's errors"),
        ("monitor.log", "the monitor's errors"),
    ] {
        let log = fs::read(dir.join(file)).unwrap_or_default();
        section(&mut text, what, &String::from_utf8_lossy(&log));
    }
    text
}

fn section(text: &mut String, what: &str, said: &str) {
    let lines: Vec<&str> = said.lines().collect();
    if lines.is_empty() {
        let _ = writeln!(text, "  {what}: nothing");
        return;
    }
    let _ = writeln!(text, "  {what}:");
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        let _ = writeln!(text, "    {}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mute_copy_is_told_with_the_end_of_its_logs() {
        let place = tempfile::tempdir().unwrap();
        let log: String = (0..100).map(|n| format!("line {n}\n")).collect();
        fs::write(place.path().join("log"), log).unwrap();
        let text = of("copy-1", "failed", "", place.path());
        assert!(
            text.starts_with("copy-1 is failed\n  what it printed: nothing\n"),
            "{text}"
        );
        assert!(text.contains("firecracker's log:\n    line 60\n"), "{text}");
        assert!(text.contains("    line 99\n"), "{text}");
    }
}
