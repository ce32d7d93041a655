//! The guests of `bench replay`, `bench faults` and `bench clones`, a few dozen bytes of machine code each.
//!
//! ```text
//!   0        16 MiB   17 MiB     from                     to
//!   ├──────────┼────────┼──────────┼────────────────────────┼──────┤
//!    Firecracker  code    gate       the pages that it changes
//!
//!   pass: one byte of every page + 1 ─► print '.' ─► while the gate is shut, wait ─► pass …
//! ```
//!
//! **The gate** makes the first pass after a restore exact. The guest stands before a shut gate when its snapshot is
//! taken: all of its pages are data, and no pass is half done. Then the bench opens the gate in the snapshot's
//! memory file. A restored guest finds it open at its first instruction, and the first `.` is the end of a whole
//! pass that began with the resume.
//!
//! A paravirtual KVM emulates these guests instruction by instruction, so they keep to a few plain ones, and a pass
//! is slow when all its pages are there. What a page costs beyond that is the host's doing.

use anyhow::{Result, ensure};

/// Where the code is loaded and entered.
const ENTRY: u32 = 16 << 20;
/// The byte that holds the guest up while it is zero.
pub(super) const GATE: u32 = 17 << 20;
const PAGE: u32 = 4096;
const MIB: u32 = 1 << 20;

/// `x ← x · FACTOR + STEP` modulo a power of two: gives every number once before any comes again.
const FACTOR: u32 = 25_173;
const STEP: u32 = 13_849;

/// A guest, and what it needs.
#[derive(Debug)]
pub(super) struct Guest {
    /// The VM's memory in MiB.
    pub(super) memory_mib: u32,
    /// How many pages a pass changes.
    pub(super) pages: u32,
    /// The file to boot.
    pub(super) elf: Vec<u8>,
}

/// Changes `pages` pages from 32 MiB on, in order, in a VM with 32 MiB more than that, or as much as is asked for.
pub(super) fn sweep(pages: u32, memory_mib: Option<u32>) -> Guest {
    let from = 32 * MIB;
    let memory_mib = memory_mib.unwrap_or(64 + (pages * PAGE).div_ceil(MIB));
    let mut code = Code::default();
    let pass = code.here();
    code.change_pages(from, pages);
    code.end_of_pass(pass);
    Guest {
        memory_mib,
        pages,
        elf: code.elf(),
    }
}

/// Refuses a number of pages that [`scatter`] cannot walk.
pub(super) fn check_pages(pages: u32) -> Result<()> {
    ensure!(
        pages.is_power_of_two() && (64..=16_384).contains(&pages),
        "--pages is a power of two from 64 to 16384"
    );
    Ok(())
}

/// Changes `pages` pages without neighbours in a range eight times as large, in an order without locality, in a VM
/// with the range in the middle of its memory, or as much memory as is asked for.
///
/// `pages` is a power of two.
pub(super) fn scatter(pages: u32, memory_mib: Option<u32>) -> Guest {
    let range = 8 * pages;
    let from = (range / 2 * PAGE).max(32 * MIB);
    let memory_mib = memory_mib.unwrap_or((2 * from + range * PAGE).div_ceil(MIB));
    let mut code = Code::default();
    let pass = code.here();
    code.with_value(&[0xbb], FACTOR); // mov ebx, FACTOR
    code.put(&[0x31, 0xf6]); // xor esi, esi
    code.with_value(&[0xb9], pages); // mov ecx, pages
    let page = code.here();
    code.put(&[0x48, 0x0f, 0xaf, 0xf3]); // imul rsi, rbx
    code.with_value(&[0x48, 0x81, 0xc6], STEP); // add rsi, STEP
    code.with_value(&[0x48, 0x81, 0xe6], range - 1); // and rsi, range - 1
    code.put(&[0x48, 0x89, 0xf7]); // mov rdi, rsi
    code.put(&[0x48, 0xc1, 0xe7, 12]); // shl rdi, 12
    code.with_value(&[0xfe, 0x87], from); // inc byte [rdi + from]
    code.with_value(&[0x48, 0x81, 0xe9], 1); // sub rcx, 1
    code.back(0x75, page); // jne page
    code.end_of_pass(pass);
    Guest {
        memory_mib,
        pages,
        elf: code.elf(),
    }
}

/// Goes so often through a loop of two instructions, changes `pages` pages from 32 MiB on, prints a dot and halts for ever.
pub(super) fn once(pages: u32, rounds: u32) -> Guest {
    let from = 32 * MIB;
    let mut code = Code::default();
    code.with_value(&[0xb9], rounds); // mov ecx, rounds
    let round = code.here();
    code.with_value(&[0x48, 0x81, 0xe9], 1); // sub rcx, 1
    code.back(0x75, round); // jne round
    code.change_pages(from, pages);
    code.print_dot();
    code.put(&[0xfa]); // cli
    let halt = code.here();
    code.put(&[0xf4]); // hlt
    code.back(0xeb, halt); // jmp halt
    Guest {
        memory_mib: 64 + (pages * PAGE).div_ceil(MIB),
        pages,
        elf: code.elf(),
    }
}

/// Machine code in the making.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn here(&self) -> usize {
        self.0.len()
    }

    fn put(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn with_value(&mut self, bytes: &[u8], value: u32) {
        self.put(bytes);
        self.put(&value.to_le_bytes());
    }

    /// A jump of two bytes to a place before it.
    fn back(&mut self, opcode: u8, to: usize) {
        let distance = u8::try_from(self.here() + 2 - to).expect("code is short");
        assert!(distance <= 128, "a short jump");
        self.put(&[opcode, distance.wrapping_neg()]);
    }

    fn change_pages(&mut self, from: u32, pages: u32) {
        self.with_value(&[0xbf], from); // mov edi, from
        self.with_value(&[0xb9], from + pages * PAGE); // mov ecx, to
        let page = self.here();
        self.put(&[0xfe, 0x07]); // inc byte [rdi]
        self.with_value(&[0x48, 0x81, 0xc7], PAGE); // add rdi, 4096
        self.put(&[0x48, 0x39, 0xcf]); // cmp rdi, rcx
        self.back(0x72, page); // jb page
    }

    fn print_dot(&mut self) {
        self.put(&[0xb0, b'.']); // mov al, '.'
        self.with_value(&[0xba], 0x3f8); // mov edx, the serial port
        self.put(&[0xee]); // out dx, al
    }

    fn end_of_pass(&mut self, pass: usize) {
        self.print_dot();
        self.with_value(&[0xbf], GATE); // mov edi, GATE
        let wait = self.here();
        self.put(&[0x80, 0x3f, 0]); // cmp byte [rdi], 0
        self.back(0x74, wait); // je wait
        self.back(0xeb, pass); // jmp pass
    }

    /// The code in an ELF file of one segment, which is entered in long mode with the first GiB identity-mapped.
    fn elf(self) -> Vec<u8> {
        const HEADERS: u16 = 64 + 56;
        let size = u64::try_from(self.0.len()).expect("code is short");
        let entry = u64::from(ENTRY).to_le_bytes();
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        file.resize(16, 0);
        for half in [2_u16, 62] {
            file.extend(half.to_le_bytes()); // an executable for x86-64
        }
        file.extend(1_u32.to_le_bytes());
        file.extend(entry);
        file.extend(64_u64.to_le_bytes()); // where the segment's header is
        file.extend([0; 12]); // no sections, no flags
        for half in [64_u16, 56, 1, 64, 0, 0] {
            file.extend(half.to_le_bytes()); // sizes and numbers of headers
        }
        file.extend(1_u32.to_le_bytes()); // to be loaded
        file.extend(7_u32.to_le_bytes()); // to read, write and execute
        file.extend(u64::from(HEADERS).to_le_bytes());
        file.extend(entry);
        file.extend(entry);
        file.extend(size.to_le_bytes());
        file.extend(size.to_le_bytes());
        file.extend(8_u64.to_le_bytes()); // alignment
        debug_assert_eq!(file.len(), usize::from(HEADERS));
        file.extend(self.0);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    // GNU objdump decodes the bytes to the instructions beside them.

    #[test]
    fn a_sweep_is_these_instructions() {
        let elf = sweep(3, None).elf;
        let code = [
            0xbf, 0, 0, 0, 2, 0xb9, 0, 0x30, 0, 2, 0xfe, 7, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0x48,
            0x39, 0xcf, 0x72, 0xf2, 0xb0, 0x2e, 0xba, 0xf8, 3, 0, 0, 0xee, 0xbf, 0, 0, 0x10, 1,
            0x80, 0x3f, 0, 0x74, 0xfb, 0xeb, 0xd4,
        ];
        assert_eq!(elf[120..], code);
        assert_eq!(&elf[..4], b"\x7fELF");
    }

    #[test]
    fn what_is_done_once_is_these_instructions() {
        let guest = once(2, 5);
        let code = [
            0xb9, 5, 0, 0, 0, 0x48, 0x81, 0xe9, 1, 0, 0, 0, 0x75, 0xf7, 0xbf, 0, 0, 0, 2, 0xb9, 0,
            0x20, 0, 2, 0xfe, 7, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0x48, 0x39, 0xcf, 0x72, 0xf2,
            0xb0, 0x2e, 0xba, 0xf8, 3, 0, 0, 0xee, 0xfa, 0xf4, 0xeb, 0xfd,
        ];
        assert_eq!(guest.elf[120..], code);
        assert_eq!(guest.memory_mib, 65);
    }

    #[test]
    fn the_guests_fit_into_their_memory() {
        let whole = |guest: Guest| (guest.memory_mib, guest.pages);
        assert_eq!(whole(sweep(49_152, None)), (256, 49_152));
        assert_eq!(whole(scatter(16_384, None)), (1024, 16_384));
        assert_eq!(whole(scatter(512, None)), (80, 512));
        assert_eq!(whole(scatter(512, Some(4096))), (4096, 512));
    }

    #[test]
    fn a_scatter_touches_distinct_pages_and_hardly_any_neighbours() {
        let mut x = 0_u32;
        let order: Vec<u32> = (0..16_384)
            .map(|_| {
                x = x.wrapping_mul(FACTOR).wrapping_add(STEP) % (8 * 16_384);
                x
            })
            .collect();
        assert_eq!(order.iter().collect::<HashSet<_>>().len(), 16_384);
        let neighbours = order.windows(2).filter(|w| w[0].abs_diff(w[1]) == 1);
        assert!(neighbours.count() < 4);
    }
}
