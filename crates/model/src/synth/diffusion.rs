//! The transformer.

use std::path::Path;

use safetensors::Dtype;
use serde_json::json;

use super::{
    AUDIO, AUDIO_STATES, LATENT, POOLED, TEXT,
    values::{Sheet, Values},
    write_json,
};
use crate::Result;

const HIDDEN: usize = 128;
const HEADS: usize = 4;
const MLP: usize = 4;
const DOUBLE: usize = 2;
const SINGLE: usize = 3;
/// Double blocks that an audio adapter follows.
const ADAPTED: [usize; 1] = [1];
const AUDIO_WINDOW: usize = 10;
/// Tokens that the audio projection makes of a frame.
const AUDIO_TOKENS: usize = 4;
const AUDIO_MIDDLE: usize = 64;
const ADAPTER: usize = 64;
/// Width of the sinusoidal embedding of a number.
const SINUSOIDS: usize = 256;

/// Gain of the layers that make shifts, scales and gates: small enough that no block drowns the stream.
const MODULATION: f32 = 0.3;

pub(super) fn transformer(values: &Values, out: &Path) -> Result<()> {
    let mut sheet = Sheet::new(values);
    embeddings(&mut sheet);
    for i in 0..DOUBLE {
        for stream in ["img", "txt"] {
            double_stream(&mut sheet, &format!("double_blocks.{i}.{stream}"));
        }
    }
    for i in 0..SINGLE {
        single_block(&mut sheet, &format!("single_blocks.{i}"));
    }
    audio(&mut sheet);
    sheet.layer("final_layer.linear", &[4 * LATENT, HIDDEN], 1.0);
    sheet.layer("final_layer.adaLN_modulation.1", &[2 * HIDDEN, HIDDEN], MODULATION);
    sheet.save(&out.join("model.safetensors"), Dtype::BF16)?;
    write_json(
        &out.join("config.json"),
        &json!({
            "hidden_size": HIDDEN, "num_heads": HEADS, "rope_dim_list": [8, 12, 12], "rope_theta": 256.0,
            "in_channels": LATENT,
            "depth_double_blocks": DOUBLE, "depth_single_blocks": SINGLE,
            "text_states_dim": TEXT, "text_states_dim_2": POOLED,
            "audio_double_blocks": ADAPTED,
            "defaults": { "size": 128, "steps": 8, "guidance_scale": 2.5, "flow_shift": 5.0 },
        }),
    )
}

/// Everything that makes tokens and the modulation vector.
fn embeddings(sheet: &mut Sheet) {
    for name in ["img_in.proj", "ref_in.proj"] {
        sheet.layer(name, &[HIDDEN, LATENT, 1, 2, 2], 1.0);
    }
    sheet.layer("before_proj", &[HIDDEN, HIDDEN], 1.0);
    for name in ["time_in", "fps_proj", "txt_in.t_embedder"] {
        number(sheet, name, HIDDEN);
    }
    // Four numbers each, side by side.
    for name in ["motion_exp", "motion_pose"] {
        number(sheet, name, HIDDEN / 4);
    }
    sheet.layer("vector_in.in_layer", &[HIDDEN, POOLED], 1.0);
    sheet.layer("vector_in.out_layer", &[HIDDEN, HIDDEN], 1.0);

    sheet.layer("txt_in.input_embedder", &[HIDDEN, TEXT], 1.0);
    sheet.layer("txt_in.c_embedder.linear_1", &[HIDDEN, TEXT], 1.0);
    sheet.layer("txt_in.c_embedder.linear_2", &[HIDDEN, HIDDEN], 1.0);
    for i in 0..2 {
        let block = format!("txt_in.individual_token_refiner.blocks.{i}");
        sheet.norm(&format!("{block}.norm1"), HIDDEN);
        sheet.layer(&format!("{block}.self_attn_qkv"), &[3 * HIDDEN, HIDDEN], 1.0);
        sheet.layer(&format!("{block}.self_attn_proj"), &[HIDDEN, HIDDEN], 1.0);
        sheet.norm(&format!("{block}.norm2"), HIDDEN);
        sheet.layer(&format!("{block}.mlp.fc1"), &[MLP * HIDDEN, HIDDEN], 1.0);
        sheet.layer(&format!("{block}.mlp.fc2"), &[HIDDEN, MLP * HIDDEN], 1.0);
        sheet.layer(&format!("{block}.adaLN_modulation.1"), &[2 * HIDDEN, HIDDEN], MODULATION);
    }
}

/// The two layers that embed a number.
fn number(sheet: &mut Sheet, name: &str, width: usize) {
    sheet.layer(&format!("{name}.mlp.0"), &[width, SINUSOIDS], 1.0);
    sheet.layer(&format!("{name}.mlp.2"), &[width, width], 1.0);
}

fn double_stream(sheet: &mut Sheet, stream: &str) {
    sheet.layer(&format!("{stream}_mod.linear"), &[6 * HIDDEN, HIDDEN], MODULATION);
    sheet.layer(&format!("{stream}_attn_qkv"), &[3 * HIDDEN, HIDDEN], 1.0);
    sheet.scale(&format!("{stream}_attn_q_norm"), HIDDEN / HEADS);
    sheet.scale(&format!("{stream}_attn_k_norm"), HIDDEN / HEADS);
    sheet.layer(&format!("{stream}_attn_proj"), &[HIDDEN, HIDDEN], 1.0);
    sheet.layer(&format!("{stream}_mlp.fc1"), &[MLP * HIDDEN, HIDDEN], 1.0);
    sheet.layer(&format!("{stream}_mlp.fc2"), &[HIDDEN, MLP * HIDDEN], 1.0);
}

fn single_block(sheet: &mut Sheet, block: &str) {
    sheet.layer(&format!("{block}.linear1"), &[(3 + MLP) * HIDDEN, HIDDEN], 1.0);
    sheet.layer(&format!("{block}.linear2"), &[HIDDEN, (1 + MLP) * HIDDEN], 1.0);
    sheet.scale(&format!("{block}.q_norm"), HIDDEN / HEADS);
    sheet.scale(&format!("{block}.k_norm"), HIDDEN / HEADS);
    sheet.layer(&format!("{block}.modulation.linear"), &[3 * HIDDEN, HIDDEN], MODULATION);
}

/// The audio projection and the adapters.
fn audio(sheet: &mut Sheet) {
    sheet.layer("audio_proj.proj1", &[AUDIO_MIDDLE, AUDIO_WINDOW * AUDIO_STATES * AUDIO], 1.0);
    sheet.layer("audio_proj.proj2", &[AUDIO_MIDDLE, AUDIO_MIDDLE], 1.0);
    sheet.layer("audio_proj.proj3", &[AUDIO_TOKENS * HIDDEN, AUDIO_MIDDLE], 1.0);
    sheet.norm("audio_proj.norm", HIDDEN);
    for i in 0..ADAPTED.len() {
        let adapter = format!("audio_adapter_blocks.{i}");
        sheet.norm(&format!("{adapter}.norm1"), HIDDEN);
        sheet.norm(&format!("{adapter}.norm2"), HIDDEN);
        sheet.weight(&format!("{adapter}.to_q"), &[ADAPTER, HIDDEN], 1.0);
        sheet.weight(&format!("{adapter}.to_kv"), &[2 * ADAPTER, HIDDEN], 1.0);
        sheet.weight(&format!("{adapter}.to_out"), &[HIDDEN, ADAPTER], 1.0);
    }
}
