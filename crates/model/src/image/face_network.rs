//! A face detector from an ONNX file that the operator names.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    Rgb8,
    face::{self, FaceBox},
    face_family::{EXPECTED, Family},
    torch_detector::{torch_file, unused_detector},
};
use crate::{
    Error, Result,
    onnx::{Array, Declared, Network, Value},
};

/// Most bytes of a file; the reference's network has 174 MiB, the others here at most 17.
const FILE_BYTES: u64 = 256 << 20;
/// Longest side of a network's input.
const MOST_SIDE: usize = 2048;
/// The side that a network which leaves its size open is tried at.
const TRIED_SIDE: usize = 320;

/// A network that finds faces: UltraFace, YuNet, SCRFD, or the reference's YOLO-face, told apart by their outputs.
#[derive(Debug)]
pub struct FaceNetwork {
    file: PathBuf,
    network: Network,
    family: Family,
    /// Width and height, where the file fixes them.
    sides: [Option<usize>; 2],
}

impl FaceNetwork {
    /// The file that it was read from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Reads a file and runs it once, on black.
    ///
    /// Errors: a file that is missing, too large or no ONNX (of a PyTorch file it is said what to do instead); a network
    /// of none of the families, with operators that are not run, or that asks for too much memory or work.
    pub fn open(file: &Path) -> Result<Self> {
        let fault = |reason: String| Error::file(file, reason);
        if file.is_dir() {
            let reason = unused_detector(file).unwrap_or_else(|| "this is a folder; name an ONNX file".to_owned());
            return Err(fault(reason));
        }
        let bytes = read(file)?;
        if let Some(reason) = torch_file(&bytes) {
            return Err(fault(reason));
        }
        let network = Network::read(&bytes).map_err(fault)?;
        let sides = fixed_sides(network.input()).map_err(fault)?;
        let [width, height] = sides.map(|side| side.unwrap_or(TRIED_SIDE));
        let black = Array { shape: vec![1, 3, height, width], values: vec![0.0; 3 * height * width] };
        let outputs = network.run(black).map_err(fault)?;
        let Some(family) = Family::of(&outputs, (width, height)) else {
            let given: Vec<Declared> = outputs.iter().map(declared).collect();
            let (input, given) = (Declared::list(&[network.input().clone()]), Declared::list(&given));
            return Err(fault(format!("its input is {input}, its outputs are {given}; {EXPECTED}")));
        };
        Ok(Self { file: file.to_owned(), network, family, sides })
    }

    /// Finds faces.
    ///
    /// The picture is shown at the size that the file fixes, else at the family's own.
    ///
    /// - returns: boxes in pixels of the picture, the largest first
    ///
    /// Errors: the network does not run at that size.
    pub fn detect(&self, picture: &Rgb8) -> Result<Vec<FaceBox>> {
        let fault = |reason: String| Error::file(&self.file, reason);
        let (width, height) = self.family.size(picture);
        let size = (self.sides[0].unwrap_or(width), self.sides[1].unwrap_or(height));
        if size.0.max(size.1) > MOST_SIDE {
            return Err(fault(format!("it would see {}x{} pixels, the limit is {MOST_SIDE} a side", size.0, size.1)));
        }
        let seen = self.family.see(picture, size);
        let outputs = self.network.run(seen.pixels).map_err(fault)?;
        let Some(candidates) = self.family.candidates(&outputs, size) else {
            let given: Vec<Declared> = outputs.iter().map(declared).collect();
            let given = Declared::list(&given);
            return Err(fault(format!("of {}x{} pixels its outputs are {given}; {EXPECTED}", size.0, size.1)));
        };
        let found = face::postprocess(&candidates, &self.family.rule(seen.shown, picture));
        let mut faces: Vec<FaceBox> = found.into_iter().map(|found| found.face).collect();
        faces.retain(|face| face.overlaps(picture));
        faces.sort_by(|a, b| b.area().total_cmp(&a.area()));
        Ok(faces)
    }
}

fn declared((name, value): &(String, Value)) -> Declared {
    let shape = value.shape().iter().map(|side| Some(*side)).collect();
    Declared { name: name.clone(), float: matches!(value, Value::Floats(_)), shape }
}

/// Width and height of the input, where they are fixed.
fn fixed_sides(input: &Declared) -> Result<[Option<usize>; 2], String> {
    match input.shape[..] {
        [None | Some(1), None | Some(3), height, width]
            if input.float && [height, width].iter().flatten().all(|side| *side <= MOST_SIDE) =>
        {
            Ok([width, height])
        }
        _ => Err(format!(
            "its input is {}{}, sides up to {MOST_SIDE}; {EXPECTED}",
            Declared::list(std::slice::from_ref(input)),
            if input.float { "" } else { ", not of f32" }
        )),
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let fault = |e: std::io::Error| Error::file(file, e);
    let metadata = std::fs::metadata(file).map_err(fault)?;
    // A pipe would be waited for, a device never ends.
    if !metadata.is_file() {
        return Err(Error::file(file, "it is no regular file"));
    }
    if metadata.len() > FILE_BYTES {
        return Err(Error::file(file, format!("{} bytes, the limit is {FILE_BYTES}", metadata.len())));
    }
    let mut bytes = Vec::new();
    File::open(file).map_err(fault)?.take(FILE_BYTES).read_to_end(&mut bytes).map_err(fault)?;
    Ok(bytes)
}
