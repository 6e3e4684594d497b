//! One file, from what is there of it to its name.

use std::path::{Path, PathBuf};

use reqwest::{StatusCode, header::CONTENT_RANGE};
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
};

use super::{
    digest::{Digest, Hasher},
    failed,
    folder::Folder,
    hub::{Answer, Hub},
    plan::Wanted,
    report::Report,
    retry::{Retries, Trouble},
};
use crate::failure::Failure;

/// Bytes that are read at once from the disk.
const BLOCK: usize = 1 << 20;
/// New bytes after which earlier failures are forgotten; less would let a server keep us busy for ever.
const PROGRESS: u64 = 1 << 20;
/// What to do about bytes that are not the listed ones.
const DAMAGED: &str = "run the same command again; if this stays, the server's copy is damaged";

/// Hashes a file that is there.
///
/// `digest` names the kind of hash, `report` hears of every block.
pub async fn hash(path: &Path, digest: &Digest, bytes: u64, report: &mut Report) -> std::io::Result<Digest> {
    let mut hasher = digest.hasher(bytes);
    hash_into(&mut File::open(path).await?, &mut hasher, report).await?;
    Ok(hasher.finish())
}

/// Hashes from the file's position to its end; returns how many bytes that were.
async fn hash_into(file: &mut File, hasher: &mut Hasher, report: &mut Report) -> std::io::Result<u64> {
    let (mut block, mut done) = (vec![0; BLOCK], 0);
    loop {
        let count = file.read(&mut block).await?;
        let Some(data) = block.get(..count).filter(|data| !data.is_empty()) else { return Ok(done) };
        hasher.update(data);
        done += count as u64;
        report.advance(count as u64);
    }
}

/// Downloads a file, continuing what is there, and gives it its name once its hash is right.
///
/// Returns the bytes that came over the network.
///
/// Errors: too many failures in a row, a refusal, bytes that the listing does not promise (which are deleted), or
/// the disk. What was downloaded stays, except where it is wrong.
pub async fn download(
    hub: &Hub,
    folder: &Folder,
    file: &Wanted,
    mut retries: Retries,
    report: &mut Report,
) -> Result<u64, Failure> {
    let mut part = Part::open(folder, file, report).await?;
    let (mut received, mut furthest) = (0, part.have);
    while part.have < file.bytes {
        let outcome = part.attempt(hub, report, &mut received).await;
        part.file.flush().await.map_err(|e| part.refused(&e))?;
        // Bytes that an earlier attempt had brought already are no progress.
        if part.have >= furthest.saturating_add(PROGRESS) {
            retries.reset();
        }
        furthest = furthest.max(part.have);
        if let Err(trouble) = outcome {
            let (wait, reason) = retries.after(trouble, &file.path)?;
            report.retry(&file.path, &reason, wait);
            tokio::time::sleep(wait).await;
        }
    }
    part.finish(folder, report).await?;
    Ok(received)
}

/// A file while it grows.
struct Part<'a> {
    wanted: &'a Wanted,
    path: PathBuf,
    file: File,
    hasher: Hasher,
    /// Bytes that are written and hashed; at most `wanted.bytes`.
    have: u64,
    /// False once the server has answered a range wrongly.
    ranges: bool,
}

impl<'a> Part<'a> {
    async fn open(folder: &Folder, wanted: &'a Wanted, report: &mut Report) -> Result<Self, Failure> {
        let path = folder.part(wanted);
        let refused = |e: std::io::Error| Failure::local(path.display(), e);
        if let Some(parent) = path.parent() {
            tokio::fs::create_dir_all(parent).await.map_err(refused)?;
        }
        let mut options = File::options();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(&path).await.map_err(refused)?;
        let mut hasher = wanted.digest.hasher(wanted.bytes);
        let begun = file.metadata().await.map_err(refused)?.len();
        let have = if begun > wanted.bytes {
            file.set_len(0).await.map_err(refused)?;
            0
        } else {
            if begun > 0 {
                report.checking(&wanted.path, begun);
            }
            hash_into(&mut file, &mut hasher, report).await.map_err(refused)?
        };
        report.downloading(&wanted.path, wanted.bytes, have);
        Ok(Self { wanted, path, file, hasher, have, ranges: true })
    }

    /// Asks once for what is missing and takes what comes.
    async fn attempt(&mut self, hub: &Hub, report: &mut Report, received: &mut u64) -> Result<(), Trouble> {
        if !self.ranges && self.have > 0 {
            self.restart(report).await?;
        }
        let answer = hub.open(&self.wanted.path, self.have).await?;
        if answer.agrees(&self.wanted.digest) == Some(false) {
            let reason = "the server now holds another file under this name than it listed";
            return Err(self.wrong("ABORTED", reason, "run the same command again: it reads the listing anew").into());
        }
        self.check_length(&answer)?;
        self.place(&answer, report).await?;
        let mut response = answer.response;
        while let Some(data) = response.chunk().await.map_err(|e| self.cut(&e.without_url().to_string()))? {
            if data.len() as u64 > self.wanted.bytes - self.have {
                let _ = tokio::fs::remove_file(&self.path).await;
                let reason =
                    format!("the listing promises {} bytes, the server sends more; deleted", self.wanted.bytes);
                return Err(self.wrong("DATA_LOSS", &reason, DAMAGED).into());
            }
            self.file.write_all(&data).await.map_err(|e| self.refused(&e))?;
            self.hasher.update(&data);
            self.have += data.len() as u64;
            *received += data.len() as u64;
            report.advance(data.len() as u64);
        }
        if self.have < self.wanted.bytes { Err(self.cut("the server ended early")) } else { Ok(()) }
    }

    /// Refuses a whole file of another length than the listing's, before anything that is there is given up for it:
    /// it may be some proxy's page. A short first answer is taken and continued.
    fn check_length(&self, answer: &Answer) -> Result<(), Failure> {
        let expected = self.wanted.bytes;
        match answer.response.content_length() {
            Some(length)
                if answer.response.status() == StatusCode::OK
                    && (length > expected || (length < expected && self.have > 0)) =>
            {
                let reason = format!("the listing promises {expected} bytes, the server sends {length}");
                Err(self.wrong("DATA_LOSS", &reason, DAMAGED))
            }
            _ => Ok(()),
        }
    }

    /// Checks that the answer begins where we are; begins anew where it does not.
    async fn place(&mut self, answer: &Answer, report: &mut Report) -> Result<(), Trouble> {
        match answer.response.status() {
            StatusCode::OK if self.have > 0 => {
                report.note(&format!("{}: the server sends only whole files; starting over", self.wanted.path));
                Ok(self.restart(report).await?)
            }
            StatusCode::OK => Ok(()),
            StatusCode::PARTIAL_CONTENT if self.have > 0 => {
                let range = answer.response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
                if range.and_then(parse_range) == Some((self.have, self.wanted.bytes)) {
                    return Ok(());
                }
                self.ranges = false;
                Err(Trouble::passing(format!(
                    "asked for bytes from {}, got {:?}",
                    self.have,
                    range.unwrap_or_default()
                )))
            }
            status if self.have > 0 => {
                self.ranges = false;
                Err(Trouble::passing(format!("asked for bytes from {}, got {status}", self.have)))
            }
            status => Err(failed("UNKNOWN", format!("{}: {status}", self.wanted.path)).into()),
        }
    }

    async fn restart(&mut self, report: &mut Report) -> Result<(), Failure> {
        let rewound = async {
            self.file.set_len(0).await?;
            self.file.rewind().await
        };
        rewound.await.map_err(|e| self.refused(&e))?;
        self.hasher = self.wanted.digest.hasher(self.wanted.bytes);
        self.have = 0;
        report.downloading(&self.wanted.path, self.wanted.bytes, 0);
        Ok(())
    }

    /// Gives the file its name, once it is right and on the disk.
    async fn finish(self, folder: &Folder, report: &mut Report) -> Result<(), Failure> {
        let Self { wanted, path, file, hasher, .. } = self;
        let found = hasher.finish();
        if found != wanted.digest {
            // What remains after a failed removal is found wrong again by the next run.
            let _ = tokio::fs::remove_file(&path).await;
            let message =
                format!("{}: it has {found}, the listing says {}; the file was deleted", wanted.path, wanted.digest);
            return Err(Failure { advice: Some(DAMAGED), ..failed("DATA_LOSS", message) });
        }
        let target = folder.target(wanted);
        let named = async {
            file.sync_all().await?;
            tokio::fs::rename(&path, &target).await
        };
        named.await.map_err(|e| Failure::local(target.display(), e))?;
        // The new name is on the disk once its folder is; a filesystem that cannot sync folders keeps the file.
        if let Some(parent) = target.parent()
            && let Ok(parent) = File::open(parent).await
        {
            let _ = parent.sync_all().await;
        }
        report.fetched(&wanted.path, wanted.bytes);
        Ok(())
    }

    fn cut(&self, reason: &str) -> Trouble {
        Trouble::passing(format!("lost the connection after {} of {} bytes: {reason}", self.have, self.wanted.bytes))
    }

    fn wrong(&self, code: &'static str, reason: &str, advice: &'static str) -> Failure {
        Failure { advice: Some(advice), ..failed(code, format!("{}: {reason}", self.wanted.path)) }
    }

    fn refused(&self, error: &std::io::Error) -> Failure {
        Failure::local(self.path.display(), error)
    }
}

/// Reads `bytes FIRST-LAST/ALL`: the first byte and the whole length.
fn parse_range(text: &str) -> Option<(u64, u64)> {
    let (range, all) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, all): (u64, u64, u64) = (first.parse().ok()?, last.parse().ok()?, all.parse().ok()?);
    (first <= last && last < all).then_some((first, all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_names_its_first_byte_and_the_whole_length() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, 10)));
        for wrong in ["", "bytes */10", "bytes 5-9/*", "bytes 9-5/10", "bytes 5-10/10", "5-9/10", "bytes -1-9/10"] {
            assert_eq!(parse_range(wrong), None, "{wrong}");
        }
    }
}
