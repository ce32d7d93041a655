//! Which system calls a page server can still make.
//!
//! Three filters, of which the strictest answer counts. One lets through what is needed; to all else the kernel says that it
//! knows no such call (`ENOSYS`), which libraries know how to take: a C library of tomorrow, or an error's way out that
//! nobody tried, must not cost a guest its life. Another ends the process for what nobody needs by mistake and an
//! attacker needs first: programs, other processes, other rights, devices, new ways in or out. The last one, a short one, takes
//! away what was still needed to find out who speaks.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use libc::{c_int, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter_all_threads,
};

use crate::sys::UFFD_OPERATIONS;
use crate::unit::length;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// It cannot be made: of this processor, say.
    #[error("cannot make a filter of system calls")]
    Make(#[from] BackendError),
    /// The kernel would not have it.
    #[error("cannot install a filter of system calls")]
    Install(#[from] seccompiler::Error),
}

/// What is left to a page server beside what it has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    /// Nothing.
    Nothing,
    /// The file system, as far as Landlock and users go.
    Files,
    /// Files and the network.
    Network,
}

/// Reading, writing and waiting on what is open; memory; threads; time; ending.
const ALWAYS: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_flock,
    libc::SYS_fallocate,
    libc::SYS_close,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_recvmsg,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

const FILES: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_ftruncate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_utimensat,
    libc::SYS_umask,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
];

const NETWORK: &[c_long] = &[
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_pipe2,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_pselect6,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_mprotect,
    libc::SYS_mmap,
];

/// Older names of the same, which other processors do not have.
#[cfg(target_arch = "x86_64")]
const OLDER: [&[c_long]; 3] = [
    &[libc::SYS_poll],
    &[
        libc::SYS_open,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_access,
        libc::SYS_readlink,
        libc::SYS_rename,
        libc::SYS_unlink,
        libc::SYS_mkdir,
        libc::SYS_rmdir,
        libc::SYS_link,
        libc::SYS_chmod,
    ],
    &[libc::SYS_epoll_wait, libc::SYS_select],
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: [&[c_long]; 3] = [&[], &[], &[]];
#[cfg(target_arch = "x86_64")]
const OLDER_FIRST: &[c_long] = &[libc::SYS_open];
#[cfg(not(target_arch = "x86_64"))]
const OLDER_FIRST: &[c_long] = &[];

/// What ends the process, whatever it has to reach.
const NEVER: &[c_long] = &[
    // Other programs, other processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    // Other rights.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setrlimit,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Another world around it.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_mount_setattr,
    libc::SYS_mknodat,
    libc::SYS_open_by_handle_at,
    // Large parts of the kernel behind one door.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
];

/// What ends a process that has no business on a network.
const NO_NETWORK: &[c_long] = &[
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
];

/// What it takes to find out who speaks.
const FIRST: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_pidfd_open,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    libc::SYS_capget,
    libc::SYS_capset,
    // The last filter is yet to come.
    libc::SYS_seccomp,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Lets all threads of this process make no other calls from now on, and for ever.
pub(super) fn install(reach: Reach) -> Result<(), FilterError> {
    let ends = filter(
        endings(reach)?,
        SeccompAction::Allow,
        SeccompAction::KillProcess,
    )?;
    let passes = filter(needs(reach)?, unknown(), SeccompAction::Allow)?;
    apply_filter_all_threads(&ends)?;
    apply_filter_all_threads(&passes)?;
    Ok(())
}

/// Takes away what has been done by then; of signals those to another process than `vm`, a pidfd.
pub(super) fn install_last(reach: Reach, vm: c_int) -> Result<(), FilterError> {
    let mut rules = calls(&[FIRST, OLDER_FIRST]);
    for still_needed in needed_by(reach) {
        rules.retain(|call, _| !still_needed.contains(call));
    }
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, constant(vm))?;
    rules.insert(libc::SYS_pidfd_send_signal, vec![rule([other])?]);
    let filter = filter(rules, SeccompAction::Allow, unknown())?;
    Ok(apply_filter_all_threads(&filter)?)
}

fn unknown() -> SeccompAction {
    SeccompAction::Errno(libc::ENOSYS.unsigned_abs())
}

fn filter(
    rules: Rules,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, otherwise, action, ARCH.try_into()?)?.try_into()
}

fn needs(reach: Reach) -> Result<Rules, BackendError> {
    let mut rules = calls(&[FIRST, OLDER_FIRST]);
    rules.append(&mut calls(needed_by(reach)));
    if reach < Reach::Network {
        // No memory becomes a program.
        let data = || is(2, 0, constant(libc::PROT_EXEC));
        rules.insert(libc::SYS_mmap, vec![rule([data()?])?]);
        rules.insert(libc::SYS_mprotect, vec![rule([data()?])?]);
    }
    if reach == Reach::Network {
        // Not to the daemons of this host, which take root at its word. Who looks names up does without them.
        let networks = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
        rules.insert(libc::SYS_socket, any_of(0, networks)?);
    }
    rules.insert(libc::SYS_ioctl, ioctls(reach)?);
    rules.insert(
        libc::SYS_fcntl,
        // Not those that have the kernel send signals.
        any_of(
            1,
            [
                libc::F_GETFL,
                libc::F_SETFL,
                libc::F_GETFD,
                libc::F_SETFD,
                libc::F_DUPFD_CLOEXEC,
            ],
        )?,
    );
    rules.insert(
        libc::SYS_prctl,
        any_of(0, [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS])?,
    );
    rules.insert(libc::SYS_clone, vec![rule([thread()?])?]);
    // `abort` of its own threads.
    let me = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![rule([equals(0, me)?])?]);
    // The last filter says whom.
    let kill = [equals(1, constant(libc::SIGKILL))?, equals(3, 0)?];
    rules.insert(libc::SYS_pidfd_send_signal, vec![rule(kill)?]);
    Ok(rules)
}

/// The calls that are needed for serving, whatever their arguments.
fn needed_by(reach: Reach) -> &'static [&'static [c_long]] {
    static NEEDED: [&[c_long]; 6] = [ALWAYS, OLDER[0], FILES, OLDER[1], NETWORK, OLDER[2]];
    match reach {
        Reach::Nothing => &NEEDED[..2],
        Reach::Files => &NEEDED[..4],
        Reach::Network => &NEEDED,
    }
}

fn endings(reach: Reach) -> Result<Rules, BackendError> {
    let mut rules = calls(&[NEVER]);
    if reach < Reach::Network {
        rules.append(&mut calls(&[NO_NETWORK]));
    }
    if reach == Reach::Nothing {
        rules.insert(libc::SYS_openat, writing(2)?);
        #[cfg(target_arch = "x86_64")]
        {
            rules.insert(libc::SYS_open, writing(1)?);
            rules.append(&mut calls(&[&[libc::SYS_creat]]));
        }
    }
    Ok(rules)
}

fn ioctls(reach: Reach) -> Result<Vec<SeccompRule>, BackendError> {
    let mut rules = Vec::new();
    for operation in UFFD_OPERATIONS {
        rules.push(rule([equals(1, operation.into())?])?);
    }
    if reach == Reach::Network {
        // Not those that have the kernel send signals.
        for operation in [libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX] {
            rules.push(rule([equals(1, operation)?])?);
        }
    }
    Ok(rules)
}

/// Opening in a way that changes something.
fn writing(flags: u8) -> Result<Vec<SeccompRule>, BackendError> {
    let changes = [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TRUNC];
    changes
        .map(|flag| rule([is(flags, constant(flag), constant(flag))?]))
        .into_iter()
        .collect()
}

/// A thread of this process, in the namespaces that it is in.
fn thread() -> Result<SeccompCondition, BackendError> {
    let shared = libc::CLONE_VM | libc::CLONE_THREAD;
    let apart = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    is(0, constant(shared), constant(shared | apart))
}

fn calls(lists: &[&[c_long]]) -> Rules {
    lists
        .iter()
        .flat_map(|list| list.iter().map(|call| (*call, Vec::new())))
        .collect()
}

fn any_of<const N: usize>(
    argument: u8,
    values: [c_int; N],
) -> Result<Vec<SeccompRule>, BackendError> {
    values
        .map(|value| rule([equals(argument, constant(value))?]))
        .into_iter()
        .collect()
}

fn rule(conditions: impl Into<Vec<SeccompCondition>>) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.into())
}

fn equals(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    let (wide, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
    SeccompCondition::new(argument, wide, equal, value)
}

/// Of the bits of `mask`, just those of `value`.
fn is(argument: u8, value: u64, mask: u64) -> Result<SeccompCondition, BackendError> {
    let wide = SeccompCmpArgLen::Dword;
    SeccompCondition::new(argument, wide, SeccompCmpOp::MaskedEq(mask), value)
}

fn constant(value: c_int) -> u64 {
    length(usize::try_from(value.unsigned_abs()).expect("32 bits"))
}
