//! The guest's memory as Firecracker laid it out: where each page is, in its process and in the memory file.
//!
//! ```text
//!   memory file     0 ──────────── r0.size ──────────────────── file size     MemoryOffset
//!                   │  region 0   │  region 1                  │
//!   Firecracker     base ......    base .......................               HostAddr
//!   pages           0 1 2 3 4 5 6   7 8 9 …                                   PageIndex
//! ```
//!
//! The regions come from a stranger, so [`RegionMap::new`] takes only a layout that covers the memory file
//! exactly once; after that no page can be named that is not there.

use serde::{Deserialize, Serialize};

use crate::unit::{HostAddr, MemoryOffset, PageIndex, PageRun, PageSize};

/// One object of Firecracker's handshake. All fields are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Where it starts in Firecracker.
    pub base: HostAddr,
    /// How long it is.
    pub size: u64,
    /// Where it starts in the memory file.
    pub offset: MemoryOffset,
    /// What it is made of.
    pub page_size: u64,
}

/// Why a layout is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// There is nothing to serve.
    #[error("the list of regions is empty")]
    None,
    /// Neither 4 KiB nor 2 MiB.
    #[error("a page size of {bytes} bytes is not supported, only 4096 and 2097152 are")]
    PageSize {
        /// The size that was asked for.
        bytes: u64,
    },
    /// A VM has one page size.
    #[error("regions with pages of {first} and of {other} bytes are mixed")]
    MixedPageSizes {
        /// The first region's.
        first: u64,
        /// The one that differs.
        other: u64,
    },
    /// A region without a page.
    #[error("the region at {base} is empty")]
    Empty {
        /// Where it is.
        base: HostAddr,
    },
    /// An address, offset or size that splits a page.
    #[error(
        "the region at {base} has a base, size or offset that is no multiple of its pages of {page_size} bytes"
    )]
    Unaligned {
        /// Where it is.
        base: HostAddr,
        /// What it should be a multiple of.
        page_size: u64,
    },
    /// A region that ends beyond the largest address or offset.
    #[error("the region at {base} ends beyond the address space")]
    Overflow {
        /// Where it is.
        base: HostAddr,
    },
    /// Two regions share addresses.
    #[error("the regions at {first} and {second} overlap")]
    AddressesOverlap {
        /// The lower one.
        first: HostAddr,
        /// The higher one.
        second: HostAddr,
    },
    /// The memory file is not covered exactly once.
    #[error("the regions cover the memory file twice or not at all at offset {offset}")]
    FileNotTiled {
        /// Where it goes wrong.
        offset: MemoryOffset,
    },
    /// The regions and the memory file are not of one snapshot.
    #[error("the regions hold {regions} bytes but the memory file {file}")]
    SizeMismatch {
        /// The sum of all regions.
        regions: u64,
        /// The memory file's size.
        file: u64,
    },
}

/// A layout that holds: regions in order of address, disjoint, tiling the memory file.
#[derive(Debug, Clone)]
pub struct RegionMap {
    regions: Vec<Region>,
    page_size: PageSize,
    bytes: u64,
}

impl RegionMap {
    /// Checks a layout against the size of the memory file that is to fill it.
    pub fn new(mut regions: Vec<Region>, memory_file: u64) -> Result<Self, RegionError> {
        let first = regions.first().ok_or(RegionError::None)?;
        let page_size = page_size_of(first)?;
        for region in &regions {
            check_alone(region, page_size)?;
        }
        regions.sort_unstable_by_key(|r| r.offset);
        let mut bytes = 0;
        for region in &regions {
            if region.offset.get() != bytes {
                return Err(RegionError::FileNotTiled {
                    offset: MemoryOffset::new(region.offset.get().min(bytes)),
                });
            }
            // Cannot overflow: `check_alone` saw that offset + size does not.
            bytes += region.size;
        }
        if bytes != memory_file {
            return Err(RegionError::SizeMismatch {
                regions: bytes,
                file: memory_file,
            });
        }
        regions.sort_unstable_by_key(|r| r.base);
        for pair in regions.windows(2) {
            if pair[1].base.get() - pair[0].base.get() < pair[0].size {
                return Err(RegionError::AddressesOverlap {
                    first: pair[0].base,
                    second: pair[1].base,
                });
            }
        }
        Ok(Self {
            regions,
            page_size,
            bytes,
        })
    }

    /// The regions, in order of address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// What all of it is made of.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The guest's memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of pages of memory.
    pub fn pages(&self) -> u64 {
        self.bytes / self.page_size.bytes()
    }

    /// Where a page is in the memory file.
    pub fn offset(&self, page: PageIndex) -> MemoryOffset {
        MemoryOffset::new(page.get() * self.page_size.bytes())
    }

    /// The page that holds this address, if it is the guest's memory.
    pub fn page_at(&self, address: HostAddr) -> Option<PageIndex> {
        let region = self.region_at(address)?;
        Some(PageIndex::new(
            (region.offset.get() + (address.get() - region.base.get())) / self.page_size.bytes(),
        ))
    }

    /// Where a run of pages starts in Firecracker, and how many of them follow each other there too.
    ///
    /// `None` if the first page is not of this memory.
    pub fn place(&self, run: PageRun) -> Option<(HostAddr, u64)> {
        let offset = run.first.get().checked_mul(self.page_size.bytes())?;
        let region = self
            .regions
            .iter()
            .find(|r| r.offset.get() <= offset && offset - r.offset.get() < r.size)?;
        let into = offset - region.offset.get();
        let left = (region.size - into) / self.page_size.bytes();
        Some((HostAddr::new(region.base.get() + into), run.count.min(left)))
    }

    /// The pages of an address range, as runs; `None` if any of it is not the guest's memory, or splits a page.
    pub fn runs(&self, start: HostAddr, end: HostAddr) -> Option<Vec<PageRun>> {
        let page = self.page_size.bytes();
        let mut runs = Vec::new();
        let mut at = start.get();
        if at >= end.get() || !at.is_multiple_of(page) || !end.get().is_multiple_of(page) {
            return None;
        }
        while at < end.get() {
            let region = self.region_at(HostAddr::new(at))?;
            let stop = end.get().min(region.base.get() + region.size);
            let first = PageIndex::new((region.offset.get() + (at - region.base.get())) / page);
            runs.push(PageRun {
                first,
                count: (stop - at) / page,
            });
            at = stop;
        }
        Some(runs)
    }

    fn region_at(&self, address: HostAddr) -> Option<&Region> {
        let after = self.regions.partition_point(|r| r.base <= address);
        let region = &self.regions[after.checked_sub(1)?];
        (address.get() - region.base.get() < region.size).then_some(region)
    }
}

fn page_size_of(region: &Region) -> Result<PageSize, RegionError> {
    let bytes = region.page_size;
    PageSize::from_bytes(bytes).ok_or(RegionError::PageSize { bytes })
}

fn check_alone(region: &Region, page_size: PageSize) -> Result<(), RegionError> {
    let &Region {
        base,
        size,
        offset,
        page_size: own,
    } = region;
    let page = page_size.bytes();
    if own != page {
        page_size_of(region)?;
        return Err(RegionError::MixedPageSizes {
            first: page,
            other: own,
        });
    }
    if size == 0 {
        return Err(RegionError::Empty { base });
    }
    if [base.get(), size, offset.get()]
        .iter()
        .any(|n| !n.is_multiple_of(page))
    {
        return Err(RegionError::Unaligned {
            base,
            page_size: page,
        });
    }
    if base.get().checked_add(size).is_none() || offset.get().checked_add(size).is_none() {
        return Err(RegionError::Overflow { base });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn region(base: u64, size: u64, offset: u64) -> Region {
        Region {
            base: HostAddr::new(base),
            size,
            offset: MemoryOffset::new(offset),
            page_size: 4096,
        }
    }

    fn two_regions() -> RegionMap {
        // The second region of the file lies below the first in the address space.
        RegionMap::new(
            vec![
                region(64 * MIB, 4 * MIB, 0),
                region(16 * MIB, 2 * MIB, 4 * MIB),
            ],
            6 * MIB,
        )
        .unwrap()
    }

    #[test]
    fn an_address_and_its_page_lead_to_each_other() {
        let map = two_regions();
        let page = map.page_at(HostAddr::new(16 * MIB + 4096 + 17)).unwrap();
        assert_eq!(page, PageIndex::new(1024 + 1));
        assert_eq!(map.offset(page), MemoryOffset::new(4 * MIB + 4096));
        assert_eq!(
            map.place(PageRun {
                first: page,
                count: 1
            }),
            Some((HostAddr::new(16 * MIB + 4096), 1))
        );
    }

    #[test]
    fn a_run_stops_where_its_region_ends() {
        let map = two_regions();
        let run = PageRun {
            first: PageIndex::new(1022),
            count: 10,
        };
        assert_eq!(
            map.place(run),
            Some((HostAddr::new(68 * MIB - 2 * 4096), 2))
        );
    }

    #[test]
    fn addresses_around_the_regions_are_nobodys() {
        let map = two_regions();
        for address in [0, 16 * MIB - 1, 18 * MIB, 64 * MIB - 1, 68 * MIB, u64::MAX] {
            assert_eq!(map.page_at(HostAddr::new(address)), None, "{address:#x}");
        }
        assert_eq!(
            map.place(PageRun {
                first: PageIndex::new(1536),
                count: 1
            }),
            None
        );
        assert_eq!(
            map.place(PageRun {
                first: PageIndex::new(u64::MAX),
                count: 1
            }),
            None
        );
    }

    #[test]
    fn a_range_over_two_neighbouring_regions_becomes_two_runs() {
        let map = RegionMap::new(
            vec![region(8 * MIB, MIB, MIB), region(9 * MIB, MIB, 0)],
            2 * MIB,
        )
        .unwrap();
        let runs = map
            .runs(HostAddr::new(9 * MIB - 4096), HostAddr::new(9 * MIB + 8192))
            .unwrap();
        assert_eq!(
            runs,
            [
                PageRun {
                    first: PageIndex::new(511),
                    count: 1
                },
                PageRun {
                    first: PageIndex::new(0),
                    count: 2
                }
            ]
        );
    }

    #[test]
    fn a_range_that_leaves_the_memory_or_splits_a_page_is_refused() {
        let map = two_regions();
        for (start, end) in [
            (68 * MIB - 4096, 68 * MIB + 4096),
            (64 * MIB, 64 * MIB),
            (64 * MIB + 4096, 64 * MIB),
            (64 * MIB + 1, 64 * MIB + 4096),
            (64 * MIB, 64 * MIB + 4095),
        ] {
            assert_eq!(
                map.runs(HostAddr::new(start), HostAddr::new(end)),
                None,
                "{start:#x}..{end:#x}"
            );
        }
    }

    #[test]
    fn hostile_layouts_are_refused() {
        use RegionError as E;
        let huge = |base, size, offset| Region {
            page_size: 2 * MIB,
            ..region(base, size, offset)
        };
        let top = u64::MAX - 4095;
        let cases: Vec<(Vec<Region>, u64, E)> = vec![
            (vec![], 0, E::None),
            (
                vec![region(MIB, 0, 0)],
                0,
                E::Empty {
                    base: HostAddr::new(MIB),
                },
            ),
            (
                vec![Region {
                    page_size: 0,
                    ..region(MIB, MIB, 0)
                }],
                MIB,
                E::PageSize { bytes: 0 },
            ),
            (
                vec![Region {
                    page_size: 8192,
                    ..region(MIB, MIB, 0)
                }],
                MIB,
                E::PageSize { bytes: 8192 },
            ),
            (
                vec![region(MIB, MIB, 0), huge(4 * MIB, 2 * MIB, MIB)],
                3 * MIB,
                E::MixedPageSizes {
                    first: 4096,
                    other: 2 * MIB,
                },
            ),
            (
                vec![region(MIB + 1, MIB, 0)],
                MIB,
                E::Unaligned {
                    base: HostAddr::new(MIB + 1),
                    page_size: 4096,
                },
            ),
            (
                vec![huge(3 * MIB, 2 * MIB, 0)],
                2 * MIB,
                E::Unaligned {
                    base: HostAddr::new(3 * MIB),
                    page_size: 2 * MIB,
                },
            ),
            (
                vec![region(top, 8192, 0)],
                8192,
                E::Overflow {
                    base: HostAddr::new(top),
                },
            ),
            (
                vec![region(MIB, 8192, top)],
                8192,
                E::Overflow {
                    base: HostAddr::new(MIB),
                },
            ),
            (
                vec![region(MIB, MIB, 4096)],
                MIB,
                E::FileNotTiled {
                    offset: MemoryOffset::new(0),
                },
            ),
            (
                vec![region(MIB, MIB, 0), region(4 * MIB, MIB, MIB - 4096)],
                2 * MIB,
                E::FileNotTiled {
                    offset: MemoryOffset::new(MIB - 4096),
                },
            ),
            (
                vec![region(4 * MIB, MIB, 0), region(4 * MIB + 4096, MIB, MIB)],
                2 * MIB,
                E::AddressesOverlap {
                    first: HostAddr::new(4 * MIB),
                    second: HostAddr::new(4 * MIB + 4096),
                },
            ),
            (
                vec![region(MIB, MIB, 0)],
                MIB + 4096,
                E::SizeMismatch {
                    regions: MIB,
                    file: MIB + 4096,
                },
            ),
            (
                vec![region(MIB, MIB, 0)],
                MIB - 4096,
                E::SizeMismatch {
                    regions: MIB,
                    file: MIB - 4096,
                },
            ),
        ];
        for (regions, file, expected) in cases {
            let name = format!("{regions:?}");
            assert_eq!(
                RegionMap::new(regions, file).unwrap_err(),
                expected,
                "{name}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_layout_makes_the_arithmetic_fail(
            parts in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()), 0..6),
            file in any::<u64>(),
            probe in any::<u64>(),
        ) {
            let regions = parts.iter().map(|&(base, size, offset, aligned)| {
                let mask = if aligned { !4095 } else { !0 };
                region(base & mask, size & mask, offset & mask)
            });
            if let Ok(map) = RegionMap::new(regions.collect(), file) {
                let _ = map.page_at(HostAddr::new(probe));
                let _ = map.place(PageRun { first: PageIndex::new(probe), count: probe });
                let _ = map.runs(HostAddr::new(probe & !4095), HostAddr::new(file));
            }
        }

        #[test]
        fn every_page_of_a_good_layout_is_found_again(
            sizes in proptest::collection::vec(1u64..64, 1..5),
            gaps in proptest::collection::vec(0u64..64, 5),
        ) {
            let (mut at, mut offset, mut regions) = (MIB, 0, Vec::new());
            for (size, gap) in sizes.iter().zip(&gaps) {
                regions.push(region(at, size * 4096, offset));
                offset += size * 4096;
                at += (size + gap) * 4096;
            }
            let map = RegionMap::new(regions, offset).unwrap();
            for page in 0..map.pages() {
                let (address, _) = map.place(PageRun { first: PageIndex::new(page), count: 1 }).unwrap();
                prop_assert_eq!(map.page_at(address), Some(PageIndex::new(page)));
            }
        }
    }
}
