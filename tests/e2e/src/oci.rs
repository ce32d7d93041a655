//! OCI images, made by hand.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// What an image's manifest is, in the words of HTTP.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// What an entry of a layer is.
#[derive(Clone, Copy, Debug)]
pub enum Entry<'a> {
    /// A file: contents, mode, and who owns it.
    File(&'a [u8], u32, u64),
    /// A symbolic link.
    Symlink(&'a str),
    /// A hard link.
    Link(&'a str),
}

/// A layer with these entries, whatever their names are.
///
/// # Errors
/// When a name is longer than a header has room for.
pub fn layer(entries: &[(&str, Entry<'_>)]) -> anyhow::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, entry) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mtime(1_700_000_000);
        // Written as it is: the setters of the library refuse what a stranger would not.
        let name = &mut header.as_old_mut().name;
        anyhow::ensure!(path.len() < name.len(), "{path} is too long");
        name[..path.len()].copy_from_slice(path.as_bytes());
        let mut contents = &[][..];
        match entry {
            Entry::File(bytes, mode, owner) => {
                header.set_mode(*mode);
                header.set_uid(*owner);
                header.set_gid(*owner);
                contents = bytes;
            }
            Entry::Symlink(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_link_name_literal(target)?;
            }
            Entry::Link(target) => {
                header.set_entry_type(tar::EntryType::Link);
                header.set_link_name_literal(target)?;
            }
        }
        header.set_size(u64::try_from(contents.len())?);
        header.set_cksum();
        builder.append(&header, contents)?;
    }
    Ok(builder.into_inner()?)
}

/// In hex.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Makes the new directory `place` an OCI image layout of one image with these layers, lowest first, and returns the
/// descriptor of its manifest.
///
/// # Errors
/// When it cannot be written.
pub fn layout(place: &Path, layers: &[Vec<u8>], execution: &Value) -> anyhow::Result<Value> {
    fs::create_dir_all(place.join("blobs/sha256"))?;
    let diff_ids = layers
        .iter()
        .map(|layer| format!("sha256:{}", sha256(layer)));
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": execution,
        "rootfs": {"type": "layers", "diff_ids": diff_ids.collect::<Vec<_>>()},
    });
    let layers = layers.iter().map(|layer| blob(place, LAYER, layer));
    let layers = layers.collect::<anyhow::Result<Vec<_>>>()?;
    let config = blob(place, CONFIG, config.to_string().as_bytes())?;
    let manifest =
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    let manifest = blob(place, MANIFEST, manifest.to_string().as_bytes())?;
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(place.join("index.json"), index.to_string())?;
    fs::write(
        place.join("oci-layout"),
        r#"{"imageLayoutVersion": "1.0.0"}"#,
    )?;
    Ok(manifest)
}

fn blob(layout: &Path, kind: &str, bytes: &[u8]) -> anyhow::Result<Value> {
    let digest = sha256(bytes);
    fs::write(layout.join("blobs/sha256").join(&digest), bytes)?;
    let digest = format!("sha256:{digest}");
    Ok(json!({"mediaType": kind, "digest": digest, "size": bytes.len()}))
}
