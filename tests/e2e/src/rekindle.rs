//! The driver: one state directory, and the program that works in it.

use std::collections::HashMap;
use std::fs::DirEntry;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rekindle_kit::fixture::{SmallDisk, TempRoot};
use rekindle_kit::guest::{Guest, Mib};
use rekindle_kit::invariant::Belongings;
use rekindle_kit::processes::{self, Process};
use rekindle_kit::require::{requires_firecracker, requires_kvm, requires_root};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;

use crate::{Listener, SOON, Said, is_drained, program};

/// What begins the names that the host has only once: TAP devices, namespaces, cgroups.
const PREFIX: &str = "rk-e2e";

/// How long what was told to end may take to be gone.
const PARTING: Duration = Duration::from_secs(5);

/// The state directories of the stories that are being told.
static STATES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn states() -> MutexGuard<'static, Vec<PathBuf>> {
    STATES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A state directory of its own, and the program `rekindle` that works in it. What still runs when it is dropped is
/// killed, and its VMs are removed.
#[derive(Debug)]
pub struct Rekindle {
    program: PathBuf,
    firecracker: PathBuf,
    state: PathBuf,
    before: Belongings,
    _disk: Option<SmallDisk>,
    place: TempRoot,
}

/// What a process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Restarts the monitor.
    Keeper,
    /// Owns the VM.
    Monitor,
    /// Runs the guest.
    Firecracker,
    /// Serves page faults.
    Pager,
    /// Anything else: a verb.
    Verb,
}

impl Role {
    /// What a process is for, by its arguments.
    pub fn of(process: &Process) -> Role {
        let words: Vec<&str> = process.command().split(' ').collect();
        match words.get(1) {
            Some(&"monitor") if words.contains(&"--kept") => Role::Monitor,
            Some(&"monitor") => Role::Keeper,
            Some(&"pager") => Role::Pager,
            _ if words.contains(&"--api-sock") => Role::Firecracker,
            _ => Role::Verb,
        }
    }
}

impl Rekindle {
    /// With an empty state directory.
    ///
    /// # Errors
    /// [`rekindle_kit::require::Skipped`] when there is no KVM or no Firecracker; when the program is missing.
    pub fn new() -> anyhow::Result<Rekindle> {
        Rekindle::over(|_| Ok(None))
    }

    /// With a state directory on a file system of so much.
    ///
    /// # Errors
    /// As [`Rekindle::new`], and when this process is not root.
    pub fn on_a_disk_of(size: Mib) -> anyhow::Result<Rekindle> {
        requires_root()?;
        Rekindle::over(|state| Ok(Some(SmallDisk::mount(state, size)?)))
    }

    fn over(
        prepare: impl FnOnce(&Path) -> anyhow::Result<Option<SmallDisk>>,
    ) -> anyhow::Result<Rekindle> {
        let firecracker = requires_firecracker()?;
        requires_kvm()?;
        let program = program::find()?;
        let place = TempRoot::new()?;
        let state = place.directory("state")?;
        let disk = prepare(&state)?;
        states().push(state.clone());
        let mut rekindle = Rekindle {
            program,
            firecracker,
            before: Belongings::of(&state, PREFIX)?,
            state,
            _disk: disk,
            place,
        };
        // The first command makes the directories.
        rekindle.does("ps")?;
        rekindle.before = Belongings::of(&rekindle.state, PREFIX)?;
        Ok(rekindle)
    }

    /// What the story has put into the state directory by now may stay there.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub fn takes_for_granted(&mut self) -> anyhow::Result<()> {
        self.before = Belongings::of(&self.state, PREFIX)?;
        Ok(())
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Firecracker.
    pub fn firecracker(&self) -> &Path {
        &self.firecracker
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// A path for a story's own files, outside the state directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// A VM's directory.
    pub fn vm(&self, name: &str) -> PathBuf {
        self.state.join("vms").join(name)
    }

    /// A command of the program, not yet started. Its arguments are the words of `line`.
    pub fn command(&self, line: &str) -> Command {
        self.command_of(line.split_whitespace())
    }

    /// A command with these arguments.
    pub fn command_of<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = self.with_environment(Command::new(&self.program));
        command.args(words);
        command
    }

    /// Another program, in the environment in which the program works here.
    pub fn other(&self, program: &str) -> Command {
        self.with_environment(Command::new(program))
    }

    fn with_environment(&self, mut command: Command) -> Command {
        // By the environment, so that each process of a VM names its root.
        command
            .env("REKINDLE_ROOT", &self.state)
            .env("REKINDLE_FIRECRACKER", &self.firecracker)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end, whatever that is.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn tries(&self, line: &str) -> anyhow::Result<Said> {
        finish(self.command(line), line)
    }

    /// Runs a command that must do what it is told, and returns its output.
    ///
    /// # Errors
    /// When it does not.
    pub fn does(&self, line: &str) -> anyhow::Result<String> {
        self.tries(line)?.done()
    }

    /// Runs a command that must print JSON.
    ///
    /// # Errors
    /// When it does not.
    pub fn tells(&self, line: &str) -> anyhow::Result<Value> {
        self.tries(line)?.json()
    }

    /// Runs a command that must refuse with exit status 1 and one message, which is returned.
    ///
    /// # Errors
    /// When it does otherwise.
    pub fn refuses(&self, line: &str) -> anyhow::Result<String> {
        self.tries(line)?.refused(1)
    }

    /// Starts a command whose output is read as it comes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn listens(&self, line: &str) -> anyhow::Result<Listener> {
        let mut command = self.command(line);
        command.stdout(Stdio::piped());
        Listener::new(command.spawn()?)
    }

    /// Follows what a VM prints, from its beginning.
    ///
    /// # Errors
    /// When it cannot be followed.
    pub fn follows(&self, vm: &str) -> anyhow::Result<Listener> {
        self.listens(&format!("logs -f {vm}"))
    }

    /// What a VM has printed so far.
    ///
    /// # Errors
    /// When there is no such VM.
    pub fn output(&self, vm: &str) -> anyhow::Result<String> {
        self.does(&format!("logs {vm}"))
    }

    /// What a paused VM has printed: all that was under way when it was paused is there.
    ///
    /// # Errors
    /// When there is no such VM, or it goes on printing.
    pub fn last_output(&self, vm: &str) -> anyhow::Result<String> {
        let deadline = Instant::now() + SOON;
        loop {
            let output = self.output(vm)?;
            std::thread::sleep(Duration::from_millis(150));
            if is_drained(&self.vm(vm))? && self.output(vm)? == output {
                return Ok(output);
            }
            ensure!(Instant::now() < deadline, "{vm} goes on: {output:?}");
        }
    }

    /// The state of a VM, in one word.
    ///
    /// # Errors
    /// When there is no such VM.
    pub fn state_of(&self, vm: &str) -> anyhow::Result<String> {
        let record = self.tells(&format!("inspect {vm}"))?;
        let state = record["state"].as_str().context("a state")?;
        Ok(state.to_owned())
    }

    /// The drives of its own that a VM's Firecracker has open.
    ///
    /// # Errors
    /// When anything of another VM's directory is open in it.
    pub fn open_drives(&self, vm: &str) -> anyhow::Result<Vec<String>> {
        let record = self.tells(&format!("inspect {vm}"))?;
        let pid = record["firecracker"]["pid"].as_u64().context("a pid")?;
        let owners = self.own_drives()?;
        let mut drives = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
            // It may be closed meanwhile. A jailed one's path would say nothing out here.
            let Ok(file) = std::fs::metadata(entry?.path()) else {
                continue;
            };
            match owners.get(&(file.dev(), file.ino())) {
                Some((owner, drive)) if owner == vm => drives.push(drive.clone()),
                Some((owner, drive)) => bail!("{vm} has {drive} of {owner} open"),
                None => {}
            }
        }
        drives.sort();
        Ok(drives)
    }

    /// Whose file of its own is which: device and inode, VM, drive.
    fn own_drives(&self) -> anyhow::Result<HashMap<(u64, u64), (String, String)>> {
        let mut owners = HashMap::new();
        let name = |entry: &DirEntry| entry.file_name().to_string_lossy().into_owned();
        for vm in std::fs::read_dir(self.state.join("vms"))? {
            let vm = vm?;
            // One without drives has no such directory.
            for drive in std::fs::read_dir(vm.path().join("disks"))
                .into_iter()
                .flatten()
            {
                let drive = drive?;
                // Of a link, the link itself, which nobody opens.
                let file = drive.metadata()?;
                owners.insert((file.dev(), file.ino()), (name(&vm), name(&drive)));
            }
        }
        Ok(owners)
    }

    /// Writes a bare-metal guest into a file, and returns the options of `run` for it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn guest(&self, guest: &Guest) -> anyhow::Result<String> {
        let path = self.file(guest.name());
        guest.write(&path)?;
        Ok(format!(
            "--kernel {} --mem {}",
            path.display(),
            guest.memory().0
        ))
    }

    /// Boots a bare-metal guest, which goes on when this returns.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn boots(&self, name: &str, guest: &Guest) -> anyhow::Result<()> {
        let guest = self.guest(guest)?;
        self.does(&format!(
            "run {guest} --track-dirty-pages --name {name} --detach"
        ))?;
        Ok(())
    }

    /// The processes that work for this state directory, this test apart.
    ///
    /// # Errors
    /// When they cannot be found.
    pub fn processes(&self) -> anyhow::Result<Vec<(Role, Process)>> {
        let found = processes::naming(&self.state)?;
        Ok(found
            .into_iter()
            .map(|process| (Role::of(&process), process))
            .collect())
    }

    /// One of these processes that has this role.
    ///
    /// # Errors
    /// When there is none.
    pub fn one(&self, role: Role) -> anyhow::Result<Process> {
        let mut all = self.processes()?.into_iter();
        let found = all.find(|(its, _)| *its == role);
        Ok(found.with_context(|| format!("no {role:?}"))?.1)
    }

    /// The VMs, as `ps` tells them.
    ///
    /// # Errors
    /// When it tells none.
    pub fn vms(&self) -> anyhow::Result<Vec<Value>> {
        match self.tells("ps --json")? {
            Value::Array(vms) => Ok(vms),
            other => bail!("ps told {other}"),
        }
    }

    /// Removes all VMs and snapshots, and checks that nothing of them is left.
    ///
    /// # Errors
    /// When one cannot be removed.
    ///
    /// # Panics
    /// When something is left, naming each thing.
    pub fn leaves_nothing(&self) -> anyhow::Result<()> {
        for vm in self.vms()? {
            let name = vm["name"].as_str().context("a name")?;
            self.does(&format!("rm --force {name}"))?;
        }
        self.removes_snapshots()?;
        self.before.assert_same_within(PARTING);
        let groups = self.control_groups()?;
        ensure!(groups.is_empty(), "leaked: {groups:?}");
        Ok(())
    }

    /// The directories of this state directory's control groups.
    ///
    /// # Errors
    /// When the host does not tell what it mounts.
    pub fn control_groups(&self) -> anyhow::Result<Vec<PathBuf>> {
        let Ok(installation) = std::fs::read_link(self.state.join("installation")) else {
            return Ok(Vec::new());
        };
        let name = format!("rekindle-{}", installation.display());
        let mounts = std::fs::read_to_string("/proc/self/mounts")?;
        let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let groups = places.map(|place| Path::new(place).join(&name));
        Ok(groups
            .filter(|group| group.starts_with("/sys/fs/cgroup") && group.exists())
            .collect())
    }

    /// Newest first: what builds on another goes before it.
    fn removes_snapshots(&self) -> anyhow::Result<()> {
        loop {
            let listed = self.tells("snapshot ls --json")?;
            let ids: Vec<&str> = listed
                .as_array()
                .context("a list")?
                .iter()
                .filter_map(|row| row["id"].as_str())
                .collect();
            if ids.is_empty() {
                return Ok(());
            }
            let mut refusals = Vec::new();
            for id in &ids {
                refusals.extend(self.tries(&format!("snapshot rm {id}"))?.done().err());
            }
            ensure!(
                refusals.len() < ids.len(),
                "no snapshot can be removed: {refusals:?}"
            );
        }
    }
}

impl Drop for Rekindle {
    fn drop(&mut self) {
        end_all_in(&self.state);
        states().retain(|state| *state != self.state);
    }
}

/// Kills what runs for the stories that are being told: for one that is not over in time.
pub fn end_all() {
    let states = states().clone();
    states.iter().for_each(|state| end_all_in(state));
}

fn end_all_in(state: &Path) {
    // Twice: a keeper may have started another monitor between the look and the kill.
    for _ in 0..2 {
        for process in processes::naming(state).unwrap_or_default() {
            // It may have ended by itself.
            let _ = process.kill(PARTING);
        }
    }
    remove_all_in(state);
}

/// Removes the VMs of a story that did not come to its end, whose networks and control groups would outlive the state
/// directory.
fn remove_all_in(state: &Path) {
    let vms = std::fs::read_dir(state.join("vms")).into_iter().flatten();
    let names: Vec<_> = vms.flatten().map(|vm| vm.file_name()).collect();
    if names.is_empty() {
        return;
    }
    let Ok(program) = program::find() else {
        return;
    };
    let mut rm = Command::new(program);
    rm.env("REKINDLE_ROOT", state).args(["rm", "--force"]);
    match rm.args(names).output() {
        Ok(output) if output.status.success() => {}
        other => eprintln!("{}: not removed: {other:?}", state.display()),
    }
}

/// Runs a command to its end.
///
/// # Errors
/// When it cannot be started.
pub fn finish(mut command: Command, line: &str) -> anyhow::Result<Said> {
    let output = command
        .output()
        .with_context(|| format!("start {command:?}"))?;
    Ok(Said::new(line.to_owned(), &output))
}

/// Waits for a child, and kills it when it has not ended in time.
///
/// # Errors
/// When it had to be killed.
pub fn wait_for(child: &mut Child, within: Duration) -> anyhow::Result<ExitStatus> {
    if let Some(status) = child.try_wait()? {
        return Ok(status);
    }
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let timeout = Timespec::try_from(within)?;
    let mut ready = [PollFd::new(&pidfd, PollFlags::IN)];
    if rustix::io::retry_on_intr(|| poll(&mut ready, Some(&timeout)))? == 0 {
        child.kill()?;
        child.wait()?;
        bail!("it had not ended after {within:?}");
    }
    Ok(child.wait()?)
}
