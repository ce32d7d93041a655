//! Which kernel, initrd and image a guest gets, and how a program's way in and its status's way out are.
//!
//! Until there is an agent in the guest, `-- CMD` travels on the kernel's command line, the initrd's init
//! runs it, and its exit status is the last line on the serial console.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rekindle_assets::{BOOT_ARGS, EXIT_LINE_PREFIX, command_argument};
use rekindle_engine::store::Root;

/// The name of the image that `rekindle setup` builds.
pub(crate) const BASE_IMAGE: &str = "base";

/// What to boot.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) image: Option<PathBuf>,
    /// The initrd is ours: it knows what to do with `-- CMD`.
    ours: bool,
}

impl Guest {
    /// What was asked for; for what was not, what `rekindle setup` installed.
    pub(crate) fn choose(
        root: &Root,
        kernel: Option<&Path>,
        initrd: Option<&Path>,
        image: Option<&str>,
    ) -> Result<Guest> {
        let image = image.map(|image| find_image(root, image)).transpose()?;
        if let Some(kernel) = kernel {
            return Ok(Guest {
                kernel: std::path::absolute(kernel)?,
                initrd: initrd.map(std::path::absolute).transpose()?,
                image,
                ours: false,
            });
        }
        let installed = installed_kernel(root);
        if !installed.is_file() {
            bail!("no guest kernel: give one with --kernel, or run: rekindle setup");
        }
        let ours = initrd.is_none();
        Ok(Guest {
            kernel: installed,
            initrd: Some(match initrd {
                Some(initrd) => std::path::absolute(initrd)?,
                None => installed_initrd(root),
            }),
            image: Some(match image {
                Some(image) => image,
                None => find_image(root, BASE_IMAGE)?,
            }),
            ours,
        })
    }

    /// Whether its initrd is the one that `rekindle setup` made, which brings the agent, and joins an image that it only
    /// reads with a layer.
    pub(crate) fn is_ours(&self) -> bool {
        self.ours
    }

    /// The kernel's command line, with the program in it. Nothing at all for a guest that is not ours and was
    /// given none: Firecracker then takes its own default.
    pub(crate) fn boot_args(
        &self,
        given: Option<&str>,
        command: &[String],
    ) -> Result<Option<String>> {
        if !self.ours && !command.is_empty() {
            bail!(
                "-- CMD needs the initrd that `rekindle setup` made: leave out --kernel and --initrd"
            );
        }
        let mut args = match given {
            Some(given) => given.to_owned(),
            None if self.ours => BOOT_ARGS.to_owned(),
            None => return Ok(None),
        };
        if !command.is_empty() {
            args.push(' ');
            args.push_str(&command_argument(command)?);
        }
        Ok(Some(args))
    }
}

/// Where `rekindle setup` puts the guest's kernel.
pub(crate) fn installed_kernel(root: &Root) -> PathBuf {
    root.assets().join("bin").join("vmlinux")
}

/// Where `rekindle setup` puts the guest's initrd.
pub(crate) fn installed_initrd(root: &Root) -> PathBuf {
    root.assets().join("bin").join("initrd")
}

fn find_image(root: &Root, image: &str) -> Result<PathBuf> {
    if image.contains('/') {
        // Links are followed here, once: further down a link in place of a disk is refused.
        return std::fs::canonicalize(image)
            .with_context(|| format!("the image {image} cannot be used"));
    }
    let name = image
        .parse()
        .with_context(|| format!("the image {image:?}"))?;
    let found = rekindle_engine::store::image::find(root, &name)
        .with_context(|| format!("no image {image}; `rekindle setup` builds {BASE_IMAGE}"))?;
    Ok(found.path)
}

/// Takes the status line out of a guest's output.
///
/// A line is held back only while it could be the status line.
#[derive(Debug, Default)]
pub(crate) struct StatusFilter {
    /// The beginning of a line, and an empty line before it: init puts one before the status.
    held: Vec<u8>,
    in_line: bool,
    status: Option<u8>,
}

/// What is left when the output has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rest {
    pub(crate) bytes: Vec<u8>,
    pub(crate) status: Option<u8>,
}

impl StatusFilter {
    /// Takes what came, gives what may be shown.
    pub(crate) fn pass(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut shown = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            if self.in_line {
                shown.push(byte);
                self.in_line = byte != b'\n';
                continue;
            }
            self.held.push(byte);
            if is_empty_line(&self.held) {
                continue;
            }
            if byte == b'\n' {
                match status_of(&self.held) {
                    Some(status) => {
                        self.status = Some(status);
                        self.held.clear();
                    }
                    // Of several empty lines only the last can be init's.
                    None if is_empty_line(without_empty_line(&self.held)) => {
                        let last = without_empty_line(&self.held).len();
                        shown.extend(self.held.drain(..self.held.len() - last));
                    }
                    None => shown.append(&mut self.held),
                }
            } else if !could_be_status(&self.held) {
                shown.append(&mut self.held);
                self.in_line = true;
            }
        }
        shown
    }

    /// The end of the output.
    pub(crate) fn finish(self) -> Rest {
        match status_of(&self.held) {
            Some(status) => Rest {
                bytes: Vec::new(),
                status: Some(status),
            },
            None => Rest {
                bytes: self.held,
                status: self.status,
            },
        }
    }
}

fn could_be_status(held: &[u8]) -> bool {
    let line = without_empty_line(held);
    let prefix = EXIT_LINE_PREFIX.as_bytes();
    match line.strip_prefix(prefix) {
        Some(rest) => rest.len() <= 4 && rest.iter().all(|b| b.is_ascii_digit() || *b == b'\r'),
        None => prefix.starts_with(line) || line == b"\r",
    }
}

fn status_of(held: &[u8]) -> Option<u8> {
    let line = without_empty_line(held);
    let text = std::str::from_utf8(line.strip_prefix(EXIT_LINE_PREFIX.as_bytes())?).ok()?;
    text.trim_end().parse().ok()
}

/// What stands behind one empty line at the most.
fn without_empty_line(held: &[u8]) -> &[u8] {
    held.strip_prefix(b"\r\n")
        .or_else(|| held.strip_prefix(b"\n"))
        .unwrap_or(held)
}

/// Whether it is an empty line and nothing else.
fn is_empty_line(held: &[u8]) -> bool {
    matches!(held, b"\n" | b"\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(pieces: &[&str]) -> (String, Option<u8>) {
        let mut filter = StatusFilter::default();
        let mut shown = Vec::new();
        for piece in pieces {
            shown.extend(filter.pass(piece.as_bytes()));
        }
        let rest = filter.finish();
        shown.extend(rest.bytes);
        (String::from_utf8(shown).unwrap(), rest.status)
    }

    #[test]
    fn the_status_line_is_taken_out() {
        let line = format!("hello\r\n{EXIT_LINE_PREFIX}3\r\n");
        assert_eq!(through(&[&line]), ("hello\r\n".to_owned(), Some(3)));
    }

    #[test]
    fn the_empty_line_before_it_goes_too_and_no_other() {
        let line = format!("a\r\n\r\n\r\n{EXIT_LINE_PREFIX}0\r\n");
        assert_eq!(through(&[&line]), ("a\r\n\r\n".to_owned(), Some(0)));
        assert_eq!(through(&["\n\n\nb\n"]), ("\n\n\nb\n".to_owned(), None));
    }

    #[test]
    fn it_may_come_in_pieces() {
        let line = format!("a\n{EXIT_LINE_PREFIX}200\r\n");
        let pieces: Vec<&str> = line
            .as_bytes()
            .chunks(1)
            .map(|c| std::str::from_utf8(c).unwrap())
            .collect();
        assert_eq!(through(&pieces), ("a\n".to_owned(), Some(200)));
    }

    #[test]
    fn what_only_looks_like_it_is_shown() {
        for text in [
            "rekindle: exit today\n",
            "rekindle\n",
            "x rekindle: exit 3\n",
            "rekindle: exit 9999\n",
        ] {
            assert_eq!(through(&[text]), (text.to_owned(), None), "{text:?}");
        }
    }

    #[test]
    fn a_prompt_without_an_end_is_shown_at_once() {
        let mut filter = StatusFilter::default();
        assert_eq!(filter.pass(b"~ # "), b"~ # ");
    }
}
