//! The table of a batch: a row is a video, and what is wrong with one is its own.

use std::{
    collections::HashMap,
    fs,
    path::{Component, Path, PathBuf},
};

use csv::{ByteRecord, ReaderBuilder};

use crate::failure::Failure;

/// The columns, in the order of the official tables.
const COLUMNS: [&str; 5] = ["videoid", "image", "audio", "prompt", "fps"];
/// Largest table.
const TABLE_BYTES: u64 = 16 << 20;
/// Most rows.
const ROWS: usize = 100_000;
/// Most bytes of a videoid: with the extension a name that every file system takes.
const ID_BYTES: usize = 100;
/// Most characters of a wrong value that are shown.
const SHOWN: usize = 100;

/// One video.
#[derive(Debug)]
pub(super) struct Row {
    /// The videoid as it is written, for people; a path is made of it only where `wanted` is good.
    pub(super) videoid: String,
    /// What the video is made of, or what is wrong.
    pub(super) wanted: Result<Wanted, Failure>,
}

/// What a video is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Letters, digits, `.`, `_` and `-`, not beginning with one of the three.
    pub(super) videoid: String,
    /// The picture's file.
    pub(super) image: PathBuf,
    /// The recording's file.
    pub(super) audio: PathBuf,
    /// What the person does.
    pub(super) prompt: String,
}

/// Reads a table; paths in it start in `root`, else in its own folder.
///
/// Errors: the table cannot be read, is too large, or has other columns. What is wrong with a row is in the row.
pub(super) fn read(file: &Path, root: Option<&Path>) -> Result<Vec<Row>, Failure> {
    let wrong = |reason: String| Failure::input("csv", format!("{}: {reason}", file.display()));
    let length = fs::metadata(file).map_err(|error| wrong(error.to_string()))?.len();
    if length > TABLE_BYTES {
        return Err(wrong(format!("{length} bytes; the limit is {TABLE_BYTES}")));
    }
    let bytes = fs::read(file).map_err(|error| wrong(error.to_string()))?;
    let own = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = root.unwrap_or(own);
    let folder =
        folder.canonicalize().map_err(|error| Failure::input("root", format!("{}: {error}", folder.display())))?;
    parse(&bytes, &folder).map_err(wrong)
}

/// The rows of a table's bytes; `root` is canonical.
fn parse(bytes: &[u8], root: &Path) -> Result<Vec<Row>, String> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut reader = ReaderBuilder::new().flexible(true).from_reader(bytes);
    let heads = reader.byte_headers().map_err(|error| error.to_string())?.clone();
    let places = columns(&heads)?;
    let (mut rows, mut first) = (Vec::new(), HashMap::new());
    for (record, number) in reader.byte_records().zip(1..) {
        if number > ROWS {
            return Err(format!("more than {ROWS} rows, the limit"));
        }
        let record = record.map_err(|error| error.to_string())?;
        let videoid = String::from_utf8_lossy(record.get(places[0]).unwrap_or_default());
        let videoid = shortened(&videoid);
        let wanted = row(&record, (heads.len(), places), (root, &first));
        if let Ok(row) = &wanted {
            first.insert(as_a_name(&row.videoid), number);
        }
        rows.push(Row { videoid, wanted });
    }
    Ok(rows)
}

/// Where each of the columns is.
fn columns(heads: &ByteRecord) -> Result<[usize; 5], String> {
    let heads: Vec<String> = heads.iter().map(|head| String::from_utf8_lossy(head).trim().to_owned()).collect();
    let needed = || format!("the columns must be {}", COLUMNS.join(", "));
    if let Some(other) = heads.iter().find(|head| !COLUMNS.contains(&head.as_str())) {
        return Err(format!("{:?} is no column; {}", shortened(other), needed()));
    }
    let mut places = [0; 5];
    for (place, name) in places.iter_mut().zip(COLUMNS) {
        let mut found = heads.iter().enumerate().filter(|(_, head)| *head == name);
        *place = match (found.next(), found.next()) {
            (Some((at, _)), None) => at,
            (None, _) => return Err(format!("the column {name} is missing; {}", needed())),
            (Some(_), Some(_)) => return Err(format!("the column {name} is there twice; {}", needed())),
        };
    }
    Ok(places)
}

/// A videoid as file systems see it: some do not tell capitals from small letters.
fn as_a_name(videoid: &str) -> String {
    videoid.to_ascii_lowercase()
}

/// Checks one row of a table with so many columns; `first` has the rows before it by their videoids.
///
/// Errors: everything that is wrong, together.
fn row(
    record: &ByteRecord,
    (width, places): (usize, [usize; 5]),
    (root, first): (&Path, &HashMap<String, usize>),
) -> Result<Wanted, Failure> {
    if record.len() != width {
        return Err(Failure::input("row", format!("it has {} values; the table has {width} columns", record.len())));
    }
    let text = |column: usize| {
        let bytes = record.get(places[column]).unwrap_or_default();
        let text = std::str::from_utf8(bytes);
        text.map(str::to_owned).map_err(|_| Failure::input(COLUMNS[column], "it is not valid UTF-8"))
    };
    let videoid = text(0).and_then(|videoid| {
        check_id(&videoid)?;
        match first.get(&as_a_name(&videoid)) {
            None => Ok(videoid),
            Some(earlier) => {
                let message = format!("{videoid:?} is also that of row {earlier}, and names its video");
                Err(Failure::input("videoid", message))
            }
        }
    });
    let image = text(1).and_then(|image| inside(root, "image", &image));
    let audio = text(2).and_then(|audio| inside(root, "audio", &audio));
    match (videoid, image, audio, text(3), text(4).and_then(|fps| check_rate(&fps))) {
        (Ok(videoid), Ok(image), Ok(audio), Ok(prompt), Ok(())) => Ok(Wanted { videoid, image, audio, prompt }),
        (videoid, image, audio, prompt, fps) => {
            Err(together([videoid.err(), image.err(), audio.err(), prompt.err(), fps.err()]))
        }
    }
}

/// What is wrong with several columns, as one; the first one is at fault.
fn together(wrong: [Option<Failure>; 5]) -> Failure {
    let wrong: Vec<Failure> = wrong.into_iter().flatten().collect();
    if let [only] = wrong.as_slice() {
        return only.clone();
    }
    let sentences = wrong.iter().map(|one| format!("{}: {}", one.field.as_deref().unwrap_or_default(), one.message));
    let message = sentences.collect::<Vec<_>>().join("; ");
    Failure::input(wrong.first().and_then(|one| one.field.as_deref()).unwrap_or("row"), message)
}

/// Refuses a rate that is not the model's; an empty one stands for it.
fn check_rate(fps: &str) -> Result<(), Failure> {
    let rate = fps.trim();
    if rate.is_empty() || rate.parse::<f64>() == Ok(f64::from(planner::clip::FPS)) {
        return Ok(());
    }
    let message = format!("{:?}; the model makes {} frames a second", shortened(rate), planner::clip::FPS);
    Err(Failure::input("fps", message))
}

/// Refuses a videoid that would not be a plain file's name.
fn check_id(videoid: &str) -> Result<(), Failure> {
    let wrong = |reason: &str| Err(Failure::input("videoid", format!("{:?} {reason}", shortened(videoid))));
    if videoid.len() > ID_BYTES {
        return wrong(&format!("has {} bytes; the limit is {ID_BYTES}", videoid.len()));
    }
    if !videoid.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return wrong("does not begin with a letter or digit (A-Z a-z 0-9)");
    }
    let stem = videoid.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let numbered = stem.strip_prefix("com").or(stem.strip_prefix("lpt"));
    let is_port = numbered.is_some_and(|number| number.len() == 1 && number.starts_with(|c: char| c.is_ascii_digit()));
    if is_port || matches!(stem.as_str(), "con" | "prn" | "aux" | "nul") {
        return wrong("is the name of a device on Windows, where no file can have it");
    }
    match videoid.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-')) {
        Some(other) => wrong(&format!("has the character {other:?}; allowed are A-Z a-z 0-9 . _ -")),
        None => Ok(()),
    }
}

/// The file at a relative path that does not leave `root`, not even by a link.
fn inside(root: &Path, field: &str, text: &str) -> Result<PathBuf, Failure> {
    let wrong = |reason: String| Failure::input(field, format!("{:?}: {reason}", shortened(text)));
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if text.is_empty() || text.contains('\0') || !plain {
        return Err(wrong("a relative path without .. is needed".to_owned()));
    }
    let found = root.join(path).canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => wrong("there is no such file".to_owned()),
        _ => wrong(error.to_string()),
    })?;
    if !found.starts_with(root) {
        return Err(wrong("it leads out of the folder that the table's paths start in".to_owned()));
    }
    Ok(found)
}

/// As much of a hostile text as is shown.
fn shortened(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap().join("table");
        fs::create_dir_all(root.join("in")).unwrap();
        fs::write(root.join("in/a.png"), "x").unwrap();
        fs::write(root.join("a.wav"), "x").unwrap();
        fs::write(folder.path().join("secret"), "x").unwrap();
        (folder, root)
    }

    fn field(row: &Row) -> Option<&str> {
        row.wanted.as_ref().err().and_then(|failure| failure.field.as_deref())
    }

    #[test]
    fn the_official_columns_are_read_in_any_order_with_a_mark_before_them() {
        let (_folder, root) = folder();
        let text = "\u{feff}videoid,image,audio,prompt,fps\n1,in/a.png,a.wav,\"Sits, and\nspeaks\",25\n";
        let rows = parse(text.as_bytes(), &root).unwrap();
        let wanted = rows[0].wanted.as_ref().unwrap();
        assert_eq!((wanted.videoid.as_str(), wanted.prompt.as_str()), ("1", "Sits, and\nspeaks"));
        assert_eq!((&wanted.image, &wanted.audio), (&root.join("in/a.png"), &root.join("a.wav")));
        let other = parse(b"fps,prompt,audio,image,videoid\r\n25.0,,a.wav,./in/a.png,1\r\n", &root).unwrap();
        assert!(other[0].wanted.is_ok(), "{other:?}");
    }

    #[test]
    fn a_table_of_other_columns_is_refused() {
        let (_folder, root) = folder();
        for (heads, part) in [
            ("videoid,image,audio,prompt", "fps is missing"),
            ("videoid,image,audio,prompt,fps,seed", "\"seed\" is no column"),
            ("videoid,image,image,audio,prompt,fps", "image is there twice"),
            ("", "videoid is missing"),
        ] {
            let error = parse(heads.as_bytes(), &root).unwrap_err();
            assert!(error.contains(part), "{heads}: {error}");
        }
    }

    #[test]
    fn a_wrong_row_names_its_column_and_leaves_the_others_alone() {
        let (_folder, root) = folder();
        std::os::unix::fs::symlink("../secret", root.join("link")).unwrap();
        let good = ["in/a.png", "a.wav", "", "25"];
        let with = |id: &str, [image, audio, prompt, fps]: [&str; 4]| format!("{id},{image},{audio},{prompt},{fps}\n");
        let cases = [
            ("first", good, None),
            ("../etc", good, Some("videoid")),
            ("", good, Some("videoid")),
            (".hidden", good, Some("videoid")),
            ("-rf", good, Some("videoid")),
            ("a/b", good, Some("videoid")),
            ("é", good, Some("videoid")),
            ("FIRST", good, Some("videoid")),
            ("..", good, Some("videoid")),
            ("con", good, Some("videoid")),
            ("NUL.1", good, Some("videoid")),
            ("Com7", good, Some("videoid")),
            ("console", good, None),
            ("com10", good, None),
            ("b1", ["../secret", "a.wav", "", "25"], Some("image")),
            ("b2", ["/etc/passwd", "a.wav", "", "25"], Some("image")),
            ("b3", ["link", "a.wav", "", "25"], Some("image")),
            ("b4", ["in/a.png", "", "", "25"], Some("audio")),
            ("b5", ["in/a.png", "none.wav", "", "25"], Some("audio")),
            ("b6", ["in/a.png", "a.wav", "", "24"], Some("fps")),
            ("b7", ["in/a.png", "a.wav", "", "NaN"], Some("fps")),
            ("b8", ["in/a.png", "a.wav", "one,two", "25"], Some("row")),
            ("last", ["in/a.png", "a.wav", "", ""], None),
        ];
        let mut text = "videoid,image,audio,prompt,fps\n".to_owned();
        text.extend(cases.iter().map(|(id, values, _)| with(id, *values)));
        let mut bytes = text.into_bytes();
        bytes.extend(b"z,in/a.png,a.wav,\xff,25\n");
        let rows = parse(&bytes, &root).unwrap();
        assert_eq!(rows.len(), cases.len() + 1);
        for (row, (id, _, expected)) in rows.iter().zip(cases) {
            assert_eq!(field(row), expected, "{id}");
        }
        assert_eq!(field(&rows[cases.len()]), Some("prompt"));
    }

    #[test]
    fn all_that_is_wrong_with_a_row_is_told_at_once() {
        let (_folder, root) = folder();
        let text = "videoid,image,audio,prompt,fps\na,in/a.png,a.wav,,25\nA,../secret,none.wav,,24\n";
        let rows = parse(text.as_bytes(), &root).unwrap();
        let failure = rows[1].wanted.as_ref().unwrap_err();
        assert_eq!(failure.field.as_deref(), Some("videoid"));
        for part in
            ["videoid: \"A\" is also that of row 1", "image: \"../secret\"", "audio: \"none.wav\"", "fps: \"24\""]
        {
            assert!(failure.message.contains(part), "{part} in {}", failure.message);
        }
    }

    #[test]
    fn a_table_without_rows_has_none() {
        let (_folder, root) = folder();
        assert!(parse(b"videoid,image,audio,prompt,fps\n", &root).unwrap().is_empty());
    }

    #[test]
    fn a_very_long_videoid_is_shown_in_part() {
        let (_folder, root) = folder();
        let text = format!("videoid,image,audio,prompt,fps\n{},in/a.png,a.wav,,25\n", "x".repeat(100_000));
        let rows = parse(text.as_bytes(), &root).unwrap();
        assert_eq!(rows[0].videoid.len(), SHOWN);
        assert!(rows[0].wanted.as_ref().unwrap_err().message.len() < 400);
    }
}
