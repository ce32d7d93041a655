//! How the host tells the guest's init what to run, through the kernel's command line.
//!
//! ```text
//! ["echo", "a b"] → 'echo' 'a b' → base64url → rekindle.cmd=J2VjaG8nICdhIGIn
//! ```
//!
//! The kernel's command line knows no escapes that hold for every byte, hence base64. The guest's
//! init (`guest-init.sh`) decodes the line and hands it to `sh -c`.

use anyhow::{Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;

/// x86's `COMMAND_LINE_SIZE`, with the closing zero byte.
pub const COMMAND_LINE_SIZE: usize = 2048;

/// Bytes of the command line that [`command_argument`] leaves to everything else: the caller's
/// boot arguments and Firecracker's own (`root=`, and `virtio_mmio.device=` for each device).
pub const COMMAND_LINE_RESERVE: usize = 768;

/// What a Linux guest should be booted with, to which `rekindle.cmd=` and the like are added.
///
/// The console is the serial port, which Firecracker prints; `reboot=k` makes a reboot end
/// Firecracker with status 0, `panic=1` does so a second after a panic. Without `i8042.*` the
/// kernel would spend half a second looking for a mouse. `pci=off` is in Firecracker's own default
/// arguments, which are dropped when any are given; releases from 1.13 on add it again where it is
/// right. Even `quiet` lets errors through, and that there is no PCI is one to Linux, hence
/// `loglevel=3`. The root device Firecracker adds itself.
pub const BOOT_ARGS: &str =
    "console=ttyS0 reboot=k panic=1 pci=off quiet loglevel=3 i8042.noaux i8042.nomux i8042.dumbkbd";

/// How the guest's init announces the end of a command: this, then the exit status in decimal.
///
/// The line is preceded by one line break of its own, whatever the command wrote last.
pub const EXIT_LINE_PREFIX: &str = "rekindle: exit ";

/// Makes the kernel argument that has the guest run `argv` instead of its init.
///
/// # Errors
/// When there is nothing to run, when an argument holds a zero byte (no program can be given
/// one), or when the result does not fit the kernel's command line.
pub fn command_argument(argv: &[String]) -> Result<String> {
    ensure!(!argv.is_empty(), "there is no command to run");
    ensure!(
        !argv.iter().any(|a| a.contains('\0')),
        "an argument holds a zero byte"
    );
    let line = argv
        .iter()
        .map(|a| shell_quoted(a))
        .collect::<Vec<_>>()
        .join(" ");
    let argument = format!("rekindle.cmd={}", URL_SAFE.encode(line));
    let room = COMMAND_LINE_SIZE - 1 - COMMAND_LINE_RESERVE;
    ensure!(
        argument.len() <= room,
        "the command takes {} bytes of the kernel's command line, and {room} are free for it; \
         put it into a file of the image and run that",
        argument.len()
    );
    Ok(argument)
}

/// `word` as exactly one word of a POSIX shell.
pub(crate) fn shell_quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    /// What the guest's init makes of the argument, with the host's own shell.
    fn run_as_the_guest_does(argv: &[String]) -> Vec<u8> {
        let argument = command_argument(argv).unwrap();
        let encoded = argument.strip_prefix("rekindle.cmd=").unwrap();
        let script = format!(
            "line=$(printf %s '{encoded}' | tr -- '-_' '+/' | base64 -d; printf x); sh -c \"${{line%x}}\""
        );
        Command::new("sh")
            .arg("-c")
            .arg(script)
            .output()
            .unwrap()
            .stdout
    }

    #[test]
    fn hostile_words_arrive_as_they_are() {
        let hostile = [
            "a b",
            "",
            "'",
            "''",
            "\\",
            "\"$(exit 3)\"",
            "`id`",
            "$HOME",
            "*",
            "~",
            "-n",
            "--",
            "a\nb",
            "\n",
            "; rm -rf /nowhere",
            "ä€𝄞",
            "\u{1b}[31m",
            "rekindle.cmd=x",
            "#",
            "!x",
        ];
        let argv = strings(&["printf", r"%s\0"])
            .into_iter()
            .chain(strings(&hostile))
            .collect::<Vec<_>>();
        let expected = hostile
            .iter()
            .flat_map(|w| [w.as_bytes(), b"\0"].concat())
            .collect::<Vec<_>>();
        assert_eq!(run_as_the_guest_does(&argv), expected);
    }

    #[test]
    fn the_argument_is_one_plain_word() {
        let argument = command_argument(&strings(&["echo", "\u{ff}?>~ \" '"])).unwrap();
        assert!(
            argument
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b".=-_".contains(&b)),
            "{argument}"
        );
    }

    #[test]
    fn a_command_that_does_not_fit_is_refused() {
        assert!(command_argument(&strings(&["echo", &"x".repeat(900)])).is_ok());
        let refusal = command_argument(&strings(&["echo", &"x".repeat(1000)])).unwrap_err();
        assert!(refusal.to_string().contains("1279 are free"), "{refusal}");
    }

    #[test]
    fn nothing_to_run_and_zero_bytes_are_refused() {
        assert!(command_argument(&[]).is_err());
        assert!(command_argument(&strings(&["echo", "a\0b"])).is_err());
    }
}
