//! Memory that is fetched from a repository: a directory whose packs can be late, or wrong.
//!
//! ```text
//! <directory>/late   a pack and an offset: the reads that take it in wait for as long as the file is there
//!             wrong  so many reads bring a wrong byte
//! ```

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use rekindle_kit::uffd::{Build, FakeVm, Order};
use rekindle_pager::{
    Ended, KillReason, OpenPlace, Opened, Options, PackedSource, Prefetch, Socket, Source,
};
use rekindle_store::packed::{
    Directory, Fetch, Index, Object, ObjectError, Objects, Place, Put, Repository,
};
use rekindle_store::unit::PageNumber;
use rekindle_store::{Root, Store};
use tempfile::TempDir;

use crate::chains::a_chain;
use crate::scene::Pager;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        Story::new("a packed chain of Diffs is one memory", one_memory),
        Story::new("what is late delays who waits for it and nobody else", late),
        Story::new("what comes wrong is fetched once more", wrong_once),
        Story::new(
            "what is wrong twice ends the VM with the reason",
            wrong_twice,
        ),
    ]
}

/// A repository in a directory, with its failings.
#[derive(Debug)]
struct Failing {
    inner: Directory,
    path: PathBuf,
    counting: Mutex<()>,
}

impl Failing {
    fn open(place: &str, _: Duration) -> Opened {
        Ok(Box::new(Failing {
            inner: Directory::at(place),
            path: place.into(),
            counting: Mutex::default(),
        }))
    }

    /// Whether this read is to be wrong.
    fn lies(&self) -> bool {
        let _one = self.counting.lock();
        let file = self.path.join("wrong");
        let told = fs::read_to_string(&file).unwrap_or_default();
        let left: u64 = told.parse().unwrap_or(0);
        let _ = fs::write(&file, left.saturating_sub(1).to_string());
        left > 0
    }
}

impl Objects for Failing {
    fn url(&self, object: &Object) -> String {
        self.inner.url(object)
    }

    fn place(&self) -> String {
        self.inner.place()
    }

    fn at_once(&self) -> usize {
        self.inner.at_once()
    }

    fn prepare(&self) -> Result<(), ObjectError> {
        self.inner.prepare()
    }

    fn size(&self, object: &Object) -> Result<Option<u64>, ObjectError> {
        self.inner.size(object)
    }

    fn get(&self, object: &Object, limit: u64) -> Result<Option<Vec<u8>>, ObjectError> {
        self.inner.get(object, limit)
    }

    fn read(&self, object: &Object, range: Range<u64>) -> Result<Vec<u8>, ObjectError> {
        let is_late = |text: String| {
            let (pack, at) = text.split_once(' ').unwrap_or_default();
            pack == object.to_string() && at.parse().is_ok_and(|at| range.contains(&at))
        };
        while fs::read_to_string(self.path.join("late")).is_ok_and(is_late) {
            sleep(Duration::from_millis(1));
        }
        let mut bytes = self.inner.read(object, range)?;
        if self.lies() {
            bytes[0] ^= 1;
        }
        Ok(bytes)
    }

    fn put(&self, object: &Object, bytes: Vec<u8>) -> Result<Put, ObjectError> {
        self.inner.put(object, bytes)
    }

    fn remove(&self, object: &Object) -> Result<(), ObjectError> {
        self.inner.remove(object)
    }
}

/// A chain in a repository, and who serves it.
struct Far {
    dir: TempDir,
    model: Vec<u64>,
    base: Index,
    pager: Pager,
}

impl Far {
    fn start() -> anyhow::Result<Far> {
        requires_root()?;
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name);
        let root = Root::open(at("root"))?;
        let store = Store::open(root.clone());
        let (tip, model) = a_chain(&store)?;
        let key = tip.id().to_string();
        let repository = Repository::directory(at("far"));
        repository.push(&store, tip, None, &|_| {})?;
        let outline = repository.outline(&root, &key, None)?;
        let objects = Directory::at(at("far"));
        let fetch = Fetch {
            objects: &objects,
            cache: None,
        };
        outline.lay(fetch, &at("outline"))?;
        let source = PackedSource {
            outline: at("outline"),
            place: at("far").display().to_string(),
            root: Some(at("here")),
            cache_bytes: 1 << 30,
            patience: Duration::from_secs(1),
            prefetch: Prefetch::WorkingSet,
        };
        let socket = Socket::Path(at("pager.sock"));
        let mut options = Options::new(socket, Source::Packed(source));
        options.open_place = Some(OpenPlace(Failing::open));
        let first = outline.indexes().first().context("a base")?;
        Ok(Far {
            base: Index::clone(first),
            pager: Pager::start(options)?,
            dir,
            model,
        })
    }

    fn vm(&self) -> anyhow::Result<FakeVm> {
        let vm = FakeVm::start(&Build {
            regions: vec![512],
            huge: false,
            blocking: false,
        })?;
        vm.thread()?.ask(&Order::handshake(&self.pager.socket()))?;
        Ok(vm)
    }

    fn says(&self, file: &str, text: &str) -> anyhow::Result<()> {
        Ok(fs::write(self.file(file), text)?)
    }

    fn file(&self, name: &str) -> PathBuf {
        Path::new(self.dir.path()).join("far").join(name)
    }
}

fn one_memory() -> anyhow::Result<()> {
    let far = Far::start()?;
    let mut vm = far.vm()?;
    let seen = vm.thread()?.read(0, 512)?;
    let wrong: Vec<_> = (0..512)
        .filter(|&page| seen[page] != far.model[page])
        .collect();
    ensure!(wrong.is_empty(), "pages {wrong:?} are wrong");
    vm.kill()?;
    let stats = far.pager.end()??;
    ensure!(stats.ended == Some(Ended::VmExited), "{stats:?}");
    ensure!(
        stats.fetched_bytes > 0 && stats.fetched_requests > 0,
        "{stats:?}"
    );
    Ok(())
}

fn late() -> anyhow::Result<()> {
    let far = Far::start()?;
    // Where page 1 of the base is.
    let place = far.base.streams()[0].place(PageNumber::new(1));
    let Some(Place::Chunk { chunk, .. }) = place else {
        anyhow::bail!("page 1 is {place:?}");
    };
    let chunk = far.base.chunks()[usize::try_from(chunk)?];
    let pack = Object::Pack(far.base.packs()[usize::try_from(chunk.pack)?].name);
    far.says("late", &format!("{pack} {}", chunk.range().start))?;
    let mut vm = far.vm()?;
    let mut waiting: Vec<_> = (1..5)
        .map(|page| {
            let mut thread = vm.thread()?;
            thread.begin(&Order::Read { page, count: 1 })?;
            Ok(thread)
        })
        .collect::<anyhow::Result<_>>()?;
    ensure!(waiting[0].still_waits_after(Duration::from_millis(200))?);
    // More chunks than threads that look for them.
    let mut other = vm.thread()?;
    ensure!(other.read(16, 496)? == far.model[16..]);
    for thread in &mut waiting {
        ensure!(thread.still_waits_after(Duration::from_millis(1))?);
    }
    fs::remove_file(far.file("late"))?;
    for (page, thread) in (1..).zip(&mut waiting) {
        let answer = thread.finish()?.context("the VM lives")?;
        let expected = rekindle_kit::uffd::Answer::Stamps(vec![Some(far.model[page])]);
        ensure!(answer == expected, "page {page}: {answer:?}");
    }
    vm.kill()?;
    ensure!(far.pager.end()??.ended == Some(Ended::VmExited));
    Ok(())
}

fn wrong_once() -> anyhow::Result<()> {
    let far = Far::start()?;
    far.says("wrong", "1")?;
    let mut vm = far.vm()?;
    ensure!(vm.thread()?.read(0, 512)? == far.model);
    ensure!(fs::read_to_string(far.file("wrong"))? == "0");
    vm.kill()?;
    ensure!(far.pager.end()??.ended == Some(Ended::VmExited));
    Ok(())
}

fn wrong_twice() -> anyhow::Result<()> {
    let far = Far::start()?;
    far.says("wrong", "1000000")?;
    let mut vm = far.vm()?;
    let mut thread = vm.thread()?;
    thread.begin(&Order::Read { page: 1, count: 1 })?;
    ensure!(thread.finish()?.is_none(), "it saw a page");
    vm.wait()?;
    let Some(Ended::VmKilled {
        reason: KillReason::Unfetched { page: 1, said },
    }) = far.pager.end()??.ended
    else {
        anyhow::bail!("another reason");
    };
    ensure!(said.contains("is damaged: the chunk at"), "{said}");
    Ok(())
}
