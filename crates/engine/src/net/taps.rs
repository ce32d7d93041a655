//! TAP devices that the user made: looked at before a VM is started on them.

use std::fs;
use std::path::Path;

use crate::jail::Isolation;

/// The owner of a TAP device that has none, as the kernel writes it.
const NOBODY: &str = "-1";

/// Why a TAP device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No link is called so.
    #[error(
        "there is no network link called {0}; make the TAP first: ip tuntap add dev {0} mode tap"
    )]
    Missing(String),
    /// The link is no TAP.
    #[error("the network link {0} is not a TAP device")]
    NotATap(String),
    /// It belongs to a user that no jailed Firecracker runs as.
    #[error(
        "the TAP device {name} is for user {owner} alone, and a jailed VM has a user of its own; make it without an owner \
         (ip tuntap add dev {name} mode tap), or run the VM with --no-jail"
    )]
    Owned {
        /// The device.
        name: String,
        /// The id of its user.
        owner: String,
    },
    /// No link can be called so.
    #[error("{0:?} cannot be the name of a network link: 1 to 15 bytes without '/' and blanks")]
    Name(String),
}

/// Refuses a name that is no TAP device in this process's network namespace, or none that such a VM may use.
pub(crate) fn check(name: &str, isolation: Isolation) -> Result<(), TapError> {
    let printable = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    if name.is_empty() || name.len() > 15 || !printable || matches!(name, "." | "..") {
        return Err(TapError::Name(name.to_owned()));
    }
    let link = Path::new("/sys/class/net").join(name);
    if !link.exists() {
        return Err(TapError::Missing(name.to_owned()));
    }
    if !link.join("tun_flags").exists() {
        return Err(TapError::NotATap(name.to_owned()));
    }
    if isolation == Isolation::Jailed
        && let Ok(owner) = fs::read_to_string(link.join("owner"))
        && owner.trim() != NOBODY
    {
        return Err(TapError::Owned {
            name: name.to_owned(),
            owner: owner.trim().to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_climb_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "sixteen-bytes-xx"] {
            assert!(
                matches!(check(bad, Isolation::None), Err(TapError::Name(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn loopback_is_no_tap() {
        assert!(matches!(
            check("lo", Isolation::None),
            Err(TapError::NotATap(_))
        ));
        assert!(matches!(
            check("nosuchtap0", Isolation::None),
            Err(TapError::Missing(_))
        ));
    }
}
