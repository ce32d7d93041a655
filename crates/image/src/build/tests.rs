use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rekindle_store::image::named;

use super::*;

struct Scene {
    temp: tempfile::TempDir,
    root: Root,
}

impl Scene {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let root = Root::open(temp.path().join("state")).unwrap();
        Self { temp, root }
    }

    /// A directory with one of everything.
    fn tree(&self) -> PathBuf {
        let tree = self.temp.path().join("tree");
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
        fs::set_permissions(tree.join("etc/hosts"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::hard_link(tree.join("etc/hosts"), tree.join("again")).unwrap();
        symlink("/nowhere", tree.join("link")).unwrap();
        tree
    }

    fn build(&self, input: Input) -> Result<Named, BuildError> {
        Build::new("web".parse().unwrap(), input, "a test").run(&self.root)
    }

    fn nothing_is_left(&self) {
        assert_eq!(self.root.tmp().read_dir().unwrap().count(), 0);
        assert_eq!(self.root.images().read_dir().unwrap().count(), 0);
    }
}

fn read(image: &Path, path: &str) -> Vec<u8> {
    ext4_view::Ext4::load_from_path(image)
        .unwrap()
        .read(path)
        .unwrap()
}

#[test]
fn a_directory_is_built_twice_to_the_same_bytes() {
    let scene = Scene::new();
    let tree = scene.tree();
    let one = scene.build(Input::Directory(tree.clone())).unwrap();
    let inode = one.image.path.metadata().unwrap().ino();
    let two = scene.build(Input::Directory(tree.clone())).unwrap();
    assert_eq!(one.image, two.image);
    assert_ne!(
        inode,
        two.image.path.metadata().unwrap().ino(),
        "it was built again"
    );
    assert_eq!(read(&one.image.path, "/again"), b"127.0.0.1 localhost\n");
    let view = ext4_view::Ext4::load_from_path(&one.image.path).unwrap();
    assert_eq!(
        view.read_link("/link").unwrap().display().to_string(),
        "/nowhere"
    );
    let hosts = view.symlink_metadata("/etc/hosts").unwrap();
    assert_eq!(
        (hosts.mode() & 0o777, hosts.uid()),
        (0o600, tree.metadata().unwrap().uid())
    );
    fs::write(tree.join("etc/hosts"), "other").unwrap();
    let three = scene.build(Input::Directory(tree)).unwrap();
    assert_ne!(three.image, one.image);
    assert_eq!(
        read(&one.image.path, "/etc/hosts"),
        b"127.0.0.1 localhost\n"
    );
    assert_eq!(named(&scene.root, &three.name).unwrap(), three);
}

#[test]
fn a_tar_and_the_directory_that_it_is_of_are_the_same_image() {
    let scene = Scene::new();
    let tree = scene.tree();
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    builder.append_dir_all(".", &tree).unwrap();
    let path = scene.temp.path().join("tree.tar");
    fs::write(&path, builder.into_inner().unwrap()).unwrap();
    let mut build = Build::new("a".parse().unwrap(), Input::Tar(path), "tar");
    build.owner = Owner::Ids(7, 8);
    let of_tar = build.run(&scene.root).unwrap();
    assert!(
        of_tar
            .record
            .unwrap()
            .source_digest
            .unwrap()
            .starts_with("sha256:")
    );
    let mut build = Build::new("b".parse().unwrap(), Input::Directory(tree), "dir");
    build.owner = Owner::Ids(7, 8);
    let of_directory = build.run(&scene.root).unwrap();
    let hosts = |image: &Path| read(image, "/etc/hosts");
    assert_eq!(hosts(&of_tar.image.path), hosts(&of_directory.image.path));
    let view = ext4_view::Ext4::load_from_path(&of_directory.image.path).unwrap();
    let hosts = view.symlink_metadata("/etc/hosts").unwrap();
    assert_eq!((hosts.uid(), hosts.gid()), (7, 8));
}

#[test]
fn what_cannot_be_built_leaves_nothing_and_the_name_as_it_was() {
    let scene = Scene::new();
    let tree = scene.tree();
    let path = scene.temp.path().join("bad");
    fs::write(&path, "no archive".repeat(1000)).unwrap();
    let error = scene.build(Input::Tar(path.clone())).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot use {}", path.display()));
    scene.nothing_is_left();
    assert!(scene.build(Input::Tar("/no/such/file".into())).is_err());
    assert!(
        scene
            .build(Input::Directory("/no/such/directory".into()))
            .is_err()
    );
    let mut build = Build::new("a".parse().unwrap(), Input::Directory(tree.clone()), "dir");
    build.limits.bytes = 5;
    let error = build.run(&scene.root).unwrap_err();
    assert!(error.to_string().contains("larger than 5 bytes"), "{error}");
    let mut build = Build::new("a".parse().unwrap(), Input::Directory(tree.clone()), "dir");
    build.min_size = 2 << 40;
    assert!(matches!(
        build.run(&scene.root),
        Err(BuildError::Ext4(Ext4Error::TooLarge { .. }))
    ));
    scene.nothing_is_left();
}
