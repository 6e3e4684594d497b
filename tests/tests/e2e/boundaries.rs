//! The table of which crate may use which, so that a new edge is a decision and not an accident.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

const STAGES: [&str; 5] = ["audio-encoder", "text-encoder", "image-encoder", "diffusion", "vae-decode"];

/// Crate, what it may use of ours, and what of others' it must not know.
fn table() -> BTreeMap<&'static str, (Vec<&'static str>, Vec<&'static str>)> {
    let mut table = BTreeMap::from([
        ("proto", (vec![], vec!["tokio", "axum"])),
        ("planner", (vec![], vec!["candle-core", "tokio", "tonic"])),
        ("postgres-server", (vec![], vec!["tokio", "sqlx"])),
        ("s3-server", (vec![], vec!["tokio", "object_store"])),
        ("model", (vec!["planner"], vec!["tokio", "tonic", "axum", "clap"])),
        ("service-kit", (vec!["proto"], vec!["candle-core", "candle-nn"])),
        ("gateway", (vec!["proto", "planner", "service-kit"], vec!["candle-core", "candle-nn"])),
    ]);
    for stage in STAGES {
        table.insert(stage, (vec!["proto", "model", "planner", "service-kit"], vec!["axum"]));
    }
    table
}

#[test]
fn crates_use_only_what_the_table_allows() {
    let metadata = MetadataCommand::new().no_deps().exec().unwrap();
    let ours: BTreeSet<String> = metadata.packages.iter().map(|p| p.name.to_string()).collect();
    let table = table();
    let mut seen = 0;
    for package in &metadata.packages {
        // The command line has everything in one process, and the tests look everywhere.
        if ["avatar", "e2e"].contains(&package.name.as_str()) {
            continue;
        }
        let (allowed, banned) = table.get(package.name.as_str()).unwrap_or_else(|| {
            panic!("crate {} is not in the table: say what it may use", package.name);
        });
        for dependency in package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal) {
            let name = dependency.name.as_str();
            if ours.contains(name) {
                assert!(allowed.contains(&name), "{} may not use {name}", package.name);
            }
            assert!(!banned.contains(&name) || dependency.optional, "{} must not know {name}", package.name);
        }
        seen += 1;
    }
    assert_eq!(seen, table.len(), "the table names crates that do not exist");
}

#[test]
fn every_crate_is_named_like_its_folder() {
    let metadata = MetadataCommand::new().no_deps().exec().unwrap();
    for package in &metadata.packages {
        let folder = package.manifest_path.parent().and_then(|p| p.file_name()).unwrap();
        let expected = if package.name.as_str() == "e2e" { "tests" } else { package.name.as_str() };
        assert_eq!(folder, expected);
    }
}

/// Cards are an option of the build: nothing that needs NVIDIA's compiler may come in without it.
#[test]
fn without_feature_cuda_no_package_of_cuda_is_built() {
    // Packages of other platforms were never fetched.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let options = ["--locked", "--offline", "--filter-platform", &platform].map(str::to_owned);
    let metadata = MetadataCommand::new().other_options(options).exec().unwrap();
    let names: BTreeSet<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
    assert!(names.contains("candle-core"), "{names:?}");
    for cuda in ["cudarc", "candle-kernels"] {
        assert!(!names.contains(cuda), "{cuda} is built without feature `cuda`");
    }
}
