//! A container registry, for tests of pulling from one: Debian's.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::Result;

use crate::Assets;
use crate::cache::Built;
use crate::guest::recipe;

const PACKAGE: &str = "docker-registry";
const SET: &str = "registry";
/// To be raised when this file makes something else.
const BUILDER: &str = "1";

impl Assets {
    /// The program `docker-registry`; `docker-registry serve CONFIG` runs it.
    ///
    /// # Errors
    /// When apt cannot download it.
    pub fn registry(&self) -> Result<PathBuf> {
        let set = self.ensure(SET, recipe(&[BUILDER, PACKAGE], &[]), |scratch| {
            let package = self.unpack(PACKAGE)?;
            let program = scratch.join(PACKAGE);
            fs::copy(package.file(&["usr/bin/docker-registry"])?, &program)?;
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
            Ok(Built {
                source: package.source.clone(),
                version: package.version.clone(),
            })
        })?;
        self.announce(&set, "container registry", PACKAGE)?;
        Ok(set.path(PACKAGE))
    }
}
