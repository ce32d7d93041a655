//! Fills memory with numbers that say where they stand and since when, and checks them for ever.
//!
//! ```text
//!   pages     0 1 2 … n-1 0 1 2 … n-1        their class, n = classes
//!   table    [g g g … 0]                     generation of each class; 0: never written, all zeros
//!
//!   fill ── F ──▶ verify every page ── v ──▶ … every k passes: next class gets the next generation ── g ──▶
//!                    └─ wrong: X and the address, halt
//! ```
//!
//! What ought to be in a page follows from the table and its address alone, so a page that is missing,
//! stale, or another one's is found. The last class stays zero: it puts holes between the data.

use std::ops::Range;

use super::asm::{Asm, If, Label, Reg};
use super::{Guest, Mib, PAGE, SERIAL, Ticks, VARIABLES, check, print, stop, wait};

/// Odd, so that different words stay different.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// Prints `F` when it has filled its range, `v` for each pass in which every page was right, `g` when
/// it has written a new generation, `X<address in hex>` and a line end when a word was wrong.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// The VM's memory.
    pub memory: Mib,
    /// The pages to fill.
    pub range: Range<Mib>,
    /// Every so many bytes of a page a word is written: a power of two from 8, the whole page, to 4096.
    pub stride: u32,
    /// Page *i* is of class *i* modulo this number, from 2 to 64. The last class stays zero.
    pub classes: u32,
    /// After so many passes another class is written anew; 0 is never.
    pub passes_per_generation: u32,
    /// How long to wait after each pass, so that a fast processor does not flood the serial port.
    pub pause: Ticks,
}

impl Default for Pattern {
    fn default() -> Pattern {
        Pattern {
            memory: Mib(128),
            range: Mib(32)..Mib(96),
            stride: 2048,
            classes: 8,
            passes_per_generation: 2,
            pause: Ticks(2_000_000),
        }
    }
}

/// The page's address; while its words are visited, the word's.
const WORD: Reg = Reg::Rdi;
const RANGE_END: Reg = Reg::Rsi;
const PAGE_END: Reg = Reg::R15;
/// Points into the table, at the class of the page.
const CLASS: Reg = Reg::R10;
const TABLE_END: Reg = Reg::R11;
/// Points into the table, at the class that was written last.
const NEWEST: Reg = Reg::Rbp;
const GENERATION: Reg = Reg::R8;
const PASSES_LEFT: Reg = Reg::R14;
/// What the page's words are made of.
const SUMMAND: Reg = Reg::Rbx;
const FACTOR: Reg = Reg::Rcx;

impl Pattern {
    /// The word that generation `generation` leaves at `address`.
    pub fn word(address: u64, generation: u32) -> u64 {
        match generation {
            0 => 0,
            _ => (address + (u64::from(generation) << 32)).wrapping_mul(MIX),
        }
    }

    /// # Panics
    /// When a parameter is out of its range.
    pub fn guest(&self) -> Guest {
        check(&self.range, self.memory);
        let stride = self.stride;
        assert!(
            stride.is_power_of_two() && (8..=4096).contains(&stride),
            "{self:?}"
        );
        assert!((2..=64).contains(&self.classes), "{self:?}");

        let mut asm = Asm::new();
        let wrong = asm.label();
        self.fill(&mut asm);
        let verify = asm.here();
        self.pages(&mut asm, |asm| self.verify_page(asm, wrong));
        print(&mut asm, b'v');
        wait(&mut asm, self.pause);
        if self.passes_per_generation > 0 {
            asm.sub_value(PASSES_LEFT, 1);
            asm.jump_if(If::NotEqual, verify);
            self.next_generation(&mut asm);
        }
        asm.jump(verify);
        asm.place(wrong);
        report(&mut asm);
        Guest::new(
            "pattern",
            "F when filled, v for a right pass, g for a generation, X and the address if wrong",
            self.memory,
            asm,
        )
    }

    fn fill(&self, asm: &mut Asm) {
        asm.set(GENERATION, 1);
        asm.set(TABLE_END, self.table_end());
        asm.set(CLASS, VARIABLES);
        let class = asm.here();
        asm.store(CLASS, 0, GENERATION);
        asm.add_value(CLASS, 8);
        asm.cmp(CLASS, TABLE_END);
        asm.jump_if(If::Below, class);
        asm.set(Reg::Rax, 0);
        asm.store(CLASS, -8, Reg::Rax);

        self.pages(asm, |asm| self.write_page(asm));
        asm.set(NEWEST, self.table_end() - 16);
        asm.set(PASSES_LEFT, self.passes_per_generation.into());
        print(asm, b'F');
    }

    fn next_generation(&self, asm: &mut Asm) {
        let zero_class = i32::try_from(self.table_end() - 8).expect("below 2 GiB");
        let found = asm.label();
        asm.set(PASSES_LEFT, self.passes_per_generation.into());
        asm.add_value(GENERATION, 1);
        asm.add_value(NEWEST, 8);
        asm.cmp_value(NEWEST, zero_class);
        asm.jump_if(If::NotEqual, found);
        asm.set(NEWEST, VARIABLES);
        asm.place(found);
        asm.store(NEWEST, 0, GENERATION);
        self.pages(asm, |asm| {
            let other = asm.label();
            asm.cmp(CLASS, NEWEST);
            asm.jump_if(If::NotEqual, other);
            self.write_page(asm);
            asm.place(other);
        });
        print(asm, b'g');
    }

    /// Goes through all pages, each with [`CLASS`], [`PAGE_END`] and what its words are made of.
    fn pages(&self, asm: &mut Asm, visit: impl FnOnce(&mut Asm)) {
        asm.set(WORD, self.range.start.bytes());
        asm.set(RANGE_END, self.range.end.bytes());
        asm.set(CLASS, VARIABLES);
        let page = asm.here();
        asm.copy(PAGE_END, WORD);
        asm.add_value(PAGE_END, i32::try_from(PAGE).expect("it is small"));
        asm.load(SUMMAND, CLASS, 0);
        asm.set(FACTOR, 0);
        let zero = asm.label();
        asm.shift_left(SUMMAND, 32);
        asm.jump_if(If::Equal, zero);
        asm.set(FACTOR, MIX);
        asm.place(zero);

        visit(asm);

        asm.copy(WORD, PAGE_END);
        let same_round = asm.label();
        asm.add_value(CLASS, 8);
        asm.cmp(CLASS, TABLE_END);
        asm.jump_if(If::Below, same_round);
        asm.set(CLASS, VARIABLES);
        asm.place(same_round);
        asm.cmp(WORD, RANGE_END);
        asm.jump_if(If::Below, page);
    }

    /// Leaves a page alone whose class is zero: it shall not even be touched.
    fn write_page(&self, asm: &mut Asm) {
        let end = asm.label();
        asm.cmp_value(FACTOR, 0);
        asm.jump_if(If::Equal, end);
        self.words(asm, |asm| asm.store(WORD, 0, Reg::Rax));
        asm.place(end);
    }

    fn verify_page(&self, asm: &mut Asm, wrong: Label) {
        self.words(asm, |asm| {
            asm.cmp_memory(Reg::Rax, WORD, 0);
            asm.jump_if(If::NotEqual, wrong);
        });
    }

    /// Goes through the words of a page, with what each ought to be in RAX.
    fn words(&self, asm: &mut Asm, visit: impl FnOnce(&mut Asm)) {
        let word = asm.here();
        asm.copy(Reg::Rax, WORD);
        asm.add(Reg::Rax, SUMMAND);
        asm.mul(Reg::Rax, FACTOR);
        visit(asm);
        asm.add_value(WORD, i32::try_from(self.stride).expect("checked before"));
        asm.cmp(WORD, PAGE_END);
        asm.jump_if(If::Below, word);
    }

    fn table_end(&self) -> u64 {
        VARIABLES + 8 * u64::from(self.classes)
    }
}

/// Prints where the wrong word is, and stops.
fn report(asm: &mut Asm) {
    print(asm, b'X');
    asm.copy(Reg::Rbx, WORD);
    asm.set(Reg::Rcx, 8);
    asm.shift_left(Reg::Rbx, 32);
    let digit = asm.here();
    let decimal = asm.label();
    asm.copy(Reg::Rax, Reg::Rbx);
    asm.shift_right(Reg::Rax, 60);
    asm.add_value(Reg::Rax, i32::from(b'0'));
    asm.cmp_value(Reg::Rax, i32::from(b'9') + 1);
    asm.jump_if(If::Below, decimal);
    asm.add_value(Reg::Rax, i32::from(b'a' - b'9') - 1);
    asm.place(decimal);
    asm.set(Reg::Rdx, SERIAL);
    asm.out();
    asm.shift_left(Reg::Rbx, 4);
    asm.sub_value(Reg::Rcx, 1);
    asm.jump_if(If::NotEqual, digit);
    print(asm, b'\n');
    stop(asm);
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    #[test]
    fn a_word_says_where_it_stands_and_since_when() {
        let word = Pattern::word(0x0200_0000, 1);
        assert_ne!(word, Pattern::word(0x0200_0000, 2));
        assert_ne!(word, Pattern::word(0x0200_1000, 1));
        assert_eq!(Pattern::word(0x0200_0000, 0), 0);
    }

    #[test]
    #[should_panic(expected = "classes: 1")]
    fn one_class_is_refused_since_the_last_stays_zero() {
        let pattern = Pattern {
            classes: 1,
            ..Pattern::default()
        };
        pattern.guest();
    }
}
