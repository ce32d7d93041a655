//! A real container registry, Debian's `docker-registry`, on a port of the loopback that the kernel chose.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use rekindle_kit::require::requires_file;
use serde_json::{Value, json};

use crate::oci;

/// What it says when it can be asked.
const LISTENING: &str = "listening on ";

/// A registry; its process ends when this is dropped.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    host: String,
    storage: PathBuf,
    agent: ureq::Agent,
    authorization: Option<String>,
}

/// Who may use a registry.
#[derive(Clone, Copy, Debug)]
pub enum Access<'a> {
    /// Everybody.
    All,
    /// Who is in a file that `htpasswd -B` writes; and how one of them says who it is, `Basic …`.
    Known(&'a str, &'a str),
}

impl Registry {
    /// Starts one that keeps everything in `place`, a new directory.
    ///
    /// # Errors
    /// [`rekindle_kit::require::Skipped`] where `REKINDLE_REGISTRY` names no program; when it does not start.
    pub fn start(place: &Path, access: Access<'_>) -> anyhow::Result<Registry> {
        let program = requires_file("REKINDLE_REGISTRY")?;
        let storage = place.join("storage");
        fs::create_dir_all(&storage)?;
        let mut config = json!({
            "version": "0.1",
            "log": {"accesslog": {"disabled": true}},
            "storage": {"filesystem": {"rootdirectory": storage}},
            "http": {"addr": "127.0.0.1:0"},
        });
        let mut authorization = None;
        if let Access::Known(file, one) = access {
            let path = place.join("htpasswd");
            fs::write(&path, file)?;
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": path}});
            authorization = Some(one.to_owned());
        }
        // JSON is YAML.
        let path = place.join("config.yml");
        fs::write(&path, config.to_string())?;
        let mut process = Command::new(program)
            .arg("serve")
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = process.stderr.take().context("its standard error")?;
        let mut registry = Registry {
            process,
            host: String::new(),
            storage,
            agent: ureq::Agent::config_builder()
                .http_status_as_error(false)
                .proxy(None)
                .build()
                .into(),
            authorization,
        };
        registry.host = listens(stderr)?;
        Ok(registry)
    }

    /// Its address and port.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Pushes the image of an OCI layout, under a name and a tag.
    ///
    /// # Errors
    /// When the registry refuses a part.
    pub fn push(
        &self,
        layout: &Path,
        manifest: &Value,
        name: &str,
        tag: &str,
    ) -> anyhow::Result<()> {
        let file = |descriptor: &Value| -> anyhow::Result<Vec<u8>> {
            let digest = descriptor["digest"].as_str().context("a digest")?;
            let hex = digest.trim_start_matches("sha256:");
            Ok(fs::read(layout.join("blobs/sha256").join(hex))?)
        };
        let text = file(manifest)?;
        let parts: Value = serde_json::from_slice(&text)?;
        let layers = parts["layers"].as_array().context("layers")?;
        for blob in layers.iter().chain([&parts["config"]]) {
            self.push_blob(name, &file(blob)?)?;
        }
        self.push_manifest(name, tag, oci::MANIFEST, &text)
    }

    /// Pushes a manifest, or an index.
    ///
    /// # Errors
    /// When the registry refuses it.
    pub fn push_manifest(
        &self,
        name: &str,
        tag: &str,
        kind: &str,
        text: &[u8],
    ) -> anyhow::Result<()> {
        let place = format!("http://{}/v2/{name}/manifests/{tag}", self.host);
        let put = self.agent.put(place).header("content-type", kind);
        let answer = self.known(put).send(text)?;
        ensure!(answer.status() == 201, "{answer:?}");
        Ok(())
    }

    fn push_blob(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let place = format!("http://{}/v2/{name}/blobs/uploads/", self.host);
        let answer = self.known(self.agent.post(place)).send_empty()?;
        ensure!(answer.status() == 202, "{answer:?}");
        let place = answer.headers().get("location").context("a location")?;
        let digest = format!("sha256:{}", oci::sha256(bytes));
        let put = self.agent.put(place.to_str()?).query("digest", digest);
        let answer = self.known(put).send(bytes)?;
        ensure!(answer.status() == 201, "{answer:?}");
        Ok(())
    }

    fn known(
        &self,
        request: ureq::RequestBuilder<ureq::typestate::WithBody>,
    ) -> ureq::RequestBuilder<ureq::typestate::WithBody> {
        match &self.authorization {
            Some(authorization) => request.header("authorization", authorization),
            None => request,
        }
    }

    /// The file in which it keeps a blob, to damage it.
    pub fn blob(&self, hex: &str) -> PathBuf {
        let blobs = self.storage.join("docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }
}

/// Where it listens, by its own words. What else it says is read for as long as it lives, or it would stand still.
fn listens(stderr: impl Read + Send + 'static) -> anyhow::Result<String> {
    let mut lines = BufReader::new(stderr).lines();
    let mut said = Vec::new();
    for line in lines.by_ref() {
        let line = line?;
        if let Some((_, host)) = line.split_once(LISTENING) {
            let host = host.split('"').next().unwrap_or_default().to_owned();
            std::thread::spawn(move || lines.for_each(drop));
            return Ok(host);
        }
        said.push(line);
    }
    anyhow::bail!("the registry ended: {said:?}")
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
