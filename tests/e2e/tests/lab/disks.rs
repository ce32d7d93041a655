//! What a copy writes to its disk, no other sees; and disks that are full.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use rekindle_kit::guest::Mib;
use rekindle_kit::story::Story;

use crate::console::Linux;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "siblings write to disks of their own, in whichever order they came, the original's removed",
            siblings,
        )
        .within(Duration::from_secs(600)),
        story(
            "what a guest writes is in its layer, and its image is the one file that all read",
            layers,
        ),
        story(
            "a guest whose layer is full is told so, and goes on",
            full_layer,
        ),
        Story::new(
            "a guest whose host has no room left goes on, and no half snapshot is left of it",
            full_host,
        )
        .within(Duration::from_secs(600)),
    ]
}

fn siblings(linux: &Linux) -> anyhow::Result<()> {
    linux.boots_with(128, "base", "")?;
    linux.types("base", "echo base > /who; sync\n")?;
    ensure!(linux.asks("base", "cat /who")? == "base");
    linux.rekindle.does("snapshot create base --name base")?;
    linux.rekindle.does("rm --force base")?;
    // All orders there are: natively, where it is quick.
    for order in [["a", "b", "c"], ["c", "b", "a"]] {
        for name in order {
            linux
                .rekindle
                .does(&format!("restore base --name {name}"))?;
            let drives = linux.rekindle.open_drives(name)?;
            ensure!(drives.contains(&"layer".to_owned()), "{drives:?}");
        }
        for name in order {
            let before = linux.asks(
                name,
                &format!("cat /who; echo {name} > /who; sync; echo 3 > /proc/sys/vm/drop_caches"),
            )?;
            ensure!(before == "base", "{order:?}: {name} reads {before:?}");
        }
        for name in order {
            let its = linux.asks(name, "cat /who")?;
            ensure!(its == name, "{order:?}: {name} reads {its:?}");
            linux.rekindle.does(&format!("rm --force {name}"))?;
        }
    }
    Ok(())
}

fn layers(linux: &Linux) -> anyhow::Result<()> {
    let read = linux.rekindle.file("read.ext4");
    let mut disk = b"the contents of a disk that all may read".to_vec();
    disk.resize(64 << 10, 0);
    fs::write(&read, disk)?;
    linux.boots(
        "base",
        &format!("--disk {}:ro --disk-size 256M", read.display()),
    )?;
    let link = fs::read_link(linux.rekindle.vm("base").join("disks/rootfs"))?;
    ensure!(link.is_file(), "the image is not what it reads");
    ensure!(linux.asks("base", "head -c 12 /dev/vdb")? == "the contents");
    let line = "echo x > /dev/vda; a=$?; echo x > /dev/vdb; echo $a $?";
    let said = linux.asks("base", &format!("{{ {line}; }} 2> /dev/null"))?;
    ensure!(said == "1 1", "it wrote to what is only read: {said:?}");
    // Of the image, too, everything can be changed.
    let said = linux.asks("base", "rm /etc/hosts; mv /etc/passwd /etc/users; mv /var/log /log; ls /etc/hosts /etc/users /log -d 2>/dev/null | tr \"\\n\" .")?;
    ensure!(said == "/etc/users./log.", "{said:?}");
    linux.asks("base", "head -c 3000000 /dev/urandom > /big; sync")?;
    let layer = linux.rekindle.vm("base").join("disks/layer");
    ensure!(fs::metadata(&layer)?.len() == 256 << 20);
    let taken = on_disk(&layer)?;
    ensure!(
        (3_000_000..64 << 20).contains(&taken),
        "it takes {taken} bytes"
    );
    linux.rekindle.does("snapshot create base --name base")?;
    let manifest = linux.rekindle.tells("snapshot inspect base")?;
    let drives = &manifest["devices"]["drives"];
    ensure!(
        drives[0]["id"] == "rootfs" && drives[0]["backing"]["type"] == "host",
        "{drives}"
    );
    ensure!(
        drives[2]["id"] == "layer" && drives[2]["backing"]["type"] == "layer",
        "{drives}"
    );
    linux.rekindle.does("rm --force base")?;
    linux.rekindle.does("restore base --name copy --verify")?;
    let said = linux.asks(
        "copy",
        "ls /etc/hosts /etc/users /log /big -d 2>/dev/null | tr \"\\n\" .",
    )?;
    ensure!(said == "/big./etc/users./log.", "{said:?}");
    Ok(())
}

fn on_disk(file: &Path) -> anyhow::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(file)?.blocks() * 512)
}

fn full_layer(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("small", "--disk-size 64M")?;
    let said = linux.asks(
        "small",
        "dd if=/dev/zero of=/big bs=1M count=80 2>&1; echo $?",
    )?;
    ensure!(
        said.contains("No space left") && said.ends_with('1'),
        "{said:?}"
    );
    let said = linux.asks("small", "rm /big; echo room > /there; sync; cat /there")?;
    ensure!(said == "room", "{said:?}");
    ensure!(linux.rekindle.state_of("small")? == "running");
    Ok(())
}

fn full_host() -> anyhow::Result<()> {
    let linux = Linux::on_a_disk_of(Mib(320))?;
    let rekindle = &linux.rekindle;
    linux.boots("base", "")?;
    // What the kernel says of failed writes would stand in the middle of the answers.
    linux.asks("base", "echo before > /who; sync; dmesg -n 1")?;
    let ballast = rekindle.state().join("ballast");
    let free = rustix::fs::statvfs(rekindle.state())?;
    let size = (free.f_bavail * free.f_frsize).saturating_sub(4 << 20);
    fs::write(&ballast, vec![1; usize::try_from(size)?])?;
    // Firecracker tells the guest of each write that failed.
    let said = linux.asks(
        "base",
        "head -c 16000000 /dev/zero > /big; sync; echo it goes on",
    )?;
    ensure!(said.ends_with("it goes on"), "{said:?}");
    let errors = linux.asks("base", "dmesg | grep -c \"I/O error, dev\"")?;
    ensure!(errors != "0", "nobody told the guest");
    let said = rekindle.refuses("snapshot create base --name none")?;
    ensure!(said.contains("No space left"), "{said}");
    ensure!(rekindle.state_of("base")? == "running");
    let said = rekindle
        .tries(&format!("{} --name second --detach", linux.run()))?
        .refused(125)?;
    ensure!(said.contains("No space left"), "{said}");
    fs::remove_file(&ballast)?;

    ensure!(linux.asks("base", "cat /who")? == "before");
    ensure!(
        fs::read_dir(rekindle.state().join("tmp"))?.count() == 0,
        "a draft is left"
    );
    ensure!(rekindle.vms()?.len() == 1, "half a VM is left");
    rekindle.does("snapshot create base --name there-is-room")?;
    rekindle.leaves_nothing()
}
