//! The model and the calls beside Firecracker's own API descriptions.
//!
//! The descriptions are data that this repository does not hold; they are looked for beside it, and the
//! tests say so and pass where they are absent. Known faults of the descriptions are listed here, each with
//! its reason, and nothing else is excused.

mod calls;
mod samples;

use std::collections::BTreeSet;
use std::path::PathBuf;

use rekindle_firecracker::model::*;
use rekindle_firecracker::{Feature, Version};
use serde::Serialize;
use serde_json::{Map, Value, json};

use samples::{samples, value};

/// One release's description.
struct Description {
    version: Version,
    definitions: Map<String, Value>,
    paths: Map<String, Value>,
}

/// The descriptions, oldest first; none if there are none here.
fn descriptions(test: &str) -> Vec<Description> {
    let directory = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/swagger"
    ));
    let Ok(entries) = std::fs::read_dir(&directory) else {
        eprintln!("skipped: {test}: no API descriptions in ../shared/swagger");
        return Vec::new();
    };
    let mut found: Vec<Description> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "yaml")
        })
        .map(|path| {
            let text = std::fs::read_to_string(&path).expect("text");
            // Older YAML reads a bare `Off`, one of the log's levels, as false.
            let options = serde_saphyr::options! { strict_booleans: true };
            let all: Value = serde_saphyr::from_str_with_options(&text, options).expect("YAML");
            let object = |key: &str| all[key].as_object().expect("an object").clone();
            let version = all["info"]["version"].as_str().expect("a version");
            Description {
                version: version.parse().expect("a version"),
                definitions: object("definitions"),
                paths: object("paths"),
            }
        })
        .collect();
    found.sort_by_key(|description| description.version);
    assert!(found.len() >= 8, "only {} descriptions", found.len());
    found
}

/// Definitions that have no type of their own: an error's form, a free-form object, a bare enum.
const NO_TYPE: [&str; 3] = ["Error", "MmdsContentsObject", "CpuTemplate"];

/// The fields that not every release has.
const FIELDS: &[(&str, &str, Feature)] = &[
    ("Balloon", "free_page_hinting", Feature::FreePageHinting),
    ("Balloon", "free_page_reporting", Feature::FreePageReporting),
    ("MmdsConfig", "imds_compat", Feature::ImdsCompat),
    ("NetworkInterface", "mtu", Feature::Mtu),
    ("Pmem", "rate_limiter", Feature::PmemRateLimiter),
    ("SerialDevice", "rate_limiter", Feature::SerialRateLimiter),
    ("Metrics", "emit_id", Feature::MetricsEmitId),
    ("Metrics", "properties", Feature::MetricsProperties),
    (
        "SnapshotLoadParams",
        "network_overrides",
        Feature::NetworkOverrides,
    ),
    (
        "SnapshotLoadParams",
        "track_dirty_pages",
        Feature::TrackDirtyPagesOnLoad,
    ),
    (
        "SnapshotLoadParams",
        "vsock_override",
        Feature::VsockOverride,
    ),
    (
        "SnapshotLoadParams",
        "clock_realtime",
        Feature::ClockRealtime,
    ),
    ("SnapshotLoadParams", "huge_pages", Feature::HugePagesOnLoad),
];

/// Fields of answers that came later; Firecracker is not told them, so the client need not know when.
fn is_later_answer(definition: &str, field: &str, version: Version) -> bool {
    let since = match (definition, field) {
        ("FullVmConfiguration", "memory-hotplug" | "pmem")
        | (
            "BalloonStats",
            "oom_kill" | "alloc_stall" | "async_scan" | "direct_scan" | "async_reclaim"
            | "direct_reclaim",
        ) => Version::new(1, 14, 0),
        ("FullVmConfiguration", "cpu-config" | "entropy") => Version::new(1, 10, 0),
        // Known to Firecracker since 1.5, to its description since 1.11.
        ("CpuConfig", "kvm_capabilities" | "vcpu_features") => Version::new(1, 11, 0),
        _ => return false,
    };
    version < since
}

/// What Firecracker `version` knows of a sample, by our table.
fn known_to(version: Version, definition: &str, sample: &Value) -> Map<String, Value> {
    let mut known = sample.as_object().expect("an object").clone();
    known.retain(|field, _| {
        let row = FIELDS
            .iter()
            .find(|(of, name, _)| *of == definition && name == field);
        row.is_none_or(|(_, _, feature)| version.has(*feature))
            && !is_later_answer(definition, field, version)
    });
    known
}

#[test]
fn no_schema_property_lacks_its_twin_and_no_field_is_known_too_early() {
    let samples = samples();
    for description in
        descriptions("no_schema_property_lacks_its_twin_and_no_field_is_known_too_early")
    {
        for (name, schema) in &description.definitions {
            if NO_TYPE.contains(&name.as_str()) {
                continue;
            }
            let sample = samples
                .get(name.as_str())
                .unwrap_or_else(|| panic!("{}: {name} has no type", description.version));
            let known = known_to(description.version, name, sample);
            let ours: BTreeSet<&str> = known.keys().map(String::as_str).collect();
            let theirs: BTreeSet<&str> = schema["properties"]
                .as_object()
                .expect("properties")
                .keys()
                .map(String::as_str)
                .collect();
            assert_eq!(ours, theirs, "{} {name}", description.version);
        }
    }
}

/// A definition as JSON schema, with all others at hand and no other property allowed.
fn schema_of(description: &Description, name: &str) -> Value {
    let mut definitions = description.definitions.clone();
    for definition in definitions.values_mut() {
        let definition = definition.as_object_mut().expect("an object");
        if definition.contains_key("properties") {
            definition
                .entry("additionalProperties")
                .or_insert(json!(false));
        }
        // Until 1.13 the descriptions say "object" of what is and always was a list, and until 1.10 "string"
        // of what holds them.
        let is_cpu = definition.contains_key("properties")
            && definition["properties"].get("cpuid_modifiers").is_some();
        if is_cpu && description.version < Version::new(1, 14, 0) {
            definition.insert("type".to_owned(), json!("object"));
            for property in definition["properties"]
                .as_object_mut()
                .expect("properties")
                .values_mut()
            {
                assert_eq!(property["type"], "object");
                property["type"] = json!("array");
            }
        }
        // The format of the address is a pattern, given as the name of a format.
        if let Some(address) = definition
            .get_mut("properties")
            .and_then(|all| all.get_mut("ipv4_address"))
        {
            address.as_object_mut().expect("an object").remove("format");
        }
    }
    json!({ "$ref": format!("#/definitions/{name}"), "definitions": definitions })
}

/// The sample, its parts too, as far as this Firecracker knows it.
fn pruned(version: Version, definition: &str, sample: &Value) -> Value {
    let parts = [
        ("drives", "Drive"),
        ("network-interfaces", "NetworkInterface"),
        ("pmem", "Pmem"),
        ("balloon", "Balloon"),
        ("metrics", "Metrics"),
        ("mmds-config", "MmdsConfig"),
        ("cpu-config", "CpuConfig"),
    ];
    let mut known = known_to(version, definition, sample);
    for (field, of) in parts {
        match known.get_mut(field) {
            Some(Value::Array(list)) => {
                for part in list {
                    *part = Value::Object(known_to(version, of, part));
                }
            }
            Some(part) => *part = Value::Object(known_to(version, of, part)),
            None => {}
        }
    }
    Value::Object(known)
}

#[test]
fn every_body_with_all_its_fields_is_valid() {
    let samples = samples();
    for description in descriptions("every_body_with_all_its_fields_is_valid") {
        for name in description.definitions.keys() {
            let Some(sample) = samples.get(name.as_str()) else {
                assert!(NO_TYPE.contains(&name.as_str()), "{name}");
                continue;
            };
            let schema = schema_of(&description, name);
            let validator = jsonschema::draft4::new(&schema).expect("a schema");
            let body = pruned(description.version, name, sample);
            let faults: Vec<_> = validator
                .iter_errors(&body)
                .map(|fault| fault.to_string())
                .collect();
            assert!(
                faults.is_empty(),
                "{} {name}: {faults:?}",
                description.version
            );
            let mut more = body.clone();
            more["nonsense"] = json!(1);
            assert!(!validator.is_valid(&more), "{name} takes anything");
        }
    }
}

/// The values of an enum, as they are sent.
fn words<T: Serialize>(all: &[T]) -> BTreeSet<String> {
    all.iter()
        .map(|one| value(one).as_str().expect("a word").to_owned())
        .collect()
}

/// Every enum of the model, where the descriptions have it.
fn enums() -> Vec<(&'static str, &'static str, BTreeSet<String>)> {
    use CpuTemplate::{C3, T2, T2A, T2CL, T2S, V1N1};
    let template = words(&[C3, T2, T2S, T2CL, T2A, V1N1, CpuTemplate::None]);
    let huge = words(&[
        HugePages::None,
        HugePages::Hugetlbfs2M,
        HugePages::Transparent,
    ]);
    let load_huge = words(&[
        LoadHugePages::Snapshot,
        LoadHugePages::None,
        LoadHugePages::Transparent,
        LoadHugePages::Hugetlbfs2M,
    ]);
    let levels = [
        Level::Error,
        Level::Warning,
        Level::Info,
        Level::Debug,
        Level::Trace,
        Level::Off,
    ];
    for level in levels {
        assert_eq!(value(level), level.name());
    }
    let states = [
        InstanceState::NotStarted,
        InstanceState::Running,
        InstanceState::Paused,
    ];
    let actions = [
        ActionType::FlushMetrics,
        ActionType::InstanceStart,
        ActionType::SendCtrlAltDel,
    ];
    let registers = [
        CpuidRegister::Eax,
        CpuidRegister::Ebx,
        CpuidRegister::Ecx,
        CpuidRegister::Edx,
    ];
    vec![
        ("CpuTemplate", "", template),
        ("CpuidRegisterModifier", "register", words(&registers)),
        (
            "Drive",
            "cache_type",
            words(&[CacheType::Unsafe, CacheType::Writeback]),
        ),
        (
            "Drive",
            "io_engine",
            words(&[IoEngine::Sync, IoEngine::Async]),
        ),
        ("InstanceActionInfo", "action_type", words(&actions)),
        ("InstanceInfo", "state", words(&states)),
        ("Logger", "level", words(&levels)),
        ("MachineConfiguration", "huge_pages", huge),
        (
            "MemoryBackend",
            "backend_type",
            words(&[MemoryBackendType::File, MemoryBackendType::Uffd]),
        ),
        (
            "MmdsConfig",
            "version",
            words(&[MmdsVersion::V1, MmdsVersion::V2]),
        ),
        (
            "SnapshotCreateParams",
            "snapshot_type",
            words(&[SnapshotType::Full, SnapshotType::Diff]),
        ),
        ("SnapshotLoadParams", "huge_pages", load_huge),
        ("Vm", "state", words(&[VmState::Paused, VmState::Resumed])),
    ]
}

#[test]
fn no_enum_value_lacks_its_twin() {
    let enums = enums();
    for description in descriptions("no_enum_value_lacks_its_twin") {
        for (name, schema) in &description.definitions {
            let properties = schema["properties"].as_object().into_iter().flatten();
            let places =
                std::iter::once(("", schema)).chain(properties.map(|(key, at)| (key.as_str(), at)));
            for (property, place) in places.filter(|(_, place)| place["enum"].is_array()) {
                let mut theirs: BTreeSet<String> = place["enum"]
                    .as_array()
                    .expect("a list")
                    .iter()
                    .map(|word| {
                        word.as_str()
                            .unwrap_or_else(|| panic!("{name} {property}: {word}"))
                            .to_owned()
                    })
                    .collect();
                let (_, _, ours) = enums
                    .iter()
                    .find(|(of, field, _)| of == name && *field == property)
                    .unwrap_or_else(|| {
                        panic!("{} {name} {property} has no type", description.version)
                    });
                if !description.version.has(Feature::TransparentHugePages)
                    && property == "huge_pages"
                {
                    assert!(theirs.insert("Transparent".to_owned()));
                }
                assert_eq!(ours, &theirs, "{} {name} {property}", description.version);
            }
        }
    }
}

#[tokio::test]
async fn every_path_and_method_has_its_call() {
    let ours = calls::all().await;
    let mut theirs = BTreeSet::new();
    for description in descriptions("every_path_and_method_has_its_call") {
        for (path, methods) in &description.paths {
            for method in methods.as_object().expect("methods").keys() {
                theirs.insert(format!("{} {path}", method.to_uppercase()));
            }
        }
    }
    if theirs.is_empty() {
        return;
    }
    // Firecracker has these since 1.16, and its description does not.
    for forgotten in [
        "/drives/{drive_id}",
        "/pmem/{id}",
        "/network-interfaces/{iface_id}",
    ] {
        assert!(theirs.insert(format!("DELETE {forgotten}")));
    }
    assert_eq!(ours, theirs);
}

#[test]
fn a_configuration_full_of_nulls_is_read() {
    // As Firecracker 1.12.1 answers before it was told anything.
    let empty = json!({
        "balloon": null, "drives": [], "boot-source": null, "cpu-config": null, "logger": null,
        "machine-config": {
            "vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false,
            "huge_pages": "None",
        },
        "metrics": null, "mmds-config": null, "network-interfaces": [], "vsock": null, "entropy": null,
    });
    let config: FullVmConfiguration = serde_json::from_value(empty).expect("read");
    assert_eq!(config.machine_config.expect("a machine").vcpu_count, 1);
    assert!(config.pmem.is_empty());
}
