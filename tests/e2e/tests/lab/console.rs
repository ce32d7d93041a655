//! Linux guests, spoken to through their serial consoles.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};
use rekindle_e2e::{Rekindle, SOON, wait_for};
use rekindle_kit::guest::Mib;
use rekindle_kit::require::{requires_file, requires_linux_kvm};

/// The shell's prompt.
const PROMPT: &str = "/ # ";

/// A state directory whose guests are Linux.
pub(crate) struct Linux {
    pub(crate) rekindle: Rekindle,
    image: PathBuf,
    asked: AtomicU32,
}

impl Linux {
    /// Skips where KVM cannot run Linux, or where the guest's parts are not named.
    pub(crate) fn new() -> anyhow::Result<Linux> {
        Linux::over(Rekindle::new)
    }

    /// The same, with a state directory on a file system of so much.
    pub(crate) fn on_a_disk_of(size: Mib) -> anyhow::Result<Linux> {
        Linux::over(|| Rekindle::on_a_disk_of(size))
    }

    fn over(make: impl FnOnce() -> anyhow::Result<Rekindle>) -> anyhow::Result<Linux> {
        requires_linux_kvm()?;
        let kernel = requires_file("REKINDLE_VMLINUX")?;
        let initrd = requires_file("REKINDLE_INITRD")?;
        let image = requires_file("REKINDLE_BASE_IMAGE")?;
        let mut rekindle = make()?;
        // What `rekindle setup` does, without what it fetches.
        let bin = rekindle.state().join("assets/bin");
        std::fs::create_dir_all(&bin)?;
        std::os::unix::fs::symlink(kernel, bin.join("vmlinux"))?;
        std::os::unix::fs::symlink(initrd, bin.join("initrd"))?;
        rekindle.takes_for_granted()?;
        Ok(Linux {
            rekindle,
            image,
            asked: AtomicU32::new(0),
        })
    }

    /// The base image.
    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    /// The beginning of a `run`, with the base image on the root drive.
    pub(crate) fn run(&self) -> String {
        format!("run --image {}", self.image.display())
    }

    /// Boots a guest that stays, to its shell.
    pub(crate) fn boots(&self, name: &str, options: &str) -> anyhow::Result<()> {
        self.boots_with(128, name, options)
    }

    /// The same, with so many MiB of memory: the lab hashes all of it at each snapshot, and is slow.
    pub(crate) fn boots_with(&self, mib: u32, name: &str, options: &str) -> anyhow::Result<()> {
        self.rekindle.does(&format!(
            "{} --mem {mib} --name {name} --detach {options}",
            self.run()
        ))?;
        self.rekindle.follows(name)?.hears(PROMPT)?;
        Ok(())
    }

    /// Runs a shell line in a guest and returns what it prints.
    pub(crate) fn asks(&self, name: &str, line: &str) -> anyhow::Result<String> {
        let n = self.asked.fetch_add(1, Ordering::Relaxed);
        let mut output = self.rekindle.follows(name)?;
        // The marks are taken apart in what is typed, which the console echoes.
        self.types(name, &format!("echo \"<\"\"{n}<$({line})>\"\"{n}>\"\n"))?;
        output.hears(&format!("<{n}<"))?;
        let end = format!(">{n}>");
        let answer = output.hears(&end)?;
        let answer = answer.trim_end_matches(&end);
        let begin = format!("<{n}<");
        Ok(answer.rsplit(&begin).next().unwrap_or(answer).to_owned())
    }

    /// Types into a guest's console.
    pub(crate) fn types(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let mut command = self.rekindle.command(&format!("console {name}"));
        let mut console = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        console
            .stdin
            .take()
            .context("an input")?
            .write_all(text.as_bytes())?;
        ensure!(
            wait_for(&mut console, SOON)?.success(),
            "cannot type into {name}"
        );
        Ok(())
    }
}
