//! The drives of a VM that is to be booted: what the flags say, and what a guest of ours gets.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use rekindle_engine::store::Root;
use rekindle_engine::vm::config::{Access, Drive, Limits};

/// The size of a layer unless somebody says otherwise, in MiB.
pub(crate) const LAYER_MIB: u64 = 8192;

/// The names that Linux gives to the first 26 disks end in a letter each.
const LETTERS: std::ops::RangeInclusive<u8> = b'a'..=b'z';

/// The value of `--disk`: `F[:ro][,bw=N][,iops=N]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskArgument {
    path: PathBuf,
    access: Access,
    limits: Limits,
}

impl FromStr for DiskArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A path may hold commas: what is no limit belongs to it.
        let mut path = text;
        while let Some((before, last)) = path.rsplit_once(',')
            && (last.starts_with("bw=") || last.starts_with("iops="))
        {
            path = before;
        }
        let limits = match text[path.len()..].strip_prefix(',') {
            Some(limits) => parse_limits(limits)?,
            None => Limits::default(),
        };
        let (path, access) = match path.strip_suffix(":ro") {
            Some(path) => (path, Access::ReadOnly),
            None => (path, Access::OwnCopy),
        };
        Ok(DiskArgument {
            path: path.into(),
            access,
            limits,
        })
    }
}

impl DiskArgument {
    /// The drive, the `n`th of its kind.
    pub(crate) fn drive(&self, n: usize) -> Result<Drive> {
        // Links are followed here, once: further down a link in place of a disk is refused.
        let file = std::fs::canonicalize(&self.path)
            .with_context(|| format!("the disk {} cannot be used", self.path.display()))?;
        Ok(Drive::data(format!("disk{n}"), file, self.access).limits(self.limits))
    }
}

/// `bw=N,iops=N`, either or both; N of bytes with K, M or G.
pub(crate) fn parse_limits(text: &str) -> Result<Limits, String> {
    let mut limits = Limits::default();
    for part in text.split(',') {
        let known = "a limit is bw=BYTES (a second; 10M, 500K) or iops=NUMBER (a second)";
        let (name, value) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?}: {known}"))?;
        let (place, number) = match name {
            "bw" => (&mut limits.bytes_per_second, parse_size(value)?),
            "iops" => {
                let number = value.parse().map_err(|_| format!("{part:?}: {known}"))?;
                (&mut limits.operations_per_second, number)
            }
            _ => return Err(format!("{part:?}: {known}")),
        };
        if number == 0 {
            return Err(format!("{part:?}: a limit is 1 or more"));
        }
        if place.replace(number).is_some() {
            return Err(format!("{name} is given twice"));
        }
    }
    Ok(limits)
}

/// `8G`, `512M`, `100K`, `4096`: bytes, in powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.strip_suffix(['K', 'M', 'G', 'T']) {
        Some(number) => (
            number,
            match text.as_bytes()[number.len()] {
                b'K' => 10,
                b'M' => 20,
                b'G' => 30,
                _ => 40,
            },
        ),
        None => (text, 0),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not like 512M or 8G"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}

/// The value of `--disk-size`, in MiB.
pub(crate) fn parse_layer_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    let possible = rekindle_assets::LAYER_MIB;
    let mib = bytes >> 20;
    if bytes.is_multiple_of(1 << 20) && possible.contains(&mib) {
        return Ok(mib);
    }
    Err(format!(
        "{text:?}: {}M to {}T are possible, in whole MiB",
        possible.start(),
        possible.end() >> 20
    ))
}

/// The layer of a guest of ours, which gets `others` beside it, and the kernel's argument that tells which drive it is.
pub(crate) fn layer(root: &Root, mib: u64, others: usize) -> Result<(Drive, String)> {
    let letter = LETTERS.clone().nth(others);
    let letter = letter.filter(|_| others < LETTERS.len()).map(char::from);
    let Some(letter) = letter else {
        bail!(
            "{others} drives and a layer: a guest can have {}",
            LETTERS.len()
        );
    };
    let empty = rekindle_assets::layer(&empty_layers(root), mib)?;
    Ok((
        Drive::layer(empty),
        format!("rekindle.layer=/dev/vd{letter}"),
    ))
}

/// Where the empty layers are that those of VMs are copied from.
pub(crate) fn empty_layers(root: &Root) -> PathBuf {
    root.assets().join("layers")
}

/// Refuses an image that the guest could not join with a layer, before anything is made.
pub(crate) fn check_image(image: &Path) -> Result<()> {
    const SUPERBLOCK: u64 = 1024;
    use std::os::unix::fs::FileExt;
    let read = || -> std::io::Result<[u8; 0x68]> {
        let mut bytes = [0; 0x68];
        std::fs::File::open(image)?.read_exact_at(&mut bytes, SUPERBLOCK)?;
        Ok(bytes)
    };
    // What is no ext4 the guest's kernel may know all the same, or says itself what is wrong.
    let Ok(superblock) = read() else {
        return Ok(());
    };
    let is_ext4 = superblock[0x38..0x3a] == [0x53, 0xef];
    let needs_recovery = superblock[0x60] & 4 != 0;
    ensure!(
        !(is_ext4 && needs_recovery),
        "the image {} was not unmounted, and guests only read it; repair it with: e2fsck -fp {}",
        image.display(),
        image.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bytes: Option<u64>, operations: Option<u64>) -> Limits {
        Limits {
            bytes_per_second: bytes,
            operations_per_second: operations,
        }
    }

    #[test]
    fn a_disk_is_a_path_an_access_and_limits() {
        let disk = |text: &str| text.parse::<DiskArgument>().unwrap();
        for (text, path, access, wanted) in [
            ("d", "d", Access::OwnCopy, limits(None, None)),
            ("a,b=c:ro", "a,b=c", Access::ReadOnly, limits(None, None)),
            (
                "d:ro,bw=10M",
                "d",
                Access::ReadOnly,
                limits(Some(10 << 20), None),
            ),
            (
                "d,iops=5,bw=7",
                "d",
                Access::OwnCopy,
                limits(Some(7), Some(5)),
            ),
        ] {
            let disk = disk(text);
            assert_eq!((disk.path.to_str().unwrap(), disk.access), (path, access));
            assert_eq!(disk.limits, wanted, "{text}");
        }
    }

    #[test]
    fn limits_that_say_nothing_or_too_much_are_refused() {
        for bad in [
            "",
            "bw",
            "bw=",
            "bw=0",
            "iops=0",
            "iops=1K",
            "bw=-1",
            "bw=1X",
            "bw=1,bw=2",
            "x=1",
        ] {
            assert!(parse_limits(bad).is_err(), "{bad:?}");
        }
        for bad in ["d,bw=0", "d:ro,iops=x"] {
            assert!(bad.parse::<DiskArgument>().is_err(), "{bad:?}");
        }
        assert!(parse_size("18446744073709551615G").is_err());
    }

    #[test]
    fn a_layer_has_whole_mebibytes_and_fits() {
        assert_eq!(parse_layer_size("8G"), Ok(8192));
        assert_eq!(parse_layer_size("64M"), Ok(64));
        for bad in ["63M", "0", "2T", "67108865", "G", "8g"] {
            assert!(parse_layer_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_layer_is_the_last_drive() {
        let place = tempfile::tempdir().unwrap();
        let root = Root::open(place.path()).unwrap();
        for (others, name) in [(1, "b"), (3, "d"), (25, "z")] {
            let (drive, argument) = layer(&root, 64, others).unwrap();
            assert_eq!(argument, format!("rekindle.layer=/dev/vd{name}"));
            assert!(drive.source.is_file());
        }
        assert!(layer(&root, 64, 26).is_err());
    }
}
