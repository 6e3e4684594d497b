//! Launching kernels on an emulation of a card, so that they run in the tests of a machine that has none.
//!
//! The emulation is a program in C++ that includes the kernels' own files; it is compiled by whichever test comes first.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use candle_core::{DType, Device, Result, Tensor};

use super::launch::{Launch, Number};

/// Kinds of arguments, as the program numbers them.
const NULL: u64 = 0;
const READ: u64 = 1;
const WRITTEN: u64 = 2;
const NUMBER: u64 = 3;

impl Launch<'_> {
    /// Runs the kernel with tensors of the processor.
    pub(super) fn run_on(&self, device: &Device, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let mut launch = Request::default();
        launch.text(&self.kernel);
        let sizes = self.grid.map(|side| side as u64).into_iter().chain([self.threads.into(), self.shared.into()]);
        sizes.chain([(self.inputs.len() + 1 + self.numbers.len()) as u64]).for_each(|size| launch.size(size));
        for input in self.inputs {
            match input {
                None => launch.argument(NULL, &[]),
                Some(tensor) => launch.argument(READ, &bytes(tensor)?),
            }
        }
        let length = shape.iter().product::<usize>() * dtype.size_in_bytes();
        launch.size(WRITTEN);
        launch.size(length as u64);
        for number in self.numbers {
            match number {
                Number::Int(v) => launch.argument(NUMBER, &v.to_le_bytes()),
                Number::Long(v) => launch.argument(NUMBER, &v.to_le_bytes()),
                Number::Float(v) => launch.argument(NUMBER, &v.to_le_bytes()),
                Number::Double(v) => launch.argument(NUMBER, &v.to_le_bytes()),
            }
        }
        let written =
            launch.run().map_err(|e| candle_core::Error::Msg(format!("{} of {:?}: {e}", self.kernel, self.file)))?;
        if written.len() != length {
            candle_core::bail!("{}: {} bytes were written, expected {length}", self.kernel, written.len());
        }
        Tensor::from_raw_buffer(&written, dtype, shape, device)
    }
}

/// The bytes of a tensor from its first value on.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F32 => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        DType::BF16 => flat.to_vec1::<half::bf16>()?.into_iter().flat_map(half::bf16::to_le_bytes).collect(),
        DType::F16 => flat.to_vec1::<half::f16>()?.into_iter().flat_map(half::f16::to_le_bytes).collect(),
        DType::U32 => flat.to_vec1::<u32>()?.into_iter().flat_map(u32::to_le_bytes).collect(),
        DType::U8 => flat.to_vec1::<u8>()?,
        other => candle_core::bail!("no kernel takes values of type {other:?}"),
    })
}

/// A launch as the program reads it.
#[derive(Default)]
struct Request(Vec<u8>);

impl Request {
    fn size(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.size(text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    fn argument(&mut self, kind: u64, bytes: &[u8]) {
        self.size(kind);
        self.size(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn run(self) -> std::io::Result<Vec<u8>> {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let program = PROGRAM.get_or_init(|| compile().expect("the emulation compiles"));
        let mut child =
            Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut to = child.stdin.take().expect("standard input is a pipe");
        // It reads all before it writes.
        to.write_all(&self.0)?;
        drop(to);
        let output = child.wait_with_output()?;
        match output.status.success() {
            true => Ok(output.stdout),
            false => Err(std::io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        }
    }
}

/// Compiles the program, unless an earlier test did so from the same files.
fn compile() -> std::io::Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda");
    let folders = [source.join("emulated"), source.join("kernels")];
    let mut files = Vec::new();
    for folder in &folders {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_file() {
                files.push(path);
            }
        }
    }
    files.sort();
    let contents = files.iter().map(fs::read).collect::<std::io::Result<Vec<_>>>()?;
    let mut version = DefaultHasher::new();
    contents.hash(&mut version);
    let program = Path::new(env!("OUT_DIR")).join(format!("emulated-{:016x}", version.finish()));
    if program.exists() {
        return Ok(program);
    }
    // Tests run at the same time: each compiles for itself, and the last to be done leaves its program.
    let own = program.with_extension(std::process::id().to_string());
    let compiled = Command::new("c++")
        .args(["-std=c++17", "-O2", "-ffp-contract=off", "-Wno-unknown-pragmas", "-I"])
        .arg(&folders[0])
        .arg("-I")
        .arg(&folders[1])
        .arg(folders[0].join("main.cpp"))
        .arg("-o")
        .arg(&own)
        .output()?;
    if !compiled.status.success() {
        return Err(std::io::Error::other(String::from_utf8_lossy(&compiled.stderr).into_owned()));
    }
    fs::rename(&own, &program)?;
    Ok(program)
}
