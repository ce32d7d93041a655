//! What a page server gives up before it listens to a stranger.
//!
//! ```text
//!                   all is open        `confine`                    somebody speaks   `hold_only`
//!   no rights       memory, state ────► user, capabilities, files, ─► its pidfd ──────► that one pidfd ─► reads it
//!   from afar       state ────────────►   calls; then threads ──────► its pidfd ──────► that one pidfd ─► reads it
//!   its files       memory, state ────────────────────────────────► its pidfd ──────► all of it ──────► reads it
//! ```
//!
//! Most of it is done while Firecracker starts, so that no restore waits for it. One right remains: to kill the VM, which
//! `CAP_KILL` and a filter make of the one pidfd that there is. A page server that cannot answer a page must be able to, also
//! when nobody else is there.
//!
//! Landlock may be missing in the kernel, and then is; all else has to succeed.

mod filter;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

pub use self::filter::FilterError;
use self::filter::Reach;
use crate::plan::Plan;
use crate::source::Source;

/// The page server of process N is user and group `USERS + N`: no two that live have the same, and there is nothing to be
/// given back. Above the users of jailed VMs, whom it has to be a stranger to; Linux has up to 2²² processes.
const USERS: u32 = 1_904_000_000;
/// How large a file may become that it writes to, in bytes, unless its state takes more.
const LARGEST_FILE: u64 = 64 << 20;
/// How much more a state may take than was reserved: a handshake of many regions.
const SLACK: u64 = 1 << 20;
/// How many threads it may have; it has one, and four where pages come from a disk.
const MOST_THREADS: u64 = 64;
/// What this program knows of Landlock; older kernels do a part of it.
const KNOWN: ABI = ABI::V6;

/// What is looked up on the way to a repository: names, certificates, how many processors there are.
const LOOKED_UP: [&str; 15] = [
    "/etc",
    "/run/systemd/resolve",
    "/run/NetworkManager",
    "/run/resolvconf",
    "/run/nscd",
    "/usr/lib",
    "/usr/share",
    "/usr/local/share/ca-certificates",
    "/lib",
    "/lib64",
    "/proc",
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
    "/dev/urandom",
    "/dev/null",
];
const PROCESSES: &str = "/proc";
/// Where the chunks are that came from a repository, in a state directory.
const CACHE: &str = "cache";
/// Variables that may name a file with a token or certificates begin like this.
const NAME_FILES: [&str; 5] = ["AWS_", "AZURE_", "GOOGLE_", "SSL_CERT_", "CLOUDSDK_"];
/// Where Google's tools keep credentials, under the home directory.
const GOOGLES: &str = ".config/gcloud";

/// The rights that a page server keeps when it begins to serve.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Rights {
    /// Those of the calling process: for a caller that is more than a page server.
    #[default]
    All,
    /// To write the stats and the working set where it was told to. For a process that does nothing else and has one thread.
    ItsFiles,
    /// None but to kill the VM. Stats and what was touched are left for the owner, who calls [`collect`](crate::collect).
    /// For a process that does nothing else and has one thread.
    None,
}

/// What confines a page server, as it said itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// The user that it became; absent if it stayed who it was.
    pub user: Option<u32>,
    /// Whether Landlock keeps it from all files but those that it has open.
    pub landlock: bool,
    /// Whether filters let it make no system calls but those that it needs.
    pub seccomp: bool,
}

/// Why a page server cannot be confined. It serves nobody then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// Rights are each thread's own.
    #[error("a page server with {threads} threads cannot give up its rights")]
    Threads {
        /// How many there are.
        threads: usize,
    },
    /// How many there are is not known.
    #[error("cannot count the page server's threads")]
    Count {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refused to take a right away.
    #[error("cannot give up {right}")]
    Right {
        /// What was to be given up.
        right: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Landlock is there, and refused.
    #[error("cannot use Landlock")]
    Landlock(#[from] RulesetError),
    /// There is no filter.
    #[error(transparent)]
    Filter(#[from] FilterError),
}

fn right(right: &'static str) -> impl FnOnce(Errno) -> SandboxError {
    move |errno| SandboxError::Right {
        right,
        source: errno.into(),
    }
}

/// What a page server still needs of the file system.
#[derive(Debug)]
struct Files {
    /// Directories in which it makes, replaces and removes files.
    written: Vec<PathBuf>,
    /// What it reads.
    read: Vec<PathBuf>,
}

impl Files {
    fn of(plan: &Plan, rights: Rights) -> Files {
        let mut files = Files {
            written: Vec::new(),
            read: Vec::new(),
        };
        if rights == Rights::ItsFiles {
            let made = plan.stats.iter().chain(&plan.record);
            files
                .written
                .extend(made.filter_map(|path| path.parent()).map(Path::to_owned));
        }
        if rights == Rights::None {
            // To find out who speaks; after that nothing can be opened.
            files.read.push(PROCESSES.into());
        }
        if let Source::Packed(packed) = &plan.source {
            let cache = packed.root.as_ref().map(|root| root.join(CACHE));
            files.written.extend(cache);
            let place = packed.place.strip_prefix("file://").map(PathBuf::from);
            files.read.push(packed.outline.clone());
            files.read.extend(place);
            files
                .read
                .extend(LOOKED_UP.iter().map(PathBuf::from).chain(named()));
        }
        files
    }
}

/// The way from all rights to what is left of them.
#[derive(Debug)]
pub(crate) struct Sandbox {
    rights: Rights,
    files: Files,
    /// Whether the memory comes from a repository, which takes threads, and mostly the network.
    far: bool,
    /// The user that it has become.
    user: Option<u32>,
    /// Whether Landlock is in force.
    landlock: bool,
}

impl Sandbox {
    /// For a page server that was told this.
    pub(crate) fn new(rights: Rights, plan: &Plan) -> Sandbox {
        Sandbox {
            rights,
            files: Files::of(plan, rights),
            far: matches!(plan.source, Source::Packed(_)),
            user: None,
            landlock: false,
        }
    }

    pub(crate) fn rights(&self) -> Rights {
        self.rights
    }

    /// Whether all but the last is given up before somebody connects: nothing is made under a name from then on.
    pub(crate) fn is_early(&self) -> bool {
        match self.rights {
            Rights::All => false,
            Rights::ItsFiles => self.far,
            Rights::None => true,
        }
    }

    /// Whether the memory has to be opened after that, since threads do it.
    pub(crate) fn is_far(&self) -> bool {
        self.far && self.is_early()
    }

    /// Gives up all that is not needed to find out who speaks. The state has that many bytes.
    pub(crate) fn confine(&mut self, state_bytes: u64) -> Result<(), SandboxError> {
        let Some(reach) = self.reach() else {
            return Ok(());
        };
        alone()?;
        limit(self.rights, reach, state_bytes)?;
        self.credentials(reach)?;
        self.landlock = self.lock(reach)?;
        Ok(filter::install(reach)?)
    }

    /// Gives up the rest: `vm` is a hold on the only process that may be killed.
    pub(crate) fn hold_only(&self, vm: impl AsFd) -> Result<Option<Confinement>, SandboxError> {
        let Some(reach) = self.reach() else {
            return Ok(None);
        };
        if self.user.is_some() {
            keep(CapabilitySet::KILL)?;
        }
        filter::install_last(reach, vm.as_fd().as_raw_fd())?;
        Ok(Some(Confinement {
            user: self.user,
            landlock: self.landlock,
            seccomp: true,
        }))
    }

    fn reach(&self) -> Option<Reach> {
        match (self.rights, self.far) {
            (Rights::All, _) => None,
            (_, true) => Some(Reach::Network),
            (Rights::ItsFiles, false) => Some(Reach::Files),
            (Rights::None, false) => Some(Reach::Nothing),
        }
    }

    /// Becomes a user of its own, if it has nothing to do as the one that it is, and gives up all capabilities but those that
    /// are needed.
    fn credentials(&mut self, reach: Reach) -> Result<(), SandboxError> {
        rustix::thread::set_no_new_privs(true).map_err(right("new privileges"))?;
        let is_root = rustix::process::geteuid().is_root();
        let mut kept = CapabilitySet::KILL;
        if self.files.written.iter().any(|dir| !is_own(dir)) {
            kept |= CapabilitySet::DAC_OVERRIDE;
        }
        if is_root && reach == Reach::Nothing {
            self.user = become_user(USERS + std::process::id())?;
            // To look who speaks, on a host that hides processes.
            kept |= CapabilitySet::SYS_PTRACE;
        }
        rustix::thread::clear_ambient_capability_set().map_err(right("ambient capabilities"))?;
        keep(kept)?;
        if is_root {
            // Another user's owner could not look who serves any more.
            let hidden = DumpableBehavior::NotDumpable;
            rustix::process::set_dumpable_behavior(hidden).map_err(right("being looked into"))?;
        }
        Ok(())
    }

    /// Closes the file system, and the network unless the memory comes from there. Tells whether the kernel can.
    fn lock(&self, reach: Reach) -> Result<bool, SandboxError> {
        let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
        let written = read
            | AccessFs::WriteFile
            | AccessFs::Truncate
            | AccessFs::MakeReg
            | AccessFs::MakeDir
            | AccessFs::RemoveFile
            | AccessFs::RemoveDir
            | AccessFs::Refer;
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(KNOWN))?
            // Not signals: one is needed.
            .scope(Scope::AbstractUnixSocket)?;
        if reach < Reach::Network {
            rules = rules.handle_access(AccessNet::from_all(KNOWN))?;
        }
        let status = rules
            .create()?
            .add_rules(path_beneath_rules(&self.files.written, written))?
            .add_rules(path_beneath_rules(&self.files.read, read))?
            .restrict_self()?;
        Ok(status.ruleset != RulesetStatus::NotEnforced)
    }
}

/// Whether the kernel has Landlock, and it is switched on.
pub fn landlock_works() -> bool {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::ReadFile)
        .is_ok()
}

/// Gives up all capabilities but these, of which it may have none.
fn keep(kept: CapabilitySet) -> Result<(), SandboxError> {
    let sets = rustix::thread::capabilities(None).map_err(right("capabilities"))?;
    let kept = sets.permitted & kept;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(right("capabilities"))
}

/// Keeps the capabilities, which are given up after. Where there is no such user, in a user namespace, it is nobody else.
fn become_user(user: u32) -> Result<Option<u32>, SandboxError> {
    let (uid, gid) = (
        rustix::process::Uid::from_raw(user),
        rustix::process::Gid::from_raw(user),
    );
    match rustix::thread::set_thread_groups(&[]) {
        // A user namespace may forbid it.
        Ok(()) | Err(Errno::PERM) => {}
        Err(errno) => return Err(right("groups")(errno)),
    }
    match rustix::thread::set_thread_res_gid(gid, gid, gid) {
        Err(Errno::INVAL) => return Ok(None),
        other => other.map_err(right("the group"))?,
    }
    rustix::thread::set_keep_capabilities(true).map_err(right("capabilities"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(right("the user"))?;
    rustix::thread::set_keep_capabilities(false).map_err(right("capabilities"))?;
    Ok(Some(user))
}

/// What it may take of the host by writing to what it has open, and by threads.
fn limit(rights: Rights, reach: Reach, state_bytes: u64) -> Result<(), SandboxError> {
    let most = |n| Rlimit {
        current: Some(n),
        maximum: Some(n),
    };
    let set = |resource, n| setrlimit(resource, most(n)).map_err(right("resources"));
    // The guest's memory is nobody's to be found in a file.
    set(Resource::Core, 0)?;
    if rights == Rights::None && reach == Reach::Nothing {
        set(Resource::Fsize, LARGEST_FILE.max(state_bytes + SLACK))?;
        if rustix::process::geteuid().is_root() {
            // Of its own user, which it becomes.
            set(Resource::Nproc, MOST_THREADS)?;
        }
    }
    Ok(())
}

fn alone() -> Result<(), SandboxError> {
    let tasks = std::fs::read_dir("/proc/self/task");
    match tasks.map(Iterator::count) {
        Ok(1) => Ok(()),
        Ok(threads) => Err(SandboxError::Threads { threads }),
        Err(source) => Err(SandboxError::Count { source }),
    }
}

/// Whether a directory can be written to without a right over other users' files.
fn is_own(dir: &Path) -> bool {
    let me = rustix::process::geteuid().as_raw();
    dir.metadata().is_ok_and(|dir| dir.uid() == me)
}

/// Files that the environment names, or that are where programs look for credentials.
fn named() -> Vec<PathBuf> {
    let variables = std::env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        NAME_FILES.iter().any(|start| name.starts_with(start))
    });
    let home = std::env::home_dir().map(|home| home.join(GOOGLES));
    variables
        .map(|(_, value)| PathBuf::from(value))
        .chain(home)
        .filter(|path| path.is_absolute())
        .collect()
}
