//! A guest that is told that it is another VM, or that it is to be copied. Only what changes nothing of the machine
//! that the test runs on; the stories with real guests have the rest.

use std::fs;

use rekindle_agent::{
    Decoder, Exec, Exit, Fate, Frame, FromAgent, FromHost, PROTOCOL, Quiesce, Refusal, Vm, Wake,
    Why, Woken,
};

use crate::harness::{Agent, Line, exec, sh, until};

fn asks(agent: &Agent, message: &FromHost) -> FromAgent {
    let (stream, decoder) = (agent.connect(), Decoder::default());
    let mut line = Line { stream, decoder };
    line.send(&message.frame());
    match line.receive() {
        Some(Frame::Message(json)) => FromAgent::parse(&json).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn wake(id: &str) -> Wake {
    Wake {
        protocol: PROTOCOL,
        vm: Vm {
            name: "web".into(),
            id: id.into(),
        },
        ..Wake::default()
    }
}

fn wakes(agent: &Agent, wake: Wake) -> Woken {
    match asks(agent, &FromHost::Wake(Box::new(wake))) {
        FromAgent::Woken(woken) => woken,
        other => panic!("{other:?}"),
    }
}

fn refused(agent: &Agent, message: FromHost) -> Refusal {
    match asks(agent, &message) {
        FromAgent::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

fn secret(value: &str) -> Vec<(String, String)> {
    vec![("SECRET".into(), value.into())]
}

#[test]
fn every_program_from_then_on_has_the_environment_of_the_last_waking() {
    let agent = Agent::start();
    let said = |name| agent.sh(name, "echo ${SECRET:-none}").1;
    assert_eq!(said("a"), "none\n");
    wakes(
        &agent,
        Wake {
            env: secret("one"),
            ..wake("1")
        },
    );
    assert_eq!(said("b"), "one\n");
    let own = Exec {
        env: secret("own"),
        ..exec(&["/bin/sh", "-c", "echo $SECRET"])
    };
    assert_eq!(agent.call("c", own).finish().1, "own\n");
    wakes(&agent, wake("2"));
    assert_eq!(said("d"), "none\n");
}

#[test]
fn programs_of_before_go_on_without_the_callers_that_are_another_vms() {
    let agent = Agent::start();
    let done = agent.dir.path().join("done");
    let script = format!(
        "echo begun; cat; head -c 1000000 /dev/zero; echo > {}",
        done.display()
    );
    let lives_on = Exec {
        fate: Fate::LivesOn,
        ..sh(&script)
    };
    let mut lives_on = agent.call("lives-on", lives_on);
    lives_on.hears("begun");
    let ends = Exec {
        fate: Fate::EndsAfterMs(1),
        ..sh("echo $$; exec sleep 1000")
    };
    let mut ends = agent.call("ends", ends);
    ends.hears("\n");
    let pid = String::from_utf8(ends.out.clone()).unwrap();
    let pid: u32 = pid.trim().parse().unwrap();

    let woken = wakes(&agent, wake("copy"));
    let orphans = woken.orphans.iter();
    let orphans: Vec<_> = orphans
        .map(|o| (o.session.to_string(), o.ends_after_ms))
        .collect();
    let expected = [("lives-on".to_owned(), None), ("ends".to_owned(), Some(1))];
    assert_eq!(orphans, expected);
    assert_eq!(woken.orphans[1].pid, pid);
    // It has no input any more, and more output than is kept for anybody.
    until("it has gone on", || done.exists());
    until("it was killed", || {
        !fs::exists(format!("/proc/{pid}")).unwrap()
    });
    assert_eq!(ends.line.receive(), None);
    let (why, words) = agent.refusal("lives-on", sh("echo twice"));
    assert_eq!(why, Why::NoSession, "{words}");
    assert!(words.contains("copy of"), "{words}");
}

#[test]
fn who_hears_the_same_twice_does_it_once() {
    let agent = Agent::start();
    let mut before = agent.call("before", sh("echo begun; cat"));
    before.hears("begun");
    let woken = wakes(&agent, wake("copy"));
    assert_eq!(woken.orphans.len(), 1);
    let mut since = agent.call("since", sh("echo begun; cat; exit 3"));
    since.hears("begun");
    assert_eq!(wakes(&agent, wake("copy")), woken);
    assert_eq!(since.finish().0, Exit::Status(3));
}

#[test]
fn nobody_wakes_or_stands_still_for_another_protocol_or_for_nonsense() {
    let agent = Agent::start();
    let protocol = PROTOCOL + 1;
    let asked = Wake {
        protocol,
        ..wake("1")
    };
    let refusal = refused(&agent, FromHost::Wake(Box::new(asked)));
    assert_eq!(refusal.why, Why::Protocol, "{refusal}");
    let mut quiesce = Quiesce {
        protocol,
        within_ms: 0,
        thaw_after_ms: 1,
    };
    let refusal = refused(&agent, FromHost::Quiesce(quiesce));
    assert_eq!(refusal.why, Why::Protocol, "{refusal}");
    let asked = Wake {
        env: vec![("A=B".into(), "C".into())],
        ..wake("1")
    };
    let refusal = refused(&agent, FromHost::Wake(Box::new(asked)));
    assert_eq!(refusal.why, Why::Nonsense, "{refusal}");
    assert!(refusal.words.contains("A=B"), "{refusal}");
    // There is no time at all, so that nothing of this machine is frozen.
    quiesce.protocol = PROTOCOL;
    let refusal = refused(&agent, FromHost::Quiesce(quiesce));
    assert_eq!(refusal.why, Why::TooLate, "{refusal}");
}
