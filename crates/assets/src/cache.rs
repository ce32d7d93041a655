//! The cache on disk: whole sets of files, each with a record of its hashes.
//!
//! ```text
//! <cache>/lock                       flock: one builder at a time
//! <cache>/<set>/record.json          recipe, origin, sha256 of every file
//! <cache>/<set>/<file>…
//! <cache>/downloads/<name>.part      resumable
//! <cache>/.build-<random>/           in the making, by whoever holds the lock
//! ```
//!
//! A set is built in a directory of its own and renamed into place, so a set that is there is
//! whole. It is used if its recipe is the wanted one and every file still has the recorded hash;
//! anything else is built again. Looking takes no lock.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::hash::Sha256;

const RECORD: &str = "record.json";
const SCRATCH: &str = ".build-";

/// What a set was made from, and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Names everything that decides about the contents but is not a file: scripts, module
    /// lists, the builder's own version.
    pub(crate) recipe: Sha256,
    /// Where the parts came from, for people.
    pub(crate) source: String,
    /// The version of the main part.
    pub(crate) version: String,
    /// Hash of each file.
    pub(crate) files: BTreeMap<String, Sha256>,
}

/// What a builder says about the set that it built.
pub(crate) struct Built {
    pub(crate) source: String,
    pub(crate) version: String,
}

/// A set that is in place and verified.
pub(crate) struct Set {
    pub(crate) directory: PathBuf,
    pub(crate) record: Record,
}

impl Set {
    /// The path of one of the set's files.
    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    /// The recorded and just verified hash of one of the set's files.
    pub(crate) fn hash(&self, file: &str) -> Result<Sha256> {
        let found = self.record.files.get(file).copied();
        found.with_context(|| format!("{} holds no {file}", self.directory.display()))
    }
}

/// Why a set cannot be used as it is.
pub(crate) enum Unusable {
    /// It is not there, or was made by another recipe.
    Absent,
    /// It is there, but not as it was recorded.
    Damaged(anyhow::Error),
}

/// A directory of verified sets.
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where half-finished downloads wait to be resumed.
    pub(crate) fn downloads(&self) -> Result<PathBuf> {
        let path = self.root.join("downloads");
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }

    /// Keeps every other builder out until the returned file is dropped, and removes what one
    /// that was killed has left.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let lock = || -> Result<File> {
            fs::create_dir_all(&self.root)?;
            let file = File::options().create(true).append(true).open(&path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            for entry in fs::read_dir(&self.root)? {
                let entry = entry?;
                if entry
                    .file_name()
                    .as_encoded_bytes()
                    .starts_with(SCRATCH.as_bytes())
                {
                    fs::remove_dir_all(entry.path())?;
                }
            }
            Ok(file)
        };
        lock().with_context(|| format!("cannot lock {}", path.display()))
    }

    /// A directory beside the sets that vanishes unless it is installed. The caller holds the lock.
    pub(crate) fn scratch(&self) -> Result<TempDir> {
        let made = tempfile::Builder::new()
            .prefix(SCRATCH)
            .tempdir_in(&self.root);
        made.with_context(|| format!("cannot create a directory in {}", self.root.display()))
    }

    /// The set of that name, if it was made by `recipe` and every file has its recorded hash.
    pub(crate) fn find(&self, name: &str, recipe: Sha256) -> Result<Set, Unusable> {
        let directory = self.root.join(name);
        let record = match fs::read(directory.join(RECORD)) {
            Ok(bytes) => serde_json::from_slice::<Record>(&bytes)
                .with_context(|| format!("{} is no record", directory.join(RECORD).display()))
                .map_err(Unusable::Damaged)?,
            Err(_) => return Err(Unusable::Absent),
        };
        if record.recipe != recipe {
            return Err(Unusable::Absent);
        }
        let verify = || -> Result<()> {
            for (file, expected) in &record.files {
                let path = directory.join(file);
                let found = Sha256::of_file(&path)?;
                ensure!(
                    found == *expected,
                    "{} was recorded with sha256 {expected} and has {found}",
                    path.display()
                );
            }
            Ok(())
        };
        verify().map_err(Unusable::Damaged)?;
        Ok(Set { directory, record })
    }

    /// Puts what was built into place, in one step.
    pub(crate) fn install(
        &self,
        name: &str,
        recipe: Sha256,
        built: Built,
        scratch: TempDir,
    ) -> Result<Set> {
        let directory = self.root.join(name);
        let install = || -> Result<Record> {
            let record = Record {
                recipe,
                source: built.source,
                version: built.version,
                files: hashes(scratch.path())?,
            };
            fs::write(
                scratch.path().join(RECORD),
                serde_json::to_vec_pretty(&record)?,
            )?;
            // A file that is renamed before its data is on disk can be empty after a power cut;
            // the hash would find it, and it would cost a rebuild. So nothing is synced here.
            let flags = if directory.exists() {
                RenameFlags::EXCHANGE
            } else {
                RenameFlags::NOREPLACE
            };
            renameat_with(CWD, scratch.path(), CWD, &directory, flags)?;
            Ok(record)
        };
        let record =
            install().with_context(|| format!("cannot install {}", directory.display()))?;
        Ok(Set { directory, record })
        // After an exchange `scratch` is the former set, and goes away here; otherwise it is gone.
    }
}

fn hashes(directory: &Path) -> Result<BTreeMap<String, Sha256>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry
            .file_name()
            .into_string()
            .ok()
            .context("a file's name is not UTF-8")?;
        files.insert(name, Sha256::of_file(&entry.path())?);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(cache: &Cache, recipe: Sha256, contents: &str) -> Set {
        let _lock = cache.lock().unwrap();
        let scratch = cache.scratch().unwrap();
        fs::write(scratch.path().join("part"), contents).unwrap();
        let built = Built {
            source: "a test".into(),
            version: "1".into(),
        };
        cache.install("set", recipe, built, scratch).unwrap()
    }

    #[test]
    fn a_set_is_found_until_its_recipe_changes() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().into());
        let (old, new) = (Sha256::of(b"old"), Sha256::of(b"new"));
        assert!(matches!(cache.find("set", old), Err(Unusable::Absent)));
        install(&cache, old, "one");
        let set = cache.find("set", old).ok().unwrap();
        assert_eq!(fs::read_to_string(set.path("part")).unwrap(), "one");
        assert_eq!(set.hash("part").unwrap(), Sha256::of(b"one"));
        assert!(matches!(cache.find("set", new), Err(Unusable::Absent)));
    }

    #[test]
    fn a_changed_file_is_noticed_and_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().into());
        let recipe = Sha256::of(b"recipe");
        let set = install(&cache, recipe, "one");
        fs::write(set.path("part"), "two").unwrap();
        let Err(Unusable::Damaged(why)) = cache.find("set", recipe) else {
            panic!("not noticed")
        };
        assert!(
            format!("{why:#}").contains(&Sha256::of(b"two").to_string()),
            "{why:#}"
        );
        install(&cache, recipe, "three");
        let set = cache.find("set", recipe).ok().unwrap();
        assert_eq!(fs::read_to_string(set.path("part")).unwrap(), "three");
        let names = fs::read_dir(directory.path())
            .unwrap()
            .map(|e| e.unwrap().file_name());
        let mut names = names.collect::<Vec<_>>();
        names.sort();
        assert_eq!(names, ["lock", "set"], "the former set is gone");
    }

    #[test]
    fn what_a_killed_builder_left_is_removed_by_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().into());
        let lock = cache.lock().unwrap();
        let left = cache.scratch().unwrap().keep();
        fs::write(left.join("half"), "x").unwrap();
        drop(lock);
        let _lock = cache.lock().unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn a_set_without_one_of_its_files_is_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().into());
        let recipe = Sha256::of(b"recipe");
        let set = install(&cache, recipe, "one");
        fs::remove_file(set.path("part")).unwrap();
        assert!(matches!(
            cache.find("set", recipe),
            Err(Unusable::Damaged(_))
        ));
    }
}
