//! Touches its memory once, then rests.

use std::ops::Range;

use super::asm::Asm;
use super::{Guest, Mib, Ticks, check, increment_pages, print, stop, wait};

/// Prints `R`, waits, changes a byte in each page of its range, prints `T`, and halts for ever.
///
/// A snapshot that is taken while it waits gives copies that each touch the range once and then take
/// no processor time.
#[derive(Clone, Debug)]
pub struct Touch {
    /// The VM's memory.
    pub memory: Mib,
    /// The pages to touch.
    pub range: Range<Mib>,
    /// How long to wait before.
    pub pause: Ticks,
}

impl Default for Touch {
    fn default() -> Touch {
        Touch {
            memory: Mib(128),
            range: Mib(32)..Mib(64),
            pause: Ticks(3_000_000_000),
        }
    }
}

impl Touch {
    /// # Panics
    /// When the range is empty, below 32 MiB, or not in the VM's memory.
    pub fn guest(&self) -> Guest {
        check(&self.range, self.memory);
        let mut asm = Asm::new();
        print(&mut asm, b'R');
        wait(&mut asm, self.pause);
        increment_pages(&mut asm, &self.range);
        print(&mut asm, b'T');
        stop(&mut asm);
        Guest::new("touch", "R at once, T when touched", self.memory, asm)
    }
}
