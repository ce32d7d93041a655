//! Files that have grown too long to be read in one go.

use std::path::Path;

use anyhow::Result;

use crate::check::{Findings, files, read, shown};
use crate::workspace::Workspace;

/// Lines that a file may have without a reason.
const LINES: usize = 600;

/// Longer files, and why they are.
const EXCUSED: [(&str, &str); 0] = [];

pub(super) fn check(workspace: &Workspace) -> Result<Findings> {
    let mut findings = Vec::new();
    let mut long = Vec::new();
    for file in files(&workspace.root, "rs")? {
        let lines = read(&file)?.lines().count();
        if lines > LINES {
            let path = shown(workspace, &file).to_owned();
            if !is_excused(&path) {
                findings.push(format!("{} has {lines} lines", path.display()));
            }
            long.push(path);
        }
    }
    for (path, reason) in EXCUSED {
        if !long.iter().any(|l| l == Path::new(path)) {
            findings.push(format!(
                "{path} is excused ({reason}) and has at most {LINES} lines"
            ));
        }
    }
    Ok(findings)
}

fn is_excused(path: &Path) -> bool {
    EXCUSED
        .iter()
        .any(|(excused, _)| path == Path::new(excused))
}
