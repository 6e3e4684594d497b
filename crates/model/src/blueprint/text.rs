use super::{Missing, Shapes, Sheet, Spec};
use crate::text::{ClipConfig, LlavaConfig};

const VISION: &str = "vision_tower.vision_model";
const LLAMA: &str = "language_model.model";

/// Sizes of vision tower, projector and Llama.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LlavaSizes {
    /// Width of the vision tower.
    pub vision: usize,
    /// Width within the vision tower's feed-forward layers.
    pub vision_inner: usize,
    /// Layers of the vision tower.
    pub vision_layers: usize,
    /// Pixels along a patch.
    pub patch: usize,
    /// Patches of a picture, and one.
    pub vision_positions: usize,
    /// Width within the projector.
    pub projector: usize,
    /// Tokens that have an embedding.
    pub words: usize,
    /// Width of the Llama.
    pub width: usize,
    /// Width of all its keys, or of all its values.
    pub keys: usize,
    /// Width within its feed-forward layers.
    pub inner: usize,
    /// Its layers.
    pub layers: usize,
    /// Whether what comes after the hidden states that are taken is there: the vision tower's last normalisation,
    /// the Llama's, and its head.
    pub ends: bool,
}

impl LlavaSizes {
    /// LLaVA-Llama-3-8B, whole.
    pub const PUBLISHED: Self = Self {
        vision: 1024,
        vision_inner: 4096,
        vision_layers: 24,
        patch: 14,
        vision_positions: 577,
        projector: 4096,
        words: 128_320,
        width: 4096,
        keys: 1024,
        inner: 14_336,
        layers: 32,
        ends: true,
    };

    /// The part that is read of the published model.
    pub const NEEDED: Self = Self { layers: 30, vision_layers: 23, ends: false, ..Self::PUBLISHED };

    pub(super) fn of(found: &Shapes, config: &LlavaConfig) -> Result<Self, Missing> {
        let (vision_layers, llama_layers) = (format!("{VISION}.encoder.layers"), format!("{LLAMA}.layers"));
        let (of_vision, of_llama) = Self::depths(found);
        let needed = config.needed_layers(of_vision, of_llama);
        let fault = |reason| Missing { name: format!("{llama_layers}.0.self_attn.q_proj.weight"), reason };
        let (of_vision, of_llama) = needed.map_err(fault)?;
        // No more than may be: a config can say any number of layers.
        found.depth(&vision_layers, Some(of_vision))?;
        found.depth(&llama_layers, Some(of_llama))?;
        Ok(Self {
            vision: found.side(&format!("{VISION}.embeddings.class_embedding"), 0)?,
            vision_inner: found.side(&format!("{vision_layers}.0.mlp.fc1.weight"), 0)?,
            vision_layers: of_vision,
            patch: found.side(&format!("{VISION}.embeddings.patch_embedding.weight"), 3)?,
            vision_positions: found.side(&format!("{VISION}.embeddings.position_embedding.weight"), 0)?,
            projector: found.side("multi_modal_projector.linear_1.weight", 0)?,
            words: found.side(&format!("{LLAMA}.embed_tokens.weight"), 0)?,
            width: found.side(&format!("{LLAMA}.embed_tokens.weight"), 1)?,
            keys: found.side(&format!("{llama_layers}.0.self_attn.k_proj.weight"), 0)?,
            inner: found.side(&format!("{llama_layers}.0.mlp.gate_proj.weight"), 0)?,
            layers: of_llama,
            ends: false,
        })
    }

    /// Layers of the vision tower and of the Llama that a checkpoint has.
    pub(crate) fn depths(found: &Shapes) -> (usize, usize) {
        (found.blocks(&format!("{VISION}.encoder.layers")), found.blocks(&format!("{LLAMA}.layers")))
    }

    /// The tensors of all three parts.
    #[must_use]
    pub fn tensors(&self) -> Vec<Spec> {
        let Self { vision, width, .. } = *self;
        let mut sheet = Sheet::default();
        sheet.table(&format!("{VISION}.embeddings.class_embedding"), &[vision], 0.5);
        sheet.weight(&format!("{VISION}.embeddings.patch_embedding"), &[vision, 3, self.patch, self.patch], 4.0);
        sheet.table(&format!("{VISION}.embeddings.position_embedding.weight"), &[self.vision_positions, vision], 0.3);
        sheet.norm(&format!("{VISION}.pre_layrnorm"), vision);
        for i in 0..self.vision_layers {
            clip_layer(&mut sheet, &format!("{VISION}.encoder.layers.{i}"), vision, self.vision_inner);
        }
        if self.ends {
            sheet.norm(&format!("{VISION}.post_layernorm"), vision);
        }
        sheet.layer("multi_modal_projector.linear_1", &[self.projector, vision], 1.0);
        sheet.layer("multi_modal_projector.linear_2", &[width, self.projector], 1.5);

        sheet.table(&format!("{LLAMA}.embed_tokens.weight"), &[self.words, width], 0.7);
        for i in 0..self.layers {
            let layer = format!("{LLAMA}.layers.{i}");
            for (name, out) in [("q_proj", width), ("k_proj", self.keys), ("v_proj", self.keys), ("o_proj", width)] {
                sheet.weight(&format!("{layer}.self_attn.{name}"), &[out, width], 1.0);
            }
            sheet.weight(&format!("{layer}.mlp.gate_proj"), &[self.inner, width], 1.0);
            sheet.weight(&format!("{layer}.mlp.up_proj"), &[self.inner, width], 1.0);
            sheet.weight(&format!("{layer}.mlp.down_proj"), &[width, self.inner], 1.0);
            sheet.scale(&format!("{layer}.input_layernorm"), width);
            sheet.scale(&format!("{layer}.post_attention_layernorm"), width);
        }
        if self.ends {
            sheet.scale(&format!("{LLAMA}.norm"), width);
            sheet.weight("language_model.lm_head", &[self.words, width], 1.0);
        }
        sheet.0
    }
}

/// Sizes of CLIP's text network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipSizes {
    /// Width of a state.
    pub width: usize,
    /// Width within the feed-forward layers.
    pub inner: usize,
    /// Layers.
    pub layers: usize,
    /// Tokens that have an embedding.
    pub words: usize,
    /// Tokens of the longest text.
    pub positions: usize,
}

impl ClipSizes {
    /// CLIP ViT-L/14.
    pub const PUBLISHED: Self = Self { width: 768, inner: 3072, layers: 12, words: 49_408, positions: 77 };

    pub(super) fn of(found: &Shapes, config: &ClipConfig) -> Result<Self, Missing> {
        const EMBEDDINGS: &str = "text_model.embeddings";
        Ok(Self {
            width: found.side(&format!("{EMBEDDINGS}.token_embedding.weight"), 1)?,
            words: found.side(&format!("{EMBEDDINGS}.token_embedding.weight"), 0)?,
            positions: found.side(&format!("{EMBEDDINGS}.position_embedding.weight"), 0)?,
            inner: found.side("text_model.encoder.layers.0.mlp.fc1.weight", 0)?,
            layers: found.depth("text_model.encoder.layers", config.layers)?,
        })
    }

    /// The network's tensors.
    #[must_use]
    pub fn tensors(&self) -> Vec<Spec> {
        let width = self.width;
        let mut sheet = Sheet::default();
        sheet.table("text_model.embeddings.token_embedding.weight", &[self.words, width], 0.7);
        sheet.table("text_model.embeddings.position_embedding.weight", &[self.positions, width], 0.3);
        for i in 0..self.layers {
            clip_layer(&mut sheet, &format!("text_model.encoder.layers.{i}"), width, self.inner);
        }
        sheet.norm("text_model.final_layer_norm", width);
        sheet.0
    }
}

fn clip_layer(sheet: &mut Sheet, layer: &str, width: usize, inner: usize) {
    for name in ["k_proj", "v_proj", "q_proj", "out_proj"] {
        sheet.layer(&format!("{layer}.self_attn.{name}"), &[width, width], 1.0);
    }
    sheet.norm(&format!("{layer}.layer_norm1"), width);
    sheet.layer(&format!("{layer}.mlp.fc1"), &[inner, width], 1.0);
    sheet.layer(&format!("{layer}.mlp.fc2"), &[width, inner], 1.0);
    sheet.norm(&format!("{layer}.layer_norm2"), width);
}
