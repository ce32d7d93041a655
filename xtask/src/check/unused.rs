//! Dependencies whose name occurs nowhere in the sources that could use them.
//!
//! A name in a comment counts as a use, so this misses some; what it finds is unused.

use std::path::Path;

use anyhow::Result;

use crate::check::{Findings, files, read};
use crate::workspace::{Package, Workspace};

pub(super) fn check(workspace: &Workspace) -> Result<Findings> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        findings.extend(unused(package)?);
    }
    Ok(findings)
}

fn unused(package: &Package) -> Result<Findings> {
    let sources = |keep: &dyn Fn(&Path) -> bool| -> Result<String> {
        let files = files(package.directory(), "rs")?;
        files.iter().filter(|f| keep(f)).map(|f| read(f)).collect()
    };
    let built = sources(&|path| path.starts_with(package.directory().join("src")))?;
    let build_script = sources(&|path| path.ends_with("build.rs"))?;
    let everything = sources(&|_| true)?;
    let mut findings = Vec::new();
    for dependency in &package.dependencies {
        let text = match dependency.kind.as_deref() {
            Some("dev") => &everything,
            Some("build") => &build_script,
            _ => &built,
        };
        let name = dependency
            .rename
            .as_ref()
            .unwrap_or(&dependency.name)
            .replace('-', "_");
        if !mentions(text, &name) {
            findings.push(format!("{} does not use {}", package.name, dependency.name));
        }
    }
    Ok(findings)
}

/// Whether `name` stands in `text` as a word of its own.
fn mentions(text: &str, name: &str) -> bool {
    let part_of_a_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| {
        !text[..at].ends_with(part_of_a_word)
            && !text[at + name.len()..].starts_with(part_of_a_word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Dependency;
    use std::fs;

    #[test]
    fn only_whole_words_count() {
        assert!(mentions("use tar::Archive;", "tar"));
        assert!(mentions("(tar)", "tar"));
        assert!(!mentions("let start = target;", "tar"));
        assert!(!mentions("tar_member()", "tar"));
    }

    #[test]
    fn a_dependency_of_the_program_must_be_used_by_the_program() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("src")).unwrap();
        fs::create_dir(directory.path().join("tests")).unwrap();
        fs::write(directory.path().join("src/lib.rs"), "use used_one::A;").unwrap();
        fs::write(directory.path().join("tests/t.rs"), "use for_tests::B;").unwrap();
        let dependency = |name: &str, kind: Option<&str>| Dependency {
            name: name.into(),
            rename: None,
            kind: kind.map(str::to_owned),
            path: None,
        };
        let package = Package {
            name: "p".into(),
            manifest_path: directory.path().join("Cargo.toml"),
            targets: Vec::new(),
            dependencies: vec![
                dependency("used-one", None),
                dependency("for-tests", None),
                dependency("for-tests", Some("dev")),
                dependency("nobodys", Some("dev")),
            ],
        };
        let found = unused(&package).unwrap();
        assert_eq!(
            found,
            ["p does not use for-tests", "p does not use nobodys"]
        );
    }
}
