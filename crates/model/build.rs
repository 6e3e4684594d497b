//! Takes the face detector's data out of the `rustface` package, which carries it but does not export it.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const DATA: &str = "seeta_fd_frontal_v1.0.bin";

#[allow(clippy::disallowed_methods)] // Cargo speaks to build scripts through the environment.
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=Cargo.toml");
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("Cargo.toml");
    // A build of one crate may not have fetched the packages of all others, which the listing needs.
    let listing = list(&manifest, &["--offline"]).or_else(|_| list(&manifest, &[]))?;
    let metadata: serde_json::Value = serde_json::from_slice(&listing)?;
    let packages = metadata["packages"].as_array().ok_or("cargo metadata lists no packages")?;
    let rustface = packages.iter().find(|p| p["name"] == "rustface").ok_or("rustface is not a dependency")?;
    let source = rustface["manifest_path"].as_str().ok_or("rustface has no manifest")?;
    let data = PathBuf::from(source).with_file_name("model").join(DATA);
    fs::copy(&data, PathBuf::from(env::var("OUT_DIR")?).join(DATA)).map_err(|e| format!("{}: {e}", data.display()))?;
    Ok(())
}

/// What cargo knows of the packages that this build uses.
#[allow(clippy::disallowed_methods)]
fn list(manifest: &Path, more: &[&str]) -> Result<Vec<u8>, Box<dyn Error>> {
    let listing = Command::new(env::var("CARGO")?)
        // Packages of other platforms were never fetched.
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", &env::var("TARGET")?])
        .arg("--manifest-path")
        .arg(manifest)
        .args(more)
        .output()?;
    if listing.status.success() {
        return Ok(listing.stdout);
    }
    Err(format!("cargo metadata: {}", String::from_utf8_lossy(&listing.stderr)).into())
}
