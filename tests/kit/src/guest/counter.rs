//! Counts aloud.

use super::asm::{Asm, If, Reg};
use super::{Guest, Mib, SERIAL, Ticks, VARIABLES, wait};

/// Prints `n=1`, `n=2` and so on, a line each, waiting in between.
///
/// The number is in a register, so that a restored copy counts on from where the snapshot stood.
#[derive(Clone, Debug)]
pub struct Counter {
    /// The VM's memory.
    pub memory: Mib,
    /// How long to wait after each line.
    pub pause: Ticks,
}

impl Default for Counter {
    fn default() -> Counter {
        Counter {
            memory: Mib(128),
            pause: Ticks(20_000_000),
        }
    }
}

impl Counter {
    /// The guest.
    pub fn guest(&self) -> Guest {
        let digits_end = VARIABLES + 32;
        let mut asm = Asm::new();
        asm.set(Reg::Rbx, 0);
        asm.set(Reg::Rcx, 10);
        let line = asm.here();
        asm.add_value(Reg::Rbx, 1);

        // The line is written from its end, and begins at RDI.
        asm.set(Reg::Rdi, digits_end);
        let put = |asm: &mut Asm| {
            asm.sub_value(Reg::Rdi, 1);
            asm.store_byte(Reg::Rdi, 0, Reg::Rdx);
        };
        asm.set(Reg::Rdx, b'\n'.into());
        put(&mut asm);
        asm.copy(Reg::Rax, Reg::Rbx);
        let digit = asm.here();
        asm.set(Reg::Rdx, 0);
        asm.div(Reg::Rcx);
        asm.add_value(Reg::Rdx, i32::from(b'0'));
        put(&mut asm);
        asm.cmp_value(Reg::Rax, 0);
        asm.jump_if(If::NotEqual, digit);
        for byte in [b'=', b'n'] {
            asm.set(Reg::Rdx, byte.into());
            put(&mut asm);
        }

        asm.set(Reg::Rdx, SERIAL);
        let byte = asm.here();
        asm.load_byte(Reg::Rax, Reg::Rdi, 0);
        asm.out();
        asm.add_value(Reg::Rdi, 1);
        asm.cmp_value(Reg::Rdi, i32::try_from(digits_end).expect("below 2 GiB"));
        asm.jump_if(If::NotEqual, byte);
        wait(&mut asm, self.pause);
        asm.jump(line);
        Guest::new("counter", "n=1, n=2, … a line each", self.memory, asm)
    }
}
