//! What the reference does oddly, one test each: what is kept, because the pictures depend on it, and what is fixed.

mod fixed;
mod kept;

use candle_core::Tensor;
use gateway::sampler::{FrameShape, Rounding, Schedule, Setup, StepPlan};
use model::{image::Rgb8, text::TextEncoder};
use planner::clip::ClipPlan;

use crate::stack::tiny_models;

fn schedule(steps: usize) -> Schedule {
    Schedule { steps, flow_shift: 5.0, guidance_scale: 7.5 }
}

const SHAPE: FrameShape = FrameShape { channels: 1, rows: 2, columns: 2 };

/// One window of one latent frame.
fn smallest(plan: StepPlan, round_to_bf16: bool) -> Setup {
    Setup {
        plan,
        clip: ClipPlan::new(1, 1, 33),
        shape: SHAPE,
        rounding: if round_to_bf16 { Rounding::Windows } else { Rounding::Nowhere },
    }
}

fn text_encoder() -> TextEncoder {
    TextEncoder::open(&tiny_models(), &model::checkpoint::Setup::default()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// A picture of two colours, side by side.
fn halves(width: usize, height: usize, left: u8, right: u8) -> Rgb8 {
    let pixels = (0..width * height).flat_map(|i| [if i % width < width / 2 { left } else { right }; 3]);
    Rgb8::new(width, height, pixels.collect()).unwrap()
}
