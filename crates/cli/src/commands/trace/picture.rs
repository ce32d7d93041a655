//! A trace as a picture: time to the right, the guest's memory upwards, a stroke for each piece that came in.
//!
//! ```text
//!   MiB ┤ ▏ zero      the whole width of a stroke is one moment; its height is the piece
//!       │▏▏│ │  ▏ demand
//!       └──┬───┬──▶ ms since the handshake
//! ```
//!
//! Strokes that would cover each other are one, so that a picture has a bounded size whatever it shows.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::time::Duration;

use rekindle_pager::{Kind, Piece, Stats};

const WIDTH: u32 = 1000;
const HEIGHT: u32 = 656;
const LEFT: u32 = 84;
const RIGHT: u32 = WIDTH - 24;
const TOP: u32 = 120;
const BOTTOM: u32 = HEIGHT - 64;

/// Places are in quarters of a pixel.
const FINE: u64 = 4;
/// About how many lines across there are.
const TICKS: u64 = 8;
/// So many of 100 pieces of each kind have to be in the picture; what comes long after is told in words.
const SHOWN: usize = 90;

/// What is drawn later lies above what is drawn before.
const KINDS: [Look; 4] = [
    Look::new(Kind::Zero, "known zeros", "#cfd4da"),
    Look::new(Kind::Around, "beside one that was waited for", "#f0b75a"),
    Look::new(Kind::Replay, "of the working set", "#0072b2"),
    Look::new(Kind::Demand, "the guest waited for it", "#d1430f"),
];

/// How one kind of piece is drawn. The colours are told apart with every kind of colour blindness, and in grey.
struct Look {
    kind: Kind,
    meaning: &'static str,
    colour: &'static str,
}

impl Look {
    const fn new(kind: Kind, meaning: &'static str, colour: &'static str) -> Look {
        Look {
            kind,
            meaning,
            colour,
        }
    }

    /// As in the counts, and the name of its layer.
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Demand => "demand",
            Kind::Around => "around",
            Kind::Replay => "replayed",
            _ => "zeroed",
        }
    }

    fn pages(&self, stats: &Stats) -> u64 {
        match self.kind {
            Kind::Demand => stats.demand,
            Kind::Around => stats.around,
            Kind::Replay => stats.replayed,
            _ => stats.zeroed,
        }
    }
}

/// What is to be drawn.
pub(super) struct Picture<'a> {
    stats: &'a Stats,
    pieces: &'a [Piece],
    /// The width of the picture, in microseconds; not 0.
    span: u64,
    /// Its height, in pages; not 0.
    pages: u64,
}

/// A stroke from `y` down to `y + height`, in quarters of a pixel from the plot's upper left corner.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Stroke {
    x: u64,
    y: u64,
    height: u64,
}

impl<'a> Picture<'a> {
    /// Of the pieces up to `span` after the handshake.
    pub(super) fn new(stats: &'a Stats, pieces: &'a [Piece], span: Option<Duration>) -> Self {
        let span = span.map_or_else(
            || span_of(stats, pieces),
            |span| u64::try_from(span.as_micros()).unwrap_or(u64::MAX),
        );
        Picture {
            stats,
            pieces,
            span: span.max(1),
            pages: (stats.memory_bytes / stats.page_size.max(1)).max(1),
        }
    }

    /// A self-contained SVG.
    pub(super) fn draw(&self, title: &str) -> String {
        let mut out = String::new();
        // Writing into a string cannot fail.
        let _ = self.write(&mut out, title);
        out
    }

    fn write(&self, out: &mut String, title: &str) -> fmt::Result {
        writeln!(
            out,
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="13" fill="#222">"##
        )?;
        writeln!(out, "<title>{}</title>", escaped(title))?;
        writeln!(
            out,
            r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##
        )?;
        writeln!(
            out,
            r#"<text x="{LEFT}" y="28" font-size="17" font-weight="600">{}</text>"#,
            escaped(title)
        )?;
        writeln!(
            out,
            r##"<text x="{LEFT}" y="48" fill="#555">{}</text>"##,
            escaped(&self.totals())
        )?;
        self.legend(out)?;
        self.axes(out)?;
        for look in &KINDS {
            self.strokes(out, look)?;
        }
        self.marker(out)?;
        writeln!(
            out,
            r##"<rect x="{LEFT}" y="{TOP}" width="{}" height="{}" fill="none" stroke="#888"/>"##,
            RIGHT - LEFT,
            BOTTOM - TOP
        )?;
        writeln!(out, "</svg>")
    }

    fn totals(&self) -> String {
        let stats = self.stats;
        let mut text = format!(
            "{} faults; {} MiB copied; answered in {} (half), {} (99 of 100), {} (slowest)",
            grouped(stats.faults),
            stats.bytes >> 20,
            time(stats.latency.p50_ns),
            time(stats.latency.p99_ns),
            time(stats.latency.max_ns),
        );
        if stats.takeovers > 0 {
            let _ = write!(text, "; {} page servers", stats.takeovers + 1);
        }
        let last = self.pieces.last().map_or(0, |piece| piece.at_us);
        let later = self.pieces.iter().filter(|p| p.at_us > self.span).count();
        if later > 0 {
            let _ = write!(
                text,
                "; {} more until {}",
                grouped(u64::try_from(later).unwrap_or(u64::MAX)),
                time(last.saturating_mul(1000))
            );
        }
        text
    }

    /// The kinds in the order of interest, with how many pages of each came in.
    fn legend(&self, out: &mut String) -> fmt::Result {
        let column = (RIGHT - LEFT) / 4;
        for (at, look) in (0..).zip(KINDS.iter().rev()) {
            let x = LEFT + at * column;
            writeln!(
                out,
                r##"<rect x="{x}" y="66" width="12" height="12" fill="{}"/><text x="{}" y="77">{} <tspan font-weight="600">{}</tspan></text><text x="{}" y="93" font-size="11" fill="#666">{}</text>"##,
                look.colour,
                x + 18,
                look.name(),
                grouped(look.pages(self.stats)),
                x + 18,
                look.meaning,
            )?;
        }
        Ok(())
    }

    fn axes(&self, out: &mut String) -> fmt::Result {
        let step = step(self.span);
        let unit = if step < 1000 { "µs" } else { "ms" };
        writeln!(out, r##"<g stroke="#e4e4e4">"##)?;
        let (mut across, mut up) = (String::new(), String::new());
        for at in (0..=self.span).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            let x = pixels(u64::from(LEFT) * FINE + self.x(at));
            writeln!(out, r#"<path d="M{x} {TOP}V{BOTTOM}"/>"#)?;
            let said = if step < 1000 { at } else { at / 1000 };
            writeln!(
                across,
                r#"<text x="{x}" y="{}" text-anchor="middle">{}</text>"#,
                BOTTOM + 20,
                grouped(said)
            )?;
        }
        let mib = self.stats.memory_bytes.div_ceil(1 << 20).max(1);
        let step = binary_step(mib);
        for at in (0..=mib).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            let page = (at << 20) / self.stats.page_size.max(1);
            let y = pixels(u64::from(TOP) * FINE + self.y(page));
            writeln!(out, r#"<path d="M{LEFT} {y}H{RIGHT}"/>"#)?;
            writeln!(
                up,
                r#"<text x="{}" y="{y}" dy="4" text-anchor="end">{}</text>"#,
                LEFT - 8,
                grouped(at)
            )?;
        }
        writeln!(out, "</g>\n<g>\n{across}{up}</g>")?;
        writeln!(
            out,
            r#"<text x="{}" y="{}" text-anchor="middle">{unit} since Firecracker handed its memory over</text>"#,
            (LEFT + RIGHT) / 2,
            BOTTOM + 44
        )?;
        let middle = (TOP + BOTTOM) / 2;
        writeln!(
            out,
            r#"<text x="22" y="{middle}" text-anchor="middle" transform="rotate(-90 22 {middle})">guest memory, MiB</text>"#
        )
    }

    fn strokes(&self, out: &mut String, look: &Look) -> fmt::Result {
        let mine = self.pieces.iter().filter(|piece| piece.kind == look.kind);
        let strokes: BTreeSet<Stroke> = mine
            .filter(|piece| piece.at_us <= self.span)
            .map(|piece| self.stroke(*piece))
            .collect();
        write!(
            out,
            r#"<path id="{}" transform="translate({LEFT} {TOP})" fill="none" stroke="{}" stroke-width="2" d=""#,
            look.name(),
            look.colour
        )?;
        for Stroke { x, y, height } in strokes {
            let [x, y, height] = [x, y, height].map(pixels);
            write!(out, "M{x} {y}v{height}")?;
        }
        writeln!(out, r#""/>"#)
    }

    /// When the last page of the working set was in place.
    fn marker(&self, out: &mut String) -> fmt::Result {
        let Some(at) = self.stats.replayed_by_us.filter(|at| *at <= self.span) else {
            return Ok(());
        };
        let x = u64::from(LEFT) * FINE + self.x(at);
        // On the side where there is room.
        let (anchor, text) = if at * 2 > self.span {
            ("end", x.saturating_sub(6 * FINE))
        } else {
            ("start", x + 6 * FINE)
        };
        let (x, text) = (pixels(x), pixels(text));
        writeln!(
            out,
            r##"<path d="M{x} {TOP}V{BOTTOM}" stroke="#222" stroke-dasharray="5 4"/><text x="{text}" y="{}" text-anchor="{anchor}" font-size="11">working set in place after {}</text>"##,
            // Above the plot, where it hides nothing.
            TOP - 6,
            time(at.saturating_mul(1000))
        )
    }

    fn stroke(&self, piece: Piece) -> Stroke {
        let (top, bottom) = (
            self.y(piece.page.saturating_add(piece.count)),
            self.y(piece.page),
        );
        // A page of a large memory is less than can be seen.
        let height = (bottom - top).max(2 * FINE);
        Stroke {
            x: self.x(piece.at_us),
            y: top.min(u64::from(BOTTOM - TOP) * FINE - height),
            height,
        }
    }

    fn x(&self, at_us: u64) -> u64 {
        scaled(at_us, self.span, u64::from(RIGHT - LEFT) * FINE)
    }

    /// Downwards, as everything in a picture.
    fn y(&self, page: u64) -> u64 {
        let height = u64::from(BOTTOM - TOP) * FINE;
        height - scaled(page, self.pages, height)
    }
}

/// Until nearly all pieces were in, at least until all of the working set was, and a little longer.
fn span_of(stats: &Stats, pieces: &[Piece]) -> u64 {
    // A few faults that come after thousands of replayed pages are what there is to see.
    let nearly_all = |look: &Look| {
        let mine = pieces.iter().filter(|piece| piece.kind == look.kind);
        let times: Vec<u64> = mine.map(|piece| piece.at_us).collect();
        let at = (times.len() * SHOWN / 100).min(times.len().saturating_sub(1));
        times.get(at).copied().unwrap_or(0)
    };
    let kinds = KINDS.iter().map(nearly_all).max().unwrap_or(0);
    let needed = kinds.max(stats.replayed_by_us.unwrap_or(0));
    let last = pieces.last().map_or(0, |piece| piece.at_us);
    // The rest of them, too, if it is not long in coming.
    let end = last.min(needed + needed / 3);
    end.max(1000) + end.max(1000) / 50
}

/// `value` of `whole`, on a length.
fn scaled(value: u64, whole: u64, length: u64) -> u64 {
    let part = u128::from(value.min(whole)) * u128::from(length) / u128::from(whole);
    u64::try_from(part).unwrap_or(length)
}

/// Quarters of a pixel as SVG has them.
fn pixels(quarters: u64) -> String {
    let rest = ["", ".25", ".5", ".75"];
    let part = usize::try_from(quarters % FINE).unwrap_or(0);
    format!("{}{}", quarters / FINE, rest[part])
}

/// 1, 2 or 5 times a power of ten, so that there are some [`TICKS`] of it.
fn step(span: u64) -> u64 {
    let mut power = 1;
    loop {
        for factor in [1, 2, 5] {
            if span / (power * factor) <= TICKS {
                return power * factor;
            }
        }
        power *= 10;
    }
}

/// A power of two, so that there are some [`TICKS`] of it.
fn binary_step(span: u64) -> u64 {
    let mut step = 1;
    while span / step > TICKS {
        step *= 2;
    }
    step
}

/// With a comma after each thousand.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Nanoseconds in the unit that suits them.
fn time(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{}.{} µs", ns / 1000, ns % 1000 / 100),
        10_000..1_000_000 => format!("{} µs", ns / 1000),
        1_000_000..10_000_000_000 => format!(
            "{}.{} ms",
            grouped(ns / 1_000_000),
            ns % 1_000_000 / 100_000
        ),
        _ => format!("{} s", grouped(ns / 1_000_000_000)),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(pages: u64) -> Stats {
        let zeros = ["faults", "copied", "zeroed", "present", "removed", "bytes"];
        let mut json = serde_json::json!({
            "vm_pid": 7,
            "memory_bytes": pages * 4096,
            "page_size": 4096,
            "retries": 0,
            "latency": {"p50_ns": 0, "p99_ns": 0, "max_ns": 0},
            "ended": null,
        });
        for name in zeros {
            json[name] = 0.into();
        }
        serde_json::from_value(json).unwrap()
    }

    fn piece(at_us: u64, kind: Kind, page: u64, count: u64) -> Piece {
        let kind = serde_json::to_value(kind).unwrap();
        let json = serde_json::json!({"at_us": at_us, "kind": kind, "page": page, "count": count});
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_stroke_stands_where_and_when_its_piece_came() {
        let stats = stats(1000);
        let pieces = [
            piece(0, Kind::Demand, 0, 500),
            piece(500, Kind::Replay, 500, 500),
            piece(1000, Kind::Zero, 999, 1),
            // It ends where the memory does, whatever the trace says.
            piece(1000, Kind::Around, 999, 65_535),
        ];
        let picture = Picture::new(&stats, &pieces, Some(Duration::from_millis(1)));
        let drawn = picture.draw("web");
        let (width, height) = (RIGHT - LEFT, BOTTOM - TOP);
        let path = |name: &str| {
            let at = drawn.find(&format!(r#"id="{name}""#)).unwrap();
            let from = at + drawn[at..].find(" d=\"").unwrap() + 4;
            drawn[from..].split('"').next().unwrap()
        };
        assert_eq!(path("demand"), format!("M0 {}v{}", height / 2, height / 2));
        assert_eq!(path("replayed"), format!("M{} 0v{}", width / 2, height / 2));
        assert_eq!(path("zeroed"), format!("M{width} 0v2"));
        assert_eq!(path("around"), format!("M{width} 0v2"));
    }

    #[test]
    fn strokes_that_cover_each_other_are_one() {
        let stats = stats(1 << 20);
        let pieces: Vec<Piece> = (0..10_000)
            .map(|n| piece(n, Kind::Demand, n / 1000, 1))
            .collect();
        let picture = Picture::new(&stats, &pieces, Some(Duration::from_secs(1000)));
        assert_eq!(picture.draw("web").matches("v2").count(), 1);
    }

    #[test]
    fn a_long_tail_is_told_and_not_drawn() {
        let stats = stats(1 << 20);
        let mut pieces: Vec<Piece> = (0..1000)
            .map(|n| piece(n * 100, Kind::Demand, n, 1))
            .collect();
        pieces.push(piece(60_000_000, Kind::Demand, 7, 1));
        let drawn = Picture::new(&stats, &pieces, None).draw("web");
        assert!(drawn.contains("; 1 more until 60 s"), "{drawn}");
        // Without one, all of it is drawn.
        pieces.pop();
        let drawn = Picture::new(&stats, &pieces, None).draw("web");
        assert!(!drawn.contains("more until"), "{drawn}");
    }

    #[test]
    fn the_few_faults_after_a_replay_are_drawn() {
        let stats = stats(1 << 20);
        let mut pieces: Vec<Piece> = (0..10_000).map(|n| piece(n, Kind::Replay, n, 1)).collect();
        pieces.extend((0..10).map(|n| piece(50_000 + n, Kind::Demand, 20_000 + n, 1)));
        let drawn = Picture::new(&stats, &pieces, None).draw("web");
        assert!(!drawn.contains("more until"), "{drawn}");
    }

    #[test]
    fn axes_have_few_and_round_marks() {
        assert_eq!(
            [9, 8001, 16_000, 99_999, 1_000_000].map(step),
            [2, 1000, 2000, 20_000, 200_000]
        );
        for span in [1, 999, 123_456, u64::MAX / 20] {
            assert!(span / step(span) <= TICKS, "{span}");
        }
        assert_eq!(
            [1, 8, 128, 1000, 3072].map(binary_step),
            [1, 1, 16, 128, 512]
        );
        assert_eq!(
            [7, 1000, 1_234_567].map(grouped),
            ["7", "1,000", "1,234,567"]
        );
        assert_eq!(
            [950, 22_527, 5_000_000, 11_000_000_000].map(time),
            ["0.9 µs", "22 µs", "5.0 ms", "11 s"]
        );
    }

    #[test]
    fn a_title_is_no_markup() {
        let stats = stats(1);
        let drawn = Picture::new(&stats, &[], None).draw("<a & b>");
        assert!(drawn.contains("&lt;a &amp; b&gt;") && !drawn.contains("<a &"));
    }
}
