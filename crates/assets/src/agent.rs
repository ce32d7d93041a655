//! The agent that every guest with our initrd gets: built by this crate's build script.

/// The program, which needs nothing but a Linux kernel.
pub(crate) const AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/rekindle-agent"));

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_agent_is_small_and_needs_no_library() {
        assert!(AGENT.len() < 3 << 20, "{} bytes", AGENT.len());
        assert!(AGENT.starts_with(b"\x7fELF"));
        let loader = b"/ld-linux";
        assert!(
            !AGENT.windows(loader.len()).any(|bytes| bytes == loader),
            "it wants a loader"
        );
    }

    #[test]
    fn the_agent_runs() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("agent");
        std::fs::write(&path, AGENT).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&path, mode).unwrap();
        let said = Command::new(&path).arg("--version").output().unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        assert_eq!(
            said,
            concat!("rekindle-agent ", env!("CARGO_PKG_VERSION"), "\n")
        );
    }
}
