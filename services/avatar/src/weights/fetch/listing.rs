//! What a repository says that it holds. All of it is a stranger's word.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::digest::Digest;

/// Characters of the longest path that is read.
const PATH_LENGTH: usize = 1024;

/// A repository's files by path.
#[derive(Debug, Default)]
pub struct Listing {
    files: BTreeMap<String, Listed>,
}

/// What the repository says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The file's length.
    pub bytes: u64,
    /// Its hash; `None` if the repository gives none that can be checked.
    pub digest: Option<Digest>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<Pointer>,
}

/// A large file, which git itself holds only a pointer to.
#[derive(Deserialize)]
struct Pointer {
    oid: String,
    size: u64,
}

impl Listing {
    /// Adds one page.
    ///
    /// Errors: it is no such list, a path leads out of the folder, or two entries name one file.
    pub fn add(&mut self, page: &[u8]) -> Result<(), String> {
        let entries: Vec<Entry> =
            serde_json::from_slice(page).map_err(|e| format!("the listing is not what was expected: {e}"))?;
        for entry in entries {
            if !is_plain(&entry.path) {
                let shown: String = entry.path.chars().take(120).collect();
                return Err(format!("the listing holds the path {shown:?}, which does not stay inside a folder"));
            }
            if entry.kind != "file" {
                continue;
            }
            let (bytes, digest) = match entry.lfs {
                Some(pointer) => (pointer.size, Digest::sha256(&pointer.oid)),
                None => (entry.size, Digest::git_blob(&entry.oid)),
            };
            if self.files.insert(entry.path.clone(), Listed { bytes, digest }).is_some() {
                return Err(format!("the listing names {:?} twice", entry.path));
            }
        }
        Ok(())
    }

    /// The file at `path`.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Listed> {
        self.files.get(path)
    }
}

/// Whether a path is relative, stays below its folder and can be shown on a terminal.
fn is_plain(path: &str) -> bool {
    path.chars().count() <= PATH_LENGTH
        && !path.contains(|c: char| c == '\\' || c.is_control())
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// The address of the next page in a `Link` header: `<ADDRESS>; rel="next"`.
#[must_use]
pub fn next_page(link: &str) -> Option<&str> {
    link.split('<').skip(1).find_map(|part| {
        let (address, parameters) = part.split_once('>')?;
        let mut parameters = parameters.split([';', ',']).map(str::trim);
        parameters
            .any(|p| p.eq_ignore_ascii_case("rel=\"next\"") || p.eq_ignore_ascii_case("rel=next"))
            .then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_files_have_a_sha256_and_small_ones_gits_name() {
        let (sha, git) = ("a".repeat(64), "b".repeat(40));
        let page = format!(
            r#"[{{"type":"directory","path":"ckpts","oid":"{git}","size":0}},
                {{"type":"file","path":"ckpts/x.pt","oid":"{git}","size":9,"lfs":{{"oid":"{sha}","size":9,"pointerSize":1}}}},
                {{"type":"file","path":"ckpts/y.json","oid":"{git}","size":2,"xetHash":"?"}}]"#
        );
        let mut listing = Listing::default();
        listing.add(page.as_bytes()).unwrap();
        let large = listing.get("ckpts/x.pt").unwrap();
        assert_eq!((large.bytes, &large.digest), (9, &Some(Digest::Sha256(sha))));
        assert_eq!(listing.get("ckpts/y.json").unwrap().digest, Some(Digest::GitBlob(git)));
        assert!(listing.get("ckpts").is_none());
    }

    #[test]
    fn a_path_out_of_the_folder_is_refused() {
        for path in ["../x", "/etc/x", "a/../../x", "a//x", "", "./x", "a\\\\x", "a/..", "x\\u001b[2J"] {
            let page = format!(r#"[{{"type":"directory","path":"{path}"}}]"#);
            let refused = Listing::default().add(page.as_bytes()).unwrap_err();
            assert!(refused.contains("does not stay inside"), "{path}: {refused}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let twice = r#"[{"type":"file","path":"a"},{"type":"file","path":"a"}]"#;
        for page in ["", "{}", "[1]", r#"[{"type":"file","path":"a","size":-1}]"#, twice] {
            assert!(Listing::default().add(page.as_bytes()).is_err(), "{page}");
        }
    }

    #[test]
    fn the_next_page_is_found_among_other_links() {
        assert_eq!(next_page(r#"<https://h/a?cursor=x,y>; rel="next""#), Some("https://h/a?cursor=x,y"));
        assert_eq!(next_page(r#"</p>; rel="prev", </n>; title="t"; rel="next""#), Some("/n"));
        assert_eq!(next_page(r#"</p>; rel="prev""#), None);
        assert_eq!(next_page("<<<>;,"), None);
    }
}
