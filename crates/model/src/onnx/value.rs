//! What flows between operators: f32, or whole numbers for shapes and places.

use super::limits::elements;

/// Values in rows, the last side next to each other.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array<T> {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<T>,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Floats(Array<f32>),
    Ints(Array<i64>),
}

impl Value {
    pub(crate) fn shape(&self) -> &[usize] {
        match self {
            Self::Floats(array) => &array.shape,
            Self::Ints(array) => &array.shape,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Floats(array) => array.values.len(),
            Self::Ints(array) => array.values.len(),
        }
    }

    pub(super) fn floats(&self) -> Result<&Array<f32>, String> {
        match self {
            Self::Floats(array) => Ok(array),
            Self::Ints(_) => Err("whole numbers where f32 is needed".to_owned()),
        }
    }

    pub(super) fn ints(&self) -> Result<&[i64], String> {
        match self {
            Self::Ints(array) => Ok(&array.values),
            Self::Floats(_) => Err("f32 where whole numbers are needed".to_owned()),
        }
    }

    /// The same values in another shape of as many.
    pub(super) fn reshaped(&self, shape: Vec<usize>) -> Result<Self, String> {
        if elements(&shape)? != self.len() {
            return Err(format!("{:?} does not fit {shape:?}", self.shape()));
        }
        Ok(match self {
            Self::Floats(array) => Self::Floats(Array { shape, values: array.values.clone() }),
            Self::Ints(array) => Self::Ints(Array { shape, values: array.values.clone() }),
        })
    }

    /// A view of the values, copied: element `i` is at `start` plus the steps.
    pub(super) fn view(&self, start: usize, shape: &[usize], steps: &[isize]) -> Result<Self, String> {
        Ok(match self {
            Self::Floats(array) => Self::Floats(array.view(start, shape, steps)?),
            Self::Ints(array) => Self::Ints(array.view(start, shape, steps)?),
        })
    }
}

/// How far apart neighbours along each side are.
pub(super) fn steps(shape: &[usize]) -> Vec<isize> {
    let mut steps = vec![1isize; shape.len()];
    for i in (1..shape.len()).rev() {
        steps[i - 1] = steps[i] * shape[i] as isize;
    }
    steps
}

/// The shape of two that are combined element by element; sides of 1 are repeated.
pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let rank = a.len().max(b.len());
    let side = |shape: &[usize], i: usize| (i + shape.len()).checked_sub(rank).map_or(1, |at| shape[at]);
    (0..rank)
        .map(|i| match (side(a, i), side(b, i)) {
            (1, n) | (n, 1) => Ok(n),
            (n, m) if n == m => Ok(n),
            _ => Err(format!("{a:?} and {b:?} do not go together")),
        })
        .collect()
}

impl<T: Copy> Array<T> {
    pub(super) fn view(&self, start: usize, shape: &[usize], steps: &[isize]) -> Result<Self, String> {
        let count = elements(shape)?;
        let mut values = Vec::with_capacity(count);
        let (inner, step) = match (shape.last(), steps.last()) {
            (Some(side), Some(step)) => (*side, *step),
            _ => (1, 1),
        };
        let outer = shape.len().saturating_sub(1);
        let mut place = vec![0usize; outer];
        let mut row = start as isize;
        let out_of = || "a place outside of the tensor".to_owned();
        while values.len() < count {
            for i in 0..inner as isize {
                let at = usize::try_from(row + i * step).map_err(|_| out_of())?;
                values.push(*self.values.get(at).ok_or_else(out_of)?);
            }
            // The next row, as an odometer counts.
            for side in (0..outer).rev() {
                place[side] += 1;
                row += steps[side];
                if place[side] < shape[side] {
                    break;
                }
                row -= steps[side] * shape[side] as isize;
                place[side] = 0;
            }
        }
        Ok(Self { shape: shape.to_vec(), values })
    }

    /// Repeats sides of 1 until the shape is that of `shape`.
    pub(super) fn expanded(&self, shape: &[usize]) -> Result<Self, String> {
        if self.shape == shape {
            return Ok(self.clone());
        }
        let missing = shape.len().checked_sub(self.shape.len()).ok_or("a shape of fewer sides")?;
        let own = steps(&self.shape);
        let steps: Vec<isize> = (0..shape.len())
            .map(|i| if i < missing || self.shape[i - missing] == 1 { 0 } else { own[i - missing] })
            .collect();
        self.view(0, shape, &steps)
    }
}
