//! Changes one byte in some pages of a range, in an order without neighbours, the same in every pass.

use super::asm::{Asm, If, Reg};
use super::{Guest, Mib, check, print};

/// How the next page follows from the one before: `x ← x · FACTOR + STEP`, modulo a power of two.
/// A factor that is 1 modulo 4 and an odd step give every number once before any comes again.
const FACTOR: u64 = 25_173;
const STEP: i32 = 13_849;

/// Prints `.` after each pass over its pages.
#[derive(Clone, Debug)]
pub struct Scatter {
    /// The VM's memory.
    pub memory: Mib,
    /// Where the range begins.
    pub from: Mib,
    /// The range has 2 to the power of this many pages.
    pub range_bits: u8,
    /// How many distinct pages of it a pass touches.
    pub pages: u32,
}

impl Default for Scatter {
    fn default() -> Scatter {
        Scatter {
            memory: Mib(1024),
            from: Mib(256),
            range_bits: 17,
            pages: 16_384,
        }
    }
}

impl Scatter {
    /// The pages of one pass in order, counted from the beginning of the range.
    pub fn order(&self) -> impl Iterator<Item = u32> {
        let mask = (1_u64 << self.range_bits) - 1;
        let next = move |x: &u64| Some((x * FACTOR + STEP.unsigned_abs() as u64) & mask);
        let numbers = std::iter::successors(next(&0), next);
        let pages = usize::try_from(self.pages).expect("32 bits fit");
        numbers
            .map(|x| u32::try_from(x).expect("the mask is shorter"))
            .take(pages)
    }

    /// # Panics
    /// When the range is below 32 MiB or not in the VM's memory, or has fewer pages than a pass.
    pub fn guest(&self) -> Guest {
        let range = 1_u64 << self.range_bits;
        check(&(self.from..Mib(self.from.0 + (range >> 8))), self.memory);
        assert!(u64::from(self.pages) <= range, "too many pages: {self:?}");
        let mask = i32::try_from(range - 1).expect("a range that fits the first GiB");
        let from = i32::try_from(self.from.bytes()).expect("in the first GiB");

        let mut asm = Asm::new();
        asm.set(Reg::Rbx, FACTOR);
        let pass = asm.here();
        asm.set(Reg::Rsi, 0);
        asm.set(Reg::Rcx, self.pages.into());
        let page = asm.here();
        asm.mul(Reg::Rsi, Reg::Rbx);
        asm.add_value(Reg::Rsi, STEP);
        asm.and_value(Reg::Rsi, mask);
        asm.copy(Reg::Rdi, Reg::Rsi);
        asm.shift_left(Reg::Rdi, 12);
        asm.increment_byte(Reg::Rdi, from);
        asm.sub_value(Reg::Rcx, 1);
        asm.jump_if(If::NotEqual, page);
        print(&mut asm, b'.');
        asm.jump(pass);
        Guest::new("scatter", "a dot for each pass", self.memory, asm)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::Scatter;

    #[test]
    fn a_pass_touches_distinct_pages_without_neighbours_in_sequence() {
        let order: Vec<u32> = Scatter::default().order().collect();
        let distinct: HashSet<u32> = order.iter().copied().collect();
        assert_eq!(distinct.len(), 16_384);
        assert!(distinct.iter().all(|page| *page < 131_072));
        let neighbours = order.windows(2).filter(|w| w[0].abs_diff(w[1]) == 1);
        assert!(neighbours.count() < 4);
    }

    #[test]
    fn the_whole_range_comes_before_any_page_comes_again() {
        let all = Scatter {
            pages: 131_072,
            ..Scatter::default()
        };
        let distinct: HashSet<u32> = all.order().collect();
        assert_eq!(distinct.len(), 131_072);
    }
}
