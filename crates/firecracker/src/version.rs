//! Which Firecracker knows what.
//!
//! ```text
//!   request ── uses ──▶ Feature ── since ──▶ 1.14.4, 1.15.1, 1.16.0 …
//!                          │
//!                Version ──┴──▶ send it, send it under its older name, or refuse it
//! ```
//!
//! [`Client`](crate::Client) asks Firecracker for its version only when a request uses something newer
//! than [`Version::BASELINE`]. The table is compared with Firecracker's API descriptions by a test.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A Firecracker release.
///
/// A suffix such as `-dev` is dropped when a version is parsed: a development build has what its
/// release will have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version {
    /// Changes when something is removed.
    pub major: u32,
    /// Changes when something is added.
    pub minor: u32,
    /// Changes when something is repaired, and now and then when something is added.
    pub patch: u32,
}

impl Version {
    /// The oldest Firecracker this crate is made for, 1.12.0: what it offers is used without asking.
    pub const BASELINE: Version = Version::new(1, 12, 0);

    /// `major.minor.patch`.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Version {
        Version {
            major,
            minor,
            patch,
        }
    }

    /// Whether this Firecracker offers `feature`.
    ///
    /// A feature can have come to several release lines at once (`clock_realtime`: 1.16.0, and 1.15.1 and
    /// 1.14.4 after the fact); each line is judged by its own first release.
    pub fn has(self, feature: Feature) -> bool {
        let since = feature.since();
        since.iter().enumerate().any(|(place, first)| {
            let newest = place + 1 == since.len();
            let same_line = (self.major, self.minor) == (first.major, first.minor);
            self >= *first && (newest || same_line)
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.to_string()
    }
}

impl TryFrom<String> for Version {
    type Error = ParseVersionError;

    fn try_from(text: String) -> Result<Version, ParseVersionError> {
        text.parse()
    }
}

impl FromStr for Version {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Version, ParseVersionError> {
        parse(text).ok_or_else(|| ParseVersionError {
            text: text.chars().take(64).collect(),
        })
    }
}

fn parse(text: &str) -> Option<Version> {
    let text = text.trim();
    let text = text.strip_prefix('v').unwrap_or(text);
    let numbers = text.split(['-', '+']).next()?;
    let mut parts = numbers.split('.').map(|part| {
        let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| part.parse::<u32>().ok()).flatten()
    });
    let version = Version::new(parts.next()??, parts.next()??, parts.next()??);
    parts.next().is_none().then_some(version)
}

/// A text is not a version.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("not a Firecracker version: {text:?}")]
pub struct ParseVersionError {
    /// The text, its first 64 characters.
    pub text: String,
}

macro_rules! features {
    ($($(#[$doc:meta])* $variant:ident $name:literal $([$major:literal $minor:literal $patch:literal])+,)+) => {
        /// Something that not every Firecracker offers: a field, a value or a call.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Feature {
            $($(#[$doc])* $variant,)+
        }

        impl Feature {
            /// Every feature of the table, oldest first.
            pub const ALL: &'static [Feature] = &[$(Feature::$variant),+];

            /// How Firecracker's API spells it: a field, `field=value`, or method and path.
            pub const fn name(self) -> &'static str {
                match self { $(Feature::$variant => $name,)+ }
            }

            /// The first release of each line that has it, ascending; every line after the last has it.
            pub const fn since(self) -> &'static [Version] {
                match self { $(Feature::$variant => const { &[$(Version::new($major, $minor, $patch)),+] },)+ }
            }
        }
    };
}

features! {
    /// `network_overrides` of a snapshot load.
    NetworkOverrides "network_overrides" [1 12 0],
    /// `track_dirty_pages` of a snapshot load; before, it is sent as `enable_diff_snapshots`.
    TrackDirtyPagesOnLoad "track_dirty_pages" [1 13 0],
    /// `imds_compat` of the metadata service.
    ImdsCompat "imds_compat" [1 13 0],
    /// `free_page_hinting` of the balloon.
    FreePageHinting "free_page_hinting" [1 14 0],
    /// `free_page_reporting` of the balloon.
    FreePageReporting "free_page_reporting" [1 14 0],
    /// The three calls that start, show and stop a hinting run.
    BalloonHinting "/balloon/hinting" [1 14 0],
    /// Persistent memory devices.
    Pmem "PUT /pmem" [1 14 0],
    /// Where the guest's serial console goes.
    Serial "PUT /serial" [1 14 0],
    /// Memory that is plugged in while the guest runs.
    MemoryHotplug "/hotplug/memory" [1 14 0],
    /// `clock_realtime` of a snapshot load.
    ClockRealtime "clock_realtime" [1 14 4] [1 15 1] [1 16 0],
    /// `vsock_override` of a snapshot load.
    VsockOverride "vsock_override" [1 16 0],
    /// `mtu` of a network interface.
    Mtu "mtu" [1 16 0],
    /// `rate_limiter` of the serial console.
    SerialRateLimiter "serial rate_limiter" [1 16 0],
    /// `rate_limiter` of a persistent memory device.
    PmemRateLimiter "pmem rate_limiter" [1 16 0],
    /// Changing a persistent memory device.
    PatchPmem "PATCH /pmem" [1 16 0],
    /// Taking a device away from a running guest.
    Unplug "DELETE of a device" [1 16 0],
    /// `huge_pages` of a snapshot load.
    HugePagesOnLoad "huge_pages" [1 17 0],
    /// Transparent huge pages under a guest's memory.
    TransparentHugePages "huge_pages=Transparent" [1 17 0],
    /// `emit_id` of the metrics.
    MetricsEmitId "emit_id" [1 17 0],
    /// `properties` of the metrics.
    MetricsProperties "properties" [1 17 0],
}

impl Feature {
    /// The release to ask for when one is missing: the oldest that has it.
    pub const fn first(self) -> Version {
        self.since()[0]
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        text.parse().expect("a version")
    }

    #[test]
    fn versions_are_read_with_and_without_prefix_and_suffix() {
        assert_eq!(version("1.12.1"), Version::new(1, 12, 1));
        assert_eq!(version("v1.16.0\n"), Version::new(1, 16, 0));
        assert_eq!(version("1.17.0-dev"), Version::new(1, 17, 0));
        assert_eq!(version("1.10.0+g81b38b9"), Version::new(1, 10, 0));
    }

    #[test]
    fn what_is_no_version_is_refused() {
        for text in [
            "",
            "1",
            "1.2",
            "1.2.3.4",
            "1.2.x",
            "+1.2.3",
            "1..2",
            "99999999999.0.0",
            "one",
        ] {
            assert!(text.parse::<Version>().is_err(), "{text:?} was read");
        }
        let long = "9".repeat(10_000).parse::<Version>().unwrap_err();
        assert_eq!(long.text.len(), 64);
    }

    #[test]
    fn versions_compare_by_number_not_by_text() {
        assert!(version("1.9.9") < version("1.10.0"));
        assert!(version("1.16.1") > version("1.16.0"));
        assert!(version("2.0.0") > version("1.99.99"));
    }

    #[test]
    fn a_backported_feature_is_judged_by_its_own_line() {
        for (text, has) in [
            ("1.13.9", false),
            ("1.14.3", false),
            ("1.14.4", true),
            ("1.15.0", false),
            ("1.15.1", true),
            ("1.16.0", true),
            ("2.0.0", true),
        ] {
            assert_eq!(version(text).has(Feature::ClockRealtime), has, "{text}");
        }
    }

    #[test]
    fn the_table_ascends_and_names_each_feature_once() {
        let mut names: Vec<_> = Feature::ALL.iter().map(|feature| feature.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Feature::ALL.len());
        for feature in Feature::ALL {
            assert!(feature.since().is_sorted(), "{feature}");
            assert!(feature.first() >= Version::BASELINE, "{feature}");
        }
    }

    #[test]
    fn a_version_survives_json() {
        let json = serde_json::to_string(&Version::new(1, 12, 1)).expect("json");
        assert_eq!(json, "\"1.12.1\"");
        assert_eq!(
            serde_json::from_str::<Version>(&json).expect("read"),
            Version::new(1, 12, 1)
        );
    }
}
