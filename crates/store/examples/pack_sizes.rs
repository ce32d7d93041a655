//! Measures what chunks of several sizes, by several codecs, come to, on the memory file of a guest.
//!
//! ```text
//! cargo run --release -p rekindle-store --example pack_sizes MEMORY
//! ```
//!
//! It reads blocks of the file as they lie there, without their pages of zeros, and tells for each size and codec what
//! is left of them, and how fast it is made and undone by one thread.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

const PAGE: usize = 4096;
const SIZES: [usize; 5] = [4, 64, 128, 256, 1024];

type Failure = Box<dyn std::error::Error>;
type Codec = (
    &'static str,
    fn(&[u8]) -> Vec<u8>,
    fn(&[u8], usize) -> Vec<u8>,
);

const CODECS: [Codec; 4] = [
    ("LZ4", lz4_flex::compress, |packed, size| {
        lz4_flex::decompress(packed, size).expect("it was compressed")
    }),
    ("zstd 1", |raw| zstd_at(raw, 1), unzstd),
    ("zstd 3", |raw| zstd_at(raw, 3), unzstd),
    ("zstd 9", |raw| zstd_at(raw, 9), unzstd),
];

fn main() -> Result<(), Failure> {
    let path = std::env::args().nth(1).ok_or("name a memory file")?;
    let memory = File::open(path)?;
    let size = usize::try_from(memory.metadata()?.len())?;
    println!(
        "{:>9} {:>8} {:>9} {:>9} {:>10} {:>10}",
        "chunk", "codec", "of data", "of all", "pack MB/s", "read MB/s"
    );
    for kib in SIZES {
        let (chunks, data) = chunks(&memory, size, kib << 10)?;
        for (name, pack, unpack) in CODECS {
            let begun = Instant::now();
            let packed: Vec<Vec<u8>> = chunks.iter().map(|chunk| pack(chunk)).collect();
            let packing = begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            for (chunk, packed) in chunks.iter().zip(&packed) {
                assert_eq!(unpack(packed, chunk.len()).len(), chunk.len());
            }
            let unpacking = begun.elapsed().as_secs_f64();
            let left: usize = packed.iter().map(Vec::len).sum();
            let rate = |seconds: f64| data as f64 / 1e6 / seconds;
            println!(
                "{kib:>5} KiB {name:>8} {:>9.3} {:>9.3} {:>10.0} {:>10.0}",
                left as f64 / data as f64,
                left as f64 / size as f64,
                rate(packing),
                rate(unpacking)
            );
        }
    }
    Ok(())
}

/// The blocks of a file without their pages of zeros, and how many bytes they have.
fn chunks(memory: &File, size: usize, chunk: usize) -> Result<(Vec<Vec<u8>>, usize), Failure> {
    let mut chunks = Vec::new();
    let mut block = vec![0; chunk];
    for start in (0..size).step_by(chunk) {
        let block = &mut block[..chunk.min(size - start)];
        memory.read_exact_at(block, start as u64)?;
        let pages = block
            .chunks(PAGE)
            .filter(|page| page.iter().any(|&byte| byte != 0));
        let data = pages.collect::<Vec<_>>().concat();
        if !data.is_empty() {
            chunks.push(data);
        }
    }
    let data = chunks.iter().map(Vec::len).sum();
    Ok((chunks, data))
}

fn zstd_at(raw: &[u8], level: i32) -> Vec<u8> {
    zstd::bulk::compress(raw, level).expect("there is memory")
}

fn unzstd(packed: &[u8], size: usize) -> Vec<u8> {
    zstd::bulk::decompress(packed, size).expect("it was compressed")
}
