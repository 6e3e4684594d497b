//! The wire contract: generated messages and services of `avatar.v1`, and tensors on the wire.

/// Generated from `proto/avatar/v1/*.proto`; the documentation is there.
#[allow(missing_docs, clippy::all, rustdoc::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("avatar.v1");
}

pub mod tensor;

/// Encoded `FileDescriptorSet` of all files, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/avatar_descriptor.bin"));
