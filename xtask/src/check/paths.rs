//! Paths that the documents name must exist.
//!
//! ```text
//! README.md, CHANGELOG.md, docs/**/*.md, <crate>/**/*.md
//!    `crates/store/src/lib.rs`   from the workspace's root
//!    `store/src/lib.rs`          from crates/, as the documents like to say
//!    [text](architecture.md)     from the document
//! ```
//!
//! What is not meant to exist is written so that it cannot be taken for a path: with `<…>`, `…`
//! or `*` in it.

use std::path::Path;

use anyhow::Result;

use crate::check::{Findings, files, read, shown};
use crate::workspace::Workspace;

pub(super) fn check(workspace: &Workspace) -> Result<Findings> {
    let mut findings = Vec::new();
    for document in files(&workspace.root, "md")? {
        let text = read(&document)?;
        let shown = shown(workspace, &document).display();
        let missing = missing(
            &workspace.root,
            document.parent().unwrap_or(&document),
            &text,
        );
        findings.extend(
            missing
                .into_iter()
                .map(|path| format!("{shown}: there is no {path}")),
        );
    }
    Ok(findings)
}

fn missing(root: &Path, document: &Path, text: &str) -> Vec<String> {
    let quoted = code(text)
        .filter(|word| is_path(root, word))
        .flat_map(expand)
        .filter(|path| {
            let path = without_line(path);
            !root.join(path).exists() && !root.join("crates").join(path).exists()
        });
    let linked = links(text)
        .filter(|link| !document.join(without_anchor(link)).exists())
        .map(str::to_owned);
    let mut missing = quoted.chain(linked).collect::<Vec<_>>();
    missing.sort();
    missing.dedup();
    missing
}

/// What stands in single backticks, outside of fenced blocks.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    let lines = text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    });
    lines.flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Whether a word is meant as a path of this repository: its first part is a directory at the
/// root or one of the crates, and nothing in it is a placeholder.
fn is_path(root: &Path, word: &str) -> bool {
    let Some((first, _)) = word.split_once('/') else {
        return false;
    };
    let placeholder = |c: char| c.is_whitespace() || "<>…*$()|".contains(c);
    !first.is_empty()
        && first != "target"
        && !first.starts_with("..")
        && !word.contains(placeholder)
        && (root.join(first).is_dir() || root.join("crates").join(first).is_dir())
}

/// `a/{b,c}.rs` → `a/b.rs`, `a/c.rs`.
fn expand(word: &str) -> Vec<String> {
    let Some((before, rest)) = word.split_once('{') else {
        return vec![word.to_owned()];
    };
    let Some((choices, after)) = rest.split_once('}') else {
        return vec![word.to_owned()];
    };
    choices
        .split(',')
        .flat_map(|choice| expand(&format!("{before}{}{after}", choice.trim())))
        .collect()
}

/// `a.rs:12` → `a.rs`.
fn without_line(path: &str) -> &str {
    path.split_once(':').map_or(path, |(path, _)| path)
}

fn without_anchor(link: &str) -> &str {
    link.split_once('#').map_or(link, |(path, _)| path)
}

/// Targets of links to files.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .map(|(target, _)| target);
    targets.filter(|t| {
        !t.contains("://") && !t.starts_with(['#', '<']) && !t.contains(char::is_whitespace)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn paths_that_do_not_exist_are_found_and_others_let_be() {
        let root = tempfile::tempdir().unwrap();
        for file in [
            "crates/store/src/lib.rs",
            "crates/store/src/pages.rs",
            "docs/lab.md",
        ] {
            fs::create_dir_all(root.path().join(file).parent().unwrap()).unwrap();
            fs::write(root.path().join(file), "").unwrap();
        }
        let text = "\
`crates/store/src/lib.rs`, `store/src/lib.rs:12`, `store/src/{lib,pages,gone}.rs`, `docs/`
`crates/store/src/nowhere.rs` and `crates/<name>/src`, `/dev/kvm`, `application/json`, `a b`
[lab](lab.md#top) [none](none.md) [web](https://example.org/x) [here](#here)
```
`crates/inside/a/block.rs`
```
";
        let expected = [
            "crates/store/src/nowhere.rs",
            "none.md",
            "store/src/gone.rs",
        ];
        assert_eq!(
            missing(root.path(), &root.path().join("docs"), text),
            expected
        );
    }
}
