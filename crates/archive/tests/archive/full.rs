//! Disks that are full.

use std::fs;

use rekindle_kit::fixture::SmallDisk;
use rekindle_kit::guest::Mib;
use rekindle_kit::require::requires_root;

use crate::fixture::{Fixture, names};

#[test]
fn a_full_disk_is_one_clear_error_and_no_half_file() {
    if let Err(skipped) = requires_root() {
        println!("SKIPPED a_full_disk_is_one_clear_error_and_no_half_file: {skipped}");
        return;
    }
    let fixture = Fixture::new();
    let disk = SmallDisk::mount(&fixture.path("to"), Mib(1)).unwrap();
    fixture.write("to/big", "older");
    fixture.write("from/big", &"x".repeat(2 << 20));
    let error = fixture.copy("from/big", "to").unwrap_err().to_string();
    assert_eq!(
        error,
        format!("there is no space left for {:?}", fixture.path("to/big"))
    );
    assert_eq!(names(disk.path()), ["big"]);
    assert_eq!(fixture.read("to/big"), "older");

    for number in 0..40 {
        fixture.write(&format!("from/tree/{number}"), &"y".repeat(100_000));
    }
    let error = fixture.copy("from/tree", "to").unwrap_err().to_string();
    assert!(error.starts_with("there is no space left for"), "{error}");
    let whole = names(&fixture.path("to/tree"));
    assert!((1..40).contains(&whole.len()), "{whole:?}");
    for name in whole {
        let length = fs::metadata(fixture.path(&format!("to/tree/{name}")))
            .unwrap()
            .len();
        assert_eq!(length, 100_000, "{name}");
    }
}
