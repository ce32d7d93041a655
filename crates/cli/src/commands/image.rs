//! `rekindle image`: build, ls, rm.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rekindle_assets::Assets;
use rekindle_engine::images::users;
use rekindle_engine::store::Store;
use rekindle_engine::store::image::{self, Config, ImageName, Named};
use rekindle_image::{Build, Credentials, Input, Limits, Owner, Pull, Reference, Source};
use serde::Serialize;

use super::{Context, setup};
use crate::output;

/// Builds, lists and removes root images
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Builds an image, from Debian's packages, a directory, an archive, an OCI image or a registry
    Build(BuildVerb),
    /// Lists the images
    Ls(Ls),
    /// Removes images; refused while a VM or a snapshot needs them
    Rm(Rm),
}

#[derive(Debug, clap::Args)]
pub(crate) struct BuildVerb {
    /// The image's name; what VMs and snapshots have of an older image of that name stays as it is
    name: ImageName,
    // Not a doc comment, in which brackets are links.
    #[arg(
        long,
        value_name = "SOURCE",
        help = "What from: debian:SUITE, dir:PATH, tar:FILE, oci-layout:DIR[:TAG], \
                docker-archive:FILE[:TAG], docker://HOST/NAME[:TAG], or a path"
    )]
    from: Source,
    /// Give all files of a directory to this user and group
    #[arg(long, value_name = "UID:GID", value_parser = parse_owner)]
    owner: Option<(u32, u32)>,
    /// Make the image at least so large; what is free in it takes no room on this host
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    size: u64,
    /// Refuse what is larger than this unpacked
    #[arg(long, value_name = "MIB", default_value_t = Limits::DEFAULT_BYTES >> 20)]
    max_size: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Ls {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Rm {
    /// The images
    #[arg(required = true, value_name = "NAME")]
    names: Vec<ImageName>,
}

impl Verb {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        match self {
            Verb::Build(build) => build.run(context),
            Verb::Ls(ls) => ls.run(context),
            Verb::Rm(rm) => rm.run(context),
        }
    }
}

fn parse_owner(text: &str) -> Result<(u32, u32), String> {
    let ids = text.split_once(':');
    let ids = ids.and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    ids.ok_or_else(|| format!("{text:?} is not like 0:0"))
}

impl BuildVerb {
    /// For an image of a Debian suite.
    pub(super) fn debian(name: &str, suite: &str) -> Result<BuildVerb> {
        Ok(BuildVerb {
            name: name.parse()?,
            from: format!("debian:{suite}").parse()?,
            owner: None,
            size: 0,
            max_size: Limits::DEFAULT_BYTES >> 20,
            json: false,
        })
    }

    pub(super) fn run(self, context: &Context) -> Result<()> {
        ensure!(
            self.owner.is_none() || matches!(self.from, Source::Directory(_)),
            "--owner is for dir:PATH; archives say themselves who owns what"
        );
        let root = context.root()?;
        // What is fetched on the way: never published, so gone at the end, or collected as any dead draft is.
        let scratch = Store::open(root.clone())
            .begin(None)
            .context("cannot make a scratch directory")?;
        let limits = Limits {
            bytes: mebibytes(self.max_size)?,
            ..Limits::default()
        };
        let mut config = Config::default();
        let input = match &self.from {
            Source::Debian { suite } => {
                let archive = scratch.dir().join("suite.tar");
                let assets = Assets::new(&root.assets(), setup::tell)?;
                assets.debian_suite(suite, &archive)?;
                config.cmd = vec!["/bin/bash".to_owned()];
                Input::Tar(archive)
            }
            Source::Directory(path) => Input::Directory(path.clone()),
            Source::Tar(path) => Input::Tar(path.clone()),
            Source::OciLayout { directory, tag } => Input::OciLayout {
                directory: directory.clone(),
                tag: tag.clone(),
            },
            Source::DockerArchive { file, tag } => Input::DockerArchive {
                file: file.clone(),
                tag: tag.clone(),
            },
            Source::Registry(reference) => {
                let directory = scratch.dir().join("layout");
                pull(reference, limits, &directory)?;
                Input::OciLayout {
                    directory,
                    tag: None,
                }
            }
            other => anyhow::bail!("images cannot be made from {other}"),
        };
        let mut build = Build::new(self.name.clone(), input, self.from.to_string());
        build.config = config;
        build.owner = self
            .owner
            .map_or(Owner::Kept, |(uid, gid)| Owner::Ids(uid, gid));
        build.limits = limits;
        build.min_size = mebibytes(self.size)?;
        let waiting = output::waiting(format!("building {}", self.name));
        let built = build
            .run(&root)
            .with_context(|| format!("cannot build {} from {}", self.name, self.from))?;
        drop(waiting);
        if self.json {
            return output::json(&Row::of(&self.name, &Ok(built)));
        }
        output::line(format!("{}  {}", built.name, built.image.path.display()))
    }
}

/// Has the image of a registry in this directory then, as an OCI image layout.
fn pull(reference: &Reference, limits: Limits, layout: &Path) -> Result<()> {
    let pull = Pull {
        reference: reference.clone(),
        credentials: Credentials::find(reference.host())?,
        limits,
    };
    let waiting = output::waiting(format!("pulling {reference}"));
    let mut told = 0;
    let pulled = pull.run(layout, &mut |progress| {
        let percent = progress.done.saturating_mul(100) / progress.total.max(1);
        if percent != told {
            told = percent;
            let total = output::size(progress.total);
            waiting.says(format!("pulling {reference}: {percent}% of {total}"));
        }
    });
    pulled.with_context(|| format!("cannot pull docker://{reference}"))
}

fn mebibytes(mib: u64) -> Result<u64> {
    mib.checked_mul(1 << 20)
        .context("that many MiB are more than anybody has")
}

#[derive(Debug, Serialize)]
struct Row {
    name: ImageName,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<std::path::PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_on_disk: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<image::Record>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Row {
    fn of(name: &ImageName, found: &Result<Named, image::FindError>) -> Row {
        let named = found.as_ref().ok();
        let path = named.map(|named| named.image.path.clone());
        let metadata = path.as_ref().and_then(|path| path.metadata().ok());
        Row {
            name: name.clone(),
            path,
            bytes: named.map(|named| named.image.size.get()),
            bytes_on_disk: metadata.map(|metadata| metadata.blocks() * 512),
            record: named.and_then(|named| named.record.clone()),
            error: found.as_ref().err().map(ToString::to_string),
        }
    }

    fn cells(&self) -> [String; 6] {
        let size = |bytes: Option<u64>| bytes.map_or_else(String::new, output::size);
        let record = self.record.as_ref();
        let contents = record.map(|record| record.image.to_string()[..12].to_owned());
        let source = record.map(|record| record.source.clone());
        [
            self.name.to_string(),
            contents.unwrap_or_default(),
            size(self.bytes),
            size(self.bytes_on_disk),
            record.map_or_else(String::new, |record| output::ago(record.built)),
            self.error.clone().or(source).unwrap_or_default(),
        ]
    }
}

impl Ls {
    fn run(self, context: &Context) -> Result<()> {
        let found = image::list(&context.root()?)?;
        let rows: Vec<_> = found
            .iter()
            .map(|listed| Row::of(&listed.name, &listed.found))
            .collect();
        if self.json {
            return output::json(&rows);
        }
        let cells: Vec<_> = rows.iter().map(Row::cells).collect();
        output::table(
            ["NAME", "CONTENTS", "SIZE", "ON DISK", "BUILT", "FROM"],
            &cells,
        )
    }
}

impl Rm {
    fn run(self, context: &Context) -> Result<()> {
        let engine = context.engine_for_reading()?;
        for name in &self.names {
            image::remove(engine.root(), name, &|contents| users(&engine, contents))?;
        }
        Ok(())
    }
}
