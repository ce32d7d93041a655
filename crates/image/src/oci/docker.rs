//! The archive of `docker save`: a tar with `manifest.json`, configs and layers in it, in any order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek};
use std::path::Path;

use serde::Deserialize;
use tar::EntryType;

use crate::archive::{ArchiveError, Headers};
use crate::decompress::decompress;
use crate::limits::Limits;
use crate::oci::blobs::{Archive, Blobs};
use crate::oci::document::Config;
use crate::oci::{Image, Layer, MAX_LAYERS, OciError, expect};
use crate::sha256::Sha256;

/// How many files such an archive may have; it has two or three a layer.
const MAX_FILES: u64 = 16 * 1024;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Saved {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

pub(super) fn image(path: &Path, tag: Option<&str>, limits: Limits) -> Result<Image, OciError> {
    let blobs = Blobs::Archive(open(path, limits)?);
    let saved: Vec<Saved> = blobs.document("manifest.json")?;
    let saved = choose(saved, tag)?;
    let bytes = blobs.bytes(&saved.config)?;
    let digest = Sha256::of(&bytes);
    // Both forms, `<digest>.json` and `blobs/sha256/<digest>`, name it by its digest.
    let stem = saved.config.trim_end_matches(".json").rsplit('/').next();
    if let Ok(said) = format!("sha256:{}", stem.unwrap_or_default()).parse() {
        expect("the config", &said, digest.clone())?;
    }
    let config: Config = serde_json::from_slice(&bytes).map_err(|source| OciError::Json {
        name: saved.config.clone(),
        source,
    })?;
    config.check_platform()?;
    let diff_ids = &config.rootfs.diff_ids;
    if saved.layers.len() != diff_ids.len() {
        return Err(OciError::Disagree {
            layers: saved.layers.len(),
            diff_ids: diff_ids.len(),
        });
    }
    if diff_ids.len() > MAX_LAYERS {
        return Err(OciError::TooManyLayers);
    }
    let layers = saved.layers.into_iter().zip(diff_ids);
    let layers = layers.map(|(name, unpacked)| Layer {
        name,
        packed: None,
        unpacked: unpacked.clone(),
    });
    Ok(Image {
        layers: layers.collect(),
        blobs,
        digest,
        config,
    })
}

fn choose(mut saved: Vec<Saved>, tag: Option<&str>) -> Result<Saved, OciError> {
    let tags = saved.iter().flat_map(|one| one.tags().to_vec()).collect();
    let Some(tag) = tag else {
        return match saved.pop() {
            Some(only) if saved.is_empty() => Ok(only),
            None => Err(OciError::Missing {
                name: "image in it".to_owned(),
            }),
            Some(_) => Err(OciError::Several { tags }),
        };
    };
    let is_meant = |called: &String| called == tag || called.ends_with(&format!(":{tag}"));
    let found = saved
        .into_iter()
        .find(|one| one.tags().iter().any(is_meant));
    found.ok_or_else(|| OciError::NoSuchTag {
        tag: tag.to_owned(),
        tags,
    })
}

/// Looks through the archive; one that is packed is unpacked into a file without a name first.
fn open(path: &Path, limits: Limits) -> Result<Archive, OciError> {
    let read = |source| OciError::Read {
        path: path.to_owned(),
        source,
    };
    let not_docker = |source| OciError::NotDocker {
        path: path.to_owned(),
        source,
    };
    let packed = File::open(path).map_err(read)?;
    let mut file = tempfile::tempfile().map_err(read)?;
    if is_plain(&packed).map_err(read)? {
        file = packed;
    } else {
        let mut stream = io::Read::take(decompress(packed).map_err(read)?, limits.bytes + 1);
        let unpacked = io::copy(&mut stream, &mut file).map_err(read)?;
        if unpacked > limits.bytes {
            let limit = limits.bytes;
            return Err(not_docker(ArchiveError::TooLarge { limit }));
        }
    }
    file.rewind().map_err(read)?;
    let (mut places, mut links) = (HashMap::new(), HashMap::new());
    let stream = io::BufReader::with_capacity(64 * 1024, file.try_clone().map_err(read)?);
    let mut archive = Headers::of(stream);
    archive
        .each(MAX_FILES, |entry| {
            let name = clean(&entry.path_bytes());
            match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => {
                    places.insert(name, (entry.raw_file_position(), entry.size()));
                }
                EntryType::Symlink | EntryType::Link => {
                    let target = clean(&entry.link_name_bytes().unwrap_or_default());
                    links.insert(name, target);
                }
                _ => {}
            }
        })
        .map_err(not_docker)?;
    Ok(Archive {
        path: path.to_owned(),
        file,
        places,
        links,
    })
}

/// Names lead nowhere but into the archive itself: it is enough that both sides are written in one way.
fn clean(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let parts = name
        .split('/')
        .filter(|part| !matches!(*part, "" | "." | ".."));
    parts.collect::<Vec<_>>().join("/")
}

fn is_plain(file: &File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let mut magic = [0; 5];
    let read = file.read_at(&mut magic, 257)?;
    Ok(read == magic.len() && &magic == b"ustar")
}

/// Whether an archive, packed or not, has what `docker save` puts into it.
pub(crate) fn is_docker_archive(file: File) -> io::Result<bool> {
    let mut found = false;
    let mut headers = Headers::of(decompress(file)?);
    // Whatever is wrong with it is found, and said, when it is used.
    let _ = headers.each(MAX_FILES, |entry| {
        found |= clean(&entry.path_bytes()) == "manifest.json";
    });
    Ok(found)
}
