//! A snapshot goes away into an object store and comes back in another state directory, over a good line and a bad one.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::ensure;
use rekindle_e2e::s3::{BUCKET, Fault, Line, S3, SECRET};
use rekindle_e2e::{Rekindle, Said, finish, until};
use rekindle_kit::dice::Dice;
use rekindle_kit::story::Story;

use crate::bare::pattern;
use crate::memory::{copies_are_right, filled, goes_on};
use crate::story;

/// What the store adds to each request.
pub(crate) const LATENCY: Duration = Duration::from_millis(20);

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a snapshot travels by an object store", by_a_bucket),
        story(
            "pushes and pulls over a bad line are right or say why not, and none hangs",
            over_a_bad_line,
        ),
        story(
            "whoever is killed on the way to an object store leaves the next one to complete",
            killed_on_the_way,
        ),
        story(
            "what an object store refuses is said, and no secret with it",
            refused,
        ),
    ]
}

/// Runs a command that speaks with the store.
pub(crate) fn tries(rekindle: &Rekindle, s3: &S3, line: &str) -> anyhow::Result<Said> {
    let mut command = rekindle.command(line);
    s3.known_to(&mut command);
    let said = finish(command, line)?;
    ensure!(!format!("{said:?}").contains(SECRET), "{said:?}");
    Ok(said)
}

/// The size of the drive.
const DISK: u64 = 20 << 20;

/// A base and a Diff of it, called `base` and `later`.
pub(crate) fn lineage(rekindle: &Rekindle) -> anyhow::Result<()> {
    // What cannot be compressed, so that there are several packs.
    let (disk, mut dice) = (rekindle.file("noise"), Dice::of(1));
    let noise: Vec<u8> = (0..DISK / 8)
        .flat_map(|_| dice.number().to_le_bytes())
        .collect();
    std::fs::write(&disk, noise)?;
    let guest = rekindle.guest(&pattern())?;
    rekindle.does(&format!(
        "run {guest} --disk {} --track-dirty-pages --name original --detach",
        disk.display()
    ))?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name later --diff")?;
    rekindle.does("rm --force original").map(drop)
}

fn by_a_bucket(rekindle: &Rekindle) -> anyhow::Result<()> {
    lineage(rekindle)?;
    let s3 = S3::start(&rekindle.file("s3"), Line::of(LATENCY))?;
    let place = s3.url("a/prefix");

    let first = tries(rekindle, &s3, &format!("snapshot push base {place} --json"))?.json()?;
    ensure!(first["snapshots"] == 1, "{first}");
    let later = tries(
        rekindle,
        &s3,
        &format!("snapshot push later {place} --json"),
    )?
    .json()?;
    ensure!(
        later["snapshots"] == 1 && later["url"] == format!("{place}/later"),
        "{later}"
    );
    let bytes = |pushed: &serde_json::Value| pushed["bytes"].as_u64().unwrap_or(0);
    ensure!(
        bytes(&first) > DISK && bytes(&later) < DISK / 4,
        "{first} {later}"
    );
    let again = tries(
        rekindle,
        &s3,
        &format!("snapshot push later {place} --json"),
    )?
    .json()?;
    ensure!(again["snapshots"] == 0 && again["bytes"] == 0, "{again}");

    let elsewhere = Rekindle::new()?;
    let pulled = tries(
        &elsewhere,
        &s3,
        &format!("snapshot pull {place}/later --json"),
    )?
    .json()?;
    ensure!(
        pulled["snapshots"] == 2 && pulled["name"] == "later",
        "{pulled}"
    );
    elsewhere.does("snapshot verify later")?;
    ensure!(
        elsewhere.tells("snapshot inspect later")? == rekindle.tells("snapshot inspect later")?
    );
    copies_are_right(&elsewhere, "later")?;
    elsewhere.leaves_nothing()?;

    // What is in the cache does not travel again.
    let before = s3.line().packs_read();
    ensure!(before > DISK, "{before}");
    tries(&elsewhere, &s3, &format!("snapshot pull {place}/later"))?.done()?;
    let again = s3.line().packs_read() - before;
    ensure!(again == 0, "{again} bytes came again");
    elsewhere.leaves_nothing()?;

    // Two at once: both succeed.
    let both = format!("snapshot push later {}", s3.url("both"));
    std::thread::scope(|scope| {
        let two = [0, 1].map(|_| scope.spawn(|| tries(rekindle, &s3, &both)?.done()));
        two.into_iter()
            .try_for_each(|one| one.join().expect("it does not panic").map(drop))
    })?;
    tries(
        &elsewhere,
        &s3,
        &format!("snapshot pull {}/later", s3.url("both")),
    )?
    .done()?;
    elsewhere.does("snapshot verify later")?;
    elsewhere.leaves_nothing()
}

fn over_a_bad_line(rekindle: &Rekindle) -> anyhow::Result<()> {
    lineage(rekindle)?;
    let s3 = S3::start(&rekindle.file("s3"), Line::of(LATENCY))?;
    let seed = s3.line().goes_wrong(20, &Fault::ALL);
    let elsewhere = Rekindle::new()?;
    let mut right = [0, 0];
    for round in 0..10 {
        let place = s3.url(&format!("round-{round}"));
        let went = |said: &Said, begun: Instant| {
            let took = begun.elapsed();
            ensure!(
                took < Duration::from_secs(90),
                "{took:?}, seed {seed}: {said:?}"
            );
            ensure!(
                said.status == Some(0) || said.err.contains("s3://"),
                "seed {seed}: {said:?}"
            );
            Ok(said.status == Some(0))
        };
        let begun = Instant::now();
        let pushed = tries(
            rekindle,
            &s3,
            &format!("snapshot push later {place} --patience 8s"),
        )?;
        if !went(&pushed, begun)? {
            continue;
        }
        right[0] += 1;
        // Nothing of the round before helps.
        let _ = std::fs::remove_dir_all(elsewhere.state().join("cache"));
        let begun = Instant::now();
        let pulled = tries(
            &elsewhere,
            &s3,
            &format!("snapshot pull {place}/later --patience 8s"),
        )?;
        if went(&pulled, begun)? {
            right[1] += 1;
            elsewhere.does("snapshot verify later")?;
            elsewhere.does("restore later --name copy")?;
            goes_on(&elsewhere, "copy")?;
        }
        elsewhere.leaves_nothing()?;
    }
    // One fault in five is what retries are for.
    ensure!(right[0] >= 8 && right[1] >= 6, "{right:?}, seed {seed}");
    Ok(())
}

fn killed_on_the_way(rekindle: &Rekindle) -> anyhow::Result<()> {
    lineage(rekindle)?;
    let s3 = S3::start(&rekindle.file("s3"), Line::of(LATENCY))?;
    let elsewhere = Rekindle::new()?;
    let place = s3.url("killed");
    let mut killed = [0, 0];
    for (n, (who, line)) in [
        (rekindle, format!("snapshot push later {place}")),
        (&elsewhere, format!("snapshot pull {place}/later")),
    ]
    .into_iter()
    .enumerate()
    {
        let before = s3.line().requests();
        for requests in [1, 2, 4, 7, 10] {
            let mut command: Command = who.command(&line);
            let mut child = s3
                .known_to(&mut command)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            let from = s3.line().requests();
            until("it asks, or ends", || {
                Ok(s3.line().requests() >= from + requests || child.try_wait()?.is_some())
            })?;
            killed[n] += u32::from(child.try_wait()?.is_none());
            // It may just have ended.
            let _ = child.kill();
            child.wait()?;
            if n == 0 {
                // What can be seen there is whole.
                let pulled = tries(&elsewhere, &s3, &format!("snapshot pull {place}/later"))?;
                if pulled.status == Some(0) {
                    elsewhere.does("snapshot verify later")?;
                    elsewhere.leaves_nothing()?;
                }
                let _ = std::fs::remove_dir_all(elsewhere.state().join("cache"));
            }
        }
        tries(who, &s3, &line)?.done()?;
        ensure!(s3.line().requests() > before);
    }
    ensure!(killed[0] >= 3 && killed[1] >= 3, "{killed:?}");
    elsewhere.does("snapshot verify later")?;
    elsewhere.does("restore later --name copy")?;
    goes_on(&elsewhere, "copy")?;
    elsewhere.leaves_nothing()
}

fn refused(rekindle: &Rekindle) -> anyhow::Result<()> {
    filled(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    let s3 = S3::start(&rekindle.file("s3"), Line::of(Duration::ZERO))?;
    let push = |url: &str| format!("snapshot push base {url} --patience 2s");
    for (url, why) in [
        (format!("s4://{BUCKET}/x"), "file, s3, gs and az"),
        (format!("s3:/{BUCKET}/x"), "s3://bucket/prefix"),
        (format!("s3://{BUCKET}/a//b"), "a//b"),
        ("s3://missing/x".into(), "no such bucket"),
    ] {
        let said = tries(rekindle, &s3, &push(&url))?.refused(1)?;
        ensure!(said.contains(why), "{url}: {said}");
    }
    // One try suffices where no other would do better.
    let before = s3.line().requests();
    let stranger = |variable: &str, value: &str| -> anyhow::Result<String> {
        let line = push(&s3.url("x"));
        let mut command = rekindle.command(&line);
        s3.known_to(&mut command).env(variable, value);
        finish(command, &line)?.refused(1)
    };
    let said = stranger("AWS_SECRET_ACCESS_KEY", "another-secret")?;
    ensure!(
        said.contains("does not allow it") && said.contains("SignatureDoesNotMatch"),
        "{said}"
    );
    ensure!(!said.contains("another-secret"), "{said}");
    ensure!(s3.line().requests() == before + 1);
    // A port that nobody listens on, since it was given away by the kernel and is closed again.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let begun = Instant::now();
    let said = stranger("AWS_ENDPOINT_URL", &format!("http://{nobody}"))?;
    ensure!(said.contains("no good answer"), "{said}");
    ensure!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );

    s3.line().goes_wrong(100, &[Fault::Silence]);
    let said = tries(rekindle, &s3, &push(&s3.url("x")))?.refused(1)?;
    ensure!(said.contains("no answer within"), "{said}");
    s3.line().goes_wrong(0, &[]);

    // A pack that is damaged where it is kept is no matter of the line.
    tries(rekindle, &s3, &push(&s3.url("x")))?.done()?;
    let packs = s3.file("x/packs");
    for pack in std::fs::read_dir(&packs)? {
        let path = pack?.path();
        let mut bytes = std::fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes)?;
    }
    let elsewhere = Rekindle::new()?;
    let said = tries(
        &elsewhere,
        &s3,
        &format!("snapshot pull {}/base", s3.url("x")),
    )?
    .refused(1)?;
    ensure!(said.contains("is damaged: the chunk at"), "{said}");
    let said = tries(
        &elsewhere,
        &s3,
        &format!("snapshot pull {}/bace", s3.url("x")),
    )?
    .refused(1)?;
    ensure!(
        said.contains("there is no snapshot bace in s3://"),
        "{said}"
    );
    elsewhere.leaves_nothing()
}
