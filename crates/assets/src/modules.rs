//! Kernel modules: which ones are wanted, which others they need.
//!
//! ```text
//! lib/modules/<release>/**/*.ko[.xz]  ─ .modinfo: depends=, alias=, softdep= ─> closure of the wanted
//!                                                        ─> modules.dep, modules.alias, *.ko
//! ```
//!
//! Debian's packages come without `modules.dep`; it is made when they are installed. So the
//! dependencies are read from the modules themselves, and the two files that `modprobe` wants are
//! written for just the modules taken. With them the kernel can also load modules on its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::kernel;

/// The modules of one kernel, as unpacked from its package.
pub(crate) struct ModuleTree {
    /// The kernel's release, which is the directory's name under `lib/modules`.
    pub(crate) release: String,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

/// A module, uncompressed, with what it says about itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) contents: Vec<u8>,
    depends: Vec<String>,
    aliases: Vec<String>,
}

impl ModuleTree {
    /// Looks through the only kernel of an unpacked package.
    pub(crate) fn open(package: &Path) -> Result<Self> {
        let candidates = ["lib/modules", "usr/lib/modules"].map(|p| package.join(p));
        let modules = candidates
            .iter()
            .find(|p| p.is_dir())
            .context("it has no modules")?;
        let mut kernels = fs::read_dir(modules)?;
        let (Some(kernel), None) = (kernels.next(), kernels.next()) else {
            bail!("{} does not hold exactly one kernel", modules.display());
        };
        let kernel = kernel?;
        let release = kernel
            .file_name()
            .into_string()
            .ok()
            .context("its name is not UTF-8")?;
        let mut files = BTreeMap::new();
        collect(&kernel.path(), &mut files)?;
        let built_in = fs::read_to_string(kernel.path().join("modules.builtin"))
            .context("it does not say what is built in")?;
        let built_in = built_in
            .lines()
            .filter_map(|l| module_name(Path::new(l)))
            .collect();
        Ok(Self {
            release,
            files,
            built_in,
        })
    }

    /// Whether the kernel has it as a module.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// The wanted modules and all that they need, each after what it needs. What is built in
    /// needs no module and is left out.
    pub(crate) fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut taken = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.take(name, &mut seen, &mut taken)?;
        }
        Ok(taken)
    }

    fn take(&self, name: &str, seen: &mut BTreeSet<String>, taken: &mut Vec<Module>) -> Result<()> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name);
        let path = path.with_context(|| format!("kernel {} has no module {name}", self.release))?;
        let module = Module::read(name, path)?;
        for needed in &module.depends {
            self.take(needed, seen, taken)?;
        }
        taken.push(module);
        Ok(())
    }
}

impl Module {
    fn read(name: &str, path: &Path) -> Result<Self> {
        let read = || -> Result<Vec<u8>> {
            let contents = fs::read(path)?;
            match path.extension().and_then(|e| e.to_str()) {
                Some("xz") => kernel::xz(&contents),
                _ => Ok(contents),
            }
        };
        let contents = read().with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self::parse(name, contents))
    }

    /// `.modinfo` is a run of `key=value` strings, each closed by a zero byte. Its strings are
    /// found without reading the ELF around them: nothing else in a module begins so.
    fn parse(name: &str, contents: Vec<u8>) -> Self {
        let values = |key: &str| -> Vec<String> {
            let strings = contents.split(|b| *b == 0);
            strings
                .filter_map(|s| s.strip_prefix(key.as_bytes()))
                .filter_map(|s| String::from_utf8(s.to_vec()).ok())
                .collect()
        };
        let split = |s: &String| s.split([',', ' ']).map(normal).collect::<Vec<_>>();
        let depends = values("depends=")
            .iter()
            .flat_map(split)
            .filter(|n| !n.is_empty())
            .collect();
        let aliases = values("alias=");
        Self {
            name: name.to_owned(),
            depends,
            aliases,
            contents,
        }
    }

    /// The file's name in an initrd, beside all the others.
    pub(crate) fn file(&self) -> String {
        format!("{}.ko", self.name)
    }
}

/// `modules.dep` for modules that lie side by side.
pub(crate) fn modules_dep(modules: &[Module]) -> String {
    let needs = modules
        .iter()
        .map(|m| (m.name.as_str(), m))
        .collect::<BTreeMap<_, _>>();
    let mut text = String::new();
    for module in modules {
        // modprobe loads a line from its end to its beginning, so all needs belong on it, the
        // most basic one last.
        let mut all = Vec::new();
        let mut next = module
            .depends
            .iter()
            .collect::<std::collections::VecDeque<_>>();
        while let Some(name) = next.pop_front() {
            let Some(needed) = needs.get(name.as_str()) else {
                continue;
            };
            all.retain(|n| *n != name);
            all.push(name);
            next.extend(&needed.depends);
        }
        let all = all.iter().map(|n| format!(" {n}.ko")).collect::<String>();
        text.push_str(&format!("{}:{all}\n", module.file()));
    }
    text
}

/// `modules.alias`: the names under which the kernel asks for a module.
pub(crate) fn modules_alias(modules: &[Module]) -> String {
    let lines = modules.iter().flat_map(|module| {
        module
            .aliases
            .iter()
            .map(|alias| format!("alias {alias} {}\n", module.name))
    });
    lines.collect()
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `…/virtio-rng.ko.xz` → `virtio_rng`, the name by which the kernel knows it.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    Some(normal(
        name.strip_suffix(".xz")
            .unwrap_or(name)
            .strip_suffix(".ko")?,
    ))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(info: &str) -> Vec<u8> {
        format!("\x7fELF..\0license=GPL\0{info}\0\0trailer").into_bytes()
    }

    /// A package with `a → b, c-c`, `b → d`, `c-c → d`, and `e` built in.
    fn package() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("lib/modules/6.1.0-1-amd64");
        fs::create_dir_all(kernel.join("kernel/drivers")).unwrap();
        fs::write(kernel.join("modules.builtin"), "kernel/fs/e.ko\n").unwrap();
        for (path, info) in [
            (
                "kernel/a.ko",
                "depends=b,c-c,e\0alias=virtio:d1v*\0alias=fs-a",
            ),
            ("kernel/drivers/b.ko", "depends=d"),
            ("kernel/drivers/c-c.ko", "depends=d"),
            ("kernel/d.ko", "depends="),
            ("kernel/f.ko", "depends=nowhere"),
        ] {
            fs::write(kernel.join(path), module(info)).unwrap();
        }
        directory
    }

    #[test]
    fn every_module_comes_after_what_it_needs() {
        let package = package();
        let tree = ModuleTree::open(package.path()).unwrap();
        assert_eq!(tree.release, "6.1.0-1-amd64");
        let names = |wanted: &[&str]| -> Vec<String> {
            tree.closure(wanted)
                .unwrap()
                .into_iter()
                .map(|m| m.name)
                .collect()
        };
        assert_eq!(names(&["a"]), ["d", "b", "c_c", "a"]);
        assert_eq!(names(&["c_c", "b", "c_c"]), ["d", "c_c", "b"]);
        assert_eq!(names(&["e"]), [""; 0], "built in");
    }

    #[test]
    fn a_module_that_is_nowhere_is_named() {
        let package = package();
        let tree = ModuleTree::open(package.path()).unwrap();
        assert!(!tree.has("nowhere"));
        let refusal = tree.closure(&["f"]).unwrap_err().to_string();
        assert_eq!(refusal, "kernel 6.1.0-1-amd64 has no module nowhere");
    }

    #[test]
    fn modprobe_is_told_all_needs_most_basic_last() {
        let package = package();
        let modules = ModuleTree::open(package.path())
            .unwrap()
            .closure(&["a"])
            .unwrap();
        let expected = "d.ko:\nb.ko: d.ko\nc_c.ko: d.ko\na.ko: b.ko c_c.ko d.ko\n";
        assert_eq!(modules_dep(&modules), expected);
        assert_eq!(
            modules_alias(&modules),
            "alias virtio:d1v* a\nalias fs-a a\n"
        );
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let package = package();
        let plain = package.path().join("lib/modules/6.1.0-1-amd64/kernel/d.ko");
        let packed = std::process::Command::new("xz")
            .arg("--check=crc32")
            .arg(&plain)
            .status();
        if !packed.is_ok_and(|s| s.success()) {
            println!("SKIPPED compressed_modules_are_unpacked: no xz here");
            return;
        }
        let modules = ModuleTree::open(package.path())
            .unwrap()
            .closure(&["b"])
            .unwrap();
        assert_eq!(modules[0].contents, module("depends="));
    }
}
