//! Images that the story makes itself, and guests that boot from them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use rekindle_e2e::oci::{Entry, layer, layout};
use rekindle_kit::story::Story;
use serde_json::{Value, json};

use crate::console::Linux;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a guest boots from an OCI image, and finds in it what its layers add up to",
            boots_from_oci,
        ),
        story(
            "an image stays for as long as a VM needs it, and a name that is built anew changes nothing for it",
            stays_while_needed,
        ),
    ]
}

/// An OCI image layout of two layers, with the base image's busybox in the first.
fn oci_layout(linux: &Linux) -> anyhow::Result<PathBuf> {
    let place = linux.rekindle.state().join("tmp/oci");
    fs::create_dir_all(&place)?;
    let busybox = busybox(linux, &place)?;
    let passwd = b"root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/srv:/bin/sh\n";
    let below = layer(&[
        ("bin/busybox", Entry::File(&busybox, 0o755, 0)),
        ("bin/sh", Entry::Symlink("busybox")),
        ("etc/passwd", Entry::File(passwd, 0o644, 0)),
        ("srv/mine", Entry::File(b"mine\n", 0o600, 1000)),
        ("srv/old", Entry::File(b"old\n", 0o644, 0)),
    ])?;
    let above = layer(&[
        ("srv/.wh.old", Entry::File(b"", 0o644, 0)),
        ("srv/new", Entry::File(b"new\n", 0o644, 0)),
    ])?;
    let execution = json!({
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $GREETING $PWD; busybox id -u; exit 5"],
        "Env": ["GREETING=hello"], "WorkingDir": "/srv", "User": "web",
    });
    layout(&place, &[below, above], &execution)?;
    Ok(place)
}

/// A static busybox, out of the base image.
fn busybox(linux: &Linux, place: &Path) -> anyhow::Result<Vec<u8>> {
    let file = place.join("busybox");
    let request = format!("dump /bin/busybox {}", file.display());
    let mut debugfs = Command::new("debugfs");
    debugfs.args(["-R", &request]).arg(linux.image());
    let said = debugfs
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()?;
    let bytes = fs::read(&file).with_context(|| format!("{said:?}"))?;
    fs::remove_file(file)?;
    ensure!(!bytes.is_empty(), "{said:?}");
    Ok(bytes)
}

fn build(linux: &Linux, name: &str, from: &Path) -> anyhow::Result<Value> {
    let line = format!("image build {name} --from {} --json", from.display());
    linux.rekindle.tells(&line)
}

/// Runs a guest from the image `web` until it ends with this status: what it wrote.
fn runs(linux: &Linux, words: &[&str], status: i32) -> anyhow::Result<String> {
    let run = ["run", "--image", "web", "--mem", "128"];
    let said = linux
        .rekindle
        .command_of(run.iter().chain(words).copied())
        .output()?;
    ensure!(said.status.code() == Some(status), "{said:?}");
    Ok(String::from_utf8_lossy(&said.stdout).replace('\r', ""))
}

fn boots_from_oci(linux: &Linux) -> anyhow::Result<()> {
    let layout = oci_layout(linux)?;
    let one = build(linux, "web", &layout)?;
    let two = build(linux, "again", &layout)?;
    ensure!(
        one["path"] == two["path"],
        "the same layers, other contents: {one} {two}"
    );
    ensure!(
        one["record"]["config"]["env"] == json!(["GREETING=hello"]),
        "{one}"
    );
    // Its kernel reads and writes what our own code laid out.
    let line = "busybox uname -n; busybox ls -n /srv; busybox cat /srv/new /srv/mine; busybox id -u; \
                busybox dd if=/dev/urandom of=/written bs=1M count=8 2>/dev/null && busybox wc -c </written; exit 4";
    let root = [
        "--name",
        "called",
        "--user",
        "root",
        "--entrypoint",
        "/bin/sh",
        "--",
        "-c",
        line,
    ];
    let output = runs(linux, &root, 4)?;
    ensure!(output.starts_with("called\n"), "{output:?}");
    ensure!(output.ends_with("new\nmine\n0\n8388608\n"), "{output:?}");
    ensure!(!output.contains("old"), "{output:?}");
    let mine = output
        .lines()
        .find(|line| line.ends_with(" mine"))
        .context("srv/mine")?;
    let words: Vec<_> = mine.split_whitespace().collect();
    ensure!(
        words[0] == "-rw-------" && words[2..4] == ["1000", "1000"],
        "{mine}"
    );
    // What the image says, and other arguments for what it says.
    let output = runs(linux, &[], 5)?;
    ensure!(output.ends_with("hello /srv\n1000\n"), "{output:?}");
    let others = ["-e", "GREETING=bye", "-w", "/", "--", "echo $GREETING $PWD"];
    let output = runs(linux, &others, 0)?;
    ensure!(output.ends_with("bye /\n"), "{output:?}");
    linux.rekindle.does("image rm web again")?;
    fs::remove_dir_all(layout)?;
    Ok(())
}

fn stays_while_needed(linux: &Linux) -> anyhow::Result<()> {
    let tree = linux.rekindle.state().join("tmp/tree");
    fs::create_dir_all(tree.join("bin"))?;
    fs::write(tree.join("bin/busybox"), busybox(linux, &tree)?)?;
    let mut mode = fs::metadata(tree.join("bin/busybox"))?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
    fs::set_permissions(tree.join("bin/busybox"), mode)?;
    std::os::unix::fs::symlink("busybox", tree.join("bin/sh"))?;
    let before = build(linux, "web", &tree)?;
    linux
        .rekindle
        .does("run --image web --mem 128 --name web1 --detach")?;
    let refused = linux.rekindle.refuses("image rm web")?;
    ensure!(
        refused.contains("the image web is needed by the VM web1"),
        "{refused}"
    );
    fs::write(tree.join("more"), "more")?;
    let after = build(linux, "web", &tree)?;
    ensure!(before["path"] != after["path"]);
    let path = |built: &Value| built["path"].as_str().map(PathBuf::from);
    linux.rekindle.does("gc")?;
    ensure!(
        path(&before).context("a path")?.exists(),
        "collected under a VM"
    );
    linux.rekindle.does("rm --force web1")?;
    linux.rekindle.does("gc")?;
    ensure!(
        !path(&before).context("a path")?.exists(),
        "nobody needs it"
    );
    linux.rekindle.does("image rm web")?;
    ensure!(
        !path(&after).context("a path")?.exists(),
        "its last name is gone"
    );
    fs::remove_dir_all(tree)?;
    Ok(())
}
