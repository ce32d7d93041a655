//! `rekindle bench faults`.

use anyhow::{Result, ensure};
use serde::Serialize;

use super::super::Context;
use super::contender::{Backend, Contender};
use super::guest::{self, Guest};
use super::handler::Kind;
use super::image::Image;
use super::machine::Place;
use super::race::{Goal, Race, Ratio, Row, print_ratios, print_rows, word};
use super::stats::Spread;
use crate::output;

/// What a missing page costs when nothing was recorded: on demand, beside handlers as simple as Firecracker's example
///
/// The guests are built in, a few dozen instructions each, and run on any KVM, paravirtual ones included. Their
/// snapshots are taken at the beginning of a pass, so that the first dot after a restore is the end of a whole first
/// pass, in which every page is missing.
///
///   sweep      256 MiB; a pass changes one byte in each page from 32 to 224 MiB, in order
///   scatter    1 GiB; a pass changes one byte in 16,384 pages without neighbours, in an order without locality
///   zeros      1 GiB, of which 128 MiB are data and the rest zeros; a sweep over the data
///
/// Every round restores each guest with each of these once, in this order; a round before the first is not counted:
///
///   rekindle           rekindle pager, with nothing recorded
///   page at a time     a handler as simple as Firecracker's example: poll, read a fault, pread 4 KiB, UFFDIO_COPY
///   the same, spinning it asks without pause instead of in poll, and takes a whole CPU for it
///   File               Firecracker maps the file, which is in the page cache
///
/// RESUME TO PASS 2 is from the first byte of PATCH /vm to the second dot. US/PAGE is what a fault is to the guest: the
/// first pass less a resident one (the median of the third to the sixth of the same VM), by the number of pages. Times
/// are milliseconds, medians with p10 and p90; FAULTS to ZEROED are the page server's own counts, in pages. Servers
/// are processes of their own, nothing is pinned.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Faults {
    /// How many rounds
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    /// Print JSON; times in microseconds
    #[arg(long)]
    json: bool,
    /// Guests that much smaller: 2 to the power of it
    #[arg(long, hide = true, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=8))]
    smaller: u32,
}

const OURS: &str = "rekindle";
const PAGE: &str = "page at a time";
const SPIN: &str = "the same, spinning";
const FILE: &str = "File";

/// What a fault may cost the guest, in microseconds.
const FAULT_BOUND: f64 = 15.0;

#[derive(Serialize)]
struct Report {
    rounds: u32,
    sweep: Part,
    scatter: Part,
    zeros: Zeros,
    ratios: Vec<Ratio>,
}

/// One guest.
#[derive(Serialize)]
struct Part {
    memory_mib: u32,
    pages_per_pass: u32,
    rows: Vec<Row>,
    /// What a fault costs the guest under our page server, and whether that is within the bound.
    fault_us: Spread,
    fault_bound_us: f64,
    fault_holds: bool,
}

/// A guest that is mostly zeros.
#[derive(Serialize)]
struct Zeros {
    memory_mib: u32,
    zero_pages: u64,
    data_pages: u64,
    rows: Vec<Row>,
    /// From the handshake until every run of zeros is in place, as the page server tells it; absent if it does not.
    zeroed_by_us: Option<Spread>,
    /// The most pages that were copied in any round, and whether those can all have been data.
    most_copied: f64,
    no_zero_copied: bool,
}

impl Faults {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds 0 measures nothing");
        let engine = context.engine()?;
        let place = Place::of(&engine)?;
        let report = self.race(&place)?;
        if self.json {
            output::json(&report)
        } else {
            report.print()
        }
    }

    fn race(&self, place: &Place) -> Result<Report> {
        let image = |name, guest: Guest| Image::take(place, name, &guest);
        let small = |n: u32| n >> self.smaller;
        let sweep_image = image("sweep", guest::sweep(small(49_152), None))?;
        let scatter_image = image("scatter", guest::scatter(small(16_384), None))?;
        let memory = small(1024).max(64);
        let zeros_image = image("zeros", guest::sweep(memory << 8 >> 3, Some(memory)))?;

        let mut sweep = Race::new(place, &sweep_image, contenders());
        let mut scatter = Race::new(place, &scatter_image, contenders());
        let mut zeros = Race::new(place, &zeros_image, vec![Contender::hot(OURS, on_demand())]);
        for round in 0..=self.rounds {
            let _waiting = output::waiting(format!("round {round} of {}", self.rounds));
            sweep.round(round)?;
            scatter.round(round)?;
            zeros.round(round)?;
        }
        let ratios = vec![
            ratio("sweep", &sweep, PAGE).at_most(0.25),
            ratio("sweep", &sweep, SPIN),
            ratio("sweep", &sweep, FILE),
            ratio("scatter", &scatter, PAGE),
            ratio("scatter", &scatter, SPIN),
            ratio("scatter", &scatter, FILE),
        ];
        Ok(Report {
            rounds: self.rounds,
            sweep: Part::of(&sweep, &sweep_image),
            scatter: Part::of(&scatter, &scatter_image),
            zeros: Zeros::of(&zeros, &zeros_image),
            ratios,
        })
    }
}

fn on_demand() -> Backend {
    Backend::Pager {
        record: None,
        replay: None,
    }
}

fn contenders() -> Vec<Contender> {
    vec![
        Contender::hot(OURS, on_demand()),
        Contender::hot(PAGE, Backend::Handler(Kind::Page)),
        Contender::hot(SPIN, Backend::Handler(Kind::Spin)),
        Contender::hot(FILE, Backend::File),
    ]
}

fn ratio(guest: &str, race: &Race<'_>, other: &str) -> Ratio {
    let what = format!("{guest}: {OURS} / {other}");
    Ratio::of(what, &race.of(OURS).two_passes, &race.of(other).two_passes)
}

impl Part {
    fn of(race: &Race<'_>, image: &Image) -> Part {
        let fault_us = race.of(OURS).per_page(image.pages).spread();
        Part {
            memory_mib: image.memory_mib,
            pages_per_pass: image.pages,
            rows: race.rows(),
            fault_us,
            fault_bound_us: FAULT_BOUND,
            fault_holds: fault_us.median <= FAULT_BOUND,
        }
    }

    fn print(&self, guest: &str, rounds: u32) -> Result<()> {
        let Part {
            memory_mib,
            pages_per_pass,
            ..
        } = self;
        let title = format!(
            "{guest}, {memory_mib} MiB, {pages_per_pass} pages a pass; {rounds} rounds, ms, median (p10 to p90)"
        );
        print_rows(&title, &self.rows, Goal::TwoPasses)?;
        let Spread {
            median, p10, p90, ..
        } = self.fault_us;
        output::line(format!(
            "a fault as the guest sees it: {median:.1} us ({p10:.1} to {p90:.1}); bound {FAULT_BOUND}: {}",
            word(self.fault_holds)
        ))?;
        output::line("")
    }
}

impl Zeros {
    fn of(race: &Race<'_>, image: &Image) -> Zeros {
        let series = race.of(OURS);
        let in_place = series.told(|stats| stats.zeroed_by_us);
        let most_copied = series.told(|stats| Some(stats.copied)).spread().max;
        let data_pages = u32::try_from(image.data_pages).map_or(f64::NAN, f64::from);
        Zeros {
            memory_mib: image.memory_mib,
            zero_pages: (u64::from(image.memory_mib) << 8) - image.data_pages,
            data_pages: image.data_pages,
            rows: race.rows(),
            zeroed_by_us: (in_place.len() > 0).then(|| in_place.spread()),
            most_copied,
            no_zero_copied: most_copied <= data_pages,
        }
    }

    fn print(&self, rounds: u32) -> Result<()> {
        let Zeros {
            memory_mib,
            zero_pages,
            data_pages,
            most_copied,
            ..
        } = self;
        let title = format!(
            "zeros, {memory_mib} MiB, {zero_pages} pages of zeros and {data_pages} of data; {rounds} rounds, ms"
        );
        print_rows(&title, &self.rows, Goal::TwoPasses)?;
        let in_place = self.zeroed_by_us.map_or_else(
            || "–".to_owned(),
            |us| {
                let [median, p10, p90] = [us.median, us.p10, us.p90].map(|us| us / 1000.0);
                format!("{median:.1} ms ({p10:.1} to {p90:.1})")
            },
        );
        output::line(format!("all zeros in place after {in_place}"))?;
        output::line(format!(
            "no page of zeros was copied ({most_copied:.0} copies at the most): {}",
            word(self.no_zero_copied)
        ))
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        self.sweep.print("sweep", self.rounds)?;
        self.scatter.print("scatter", self.rounds)?;
        self.zeros.print(self.rounds)?;
        print_ratios(&self.ratios)
    }
}
