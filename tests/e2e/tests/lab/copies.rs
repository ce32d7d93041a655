//! Files and trees into guests and out of them, and what a copy leaves that does not come to its end.

use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, ensure};
use rekindle_e2e::{Role, SOON, Said, until, wait_for};
use rekindle_kit::dice::setting;
use rekindle_kit::fixture::SmallDisk;
use rekindle_kit::guest::Mib;
use rekindle_kit::story::Story;
use rustix::process::{Pid, Signal, kill_process};

use crate::console::Linux;
use crate::story;

/// The size of the tree; the soak's is 10,000.
fn files() -> u64 {
    setting("REKINDLE_COPIED_FILES", 1000)
}

/// What a copy under way has in its directory.
const BESIDE: &str = ".rekindle-copy-0";

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "copies of a tree and of 4 GiB of hole come back as they went",
            there_and_back,
        )
        .within(Duration::from_secs(600 + files() / 10)),
        story(
            "a copy goes on across a snapshot and its monitor's death",
            goes_on,
        ),
        story(
            "copies whose verb or program is killed leave no half file",
            kills,
        ),
        story("copies onto a full disk are one clear error", full),
    ]
}

impl Linux {
    /// Boots a guest with a tmpfs of so much to copy to, and waits for its agent.
    fn boots_to_copy(&self, name: &str, megabytes: u32) -> anyhow::Result<()> {
        let line = format!("{} --mem 256 --name {name} --detach", self.run());
        self.rekindle.does(&line)?;
        self.shell(
            name,
            &format!("mount -t tmpfs -o size={megabytes}m tmpfs /mnt"),
        )?;
        Ok(())
    }

    /// What a line of shell prints in a guest.
    fn shell(&self, name: &str, line: &str) -> anyhow::Result<String> {
        let said = self
            .rekindle
            .command_of(["exec", name, "--", "sh", "-c", line])
            .output()?;
        ensure!(said.status.success(), "{line}: {said:?}");
        Ok(String::from_utf8(said.stdout)?.trim_end().to_owned())
    }

    /// The agent's copying programs that run in a guest.
    fn copying(&self, name: &str) -> anyhow::Result<String> {
        // Each looks at what it would itself be, were the words not taken apart.
        let line = r#"for p in /proc/[0-9]*; do
            case "$(tr '\0' ' ' 2>/dev/null <$p/cmdline)" in
                /proc/self/exe*pack*) echo ${p#/proc/} ;;
            esac
        done"#;
        self.shell(name, line)
    }

    /// A verb that was stopped while it copies.
    fn stopped_while_copying(
        &self,
        line: &str,
        is_under_way: impl Fn() -> anyhow::Result<bool>,
    ) -> anyhow::Result<Stopped> {
        let mut command = self.rekindle.command(line);
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut stopped = Stopped { child };
        loop {
            stopped.signal(Signal::STOP)?;
            if is_under_way()? {
                return Ok(stopped);
            }
            ensure!(
                stopped.child.try_wait()?.is_none(),
                "it has ended already: {line}"
            );
            stopped.signal(Signal::CONT)?;
            sleep(Duration::from_millis(20));
        }
    }
}

/// A verb that waits for what becomes of it.
struct Stopped {
    child: Child,
}

impl Stopped {
    fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    fn goes_on(mut self) -> anyhow::Result<Said> {
        self.signal(Signal::CONT)?;
        Said::of(self.child, "cp".to_owned())
    }

    fn dies(mut self) -> anyhow::Result<()> {
        self.signal(Signal::KILL)?;
        wait_for(&mut self.child, SOON)?;
        Ok(())
    }
}

/// A file without holes, so large that its copy can be caught in the middle.
fn large(linux: &Linux) -> anyhow::Result<std::path::PathBuf> {
    let path = linux.rekindle.file("large");
    // A byte a MiB, none of them zero: the lab is slow.
    let bytes: Vec<u8> = (1..=48u8)
        .map(|n| vec![n; 1 << 20])
        .collect::<Vec<_>>()
        .concat();
    fs::write(&path, bytes)?;
    Ok(path)
}

fn there_and_back(linux: &Linux) -> anyhow::Result<()> {
    let files = files();
    eprintln!("a tree of {files} files; the soak's has 10000");
    let (tree, back) = (linux.rekindle.file("tree"), linux.rekindle.file("back"));
    grow(&tree, files)?;
    linux.boots_to_copy("box", 100)?;
    let told = linux
        .rekindle
        .tells(&format!("cp --json {} box:/mnt", tree.display()))?;
    ensure!(told["files"] == files, "{told}");
    let count = linux.shell("box", "find /mnt/tree -type f | wc -l")?;
    ensure!(count == files.to_string(), "{count} files came");
    let seven = linux.shell("box", "stat -c '%a %u %Y' /mnt/tree/0/7; cat /mnt/tree/0/7")?;
    ensure!(seven == "674 0 1000000007\n7", "{seven}");
    linux
        .rekindle
        .does(&format!("cp box:/mnt/tree {}", back.display()))?;
    same(&tree, &back)?;
    fs::remove_dir_all(&back)?;

    let sparse = linux.rekindle.file("sparse");
    let file = File::create(&sparse)?;
    file.set_len(4 << 30)?;
    for at in [0, 3 << 30, (4 << 30) - 5] {
        file.write_all_at(b"bytes", at)?;
    }
    linux
        .rekindle
        .does(&format!("cp {} box:/mnt/", sparse.display()))?;
    let stat = linux.shell("box", "stat -c '%s %b' /mnt/sparse")?;
    let (size, blocks) = stat.split_once(' ').context("two numbers")?;
    ensure!(
        size == "4294967296" && blocks.parse::<u64>()? < 1000,
        "{stat}"
    );
    linux
        .rekindle
        .does(&format!("cp box:/mnt/sparse {}", back.display()))?;
    let came = fs::metadata(&back)?;
    ensure!(came.len() == 4 << 30 && came.blocks() < 1000, "{came:?}");
    for at in [0, 3 << 30, (4 << 30) - 5] {
        let mut bytes = [0; 5];
        File::open(&back)?.read_exact_at(&mut bytes, at)?;
        ensure!(&bytes == b"bytes", "{bytes:?} at {at}");
    }
    Ok(())
}

/// Makes a tree of so many files, no two alike.
fn grow(tree: &Path, files: u64) -> anyhow::Result<()> {
    for n in 0..files {
        let dir = tree.join((n / 100).to_string());
        if n % 100 == 0 {
            fs::create_dir_all(&dir)?;
            symlink(format!("../{n}"), dir.join("link"))?;
        }
        let path = dir.join(n.to_string());
        fs::write(&path, n.to_string())?;
        let time = UNIX_EPOCH + Duration::new(1_000_000_000 + n, 123_456_789);
        File::open(&path)?.set_times(FileTimes::new().set_modified(time))?;
        fs::set_permissions(
            &path,
            Permissions::from_mode(0o604 | u32::try_from(n % 8)? << 3 & 0o70),
        )?;
    }
    Ok(())
}

/// Fails unless two trees are the same, but for owners.
fn same(one: &Path, other: &Path) -> anyhow::Result<()> {
    let (a, b) = (fs::symlink_metadata(one)?, fs::symlink_metadata(other)?);
    let seen = |m: &fs::Metadata| (m.mode(), m.mtime(), m.mtime_nsec());
    ensure!(seen(&a) == seen(&b), "{one:?} is {a:?}, {other:?} {b:?}");
    if a.is_symlink() {
        ensure!(fs::read_link(one)? == fs::read_link(other)?, "{one:?}");
    } else if a.is_dir() {
        ensure!(
            fs::read_dir(one)?.count() == fs::read_dir(other)?.count(),
            "{one:?}"
        );
        for entry in fs::read_dir(one)? {
            let name = entry?.file_name();
            same(&one.join(&name), &other.join(&name))?;
        }
    } else {
        ensure!(fs::read(one)? == fs::read(other)?, "{one:?}");
    }
    Ok(())
}

fn goes_on(linux: &Linux) -> anyhow::Result<()> {
    let large = large(linux)?;
    linux.boots_to_copy("box", 100)?;
    let beside = format!("test -s /mnt/{BESIDE} && echo so || echo no");
    let is_under_way = || Ok(linux.shell("box", &beside)? == "so");
    let line = format!("cp {} box:/mnt", large.display());
    let copy = linux.stopped_while_copying(&line, is_under_way)?;
    linux.rekindle.one(Role::Monitor)?.kill(SOON)?;
    let line = "snapshot create box --name middle";
    let mut command = linux.rekindle.command(line);
    let mut snapshot = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // Not until it is made: the guest waits ten seconds for a verb that is gone, and the lab takes its time.
    until("the snapshot is under way", || {
        let record = linux.rekindle.tells("inspect box")?;
        Ok(!record["capturing"].is_null() || snapshot.try_wait()?.is_some())
    })?;
    copy.goes_on()?.done()?;
    Said::of(snapshot, line.to_owned())?.done()?;
    linux.rekindle.does(&format!(
        "cp box:/mnt/large {}",
        linux.rekindle.file("back").display()
    ))?;
    same(&large, &linux.rekindle.file("back"))
}

fn kills(linux: &Linux) -> anyhow::Result<()> {
    let large = large(linux)?;
    linux.boots_to_copy("box", 100)?;
    let beside = format!("test -s /mnt/{BESIDE} && echo so || echo no");
    let is_under_way = || Ok(linux.shell("box", &beside)? == "so");
    let inward = format!("cp {} box:/mnt", large.display());

    // The program in the guest.
    let copy = linux.stopped_while_copying(&inward, is_under_way)?;
    linux.shell("box", &format!("kill -9 {}", linux.copying("box")?))?;
    let said = copy.goes_on()?.refused(1)?;
    ensure!(
        said.contains("signal 9 ended the copy in the guest"),
        "{said}"
    );
    ensure!(linux.shell("box", "ls -A /mnt")? == BESIDE);

    // The verb, inward: what the last one left is gone.
    linux.stopped_while_copying(&inward, is_under_way)?.dies()?;
    ensure!(linux.shell("box", "ls -A /mnt")? == BESIDE);
    until("nothing copies in the guest any more", || {
        Ok(linux.copying("box")?.is_empty())
    })?;
    linux.rekindle.does(&inward)?;
    ensure!(linux.shell("box", "ls -A /mnt")? == "large");

    // The verb, outward.
    let dir = linux.rekindle.file("out");
    fs::create_dir(&dir)?;
    let outward = format!("cp box:/mnt/large {}", dir.display());
    let beside = dir.join(BESIDE);
    let is_under_way = || Ok(fs::metadata(&beside).is_ok_and(|file| file.len() > 0));
    linux
        .stopped_while_copying(&outward, is_under_way)?
        .dies()?;
    ensure!(!dir.join("large").exists(), "a half file");
    until("nothing copies in the guest any more", || {
        Ok(linux.copying("box")?.is_empty())
    })?;
    linux.rekindle.does(&outward)?;
    same(&large, &dir.join("large"))?;
    ensure!(fs::read_dir(&dir)?.count() == 1, "something is left beside");

    // Interrupted, it leaves nothing at all.
    fs::remove_file(dir.join("large"))?;
    let mut copy = linux.stopped_while_copying(&outward, is_under_way)?;
    copy.signal(Signal::INT)?;
    ensure!(copy.goes_on()?.status == Some(130));
    ensure!(fs::read_dir(&dir)?.count() == 0, "something is left");
    Ok(())
}

fn full(linux: &Linux) -> anyhow::Result<()> {
    let large = large(linux)?;
    linux.boots_to_copy("box", 1)?;
    let said = linux
        .rekindle
        .tries(&format!("cp {} box:/mnt", large.display()))?
        .refused(1)?;
    let expected = r#"in the guest: there is no space left for "/mnt/large""#;
    ensure!(said.contains(expected), "{said}");
    ensure!(linux.shell("box", "ls -A /mnt")?.is_empty());

    let dir = linux.rekindle.file("full");
    fs::create_dir(&dir)?;
    let disk = SmallDisk::mount(&dir, Mib(1))?;
    linux.shell(
        "box",
        "mkdir /dev/shm/d; tr '\\0' x </dev/zero | head -c 3000000 >/dev/shm/d/f",
    )?;
    let line = format!("cp box:/dev/shm/d {}", dir.display());
    let said = linux.rekindle.tries(&line)?.refused(1)?;
    ensure!(said.contains("there is no space left for"), "{said}");
    ensure!(
        fs::read_dir(disk.path().join("d"))?.count() == 0,
        "a half file"
    );

    for (line, expected) in [
        (
            "cp box:/none /tmp",
            "in the guest: there is no \"/none\" to copy",
        ),
        ("cp /none box:/", "there is no \"/none\" to copy"),
        (
            "cp /etc/hostname box:/no/such/",
            "in the guest: there is no directory \"/no/such/\"",
        ),
    ] {
        let said = linux.rekindle.tries(line)?.refused(1)?;
        ensure!(said.contains(expected), "{line}: {said}");
    }
    linux.rekindle.tries("cp box:/a box:/b")?.refused(2)?;
    Ok(())
}
