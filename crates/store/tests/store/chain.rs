use crate::fixture::{
    Fixture, PAGES, Written, contents, data_pages, given_data, memory, mixed, parts,
};
use proptest::collection::vec;
use proptest::prelude::*;
use rekindle_store::Snapshot;
use rekindle_store::collect::{Mode, collect};
use rekindle_store::flatten::{
    Flat, FlatError, FlatRun, FlattenError, FlattenSnapshotError, Source, flatten_to,
};
use rekindle_store::manifest::Kind;
use rekindle_store::pages::Pages;
use rekindle_store::snapshot::OpenError;
use rekindle_store::store::ChainError;
use rekindle_store::unit::{PAGE_SIZE, PageCount, PageNumber, PageRange};
use std::os::unix::fs::FileExt;

fn pages(chain: &[Snapshot]) -> Vec<&Pages> {
    chain.iter().map(Snapshot::pages).collect()
}

fn reparent(snapshot: &Snapshot, kind: Kind) {
    let mut manifest = snapshot.manifest().clone();
    manifest.kind = kind;
    std::fs::write(
        snapshot.dir().join("manifest.json"),
        manifest.to_bytes().unwrap(),
    )
    .unwrap();
}

#[test]
fn a_chain_runs_from_its_base_to_its_tip() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let middle = fixture.diff(base.id(), &mixed());
    let tip = fixture.diff(middle.id(), &mixed());
    let ids = [base.id(), middle.id(), tip.id()];
    let chain = fixture.store.chain(tip).unwrap();
    assert_eq!(chain.iter().map(Snapshot::id).collect::<Vec<_>>(), ids);
    assert_eq!(fixture.store.chain(base).unwrap().len(), 1);
}

#[test]
fn a_missing_or_broken_ancestor_is_named() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let middle = fixture.diff(base.id(), &mixed());
    let tip = fixture.diff(middle.id(), &mixed());
    std::fs::write(base.dir().join("vmstate"), "the state of a vm").unwrap();
    let ChainError::Open { id, source } = fixture.store.chain(tip).unwrap_err() else {
        panic!()
    };
    assert!(
        id == base.id() && matches!(source, OpenError::Damaged { .. }),
        "{source}"
    );
    std::fs::remove_dir_all(base.dir()).unwrap();
    let ChainError::Open { id, source } = fixture.store.chain(middle).unwrap_err() else {
        panic!()
    };
    assert!(
        id == base.id() && matches!(source, OpenError::NoSuchId { .. }),
        "{source}"
    );
}

#[test]
fn a_cycle_is_found() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let middle = fixture.diff(base.id(), &mixed());
    let tip = fixture.diff(middle.id(), &mixed());
    reparent(&middle, Kind::Diff { parent: tip.id() });
    let error = fixture.store.chain(tip).unwrap_err();
    assert!(matches!(error, ChainError::Cycle { .. }), "{error}");
}

#[test]
fn layers_that_are_no_chain_are_refused() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let diff = fixture.diff(base.id(), &mixed());
    let (base, diff) = (base.pages(), diff.pages());
    assert_eq!(Flat::of(&[]), Err(FlatError::Empty));
    assert_eq!(Flat::of(&[diff]), Err(FlatError::Kind { layer: 0 }));
    assert_eq!(Flat::of(&[base, base]), Err(FlatError::Kind { layer: 1 }));
    let mut long = vec![diff; 129];
    long[0] = base;
    assert_eq!(Flat::of(&long), Err(FlatError::TooLong { layers: 129 }));
    assert!(Flat::of(&long[..128]).is_ok());
}

#[test]
fn flattening_never_overwrites_and_leaves_nothing_when_it_fails() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let diff = fixture.diff(base.id(), &mixed());
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("memory");
    assert!(matches!(
        flatten_to(&[diff], &path),
        Err(FlattenError::Chain(_))
    ));
    assert!(!path.exists());
    std::fs::write(&path, "mine").unwrap();
    let memory = base.memory_path();
    let chain = [base];
    assert!(matches!(
        flatten_to(&chain, &path),
        Err(FlattenError::File(_))
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(memory, "short").unwrap();
    assert!(matches!(
        flatten_to(&chain, &path),
        Err(FlattenError::File(_))
    ));
    assert!(!path.exists());
}

fn index(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

/// Pages that a balloon took.
fn removals() -> impl Strategy<Value = Vec<PageRange>> {
    let range = (0..PAGES as u64, 1..40_u64).prop_map(|(first, count)| PageRange {
        first: PageNumber::new(first),
        count: PageCount::new(count.min(PAGES as u64 - first)),
    });
    vec(range, 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_reads_as_a_plain_map_of_pages(layers in vec((memory(), removals()), 1..8)) {
        let fixture = Fixture::new();
        // The model: what each page is after all layers.
        let mut model = vec![Written::Zeros; PAGES];
        let mut tip: Option<Snapshot> = None;
        for (layer, removed) in &layers {
            tip = Some(match tip {
                None => fixture.full(None, layer),
                Some(parent) => {
                    // What was given back and not written since is zero.
                    for range in removed {
                        model[index(range.first.get())..index(range.end().get())].fill(Written::Zeros);
                    }
                    let mut parts = parts(Kind::Diff { parent: parent.id() });
                    parts.removed.clone_from(removed);
                    fixture.draft(None, layer).publish(parts).unwrap()
                }
            });
            let changes = model.iter_mut().zip(layer).filter(|(_, written)| **written != Written::Nothing);
            changes.for_each(|(page, written)| *page = *written);
        }
        let chain = fixture.store.chain(tip.unwrap()).unwrap();
        chain.iter().for_each(|snapshot| snapshot.verify().unwrap());
        let expected: Vec<u8> = model.iter().flat_map(|&written| contents(written)).collect();

        let flat = Flat::of(&pages(&chain)).unwrap();
        let memories: Vec<_> = chain.iter().map(|snapshot| snapshot.open_memory().unwrap()).collect();
        let mut read = vec![0; PAGES * 4096];
        let mut next = 0;
        for FlatRun { first, count, source } in flat.runs() {
            prop_assert_eq!(first.get(), next);
            next += count.get();
            if let Source::Layer(layer) = source {
                let bytes = usize::try_from(first.offset().get()).unwrap()..usize::try_from(next * PAGE_SIZE).unwrap();
                memories[layer.get()].read_exact_at(&mut read[bytes], first.offset().get()).unwrap();
            }
            for page in first.get()..next {
                prop_assert_eq!(flat.source(PageNumber::new(page)), Some(source));
            }
        }
        prop_assert_eq!(next, PAGES as u64);
        prop_assert!(read == expected, "the map of the chain");

        let path = fixture.store.root().path().join("flat");
        flatten_to(&chain, &path).unwrap();
        prop_assert!(std::fs::read(&path).unwrap() == expected, "the flattened file");
        prop_assert_eq!(data_pages(&path), given_data(&model), "zeros are holes");

        let tip = fixture.store.snapshot(&chain.last().unwrap().id().to_string()).unwrap();
        let depth = chain.len();
        match fixture.store.flatten(tip, None, |_| {}) {
            Ok(full) => {
                prop_assert!(depth > 1);
                prop_assert_eq!(full.manifest().kind, Kind::Full);
                full.verify().unwrap();
                prop_assert!(std::fs::read(full.memory_path()).unwrap() == expected, "the flattened snapshot");
            }
            Err(error) => prop_assert!(depth == 1 && matches!(error, FlattenSnapshotError::Flat { .. }), "{}", error),
        }
    }
}

#[test]
fn a_run_is_cut_at_its_limit_and_at_the_end() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &[Written::Data(1); PAGES]);
    let flat = Flat::of(&[base.pages()]).unwrap();
    let run = |first, limit| {
        flat.run_from(PageNumber::new(first), PageCount::new(limit))
            .map(|run| (run.first.get(), run.count.get()))
    };
    assert_eq!(run(0, 16), Some((0, 16)));
    assert_eq!(run(250, 16), Some((250, 6)));
    assert_eq!(run(250, u64::MAX), Some((250, 6)));
    assert_eq!(run(256, 1), None);
    assert_eq!(run(u64::MAX, 1), None);
    assert_eq!(run(0, 0), None);
}

#[test]
fn a_flattened_snapshot_has_all_of_the_tip_and_needs_none_of_its_parents() {
    let fixture = Fixture::new();
    let base = fixture.full(Some("base"), &mixed());
    let tip = fixture.diff(base.id(), &[Written::Data(7); PAGES]);
    std::fs::write(tip.working_set_path(), "a hint").unwrap();
    let (base_id, tip_id) = (base.id(), tip.id());
    let expected = tip.manifest().clone();
    let flat = fixture
        .store
        .flatten(tip, Some("flat".parse().unwrap()), |_| {})
        .unwrap();
    fixture.store.remove(tip_id).unwrap();
    fixture.store.remove(base_id).unwrap();
    flat.verify().unwrap();
    let manifest = fixture.store.snapshot("flat").unwrap().manifest().clone();
    assert_eq!(manifest.devices, expected.devices);
    assert_eq!(manifest.files.vmstate, expected.files.vmstate);
    assert_eq!(manifest.notes, expected.notes);
    assert_eq!(std::fs::read(flat.working_set_path()).unwrap(), b"a hint");
}

#[test]
fn damage_is_not_flattened_into_a_sound_snapshot() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &[Written::Data(1); PAGES]);
    let tip = fixture.diff(base.id(), &mixed());
    let memory = std::fs::File::options()
        .write(true)
        .open(base.memory_path())
        .unwrap();
    memory.write_all_at(b"x", 5000).unwrap();
    let before = fixture.entries();
    let error = fixture.store.flatten(tip, None, |_| {}).unwrap_err();
    assert!(
        matches!(error, FlattenSnapshotError::Damaged { id, .. } if id == base.id()),
        "{error}"
    );
    assert_eq!(fixture.entries(), before);
}

#[test]
fn nothing_writes_to_memory_files_that_something_maps() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let tip = fixture.diff(base.id(), &mixed());
    let stamp = |snapshot: &Snapshot| {
        let meta = std::fs::metadata(snapshot.memory_path()).unwrap();
        (
            std::os::unix::fs::MetadataExt::ino(&meta),
            meta.modified().unwrap(),
            std::fs::read(snapshot.memory_path()).unwrap(),
        )
    };
    let leases = [base.lease().unwrap(), tip.lease().unwrap()];
    let (before_base, before_tip) = (stamp(&base), stamp(&tip));
    let later = fixture.diff(tip.id(), &mixed());
    fixture.store.flatten(later, None, |_| {}).unwrap();
    collect(fixture.store.root(), Mode::Reclaim).unwrap();
    for snapshot in [&base, &tip] {
        assert!(fixture.store.remove(snapshot.id()).is_err());
        snapshot.verify().unwrap();
    }
    assert!(stamp(&base) == before_base && stamp(&tip) == before_tip);
    drop(leases);
}
