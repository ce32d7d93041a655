//! Whether a snapshot can work here. Pure but for [`check_cpu`].
//!
//! Firecracker's state format per release, from its changelog and `--snapshot-version`: an equal major is
//! necessary, and 1.14 added device states without a new number, so that a snapshot of 1.14 is not for 1.13.

use crate::host;

/// Why a snapshot cannot work here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Incompatible {
    /// Another vendor's processor.
    #[error("it was made on a processor of {theirs}, this host has one of {ours}")]
    Cpu {
        /// The snapshot's.
        theirs: String,
        /// This host's.
        ours: String,
    },
    /// Another state format.
    #[error(
        "it was made by firecracker {theirs} (state format {their_format}), this is firecracker {ours} \
         (state format {our_format})"
    )]
    Format {
        /// The Firecracker that wrote it.
        theirs: String,
        /// Its format.
        their_format: u32,
        /// The Firecracker that was asked to load it.
        ours: String,
        /// Its format.
        our_format: u32,
    },
    /// Made by a newer release that shares the format number.
    #[error("it was made by firecracker {theirs}, which is newer than this firecracker {ours}")]
    Newer {
        /// The Firecracker that wrote it.
        theirs: String,
        /// The Firecracker that was asked to load it.
        ours: String,
    },
}

/// Refuses a snapshot of another vendor's processor.
pub(crate) fn check_cpu(theirs: &str) -> Result<(), Incompatible> {
    let ours = host::cpu().vendor;
    if ours == theirs {
        return Ok(());
    }
    Err(Incompatible::Cpu {
        theirs: theirs.to_owned(),
        ours,
    })
}

/// Refuses a snapshot that this Firecracker cannot read. Releases that nobody knows are left to Firecracker itself.
pub(crate) fn check_format(theirs: &str, ours: &str) -> Result<(), Incompatible> {
    let (Some(made), Some(here)) = (minor(theirs), minor(ours)) else {
        return Ok(());
    };
    let (Some(their_format), Some(our_format)) = (format_of(made), format_of(here)) else {
        return Ok(());
    };
    let (theirs, ours) = (theirs.to_owned(), ours.to_owned());
    if their_format != our_format {
        return Err(Incompatible::Format {
            theirs,
            their_format,
            ours,
            our_format,
        });
    }
    if made > here {
        return Err(Incompatible::Newer { theirs, ours });
    }
    Ok(())
}

/// The name of the state format that this Firecracker writes, `unknown` if nobody knows.
pub(crate) fn format_name(version: &str) -> String {
    let format = minor(version).and_then(format_of);
    format.map_or_else(|| "unknown".to_owned(), |major| format!("{major}.0.0"))
}

/// The minor release of a Firecracker 1.x.
fn minor(version: &str) -> Option<u32> {
    let mut parts = version.trim_start_matches('v').split(['.', '-']);
    if parts.next()? != "1" {
        return None;
    }
    parts.next()?.parse().ok()
}

/// The major number of the state format that a release writes.
fn format_of(minor: u32) -> Option<u32> {
    match minor {
        12 => Some(6),
        13 | 14 => Some(8),
        15 => Some(9),
        16 => Some(10),
        17 => Some(11),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_release_fits() {
        assert_eq!(check_format("1.12.1", "1.12.0"), Ok(()));
        assert_eq!(check_format("1.13.0", "1.14.2"), Ok(()));
    }

    #[test]
    fn another_format_is_refused_with_both() {
        let e = check_format("1.12.1", "1.16.1").unwrap_err();
        assert_eq!(
            e.to_string(),
            "it was made by firecracker 1.12.1 (state format 6), this is firecracker 1.16.1 (state format 10)"
        );
    }

    #[test]
    fn an_equal_number_does_not_fool() {
        assert!(matches!(
            check_format("1.14.0", "1.13.1"),
            Err(Incompatible::Newer { .. })
        ));
    }

    #[test]
    fn an_unknown_release_is_left_to_firecracker() {
        assert_eq!(check_format("2.0.0", "1.12.1"), Ok(()));
        assert_eq!(check_format("1.17.0-dev", "1.17.0"), Ok(()));
        assert_eq!(check_format("nonsense", "1.12.1"), Ok(()));
    }
}
