//! What is run in a guest: what a command line says of it, and for `rekindle run` also the image.

use rekindle_engine::agent::{Agent, Exec};
use rekindle_engine::store::image::Config;
use rekindle_engine::vm::dir::VmDir;
use rekindle_image::{Program, Wishes};

/// A program's environment.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Environment {
    /// Set a variable of its environment, which has PATH and HOME otherwise
    #[arg(long, short, value_name = "K[=V]", value_parser = parse_variable)]
    env: Vec<(String, String)>,
}

impl Environment {
    /// The program, with these variables.
    pub(crate) fn given_to(self, program: Exec) -> Exec {
        with_variables(program, self.env)
    }
}

/// `NAME=VALUE`, or the name of a variable of this program, whose value need not be among its arguments then.
pub(crate) fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        None if !text.is_empty() => match std::env::var(text) {
            Ok(value) => Ok((text.to_owned(), value)),
            Err(_) => Err(format!("{text:?} is neither like NAME=VALUE nor set here")),
        },
        _ => Err(format!("{text:?} is not like NAME=VALUE")),
    }
}

/// What is wanted on a command line.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Wanted {
    #[command(flatten)]
    environment: Environment,
    /// Run this instead of the image's entrypoint, with CMD as its arguments; '' runs CMD itself, or the image's init
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Who it runs as: a name or number, with :group if wanted [default: the image's, else root]
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Where it works [default: the image's, else /]
    #[arg(long, short = 'w', value_name = "DIR")]
    dir: Option<String>,
    /// The program to run in the guest, and its arguments; only the latter if the image has an entrypoint
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

impl Wanted {
    /// What comes out of it and of what the image says; nothing, if neither names a program.
    pub(crate) fn with(&self, config: &Config) -> Option<Program> {
        let wishes = Wishes {
            entrypoint: self.entrypoint.clone(),
            args: self.command.clone(),
            env: self.environment.env.clone(),
            dir: self.dir.clone(),
            user: self.user.clone(),
        };
        Program::resolve(config, &wishes).ok()
    }
}

/// The program, to be started in the guest of `dir`.
pub(crate) fn exec_in(dir: &VmDir, program: Program) -> Exec {
    let mut exec = with_variables(Agent::of(dir).exec(program.argv), program.env);
    if let Some(dir) = program.dir {
        exec = exec.dir(dir);
    }
    if let Some(user) = program.user {
        exec = exec.user(user);
    }
    exec
}

fn with_variables(exec: Exec, variables: Vec<(String, String)>) -> Exec {
    let set = |exec: Exec, (name, value)| exec.env(name, value);
    variables.into_iter().fold(exec, set)
}
