//! What the guest boots from.

use std::path::PathBuf;

body! {
    /// The guest's kernel, what it is told, and its first file system.
    #[derive(Eq)]
    pub struct BootSource {
        /// The kernel as an uncompressed ELF file (a bzImage too, from Firecracker 1.17 on x86-64).
        kernel_image_path: PathBuf,
    }
    optional {
        /// The kernel's command line; Firecracker has a default of its own.
        boot_args: String [into],
        /// An initial RAM disk.
        initrd_path: PathBuf [into],
    }
}

impl BootSource {
    /// Boots the kernel in this file.
    pub fn new(kernel_image_path: impl Into<PathBuf>) -> BootSource {
        BootSource {
            kernel_image_path: kernel_image_path.into(),
            boot_args: None,
            initrd_path: None,
        }
    }
}
