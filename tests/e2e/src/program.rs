//! Where the program under test is.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, ensure};

/// The variable that names it.
const VARIABLE: &str = "REKINDLE_BIN";

/// The program, or how to get it.
pub(crate) fn find() -> anyhow::Result<PathBuf> {
    if let Some(path) = env::var_os(VARIABLE) {
        let path = std::path::absolute(path)?;
        ensure!(
            path.is_file(),
            "{VARIABLE} names {}, which is no file",
            path.display()
        );
        return Ok(path);
    }
    // A test is <target>/<profile>/deps/<name>, a program <target>/<profile>/<name>.
    let test = env::current_exe().context("find this test")?;
    let profile = test
        .ancestors()
        .nth(2)
        .context("the test is in no target directory")?;
    let path = profile.join("rekindle");
    ensure!(
        path.is_file(),
        "no {}: build it first (cargo build -p rekindle), or name one by {VARIABLE}",
        path.display()
    );
    Ok(path)
}
