//! The lab: a Linux with a working `/dev/kvm`, on a machine that has none.
//!
//! ```text
//! host ── qemu (emulates a CPU with AMD SVM) ── Debian kernel, kvm_amd ── /dev/kvm ── Firecracker ── guest
//!           host's / ── 9p, read-only ── overlay with tmpfs = the lab's /
//!           share ───── 9p, read-write ─ the same path inside
//!           console ─── pipe ─────────── stdout, without the boot noise
//! ```
//!
//! It proves behaviour; its timings mean nothing. `docs/lab.md` tells how to use it.

mod console;
mod pulse;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;

use self::console::{Console, Copied, copy_until};
use self::pulse::Pulse;
use crate::cache::Built;
use crate::event::Event;
use crate::guest::{BUSYBOX_PACKAGE, initrd, recipe, vmlinuz};
use crate::modules::ModuleTree;
use crate::{Assets, create_directory};

const SET: &str = "lab";
const INIT: &str = include_str!("lab-init.sh");
/// To be raised when this file makes other contents from the same parts.
const BUILDER: &str = "1";
/// Debian's kernel for all machines: the one for virtual machines has no 9p.
const KERNEL_PACKAGE: &str = "linux-image-amd64";
const QEMU: &str = "qemu-system-x86_64";
/// What qemu itself has to say, in the directory of the run.
const QEMU_LOG: &str = "qemu.log";
/// For how long a lab that stood still may print why, once it was asked.
const LAST_WORDS: Duration = Duration::from_secs(20);
/// The most of a failed boot's output that an error quotes.
const QUOTED: usize = 2000;

/// With AMD's virtualization, and without what is slower to emulate than to do without: BLAKE3 takes a third of the time with
/// SSE2 that it takes with AVX2, and most of a snapshot is BLAKE3. SSE4.2 and PCLMULQDQ go with SSE4.1, as the kernel's
/// CRC32C takes the three for one. AVX stays: the first program of a guest dies without it.
const CPU: &str = "EPYC,+svm,+npt,-avx2,-sse4.1,-sse4.2,-pclmulqdq";

/// Loaded before the command runs.
const LOADED: [&str; 7] = [
    "virtio_pci",
    "9p",
    "9pnet_virtio",
    "overlay",
    "kvm_amd",
    "tun",
    "virtio_rng",
];

/// At hand for when the kernel asks for them, in kernels that have them.
const OFFERED: [&str; 27] = [
    "bridge",
    "crc32c_generic",
    "crc32c_intel",
    "dm_mod",
    "dm_snapshot",
    "dummy",
    "ext4",
    "loop",
    "macvlan",
    "nbd",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nf_tables",
    "nfnetlink",
    "nft_chain_nat",
    "nft_ct",
    "nft_fib_inet",
    "nft_limit",
    "nft_masq",
    "nft_nat",
    "nft_redir",
    "nft_reject_inet",
    "squashfs",
    "veth",
    "vsock_loopback",
    "zram",
];

/// What it takes to start the lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lab {
    /// Debian's kernel, as qemu boots it.
    pub kernel: PathBuf,
    /// The initrd whose init makes the lab.
    pub initrd: PathBuf,
    /// The program.
    pub qemu: PathBuf,
}

/// How to run a command in the lab.
#[derive(Debug, Clone)]
pub struct Options {
    /// CPUs of the lab.
    pub cpus: u32,
    /// Its memory, in MiB; what is written outside the share comes out of it.
    pub memory_mib: u32,
    /// A directory that is writable inside, at the same path; made if it is not there.
    pub share: PathBuf,
    /// Where the command runs.
    pub directory: PathBuf,
    /// The command's environment, beside `PATH`, `HOME` and `TERM`.
    pub environment: Vec<(String, String)>,
    /// Whether this process's terminal is the command's as well, if its standard input is one.
    pub terminal: bool,
    /// Ends the lab, command and all, after that time, however often it was started in it.
    pub timeout: Option<Duration>,
    /// How often the lab is started, at the most, if its own kernel crashes or stands still. QEMU's emulation of SVM
    /// makes it do so now and then (`docs/lab.md`), and the command, which must be fit for it, then runs anew.
    pub tries: u32,
}

/// How a command in the lab ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// By itself, with this status as a shell tells it.
    Exited(i32),
    /// Not in time, so the lab was ended.
    TimedOut,
}

impl Assets {
    /// The lab's kernel and initrd, and qemu, which is installed if it is not.
    ///
    /// # Errors
    /// When apt cannot install or download the packages.
    pub fn lab(&self) -> Result<Lab> {
        self.ensure_installed(
            &["qemu-system-x86"],
            "the lab is a machine that QEMU emulates",
        )?;
        let recipe = recipe(&[BUILDER, KERNEL_PACKAGE, INIT], &[&LOADED, &OFFERED]);
        let set = self.ensure(SET, recipe, |scratch| self.build_lab(scratch))?;
        let (kernel, initrd) = (set.path("vmlinuz"), set.path("initrd"));
        self.announce(&set, "lab kernel", "vmlinuz")?;
        self.announce(&set, "lab initrd", "initrd")?;
        Ok(Lab {
            kernel,
            initrd,
            qemu: QEMU.into(),
        })
    }

    fn build_lab(&self, scratch: &Path) -> Result<Built> {
        let linux = self.unpack(KERNEL_PACKAGE)?;
        let busybox = self.unpack(BUSYBOX_PACKAGE)?;
        let source = format!("{} and {}", linux.source, busybox.source);
        self.report(&Event::Building {
            what: "lab initrd",
            from: &source,
        });
        let tree = ModuleTree::open(linux.path())?;
        fs::copy(vmlinuz(&linux, &tree)?, scratch.join("vmlinuz"))?;
        let loaded = tree.closure(&LOADED)?;
        let offered = OFFERED.iter().copied().filter(|m| tree.has(m));
        let modules = tree.closure(&LOADED.into_iter().chain(offered).collect::<Vec<_>>())?;
        fs::write(
            scratch.join("initrd"),
            initrd(&busybox, &tree, &modules, &loaded, INIT)?.finish()?,
        )?;
        Ok(Built {
            source,
            version: linux.version,
        })
    }
}

/// How one start of the lab ended.
enum Attempt {
    Over(Outcome),
    /// Without the command's status; this is what qemu and the kernel said.
    Crashed(String),
}

impl Lab {
    /// Runs `argv` in a fresh lab; what it prints goes to `output` as it comes.
    ///
    /// The lab ends when this returns, and when this process or the calling thread dies.
    ///
    /// # Errors
    /// When qemu does not start, or the lab ends without the command's status; its last output
    /// is in the error.
    pub fn run(
        &self,
        argv: &[String],
        options: &Options,
        output: &mut dyn Write,
    ) -> Result<Outcome> {
        ensure!(!argv.is_empty(), "there is no command to run in the lab");
        let deadline = options.timeout.map(|t| Instant::now() + t);
        let mut left = options.tries;
        loop {
            left = left.saturating_sub(1);
            match self.attempt(argv, options, deadline, output)? {
                Attempt::Over(outcome) => return Ok(outcome),
                Attempt::Crashed(said) if left > 0 => writeln!(
                    output,
                    "\nlab: its kernel crashed, as an emulated one does now and then; once more{said}"
                )?,
                Attempt::Crashed(said) => {
                    bail!("the lab ended without the command's status{said}")
                }
            }
        }
    }

    fn attempt(
        &self,
        argv: &[String],
        options: &Options,
        deadline: Option<Instant>,
        output: &mut dyn Write,
    ) -> Result<Attempt> {
        let share = create_directory(std::path::absolute(&options.share)?)?;
        let run = tempfile::Builder::new().prefix("lab-").tempdir_in(&share)?;
        fs::write(run.path().join("command"), script(argv, options)?)?;
        let mut qemu = Running(
            self.command(options, &share, run.path())?
                .spawn()
                .context("cannot start qemu")?,
        );
        let mut console = Console::new(output);
        let mut stdout = qemu.0.stdout.take().context("qemu's output is a pipe")?;
        let mut pulse = Pulse::of(run.path());
        let mut state = String::new();
        match copy_until(&mut stdout, &mut console, deadline, &mut pulse)? {
            Copied::ToTheEnd => {}
            Copied::OutOfTime => return Ok(Attempt::Over(Outcome::TimedOut)),
            Copied::StandsStill => {
                state = pulse.ask_why();
                let until = Some(Instant::now() + LAST_WORDS);
                copy_until(&mut stdout, &mut console, until, &mut pulse)?;
                qemu.0.kill()?;
            }
        }
        let status = qemu.0.wait()?;
        match fs::read_to_string(run.path().join("status")) {
            Ok(text) => Ok(Attempt::Over(Outcome::Exited(
                text.trim().parse().context("the command's status")?,
            ))),
            Err(_) => {
                let log = fs::read(run.path().join(QEMU_LOG)).unwrap_or_default();
                let said = [console.boot_output(), &log].map(end_of).concat();
                let said = format!(" (qemu: {status}){state}{said}");
                if console.boot_output().is_empty() {
                    Ok(Attempt::Crashed(said))
                } else {
                    bail!("the lab did not come up{said}")
                }
            }
        }
    }

    fn command(&self, options: &Options, share: &Path, run: &Path) -> Result<Command> {
        let name = run
            .file_name()
            .context("a run has a name")?
            .to_string_lossy();
        let share_argument =
            URL_SAFE.encode(share.to_str().context("the share's path is not UTF-8")?);
        let mut append = format!(
            "console=ttyS0 quiet panic=1 unknown_nmi_panic rekindle.share={share_argument} rekindle.run={name}"
        );
        // From a pipe or a file the emulated terminal would drop what nobody reads in time.
        let (stdin, chardev) = if options.terminal && io::stdin().is_terminal() {
            append.push_str(" rekindle.tty=yes");
            (Stdio::inherit(), "stdio,id=console,signal=off")
        } else {
            (Stdio::null(), "stdio,id=console")
        };
        // The kernel kills qemu when the thread that started it dies. The shell asks whether that
        // has happened already, since nothing would be sent then.
        let mut command = Command::new("setpriv");
        command
            .args([
                "--pdeathsig",
                "KILL",
                "sh",
                "-c",
                r#"[ "$PPID" = "$0" ] && exec "$@""#,
            ])
            .arg(std::process::id().to_string())
            .arg(&self.qemu)
            .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU])
            .args([
                "-m",
                &options.memory_mib.to_string(),
                "-smp",
                &options.cpus.to_string(),
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args([
                "-chardev",
                chardev,
                "-serial",
                "chardev:console",
                "-monitor",
                pulse::MONITOR,
            ])
            .args(["-virtfs", &virtfs("host", Path::new("/"), "readonly=on")?])
            .args(["-virtfs", &virtfs("share", share, "readonly=off")?])
            .args(["-device", "virtio-rng-pci", "-append", &append])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .current_dir(run)
            .stdin(stdin)
            .stdout(Stdio::piped())
            // It warns about each feature of the CPU that it does not emulate; that is of interest
            // only if nothing works.
            .stderr(File::create(run.join(QEMU_LOG))?);
        Ok(command)
    }
}

/// A 9p share; qemu takes a comma for a separator unless it is doubled.
fn virtfs(tag: &str, path: &Path, mode: &str) -> Result<String> {
    let path = path
        .to_str()
        .context("a share's path is not UTF-8")?
        .replace(',', ",,");
    Ok(format!(
        "local,path={path},mount_tag={tag},security_model=none,{mode},multidevs=remap"
    ))
}

/// The shell script that runs inside.
fn script(argv: &[String], options: &Options) -> Result<String> {
    let directory = options
        .directory
        .to_str()
        .context("the command's directory is not UTF-8")?;
    let mut script = String::from(
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux\n",
    );
    for (name, value) in &options.environment {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        ensure!(
            !name.is_empty() && name.chars().all(plain),
            "{name:?} is no variable's name"
        );
        writeln!(script, "export {name}={}", shell_quoted(value))?;
    }
    writeln!(script, "cd {} || exit 125", shell_quoted(directory))?;
    let words = argv.iter().map(|a| shell_quoted(a)).collect::<Vec<_>>();
    writeln!(script, "exec {}", words.join(" "))?;
    Ok(script)
}

/// A qemu that does not outlive its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has been waited for, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The end of some output, as an error quotes it.
fn end_of(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(&output[output.len().saturating_sub(QUOTED)..]);
    match text.trim() {
        "" => String::new(),
        text => format!("\n{text}"),
    }
}

/// `word` as exactly one word of a POSIX shell.
fn shell_quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            cpus: 1,
            memory_mib: 64,
            share: "/share".into(),
            directory: "/".into(),
            environment: vec![("A".into(), "it's $HOME".into())],
            terminal: false,
            timeout: None,
            tries: 1,
        }
    }

    #[test]
    fn the_script_passes_words_and_environment_as_they_are() {
        let argv = [
            "sh",
            "-c",
            r#"printf '%s|%s' "$A" "$1""#,
            "sh",
            "a 'b' \"c\" \\",
        ]
        .map(String::from);
        let script = script(&argv, &options()).unwrap();
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "it's $HOME|a 'b' \"c\" \\"
        );
    }

    #[test]
    fn a_variable_whose_name_is_shell_is_refused() {
        let mut options = options();
        options.environment = vec![("A=1; reboot #".into(), String::new())];
        assert!(script(&["true".into()], &options).is_err());
    }

    #[test]
    fn a_boot_that_fails_is_quoted() {
        let mut output = Vec::new();
        let mut console = Console::new(&mut output);
        console
            .take(b"rekindle-lab: there is no /dev/kvm in here\r\n")
            .unwrap();
        let quoted = end_of(console.boot_output());
        assert_eq!(quoted, "\nrekindle-lab: there is no /dev/kvm in here");
        assert!(output.is_empty());
    }

    #[test]
    fn qemu_is_killed_when_it_runs_out_of_time() {
        let child = Command::new("sleep")
            .arg("1000")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        let mut running = Running(child);
        let mut output = Vec::new();
        let mut console = Console::new(&mut output);
        let stdout = running.0.stdout.take().unwrap();
        let deadline = Some(Instant::now() + Duration::from_millis(20));
        let run = tempfile::tempdir().unwrap();
        let mut pulse = Pulse::of(run.path());
        assert_eq!(
            copy_until(stdout, &mut console, deadline, &mut pulse).unwrap(),
            Copied::OutOfTime
        );
        drop(running);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn commas_in_a_path_do_not_end_it() {
        let argument = virtfs("share", Path::new("/a,readonly=off"), "readonly=on").unwrap();
        assert!(
            argument.starts_with("local,path=/a,,readonly=off,mount_tag=share,"),
            "{argument}"
        );
    }

    #[test]
    fn hostile_words_stay_one_word_of_the_shell() {
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
            "a\nb",
            "\n",
            "; exit",
            "ä€𝄞",
            "#",
        ];
        let words: String = hostile
            .map(|word| format!(" {}", shell_quoted(word)))
            .concat();
        let line = format!(r"printf '%s\0'{words}");
        let said = Command::new("sh").arg("-c").arg(line).output().unwrap();
        let expected: Vec<u8> = hostile
            .map(|word| [word.as_bytes(), b"\0"].concat())
            .concat();
        assert_eq!(said.stdout, expected);
    }
}
