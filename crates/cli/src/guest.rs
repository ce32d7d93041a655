//! Which kernel, initrd and image a guest gets.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rekindle_assets::{AGENT_ALONE, BOOT_ARGS};
use rekindle_engine::store::image::{self, Config};
use rekindle_engine::store::{Root, VmName};

/// The name of the image that `rekindle setup` builds.
pub(crate) const BASE_IMAGE: &str = "base";

/// Where ext2, ext3 and ext4 say that they are, and what.
const EXT4_MAGIC_AT: u64 = 1024 + 56;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];

/// What to boot.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) image: Option<PathBuf>,
    /// What the image says of what to run in it; nothing where that cannot be done.
    pub(crate) config: Config,
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
        let found = image.map(|image| find_image(root, image)).transpose()?;
        if let Some(kernel) = kernel {
            return Ok(Guest {
                kernel: std::path::absolute(kernel)?,
                initrd: initrd.map(std::path::absolute).transpose()?,
                image: found.map(|(image, _)| image),
                config: Config::default(),
                ours: false,
            });
        }
        let installed = installed_kernel(root);
        if !installed.is_file() {
            bail!("no guest kernel: give one with --kernel, or run: rekindle setup");
        }
        let ours = initrd.is_none();
        let (image, config) = match found {
            Some(found) => found,
            None => find_image(root, BASE_IMAGE)?,
        };
        check_ext4(&image)?;
        Ok(Guest {
            kernel: installed,
            initrd: Some(match initrd {
                Some(initrd) => std::path::absolute(initrd)?,
                None => installed_initrd(root),
            }),
            image: Some(image),
            config: if ours { config } else { Config::default() },
            ours,
        })
    }

    /// Whether its initrd is the one that `rekindle setup` made, which brings the agent, and joins an image that it only
    /// reads with a layer.
    pub(crate) fn is_ours(&self) -> bool {
        self.ours
    }

    /// The kernel's command line. Nothing at all for a guest that is not ours and was given none: Firecracker then takes
    /// its own default. One of ours is called as its VM is, until the image's init says otherwise.
    pub(crate) fn boot_args(
        &self,
        given: Option<&str>,
        first: First,
        name: &VmName,
    ) -> Option<String> {
        let args = match given {
            Some(given) => given.to_owned(),
            None if self.ours => format!("{BOOT_ARGS} hostname={name}"),
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

/// Where an image is, and what it says; one that is given by its path says nothing.
fn find_image(root: &Root, image: &str) -> Result<(PathBuf, Config)> {
    if image.contains('/') {
        // Links are followed here, once: further down a link in place of a disk is refused.
        let path = std::fs::canonicalize(image)
            .with_context(|| format!("the image {image} cannot be used"))?;
        return Ok((path, Config::default()));
    }
    let name = image
        .parse()
        .with_context(|| format!("the image {image:?}"))?;
    let found = image::named(root, &name).with_context(|| {
        format!(
            "no root image; `rekindle setup` builds {BASE_IMAGE}, `rekindle image build` others"
        )
    })?;
    let config = found.record.map(|record| record.config);
    Ok((found.image.path, config.unwrap_or_default()))
}

/// Says of what our initrd cannot mount that it cannot.
fn check_ext4(image: &Path) -> Result<()> {
    let mut magic = [0; 2];
    let read = File::open(image)
        .and_then(|file| file.read_at(&mut magic, EXT4_MAGIC_AT))
        .with_context(|| format!("the image {} cannot be read", image.display()))?;
    if read != magic.len() || magic != EXT4_MAGIC {
        bail!(
            "{} is no ext4 file system; `rekindle image build` makes one",
            image.display()
        );
    }
    Ok(())
}
