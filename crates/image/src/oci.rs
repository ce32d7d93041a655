//! Images in the form of the Open Container Initiative, and of `docker save`.
//!
//! ```text
//! index.json ─> (index ─>) manifest ─┬─> config: what to run, digests of the unpacked layers
//!                                    └─> layers, lowest first ─ unpack ─> Layers
//! ```
//!
//! Every blob is compared with the digest and the size by which it is named, every layer also, unpacked, with the
//! digest that the config has of it. What is no layer is small, and read only up to a bound.

mod blobs;
mod docker;
mod document;
pub(crate) mod registry;

pub(crate) use docker::is_docker_archive;

use std::io::{self, Read};
use std::path::PathBuf;

use thiserror::Error;

use crate::archive::{ArchiveError, Layers};
use crate::decompress::decompress;
use crate::limits::Limits;
use crate::sha256::{Hashing, InvalidSha256, Sha256};
use blobs::Blobs;
use document::{Config, Descriptor, Index, Manifest};
pub(crate) use rekindle_store::image::Config as Program;

/// The largest manifest, index or config that is read, in bytes.
const MAX_DOCUMENT: u64 = 4 << 20;
/// How many layers an image may have.
const MAX_LAYERS: usize = 512;
/// How often an index may lead to another one.
const MAX_INDEXES: usize = 4;

/// Why an OCI image cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OciError {
    /// A file of it cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is no archive of `docker save`.
    #[error("{} is no archive of docker save", path.display())]
    NotDocker {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: ArchiveError,
    },
    /// A part is not there.
    #[error("the image has no {name}")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A document is larger than any is.
    #[error("{name} is larger than {MAX_DOCUMENT} bytes")]
    TooLarge {
        /// Its name.
        name: String,
    },
    /// A document cannot be understood.
    #[error("{name} cannot be understood")]
    Json {
        /// Its name.
        name: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A part is named by a digest that cannot be checked.
    #[error("{name} cannot be checked")]
    Digest {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: InvalidSha256,
    },
    /// Contents are not those that their name says.
    #[error("{what} {expected} was damaged or is not what it says: it has {found}")]
    Lies {
        /// What it is.
        what: &'static str,
        /// What its name says.
        expected: Sha256,
        /// What it has.
        found: Sha256,
    },
    /// Contents are not as long as the one that leads to them says.
    #[error(
        "{what} {digest} has {found} bytes instead of {expected}: it was cut off or is another one"
    )]
    Size {
        /// What it is.
        what: &'static str,
        /// Which one.
        digest: Sha256,
        /// How many bytes it should have.
        expected: u64,
        /// How many it has, as far as it was read.
        found: u64,
    },
    /// There are several images, and none was asked for.
    #[error("there are several images; name one of: {}", tags.join(", "))]
    Several {
        /// How they are called.
        tags: Vec<String>,
    },
    /// There is no image of that name.
    #[error("there is no image {tag}, only: {}", tags.join(", "))]
    NoSuchTag {
        /// What was asked for.
        tag: String,
        /// What there is.
        tags: Vec<String>,
    },
    /// It is for other machines.
    #[error("the image is for {found}, and this machine is {host}")]
    Platform {
        /// What it is for.
        found: String,
        /// What this machine is.
        host: String,
    },
    /// A layer is of a kind that cannot be unpacked.
    #[error("the layer {digest} is of the kind {kind:?}, which cannot be unpacked")]
    Kind {
        /// Which layer.
        digest: Sha256,
        /// Its media type.
        kind: String,
    },
    /// Manifest and config do not agree.
    #[error("the image has {layers} layers, and its config speaks of {diff_ids}")]
    Disagree {
        /// In the manifest.
        layers: usize,
        /// In the config.
        diff_ids: usize,
    },
    /// It has more layers than any image.
    #[error(
        "the image has more than {MAX_LAYERS} layers, or more than {MAX_INDEXES} indexes in each other"
    )]
    TooManyLayers,
    /// A layer cannot be put into the image.
    #[error("the layer {digest} cannot be unpacked")]
    Layer {
        /// Which layer.
        digest: Sha256,
        /// Why.
        #[source]
        source: ArchiveError,
    },
}

/// Where an image comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A directory with `oci-layout` in it.
    Layout,
    /// An archive of `docker save`.
    DockerArchive,
}

/// What an image says of itself.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) digest: Sha256,
    pub(crate) program: Program,
}

/// Puts all layers of an image on top of each other; of several images the one called `tag`.
pub(crate) fn apply(
    form: Form,
    path: &std::path::Path,
    tag: Option<&str>,
    limits: Limits,
    layers: &mut Layers,
) -> Result<About, OciError> {
    let image = match form {
        Form::Layout => layout(Blobs::directory(path), tag)?,
        Form::DockerArchive => docker::image(path, tag, limits)?,
    };
    image.apply(layers)
}

/// An image whose manifest and config were read and agree.
struct Image {
    blobs: Blobs,
    digest: Sha256,
    config: Config,
    layers: Vec<Layer>,
}

struct Layer {
    /// Where it is among the blobs.
    name: String,
    /// How it is named, where that is a digest of it as it stands there.
    packed: Option<Descriptor>,
    /// The digest of what is in it.
    unpacked: Sha256,
}

/// The image that an OCI layout has, or the one called `tag`.
fn layout(blobs: Blobs, tag: Option<&str>) -> Result<Image, OciError> {
    let _version: document::Layout = blobs.document("oci-layout")?;
    let index: Index = blobs.document("index.json")?;
    let mut descriptor = index.choose_tag(tag)?;
    for _ in 0..MAX_INDEXES {
        if !descriptor.is_index() {
            return image(blobs, descriptor);
        }
        let index: Index = blobs.verified(&descriptor, "the index")?;
        descriptor = index.choose_platform()?;
    }
    Err(OciError::TooManyLayers)
}

fn image(blobs: Blobs, descriptor: Descriptor) -> Result<Image, OciError> {
    let manifest: Manifest = blobs.verified(&descriptor, "the manifest")?;
    let config: Config = blobs.verified(&manifest.config, "the config")?;
    check(&manifest, &config)?;
    let layers = manifest.layers.into_iter().zip(&config.rootfs.diff_ids);
    let layers = layers.map(|(descriptor, unpacked)| Layer {
        name: descriptor.blob(),
        packed: Some(descriptor),
        unpacked: unpacked.clone(),
    });
    Ok(Image {
        layers: layers.collect(),
        blobs,
        digest: descriptor.digest,
        config,
    })
}

/// Whether the two agree, and this machine can use what they speak of.
fn check(manifest: &Manifest, config: &Config) -> Result<(), OciError> {
    config.check_platform()?;
    let diff_ids = &config.rootfs.diff_ids;
    if manifest.layers.len() > MAX_LAYERS {
        return Err(OciError::TooManyLayers);
    }
    if manifest.layers.len() != diff_ids.len() {
        return Err(OciError::Disagree {
            layers: manifest.layers.len(),
            diff_ids: diff_ids.len(),
        });
    }
    for layer in &manifest.layers {
        if !layer.is_layer() {
            return Err(OciError::Kind {
                digest: layer.digest.clone(),
                kind: layer.media_type.clone(),
            });
        }
    }
    Ok(())
}

impl Image {
    fn apply(self, layers: &mut Layers) -> Result<About, OciError> {
        for layer in &self.layers {
            self.layer(layer, layers)?;
        }
        Ok(About {
            digest: self.digest,
            program: self.config.program(),
        })
    }

    fn layer(&self, layer: &Layer, layers: &mut Layers) -> Result<(), OciError> {
        let digest = layer
            .packed
            .as_ref()
            .map_or(&layer.unpacked, |packed| &packed.digest);
        let fail = |source| OciError::Layer {
            digest: digest.clone(),
            source,
        };
        let read = |source| fail(ArchiveError::Read { entries: 0, source });
        let mut packed = Hashing::new(self.blobs.open(&layer.name)?);
        let applied = {
            // Nobody unpacks more than the layer says that it is.
            let said = layer.packed.as_ref().map_or(u64::MAX, |packed| packed.size);
            let stream = decompress(packed.by_ref().take(said)).map_err(read)?;
            let mut unpacked = Hashing::new(stream);
            let applied = layers.apply(&mut unpacked);
            // What stands behind the archive's end counts for its digest.
            let applied = applied.and_then(|()| layers.skip_rest(&mut unpacked));
            applied.map(|()| unpacked.finish().0)
        };
        // A layer that was damaged in transit is said to be that, and not what else it made of it.
        io::copy(&mut packed, &mut io::sink()).map_err(read)?;
        let (found, size) = packed.finish();
        if let Some(said) = &layer.packed {
            if size != said.size {
                return Err(OciError::Size {
                    what: "the layer",
                    digest: said.digest.clone(),
                    expected: said.size,
                    found: size,
                });
            }
            expect("the layer", &said.digest, found)?;
        }
        expect(
            "the unpacked layer",
            &layer.unpacked,
            applied.map_err(fail)?,
        )
    }
}

fn expect(what: &'static str, expected: &Sha256, found: Sha256) -> Result<(), OciError> {
    if *expected == found {
        return Ok(());
    }
    Err(OciError::Lies {
        what,
        expected: expected.clone(),
        found,
    })
}

#[cfg(test)]
mod tests;
