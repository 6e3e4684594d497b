//! SHA-256 of files, and lists of them as `sha256sum` writes and reads them.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use ring::digest::{Context, SHA256};

/// The SHA-256 of each file in hexadecimal, on all threads; a file is read by one of them.
pub(super) fn of_files(files: &[PathBuf]) -> Vec<io::Result<String>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(files.len());
    let next = AtomicUsize::new(0);
    let done: Mutex<BTreeMap<usize, io::Result<String>>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Relaxed);
                    let Some(file) = files.get(index) else { break };
                    let sum = of_file(file);
                    done.lock().unwrap_or_else(PoisonError::into_inner).insert(index, sum);
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

fn of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut context = Context::new(&SHA256);
    let mut room = vec![0; 1 << 20];
    loop {
        match file.read(&mut room) {
            Ok(0) => break,
            Ok(read) => context.update(&room[..read]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(context.finish().as_ref().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

/// Checksums by name.
pub(super) type Sums = BTreeMap<String, String>;

/// Reads a list.
///
/// Errors: in words, with the line.
pub(super) fn parse(text: &str) -> Result<Sums, String> {
    let mut sums = Sums::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = || format!("line {}: not 64 hexadecimal digits, two spaces and a name", i + 1);
        let (sum, name) = line.split_once(' ').ok_or_else(wrong)?;
        // A space before the name means text, a star binary; both are the same bytes.
        let name = name.strip_prefix([' ', '*']).ok_or_else(wrong)?;
        if sum.len() != 64 || !sum.bytes().all(|b| b.is_ascii_hexdigit()) || name.is_empty() {
            return Err(wrong());
        }
        let name = name.strip_prefix("./").unwrap_or(name);
        if sums.insert(name.to_owned(), sum.to_ascii_lowercase()).is_some() {
            return Err(format!("line {}: {name:?} stands twice", i + 1));
        }
    }
    Ok(sums)
}

/// Writes a list.
pub(super) fn render(sums: &Sums) -> String {
    sums.iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<PathBuf> = ["a", "b", "c"].iter().map(|name| folder.path().join(name)).collect();
        std::fs::write(&files[0], "").unwrap();
        std::fs::write(&files[1], "abc").unwrap();
        let sums = of_files(&files);
        assert_eq!(sums[0].as_ref().unwrap(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(sums[1].as_ref().unwrap(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(sums[2].is_err());
    }

    #[test]
    fn a_list_reads_back_and_a_broken_line_is_named() {
        let sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let sums = parse(&format!("{sum}  a/b c.bin\n{sum} *./d\n\n")).unwrap();
        assert_eq!(sums.keys().collect::<Vec<_>>(), ["a/b c.bin", "d"]);
        assert_eq!(parse(&render(&sums)).unwrap(), sums);
        for wrong in ["x  a", &format!("{sum} a"), &format!("{sum}  a\n{sum}  a"), sum] {
            assert!(parse(wrong).unwrap_err().starts_with("line "), "{wrong}");
        }
    }
}
