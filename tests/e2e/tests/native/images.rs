//! Images that cannot be had, and those of a registry: no guest is booted.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, ensure};
use rekindle_e2e::oci::{Entry, layer, layout, sha256};
use rekindle_e2e::registry::{Access, Registry};
use rekindle_e2e::{Rekindle, Said, finish};
use rekindle_kit::guest::Mib;
use rekindle_kit::story::Story;
use serde_json::{Value, json};

use crate::story;

/// `htpasswd -B`, of the user `me` with the password `swordfish`.
const HTPASSWD: &str = "me:$2b$04$y5Z6sM8j6IJ.oPAn3tyswOvp6wmiDoILdkbJciaUaMuxAhSfMjDFG\n";
/// In base64: `me:swordfish`, `me:haddock`.
const RIGHT: &str = "bWU6c3dvcmRmaXNo";
const WRONG: &str = "bWU6aGFkZG9jaw==";

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "an image of a registry is the same as that of a layout, and what is wrong with one is told",
            from_a_registry,
        ),
        story(
            "a registry that asks who it is gets the password that docker login wrote, and nobody else does",
            who_it_is,
        ),
        story("what a pull that was killed leaves is collected", killed),
        story(
            "an image reaches no file of the host, whatever its entries are called",
            hostile_names,
        ),
        Story::new(
            "a full disk of the host fails the building of an image, and nothing of it is left",
            no_room,
        ),
    ]
}

/// An OCI layout, and what names its manifest.
struct Image {
    place: PathBuf,
    manifest: Value,
    /// The digest of its only layer, in hex.
    layer: String,
}

fn image(rekindle: &Rekindle) -> anyhow::Result<Image> {
    let place = rekindle.file("layout");
    let contents = b"all of it\n".repeat(100_000);
    let layer = layer(&[("srv/web", Entry::File(&contents, 0o644, 0))])?;
    let execution = json!({"Cmd": ["/srv/web"]});
    let manifest = layout(&place, std::slice::from_ref(&layer), &execution)?;
    Ok(Image {
        place,
        manifest,
        layer: sha256(&layer),
    })
}

/// Builds the image `web`, by somebody for whom docker keeps what is in `docker`.
fn build(rekindle: &Rekindle, from: &str, docker: &Path) -> anyhow::Result<Said> {
    let line = format!("image build web --json --from {from}");
    let mut command = rekindle.command(&line);
    command.env("DOCKER_CONFIG", docker);
    finish(command, &line)
}

/// Nothing is begun, and there are so many images.
fn has(rekindle: &Rekindle, images: usize) -> anyhow::Result<()> {
    let tmp = rekindle.state().join("tmp").read_dir()?.count();
    ensure!(tmp == 0, "something half made is left");
    let contents = rekindle.state().join("images").read_dir()?;
    let contents: Vec<_> = contents.collect::<Result<_, _>>()?;
    // A name and its contents each.
    ensure!(contents.len() == 2 * images, "{contents:?}");
    Ok(())
}

/// Refused with an error that says all of `words`, and nothing is made.
fn refused(rekindle: &Rekindle, said: Said, words: &[&str], images: usize) -> anyhow::Result<()> {
    let said = said.refused(1)?;
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in {said}");
    }
    has(rekindle, images)
}

fn from_a_registry(rekindle: &Rekindle) -> anyhow::Result<()> {
    let Image {
        place,
        manifest,
        layer,
    } = image(rekindle)?;
    let registry = Registry::start(&rekindle.file("registry"), Access::All)?;
    let host = registry.host();
    registry.push(&place, &manifest, "a/web", "1")?;
    let kind = "application/vnd.oci.image.index.v1+json";
    let named = |architecture: &str, manifest: &Value| {
        let mut named = manifest.clone();
        named["platform"] = json!({"os": "linux", "architecture": architecture});
        named
    };
    let manifests = [named("s390x", &manifest), named("amd64", &manifest)];
    let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": manifests});
    registry.push_manifest("a/web", "several", kind, index.to_string().as_bytes())?;

    let docker = rekindle.file("docker");
    let build = |from: &str| build(rekindle, from, &docker);
    let of_layout = build(&format!("oci-layout:{}", place.display()))?.json()?;
    let digest = manifest["digest"].as_str().context("a digest")?;
    for version in [":1", ":several", &format!("@{digest}")] {
        let of_registry = build(&format!("docker://{host}/a/web{version}"))?.json()?;
        ensure!(of_registry["path"] == of_layout["path"], "{of_registry}");
        let (one, two) = (&of_registry["record"], &of_layout["record"]);
        ensure!(one["config"] == two["config"], "{one}");
        ensure!(one["source_digest"] == two["source_digest"], "{one}");
        has(rekindle, 1)?;
    }
    let refuses = |what: &str, words: &[&str]| {
        let said = build(&format!("docker://{what}"))?;
        refused(rekindle, said, words, 1)
    };
    refuses(&format!("{host}/a/web:2"), &[host, "has no 2 of a/web"])?;
    refuses(&format!("{host}/a/other"), &[host, "a/other"])?;
    refuses(
        &format!("{host}/a/web@sha256:{}", sha256(b"")),
        &["a/web", &sha256(b"")],
    )?;

    let blob = registry.blob(&layer);
    let mut bytes = fs::read(&blob)?;
    bytes[5000] ^= 1;
    fs::write(&blob, &bytes)?;
    refuses(
        &format!("{host}/a/web:1"),
        &[&layer, "was damaged or is not what it says"],
    )?;
    File::options().write(true).open(&blob)?.set_len(5000)?;
    refuses(&format!("{host}/a/web:1"), &[&layer, "cut off"])?;
    let host = host.to_owned();
    drop(registry);
    refuses(
        &format!("{host}/a/web:1"),
        &["cannot ask the registry", &host],
    )?;
    rekindle.does("image rm web")?;
    Ok(())
}

fn who_it_is(rekindle: &Rekindle) -> anyhow::Result<()> {
    let image = image(rekindle)?;
    let access = Access::Known(HTPASSWD, &format!("Basic {RIGHT}"));
    let registry = Registry::start(&rekindle.file("registry"), access)?;
    let host = registry.host();
    registry.push(&image.place, &image.manifest, "web", "latest")?;
    let docker = rekindle.file("docker");
    fs::create_dir(&docker)?;
    let logs_in = |auth: &str| {
        let config = json!({"auths": {host: {"auth": auth}}});
        fs::write(docker.join("config.json"), config.to_string())
    };
    let from = format!("docker://{host}/web");
    let refuses = |word: &str| {
        let said = build(rekindle, &from, &docker)?;
        ensure!(!said.err.contains(WRONG) && !said.err.contains("haddock"));
        refused(rekindle, said, &[host, "docker login", word], 0)
    };
    refuses("who does not say who it is")?;
    logs_in(WRONG)?;
    refuses("the user that was given")?;
    logs_in(RIGHT)?;
    build(rekindle, &from, &docker)?.done()?;
    has(rekindle, 1)?;
    rekindle.does("image rm web")?;
    Ok(())
}

fn killed(rekindle: &Rekindle) -> anyhow::Result<()> {
    // A registry that is asked and never answers.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let host = silent.local_addr()?;
    let line = format!("image build web --from docker://{host}/web");
    let mut pulling = rekindle.command(&line).stderr(Stdio::null()).spawn()?;
    let asked = silent.accept()?;
    pulling.kill()?;
    pulling.wait()?;
    drop(asked);
    let left = rekindle.state().join("tmp").read_dir()?.count();
    ensure!(left == 1, "{left} directories for what is fetched");
    rekindle.does("gc")?;
    has(rekindle, 0)
}

fn hostile_names(rekindle: &Rekindle) -> anyhow::Result<()> {
    let outside = rekindle.file("outside");
    fs::create_dir(&outside)?;
    let target = outside.to_str().context("a path")?.to_owned();
    let owned = Entry::File(b"owned", 0o644, 0);
    let mut tries = 0;
    let mut build = |entries: &[(&str, Entry<'_>)]| {
        tries += 1;
        let place = rekindle.file(&format!("layout-{tries}"));
        layout(&place, &[layer(entries)?], &json!({}))?;
        build(rekindle, &format!("oci-layout:{}", place.display()), &place)
    };
    let absolute = format!("{target}/absolute");
    let passwd = Entry::Link("../../../../../../etc/passwd");
    for (entries, words) in [
        (vec![("../owned", owned)], ["../owned"]),
        (vec![("a/../../owned", owned)], ["a/../../owned"]),
        (vec![("passwd", passwd)], ["passwd"]),
        (vec![("passwd", Entry::Link("/etc/passwd"))], ["passwd"]),
    ] {
        refused(rekindle, build(&entries)?, &words, 0)?;
    }
    // These are what they would be in the guest.
    build(&[
        (&absolute, owned),
        ("out", Entry::Symlink(&target)),
        ("out/through", owned),
    ])?
    .done()?;
    has(rekindle, 1)?;
    ensure!(outside.read_dir()?.count() == 0, "a file of the host");
    rekindle.does("image rm web")?;
    Ok(())
}

fn no_room() -> anyhow::Result<()> {
    let rekindle = Rekindle::on_a_disk_of(Mib(16))?;
    let tree = rekindle.file("tree");
    fs::create_dir(&tree)?;
    fs::write(tree.join("small"), "small")?;
    let from = format!("dir:{}", tree.display());
    let docker = rekindle.file("docker");
    let before = build(&rekindle, &from, &docker)?.json()?;
    let large = b"all of it\n".repeat(2 << 20);
    fs::write(tree.join("large"), &large)?;
    let full = ["no space left in", "state"];
    refused(&rekindle, build(&rekindle, &from, &docker)?, &full, 1)?;

    // The same on the way from a registry.
    let place = rekindle.file("layout");
    let layer = layer(&[("large", Entry::File(&large, 0o644, 0))])?;
    let manifest = layout(&place, &[layer], &json!({}))?;
    let registry = Registry::start(&rekindle.file("registry"), Access::All)?;
    registry.push(&place, &manifest, "web", "1")?;
    let from = format!("docker://{}/web:1", registry.host());
    let full = ["cannot write", "No space left"];
    refused(&rekindle, build(&rekindle, &from, &docker)?, &full, 1)?;

    let named = rekindle.tells("image ls --json")?;
    ensure!(named[0]["path"] == before["path"], "{named}");
    rekindle.does("image rm web")?;
    rekindle.leaves_nothing()
}
