//! The assets that tests and the lab use: kept in `target/assets`, named by environment variables.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rekindle_assets::{Assets, Event, FIRECRACKER_VARIABLE};

use crate::workspace::Workspace;

/// The cache, telling on standard error what it does, but not what is there already.
pub(crate) fn open(workspace: &Workspace) -> Result<Assets> {
    let terminal = io::stderr().is_terminal();
    Assets::new(&cache(workspace), move |event| match event {
        Event::Ready { .. } => {}
        Event::Progress { .. } if terminal => eprint!("\r{event}\x1b[K"),
        Event::Progress { .. } => {}
        _ => eprintln!("{event}"),
    })
}

/// Where they are kept.
pub(crate) fn cache(workspace: &Workspace) -> PathBuf {
    workspace.root.join("target/assets")
}

/// Everything that a test may need, as the variables that name it.
pub(crate) fn environment(workspace: &Workspace, assets: &Assets) -> Result<Vec<(String, String)>> {
    let firecracker = assets.firecracker(None)?;
    let guest = assets.guest()?;
    let image = cache(workspace).join("base.ext4");
    assets.base_image(&image)?;
    let registry = assets.registry()?;
    let mut named = vec![
        (FIRECRACKER_VARIABLE, firecracker.firecracker),
        ("REKINDLE_VMLINUX", guest.vmlinux),
        ("REKINDLE_INITRD", guest.initrd),
        ("REKINDLE_BASE_IMAGE", image),
        ("REKINDLE_REGISTRY", registry),
    ];
    if let Some(jailer) = firecracker.jailer {
        named.push(("REKINDLE_JAILER", jailer));
    }
    named
        .into_iter()
        .map(|(name, path)| Ok((name.to_owned(), text(&path)?)))
        .collect()
}

/// A path as text, which is what the lab's command gets.
pub(crate) fn text(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}
