//! The JSON documents of an image: from the OCI image specification 1.1, and `docker save`. All else in them is
//! passed over.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::oci::{OciError, Program};
use crate::sha256::Sha256;

/// The annotation that names an image in an index.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const OS: &str = "linux";

/// `oci-layout`.
#[derive(Debug, Deserialize)]
pub(super) struct Layout {
    #[serde(rename = "imageLayoutVersion")]
    _version: String,
}

/// A list of images.
#[derive(Debug, Deserialize)]
pub(super) struct Index {
    manifests: Vec<Descriptor>,
}

/// What a blob is, and how to check it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: Sha256,
    pub(super) size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// An image.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// What to run in an image, and what its layers are.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Execution>,
    pub(super) rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
pub(super) struct RootFs {
    pub(super) diff_ids: Vec<Sha256>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Execution {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
}

impl Index {
    /// The image called `tag`, or the only one.
    pub(super) fn choose_tag(self, tag: Option<&str>) -> Result<Descriptor, OciError> {
        let tags = || {
            self.manifests
                .iter()
                .filter_map(Descriptor::tag)
                .map(str::to_owned)
        };
        let Some(tag) = tag else {
            let fitting = self.fitting();
            return match fitting.as_slice() {
                [one] => Ok(one.clone()),
                [] => Err(self.for_others()),
                several => Err(OciError::Several {
                    tags: several.iter().map(Descriptor::called).collect(),
                }),
            };
        };
        let is_meant = |called: &str| called == tag || called.ends_with(&format!(":{tag}"));
        let found = self
            .manifests
            .iter()
            .find(|one| one.tag().is_some_and(is_meant));
        found.cloned().ok_or_else(|| OciError::NoSuchTag {
            tag: tag.to_owned(),
            tags: tags().collect(),
        })
    }

    /// The image for this machine.
    pub(super) fn choose_platform(self) -> Result<Descriptor, OciError> {
        self.fitting()
            .first()
            .cloned()
            .ok_or_else(|| self.for_others())
    }

    /// Those for this machine, and those that do not say what for.
    fn fitting(&self) -> Vec<Descriptor> {
        let fits = |one: &&Descriptor| one.platform.as_ref().is_none_or(Platform::is_this_machine);
        self.manifests.iter().filter(fits).cloned().collect()
    }

    fn for_others(&self) -> OciError {
        let platforms = self
            .manifests
            .iter()
            .filter_map(|one| one.platform.as_ref());
        let platforms: Vec<_> = platforms.map(Platform::words).collect();
        OciError::Platform {
            found: match platforms.as_slice() {
                [] => "no machine at all".to_owned(),
                some => some.join(", "),
            },
            host: host().words(),
        }
    }
}

impl Descriptor {
    pub(super) fn is_index(&self) -> bool {
        self.media_type == "application/vnd.oci.image.index.v1+json"
            || self.media_type == "application/vnd.docker.distribution.manifest.list.v2+json"
    }

    pub(super) fn is_layer(&self) -> bool {
        [
            "application/vnd.oci.image.layer.",
            "application/vnd.docker.image.rootfs.",
        ]
        .iter()
        .any(|kind| self.media_type.starts_with(kind))
            && self.media_type.contains("tar")
            && !self.media_type.contains("encrypted")
    }

    /// Where it is in a layout.
    pub(super) fn blob(&self) -> String {
        format!("blobs/sha256/{}", self.digest.hex())
    }

    fn tag(&self) -> Option<&str> {
        self.annotations.as_ref()?.get(REF_NAME).map(String::as_str)
    }

    fn called(&self) -> String {
        self.tag()
            .map_or_else(|| self.digest.to_string(), str::to_owned)
    }
}

impl Config {
    /// Whether this machine can run it.
    pub(super) fn check_platform(&self) -> Result<(), OciError> {
        let platform = Platform {
            architecture: self.architecture.clone(),
            os: self.os.clone(),
        };
        if (self.architecture.is_empty() && self.os.is_empty()) || platform.is_this_machine() {
            return Ok(());
        }
        Err(OciError::Platform {
            found: platform.words(),
            host: host().words(),
        })
    }

    /// What to run.
    pub(super) fn program(self) -> Program {
        let said = self.config.unwrap_or_default();
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        Program {
            entrypoint: said.entrypoint.unwrap_or_default(),
            cmd: said.cmd.unwrap_or_default(),
            env: said.env.unwrap_or_default(),
            working_dir: text(said.working_dir),
            user: text(said.user),
            exposed_ports: said.exposed_ports.unwrap_or_default().into_keys().collect(),
        }
    }
}

impl Platform {
    fn is_this_machine(&self) -> bool {
        *self == host()
    }

    fn words(&self) -> String {
        format!("{}/{}", self.os, self.architecture)
    }
}

/// This machine, in the words of the Go language.
fn host() -> Platform {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Platform {
        architecture: architecture.to_owned(),
        os: OS.to_owned(),
    }
}
