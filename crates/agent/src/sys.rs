//! The only unsafe code of the agent: what a child does between its fork and its exec, and ioctls that no library has.
//!
//! Safety model:
//! 1. Between fork and exec only the forking thread exists, and locks that others held stay held for ever. So the
//!    closure makes system calls and nothing else: it takes no lock and allocates nothing; what it needs was made before.
//! 2. A signal is given its default disposition, which refers to no memory, and nobody's handler is lost: the agent has
//!    none.
//! 3. The descriptor that it uses is one of the child's own, put there by the standard library before the closure runs.
//! 4. The number of each ioctl and what it points to are those of the kernel's headers (`linux/random.h`, `linux/fs.h`):
//!    it reads what is passed, of the size that its header says, and writes nothing. On a file that does not know it, it
//!    is an error.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use rustix::ioctl::{IntegerSetter, NoArg, Setter, ioctl, opcode};
use rustix::process::{Gid, Uid};

/// How many bytes are added to the random pool at once.
pub(crate) const SEED_LEN: usize = 64;

/// `struct rand_pool_info`, with room for a seed.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: i32,
    size: i32,
    seed: [u8; SEED_LEN],
}

const RNDADDENTROPY: u32 = opcode::write::<[i32; 2]>(b'R', 3);
const RNDRESEEDCRNG: u32 = opcode::none(b'R', 7);
const FIFREEZE: u32 = opcode::read_write::<i32>(b'X', 119);
const FITHAW: u32 = opcode::read_write::<i32>(b'X', 120);

/// Who a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
}

/// Makes a program the leader of a session of its own, on the terminal that is its standard input if there is one, and
/// gives it its identity.
pub(crate) fn lead(command: &mut Command, on_terminal: bool, identity: Option<Identity>) {
    let before_exec = move || -> io::Result<()> {
        // What the agent keeps for itself where it is the guest's first program.
        SigSet::empty().thread_set_mask()?;
        // A shell that starts the agent in the background has it ignore some of them, and Ctrl-C with them.
        for kind in Signal::iterator() {
            // SAFETY: 2.
            let _ = unsafe { signal(kind, SigHandler::SigDfl) };
        }
        rustix::process::setsid()?;
        if on_terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        if let Some(Identity { uid, gid, groups }) = &identity {
            rustix::thread::set_thread_groups(groups)?;
            rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
            rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
        }
        Ok(())
    };
    // SAFETY: 1, 3: it makes system calls with what is on its stack and in `identity`; an error is a number.
    unsafe { command.pre_exec(before_exec) };
}

/// Adds a seed to the kernel's random pool, every bit of it worth one, and has everything that comes from the pool from
/// now on depend on it. `pool` is `/dev/random` or `/dev/urandom`.
pub(crate) fn add_entropy(pool: &File, seed: [u8; SEED_LEN]) -> io::Result<()> {
    let info = RandPoolInfo {
        entropy_bits: 8 * 64,
        size: 64,
        seed,
    };
    // SAFETY: 4: a header of two integers, the second of which is the length of what follows.
    let add = unsafe { Setter::<RNDADDENTROPY, RandPoolInfo>::new(info) };
    // SAFETY: 4.
    unsafe { ioctl(pool, add) }?;
    // SAFETY: 4: it takes no argument.
    let reseed = unsafe { NoArg::<RNDRESEEDCRNG>::new() };
    // SAFETY: 4.
    Ok(unsafe { ioctl(pool, reseed) }?)
}

/// Has the file system of an open file stand still: what is written waits.
pub(crate) fn freeze(file: &File) -> io::Result<()> {
    // SAFETY: 4: the argument is not looked at.
    let freeze = unsafe { IntegerSetter::<FIFREEZE>::new_usize(0) };
    // SAFETY: 4.
    Ok(unsafe { ioctl(file, freeze) }?)
}

/// Has the file system of an open file go on.
pub(crate) fn thaw(file: &File) -> io::Result<()> {
    // SAFETY: 4: the argument is not looked at.
    let thaw = unsafe { IntegerSetter::<FITHAW>::new_usize(0) };
    // SAFETY: 4.
    Ok(unsafe { ioctl(file, thaw) }?)
}
