//! `rekindle setup`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rekindle_assets::{Assets, Event};
use rekindle_engine::programs::installed_firecracker;
use rekindle_engine::store::{Root, image};

use super::Context;
use super::image::BuildVerb;
use crate::guest::{BASE_IMAGE, installed_initrd, installed_kernel};
use crate::output;

/// What the docs call an image of Debian, and which Debian it is.
const DEBIAN_IMAGE: &str = "debian";
const DEBIAN_SUITE: &str = "bookworm";

/// Fetches Firecracker and a guest kernel, builds a base image; all verified, none twice
///
/// Needs root for Debian's packages (dpkg, mke2fs). Says what it fetches from where before it does.
#[derive(Debug, clap::Args)]
pub(crate) struct Setup {
    /// Use this Firecracker binary
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Keep downloads in this directory, which several installations may share [default: in the state directory]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Only Firecracker: no guest kernel, no image
    #[arg(long)]
    no_guest: bool,
    /// Build a small Debian as well, the image `debian`; fetches 30 MB and takes a minute or two
    #[arg(long, conflicts_with = "no_guest")]
    debian: bool,
}

impl Setup {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let root = context.root()?;
        let cache = self.cache.unwrap_or_else(|| root.assets());
        let assets = Assets::new(&cache, tell)?;
        let firecracker = assets.firecracker(self.firecracker.as_deref())?;
        install(&firecracker.firecracker, &installed_firecracker(&root))?;
        output::line(format!(
            "firecracker   {}",
            installed_firecracker(&root).display()
        ))?;
        if let Some(jailer) = &firecracker.jailer {
            // Beside it, where it is looked for.
            let place = installed_firecracker(&root).with_file_name("jailer");
            install(jailer, &place)?;
            output::line(format!("jailer        {}", place.display()))?;
        }
        if !self.no_guest {
            guest(&root, &assets)?;
            debian(context, &root, self.debian)?;
        }
        Ok(())
    }
}

/// The image of Debian, unless it is there: built if it is `wanted`, or else how to.
fn debian(context: &Context, root: &Root, wanted: bool) -> Result<()> {
    let images = image::list(root)?;
    let is_debian = |image: &image::Listed| image.name.as_str() == DEBIAN_IMAGE;
    match images.iter().any(is_debian) {
        true => Ok(()),
        false if wanted => BuildVerb::debian(DEBIAN_IMAGE, DEBIAN_SUITE)?.run(context),
        false => output::line("for a Debian  rekindle setup --debian  (as root; fetches 30 MB)"),
    }
}

fn guest(root: &Root, assets: &Assets) -> Result<()> {
    let guest = assets.guest()?;
    install(&guest.vmlinux, &installed_kernel(root))?;
    install(&guest.initrd, &installed_initrd(root))?;
    output::line(format!(
        "guest kernel  {}",
        installed_kernel(root).display()
    ))?;
    let image = root.images().join(format!("{BASE_IMAGE}.ext4"));
    assets.base_image(&image)?;
    let_others_read(&image)?;
    output::line(format!("base image    {}", image.display()))?;
    Ok(())
}

/// A second name for a file of the cache, under a path that does not change with its version.
fn install(file: &Path, place: &Path) -> Result<()> {
    let folder = place.parent().context("no folder to install into")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let next = place.with_extension("next");
    let _ = std::fs::remove_file(&next);
    std::fs::hard_link(file, &next)
        .or_else(|_| std::fs::copy(file, &next).map(drop))
        .and_then(|()| std::fs::rename(&next, place))
        .with_context(|| format!("cannot install {}", place.display()))?;
    // Two names of one file are left as they are by a rename.
    let _ = std::fs::remove_file(&next);
    let_others_read(place)
}

/// Jailed VMs read it without a copy then; the directories around it keep all others out.
fn let_others_read(file: &Path) -> Result<()> {
    let open = || {
        let mut permissions = file.metadata()?.permissions();
        permissions.set_mode(permissions.mode() | 0o444);
        std::fs::set_permissions(file, permissions)
    };
    open().with_context(|| format!("cannot let others read {}", file.display()))
}

pub(super) fn tell(event: &Event<'_>) {
    output::say(event);
}
