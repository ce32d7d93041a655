use std::collections::BTreeMap;
use std::fs;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::spool::Spool;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layout, made by hand.
struct Scene {
    directory: TempDir,
}

fn tar(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(contents.len()).unwrap());
        header.set_mode(0o755);
        builder
            .append_data(&mut header, name, contents.as_bytes())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn config(layers: &[Vec<u8>]) -> Value {
    let diff_ids: Vec<_> = layers
        .iter()
        .map(|tar| Sha256::of(tar).to_string())
        .collect();
    let host = if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    };
    json!({
        "architecture": host, "os": "linux",
        "config": {
            "Entrypoint": ["/bin/web"], "Cmd": null, "Env": ["A=1"], "User": "web",
            "WorkingDir": "/srv", "ExposedPorts": {"80/tcp": {}},
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        let version = json!({"imageLayoutVersion": "1.0.0"});
        fs::write(directory.path().join("oci-layout"), version.to_string()).unwrap();
        Self { directory }
    }

    fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
        let digest = Sha256::of(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({"mediaType": kind, "digest": digest.to_string(), "size": bytes.len()})
    }

    fn blob_path(&self, digest: &Sha256) -> PathBuf {
        self.directory
            .path()
            .join("blobs/sha256")
            .join(digest.hex())
    }

    fn image(&self, tars: &[Vec<u8>]) -> Value {
        self.image_with(tars, &config(tars), LAYER)
    }

    fn image_with(&self, tars: &[Vec<u8>], config: &Value, kind: &str) -> Value {
        let layers: Vec<_> = tars.iter().map(|tar| self.blob(kind, &gzip(tar))).collect();
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().as_bytes(),
        )
    }

    fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.directory.path().join("index.json"), index.to_string()).unwrap();
    }

    fn apply(&self, tag: Option<&str>) -> Result<(About, Vec<String>), OciError> {
        apply_form(Form::Layout, self.directory.path(), tag)
    }

    fn refusal(&self) -> String {
        let error = self.apply(None).map(|(about, _)| about).unwrap_err();
        let source = std::error::Error::source(&error);
        let cause = source
            .map(|source| format!(": {source}"))
            .unwrap_or_default();
        format!("{error}{cause}")
    }
}

fn apply_form(
    form: Form,
    path: &std::path::Path,
    tag: Option<&str>,
) -> Result<(About, Vec<String>), OciError> {
    let spool = Spool::new(&std::env::temp_dir()).unwrap();
    let limits = Limits {
        bytes: 1 << 20,
        entries: 1000,
    };
    let mut layers = Layers::new(spool, limits);
    let about = apply(form, path, tag, limits, &mut layers)?;
    let (tree, _) = layers.into_parts();
    let names = tree
        .names(crate::tree::ROOT)
        .map(|(name, _)| String::from_utf8_lossy(name).into_owned());
    Ok((about, names.collect()))
}

fn two_layers() -> Vec<Vec<u8>> {
    vec![
        tar(&[("a", "1"), ("b", "1")]),
        tar(&[(".wh.a", ""), ("c", "2")]),
    ]
}

#[test]
fn layers_come_in_order_and_the_config_says_what_to_run() {
    let scene = Scene::new();
    scene.index(&[scene.image(&two_layers())]);
    let (about, names) = scene.apply(None).unwrap();
    assert_eq!(names, ["b", "c"]);
    let program = about.program;
    assert_eq!(program.entrypoint, ["/bin/web"]);
    assert!(program.cmd.is_empty());
    assert_eq!(program.env, ["A=1"]);
    assert_eq!(
        (program.user.as_deref(), program.working_dir.as_deref()),
        (Some("web"), Some("/srv"))
    );
    assert_eq!(program.exposed_ports, ["80/tcp"]);
}

#[test]
fn of_several_images_the_tag_or_the_platform_chooses() {
    let scene = Scene::new();
    let mut one = scene.image(&[tar(&[("one", "")])]);
    let mut two = scene.image(&[tar(&[("two", "")])]);
    one["annotations"] = json!({"org.opencontainers.image.ref.name": "1.0"});
    two["annotations"] = json!({"org.opencontainers.image.ref.name": "registry/web:2.0"});
    scene.index(&[one.clone(), two.clone()]);
    assert_eq!(scene.apply(Some("1.0")).unwrap().1, ["one"]);
    assert_eq!(scene.apply(Some("2.0")).unwrap().1, ["two"]);
    assert_eq!(
        scene.refusal(),
        "there are several images; name one of: 1.0, registry/web:2.0"
    );
    let error = scene.apply(Some("3")).map(|_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no image 3, only: 1.0, registry/web:2.0"
    );

    let host = config(&[])["architecture"].clone();
    one["platform"] = json!({"architecture": "s390x", "os": "linux"});
    two["platform"] = json!({"architecture": host, "os": "linux"});
    let list = json!({"manifests": [one, two]}).to_string();
    let nested = scene.blob("application/vnd.oci.image.index.v1+json", list.as_bytes());
    scene.index(&[nested]);
    assert_eq!(scene.apply(None).unwrap().1, ["two"]);
    scene.index(&[one]);
    assert!(
        scene
            .refusal()
            .starts_with("the image is for linux/s390x, and this machine is linux/")
    );
}

#[test]
fn whatever_lies_about_its_digest_is_refused() {
    let tars = two_layers();
    let scene = Scene::new();
    let manifest = scene.image(&tars);
    scene.index(std::slice::from_ref(&manifest));
    let layer = Sha256::of(&gzip(&tars[1]));
    let lie = gzip(&tar(&[("evil", "1")]));
    fs::write(scene.blob_path(&layer), &lie).unwrap();
    assert!(
        scene
            .refusal()
            .starts_with(&format!("the layer {layer} has")),
        "{}",
        scene.refusal()
    );
    // The same length, one byte another.
    let mut flipped = gzip(&tars[1]);
    flipped[4] ^= 1;
    fs::write(scene.blob_path(&layer), &flipped).unwrap();
    assert!(scene.refusal().starts_with(&format!(
        "the layer {layer} was damaged or is not what it says"
    )));
    fs::write(scene.blob_path(&layer), &gzip(&tars[1])[..40]).unwrap();
    assert!(
        scene.refusal().contains("it was cut off"),
        "{}",
        scene.refusal()
    );
    fs::remove_file(scene.blob_path(&layer)).unwrap();
    assert_eq!(
        scene.refusal(),
        format!("the image has no blobs/sha256/{}", layer.hex())
    );

    let digest: Sha256 = manifest["digest"].as_str().unwrap().parse().unwrap();
    let mut bytes = fs::read(scene.blob_path(&digest)).unwrap();
    bytes[0] = b' ';
    fs::write(scene.blob_path(&digest), bytes).unwrap();
    assert!(
        scene.refusal().starts_with("the manifest sha256:"),
        "{}",
        scene.refusal()
    );
}

#[test]
fn an_unpacked_layer_must_be_what_the_config_says() {
    let scene = Scene::new();
    let tars = two_layers();
    let other = config(&[tars[0].clone(), tars[0].clone()]);
    scene.index(&[scene.image_with(&tars, &other, LAYER)]);
    assert!(
        scene.refusal().starts_with("the unpacked layer sha256:"),
        "{}",
        scene.refusal()
    );
    let fewer = config(&tars[..1]);
    scene.index(&[scene.image_with(&tars, &fewer, LAYER)]);
    assert_eq!(
        scene.refusal(),
        "the image has 2 layers, and its config speaks of 1"
    );
    scene.index(&[scene.image_with(&tars, &config(&tars), "application/x-other")]);
    assert!(
        scene
            .refusal()
            .contains("is of the kind \"application/x-other\""),
        "{}",
        scene.refusal()
    );
}

#[test]
fn a_layer_that_unpacks_to_more_than_is_allowed_is_refused_also_behind_its_end() {
    let scene = Scene::new();
    let mut bomb = tar(&[("a", "1")]);
    bomb.resize(8 << 20, 0);
    scene.index(&[scene.image(&[bomb])]);
    assert!(
        scene
            .refusal()
            .ends_with("the image is larger than 1048576 bytes unpacked; --max-size allows more")
    );
    let scene = Scene::new();
    scene.index(&[scene.image(&[tar(&[("a", &"0".repeat(2 << 20))])])]);
    assert!(
        scene.refusal().contains("larger than 1048576"),
        "{}",
        scene.refusal()
    );
    let scene = Scene::new();
    fs::write(
        scene.directory.path().join("index.json"),
        vec![b' '; 5 << 20],
    )
    .unwrap();
    assert_eq!(scene.refusal(), "index.json is larger than 4194304 bytes");
}

#[test]
fn digests_that_are_paths_are_no_digests() {
    let scene = Scene::new();
    let mut manifest = scene.image(&two_layers());
    for bad in ["sha256:../../../../etc/passwd", "md5:00", "sha256:ABC"] {
        manifest["digest"] = json!(bad);
        scene.index(std::slice::from_ref(&manifest));
        assert!(
            scene
                .refusal()
                .starts_with("index.json cannot be understood"),
            "{}",
            scene.refusal()
        );
    }
    std::os::unix::fs::symlink("/etc/passwd", scene.directory.path().join("x")).unwrap();
    fs::remove_file(scene.directory.path().join("index.json")).unwrap();
    std::os::unix::fs::symlink("x", scene.directory.path().join("index.json")).unwrap();
    assert!(
        scene.refusal().contains("symbolic link"),
        "{}",
        scene.refusal()
    );
}

/// An archive as `docker save` makes it.
fn docker(files: &BTreeMap<&str, Vec<u8>>, links: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, target) in links {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, name, target).unwrap();
    }
    for (name, contents) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(u64::try_from(contents.len()).unwrap());
        builder
            .append_data(&mut header, name, &contents[..])
            .unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn an_archive_of_docker_save_is_read_packed_or_not() {
    let tars = two_layers();
    let config = config(&tars).to_string();
    let name = format!("{}.json", Sha256::of(config.as_bytes()).hex());
    let manifest = json!([{
        "Config": name, "RepoTags": ["web:1.0"], "Layers": ["1/layer.tar", "2/layer.tar"],
    }]);
    let mut files = BTreeMap::from([
        ("1/layer.tar", tars[0].clone()),
        ("3/layer.tar", tars[1].clone()),
        (name.as_str(), config.into_bytes()),
        ("manifest.json", manifest.to_string().into_bytes()),
    ]);
    let links = [("2/layer.tar", "../3/layer.tar")];
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("image");
    let plain = docker(&files, &links);
    for bytes in [plain.clone(), gzip(&plain)] {
        fs::write(&path, bytes).unwrap();
        let (about, names) = apply_form(Form::DockerArchive, &path, Some("1.0")).unwrap();
        assert_eq!(
            (names, about.program.entrypoint),
            (vec!["b".into(), "c".into()], vec!["/bin/web".into()])
        );
    }
    files.insert("1/layer.tar", tar(&[("evil", "")]));
    fs::write(&path, docker(&files, &links)).unwrap();
    let error = apply_form(Form::DockerArchive, &path, None)
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(
            error,
            OciError::Lies {
                what: "the unpacked layer",
                ..
            }
        ),
        "{error}"
    );
    fs::write(&path, &plain[..plain.len() / 2]).unwrap();
    let error = apply_form(Form::DockerArchive, &path, None)
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(error, OciError::NotDocker { .. } | OciError::Missing { .. }),
        "{error}"
    );
}
