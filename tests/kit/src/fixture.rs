//! Places for a test to work in, gone when it ends.

use std::env;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

use crate::guest::Mib;

/// What a Unix socket's path may be long, below a root and in all.
const SOCKET_PATH: usize = 107;
const BELOW_ROOT: usize = 80;

/// A directory whose path is short enough for the sockets that will be in it.
///
/// Removed when it is dropped, unless `REKINDLE_KEEP` is set; then its path is printed.
#[derive(Debug)]
pub struct TempRoot {
    directory: TempDir,
}

impl TempRoot {
    /// A new one in `/tmp`, wherever `TMPDIR` points.
    ///
    /// # Errors
    /// When there can be none.
    pub fn new() -> io::Result<TempRoot> {
        let mut directory = tempfile::Builder::new().prefix("rk-").tempdir_in("/tmp")?;
        if env::var_os("REKINDLE_KEEP").is_some() {
            directory.disable_cleanup(true);
            eprintln!("kept: {}", directory.path().display());
        }
        let length = directory.path().as_os_str().len();
        debug_assert!(length + BELOW_ROOT <= SOCKET_PATH, "{directory:?}");
        Ok(TempRoot { directory })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// A new directory in it.
    ///
    /// # Errors
    /// When there can be none of that name.
    pub fn directory(&self, name: impl AsRef<Path>) -> io::Result<PathBuf> {
        let path = self.join(name);
        std::fs::create_dir(&path)?;
        Ok(path)
    }
}

/// A file system of a small size, to fill up. Needs root.
#[derive(Debug)]
pub struct SmallDisk {
    point: PathBuf,
}

impl SmallDisk {
    /// Mounts one on an existing directory.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn mount(point: &Path, size: Mib) -> io::Result<SmallDisk> {
        let options = std::ffi::CString::new(format!("size={}m,mode=0700", size.0))?;
        mount(
            "tmpfs",
            point,
            "tmpfs",
            MountFlags::empty(),
            options.as_c_str(),
        )?;
        Ok(SmallDisk {
            point: point.to_owned(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.point
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.point, UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {error}", self.point.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::ErrorKind;

    use super::{SmallDisk, TempRoot};
    use crate::guest::Mib;
    use crate::require::requires_root;

    #[test]
    fn a_root_leaves_room_for_sockets_and_nothing_behind() {
        let root = TempRoot::new().unwrap();
        let path = root.directory("vms").unwrap();
        assert!(path.as_os_str().len() < 24, "{}", path.display());
        drop(root);
        assert_eq!(path.exists(), std::env::var_os("REKINDLE_KEEP").is_some());
    }

    #[test]
    fn a_small_disk_is_full_soon() {
        if let Err(skipped) = requires_root() {
            println!("SKIPPED a_small_disk_is_full_soon: {skipped}");
            return;
        }
        let root = TempRoot::new().unwrap();
        let disk = SmallDisk::mount(&root.directory("disk").unwrap(), Mib(1)).unwrap();
        let error = fs::write(disk.path().join("file"), vec![1; 2 << 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }
}
