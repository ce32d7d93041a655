//! Which programs the library starts: Firecracker and our own, and no other. What builds images and the lab may start
//! what it names.

use std::path::Path;

use anyhow::Result;

use crate::check::{Findings, files, read, shown};
use crate::workspace::Workspace;

/// Crates that run beside guests.
const CRATES: [&str; 6] = [
    "archive",
    "engine",
    "firecracker",
    "image",
    "pager",
    "store",
];

/// How a program is started.
const START: &str = "Command::new(";

/// Who does, how often, and what.
const STARTS: [(&str, usize, &str); 2] = [
    (
        "crates/engine/src/pager.rs",
        2,
        "our own, as the page server",
    ),
    (
        "crates/firecracker/src/process/launch.rs",
        2,
        "Firecracker, by itself or by its jailer",
    ),
];

pub(super) fn check(workspace: &Workspace) -> Result<Findings> {
    let mut findings = Vec::new();
    let mut known = Vec::new();
    for name in CRATES {
        let sources = workspace.root.join("crates").join(name).join("src");
        for file in files(&sources, "rs")? {
            let path = shown(workspace, &file);
            let found = starts(path, &read(&file)?);
            let allowed = STARTS.iter().find(|(place, ..)| path == Path::new(place));
            known.extend(allowed.map(|(place, ..)| *place));
            let allowed = allowed.map_or(0, |(_, times, _)| *times);
            if found != allowed {
                findings.push(format!(
                    "{} starts a program in {found} places, and may in {allowed}",
                    path.display()
                ));
            }
        }
    }
    for (place, _, what) in STARTS {
        if !known.contains(&place) {
            findings.push(format!("{place} may start {what}, and is not there"));
        }
    }
    Ok(findings)
}

/// In how many places a file starts a program, its tests left out.
fn starts(path: &Path, text: &str) -> usize {
    let is_test = |part: &std::ffi::OsStr| part == "tests" || part == "tests.rs";
    if path.iter().any(is_test) {
        return 0;
    }
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or(text);
    code.matches(START).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_starts_firecracker_and_itself_alone() {
        let workspace = Workspace::find().unwrap();
        assert_eq!(check(&workspace).unwrap(), Findings::new());
    }

    #[test]
    fn a_start_is_seen_outside_of_tests() {
        let text =
            "fn f() { Command::new(\"ip\"); }\n#[cfg(test)]\nmod tests { Command::new(\"sh\") }";
        assert_eq!(starts(Path::new("crates/x/src/a.rs"), text), 1);
        assert_eq!(starts(Path::new("crates/x/src/a/tests.rs"), text), 0);
        assert_eq!(starts(Path::new("crates/x/src/tests/a.rs"), text), 0);
    }
}
