//! TAP devices that the user made: looked at before a VM is started on them.

use std::path::Path;

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
    /// No link can be called so.
    #[error("{0:?} cannot be the name of a network link: 1 to 15 bytes without '/' and blanks")]
    Name(String),
}

/// Refuses a name that is no TAP device in this process's network namespace.
pub(crate) fn check(name: &str) -> Result<(), TapError> {
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
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_climb_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "sixteen-bytes-xx"] {
            assert!(matches!(check(bad), Err(TapError::Name(_))), "{bad}");
        }
    }

    #[test]
    fn loopback_is_no_tap() {
        assert!(matches!(check("lo"), Err(TapError::NotATap(_))));
        assert!(matches!(check("nosuchtap0"), Err(TapError::Missing(_))));
    }
}
