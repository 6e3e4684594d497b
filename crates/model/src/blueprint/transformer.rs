use super::{Missing, Shapes, Sheet, Spec};
use crate::diffusion::TransformerConfig;

/// Gain of the layers that make shifts, scales and gates: small enough that no block drowns the stream.
const MODULATION: f32 = 0.3;

/// Sizes of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransformerSizes {
    /// Width of a token.
    pub hidden: usize,
    /// Width of a head.
    pub head: usize,
    /// Width within the feed-forward layers.
    pub inner: usize,
    /// Blocks with separate streams for picture and text.
    pub double: usize,
    /// Blocks with one stream.
    pub single: usize,
    /// Blocks of the text refiner.
    pub refiner: usize,
    /// Width within the refiner's feed-forward layers.
    pub refiner_inner: usize,
    /// Channels of the latents.
    pub latent: usize,
    /// Width of the text states.
    pub text: usize,
    /// Width of the pooled text state.
    pub pooled: usize,
    /// Width of the sinusoidal embedding of a number.
    pub sinusoids: usize,
    /// Audio features of a frame.
    pub audio: usize,
    /// Width within the audio projection.
    pub audio_inner: usize,
    /// Tokens that it makes of a frame.
    pub audio_tokens: usize,
    /// Audio adapters.
    pub adapters: usize,
    /// Width of an adapter's only head.
    pub adapter: usize,
}

impl TransformerSizes {
    /// The 13B model.
    pub const PUBLISHED: Self = Self {
        hidden: 3072,
        head: 128,
        inner: 12_288,
        double: 20,
        single: 40,
        refiner: 2,
        refiner_inner: 12_288,
        latent: 16,
        text: 4096,
        pooled: 768,
        sinusoids: 256,
        audio: 10 * 5 * 384,
        audio_inner: 1024,
        audio_tokens: 4,
        adapters: 10,
        adapter: 1024,
    };

    pub(super) fn of(found: &Shapes, config: &TransformerConfig) -> Result<Self, Missing> {
        let hidden = found.side("img_in.proj.weight", 0)?;
        let adapters = found.blocks("audio_adapter_blocks");
        Ok(Self {
            hidden,
            head: found.side("single_blocks.0.q_norm.weight", 0)?,
            inner: found.side("single_blocks.0.linear2.weight", 1)?.saturating_sub(hidden),
            double: found.depth("double_blocks", config.depth_double_blocks)?,
            single: found.depth("single_blocks", config.depth_single_blocks)?,
            refiner: found.blocks("txt_in.individual_token_refiner.blocks"),
            refiner_inner: found.side("txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight", 0)?,
            latent: found.side("img_in.proj.weight", 1)?,
            text: found.side("txt_in.input_embedder.weight", 1)?,
            pooled: found.side("vector_in.in_layer.weight", 1)?,
            sinusoids: found.side("time_in.mlp.0.weight", 1)?,
            audio: found.side("audio_proj.proj1.weight", 1)?,
            audio_inner: found.side("audio_proj.proj1.weight", 0)?,
            audio_tokens: found.side("audio_proj.proj3.weight", 0)? / hidden,
            adapters,
            adapter: found.side_or("audio_adapter_blocks.0.to_q.weight", 0, 0)?,
        })
    }

    /// The transformer's tensors.
    #[must_use]
    pub fn tensors(&self) -> Vec<Spec> {
        let mut sheet = Sheet::default();
        self.embeddings(&mut sheet);
        self.refiner(&mut sheet);
        for i in 0..self.double {
            for stream in ["img", "txt"] {
                self.double_stream(&mut sheet, &format!("double_blocks.{i}.{stream}"));
            }
        }
        for i in 0..self.single {
            self.single_block(&mut sheet, &format!("single_blocks.{i}"));
        }
        self.audio(&mut sheet);
        sheet.layer("final_layer.linear", &[4 * self.latent, self.hidden], 1.0);
        sheet.layer("final_layer.adaLN_modulation.1", &[2 * self.hidden, self.hidden], MODULATION);
        sheet.0
    }

    /// Everything that makes tokens and the modulation vector, but for the refiner.
    fn embeddings(&self, sheet: &mut Sheet) {
        let hidden = self.hidden;
        for name in ["img_in.proj", "ref_in.proj"] {
            sheet.layer(name, &[hidden, self.latent, 1, 2, 2], 1.0);
        }
        sheet.layer("before_proj", &[hidden, hidden], 1.0);
        for name in ["time_in", "fps_proj", "txt_in.t_embedder"] {
            self.number(sheet, name, hidden);
        }
        // Four numbers each, side by side.
        for name in ["motion_exp", "motion_pose"] {
            self.number(sheet, name, hidden / 4);
        }
        sheet.layer("vector_in.in_layer", &[hidden, self.pooled], 1.0);
        sheet.layer("vector_in.out_layer", &[hidden, hidden], 1.0);
    }

    /// The two layers that embed a number.
    fn number(&self, sheet: &mut Sheet, name: &str, width: usize) {
        sheet.layer(&format!("{name}.mlp.0"), &[width, self.sinusoids], 1.0);
        sheet.layer(&format!("{name}.mlp.2"), &[width, width], 1.0);
    }

    fn refiner(&self, sheet: &mut Sheet) {
        let (hidden, inner) = (self.hidden, self.refiner_inner);
        sheet.layer("txt_in.input_embedder", &[hidden, self.text], 1.0);
        sheet.layer("txt_in.c_embedder.linear_1", &[hidden, self.text], 1.0);
        sheet.layer("txt_in.c_embedder.linear_2", &[hidden, hidden], 1.0);
        for i in 0..self.refiner {
            let block = format!("txt_in.individual_token_refiner.blocks.{i}");
            sheet.norm(&format!("{block}.norm1"), hidden);
            sheet.layer(&format!("{block}.self_attn_qkv"), &[3 * hidden, hidden], 1.0);
            sheet.layer(&format!("{block}.self_attn_proj"), &[hidden, hidden], 1.0);
            sheet.norm(&format!("{block}.norm2"), hidden);
            sheet.layer(&format!("{block}.mlp.fc1"), &[inner, hidden], 1.0);
            sheet.layer(&format!("{block}.mlp.fc2"), &[hidden, inner], 1.0);
            sheet.layer(&format!("{block}.adaLN_modulation.1"), &[2 * hidden, hidden], MODULATION);
        }
    }

    fn double_stream(&self, sheet: &mut Sheet, stream: &str) {
        let (hidden, inner) = (self.hidden, self.inner);
        sheet.layer(&format!("{stream}_mod.linear"), &[6 * hidden, hidden], MODULATION);
        sheet.layer(&format!("{stream}_attn_qkv"), &[3 * hidden, hidden], 1.0);
        sheet.scale(&format!("{stream}_attn_q_norm"), self.head);
        sheet.scale(&format!("{stream}_attn_k_norm"), self.head);
        sheet.layer(&format!("{stream}_attn_proj"), &[hidden, hidden], 1.0);
        sheet.layer(&format!("{stream}_mlp.fc1"), &[inner, hidden], 1.0);
        sheet.layer(&format!("{stream}_mlp.fc2"), &[hidden, inner], 1.0);
    }

    fn single_block(&self, sheet: &mut Sheet, block: &str) {
        let (hidden, inner) = (self.hidden, self.inner);
        sheet.layer(&format!("{block}.linear1"), &[3 * hidden + inner, hidden], 1.0);
        sheet.layer(&format!("{block}.linear2"), &[hidden, hidden + inner], 1.0);
        sheet.scale(&format!("{block}.q_norm"), self.head);
        sheet.scale(&format!("{block}.k_norm"), self.head);
        sheet.layer(&format!("{block}.modulation.linear"), &[3 * hidden, hidden], MODULATION);
    }

    /// The audio projection and the adapters.
    fn audio(&self, sheet: &mut Sheet) {
        let (hidden, inner) = (self.hidden, self.audio_inner);
        sheet.layer("audio_proj.proj1", &[inner, self.audio], 1.0);
        sheet.layer("audio_proj.proj2", &[inner, inner], 1.0);
        sheet.layer("audio_proj.proj3", &[self.audio_tokens * hidden, inner], 1.0);
        sheet.norm("audio_proj.norm", hidden);
        for i in 0..self.adapters {
            let adapter = format!("audio_adapter_blocks.{i}");
            sheet.norm(&format!("{adapter}.norm1"), hidden);
            sheet.norm(&format!("{adapter}.norm2"), hidden);
            sheet.weight(&format!("{adapter}.to_q"), &[self.adapter, hidden], 1.0);
            sheet.weight(&format!("{adapter}.to_kv"), &[2 * self.adapter, hidden], 1.0);
            sheet.weight(&format!("{adapter}.to_out"), &[hidden, self.adapter], 1.0);
        }
    }
}
