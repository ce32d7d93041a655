//! Guests without an operating system: a few dozen instructions each, made here.
//!
//! ```text
//!          0   16 MiB  17 MiB    from ≥ 32 MiB            to ≤ 1 GiB
//!          ├────┼───────┼───────────┼──────────────────────┤
//!   Firecracker  code    the guest's  the range that it
//!    's tables           variables    works on
//! ```
//!
//! They print to the serial port and do what their parameters say, in hardware and on a paravirtual
//! KVM alike, which runs no unmodified Linux. There each instruction is emulated and takes about half
//! a microsecond, so that a guest measures the host's side of things, not its own. None goes beyond
//! the first GiB, which is all that Firecracker maps for it.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

pub mod asm;
mod counter;
mod echo;
mod elf;
mod pattern;
mod scatter;
mod sweep;
mod touch;

pub use counter::Counter;
pub use echo::Echo;
pub use elf::ENTRY;
pub use pattern::Pattern;
pub use scatter::Scatter;
pub use sweep::Sweep;
pub use touch::Touch;

use asm::{Asm, If, Reg};

/// The serial port's data register.
const SERIAL: u64 = 0x3f8;
/// Where the guests keep what no register holds.
const VARIABLES: u64 = 17 << 20;
const PAGE: u64 = 4096;

/// A size or an address in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mib(pub u64);

impl Mib {
    /// The same in bytes.
    pub fn bytes(self) -> u64 {
        self.0 << 20
    }
}

/// Ticks of the guest's time stamp counter, some 2 to 4 thousand million a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticks(pub u64);

/// A guest that is ready to boot.
#[derive(Clone, Debug)]
pub struct Guest {
    name: &'static str,
    prints: &'static str,
    memory: Mib,
    elf: Vec<u8>,
}

impl Guest {
    fn new(name: &'static str, prints: &'static str, memory: Mib, asm: Asm) -> Guest {
        let elf = elf::executable(&asm.finish());
        Guest {
            name,
            prints,
            memory,
            elf,
        }
    }

    /// What it is called.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What it prints, in words.
    pub fn prints(&self) -> &'static str {
        self.prints
    }

    /// How much memory its VM must have.
    pub fn memory(&self) -> Mib {
        self.memory
    }

    /// The file to boot.
    pub fn elf(&self) -> &[u8] {
        &self.elf
    }

    /// Writes the file to boot.
    ///
    /// # Errors
    /// When `path` cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, &self.elf)
    }
}

/// # Panics
/// When the guest could not work on `range`.
fn check(range: &Range<Mib>, memory: Mib) {
    assert!(range.start < range.end, "{range:?} is empty");
    assert!(range.start >= Mib(32), "{range:?} hits the guest itself");
    assert!(range.end <= memory, "{range:?} is more than the VM has");
    assert!(range.end <= Mib(1024), "{range:?} is not mapped in full");
}

/// Prints one byte. Changes RAX and RDX.
fn print(asm: &mut Asm, byte: u8) {
    asm.set(Reg::Rax, byte.into());
    asm.set(Reg::Rdx, SERIAL);
    asm.out();
}

/// Waits until the time stamp counter is `ticks` further, or was set back. Changes RAX, RDX and RSI.
fn wait(asm: &mut Asm, ticks: Ticks) {
    let now = |asm: &mut Asm| {
        asm.time_stamp();
        asm.shift_left(Reg::Rdx, 32);
        asm.or(Reg::Rax, Reg::Rdx);
    };
    now(asm);
    asm.copy(Reg::Rsi, Reg::Rax);
    let again = asm.here();
    now(asm);
    asm.sub(Reg::Rax, Reg::Rsi);
    asm.set(Reg::Rdx, ticks.0);
    asm.cmp(Reg::Rax, Reg::Rdx);
    asm.jump_if(If::Below, again);
}

/// Does nothing ever again, and takes no processor time for it.
fn stop(asm: &mut Asm) {
    asm.disable_interrupts();
    let again = asm.here();
    asm.halt();
    asm.jump(again);
}

/// Adds one to the first byte of each page of `range`. Changes RDI and RCX.
fn increment_pages(asm: &mut Asm, range: &Range<Mib>) {
    asm.set(Reg::Rdi, range.start.bytes());
    asm.set(Reg::Rcx, range.end.bytes());
    let page = asm.here();
    asm.increment_byte(Reg::Rdi, 0);
    asm.add_value(Reg::Rdi, 4096);
    asm.cmp(Reg::Rdi, Reg::Rcx);
    asm.jump_if(If::Below, page);
}

#[cfg(test)]
mod tests {
    use super::{Counter, Mib, Sweep};

    #[test]
    fn a_guest_is_an_elf_file_of_a_few_hundred_bytes() {
        let guest = Counter::default().guest();
        assert!(guest.elf().starts_with(b"\x7fELF"));
        assert!(guest.elf().len() < 1024, "{}", guest.elf().len());
        assert_eq!(guest.memory(), Mib(128));
    }

    #[test]
    #[should_panic(expected = "more than the VM has")]
    fn a_range_beyond_the_memory_is_refused() {
        let sweep = Sweep {
            memory: Mib(128),
            ..Sweep::default()
        };
        sweep.guest();
    }
}
