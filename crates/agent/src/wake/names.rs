//! What a guest is called: its hostname and its machine id.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Whether it can be a hostname: dots and what is between them as in domain names, 64 characters at most.
pub(super) fn is_hostname(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.len() <= 64 && name.split('.').all(part)
}

/// Whether it can be a machine id (`machine-id(5)`).
pub(super) fn is_machine_id(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Gives the guest a name: to the kernel, and in the files that are there and can be written.
pub(super) fn hostname(root: &Path, name: &str) -> Result<(), String> {
    let before = rustix::system::uname();
    let before = before.nodename().to_string_lossy().into_owned();
    rustix::system::sethostname(name.as_bytes()).map_err(|e| format!("the kernel's: {e}"))?;
    write_hostname(root, &before, name)
}

fn write_hostname(root: &Path, before: &str, name: &str) -> Result<(), String> {
    replace(&root.join("etc/hostname"), |_| format!("{name}\n"))?;
    replace(&root.join("etc/hosts"), |hosts| {
        renamed(hosts, before, name)
    })
}

/// Gives the guest a machine id, in the files that are there and can be written.
pub(super) fn machine_id(root: &Path, id: &str) -> Result<(), String> {
    for path in ["etc/machine-id", "var/lib/dbus/machine-id"] {
        replace(&root.join(path), |_| format!("{id}\n"))?;
    }
    Ok(())
}

/// `/etc/hosts`, in which the guest's name is another one.
fn renamed(hosts: &str, before: &str, name: &str) -> String {
    let mut found = false;
    let mut text = String::new();
    for line in hosts.lines() {
        let (entry, comment) = line.split_at(line.find('#').unwrap_or(line.len()));
        let mut words = entry.split_whitespace();
        let address = words.next();
        let names: Vec<&str> = words.collect();
        if let Some(address) = address
            && names.contains(&before)
            && before != "localhost"
        {
            found = true;
            let names = names.iter().map(|n| if *n == before { name } else { n });
            let names: Vec<&str> = names.collect();
            text.push_str(&format!("{address}\t{}", names.join(" ")));
            if !comment.is_empty() {
                text.push(' ');
            }
            text.push_str(comment);
        } else {
            text.push_str(line);
        }
        text.push('\n');
    }
    if !found {
        text.push_str(&format!("127.0.1.1\t{name}\n"));
    }
    text
}

/// Replaces a file that is there. One that is absent, a link or not to be written stays as it is.
fn replace(path: &Path, new: impl FnOnce(&str) -> String) -> Result<(), String> {
    let replaced = || -> io::Result<()> {
        let meta = fs::symlink_metadata(path)?;
        if !meta.is_file() {
            return Ok(());
        }
        let text = new(&fs::read_to_string(path)?);
        let next = path.with_extension("rekindle");
        let written = File::create(&next).and_then(|mut file| {
            file.set_permissions(fs::Permissions::from_mode(meta.permissions().mode()))?;
            file.write_all(text.as_bytes())?;
            fs::rename(&next, path)
        });
        match written {
            // Something is mounted there, as container engines like to do.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                let _ = fs::remove_file(&next);
                fs::write(path, text)
            }
            other => other.inspect_err(|_| drop(fs::remove_file(&next))),
        }
    };
    match replaced() {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Err(format!("{}: {error}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_a_network_takes() {
        for good in ["web", "web-1", "a.b.c", "0"] {
            assert!(is_hostname(good), "{good}");
        }
        let long = "x".repeat(65);
        for bad in ["", "-a", "a-", "a..b", "a b", "a/b", "ä", &*long] {
            assert!(!is_hostname(bad), "{bad}");
        }
        assert!(is_machine_id("0123456789abcdef0123456789abcdef"));
        assert!(!is_machine_id("0123456789ABCDEF0123456789ABCDEF"));
        assert!(!is_machine_id("0123"));
    }

    #[test]
    fn hosts_know_the_new_name_where_they_knew_the_old_one() {
        let hosts = "127.0.0.1\tlocalhost\n# old\n127.0.1.1 old.lan old # us\n";
        let expected = "127.0.0.1\tlocalhost\n# old\n127.0.1.1\told.lan new # us\n";
        assert_eq!(renamed(hosts, "old", "new"), expected);
        let none = "127.0.0.1 localhost\n";
        let expected = "127.0.0.1 localhost\n127.0.1.1\tnew\n";
        assert_eq!(renamed(none, "old", "new"), expected);
        assert_eq!(renamed(none, "localhost", "new"), expected);
    }

    #[test]
    fn files_are_replaced_where_they_are_and_made_nowhere() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        assert_eq!(write_hostname(root.path(), "old", "new"), Ok(()));
        fs::create_dir_all(at("etc")).unwrap();
        fs::create_dir_all(at("var/lib/dbus")).unwrap();
        fs::write(at("etc/hostname"), "old\n").unwrap();
        fs::write(at("etc/machine-id"), "").unwrap();
        fs::set_permissions(at("etc/machine-id"), fs::Permissions::from_mode(0o444)).unwrap();
        std::os::unix::fs::symlink("/etc/machine-id", at("var/lib/dbus/machine-id")).unwrap();
        assert_eq!(write_hostname(root.path(), "old", "new"), Ok(()));
        assert_eq!(machine_id(root.path(), "0123"), Ok(()));
        let read = |path: &str| fs::read_to_string(at(path)).unwrap();
        assert_eq!(read("etc/hostname"), "new\n");
        assert_eq!(read("etc/machine-id"), "0123\n");
        let mode = fs::metadata(at("etc/machine-id")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o444);
        assert!(!at("etc/hosts").exists());
        assert!(at("var/lib/dbus/machine-id").is_symlink());
        assert_eq!(fs::read_dir(at("etc")).unwrap().count(), 2);
    }
}
