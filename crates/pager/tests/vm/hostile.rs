//! Handshakes that no Firecracker sends, and sockets that are not what they seem.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use rekindle_kit::uffd::{
    Build, FakeVm, Handed, Handshake, Order, Zeros, babble, knock, write_memory,
};
use rekindle_pager::{HandshakeError, Options, PagerError, RegionError, Socket, Source, serve};

use crate::scene::{Plan, Scene, mixed, saw};
use crate::server::{Kept, Server, Serving, Takeover};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        Story::new(
            "a handshake that cannot be served kills who sent it",
            unservable,
        ),
        Story::new(
            "a stranger who brings no userfaultfd is refused, and lives",
            strangers,
        ),
        Story::new(
            "more descriptors than one are closed, and do no harm",
            many_descriptors,
        ),
        Story::new("who only knocks is not taken for the VM", knocking),
        Story::new("nobody is waited for longer than was said", timeout),
        Story::new(
            "a socket that somebody else bound is served, and left to them",
            inherited,
        ),
        Story::new(
            "what a page server says of itself leads its successor and its owner nowhere",
            lying_state,
        ),
        Story::new(
            "what is wrong before the handshake leaves no socket behind",
            nothing_behind,
        ),
    ]
}

/// A page server that somebody got hold of can write its state, and nothing else.
fn lying_state() -> anyhow::Result<()> {
    requires_root()?;
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let stamps = mixed(64);
    write_memory(&at("memory"), &stamps, Zeros::Holes)?;
    let secrets: Vec<u64> = (0..64).map(|page| 0x5ec2_0000 + page).collect();
    write_memory(&at("secret"), &secrets, Zeros::Holes)?;
    let serving = Serving {
        source: Source::Memory(at("memory")),
        socket: at("pager.sock"),
        state: at("pager.state"),
        stats: at("stats.json"),
        set: at("working-set"),
        rights: Kept::Nothing,
        deed: None,
    };
    let mut server = Server::start(&serving)?;
    let mut vm = FakeVm::start(&Build {
        regions: vec![stamps.len()],
        huge: false,
        blocking: false,
    })?;
    vm.thread()?.ask(&Order::handshake(&serving.socket))?;
    server.serves()?;
    let state = File::options()
        .read(true)
        .write(true)
        .open(at("pager.state"))?;
    for (true_name, false_name) in [
        ("/memory\"", "/secret\""),
        ("/stats.json\"", "/other.json\""),
        ("/working-set\"", "/another-set\""),
    ] {
        let mut text = vec![0; 4096];
        state.read_exact_at(&mut text, 4 * 4096)?;
        let found = text
            .windows(true_name.len())
            .position(|window| window == true_name.as_bytes());
        let found = u64::try_from(found.context("its name")?)?;
        state.write_all_at(false_name.as_bytes(), 4 * 4096 + found)?;
    }
    server.hand_over(vm.pid(), Takeover::Dead)?;
    server.serves()?;
    let mut thread = vm.thread()?;
    thread.begin(&Order::Read { page: 0, count: 64 })?;
    ensure!(saw(&mut thread)? == stamps, "another file was served");
    vm.kill()?;
    vm.wait()?;
    server.end()?;
    for (name, is_there) in [
        ("stats.json", true),
        ("working-set", true),
        ("other.json", false),
        ("another-set", false),
    ] {
        ensure!(at(name).exists() == is_there, "{name}");
    }
    Ok(())
}

fn shake(scene: &Scene, message: Option<String>, hand: Vec<Handed>) -> anyhow::Result<()> {
    let socket = scene.pager.socket();
    // The VM may be killed before it can say that it is done.
    let mut thread = scene.vm.thread()?;
    thread.begin(&Order::Handshake(Handshake {
        socket,
        message,
        hand,
    }))?;
    thread.finish()?;
    Ok(())
}

fn handshake_error(error: PagerError) -> anyhow::Result<HandshakeError> {
    match error {
        PagerError::Handshake(error) => Ok(error),
        other => Err(other.into()),
    }
}

fn unservable() -> anyhow::Result<()> {
    type Check = fn(&HandshakeError) -> bool;
    use HandshakeError as E;
    let one = |base: u64, size: u64, offset: u64, page: u64| {
        format!(
            r#"[{{"base_host_virt_addr":{base},"size":{size},"offset":{offset},"page_size":{page}}}]"#
        )
    };
    let regions: Check = |e| matches!(e, E::Regions(_));
    let parse: Check = |e| matches!(e, E::Parse(_));
    let cases: Vec<(String, Check)> = vec![
        ("[]".into(), |e| matches!(e, E::Regions(RegionError::None))),
        (String::from("\0"), parse),
        ("[{".into(), parse),
        (r#"{"base_host_virt_addr":0}"#.into(), parse),
        (
            r#"[{"base_host_virt_addr":-1,"size":1,"offset":0}]"#.into(),
            parse,
        ),
        (
            r#"[{"base_host_virt_addr":1e3,"size":4096,"offset":0}]"#.into(),
            parse,
        ),
        (one(4096, 64 * 4096, 0, 8192), |e| {
            matches!(e, E::Regions(RegionError::PageSize { .. }))
        }),
        (one(4096, 64 * 4096, 4096, 4096), regions),
        (one(4097, 64 * 4096, 0, 4096), regions),
        (one(u64::MAX - 4095, 64 * 4096, 0, 4096), regions),
        (one(4096, u64::MAX - 4095, 0, 4096), regions),
        (one(4096, 65 * 4096, 0, 4096), |e| {
            matches!(e, E::Regions(RegionError::SizeMismatch { .. }))
        }),
        ("[".repeat(10_000), parse),
        (" ".repeat(70_000), |e| {
            matches!(e, E::TooLong { .. } | E::Parse(_))
        }),
    ];
    for (message, expected) in cases {
        let mut scene = Plan::of(mixed(64)).set()?;
        let name: String = message.chars().take(100).collect();
        shake(&scene, Some(message), vec![Handed::Uffd])?;
        let error = handshake_error(scene.pager.end()?.expect_err("nobody can serve this"))?;
        ensure!(expected(&error), "{name}: {error:?}");
        ensure!(
            scene.vm.wait()?.signal() == Some(9),
            "{name}: it would wait for ever"
        );
    }
    Ok(())
}

fn strangers() -> anyhow::Result<()> {
    let mut scene = Plan::of(mixed(64)).set()?;
    shake(&scene, None, vec![])?;
    let error = handshake_error(scene.pager.end()?.expect_err("no descriptor"))?;
    ensure!(matches!(error, HandshakeError::NoDescriptor), "{error:?}");
    ensure!(scene.vm.is_alive()?);

    let mut scene = Plan::of(mixed(64)).set()?;
    shake(&scene, None, vec![Handed::Null, Handed::Uffd])?;
    let error = handshake_error(scene.pager.end()?.expect_err("not a userfaultfd"))?;
    ensure!(
        matches!(error, HandshakeError::NotAUserfaultfd),
        "{error:?}"
    );
    ensure!(scene.vm.is_alive()?);

    let scene = Plan::of(mixed(64)).set()?;
    babble(&scene.pager.socket(), b"GET / HTTP/1.1\r\n\r\n")?;
    let error = handshake_error(scene.pager.end()?.expect_err("an HTTP client"))?;
    ensure!(matches!(error, HandshakeError::NoDescriptor), "{error:?}");
    Ok(())
}

fn open_descriptors() -> anyhow::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

fn many_descriptors() -> anyhow::Result<()> {
    let scene = Plan::of(mixed(64)).set()?;
    let mut hand = vec![Handed::Null; 253];
    hand[0] = Handed::Uffd;
    shake(&scene, None, hand)?;
    let mut thread = scene.vm.thread()?;
    ensure!(thread.read(0, 64)? == scene.stamps);
    // Other stories run beside this one, but none of them opens so many.
    ensure!(
        open_descriptors()? < 200,
        "{} are open",
        open_descriptors()?
    );
    scene.finish()?;
    Ok(())
}

fn knocking() -> anyhow::Result<()> {
    let scene = Plan::of(mixed(64)).set()?;
    for _ in 0..20 {
        knock(&scene.pager.socket())?;
    }
    let second = Options::new(
        Socket::Path(scene.pager.socket()),
        Source::Memory(scene.memory()),
    );
    let refused = serve(second, |_| panic!("two at one socket")).expect_err("it is in use");
    ensure!(matches!(refused, PagerError::Listen(_)), "{refused:?}");
    let mut thread = scene.vm.thread()?;
    thread.ask(&scene.handshake())?;
    ensure!(thread.read(0, 64)? == scene.stamps);
    scene.finish()?;
    Ok(())
}

fn timeout() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let memory = dir.path().join("memory");
    rekindle_kit::uffd::write_memory(&memory, &[1], rekindle_kit::uffd::Zeros::Holes)?;
    let socket = dir.path().join("pager.sock");
    let mut options = Options::new(Socket::Path(socket.clone()), Source::Memory(memory));
    options.timeout = Some(Duration::from_millis(50));
    // One who connects and says nothing is no reason to wait longer.
    let mut silent = None;
    let served = serve(options, |ready| {
        silent = std::os::unix::net::UnixStream::connect(&ready.listening).ok()
    });
    let error = handshake_error(served.expect_err("nobody spoke"))?;
    ensure!(matches!(error, HandshakeError::Timeout { .. }), "{error:?}");
    ensure!(silent.is_some());
    ensure!(!socket.exists());
    Ok(())
}

fn inherited() -> anyhow::Result<()> {
    let scene = Plan::of(mixed(64)).set()?;
    let path = scene.dir.path().join("other.sock");
    let listener = UnixListener::bind(&path)?;
    let socket = Socket::Listener {
        listener: listener.into(),
        path: path.clone(),
    };
    // Who connects before the page server runs is served all the same.
    let mut thread = scene.vm.thread()?;
    thread.ask(&Order::handshake(&path))?;
    let options = Options::new(socket, Source::Memory(scene.memory()));
    let server = std::thread::spawn(|| serve(options, |_| {}));
    ensure!(thread.read(0, 64)? == scene.stamps);
    let Scene { mut vm, pager, .. } = scene;
    vm.kill()?;
    let stats = server.join().expect("it does not panic")?;
    ensure!(stats.copied > 0);
    ensure!(path.exists(), "it was not ours to remove");
    // The scene's own page server has waited all the time; it goes when it is refused.
    babble(&pager.socket(), b"x")?;
    ensure!(pager.end()?.is_err());
    Ok(())
}

fn nothing_behind() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("pager.sock");
    let missing = Source::Memory(dir.path().join("memory"));
    let error = serve(Options::new(Socket::Path(socket.clone()), missing), |_| {
        panic!("not ready")
    });
    ensure!(matches!(error, Err(PagerError::Source(_))), "{error:?}");
    ensure!(!socket.exists());
    Ok(())
}
