//! Generates the Rust of `avatar/v1/*.proto` without protoc.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 8] = [
    "avatar/v1/tensor.proto",
    "avatar/v1/stage.proto",
    "avatar/v1/audio_encoder.proto",
    "avatar/v1/text_encoder.proto",
    "avatar/v1/image_encoder.proto",
    "avatar/v1/diffusion.proto",
    "avatar/v1/vae_decode.proto",
    "avatar/v1/avatar.proto",
];

#[allow(clippy::disallowed_methods)] // Cargo speaks to build scripts through the environment.
fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let descriptors = protox::compile(FILES, ["."])?;
    fs::write(out.join("avatar_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=avatar");
    Ok(())
}
