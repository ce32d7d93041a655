//! Which kernel, initrd and image a guest gets.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rekindle_assets::{AGENT_ALONE, BOOT_ARGS};
use rekindle_engine::store::Root;

/// The name of the image that `rekindle setup` builds.
pub(crate) const BASE_IMAGE: &str = "base";

/// What to boot.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) image: Option<PathBuf>,
    /// The initrd is ours: it brings the agent.
    ours: bool,
}

impl Guest {
    /// What was asked for; for what was not, what `rekindle setup` installed.
    pub(crate) fn choose(
        root: &Root,
        kernel: Option<&Path>,
        initrd: Option<&Path>,
        image: Option<&str>,
    ) -> Result<Guest> {
        let image = image.map(|image| find_image(root, image)).transpose()?;
        if let Some(kernel) = kernel {
            return Ok(Guest {
                kernel: std::path::absolute(kernel)?,
                initrd: initrd.map(std::path::absolute).transpose()?,
                image,
                ours: false,
            });
        }
        let installed = installed_kernel(root);
        if !installed.is_file() {
            bail!("no guest kernel: give one with --kernel, or run: rekindle setup");
        }
        let ours = initrd.is_none();
        Ok(Guest {
            kernel: installed,
            initrd: Some(match initrd {
                Some(initrd) => std::path::absolute(initrd)?,
                None => installed_initrd(root),
            }),
            image: Some(match image {
                Some(image) => image,
                None => find_image(root, BASE_IMAGE)?,
            }),
            ours,
        })
    }

    /// Whether its initrd is the one that `rekindle setup` made, which brings the agent, and joins an image that it only
    /// reads with a layer.
    pub(crate) fn is_ours(&self) -> bool {
        self.ours
    }

    /// The kernel's command line. Nothing at all for a guest that is not ours and was given none: Firecracker then takes
    /// its own default.
    pub(crate) fn boot_args(&self, given: Option<&str>, first: First) -> Option<String> {
        let args = match given {
            Some(given) => given.to_owned(),
            None if self.ours => BOOT_ARGS.to_owned(),
            None => return None,
        };
        Some(match first {
            First::OfTheImage => args,
            First::Agent => format!("{args} {AGENT_ALONE}"),
        })
    }
}

/// Which is a guest's first program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    /// The image's init, if it has one.
    OfTheImage,
    /// The agent, whatever the image has.
    Agent,
}

/// Where `rekindle setup` puts the guest's kernel.
pub(crate) fn installed_kernel(root: &Root) -> PathBuf {
    root.assets().join("bin").join("vmlinux")
}

/// Where `rekindle setup` puts the guest's initrd.
pub(crate) fn installed_initrd(root: &Root) -> PathBuf {
    root.assets().join("bin").join("initrd")
}

fn find_image(root: &Root, image: &str) -> Result<PathBuf> {
    if image.contains('/') {
        // Links are followed here, once: further down a link in place of a disk is refused.
        return std::fs::canonicalize(image)
            .with_context(|| format!("the image {image} cannot be used"));
    }
    let name = image
        .parse()
        .with_context(|| format!("the image {image:?}"))?;
    let found = rekindle_engine::store::image::find(root, &name)
        .with_context(|| format!("no image {image}; `rekindle setup` builds {BASE_IMAGE}"))?;
    Ok(found.path)
}
