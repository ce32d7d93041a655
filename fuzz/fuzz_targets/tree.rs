//! Streams of files and trees, unpacked. Whatever comes, nothing outside of the destination is touched.

#![no_main]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libfuzzer_sys::fuzz_target;
use rekindle_archive::{Owner, pack, unpack};

const BEGINNING: &[u8] = b"rekindle-tree 1\n";

/// A place with a destination, and beside it what must stay as it is.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        let path = std::env::temp_dir().join(format!("rekindle-fuzz-{}", std::process::id()));
        fs::create_dir_all(path.join("to")).expect("a place to unpack to");
        fs::write(path.join("victim"), "stays").expect("a victim");
        Place(path)
    }

    fn check(&self) {
        let beside = fs::read_dir(&self.0).expect("the place").count();
        assert_eq!(beside, 2, "something was made outside of the destination");
        let victim = self.0.join("victim");
        assert_eq!(fs::read(&victim).expect("the victim"), b"stays");
        let mode = fs::metadata(victim)
            .expect("the victim")
            .permissions()
            .mode();
        assert_eq!(mode & 0o7000, 0);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Without root, a directory that nobody may enter cannot be emptied.
        open(&self.0.join("to"));
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn open(dir: &Path) {
    let _ = fs::set_permissions(dir, PermissionsExt::from_mode(0o700));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open(&entry.path());
        }
    }
}

fuzz_target!(|data: &[u8]| {
    for stream in [data, &[BEGINNING, data].concat()] {
        let place = Place::new();
        let to = place.0.join("to");
        let came = unpack(stream, &to, Owner::Unpacker, &mut |_| ());
        place.check();
        if came.is_ok() {
            let mut again = Vec::new();
            // It fails only for a file that its owner may not read.
            let _ = pack(&to, &mut again, &mut |_| ());
        }
    }
});
