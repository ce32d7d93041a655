//! The agent's own programs: files and trees into the guest, and out of it.
//!
//! They run as any program of a session does, so a copy goes on where it was when a connection breaks, and waits for whoever
//! reads it too slowly. What they read or write is what `rekindle-archive` packs.

use rekindle_archive::Owner;

/// What the agent is called where it runs itself: not by its path, as its file may be gone.
const ITSELF: &str = "/proc/self/exe";
const PACK: &str = "pack";
const UNPACK: &str = "unpack";
const KEEP_OWNERS: &str = "--keep-owners";

/// One direction of a copy, as a program of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// What is at `path` comes out of the guest, through the program's standard output.
    Out {
        /// In the guest.
        path: String,
    },
    /// What goes in through the program's standard input is put at `path`.
    In {
        /// In the guest.
        path: String,
        /// Whose it is there.
        owner: Owner,
    },
}

impl Transfer {
    /// The program's name and arguments. It says on its standard error why it failed, and nothing else.
    pub fn argv(&self) -> Vec<String> {
        let words: &[&str] = match self {
            Transfer::Out { path } => &[ITSELF, PACK, path],
            Transfer::In {
                path,
                owner: Owner::Unpacker,
            } => &[ITSELF, UNPACK, path],
            Transfer::In {
                path,
                owner: Owner::Kept,
            } => &[ITSELF, UNPACK, KEEP_OWNERS, path],
        };
        words.iter().map(|&word| word.to_owned()).collect()
    }

    /// What an agent was started for, if it is this; from its arguments.
    pub fn parse(arguments: &[&str]) -> Option<Transfer> {
        let to = |path: &str, owner| {
            Some(Transfer::In {
                path: path.to_owned(),
                owner,
            })
        };
        match *arguments {
            [PACK, path] => Some(Transfer::Out {
                path: path.to_owned(),
            }),
            [UNPACK, path] => to(path, Owner::Unpacker),
            [UNPACK, KEEP_OWNERS, path] => to(path, Owner::Kept),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_understands_what_it_is_started_for() {
        let path = || "/srv/www".to_owned();
        for transfer in [
            Transfer::Out { path: path() },
            Transfer::In {
                path: path(),
                owner: Owner::Unpacker,
            },
            Transfer::In {
                path: path(),
                owner: Owner::Kept,
            },
        ] {
            let argv = transfer.argv();
            let arguments: Vec<&str> = argv[1..].iter().map(String::as_str).collect();
            assert_eq!(Transfer::parse(&arguments), Some(transfer));
        }
        for other in [
            &["pack"][..],
            &["unpack", "--all", "x"],
            &["--version"],
            &[],
        ] {
            assert_eq!(Transfer::parse(other), None);
        }
    }
}
