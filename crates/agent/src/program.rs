//! Starting a program, and moving bytes between it and its session.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use rekindle_agent::{Exec, MAX_DATA, Refusal, Size, Stream, Why};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::session::{Input, Session};
use crate::sys::{self, Identity};
use crate::users;

/// What ends the input of a terminal, Ctrl-D.
const END_OF_TRANSMISSION: u8 = 4;

/// Our end of a program's terminal.
#[derive(Clone, Debug)]
pub(crate) struct Terminal(Arc<OwnedFd>);

impl Terminal {
    pub(crate) fn resize(&self, size: Size) {
        // A terminal whose program has ended has no size.
        let _ = rustix::termios::tcsetwinsize(&*self.0, winsize(size));
    }
}

fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// A program that runs, and our ends of what it reads and writes.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) pid: Pid,
    pub(crate) terminal: Option<Terminal>,
    ends: Ends,
    /// Readable once the program has ended.
    pub(crate) ended: Arc<OwnedFd>,
}

#[derive(Debug)]
enum Ends {
    Pipes {
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    Terminal(Arc<OwnedFd>),
    Console,
}

/// Why a program was not started: what it was refused for, or what the guest lacks.
fn refusal(why: Why, words: String) -> Refusal {
    Refusal { why, words }
}

fn lacking(what: &'static str) -> impl Fn(Errno) -> Refusal {
    move |errno| refusal(Why::Full, format!("the guest has no {what} left: {errno}"))
}

/// Where root is at home, who runs what nobody else was named for.
const ROOTS_HOME: &str = "/root";

/// Starts a program. `guest_env` is what every program of the guest gets, where its own environment says nothing else.
pub(crate) fn start(exec: &Exec, guest_env: &[(String, String)]) -> Result<Program, Refusal> {
    let user = exec.user.as_deref().map(users::user).transpose()?;
    let home = user.as_ref().map_or(ROOTS_HOME, |user| &user.home);
    let mut command = command(exec, guest_env, home)?;
    let identity = user.map(|user| user.identity);
    let ended = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(lacking("descriptors"))?;
    let (ends, on_terminal) = match exec.tty {
        _ if exec.console => (console(&mut command)?, false),
        Some(size) => (terminal(&mut command, size, identity.as_ref())?, true),
        None => (pipes(&mut command)?, false),
    };
    sys::lead(&mut command, on_terminal, identity);
    let child = command.spawn().map_err(|error| not_started(exec, &error))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let terminal = match &ends {
        Ends::Terminal(ours) => Some(Terminal(ours.clone())),
        Ends::Pipes { .. } | Ends::Console => None,
    };
    Ok(Program {
        pid: pid.expect("a child has a pid"),
        terminal,
        ends,
        ended: Arc::new(ended),
    })
}

/// Why these can be no program's variables, if they cannot.
pub(crate) fn unusable(env: &[(String, String)]) -> Option<String> {
    env.iter().find_map(|(name, value)| {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Some(format!("a variable cannot have the name {name:?}"));
        }
        let words = || format!("the variable {name} has a zero byte");
        value.contains('\0').then(words)
    })
}

fn command(exec: &Exec, guest_env: &[(String, String)], home: &str) -> Result<Command, Refusal> {
    let mut words = exec.argv.iter().chain(&exec.dir);
    if exec.argv.is_empty() || words.any(|word| word.contains('\0')) {
        let words = "a program needs a name, and none of its words can have a zero byte";
        return Err(refusal(Why::Nonsense, words.into()));
    }
    if let Some(words) = unusable(&exec.env) {
        return Err(refusal(Why::Nonsense, words));
    }
    let dir = Path::new(exec.dir.as_deref().unwrap_or("/"));
    if !dir.is_dir() {
        let words = format!("the guest has no directory {}", dir.display());
        return Err(refusal(Why::NotFound, words));
    }
    let mut command = Command::new(&exec.argv[0]);
    command.args(&exec.argv[1..]);
    command
        .env_clear()
        .env("HOME", home)
        .envs(guest_env.iter().chain(&exec.env).map(|(k, v)| (k, v)));
    command.current_dir(dir);
    Ok(command)
}

fn not_started(exec: &Exec, error: &io::Error) -> Refusal {
    let program = &exec.argv[0];
    match error.kind() {
        io::ErrorKind::NotFound => refusal(
            Why::NotFound,
            format!("the guest has no program {program:?}"),
        ),
        io::ErrorKind::PermissionDenied => refusal(
            Why::NotAllowed,
            format!("{program:?} may not be run in the guest: {error}"),
        ),
        io::ErrorKind::OutOfMemory | io::ErrorKind::WouldBlock => refusal(
            Why::Full,
            format!("the guest has no room to run {program:?}: {error}"),
        ),
        _ => refusal(
            Why::NotAllowed,
            format!("{program:?} cannot be run: {error}"),
        ),
    }
}

fn pipes(command: &mut Command) -> Result<Ends, Refusal> {
    let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(lacking("descriptors"));
    let (theirs, stdin) = pipe()?;
    command.stdin(Stdio::from(theirs));
    let (stdout, theirs) = pipe()?;
    command.stdout(Stdio::from(theirs));
    let (stderr, theirs) = pipe()?;
    command.stderr(Stdio::from(theirs));
    for ours in [&stdin, &stdout, &stderr] {
        never_block(ours)?;
    }
    Ok(Ends::Pipes {
        stdin,
        stdout,
        stderr,
    })
}

/// Nothing to read, and the guest's console to write to.
fn console(command: &mut Command) -> Result<Ends, Refusal> {
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
    let console = rustix::fs::open("/dev/console", flags, Mode::empty())
        .map_err(|errno| refusal(Why::NotFound, format!("the guest has no console: {errno}")))?;
    let more = console.try_clone().map_err(|error| {
        let words = format!("the guest has no descriptors left: {error}");
        refusal(Why::Full, words)
    })?;
    command.stdin(Stdio::null());
    command.stdout(Stdio::from(more));
    command.stderr(Stdio::from(console));
    Ok(Ends::Console)
}

fn terminal(
    command: &mut Command,
    size: Size,
    identity: Option<&Identity>,
) -> Result<Ends, Refusal> {
    let lacks = || lacking("terminals");
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags).map_err(lacks())?;
    rustix::pty::grantpt(&ours).map_err(lacks())?;
    rustix::pty::unlockpt(&ours).map_err(lacks())?;
    rustix::termios::tcsetwinsize(&ours, winsize(size)).map_err(lacks())?;
    let name = rustix::pty::ptsname(&ours, Vec::new()).map_err(lacks())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let theirs = rustix::fs::open(&*name, flags, Mode::empty()).map_err(lacks())?;
    if let Some(identity) = identity {
        // The program must be able to open its own terminal.
        let path = OsStr::from_bytes(name.to_bytes());
        let owner = Some(identity.uid.as_raw());
        std::os::unix::fs::chown(path, owner, None)
            .map_err(|error| refusal(Why::NotAllowed, format!("the terminal: {error}")))?;
    }
    let more = || {
        theirs.try_clone().map_err(|error| {
            refusal(
                Why::Full,
                format!("the guest has no descriptors left: {error}"),
            )
        })
    };
    command.stdin(Stdio::from(more()?));
    command.stdout(Stdio::from(more()?));
    command.stderr(Stdio::from(theirs));
    never_block(&ours)?;
    Ok(Ends::Terminal(Arc::new(ours)))
}

fn never_block(ours: &OwnedFd) -> Result<(), Refusal> {
    let flags = rustix::fs::fcntl_getfl(ours).map_err(lacking("descriptors"))?;
    rustix::fs::fcntl_setfl(ours, flags | OFlags::NONBLOCK).map_err(lacking("descriptors"))
}

impl Program {
    /// Moves its bytes, on threads that end with it.
    pub(crate) fn attend(self, session: &Arc<Session>) -> io::Result<()> {
        let Program { ends, ended, .. } = self;
        match ends {
            Ends::Pipes {
                stdin,
                stdout,
                stderr,
            } => {
                reader(session, &ended, Arc::new(stdout), Stream::Stdout)?;
                reader(session, &ended, Arc::new(stderr), Stream::Stderr)?;
                writer(session, &ended, Writes::Pipe(stdin))
            }
            Ends::Console => Ok(()),
            Ends::Terminal(ours) => {
                reader(session, &ended, ours.clone(), Stream::Stdout)?;
                writer(session, &ended, Writes::Terminal(ours))
            }
        }
    }
}

fn reader(
    session: &Arc<Session>,
    ended: &Arc<OwnedFd>,
    from: Arc<OwnedFd>,
    stream: Stream,
) -> io::Result<()> {
    let (session, ended) = (session.clone(), ended.clone());
    let read = move || {
        let mut buffer = vec![0; MAX_DATA];
        while let Some(room) = session.room(stream) {
            let most = room.min(buffer.len());
            match rustix::io::read(&*from, &mut buffer[..most]) {
                Ok(0) => break,
                Ok(count) => session.wrote(stream, &buffer[..count]),
                Err(Errno::INTR) => {}
                // What it wrote before it ended has come. What its children write after that is nobody's.
                Err(Errno::AGAIN) if session.has_exited() => break,
                Err(Errno::AGAIN) => wait_for(&from, PollFlags::IN, &ended),
                // A terminal that nobody has open any more says EIO.
                Err(_) => break,
            }
        }
        session.wrote_all(stream);
    };
    thread::Builder::new().name("output".into()).spawn(read)?;
    Ok(())
}

enum Writes {
    Pipe(OwnedFd),
    Terminal(Arc<OwnedFd>),
}

fn writer(session: &Arc<Session>, ended: &Arc<OwnedFd>, to: Writes) -> io::Result<()> {
    let (session, ended) = (session.clone(), ended.clone());
    let write = move || {
        let mut reads = true;
        while let Some(input) = session.input(MAX_DATA) {
            let fd = match &to {
                Writes::Pipe(fd) => fd,
                Writes::Terminal(fd) => fd,
            };
            match input {
                // Who sends it need not know that nobody reads it.
                Input::Bytes(bytes) => reads = reads && write_all(fd, &bytes, &session, &ended),
                Input::End => {
                    if let Writes::Terminal(fd) = &to {
                        write_all(fd, &[END_OF_TRANSMISSION], &session, &ended);
                    }
                    // The pipe closes with this thread.
                    return;
                }
            }
        }
    };
    thread::Builder::new().name("input".into()).spawn(write)?;
    Ok(())
}

/// Whether the program may read on.
fn write_all(to: &OwnedFd, mut bytes: &[u8], session: &Session, ended: &OwnedFd) -> bool {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if session.has_exited() => return false,
            Err(Errno::AGAIN) => wait_for(to, PollFlags::OUT, ended),
            Err(_) => return false,
        }
    }
    true
}

/// Waits until a descriptor is ready, or the program has ended.
fn wait_for(fd: impl AsFd, ready: PollFlags, ended: &OwnedFd) {
    let fd: BorrowedFd<'_> = fd.as_fd();
    let mut fds = [
        PollFd::from_borrowed_fd(fd, ready),
        PollFd::new(ended, PollFlags::IN),
    ];
    let _ = rustix::event::poll(&mut fds, None);
}
