//! Takes the face detector's data out of the `rustface` package, which carries it but does not export it; with feature
//! `cuda`, compiles the kernels.

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
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::copy(&data, out.join(DATA)).map_err(|e| format!("{}: {e}", data.display()))?;
    if env::var_os("CARGO_FEATURE_CUDA").is_some() { compile_kernels(&out) } else { Ok(()) }
}

/// Compiles each file of kernels into one image `NAME.fatbin`: machine code for every compute capability of `CUDA_CAPS`
/// (as `80,89,90`), and intermediate code of the first for cards newer than the last.
#[allow(clippy::disallowed_methods)]
fn compile_kernels(out: &Path) -> Result<(), Box<dyn Error>> {
    const FOLDER: &str = "src/cuda/kernels";
    /// What only cards understand; the emulation has its own.
    const CARD: &str = "src/cuda/kernels/card";
    for name in ["CUDA_CAPS", "NVCC"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed={FOLDER}");
    let nvcc = env::var("NVCC").unwrap_or_else(|_| "nvcc".to_owned());
    let caps = env::var("CUDA_CAPS").unwrap_or_else(|_| "80,89,90".to_owned());
    let first = caps.split(',').next().unwrap_or_default();
    let codes = caps.split(',').map(|cap| (cap, format!("sm_{cap}")));
    let codes = codes.chain([(first, format!("compute_{first}"))]);
    let codes: Vec<String> =
        codes.flat_map(|(cap, code)| ["-gencode".into(), format!("arch=compute_{cap},code={code}")]).collect();
    for file in fs::read_dir(FOLDER)? {
        let file = file?.path();
        if file.extension().is_none_or(|e| e != "cu") {
            continue;
        }
        let image = out.join(file.with_extension("fatbin").file_name().ok_or("a file without a name")?);
        let compiled = Command::new(&nvcc)
            .args(["-fatbin", "-std=c++17", "-O3", "-I", CARD])
            .args(&codes)
            .arg("-o")
            .arg(&image)
            .arg(&file)
            .output()
            .map_err(|e| format!("{nvcc}: {e}; deploy/cuda/build sets up the compiler"))?;
        if !compiled.status.success() {
            return Err(format!("{}: {}", file.display(), String::from_utf8_lossy(&compiled.stderr)).into());
        }
    }
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
