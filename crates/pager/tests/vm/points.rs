//! What must be right in a page server: thirteen points, each of which was a bug in somebody's.

use std::fs::{self, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_kit::huge_pages::HugePages;
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use rekindle_kit::uffd::{Build, FakeVm, Handed, Handshake, Order, Zeros};
use rekindle_pager::{BadPage, Ended, KillReason, Options, Socket, Source};

use crate::scene::{Pager, Plan, Scene, let_it_wait, mixed, saw, until_they_fault};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        Story::new(
            "1: a fault is served before the one who loads goes on",
            load_faults,
        ),
        Story::new(
            "2: one message without an end is understood, and what it says too much",
            one_message,
        ),
        Story::new("3: a descriptor that blocks is made not to", blocking),
        Story::new(
            "4: a removal is applied before a fault that was read first",
            remove_first,
        ),
        Story::new("5: a removed page is zero for ever", removed_is_zero),
        Story::new(
            "5: an answer that a removal puts off comes all the same",
            put_off,
        ),
        Story::new(
            "6: a page that is already there wakes who waits for it",
            already_there,
        ),
        Story::new("7: the page server ends when the VM does", vm_dies),
        Story::new(
            "7: a connection that is closed early is not the VM's end",
            early_hang_up,
        ),
        Story::new(
            "8: no way out of the page server leaves a guest waiting",
            no_way_out,
        ),
        Story::new("9: the page server's descriptor outlives the VM", last_copy),
        Story::new("10: huge pages are served whole, zeros too", huge_pages),
        Story::new(
            "11: a Full snapshot reads every page through the page server",
            full_snapshot,
        ),
        Story::new(
            "12: zero, written and unchanged are not mixed up",
            written_zeros,
        ),
        Story::new(
            "13: what comes from outside is checked against the memory's bounds",
            bounds,
        ),
        Story::new(
            "a file cut short kills the VM before it reads a wrong byte",
            cut_short,
        ),
        Story::new(
            "pages that are zero come in without a copy",
            zeros_are_not_copied,
        ),
        Story::new(
            "neighbours that fault together are answered together",
            neighbours,
        ),
    ]
}

fn load_faults() -> anyhow::Result<()> {
    let scene = Plan::of((1..=64).collect()).set()?;
    // One thread connects, sends and touches memory, as `/snapshot/load` does, and cannot go on without.
    let mut load = scene.vm.thread()?;
    load.begin(&scene.handshake())?;
    let pages = [7, 30, 50];
    for page in pages {
        load.begin(&Order::Read { page, count: 1 })?;
    }
    load.finish()?.context("the VM died")?;
    for page in pages {
        ensure!(saw(&mut load)? == [scene.stamps[page]]);
    }
    ensure!(scene.finish()?.faults >= 3);
    Ok(())
}

fn one_message() -> anyhow::Result<()> {
    let older = |json: String| json.replace("\"page_size\":4096,", "");
    let oldest = |json: String| older(json).replace(",\"page_size_kib\":4096", "");
    let newer =
        |json: String| json.replace('}', ",\"gpa_start\":0,\"is_guest_memfd\":false,\"x\":[{}]}");
    let wordings: [&dyn Fn(String) -> String; 4] = [&|json| json, &older, &oldest, &newer];
    for wording in wordings {
        let scene = Plan::of(mixed(64)).set()?;
        let mut thread = scene.vm.thread()?;
        let message = match thread.ask(&Order::Describe)? {
            rekindle_kit::uffd::Answer::Text(json) => wording(json),
            other => anyhow::bail!("{other:?}"),
        };
        thread.ask(&Order::Handshake(Handshake {
            socket: scene.pager.socket(),
            message: Some(message),
            hand: vec![Handed::Uffd, Handed::Null, Handed::Null],
        }))?;
        ensure!(thread.read(0, 64)? == scene.stamps);
        scene.finish()?;
    }
    Ok(())
}

fn blocking() -> anyhow::Result<()> {
    let mut plan = Plan::of(mixed(64));
    plan.build.blocking = true;
    let scene = plan.set()?;
    let mut thread = scene.vm.thread()?;
    thread.ask(&scene.handshake())?;
    ensure!(thread.read(0, 64)? == scene.stamps);
    scene.finish()?;
    Ok(())
}

fn remove_first() -> anyhow::Result<()> {
    let scene = Plan::of(mixed(64)).set()?;
    // All of it waits in the descriptor before anybody reads it, and the kernel gives the faults first.
    let mut balloon = scene.vm.thread()?;
    balloon.begin(&Order::Remove {
        page: 16,
        count: 16,
    })?;
    let_it_wait();
    let mut inside = scene.reader(17, 1)?;
    let mut outside = scene.reader(33, 1)?;
    let_it_wait();
    scene.vm.thread()?.ask(&scene.handshake())?;
    ensure!(saw(&mut inside)? == [0], "the file's page came back");
    ensure!(saw(&mut outside)? == scene.stamps[33..34]);
    balloon.finish()?;
    let stats = scene.finish()?;
    ensure!(stats.removed == 16, "{stats:?}");
    Ok(())
}

fn removed_is_zero() -> anyhow::Result<()> {
    let (scene, mut thread) = Scene::served(64)?;
    ensure!(thread.read(0, 32)? == scene.stamps[..32]);
    // Some were in, some not; one had been written to.
    thread.ask(&Order::Write {
        page: 25,
        stamp: 99,
    })?;
    thread.ask(&Order::Remove {
        page: 24,
        count: 16,
    })?;
    ensure!(thread.read(24, 16)? == [0; 16]);
    // Again, and it is still not the file's.
    thread.ask(&Order::Remove { page: 24, count: 4 })?;
    ensure!(thread.read(24, 16)? == [0; 16]);
    thread.ask(&Order::Write { page: 26, stamp: 7 })?;
    ensure!(thread.read(26, 1)? == [7]);
    ensure!(thread.read(20, 4)? == scene.stamps[20..24]);
    ensure!(thread.read(40, 24)? == scene.stamps[40..]);
    ensure!(scene.finish()?.removed == 20);
    Ok(())
}

fn put_off() -> anyhow::Result<()> {
    const PAGES: usize = 8192;
    let (scene, mut thread) = Scene::served(PAGES)?;
    let mut balloon = scene.vm.thread()?;
    balloon.begin(&Order::Flood {
        page: 0,
        times: 4000,
    })?;
    ensure!(thread.read(1, PAGES - 1)? == scene.stamps[1..]);
    balloon.finish()?.context("the VM died")?;
    let stats = scene.finish()?;
    ensure!(stats.removed == 4000 && stats.retries > 0, "{stats:?}");
    Ok(())
}

fn already_there() -> anyhow::Result<()> {
    let scene = Plan::of((1..=64).collect()).set()?;
    // Three neighbours wait; then the middle one comes in by another way, and nobody is told.
    let mut waiting = (20..23)
        .map(|page| scene.reader(page, 1))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let_it_wait();
    scene.vm.thread()?.ask(&Order::Slip {
        page: 21,
        stamp: 1234,
    })?;
    ensure!(
        waiting[1].still_waits_after(Duration::from_millis(100))?,
        "nobody should have woken it"
    );
    scene.vm.thread()?.ask(&scene.handshake())?;
    let seen = waiting
        .iter_mut()
        .map(saw)
        .collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(seen == [[21], [1234], [23]], "{seen:?}");
    let stats = scene.finish()?;
    ensure!((stats.demand, stats.present) == (2, 1), "{stats:?}");
    Ok(())
}

fn vm_dies() -> anyhow::Result<()> {
    // Before its first fault, after some, and while a removal puts an answer off.
    for faults in [0, 10] {
        let (mut scene, mut thread) = Scene::served(64)?;
        thread.read(0, faults)?;
        let mut flood = scene.vm.thread()?;
        flood.begin(&Order::Flood {
            page: 60,
            times: faults * 1_000_000,
        })?;
        scene.vm.kill()?;
        ensure!(scene.pager.end()??.ended == Some(Ended::VmExited));
    }
    Ok(())
}

fn early_hang_up() -> anyhow::Result<()> {
    let (scene, mut thread) = Scene::served(64)?;
    thread.ask(&Order::HangUp)?;
    let_it_wait();
    ensure!(thread.read(0, 64)? == scene.stamps);
    scene.finish()?;
    Ok(())
}

/// The panic and the handshake that fails have tests of their own; here is the error in the middle.
fn no_way_out() -> anyhow::Result<()> {
    requires_root()?;
    // The descriptor is good, the regions are not: the VM would wait for ever.
    let mut scene = Plan::of((1..=64).collect()).set()?;
    let elsewhere =
        r#"[{"base_host_virt_addr":4294967296,"size":262144,"offset":0,"page_size":4096}]"#;
    let mut thread = scene.vm.thread()?;
    thread.ask(&Order::Handshake(Handshake {
        socket: scene.pager.socket(),
        message: Some(elsewhere.into()),
        hand: vec![Handed::Uffd],
    }))?;
    thread.begin(&Order::Read { page: 3, count: 1 })?;
    ensure!(thread.finish()?.is_none(), "it read something");
    let stats = scene.pager.end()??;
    ensure!(scene.vm.wait()?.signal() == Some(9));
    let stray = matches!(
        &stats.ended,
        Some(Ended::VmKilled {
            reason: KillReason::StrayFault { .. }
        })
    );
    ensure!(stray, "{:?}", stats.ended);
    Ok(())
}

fn last_copy() -> anyhow::Result<()> {
    let (mut scene, mut thread) = Scene::served(64)?;
    thread.ask(&Order::CloseDescriptor)?;
    ensure!(thread.read(0, 32)? == scene.stamps[..32]);
    // The page server holds the last copy now. If it let go of it before the VM is dead, this would read zeros.
    OpenOptions::new()
        .write(true)
        .open(scene.memory())?
        .set_len(0)?;
    thread.begin(&Order::Read { page: 33, count: 1 })?;
    ensure!(thread.finish()?.is_none(), "it read something");
    ensure!(scene.vm.wait()?.signal() == Some(9));
    ensure!(matches!(
        scene.pager.end()??.ended,
        Some(Ended::VmKilled { .. })
    ));
    Ok(())
}

fn huge_pages() -> anyhow::Result<()> {
    requires_root()?;
    let _allowed = HugePages::more(8)?;
    // Four large pages: with a hole inside, all hole, all data, and one byte of data.
    let mut stamps = mixed(512);
    stamps.extend([0; 512]);
    stamps.extend(1..=512);
    stamps.extend([0; 512]);
    stamps[1536 + 300] = 77;
    let mut plan = Plan::of(stamps);
    plan.build = Build {
        regions: vec![1024, 1024],
        huge: true,
        blocking: false,
    };
    let scene = plan.set()?;
    let mut thread = scene.vm.thread()?;
    thread.ask(&scene.handshake())?;
    for page in [1536 + 300, 0, 600, 1024 + 511] {
        ensure!(thread.read(page, 1)? == scene.stamps[page..=page]);
    }
    ensure!(thread.read(0, 2048)? == scene.stamps);
    thread.ask(&Order::Remove {
        page: 1024,
        count: 512,
    })?;
    ensure!(thread.read(1024, 512)? == [0; 512]);
    let stats = scene.finish()?;
    let large = (
        stats.page_size,
        stats.copied,
        stats.bytes,
        stats.zeroed,
        stats.removed,
    );
    ensure!(large == (2 << 20, 3, 6 << 20, 2, 1), "{stats:?}");
    Ok(())
}

fn full_snapshot() -> anyhow::Result<()> {
    let mut plan = Plan::of(mixed(3000));
    plan.build.regions = vec![1000, 1500, 500];
    let scene = plan.set()?;
    let mut thread = scene.vm.thread()?;
    thread.ask(&scene.handshake())?;
    let copy = scene.dir.path().join("copy");
    thread.ask(&Order::Dump { path: copy.clone() })?;
    ensure!(
        fs::read(copy)? == fs::read(scene.memory())?,
        "the snapshot is not the memory"
    );
    let stats = scene.finish()?;
    ensure!((stats.copied, stats.zeroed) == (2400, 600), "{stats:?}");
    Ok(())
}

fn written_zeros() -> anyhow::Result<()> {
    let (scene, mut thread) = Scene::served(64)?;
    // Zero in the snapshot, then written: it is what was written.
    thread.ask(&Order::Write { page: 10, stamp: 5 })?;
    ensure!(thread.read(10, 1)? == [5]);
    // Data in the snapshot, then zeroed by the guest: it is zero, whatever the file has.
    thread.ask(&Order::Write { page: 11, stamp: 0 })?;
    ensure!(thread.read(11, 1)? == [0]);
    scene.finish()?;
    crate::chains::a_chain_of_diffs()
}

fn bounds() -> anyhow::Result<()> {
    // The regions lie about the size, both ways; the file is the measure.
    for (pages, message) in [(63, "fewer"), (65, "more")] {
        let mut scene = Plan::of(mixed(64)).set()?;
        let mut other = FakeVm::start(&Build {
            regions: vec![pages],
            huge: false,
            blocking: false,
        })?;
        let mut thread = other.thread()?;
        // It may be killed before it can say that it is done.
        thread.begin(&scene.handshake())?;
        let refused = scene.pager.end()?.expect_err("the sizes differ");
        ensure!(
            format!("{refused:?}").contains("SizeMismatch"),
            "{message}: {refused:?}"
        );
        ensure!(other.wait()?.signal() == Some(9), "it would wait for ever");
        ensure!(scene.vm.is_alive()?, "the wrong one was killed");
    }
    Ok(())
}

fn cut_short() -> anyhow::Result<()> {
    for (length, page) in [(40 * 4096, 41_u64), (41 * 4096 + 100, 41), (0, 41)] {
        let (mut scene, mut thread) = Scene::served(64)?;
        thread.read(0, 20)?;
        OpenOptions::new()
            .write(true)
            .open(scene.memory())?
            .set_len(length)?;
        thread.begin(&Order::Read { page: 41, count: 1 })?;
        ensure!(
            thread.finish()?.is_none(),
            "the guest read a page that is not there"
        );
        ensure!(scene.vm.wait()?.signal() == Some(9));
        let stats = scene.pager.end()??;
        let offset = length.max(page * 4096);
        let bad = BadPage {
            file: scene.dir.path().join("memory"),
            page,
            offset,
            errno: None,
        };
        ensure!(
            stats.ended
                == Some(Ended::VmKilled {
                    reason: KillReason::BadPage(bad)
                }),
            "{:?}",
            stats.ended
        );
        let written = fs::read_to_string(scene.dir.path().join("stats.json"))?;
        ensure!(written.contains("\"bad_page\""), "{written}");
    }
    Ok(())
}

fn zeros_are_not_copied() -> anyhow::Result<()> {
    for zeros in [Zeros::Holes, Zeros::Written] {
        let mut plan = Plan::of(mixed(500));
        plan.zeros = zeros;
        let scene = plan.set()?;
        let mut thread = scene.vm.thread()?;
        thread.ask(&scene.handshake())?;
        ensure!(thread.read(0, 500)? == scene.stamps);
        let stats = scene.finish()?;
        ensure!(
            (stats.copied, stats.zeroed, stats.bytes) == (400, 100, 400 * 4096),
            "{stats:?}"
        );
        ensure!(stats.latency.p50_ns > 0 && stats.latency.p50_ns <= stats.latency.max_ns);
    }
    Ok(())
}

fn neighbours() -> anyhow::Result<()> {
    // Over the border of two regions, of data and zeros, with one page removed: all at once.
    let mut plan = Plan::of(mixed(64));
    plan.build.regions = vec![30, 34];
    let scene = plan.set()?;
    let mut balloon = scene.vm.thread()?;
    balloon.begin(&Order::Remove { page: 28, count: 1 })?;
    let_it_wait();
    let mut waiting = (20..44)
        .map(|page| scene.reader(page, 1))
        .collect::<anyhow::Result<Vec<_>>>()?;
    until_they_fault(scene.vm.pid(), waiting.len())?;
    scene.vm.thread()?.ask(&scene.handshake())?;
    for (page, thread) in (20..).zip(&mut waiting) {
        let expected = if page == 28 { 0 } else { scene.stamps[page] };
        ensure!(saw(thread)? == [expected], "page {page}");
    }
    ensure!(scene.finish()?.faults == 24);
    Ok(())
}

/// A page server for a snapshot of a store.
pub(crate) fn serve_snapshot(dir: &Path, snapshot: &Path) -> anyhow::Result<Pager> {
    let socket = Socket::Path(dir.join("pager.sock"));
    Pager::start(Options::new(socket, Source::Snapshot(snapshot.into())))
}
