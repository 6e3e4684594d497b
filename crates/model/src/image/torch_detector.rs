//! The reference's own face detector, a PyTorch file that is recognised and not run.

use std::path::{Path, PathBuf};

/// What a PyTorch file is, and what to do.
const TORCH: &str = "a PyTorch file, which is not run: leave --face-model out for the built-in detector, or export it to \
    ONNX and name that with --face-model, or name the face with --face X,Y,W,H";

/// Where it lies: in its own folder, in the official download, or above that.
const PLACES: [&str; 4] =
    ["detface.pt", "det_align/detface.pt", "ckpts/det_align/detface.pt", "weights/ckpts/det_align/detface.pt"];

/// What to say of the reference's own detector in a folder of models, which is not run.
#[must_use]
pub fn unused_detector(models: &Path) -> Option<String> {
    let file: Option<PathBuf> = PLACES.iter().map(|place| models.join(place)).find(|file| file.is_file());
    file.map(|file| format!("{} is {TORCH}", file.display()))
}

/// What to say of a file whose first bytes are those of a ZIP archive, as TorchScript is, or of a pickle.
pub(super) fn torch_file(bytes: &[u8]) -> Option<String> {
    let torch = bytes.starts_with(b"PK\x03\x04") || matches!(bytes, [0x80, 2..=5, ..]);
    torch.then(|| format!("it is {TORCH}"))
}
