//! An image from a registry, as an OCI image layout.
//!
//! ```text
//! manifests/TAG ─> (index: the one for this machine ─>) manifest ─┬─> config ─ fits here? ─┐
//!                                                                 └─> layers <─────────────┘
//!                         all of it ─ size and digest are as said ─> DIR/blobs/sha256/<digest>
//! ```
//!
//! From there it is an image like any other, so the same bytes come to the same image. Nothing but what is verified
//! gets a name in the layout, and layers go to the disk as they come.

mod client;
mod credentials;
mod reference;

pub use credentials::{Credentials, CredentialsError};
pub use reference::{InvalidReference, Reference};

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::json;
use thiserror::Error;

use super::document::{Config, Descriptor, Index, Manifest};
use super::{MAX_DOCUMENT, MAX_INDEXES, OciError, check, expect};
use crate::limits::Limits;
use crate::sha256::{Hashing, Sha256};
use crate::spool::length;
use client::{Client, bytes};

/// What a manifest may be: an image or an index, in OCI's words and docker's.
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const ANYTHING: &str = "*/*";
/// How much is copied at once.
const PIECE: usize = 128 << 10;

/// An image that is to be pulled.
#[derive(Debug, Clone)]
pub struct Pull {
    /// Which one.
    pub reference: Reference,
    /// Who we are; asked for by the registry, and never shown.
    pub credentials: Option<Credentials>,
    /// How much may come.
    pub limits: Limits,
}

/// How far a pull is, in bytes of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// So many came.
    pub done: u64,
    /// Of so many.
    pub total: u64,
}

/// What is wrong with who we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unauthorised {
    /// We did not say.
    Anonymous,
    /// We did.
    Refused,
}

/// Why an image was not pulled.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Nobody answers there.
    #[error("cannot ask the registry {host}")]
    Unreachable {
        /// The registry.
        host: String,
        /// Why.
        #[source]
        source: Box<ureq::Error>,
    },
    /// It wants to know who asks, in a way that cannot be followed.
    #[error("the registry {host} wants to know who asks in a way that is unsafe or unknown")]
    Challenge {
        /// The registry.
        host: String,
    },
    /// It does not show the image to us.
    #[error("the registry {host} does not give {name} to {}; docker login {host} writes a user and a password", match how {
        Unauthorised::Anonymous => "who does not say who it is",
        Unauthorised::Refused => "the user that was given, or not with that password",
    })]
    Unauthorised {
        /// The registry.
        host: String,
        /// The image.
        name: String,
        /// What is wrong.
        how: Unauthorised,
    },
    /// It has no image of that name.
    #[error("the registry {host} has no image {name}")]
    NoSuchName {
        /// The registry.
        host: String,
        /// The image.
        name: String,
    },
    /// It has the image, without this tag or part.
    #[error("the registry {host} has no {what} of {name}")]
    Missing {
        /// The registry.
        host: String,
        /// The image.
        name: String,
        /// The tag, or a digest.
        what: String,
    },
    /// It answers something else.
    #[error("the registry {host} answers {status} when asked for {what}")]
    Status {
        /// The registry.
        host: String,
        /// What it was asked for.
        what: String,
        /// Its answer, by HTTP.
        status: u16,
    },
    /// The layers together are too large.
    #[error("the image has more than {limit} bytes; --max-size allows more")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// It stopped in the middle.
    #[error("{what} did not come whole")]
    Broken {
        /// The tag, or a digest.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What came cannot be kept.
    #[error("cannot write {}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// What came is no image for this machine, or not what it says.
    #[error(transparent)]
    Oci(#[from] OciError),
}

impl Pull {
    /// Pulls the image into the empty directory `layout`, as its only image, and tells how far it is. What is there
    /// after an error is of no use.
    ///
    /// # Errors
    /// A [`RegistryError`].
    pub fn run(
        &self,
        layout: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), RegistryError> {
        let mut pulling = Pulling {
            client: Client::new(&self.reference, self.credentials.as_ref()),
            blobs: layout.join("blobs/sha256"),
        };
        let blobs = &pulling.blobs;
        fs::create_dir_all(blobs).map_err(|source| write_error(blobs, source))?;
        let (manifest, descriptor) = self.manifest(&mut pulling)?;
        let config: Config = pulling.document(&manifest.config, "blobs", "the config")?;
        check(&manifest, &config)?;
        let layers = &manifest.layers;
        let total = layers
            .iter()
            .fold(0_u64, |total, layer| total.saturating_add(layer.size));
        if total > self.limits.bytes {
            let limit = self.limits.bytes;
            return Err(RegistryError::TooLarge { limit });
        }
        let mut done = 0;
        for layer in layers {
            pulling.layer(layer, &mut |bytes| {
                done += bytes;
                progress(Progress { done, total });
            })?;
        }
        let index = json!({"schemaVersion": 2, "manifests": [descriptor]});
        let version = json!({"imageLayoutVersion": "1.0.0"});
        write(&layout.join("index.json"), index.to_string().as_bytes())?;
        write(&layout.join("oci-layout"), version.to_string().as_bytes())
    }

    /// The manifest for this machine, and how a layout names it.
    fn manifest(
        &self,
        pulling: &mut Pulling<'_>,
    ) -> Result<(Manifest, serde_json::Value), RegistryError> {
        let version = self.reference.version();
        let mut text = pulling.small(&format!("manifests/{version}"), &version)?;
        let mut digest = Sha256::of(&text);
        if let Some(expected) = self.reference.digest() {
            expect("the manifest", expected, digest.clone())?;
        }
        for _ in 0..MAX_INDEXES {
            // An image has no manifests, and an index nothing else that counts.
            let Ok(index) = serde_json::from_slice::<Index>(&text) else {
                let manifest = parse(&text, &format!("the manifest {digest}"))?;
                write(&pulling.blobs.join(digest.hex()), &text)?;
                let size = text.len();
                let named =
                    json!({"mediaType": MANIFEST, "digest": digest.to_string(), "size": size});
                return Ok((manifest, named));
            };
            let descriptor = index.choose_platform()?;
            text = pulling.verified(&descriptor, "manifests", "the manifest")?;
            digest = descriptor.digest;
        }
        Err(OciError::TooManyLayers.into())
    }
}

/// A pull on its way.
struct Pulling<'a> {
    client: Client<'a>,
    /// Where what is verified goes, by its digest.
    blobs: PathBuf,
}

impl Pulling<'_> {
    /// Something small.
    fn small(&mut self, path: &str, what: &str) -> Result<Vec<u8>, RegistryError> {
        let body = self.client.get(path, MANIFESTS)?;
        let text = bytes(body, MAX_DOCUMENT + 1).map_err(|source| RegistryError::Broken {
            what: what.to_owned(),
            source,
        })?;
        if length(text.len()) > MAX_DOCUMENT {
            let name = what.to_owned();
            return Err(OciError::TooLarge { name }.into());
        }
        Ok(text)
    }

    /// Something small that is as it was said to be.
    fn verified(
        &mut self,
        descriptor: &Descriptor,
        place: &str,
        what: &'static str,
    ) -> Result<Vec<u8>, RegistryError> {
        let digest = &descriptor.digest;
        let text = self.small(&format!("{place}/{digest}"), &digest.to_string())?;
        same(what, descriptor, Sha256::of(&text), length(text.len()))?;
        Ok(text)
    }

    /// A verified document, which is kept.
    fn document<T: DeserializeOwned>(
        &mut self,
        descriptor: &Descriptor,
        place: &str,
        what: &'static str,
    ) -> Result<T, RegistryError> {
        let text = self.verified(descriptor, place, what)?;
        write(&self.blobs.join(descriptor.digest.hex()), &text)?;
        Ok(parse(&text, &format!("{what} {}", descriptor.digest))?)
    }

    /// A layer, unless it is there: an image may have one twice.
    fn layer(
        &mut self,
        layer: &Descriptor,
        came: &mut dyn FnMut(u64),
    ) -> Result<(), RegistryError> {
        let place = self.blobs.join(layer.digest.hex());
        if place.exists() {
            came(layer.size);
            return Ok(());
        }
        let coming = self.blobs.join("coming");
        let mut file = File::create(&coming).map_err(|source| write_error(&coming, source))?;
        let body = self
            .client
            .get(&format!("blobs/{}", layer.digest), ANYTHING)?;
        // One byte more tells that there is more than was said.
        let most = layer.size.saturating_add(1);
        let mut stream = Hashing::new(body.into_reader().take(most));
        let mut piece = vec![0; PIECE];
        loop {
            let read = stream
                .read(&mut piece)
                .map_err(|source| RegistryError::Broken {
                    what: format!("the layer {}", layer.digest),
                    source,
                })?;
            if read == 0 {
                break;
            }
            file.write_all(&piece[..read])
                .map_err(|source| write_error(&coming, source))?;
            came(length(read));
        }
        let (digest, size) = stream.finish();
        same("the layer", layer, digest, size)?;
        fs::rename(&coming, &place).map_err(|source| write_error(&place, source))
    }
}

/// Whether what came is what it was said to be.
fn same(what: &'static str, said: &Descriptor, digest: Sha256, size: u64) -> Result<(), OciError> {
    if size != said.size {
        return Err(OciError::Size {
            what,
            digest: said.digest.clone(),
            expected: said.size,
            found: size,
        });
    }
    expect(what, &said.digest, digest)
}

fn parse<T: DeserializeOwned>(text: &[u8], name: &str) -> Result<T, OciError> {
    serde_json::from_slice(text).map_err(|source| OciError::Json {
        name: name.to_owned(),
        source,
    })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), RegistryError> {
    fs::write(path, bytes).map_err(|source| write_error(path, source))
}

fn write_error(path: &Path, source: io::Error) -> RegistryError {
    RegistryError::Write {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
