//! Output on its way to disk: FIFOs and rings.

use std::fs;
use std::io::Write;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use rekindle_firecracker::{Fifo, FifoError, Ring, drain, drain_rest, tail};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn segment(bytes: u64) -> NonZeroU64 {
    NonZeroU64::new(bytes).expect("not zero")
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

#[test]
fn a_ring_keeps_the_newest_and_never_more_than_two_segments() {
    let place = directory();
    let path = place.path().join("serial");
    let mut ring = Ring::open(&path, segment(10)).expect("opened");
    let mut all = Vec::new();
    for step in 0..200_u8 {
        let piece = vec![b'a' + step % 26; usize::from(step % 7)];
        ring.append(&piece).expect("appended");
        all.extend_from_slice(&piece);
        let (newer, older) = (length(&path), length(&place.path().join("serial.old")));
        assert!(newer <= 10 && older <= 10);
        assert_eq!(ring.written(), all.len() as u64);
        let kept = tail(&path, u64::MAX).expect("read");
        assert!(all.ends_with(&kept));
        assert!(
            kept.len() >= all.len().min(10),
            "{} of {}",
            kept.len(),
            all.len()
        );
        assert_eq!(kept.len() as u64, newer + older);
        for bytes in [0, 1, 5, 10] {
            let last = tail(&path, bytes).expect("read");
            assert_eq!(last.len() as u64, bytes.min(all.len() as u64));
            assert!(all.ends_with(&last));
        }
    }
    assert_eq!(
        fs::metadata(&path).expect("a file").permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn one_append_larger_than_everything_leaves_its_end() {
    let place = directory();
    let path = place.path().join("serial");
    let mut ring = Ring::open(&path, segment(8)).expect("opened");
    ring.append(b"0123456789abcdefghijklmnopqrstuvwxyz")
        .expect("appended");
    assert_eq!(tail(&path, 100).expect("read"), b"opqrstuvwxyz");
    assert_eq!(ring.written(), 36);
}

#[test]
fn a_follower_learns_what_came_and_what_it_missed() {
    let place = directory();
    let mut ring = Ring::open(place.path().join("serial"), segment(8)).expect("opened");
    ring.append(b"hello").expect("appended");
    let seen = ring.written();
    ring.append(b" you").expect("appended");
    assert_eq!(ring.since(seen).expect("read"), (b" you".to_vec(), 0));
    assert_eq!(ring.since(ring.written()).expect("read"), (Vec::new(), 0));
    ring.append(b"0123456789abcdef0123456789")
        .expect("appended");
    let (bytes, missed) = ring.since(seen).expect("read");
    assert!(b" you0123456789abcdef0123456789".ends_with(&bytes));
    assert_eq!(missed + bytes.len() as u64, 30);
    assert!(missed > 0);
}

#[test]
fn a_ring_goes_on_where_it_was_left() {
    let place = directory();
    let path = place.path().join("serial");
    let mut ring = Ring::open(&path, segment(6)).expect("opened");
    ring.append(b"abcdefgh").expect("appended");
    drop(ring);
    let mut ring = Ring::open(&path, segment(6)).expect("opened");
    assert_eq!(ring.written(), 8);
    ring.append(b"ij").expect("appended");
    assert_eq!(tail(&path, 100).expect("read"), b"abcdefghij");
    drop(ring);
    // Killed between the two steps of a rotation: the newer file is missing.
    fs::rename(&path, place.path().join("serial.old")).expect("renamed");
    assert_eq!(tail(&path, 100).expect("read"), b"ghij");
    let mut ring = Ring::open(&path, segment(6)).expect("opened");
    ring.append(b"kl").expect("appended");
    assert_eq!(tail(&path, 100).expect("read"), b"ghijkl");
}

#[test]
fn a_smaller_bound_takes_hold_with_the_next_append() {
    let place = directory();
    let path = place.path().join("serial");
    fs::write(&path, [b'x'; 100]).expect("written");
    let mut ring = Ring::open(&path, segment(4)).expect("opened");
    ring.append(b"yz").expect("appended");
    assert_eq!(fs::read(&path).expect("read"), b"yz");
    assert_eq!(tail(&path, 3).expect("read"), b"xyz");
}

#[test]
fn the_tail_of_nothing_is_nothing() {
    let place = directory();
    assert_eq!(tail(&place.path().join("none"), 100).expect("read"), b"");
}

#[tokio::test]
async fn what_is_written_into_a_fifo_comes_out_on_disk_in_order() {
    let place = directory();
    let fifo = Fifo::open(place.path().join("serial.fifo")).expect("made");
    let mut ring = Ring::open(place.path().join("serial"), segment(8 << 20)).expect("opened");
    let mut writer = fs::File::from(fifo.writer().expect("a writer"));
    let text: Vec<u8> = (0..400_000_u32)
        .flat_map(|number| format!("{number}\n").into_bytes())
        .collect();
    let sent = text.clone();
    let write = tokio::task::spawn_blocking(move || {
        writer.write_all(&sent).expect("written");
        writer
    });
    tokio::pin!(write);
    // Given up and taken up again all the time: nothing may be lost by that.
    let writer = loop {
        tokio::select! {
            writer = &mut write => break writer.expect("no panic"),
            error = drain(&fifo, &mut ring) => panic!("{error}"),
            () = tokio::time::sleep(Duration::from_micros(300)) => {}
        }
    };
    drop(writer);
    while drain_rest(&fifo, &mut ring).expect("moved") > 0 {}
    assert_eq!(ring.written(), text.len() as u64);
    assert!(
        tail(ring.path(), u64::MAX).expect("read") == text,
        "not in order"
    );
}

#[tokio::test]
async fn a_fifo_outlives_its_writers_and_readers() {
    let place = directory();
    let path = place.path().join("serial.fifo");
    let fifo = Fifo::open(&path).expect("made");
    let mut writer = fs::File::from(fifo.writer().expect("a writer"));
    // The reader dies. What is written then waits for the next one; nobody gets an error.
    drop(fifo);
    writer.write_all(b"while nobody read").expect("no EPIPE");
    let fifo = Fifo::open(&path).expect("taken up again");
    let mut ring = Ring::open(place.path().join("serial"), segment(100)).expect("opened");
    assert_eq!(drain_rest(&fifo, &mut ring).expect("moved"), 17);
    // The writer dies. The FIFO waits for another.
    drop(writer);
    let waited = tokio::time::timeout(Duration::from_millis(20), drain(&fifo, &mut ring)).await;
    assert!(waited.is_err(), "{waited:?}");
    assert_eq!(tail(ring.path(), 100).expect("read"), b"while nobody read");
}

#[tokio::test]
async fn a_fifo_keeps_a_mebibyte_and_is_its_owners_alone() {
    let place = directory();
    let path = place.path().join("serial.fifo");
    let fifo = Fifo::open(&path).expect("made");
    let metadata = fs::symlink_metadata(&path).expect("it is there");
    assert!(metadata.file_type().is_fifo());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let writer = fifo.writer().expect("a writer");
    let size = rustix::pipe::fcntl_getpipe_size(&writer).expect("a size");
    assert!(
        size == 1 << 20 || !rustix::process::geteuid().is_root(),
        "{size}"
    );
}

#[tokio::test]
async fn what_is_no_fifo_is_left_as_it_is() {
    let place = directory();
    let file = place.path().join("file");
    fs::write(&file, "precious").expect("written");
    assert!(matches!(Fifo::open(&file), Err(FifoError::NoFifo { .. })));
    let link = place.path().join("link");
    std::os::unix::fs::symlink(&file, &link).expect("linked");
    assert!(matches!(Fifo::open(&link), Err(FifoError::Open { .. })));
    assert_eq!(fs::read_to_string(&file).expect("read"), "precious");
    let nowhere = place.path().join("none").join("fifo");
    assert!(matches!(Fifo::open(&nowhere), Err(FifoError::Make { .. })));
}
