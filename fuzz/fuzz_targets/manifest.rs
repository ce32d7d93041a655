//! Manifests, as they are and with a checksum that fits.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rekindle_store::Manifest;
use rekindle_store::digest::Digest;

const SEAL: &[u8] = b",\n  \"checksum\": \"";

fuzz_target!(|data: &[u8]| {
    let cut = data.windows(SEAL.len()).rposition(|window| window == SEAL);
    let body = &data[..cut.unwrap_or(data.len())];
    let seal = [SEAL, Digest::of(body).to_string().as_bytes(), b"\"\n}\n"].concat();
    for bytes in [data, &[body, &seal].concat()] {
        let Ok(manifest) = Manifest::parse(bytes) else {
            continue;
        };
        // What was read can be written, and reads the same.
        let written = manifest
            .to_bytes()
            .expect("a sound manifest can be written");
        assert_eq!(
            Manifest::parse(&written).expect("what was written"),
            manifest
        );
        assert_ne!(manifest.parent(), Some(manifest.id));
        for (file, _) in manifest.layers() {
            let file = file.as_str();
            assert!(file.starts_with("disks/") && !file.contains(".."), "{file}");
        }
    }
});
