//! Changes one byte in each page of a range, in order, over and over.

use std::ops::Range;

use super::asm::Asm;
use super::{Guest, Mib, check, increment_pages, print};

/// Prints `.` after each pass over [`Sweep::range`]. Four instructions a page.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// The VM's memory.
    pub memory: Mib,
    /// The pages to change.
    pub range: Range<Mib>,
}

impl Default for Sweep {
    fn default() -> Sweep {
        Sweep {
            memory: Mib(256),
            range: Mib(32)..Mib(224),
        }
    }
}

impl Sweep {
    /// # Panics
    /// When the range is empty, below 32 MiB, or not in the VM's memory.
    pub fn guest(&self) -> Guest {
        check(&self.range, self.memory);
        let mut asm = Asm::new();
        let pass = asm.here();
        increment_pages(&mut asm, &self.range);
        print(&mut asm, b'.');
        asm.jump(pass);
        Guest::new("sweep", "a dot for each pass", self.memory, asm)
    }
}
