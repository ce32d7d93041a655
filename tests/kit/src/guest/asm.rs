//! As much of an x86-64 assembler as the guests need.
//!
//! ```text
//!   calls, one an instruction ──▶ bytes, with holes where a jump goes forward ──▶ finish() fills them
//! ```
//!
//! Kept to instructions that KVM can also emulate, since a paravirtual KVM may run a guest in 64-bit
//! kernel mode no other way. Every operand is 64 bits wide unless the name says otherwise, every jump
//! and displacement takes 32 bits.

/// A general register, numbered as in the encoding.
///
/// The stack pointer is left out: the guests have no stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the registers say it")]
#[repr(u8)]
pub enum Reg {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl Reg {
    fn low(self) -> u8 {
        self as u8 & 7
    }

    fn high(self) -> u8 {
        self as u8 >> 3
    }
}

/// When a jump is taken, after a comparison of unsigned numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
#[repr(u8)]
pub enum If {
    Below = 2,
    AboveOrEqual = 3,
    Equal = 4,
    NotEqual = 5,
}

/// A place in the code, which may be jumped to before it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// The prefix that makes operands 8 bytes wide, or leaves them one byte wide and gives access to the
/// lowest byte of every register.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Width {
    Byte = 0x40,
    Long = 0x48,
}

/// Machine code in the making.
#[derive(Debug, Default)]
pub struct Asm {
    code: Vec<u8>,
    labels: Vec<Option<usize>>,
    /// Where four bytes wait for the distance from their end to a label.
    jumps: Vec<(usize, Label)>,
}

impl Asm {
    /// No code yet.
    pub fn new() -> Asm {
        Asm::default()
    }

    /// A label for a place that comes later.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Lets `label` be this place.
    ///
    /// # Panics
    /// When it is another place already.
    pub fn place(&mut self, label: Label) {
        let place = self.labels[label.0].replace(self.code.len());
        assert_eq!(place, None, "a label is placed once");
    }

    /// A label for this place.
    pub fn here(&mut self) -> Label {
        let label = self.label();
        self.place(label);
        label
    }

    /// `mov to, value`: 5 bytes when the upper half is zero, else 10.
    pub fn set(&mut self, to: Reg, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            if to.high() == 1 {
                self.code.push(0x41);
            }
            self.code.push(0xb8 | to.low());
            self.code.extend(value.to_le_bytes());
        } else {
            self.code.extend([0x48 | to.high(), 0xb8 | to.low()]);
            self.code.extend(value.to_le_bytes());
        }
    }

    /// `mov to, from`.
    pub fn copy(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x89], from, to);
    }

    /// `add to, from`.
    pub fn add(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x01], from, to);
    }

    /// `or to, from`.
    pub fn or(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x09], from, to);
    }

    /// `sub to, from`.
    pub fn sub(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x29], from, to);
    }

    /// `cmp left, right`.
    pub fn cmp(&mut self, left: Reg, right: Reg) {
        self.registers(&[0x39], right, left);
    }

    /// `imul to, by`: the lower half of the product.
    pub fn mul(&mut self, to: Reg, by: Reg) {
        self.registers(&[0x0f, 0xaf], to, by);
    }

    /// `div by`: divides RDX:RAX, leaves the quotient in RAX and the remainder in RDX.
    pub fn div(&mut self, by: Reg) {
        self.code
            .extend([0x48 | by.high(), 0xf7, 0xc0 | 6 << 3 | by.low()]);
    }

    /// `add to, value`.
    pub fn add_value(&mut self, to: Reg, value: i32) {
        self.immediate(0, to, value);
    }

    /// `and to, value`; the value's sign is extended.
    pub fn and_value(&mut self, to: Reg, value: i32) {
        self.immediate(4, to, value);
    }

    /// `sub to, value`.
    pub fn sub_value(&mut self, to: Reg, value: i32) {
        self.immediate(5, to, value);
    }

    /// `cmp left, value`; the value's sign is extended.
    pub fn cmp_value(&mut self, left: Reg, value: i32) {
        self.immediate(7, left, value);
    }

    /// `shl register, bits`.
    pub fn shift_left(&mut self, register: Reg, bits: u8) {
        self.shift(4, register, bits);
    }

    /// `shr register, bits`.
    pub fn shift_right(&mut self, register: Reg, bits: u8) {
        self.shift(5, register, bits);
    }

    /// `mov to, [base + offset]`.
    pub fn load(&mut self, to: Reg, base: Reg, offset: i32) {
        self.memory(Width::Long, 0x8b, to, base, offset);
    }

    /// `mov [base + offset], from`.
    pub fn store(&mut self, base: Reg, offset: i32, from: Reg) {
        self.memory(Width::Long, 0x89, from, base, offset);
    }

    /// `cmp register, [base + offset]`.
    pub fn cmp_memory(&mut self, register: Reg, base: Reg, offset: i32) {
        self.memory(Width::Long, 0x3b, register, base, offset);
    }

    /// `movzx to, byte [base + offset]`.
    pub fn load_byte(&mut self, to: Reg, base: Reg, offset: i32) {
        self.code.extend([
            0x48 | to.high() << 2 | base.high(),
            0x0f,
            0xb6,
            0x80 | to.low() << 3 | base.low(),
        ]);
        self.code.extend(offset.to_le_bytes());
    }

    /// `mov byte [base + offset], from`.
    pub fn store_byte(&mut self, base: Reg, offset: i32, from: Reg) {
        self.memory(Width::Byte, 0x88, from, base, offset);
    }

    /// `inc byte [base + offset]`.
    pub fn increment_byte(&mut self, base: Reg, offset: i32) {
        self.memory(Width::Byte, 0xfe, Reg::Rax, base, offset);
    }

    /// `jmp label`.
    pub fn jump(&mut self, label: Label) {
        self.code.push(0xe9);
        self.distance(label);
    }

    /// `jb`, `jae`, `je` or `jne label`.
    pub fn jump_if(&mut self, condition: If, label: Label) {
        self.code.extend([0x0f, 0x80 | condition as u8]);
        self.distance(label);
    }

    /// `out dx, al`.
    pub fn out(&mut self) {
        self.code.push(0xee);
    }

    /// `in al, dx`.
    pub fn input(&mut self) {
        self.code.push(0xec);
    }

    /// `rdtsc`: the time stamp counter in EDX:EAX.
    pub fn time_stamp(&mut self) {
        self.code.extend([0x0f, 0x31]);
    }

    /// `cli`.
    pub fn disable_interrupts(&mut self) {
        self.code.push(0xfa);
    }

    /// `hlt`.
    pub fn halt(&mut self) {
        self.code.push(0xf4);
    }

    /// The code.
    ///
    /// # Panics
    /// When a jump goes to a label that has no place.
    pub fn finish(mut self) -> Vec<u8> {
        for (hole, label) in self.jumps {
            let target = self.labels[label.0].expect("every label that is jumped to has a place");
            let end = hole + 4;
            let distance = i64::try_from(target).expect("code is short")
                - i64::try_from(end).expect("code is short");
            let distance = i32::try_from(distance).expect("code is short");
            self.code[hole..end].copy_from_slice(&distance.to_le_bytes());
        }
        self.code
    }

    /// An instruction of two registers: `reg` and `rm` are the fields of its last byte.
    fn registers(&mut self, opcode: &[u8], reg: Reg, rm: Reg) {
        self.code.push(0x48 | reg.high() << 2 | rm.high());
        self.code.extend(opcode);
        self.code.push(0xc0 | reg.low() << 3 | rm.low());
    }

    /// An instruction of a register and memory; no base in [`Reg`] needs a SIB byte.
    fn memory(&mut self, width: Width, opcode: u8, reg: Reg, base: Reg, offset: i32) {
        self.code.extend([
            width as u8 | reg.high() << 2 | base.high(),
            opcode,
            0x80 | reg.low() << 3 | base.low(),
        ]);
        self.code.extend(offset.to_le_bytes());
    }

    fn immediate(&mut self, operation: u8, rm: Reg, value: i32) {
        self.code
            .extend([0x48 | rm.high(), 0x81, 0xc0 | operation << 3 | rm.low()]);
        self.code.extend(value.to_le_bytes());
    }

    fn shift(&mut self, operation: u8, rm: Reg, bits: u8) {
        self.code.extend([
            0x48 | rm.high(),
            0xc1,
            0xc0 | operation << 3 | rm.low(),
            bits,
        ]);
    }

    fn distance(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.code.extend([0; 4]);
    }
}

#[cfg(test)]
mod tests {
    use super::{Asm, If, Reg};

    fn code(write: impl FnOnce(&mut Asm)) -> Vec<u8> {
        let mut asm = Asm::new();
        write(&mut asm);
        asm.finish()
    }

    // GNU objdump decodes the expected bytes to the instruction that each method names.

    #[test]
    fn moves_are_encoded_as_the_manual_says() {
        assert_eq!(
            code(|a| a.set(Reg::Rdx, 0x3f8)),
            [0xba, 0xf8, 0x03, 0x00, 0x00]
        );
        assert_eq!(
            code(|a| a.set(Reg::R9, 0x0110_0000)),
            [0x41, 0xb9, 0x00, 0x00, 0x10, 0x01]
        );
        assert_eq!(
            code(|a| a.set(Reg::R13, 0x9e37_79b9_7f4a_7c15)),
            [0x49, 0xbd, 0x15, 0x7c, 0x4a, 0x7f, 0xb9, 0x79, 0x37, 0x9e]
        );
        assert_eq!(code(|a| a.copy(Reg::Rax, Reg::Rdi)), [0x48, 0x89, 0xf8]);
        assert_eq!(code(|a| a.copy(Reg::R15, Reg::Rdi)), [0x49, 0x89, 0xff]);
        assert_eq!(
            code(|a| a.load(Reg::Rbx, Reg::R10, 0)),
            [0x49, 0x8b, 0x9a, 0, 0, 0, 0]
        );
        assert_eq!(
            code(|a| a.store(Reg::Rbp, 8, Reg::R8)),
            [0x4c, 0x89, 0x85, 8, 0, 0, 0]
        );
        assert_eq!(
            code(|a| a.store_byte(Reg::Rdi, 0, Reg::Rdx)),
            [0x40, 0x88, 0x97, 0, 0, 0, 0]
        );
        assert_eq!(
            code(|a| a.load_byte(Reg::Rax, Reg::Rdi, 1)),
            [0x48, 0x0f, 0xb6, 0x87, 1, 0, 0, 0]
        );
    }

    #[test]
    fn arithmetic_is_encoded_as_the_manual_says() {
        assert_eq!(code(|a| a.add(Reg::Rax, Reg::Rbx)), [0x48, 0x01, 0xd8]);
        assert_eq!(code(|a| a.or(Reg::Rax, Reg::Rdx)), [0x48, 0x09, 0xd0]);
        assert_eq!(code(|a| a.sub(Reg::Rax, Reg::R11)), [0x4c, 0x29, 0xd8]);
        assert_eq!(code(|a| a.cmp(Reg::Rdi, Reg::R15)), [0x4c, 0x39, 0xff]);
        assert_eq!(
            code(|a| a.mul(Reg::Rax, Reg::R13)),
            [0x49, 0x0f, 0xaf, 0xc5]
        );
        assert_eq!(code(|a| a.div(Reg::Rcx)), [0x48, 0xf7, 0xf1]);
        assert_eq!(
            code(|a| a.add_value(Reg::Rdi, 0x1000)),
            [0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00]
        );
        assert_eq!(
            code(|a| a.and_value(Reg::Rax, 0x1_ffff)),
            [0x48, 0x81, 0xe0, 0xff, 0xff, 0x01, 0x00]
        );
        assert_eq!(
            code(|a| a.sub_value(Reg::R14, 1)),
            [0x49, 0x81, 0xee, 1, 0, 0, 0]
        );
        assert_eq!(
            code(|a| a.cmp_value(Reg::Rax, 0)),
            [0x48, 0x81, 0xf8, 0, 0, 0, 0]
        );
        assert_eq!(code(|a| a.shift_left(Reg::Rbx, 32)), [0x48, 0xc1, 0xe3, 32]);
        assert_eq!(code(|a| a.shift_right(Reg::R8, 60)), [0x49, 0xc1, 0xe8, 60]);
        assert_eq!(
            code(|a| a.cmp_memory(Reg::Rax, Reg::Rdi, 0)),
            [0x48, 0x3b, 0x87, 0, 0, 0, 0]
        );
        assert_eq!(
            code(|a| a.increment_byte(Reg::Rdi, 0x1000_0000)),
            [0x40, 0xfe, 0x87, 0, 0, 0, 0x10]
        );
    }

    #[test]
    fn jumps_find_their_labels_in_both_directions() {
        let bytes = code(|a| {
            let back = a.here();
            let forward = a.label();
            a.jump(forward);
            a.halt();
            a.place(forward);
            a.jump_if(If::NotEqual, back);
        });
        assert_eq!(
            bytes,
            [0xe9, 1, 0, 0, 0, 0xf4, 0x0f, 0x85, 0xf4, 0xff, 0xff, 0xff]
        );
    }

    #[test]
    fn instructions_without_operands_are_their_opcodes() {
        let bytes = code(|a| {
            a.out();
            a.input();
            a.time_stamp();
            a.disable_interrupts();
            a.halt();
        });
        assert_eq!(bytes, [0xee, 0xec, 0x0f, 0x31, 0xfa, 0xf4]);
    }
}
