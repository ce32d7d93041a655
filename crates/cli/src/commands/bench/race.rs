//! Several contenders, round by round, and what is told of them.
//!
//! Every round measures each contender once, in the same order: A B C, A B C, … So what drifts in the machine hits all
//! alike, and a ratio is the median of the ratios within a round.

use anyhow::Result;
use rekindle_pager::Stats;
use serde::Serialize;

use super::contender::{Contender, Run};
use super::image::Image;
use super::machine::Place;
use super::stats::{Samples, Spread};
use crate::output;

/// Contenders for one guest, and all that was measured.
pub(super) struct Race<'a> {
    place: &'a Place,
    image: &'a Image,
    entries: Vec<(Contender, Series)>,
}

/// What one contender took, round by round, in microseconds.
#[derive(Debug, Default)]
pub(super) struct Series {
    pub(super) load: Samples,
    pub(super) resume: Samples,
    pub(super) first: Samples,
    pub(super) load_to_pass: Samples,
    pub(super) two_passes: Samples,
    pub(super) resident: Samples,
    stats: Vec<Stats>,
    left_in_cache: usize,
}

/// What is told of a contender. Times are in microseconds, counts are medians, absent where nobody counted.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    name: &'static str,
    load_us: Spread,
    resume_us: Spread,
    first_pass_us: Spread,
    load_to_pass_us: Spread,
    two_passes_us: Spread,
    resident_pass_us: Spread,
    /// What a page costs the guest: the first pass less a resident one, by the pages of a pass.
    per_page_us: Spread,
    faults: Option<f64>,
    replayed: Option<f64>,
    around: Option<f64>,
    copied: Option<f64>,
    zeroed: Option<f64>,
    /// The most pages of an evicted memory file that were in the page cache nevertheless.
    left_in_cache: usize,
}

/// Which time a race is about.
#[derive(Clone, Copy, Debug)]
pub(super) enum Goal {
    /// From the request to load to the end of the first pass.
    LoadToPass,
    /// From the request to resume to the end of the second pass.
    TwoPasses,
}

impl<'a> Race<'a> {
    pub(super) fn new(place: &'a Place, image: &'a Image, contenders: Vec<Contender>) -> Race<'a> {
        let entries = contenders.into_iter().map(|c| (c, Series::default()));
        Race {
            place,
            image,
            entries: entries.collect(),
        }
    }

    /// Measures each once; the zeroth round warms caches and is not counted.
    pub(super) fn round(&mut self, round: u32) -> Result<()> {
        for (contender, series) in &mut self.entries {
            let run = contender.run(self.place, self.image)?;
            if round > 0 {
                series.add(run);
            }
        }
        Ok(())
    }

    /// # Panics
    /// When nobody of that name takes part.
    pub(super) fn of(&self, name: &str) -> &Series {
        let mut entries = self.entries.iter();
        let found = entries.find(|(contender, _)| contender.name == name);
        &found.expect("who is asked for takes part").1
    }

    pub(super) fn rows(&self) -> Vec<Row> {
        let row = |(contender, series): &(Contender, Series)| {
            series.row(contender.name, self.image.pages)
        };
        self.entries.iter().map(row).collect()
    }
}

impl Series {
    pub(super) fn add(&mut self, run: Run) {
        self.load.push(run.load);
        self.resume.push(run.resume);
        self.first.push(run.passes[0]);
        self.load_to_pass.push(run.load_to_pass);
        self.two_passes.push(run.two_passes());
        self.resident.push(run.resident());
        self.left_in_cache = self.left_in_cache.max(run.left_in_cache);
        self.stats.extend(run.stats);
    }

    /// One of the page server's figures, of the rounds in which it told it.
    pub(super) fn told(&self, which: fn(&Stats) -> Option<u64>) -> Samples {
        let mut samples = Samples::default();
        for figure in self.stats.iter().filter_map(which) {
            samples.push(float(figure));
        }
        samples
    }

    /// What a page costs the guest.
    pub(super) fn per_page(&self, pages: u32) -> Samples {
        let mut many = Samples::default();
        for _ in 0..self.first.len() {
            many.push(pages.into());
        }
        self.first.less(&self.resident).divided_by(&many)
    }

    fn row(&self, name: &'static str, pages: u32) -> Row {
        let median = |which| {
            let samples = self.told(which);
            (samples.len() > 0).then(|| samples.median())
        };
        Row {
            name,
            load_us: self.load.spread(),
            resume_us: self.resume.spread(),
            first_pass_us: self.first.spread(),
            load_to_pass_us: self.load_to_pass.spread(),
            two_passes_us: self.two_passes.spread(),
            resident_pass_us: self.resident.spread(),
            per_page_us: self.per_page(pages).spread(),
            faults: median(|stats| Some(stats.faults)),
            replayed: median(|stats| Some(stats.replayed)),
            around: median(|stats| Some(stats.around)),
            copied: median(|stats| Some(stats.copied)),
            zeroed: median(|stats| Some(stats.zeroed)),
            left_in_cache: self.left_in_cache,
        }
    }
}

/// Two contenders compared, round by round.
#[derive(Debug, Serialize)]
pub(super) struct Ratio {
    what: String,
    ratio: Spread,
    /// In how many rounds the first was faster.
    won: usize,
    rounds: usize,
    bound: Option<f64>,
    holds: Option<bool>,
}

impl Ratio {
    pub(super) fn of(what: impl Into<String>, one: &Samples, other: &Samples) -> Ratio {
        Ratio {
            what: what.into(),
            ratio: one.divided_by(other).spread(),
            won: one.wins(other),
            rounds: one.len(),
            bound: None,
            holds: None,
        }
    }

    /// What the median is meant to be at most.
    pub(super) fn at_most(self, bound: f64) -> Ratio {
        Ratio {
            bound: Some(bound),
            holds: Some(self.ratio.median <= bound),
            ..self
        }
    }

    /// The first is meant to be faster in every single round.
    pub(super) fn in_every_round(self) -> Ratio {
        Ratio {
            holds: Some(self.won == self.rounds),
            ..self
        }
    }

    fn line(&self) -> String {
        let Spread {
            median, p10, p90, ..
        } = self.ratio;
        let bound = match (self.bound, self.holds) {
            (Some(bound), Some(holds)) => format!("; bound {bound}: {}", word(holds)),
            (None, Some(holds)) => format!("; meant to win all: {}", word(holds)),
            _ => String::new(),
        };
        let Ratio {
            what, won, rounds, ..
        } = self;
        format!("{what:<58} {median:.3} ({p10:.3} to {p90:.3}); won {won} of {rounds}{bound}")
    }
}

/// Whether a bound holds, as it is printed.
pub(super) fn word(holds: bool) -> &'static str {
    if holds { "holds" } else { "MISSED" }
}

/// Prints rows under a line that says what they are.
pub(super) fn print_rows(title: &str, rows: &[Row], goal: Goal) -> Result<()> {
    let time = |spread: Spread| millis(spread.median);
    let wide = |spread: Spread| {
        let [median, p10, p90] = [spread.median, spread.p10, spread.p90].map(millis);
        format!("{median} ({p10} to {p90})")
    };
    let count = |count: Option<f64>| count.map_or_else(|| "–".to_owned(), |n| format!("{n:.0}"));
    let cells = |row: &Row| {
        let goal = match goal {
            Goal::LoadToPass => row.load_to_pass_us,
            Goal::TwoPasses => row.two_passes_us,
        };
        [
            row.name.to_owned(),
            time(row.load_us),
            time(row.resume_us),
            time(row.first_pass_us),
            wide(goal),
            time(row.resident_pass_us),
            format!("{:.2}", row.per_page_us.median),
            count(row.faults),
            count(row.around),
            count(row.replayed),
            count(row.copied),
            count(row.zeroed),
        ]
    };
    let heading = match goal {
        Goal::LoadToPass => "LOAD TO PASS",
        Goal::TwoPasses => "RESUME TO PASS 2",
    };
    output::line(title)?;
    output::table(
        [
            "", "LOAD", "RESUME", "PASS 1", heading, "RESIDENT", "US/PAGE", "FAULTS", "AROUND",
            "REPLAYED", "COPIED", "ZEROED",
        ],
        &rows.iter().map(cells).collect::<Vec<_>>(),
    )?;
    for row in rows.iter().filter(|row| row.left_in_cache > 0) {
        output::line(format!(
            "{}: up to {} pages of the memory file could not be evicted",
            row.name, row.left_in_cache
        ))?;
    }
    Ok(())
}

/// Prints ratios, one a line.
pub(super) fn print_ratios(ratios: &[Ratio]) -> Result<()> {
    output::line("")?;
    output::line("ratios, median (p10 to p90) of the rounds")?;
    ratios
        .iter()
        .try_for_each(|ratio| output::line(ratio.line()))
}

fn millis(micros: f64) -> String {
    format!("{:.1}", micros / 1000.0)
}

/// A count, as the statistics take it.
fn float(count: u64) -> f64 {
    u32::try_from(count).map_or(f64::NAN, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        let mut samples = Samples::default();
        values.iter().for_each(|value| samples.push(*value));
        samples
    }

    #[test]
    fn a_ratio_says_whether_its_bound_holds() {
        let (a, b) = (samples(&[10.0, 12.0, 40.0]), samples(&[10.0, 10.0, 10.0]));
        let ratio = Ratio::of("a / b", &a, &b).at_most(1.25);
        assert_eq!((ratio.holds, ratio.won), (Some(true), 0));
        assert!(
            ratio
                .line()
                .ends_with("1.200 (1.000 to 4.000); won 0 of 3; bound 1.25: holds")
        );
        let ratio = Ratio::of("b / a", &b, &a).in_every_round();
        assert_eq!((ratio.holds, ratio.won), (Some(false), 2));
    }

    #[test]
    fn a_page_costs_what_the_first_pass_takes_beyond_a_resident_one() {
        let series = Series {
            first: samples(&[1500.0]),
            resident: samples(&[500.0]),
            ..Series::default()
        };
        assert_eq!(series.per_page(100).median(), 10.0);
        let row = series.row("x", 100);
        assert_eq!((row.faults, row.per_page_us.median), (None, 10.0));
    }
}
