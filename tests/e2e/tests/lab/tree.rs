//! Copies of copies that each write, against a model: not one byte may differ, and every file system is sound.
//!
//! ```text
//!   guest   /data/f0 … f5, each a word again and again      host   the same as a map: file ─▶ word, size
//! ```
//!
//! `cargo xtask test` plays a fraction; `cargo xtask soak` sets `REKINDLE_ROUNDS` and `REKINDLE_CLONES`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_kit::dice::{Dice, SEED, setting};
use rekindle_kit::story::Story;

use crate::console::Linux;
use crate::story;

/// `w FILE WORD SIZE` writes, `ok FILE WORD SIZE` complains unless that is what there is.
const WORDS: &str = "w() { yes $2 | head -c $3 > /data/$1; }; \
                     ok() { yes $2 | head -c $3 | cmp -s - /data/$1 || echo bad-$1; }; mkdir /data\n";

/// How many files a guest has at the most.
const FILES: usize = 6;
/// How many copies run beside each other.
const BESIDE: usize = 3;
/// How many snapshots the tree has that copies are made of.
const PARENTS: usize = 5;

pub(crate) fn stories() -> Vec<Story> {
    let limit = |each: u64, n: u64| Duration::from_secs(600 + each * n);
    vec![
        story(
            "a lineage of writes, snapshots and restores loses nothing",
            lineage,
        )
        .within(limit(60, rounds())),
        story("a tree of copies that each write is as its model", tree).within(limit(60, clones())),
    ]
}

fn rounds() -> u64 {
    setting("REKINDLE_ROUNDS", 3)
}

fn clones() -> u64 {
    setting("REKINDLE_CLONES", 2)
}

/// What a guest's files are.
#[derive(Clone, Debug, Default)]
struct Model {
    files: BTreeMap<String, (String, usize)>,
}

impl Model {
    /// Writes some files, anew or over what they were, and removes one now and then.
    fn changes(&mut self, linux: &Linux, vm: &str, dice: &mut Dice) -> anyhow::Result<()> {
        let mut line = String::new();
        for _ in 0..=dice.up_to(3) {
            let file = format!("f{}", dice.up_to(FILES));
            if dice.up_to(6) == 0 && self.files.remove(&file).is_some() {
                line += &format!("rm /data/{file}; ");
                continue;
            }
            let (word, size) = (format!("{vm}{}", dice.up_to(1000)), dice.up_to(100_000));
            line += &format!("w {file} {word} {size}; ");
            self.files.insert(file, (word, size));
        }
        linux.asks(vm, &format!("{line}sync"))?;
        Ok(())
    }

    /// The guest has these files and no others, on its disk.
    fn is_so(&self, linux: &Linux, vm: &str) -> anyhow::Result<()> {
        let mut line = "echo 3 > /proc/sys/vm/drop_caches; ".to_owned();
        for (file, (word, size)) in &self.files {
            line += &format!("ok {file} {word} {size}; ");
        }
        let said = linux.asks(vm, &format!("{line}ls /data"))?;
        let said: Vec<&str> = said.split_whitespace().collect();
        let wanted: Vec<&str> = self.files.keys().map(String::as_str).collect();
        ensure!(said == wanted, "{vm}: {said:?} is not {:?}", self.files);
        Ok(())
    }
}

fn boots(linux: &Linux) -> anyhow::Result<()> {
    linux.boots_with(128, "original", "--disk-size 256M")?;
    linux.types("original", WORDS)
}

/// A copy of the layer, its journal replayed as a mount would, has nothing that `e2fsck` would repair.
fn is_sound(linux: &Linux, layer: &Path) -> anyhow::Result<()> {
    let copy = linux.rekindle.file("checked");
    let steps: [(&str, &[&str], i32); 2] = [
        ("e2fsck", &["-y", "-E", "journal_only"], 1),
        ("e2fsck", &["-f", "-n"], 0),
    ];
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .args([layer, &copy])
        .status()?;
    ensure!(copied.success(), "cannot copy {}", layer.display());
    for (program, arguments, most) in steps {
        let said = Command::new(program)
            .args(arguments)
            .arg(&copy)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .with_context(|| format!("start {program}"))?;
        let sound = said.status.code().is_some_and(|code| code <= most);
        ensure!(sound, "{}: {said:?}", layer.display());
    }
    fs::remove_file(&copy)?;
    Ok(())
}

/// The layer in a snapshot.
fn layer_of(linux: &Linux, snapshot: &str) -> anyhow::Result<std::path::PathBuf> {
    let manifest = linux
        .rekindle
        .tells(&format!("snapshot inspect {snapshot}"))?;
    let id = manifest["id"].as_str().context("an id")?;
    let snapshots = linux.rekindle.state().join("snapshots");
    Ok(snapshots.join(id).join("disks/layer"))
}

fn lineage(linux: &Linux) -> anyhow::Result<()> {
    let rekindle = &linux.rekindle;
    let mut dice = Dice::new();
    let seed = dice.seed();
    let mut model = Model::default();
    boots(linux)?;
    let mut vm = "original".to_owned();
    for round in 1..=rounds() {
        let again = || format!("round {round}, {SEED}={seed}");
        model.changes(linux, &vm, &mut dice).with_context(again)?;
        rekindle.does(&format!("pause {vm}"))?;
        rekindle.does(&format!("snapshot create {vm} --name s{round}"))?;
        rekindle.does(&format!("rm --force {vm}"))?;
        is_sound(linux, &layer_of(linux, &format!("s{round}"))?).with_context(again)?;
        vm = format!("v{round}");
        rekindle.does(&format!("restore s{round} --name {vm}"))?;
        model.is_so(linux, &vm).with_context(again)?;
        if round > 1 {
            rekindle.does(&format!("snapshot rm s{}", round - 1))?;
        }
        told(round, rounds());
    }
    println!("{} rounds on one lineage", rounds());
    Ok(())
}

fn tree(linux: &Linux) -> anyhow::Result<()> {
    let rekindle = &linux.rekindle;
    let mut dice = Dice::new();
    let seed = dice.seed();
    let mut model = Model::default();
    boots(linux)?;
    model.changes(linux, "original", &mut dice)?;
    rekindle.does("snapshot create original --name s0")?;
    rekindle.does("rm --force original")?;
    let mut parents = vec![("s0".to_owned(), model)];
    let mut alive: Vec<(String, Model)> = Vec::new();
    for n in 1..=clones() {
        let again = || format!("clone {n}, {SEED}={seed}");
        let (parent, mut model) = parents[dice.up_to(parents.len())].clone();
        let vm = format!("v{n}");
        rekindle.does(&format!("restore {parent} --name {vm}"))?;
        model.is_so(linux, &vm).with_context(again)?;
        model.changes(linux, &vm, &mut dice).with_context(again)?;
        if parents.len() < PARENTS {
            rekindle.does(&format!("snapshot create {vm} --name s{n}"))?;
            parents.push((format!("s{n}"), model.clone()));
        }
        alive.push((vm, model));
        if alive.len() > BESIDE {
            ends(linux, alive.remove(dice.up_to(alive.len()))).with_context(again)?;
        }
        told(n, clones());
    }
    for left in alive {
        ends(linux, left).with_context(|| format!("at the end, {SEED}={seed}"))?;
    }
    println!("{} copies in one tree", clones());
    Ok(())
}

/// Says how far a long run is.
fn told(done: u64, all: u64) {
    if done.is_multiple_of(5) && done < all {
        println!("{done} of {all}");
    }
}

/// A copy that others wrote beside is still as its model, and sound when it is gone.
fn ends(linux: &Linux, (vm, model): (String, Model)) -> anyhow::Result<()> {
    model.is_so(linux, &vm)?;
    linux.rekindle.does(&format!("pause {vm}"))?;
    is_sound(linux, &linux.rekindle.vm(&vm).join("disks/layer"))?;
    linux.rekindle.does(&format!("rm --force {vm}"))?;
    Ok(())
}
