//! Where the programs are that a VM runs on.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use rekindle_store::Root;

/// The name of the variable that overrides where Firecracker is.
pub const FIRECRACKER_VARIABLE: &str = "REKINDLE_FIRECRACKER";

/// The name of the variable that overrides where Firecracker's jailer is.
pub const JAILER_VARIABLE: &str = "REKINDLE_JAILER";

/// The two programs that the engine starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// Firecracker.
    pub firecracker: PathBuf,
    /// The program whose verb `pager` is the page server: `rekindle` itself.
    pub rekindle: PathBuf,
}

/// A program that was not found.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// No Firecracker.
    #[error(
        "no firecracker: not in ${FIRECRACKER_VARIABLE}, not in {installed}, not in $PATH; run: rekindle setup"
    )]
    NoFirecracker {
        /// Where `rekindle setup` installs it.
        installed: PathBuf,
    },
    /// The variable names something that is not there.
    #[error("${variable} names {path}, which is not a file")]
    NotAFile {
        /// The variable.
        variable: &'static str,
        /// What it names.
        path: PathBuf,
    },
    /// No jailer.
    #[error(
        "no jailer: not in ${JAILER_VARIABLE}, not at {beside}; run rekindle setup, or do without a jail: --no-jail"
    )]
    NoJailer {
        /// Where it would be, beside Firecracker.
        beside: PathBuf,
    },
    /// No rekindle.
    #[error("no rekindle program in $PATH: the page server is its verb `pager`")]
    NoRekindle,
}

impl Programs {
    /// Firecracker from `$REKINDLE_FIRECRACKER`, from what `rekindle setup` installed under `root`, or from
    /// `$PATH`, in this order; `rekindle` from `$PATH`.
    pub fn discover(root: &Root) -> Result<Programs, ProgramError> {
        let rekindle = in_path("rekindle", &search_path()).ok_or(ProgramError::NoRekindle)?;
        Ok(Programs {
            firecracker: find_firecracker(root)?,
            rekindle,
        })
    }

    /// The same, with `rekindle` given.
    pub fn discover_with(root: &Root, rekindle: PathBuf) -> Result<Programs, ProgramError> {
        Ok(Programs {
            firecracker: find_firecracker(root)?,
            rekindle,
        })
    }

    /// Firecracker's jailer: from `$REKINDLE_JAILER`, or beside Firecracker, of whose release it has to be.
    pub fn jailer(&self) -> Result<PathBuf, ProgramError> {
        if let Some(path) = named(JAILER_VARIABLE)? {
            return Ok(path);
        }
        let name = self.firecracker.file_name().unwrap_or_default();
        // Upstream's archive calls both alike: `firecracker-v1.12.1-x86_64`, `jailer-v1.12.1-x86_64`.
        let name = name.to_string_lossy().replacen("firecracker", "jailer", 1);
        let beside = self.firecracker.with_file_name(name);
        if beside != self.firecracker && is_program(&beside) {
            Ok(beside)
        } else {
            Err(ProgramError::NoJailer { beside })
        }
    }
}

/// Where `rekindle setup` installs Firecracker.
pub fn installed_firecracker(root: &Root) -> PathBuf {
    root.assets().join("bin").join("firecracker")
}

fn find_firecracker(root: &Root) -> Result<PathBuf, ProgramError> {
    if let Some(path) = named(FIRECRACKER_VARIABLE)? {
        return Ok(path);
    }
    let installed = installed_firecracker(root);
    if installed.is_file() {
        return absolute(FIRECRACKER_VARIABLE, installed);
    }
    in_path("firecracker", &search_path()).ok_or(ProgramError::NoFirecracker { installed })
}

/// The file that a variable names, if it is set.
fn named(variable: &'static str) -> Result<Option<PathBuf>, ProgramError> {
    let Some(path) = std::env::var_os(variable).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let path = PathBuf::from(path);
    if path.is_file() {
        absolute(variable, path).map(Some)
    } else {
        Err(ProgramError::NotAFile { variable, path })
    }
}

/// Programs are started from another working directory.
fn absolute(variable: &'static str, path: PathBuf) -> Result<PathBuf, ProgramError> {
    std::path::absolute(&path).map_err(|_| ProgramError::NotAFile { variable, path })
}

fn search_path() -> OsString {
    std::env::var_os("PATH").unwrap_or_default()
}

/// The first program of that name, absolute also where a folder in the search path is relative.
fn in_path(name: &str, path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path)
        .filter_map(|folder| std::path::absolute(folder.join(name)).ok())
        .find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_program_in_a_relative_folder_of_the_search_path_is_found_absolute() {
        // Tests run in their package's directory, and others may run beside this one: no moving about.
        let here = std::env::current_dir().unwrap();
        let place = tempfile::tempdir_in(&here).unwrap();
        let program = place.path().join("program");
        std::fs::write(&program, "").unwrap();
        let folder = place.path().strip_prefix(&here).unwrap();
        let path = std::env::join_paths([Path::new("/nowhere"), folder]).unwrap();
        assert_eq!(in_path("program", &path), None);
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(in_path("program", &path), Some(program));
    }
}
