//! The system calls around networks that `rustix` does not offer in a safe form: leaving the host's network, and
//! making TAP devices.
//!
//! # Safety model
//!
//! 1. `unshare` is given `CLONE_NEWNET` and nothing else. It changes to which network the calling thread's later
//!    sockets and children belong; no memory and no descriptor of any thread depends on that.
//! 2. `TUNSETIFF` reads and writes one `struct ifreq`, as `linux/if.h` has it on 64 bits: a name of 16 bytes, and a
//!    union of 24, of which the flags are the first 2. The struct here has that size, and any bytes are valid.
//! 3. `TUNSETPERSIST` takes a number by value and touches no memory.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{self, IntegerSetter, Opcode, Updater, opcode};
use rustix::thread::UnshareFlags;

/// The longest name of a network link.
pub(crate) const NAME: usize = 15;

/// `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; NAME + 1],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == 40);

/// Both are declared for an `int` in `linux/if_tun.h`, whatever they take.
const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
const TUNSETPERSIST: Opcode = opcode::write::<i32>(b'T', 203);
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;

/// Takes the calling thread, and the processes that it starts, into a new network where nothing is.
pub(crate) fn leave_network() -> Result<(), Errno> {
    // SAFETY: rule 1.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Makes a TAP device in the network in which `tun`, an open `/dev/net/tun`, was opened. It stays when `tun` is
/// closed, until its network goes.
pub(crate) fn make_tap(tun: impl AsFd, name: &str) -> Result<(), Errno> {
    attach(&tun, name)?;
    // SAFETY: rule 3.
    let call = unsafe { IntegerSetter::<TUNSETPERSIST>::new_usize(1) };
    // SAFETY: rule 3.
    unsafe { ioctl::ioctl(&tun, call) }
}

/// Opens a TAP device of the network in which the calling thread is, and makes it if it is not there. Its frames are read
/// and written.
#[cfg(test)]
pub(crate) fn open_tap(name: &str) -> std::io::Result<std::fs::File> {
    let tun = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    attach(&tun, name)?;
    Ok(tun)
}

/// Makes the TAP device what is read and written through `tun`, and makes it at all if it is not there.
fn attach(tun: impl AsFd, name: &str) -> Result<(), Errno> {
    let mut request = Request {
        name: [0; NAME + 1],
        flags: IFF_TAP | IFF_NO_PI,
        rest: [0; 22],
    };
    let place = request.name[..NAME].get_mut(..name.len());
    place
        .ok_or(Errno::NAMETOOLONG)?
        .copy_from_slice(name.as_bytes());
    // SAFETY: rule 2.
    let call = unsafe { Updater::<TUNSETIFF, Request>::new(&mut request) };
    // SAFETY: rule 2.
    unsafe { ioctl::ioctl(&tun, call) }
}
