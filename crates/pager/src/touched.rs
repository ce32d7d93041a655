//! What a guest touched, from a page server that may not write it into the working set to the owner, who does.
//!
//! ```text
//!   page server, no rights ──words──► pager.touched ──checked──► owner ──► the snapshot's working set
//! ```
//!
//! Little-endian words: a sign that all is there, written last; the page size and how many pages the memory has; two
//! counts; then so many pairs of page and microsecond, and so many pages that nobody asked for.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rekindle_store::working_set::{Run, Touched, WorkingSetError, merge_into};
use rustix::fs::{Mode, OFlags};

use crate::unit::{index, length};

const MAGIC: u64 = u64::from_le_bytes(*b"RKTOUCH\x01");
/// Words before the pages.
const HEADER: usize = 5;
/// The most that is written or read: a guest that touches 4 million pages in ten seconds.
const MOST_WORDS: usize = 8 << 20;

/// The file beside a state.
pub(crate) fn path(state: &Path) -> PathBuf {
    state.with_extension("touched")
}

/// Writes down what one run saw. More than anybody would read is not written.
pub(crate) fn write(file: &File, page_size: u64, pages: u64, run: &Run) -> io::Result<()> {
    let (faulted, untouched) = (&run.faulted, &run.held_back_untouched);
    let words = HEADER + 2 * faulted.len() + untouched.len();
    if words > MOST_WORDS {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = Vec::with_capacity(8 * words);
    let mut put = |word: u64| bytes.extend(word.to_le_bytes());
    for word in [0, page_size, pages] {
        put(word);
    }
    put(length(faulted.len()));
    put(length(untouched.len()));
    for touched in faulted {
        put(touched.page);
        put(touched.at_us.into());
    }
    untouched.iter().for_each(|page| put(*page));
    file.write_all_at(&bytes, 0)?;
    file.write_all_at(&MAGIC.to_le_bytes(), 0)
}

/// Merges what a page server left, if all of it is there, into the working set; and takes it away. Tells whether there was
/// something.
pub(crate) fn merge(left: &Path, set: &Path) -> Result<bool, WorkingSetError> {
    let Some((page_size, pages, run)) = read(left) else {
        return Ok(false);
    };
    // Before, or what cannot be merged would be tried again and again.
    let _ = std::fs::remove_file(left);
    merge_into(set, page_size, pages, &run)?;
    Ok(true)
}

/// Nothing in it is to be trusted, not even that it is there.
fn read(path: &Path) -> Option<(u64, u64, Run)> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(path, flags, Mode::empty()).ok()?.into();
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(8 * length(MOST_WORDS))
        .read_to_end(&mut bytes)
        .ok()?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Option<(u64, u64, Run)> {
    let (words, []) = bytes.as_chunks() else {
        return None;
    };
    let word = |at: usize| words.get(at).copied().map(u64::from_le_bytes);
    if word(0)? != MAGIC {
        return None;
    }
    let (faulted, untouched) = (word(3)?, word(4)?);
    let most = length(words.len());
    if faulted > most || untouched > most {
        return None;
    }
    let (faulted, untouched) = (index(faulted), index(untouched));
    if words.len() != HEADER + 2 * faulted + untouched {
        return None;
    }
    let (pairs, singles) = words[HEADER..].split_at(2 * faulted);
    let run = Run {
        faulted: pairs
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&[page, at_us]| Touched {
                page: u64::from_le_bytes(page),
                at_us: u32::try_from(u64::from_le_bytes(at_us)).unwrap_or(u32::MAX),
                count: 1,
            })
            .collect(),
        held_back_untouched: singles.iter().copied().map(u64::from_le_bytes).collect(),
    };
    Some((word(1)?, word(2)?, run))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rekindle_store::working_set::read as read_set;

    fn run() -> Run {
        let touched = |page| Touched {
            page,
            at_us: 1024,
            count: 1,
        };
        Run {
            faulted: vec![touched(3), touched(1)],
            held_back_untouched: vec![2],
        }
    }

    fn written(run: &Run) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("pager.state"));
        write(&File::create_new(&path).unwrap(), 4096, 16, run).unwrap();
        (dir, path)
    }

    #[test]
    fn what_was_touched_is_merged_once() {
        let (dir, left) = written(&run());
        assert_eq!(read(&left), Some((4096, 16, run())));
        let set = dir.path().join("set");
        assert!(merge(&left, &set).unwrap());
        assert!(!merge(&left, &set).unwrap());
        let set = read_set(&set).unwrap().unwrap();
        let pages: Vec<u64> = set.touched().iter().map(|touched| touched.page).collect();
        assert_eq!((pages, set.runs()), (vec![1, 3], 1));
    }

    #[test]
    fn a_link_leads_nowhere() {
        let (dir, left) = written(&run());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&left, &link).unwrap();
        assert_eq!(read(&link), None);
    }

    #[test]
    fn what_lies_about_its_pages_is_refused_by_the_set() {
        let mut wrong = run();
        wrong.faulted[0].page = 16;
        let (dir, left) = written(&wrong);
        let error = merge(&left, &dir.path().join("set")).unwrap_err();
        assert!(matches!(
            error,
            WorkingSetError::OutOfRange { page: 16, .. }
        ));
    }

    proptest! {
        #[test]
        fn any_change_is_read_or_refused_and_what_is_read_is_no_longer_than_the_file(
            at in 0_usize..72, to in any::<u8>(), cut in 0_usize..=72,
        ) {
            let (_dir, left) = written(&run());
            let mut bytes = std::fs::read(left).unwrap();
            bytes[at] = to;
            bytes.truncate(cut);
            if let Some((_, _, run)) = parse(&bytes) {
                let words = HEADER + 2 * run.faulted.len() + run.held_back_untouched.len();
                prop_assert_eq!(words * 8, bytes.len());
            }
        }
    }
}
