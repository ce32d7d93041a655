//! What to run in an image, as `docker run` puts it together.
//!
//! ```text
//! entrypoint ─ --entrypoint replaces it, and the image's cmd goes
//! cmd        ─ -- ARGS replace it                                  ─> argv = entrypoint + cmd
//! env        ─ --env adds to it, and replaces what has the same name
//! ```

use rekindle_store::image::Config;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where programs are looked for unless the image says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program, ready to be run in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// It and its arguments; never empty.
    pub argv: Vec<String>,
    /// All of its environment; a `PATH` is in it.
    pub env: Vec<(String, String)>,
    /// Where it works.
    pub dir: Option<String>,
    /// Who it runs as, in the guest's words; root if absent.
    pub user: Option<String>,
}

/// What somebody wants otherwise than the image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Instead of the entrypoint; an empty text means none at all.
    pub entrypoint: Option<String>,
    /// Instead of the command.
    pub args: Vec<String>,
    /// On top of the environment.
    pub env: Vec<(String, String)>,
    /// Instead of the working directory.
    pub dir: Option<String>,
    /// Instead of the user.
    pub user: Option<String>,
}

/// Neither the image nor anybody else says what to run.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the image says nothing of what to run in it; give a program after --")]
pub struct NothingToRun;

impl Program {
    /// What comes out of both.
    ///
    /// # Errors
    /// [`NothingToRun`] if nobody names a program.
    pub fn resolve(config: &Config, wishes: &Wishes) -> Result<Self, NothingToRun> {
        let (entrypoint, cmd) = match &wishes.entrypoint {
            Some(text) if text.is_empty() => (Vec::new(), Vec::new()),
            Some(text) => (vec![text.clone()], Vec::new()),
            None => (config.entrypoint.clone(), config.cmd.clone()),
        };
        let cmd = if wishes.args.is_empty() {
            cmd
        } else {
            wishes.args.clone()
        };
        let argv: Vec<_> = entrypoint.into_iter().chain(cmd).collect();
        if argv.is_empty() {
            return Err(NothingToRun);
        }
        let mut env: Vec<(String, String)> = Vec::new();
        let of_image = config.env.iter().filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        });
        let path = ("PATH".to_owned(), PATH.to_owned());
        for (name, value) in std::iter::once(path)
            .chain(of_image)
            .chain(wishes.env.iter().cloned())
        {
            match env.iter_mut().find(|(other, _)| *other == name) {
                Some((_, old)) => *old = value,
                None => env.push((name, value)),
            }
        }
        let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        Ok(Self {
            argv,
            env,
            dir: text(&wishes.dir).or_else(|| text(&config.working_dir)),
            user: text(&wishes.user).or_else(|| text(&config.user)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn config() -> Config {
        Config {
            entrypoint: texts(&["/bin/echo", "-n"]),
            cmd: texts(&["hello"]),
            env: texts(&["A=1", "B=x=y", "PATH=/opt"]),
            working_dir: Some("/srv".into()),
            user: Some("web:www".into()),
            exposed_ports: Vec::new(),
        }
    }

    fn argv(wishes: &Wishes) -> Vec<String> {
        Program::resolve(&config(), wishes).unwrap().argv
    }

    #[test]
    fn arguments_replace_the_command_and_the_entrypoint_stays() {
        let mut wishes = Wishes::default();
        assert_eq!(argv(&wishes), ["/bin/echo", "-n", "hello"]);
        wishes.args = texts(&["a", "b"]);
        assert_eq!(argv(&wishes), ["/bin/echo", "-n", "a", "b"]);
        wishes.entrypoint = Some("/bin/sh".into());
        assert_eq!(argv(&wishes), ["/bin/sh", "a", "b"]);
        wishes.args.clear();
        assert_eq!(
            argv(&wishes),
            ["/bin/sh"],
            "the image's command is for its own entrypoint"
        );
        wishes.entrypoint = Some(String::new());
        assert_eq!(Program::resolve(&config(), &wishes), Err(NothingToRun));
    }

    #[test]
    fn the_environment_of_who_asks_wins_and_there_is_a_path() {
        let wishes = Wishes {
            env: vec![("A".into(), "2".into()), ("C".into(), String::new())],
            user: Some("0".into()),
            ..Wishes::default()
        };
        let program = Program::resolve(&config(), &wishes).unwrap();
        let env: Vec<_> = program
            .env
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect();
        assert_eq!(env, [("PATH", "/opt"), ("A", "2"), ("B", "x=y"), ("C", "")]);
        assert_eq!(
            (program.dir.as_deref(), program.user.as_deref()),
            (Some("/srv"), Some("0"))
        );
        let bare = Config {
            cmd: texts(&["sh"]),
            ..Config::default()
        };
        let program = Program::resolve(&bare, &Wishes::default()).unwrap();
        assert_eq!(program.env, [("PATH".to_owned(), PATH.to_owned())]);
    }
}
