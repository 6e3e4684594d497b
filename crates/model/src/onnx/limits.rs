//! How much a file of a stranger may ask for.

/// Most operators; the networks that find faces have some hundreds.
pub(super) const NODES: usize = 20_000;
/// Most inputs and outputs of one operator.
pub(super) const NAMES: usize = 1024;
/// Most constants.
pub(super) const CONSTANTS: usize = 20_000;
/// Most sides of a tensor.
pub(super) const SIDES: usize = 8;
/// Most elements of one tensor: 512 MiB in f32.
pub(super) const ELEMENTS: usize = 1 << 27;
/// Most elements that are held at once, constants aside.
const HELD: usize = 1 << 28;
/// Most multiplications, or other operations on one element, of one run: some seconds.
const WORK: u64 = 1 << 36;
/// Largest kernel, stride, dilation or padding.
pub(super) const SIDE: usize = 1 << 24;

/// Elements of a shape.
///
/// Errors: more sides or elements than a tensor may have.
pub(super) fn elements(shape: &[usize]) -> Result<usize, String> {
    // A side of 0 does not hide how large the others are.
    let count = shape.iter().try_fold(1usize, |n, side| n.checked_mul((*side).max(1)));
    match count {
        Some(count) if count <= ELEMENTS && shape.len() <= SIDES => Ok(shape.iter().product::<usize>()),
        _ if shape.len() > SIDES => Err(format!("a tensor of {} sides, the limit is {SIDES}", shape.len())),
        _ => Err(format!("a tensor of shape {shape:?}, the limit is {ELEMENTS} elements")),
    }
}

/// What one run has used.
#[derive(Default)]
pub(super) struct Budget {
    work: u64,
    held: usize,
}

impl Budget {
    /// Before an operator computes: `each` operations for every element of `shape`, which it is about to hold.
    pub(super) fn ask(&mut self, shape: &[usize], each: usize) -> Result<(), String> {
        let count = elements(shape)?;
        self.work = self.work.saturating_add((count as u64).saturating_mul(each as u64));
        if self.work > WORK {
            return Err(format!("more than {WORK} operations, the limit"));
        }
        if self.held.saturating_add(count) > HELD {
            return Err(format!("more than {HELD} elements at once, the limit"));
        }
        Ok(())
    }

    pub(super) fn hold(&mut self, count: usize) {
        self.held = self.held.saturating_add(count);
    }

    pub(super) fn release(&mut self, count: usize) {
        self.held = self.held.saturating_sub(count);
    }
}
