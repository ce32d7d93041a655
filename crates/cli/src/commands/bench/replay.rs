//! `rekindle bench replay`.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::super::Context;
use super::contender::{Backend, Cache, Contender};
use super::guest;
use super::handler::Kind;
use super::image::Image;
use super::machine::Place;
use super::race::{Goal, Race, Ratio, Row, print_ratios, print_rows};
use crate::output;

/// What a recorded working set is worth: a restored guest's first pass over 64 MiB, however its memory comes
///
/// The guest is a built-in one of a few dozen instructions, which runs on any KVM, paravirtual ones included: 1 GiB, of
/// which each pass changes one byte in 16,384 pages without neighbours (2^14 of the 2^17 pages from 256 to 768 MiB, in
/// a fixed order without locality), and prints a dot. Its snapshot is taken when it has been through them once and
/// stands at the beginning of a pass; so the first dot after a restore is the end of a whole first pass.
///
/// Every round restores it with each of these once, in this order; a round before the first is not counted:
///
///   rekindle           rekindle pager, replaying what it recorded in a run before
///   rekindle, evicted  the same, its memory file evicted from the page cache
///   File               Firecracker maps the file, which is in the page cache
///   File, evicted      the same, the file evicted (posix_fadvise after fdatasync, checked with mincore)
///   page at a time     a handler as simple as Firecracker's example: poll, read a fault, pread 4 KiB, UFFDIO_COPY
///   copy everything    the same, but one UFFDIO_COPY for each region at the first fault
///
/// LOAD is PUT /snapshot/load, RESUME is PATCH /vm; PASS 1 is from that request to the first dot, LOAD TO PASS from the
/// first byte of the request to load to the first dot, RESIDENT a later pass of the same VM (the median of the third to
/// the sixth), US/PAGE the first pass less a resident one by the number of pages. Times are milliseconds, medians with
/// p10 and p90; FAULTS to ZEROED are the page server's own counts, in pages. Servers are processes of their own, nothing
/// is pinned.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Replay {
    /// How many rounds
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    /// Print JSON; times in microseconds
    #[arg(long)]
    json: bool,
    /// A smaller guest: how many pages a pass changes, a power of two
    #[arg(long, hide = true, default_value_t = 16_384)]
    pages: u32,
}

const OURS: &str = "rekindle";
const OURS_EVICTED: &str = "rekindle, evicted";
const FILE: &str = "File";
const FILE_EVICTED: &str = "File, evicted";
const PAGE: &str = "page at a time";
const WHOLE: &str = "copy everything";

/// How much larger the guest is whose page server is weighed.
const LARGE: u32 = 4;
/// How long the page server is left alone before it is weighed.
const IDLE: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Report {
    rounds: u32,
    memory_mib: u32,
    pages_per_pass: u32,
    rows: Vec<Row>,
    ratios: Vec<Ratio>,
    idle: Idle,
}

/// What the page server of a large guest costs when it has nothing to do any more.
#[derive(Serialize)]
struct Idle {
    memory_mib: u32,
    private_dirty_kib: f64,
}

impl Replay {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds 0 measures nothing");
        guest::check_pages(self.pages)?;
        let engine = context.engine()?;
        let place = Place::of(&engine)?;
        let idle = self.weigh(&place)?;
        let report = self.race(&place, idle)?;
        if self.json {
            output::json(&report)
        } else {
            report.print()
        }
    }

    fn race(&self, place: &Place, idle: Idle) -> Result<Report> {
        let image = Image::take(place, "scatter", &guest::scatter(self.pages, None))?;
        let replaying = recorded(place, &image)?;
        let mut race = Race::new(
            place,
            &image,
            vec![
                Contender::hot(OURS, replaying()),
                Contender {
                    name: OURS_EVICTED,
                    backend: replaying(),
                    cache: Cache::Evicted,
                },
                Contender::hot(FILE, Backend::File),
                Contender {
                    name: FILE_EVICTED,
                    backend: Backend::File,
                    cache: Cache::Evicted,
                },
                Contender::hot(PAGE, Backend::Handler(Kind::Page)),
                Contender::hot(WHOLE, Backend::Handler(Kind::Whole)),
            ],
        );
        for round in 0..=self.rounds {
            let _waiting = output::waiting(format!("round {round} of {}", self.rounds));
            race.round(round)?;
        }
        Ok(Report {
            rounds: self.rounds,
            memory_mib: image.memory_mib,
            pages_per_pass: image.pages,
            rows: race.rows(),
            ratios: ratios(&race),
            idle,
        })
    }

    /// Measures the page server of a guest with more memory, after its replay.
    fn weigh(&self, place: &Place) -> Result<Idle> {
        let _waiting = output::waiting("a guest of 4 GiB");
        let small = guest::scatter(self.pages, None).memory_mib;
        let guest = guest::scatter(self.pages, Some(LARGE * small));
        let image = Image::take(place, "large", &guest)?;
        let contender = Contender::hot(OURS, recorded(place, &image)?());
        let run = contender.run_idle(place, &image, Some(IDLE))?;
        image.remove()?;
        Ok(Idle {
            memory_mib: image.memory_mib,
            private_dirty_kib: run.idle_kib.unwrap_or(f64::NAN),
        })
    }
}

fn ratios(race: &Race<'_>) -> Vec<Ratio> {
    let against = |one, other| {
        let what = format!("{one} / {other}");
        Ratio::of(
            what,
            &race.of(one).load_to_pass,
            &race.of(other).load_to_pass,
        )
    };
    let file = race.of(FILE);
    vec![
        Ratio::of(
            "rekindle / (File's load + resident pass)",
            &race.of(OURS).load_to_pass,
            &file.load.plus(&file.resident),
        )
        .at_most(1.3),
        against(OURS, FILE).in_every_round(),
        against(OURS_EVICTED, FILE_EVICTED),
        against(OURS, PAGE),
        against(OURS, WHOLE),
    ]
}

/// Records a working set, and returns how to replay it.
fn recorded(place: &Place, image: &Image) -> Result<impl Fn() -> Backend> {
    let set = image.memory.with_extension("working-set");
    let recording = Backend::Pager {
        record: Some(set.clone()),
        replay: None,
    };
    Contender::hot("rekindle, recording", recording).run(place, image)?;
    ensure!(set.exists(), "the page server recorded nothing");
    Ok(move || Backend::Pager {
        record: None,
        replay: Some(set.clone()),
    })
}

impl Report {
    fn print(&self) -> Result<()> {
        let Report {
            rounds,
            memory_mib,
            pages_per_pass,
            ..
        } = self;
        let title = format!(
            "scatter, {memory_mib} MiB, {pages_per_pass} pages a pass; {rounds} rounds, ms, median (p10 to p90)"
        );
        print_rows(&title, &self.rows, Goal::LoadToPass)?;
        print_ratios(&self.ratios)?;
        let Idle {
            memory_mib,
            private_dirty_kib,
        } = self.idle;
        output::line("")?;
        output::line(format!(
            "page server idle after a replay, guest of {memory_mib} MiB: {private_dirty_kib:.0} KiB private and dirty"
        ))
    }
}
