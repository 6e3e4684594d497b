//! Loss of power while files are kept, played: after each operation on the disk, with each part of what was not flushed
//! there or not, and each file that was not flushed cut at each byte.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use super::{
    Artifact, ArtifactError,
    disk::{Disk, Real},
    folder::Folder,
};

/// An operation, with paths below the folder that the power-loss leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Op {
    MakeFolder(PathBuf),
    Write(PathBuf, Vec<u8>),
    FlushFile(PathBuf),
    Rename(PathBuf, PathBuf),
    FlushFolder(PathBuf),
}

/// Does what is asked of it, and notes it.
#[derive(Debug)]
struct Recorder {
    root: PathBuf,
    log: Mutex<Vec<Op>>,
}

impl Recorder {
    fn note(&self, op: impl FnOnce(&dyn Fn(&Path) -> PathBuf) -> Op) {
        let below = |path: &Path| path.strip_prefix(&self.root).unwrap().to_owned();
        self.log.lock().unwrap().push(op(&below));
    }

    fn noted(&self) -> usize {
        self.log.lock().unwrap().len()
    }
}

impl Disk for Recorder {
    fn make_folder(&self, path: &Path) -> io::Result<()> {
        self.note(|below| Op::MakeFolder(below(path)));
        Real.make_folder(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.note(|below| Op::Write(below(path), bytes.to_owned()));
        Real.write(path, bytes)
    }

    fn flush_file(&self, path: &Path) -> io::Result<()> {
        self.note(|below| Op::FlushFile(below(path)));
        Real.flush_file(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.note(|below| Op::Rename(below(from), below(to)));
        Real.rename(from, to)
    }

    fn flush_folder(&self, path: &Path) -> io::Result<()> {
        self.note(|below| Op::FlushFolder(below(path)));
        Real.flush_folder(path)
    }
}

/// What a name is the name of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Folder,
    File(usize),
}

/// A disk as the operations leave it. A name is on it for certain once its folder is flushed, bytes once their file is.
#[derive(Debug, Default)]
struct Model {
    /// Bytes of files, and whether they were flushed.
    files: Vec<(Vec<u8>, bool)>,
    /// Names as a running system sees them.
    seen: BTreeMap<PathBuf, Node>,
    /// Names that came (to something) or went, in order, and whether that was flushed.
    changes: Vec<(PathBuf, Option<Node>, bool)>,
}

impl Model {
    fn after(ops: &[Op]) -> Self {
        let mut model = Self::default();
        for op in ops {
            match op {
                Op::MakeFolder(path) => model.change(path, Some(Node::Folder)),
                Op::Write(path, bytes) => {
                    model.files.push((bytes.clone(), false));
                    model.change(path, Some(Node::File(model.files.len() - 1)));
                }
                Op::FlushFile(path) => {
                    let Some(Node::File(file)) = model.seen.get(path) else { panic!("{path:?} is no file") };
                    model.files[*file].1 = true;
                }
                Op::Rename(from, to) => {
                    let node = model.seen[from];
                    model.change(to, Some(node));
                    model.change(from, None);
                }
                Op::FlushFolder(path) => {
                    for (name, _, flushed) in &mut model.changes {
                        *flushed |= name.parent() == Some(path);
                    }
                }
            }
        }
        model
    }

    fn change(&mut self, path: &Path, node: Option<Node>) {
        match node {
            Some(node) => self.seen.insert(path.to_owned(), node),
            None => self.seen.remove(path),
        };
        self.changes.push((path.to_owned(), node, false));
    }

    /// Every state that the disk may be in: each name's folders and files, and each file's bytes.
    fn states(&self) -> Vec<BTreeMap<PathBuf, Option<Vec<u8>>>> {
        // Nobody looks into a folder for work again, so what is named there does not matter.
        let matters = |path: &Path| path.parent() != Some(Path::new("work"));
        let open: Vec<usize> =
            (0..self.changes.len()).filter(|&i| !self.changes[i].2 && matters(&self.changes[i].0)).collect();
        let mut states = Vec::new();
        for chosen in 0..1_usize << open.len() {
            let mut names = BTreeMap::new();
            for (i, (path, node, flushed)) in self.changes.iter().enumerate() {
                let bit = open.iter().position(|&j| j == i);
                if *flushed || bit.is_none_or(|bit| chosen >> bit & 1 == 1) {
                    names.insert(path.clone(), *node);
                }
            }
            // What is in a folder that is not there is not there either.
            let there = |path: &Path| {
                ["", "work"].map(Path::new).contains(&path) || names.get(path).is_some_and(Option::is_some)
            };
            let named = names.iter().filter_map(|(path, node)| Some((path.clone(), (*node)?)));
            let kept: Vec<_> = named.filter(|(path, _)| path.ancestors().skip(1).all(there)).collect();
            let bytes = |cut: &dyn Fn(&[u8]) -> Vec<u8>| -> BTreeMap<PathBuf, Option<Vec<u8>>> {
                let of = |node: &Node| match node {
                    Node::Folder => None,
                    Node::File(file) if self.files[*file].1 => Some(self.files[*file].0.clone()),
                    Node::File(file) => Some(cut(&self.files[*file].0)),
                };
                kept.iter().map(|(path, node)| (path.clone(), of(node))).collect()
            };
            let unsure = kept.iter().filter_map(|(_, node)| match node {
                Node::File(file) if !self.files[*file].1 => Some(self.files[*file].0.len()),
                _ => None,
            });
            match unsure.max() {
                None => states.push(bytes(&|whole| whole.to_owned())),
                Some(longest) => {
                    states.extend((0..=longest).map(|cut| bytes(&|whole| whole[..cut.min(whole.len())].to_owned())));
                    // The length may be there before the bytes are.
                    states.push(bytes(&|whole| vec![0; whole.len()]));
                }
            }
        }
        states
    }
}

/// What is kept, one after the other; the last one once more.
fn contents() -> Vec<Vec<u8>> {
    vec![b"the first file".to_vec(), (0..16).collect(), Vec::new(), (0..16).collect()]
}

fn folder(root: &Path, disk: Arc<dyn Disk>) -> Folder {
    Folder::open(disk, &root.join("data/artifacts"), &root.join("work")).unwrap()
}

/// The operations that keep all contents, and after how many of them each was said to be kept.
fn record() -> (Vec<Op>, Vec<usize>) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("work")).unwrap();
    let recorder = Arc::new(Recorder { root: dir.path().to_owned(), log: Mutex::default() });
    let folder = folder(dir.path(), recorder.clone());
    let mut kept = Vec::new();
    for bytes in contents() {
        folder.put(&bytes, &Artifact::of(&bytes)).unwrap();
        kept.push(recorder.noted());
    }
    let ops = recorder.log.lock().unwrap().clone();
    (ops, kept)
}

/// Plays a loss of power after each operation; gives what was wrong afterwards.
fn play(ops: &[Op], kept: &[usize]) -> Vec<String> {
    let mut wrong = Vec::new();
    for end in 0..=ops.len() {
        for state in Model::after(&ops[..end]).states() {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("work")).unwrap();
            for (path, bytes) in &state {
                match bytes {
                    None => fs::create_dir(dir.path().join(path)).unwrap(),
                    Some(bytes) => fs::write(dir.path().join(path), bytes).unwrap(),
                }
            }
            // The next process has a folder for work of its own.
            fs::create_dir(dir.path().join("work/next")).unwrap();
            let files = dir.path().join("data/artifacts");
            let folder = Folder::open(Arc::new(Real), &files, &dir.path().join("work/next")).unwrap();
            for (bytes, said) in contents().iter().zip(kept) {
                let artifact = Artifact::of(bytes);
                match folder.read(&artifact) {
                    Ok(read) if read == *bytes => continue,
                    Err(ArtifactError::Gone(_)) if end < *said => {}
                    other => wrong.push(format!("after {end} operations {state:?}: {other:?}")),
                }
                folder.put(bytes, &artifact).unwrap();
                assert_eq!(folder.read(&artifact).unwrap(), *bytes);
            }
        }
    }
    wrong
}

#[test]
fn a_loss_of_power_at_any_operation_and_byte_leaves_each_file_whole_or_absent_and_what_was_kept_stays() {
    let (ops, kept) = record();
    let writes = ops.iter().filter(|op| matches!(op, Op::Write(..))).count();
    assert_eq!(writes, contents().len());
    assert_eq!(play(&ops, &kept), Vec::<String>::new());
}

#[test]
fn without_its_flushes_the_folder_would_lose_files_or_have_damaged_ones() {
    let (ops, kept) = record();
    let flushes: [fn(&Op) -> bool; 4] = [
        |op| matches!(op, Op::FlushFile(_)),
        |op| matches!(op, Op::FlushFolder(path) if path == Path::new("data/artifacts")),
        |op| matches!(op, Op::FlushFolder(path) if path == Path::new("data")),
        |op| matches!(op, Op::FlushFolder(path) if path.components().count() == 3),
    ];
    for left_out in flushes {
        // The last content is the second one once more, which would hide a loss.
        let fewer: Vec<Op> = ops[..kept[0]].iter().filter(|op| !left_out(op)).cloned().collect();
        assert!(fewer.len() < kept[0]);
        let said = [fewer.len(), usize::MAX, usize::MAX, usize::MAX];
        assert!(!play(&fewer, &said).is_empty());
    }
}
