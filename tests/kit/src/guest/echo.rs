//! Says what it is told.

use super::asm::{Asm, If, Reg};
use super::{Guest, Mib, SERIAL, print};

/// The offset of the line status register, whose lowest bit says that a byte came in.
const LINE_STATUS: u64 = 5;

/// Prints `>` once, then each byte that comes in on the serial port.
#[derive(Clone, Debug)]
pub struct Echo {
    /// The VM's memory.
    pub memory: Mib,
}

impl Default for Echo {
    fn default() -> Echo {
        Echo { memory: Mib(128) }
    }
}

impl Echo {
    /// The guest.
    pub fn guest(&self) -> Guest {
        let mut asm = Asm::new();
        print(&mut asm, b'>');
        let wait = asm.here();
        asm.set(Reg::Rax, 0);
        asm.set(Reg::Rdx, SERIAL + LINE_STATUS);
        asm.input();
        asm.and_value(Reg::Rax, 1);
        asm.jump_if(If::Equal, wait);
        asm.set(Reg::Rdx, SERIAL);
        asm.input();
        asm.out();
        asm.jump(wait);
        Guest::new("echo", "what comes in", self.memory, asm)
    }
}
