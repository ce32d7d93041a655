//! Programs run for a caller by a real agent, which listens on a Unix socket instead of vsock.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use rekindle_agent::{
    Decoder, Exit, Fate, Frame, FromAgent, FromHost, Hello, PROTOCOL, Received, Size, Stream, Why,
};

use crate::harness::{Agent, Call, Line, exec, sh, until};

/// Not random, but all over the place.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

#[test]
fn a_program_has_its_output_its_complaints_and_its_status() {
    let agent = Agent::start();
    let (exit, out, err) = agent.sh("a", "echo out; echo err >&2; exit 3");
    assert_eq!((exit, &*out, &*err), (Exit::Status(3), "out\n", "err\n"));
    let (exit, out, err) = agent.call("b", exec(&["true"])).finish();
    assert_eq!((exit, &*out, &*err), (Exit::Status(0), "", ""));
}

#[test]
fn every_byte_goes_through_once_wherever_connections_break() {
    let agent = Agent::start();
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    let input: Vec<u8> = (0..8 << 20)
        .map(|_| dice.roll(256).to_le_bytes()[0])
        .collect();
    let mut call = agent.call("cat", exec(&["cat"]));
    let (mut written, mut breaks) = (0, 0);
    while call.caller.outcome().is_none() {
        let count = call.caller.room().min(input.len() - written);
        if count > 0 {
            call.caller.write(&input[written..written + count]);
            written += count;
            if written == input.len() {
                call.caller.end_input();
            }
        }
        if dice.roll(10) == 0 {
            // Some of what is to be sent goes down with the connection.
            if let Some(frame) = call.caller.next_frame() {
                call.line.send(&frame);
            }
            call.breaks();
            breaks += 1;
        }
        call.step().unwrap();
    }
    assert!(breaks > 10, "only {breaks} connections broke");
    assert_eq!(call.caller.outcome(), Some(Exit::Status(0)));
    assert!(
        call.out == input,
        "{} bytes of {}",
        call.out.len(),
        input.len()
    );
}

#[test]
fn many_programs_run_at_once() {
    let agent = Agent::start();
    thread::scope(|scope| {
        for n in 0..20 {
            let agent = &agent;
            scope.spawn(move || {
                let script = format!("head -c 1000000 /dev/zero | wc -c; echo {n}; exit {n}");
                let (exit, out, _) = agent.sh(&format!("n-{n}"), &script);
                assert_eq!((exit, out), (Exit::Status(n), format!("1000000\n{n}\n")));
            });
        }
    });
}

#[test]
fn a_program_has_the_environment_directory_and_user_that_were_asked_for() {
    let agent = Agent::start();
    let mut asked = sh("pwd; echo $COLOUR; env | wc -l");
    asked.env.push(("COLOUR".into(), "green blue".into()));
    asked.dir = Some("/tmp".into());
    let (_, out, _) = agent.call("a", asked).finish();
    // The shell adds its own three.
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..2], ["/tmp", "green blue"], "{out}");
    assert!(lines[2].parse::<u32>().unwrap() <= 6, "{out}");
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tried: another user, which needs root");
        return;
    }
    let mut asked = sh("id -u; id -g; id -G");
    asked.user = Some("65534:12345".into());
    let (_, out, _) = agent.call("b", asked).finish();
    assert_eq!(out, "65534\n12345\n12345\n");
}

#[test]
fn a_signal_reaches_the_program_and_its_children() {
    let agent = Agent::start();
    let mut call = agent.call("a", sh("sleep 1000 & echo up; wait"));
    call.hears("up");
    call.line.send(&FromHost::Signal { number: 15 }.frame());
    let (exit, ..) = call.finish();
    assert_eq!(exit, Exit::Signal(15));
}

#[test]
fn a_program_is_interrupted_though_its_agent_is_not() {
    let agent = Agent::start();
    let (exit, ..) = agent.sh("a", "kill -INT $$; exit 5");
    assert_eq!(exit, Exit::Signal(2));
}

#[test]
fn a_program_that_asks_for_one_has_a_terminal() {
    let agent = Agent::start();
    let size = |rows, columns| Size { rows, columns };
    let mut asked = sh("tty; stty size; read line; stty size; echo \"got $line\" >&2");
    asked.tty = Some(size(31, 117));
    let mut call = agent.call("a", asked);
    call.hears("31 117");
    assert!(String::from_utf8_lossy(&call.out).starts_with("/dev/pts/"));
    call.line.send(&FromHost::Resize(size(20, 40)).frame());
    call.caller.write(b"hello\n");
    call.hears("got hello");
    let (exit, out, err) = call.finish();
    assert!(out.contains("20 40"), "{out}");
    assert_eq!((exit, &*err), (Exit::Status(0), ""));

    // The end of the input ends who reads it, and Ctrl-C whoever is in front.
    let mut asked = exec(&["cat"]);
    asked.tty = Some(size(24, 80));
    let (exit, ..) = agent.call("b", asked.clone()).finish();
    assert_eq!(exit, Exit::Status(0));
    let mut call = agent.call("c", asked);
    call.caller.write(b"hi\n");
    call.hears("hi\r\nhi");
    call.caller.write(b"\x03");
    let (exit, ..) = call.finish();
    assert_eq!(exit, Exit::Signal(2));
}

#[test]
fn what_cannot_be_run_is_refused_with_the_reason() {
    let agent = Agent::start();
    let not_found = agent.refusal("a", exec(&["no-such-program"]));
    assert_eq!(not_found.0, Why::NotFound);
    assert!(
        not_found.1.contains("no program \"no-such-program\""),
        "{}",
        not_found.1
    );
    let mut nowhere = exec(&["true"]);
    nowhere.dir = Some("/no/such/place".into());
    let said = agent.refusal("b", nowhere);
    assert_eq!(
        said,
        (
            Why::NotFound,
            "the guest has no directory /no/such/place".into()
        )
    );
    let mut nobody = exec(&["true"]);
    nobody.user = Some("no-such-user".into());
    assert_eq!(agent.refusal("c", nobody).0, Why::NotFound);
    assert_eq!(
        agent.refusal("d", exec(&["/etc/passwd"])).0,
        Why::NotAllowed
    );
    assert_eq!(agent.refusal("e", exec(&[])).0, Why::Nonsense);
    assert_eq!(agent.refusal("f", exec(&["a\0b"])).0, Why::Nonsense);
    let mut odd = exec(&["true"]);
    odd.env.push(("A=B".into(), "C".into()));
    assert_eq!(agent.refusal("g", odd).0, Why::Nonsense);
    // A name that was refused is free.
    assert_eq!(agent.sh("a", "exit 4").0, Exit::Status(4));
}

fn ask(agent: &Agent, message: &FromHost) -> FromAgent {
    let stream = agent.connect();
    let decoder = Decoder::default();
    let mut line = Line { stream, decoder };
    line.send(&message.frame());
    match line.receive() {
        Some(Frame::Message(json)) => FromAgent::parse(&json).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_version_of_the_protocol_is_refused_and_ping_tells_which_it_is() {
    let agent = Agent::start();
    let open = |protocol, exec| FromHost::Open {
        protocol,
        session: "s".parse().unwrap(),
        exec,
        received: Received::default(),
    };
    let FromAgent::Refused(refusal) = ask(&agent, &open(PROTOCOL + 1, None)) else {
        panic!("it was not refused");
    };
    assert_eq!(refusal.why, Why::Protocol);
    assert!(
        refusal.words.contains("version 1 of the protocol, not 2"),
        "{refusal}"
    );
    let FromAgent::Refused(refusal) = ask(&agent, &open(PROTOCOL, None)) else {
        panic!("it was not refused");
    };
    assert_eq!(refusal.why, Why::NoSession);
    let FromAgent::Pong(Hello { protocol, .. }) = ask(&agent, &FromHost::Ping) else {
        panic!("it is not there");
    };
    assert_eq!(protocol, PROTOCOL);
}

#[test]
fn a_program_ends_without_its_caller_unless_it_is_to_live_on() {
    let agent = Agent::start();
    let pid_file = agent.dir.path().join("pid");
    let mut asked = sh(&format!(
        "echo $$ > {}; echo up; exec sleep 1000",
        pid_file.display()
    ));
    asked.fate = Fate::EndsAfterMs(50);
    let mut call = agent.call("a", asked);
    call.hears("up");
    drop(call);
    let proc = PathBuf::from("/proc").join(std::fs::read_to_string(&pid_file).unwrap().trim());
    until("the program is gone", || !proc.exists());

    let left = agent.dir.path().join("left");
    let script = format!(
        "echo up; read line; echo went on > {}; exit 7",
        left.display()
    );
    let mut asked = sh(&script);
    asked.fate = Fate::LivesOn;
    let mut call = agent.call("b", asked);
    call.hears("up");
    let mut caller = call.caller;
    drop(call.line);
    // Its end is known to who comes back.
    let line = Line::open(agent.connect(), &mut caller);
    caller.write(b"\n");
    let mut call = Call {
        agent: &agent,
        caller,
        line,
        out: Vec::new(),
        err: Vec::new(),
    };
    while call.caller.next_frame().is_none() {
        call.step().unwrap();
    }
    call.breaks();
    call.step().unwrap();
    let (exit, ..) = call.finish();
    assert_eq!(exit, Exit::Status(7));
    assert_eq!(std::fs::read_to_string(left).unwrap(), "went on\n");
}

#[test]
fn the_end_of_a_program_does_not_wait_for_what_it_left_behind() {
    let agent = Agent::start();
    let (exit, out, _) = agent.sh("a", "sleep 1000 & echo $!");
    assert_eq!(exit, Exit::Status(0));
    let left: i32 = out.trim().parse().unwrap();
    let left = rustix::process::Pid::from_raw(left).unwrap();
    rustix::process::kill_process(left, rustix::process::Signal::KILL).unwrap();
    // The agent is its parent now, and waits for it.
    let proc = PathBuf::from(format!("/proc/{}", left.as_raw_nonzero()));
    until("what was left is gone", || !proc.exists());
}

#[test]
fn nonsense_costs_a_caller_its_connection_and_nobody_else_anything() {
    let agent = Agent::start();
    let mut witness = agent.call("witness", exec(&["cat"]));
    witness.caller.write(b"before");
    witness.hears("before");
    let idle: Vec<UnixStream> = (0..50).map(|_| agent.connect()).collect();
    let mut dice = Dice(77);
    for _ in 0..200 {
        let mut stream = agent.connect();
        let count = dice.roll(60) + 1;
        let mut bytes: Vec<u8> = (0..count)
            .map(|_| dice.roll(256).to_le_bytes()[0])
            .collect();
        if dice.roll(2) == 0 && bytes.len() > 5 {
            // A length that can be.
            bytes[..5].copy_from_slice(&[1, 0, 0, 0, 0]);
        }
        let _ = stream.write_all(&bytes);
    }
    for frame in [
        FromHost::Forget.frame(),
        Frame::Ack {
            stream: Stream::Stdout,
            offset: 9,
        },
        Frame::Message(b"{".to_vec()),
    ] {
        let stream = agent.connect();
        let decoder = Decoder::default();
        let mut line = Line { stream, decoder };
        line.send(&frame);
        assert_eq!(line.receive(), None, "{frame:?}");
    }
    // In the middle of a session, too: the program goes on, and its caller may come back.
    let stream = Stream::Stdin;
    let offset = 1 << 40;
    let bytes = vec![0];
    witness.line.send(&Frame::Data {
        stream,
        offset,
        bytes,
    });
    assert_eq!(witness.line.receive(), None);
    witness.breaks();
    witness.caller.write(b" and after");
    witness.hears(" and after");
    let (exit, out, _) = witness.finish();
    assert_eq!((exit, &*out), (Exit::Status(0), "before and after"));
    drop(idle);
}

#[test]
fn who_does_not_read_stops_the_program_and_not_the_agent() {
    let agent = Agent::start();
    let mut call = agent.call("a", sh("head -c 50000000 /dev/zero"));
    // Frames come until there is no room, and nothing is read of them: that is all that comes.
    let mut came = 0;
    while came < rekindle_agent::WINDOW {
        let frame = call.line.receive().unwrap();
        if let Frame::Data { bytes, .. } = &frame {
            came += bytes.len();
        }
        call.caller.receive(frame).unwrap();
    }
    assert_eq!(came, rekindle_agent::WINDOW);
    assert_eq!(agent.sh("b", "echo it answers").1, "it answers\n");
    let (exit, out, _) = call.finish();
    assert_eq!((exit, out.len()), (Exit::Status(0), 50_000_000));
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let peak = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    let kib: u64 = peak
        .split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    assert!(kib < 32 << 10, "{peak}");
}
