//! Which of our packages may use which: the walls between the rooms.

use crate::check::Findings;
use crate::workspace::{Package, Workspace};

/// A package, and what of ours it may be built from; its tests are not bound by this.
const ARROWS: [(&str, &[&str]); 10] = [
    ("rekindle-firecracker", &[]),
    ("rekindle-archive", &[]),
    ("rekindle-agent", &["rekindle-archive"]),
    ("rekindle-store", &[]),
    ("rekindle-assets", &[]),
    ("rekindle-image", &["rekindle-store"]),
    ("rekindle-pager", &["rekindle-store"]),
    (
        "rekindle-engine",
        &[
            "rekindle-agent",
            "rekindle-archive",
            "rekindle-firecracker",
            "rekindle-pager",
            "rekindle-store",
        ],
    ),
    (
        "rekindle",
        &[
            "rekindle-assets",
            "rekindle-engine",
            "rekindle-firecracker",
            "rekindle-image",
            "rekindle-pager",
            "rekindle-store",
        ],
    ),
    ("xtask", &["rekindle-assets"]),
];

/// Packages that are tests: nothing else is built from them, and they from whatever they test.
const TESTS: [&str; 2] = ["rekindle-kit", "rekindle-e2e"];

pub(super) fn check(workspace: &Workspace) -> Findings {
    let mut findings = workspace
        .packages
        .iter()
        .flat_map(wrong_arrows)
        .collect::<Findings>();
    for (name, _) in ARROWS {
        if !workspace.packages.iter().any(|p| p.name == name) {
            findings.push(format!("{name} has arrows and does not exist"));
        }
    }
    findings
}

fn wrong_arrows(package: &Package) -> Findings {
    if TESTS.contains(&package.name.as_str()) {
        return Vec::new();
    }
    let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package.name) else {
        return vec![format!(
            "{} has no line in the table of arrows",
            package.name
        )];
    };
    let ours = package.dependencies.iter().filter(|d| d.path.is_some());
    let built_from = ours.filter(|d| d.kind.as_deref() != Some("dev"));
    built_from
        .filter(|d| !allowed.contains(&d.name.as_str()))
        .map(|d| {
            let why = if TESTS.contains(&d.name.as_str()) {
                "which is for tests"
            } else {
                "a wall"
            };
            format!("{} → {}: {why}", package.name, d.name)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Dependency;

    fn package(name: &str, dependency: &str, kind: Option<&str>) -> Package {
        Package {
            name: name.into(),
            manifest_path: "/nowhere/Cargo.toml".into(),
            targets: Vec::new(),
            dependencies: vec![Dependency {
                name: dependency.into(),
                rename: None,
                kind: kind.map(str::to_owned),
                path: Some("/nowhere".into()),
            }],
        }
    }

    #[test]
    fn an_arrow_through_a_wall_is_found() {
        let wrong = wrong_arrows(&package("rekindle-store", "rekindle-pager", None));
        assert_eq!(wrong, ["rekindle-store → rekindle-pager: a wall"]);
        assert!(wrong_arrows(&package("rekindle-pager", "rekindle-store", None)).is_empty());
    }

    #[test]
    fn tests_may_use_the_kit_and_programs_may_not() {
        assert!(wrong_arrows(&package("rekindle-store", "rekindle-kit", Some("dev"))).is_empty());
        assert_eq!(
            wrong_arrows(&package("rekindle-store", "rekindle-kit", None)).len(),
            1
        );
    }

    #[test]
    fn a_new_package_needs_a_line() {
        assert_eq!(
            wrong_arrows(&package("rekindle-new", "rekindle-store", None)).len(),
            1
        );
    }
}
