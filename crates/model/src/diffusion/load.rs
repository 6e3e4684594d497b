//! Reading the transformer, onto one device or several.

use super::{
    AudioAdapter, AudioProjection, DoubleBlock, Embedder, FinalLayer, Part, PatchEmbed, SingleBlock, TimeEmbedder,
    TokenRefiner, Transformer, TransformerConfig,
    parts::{Span, ranges},
};
use crate::{Error, Result, memory, nn::Linear, weights::Weights};

impl Transformer {
    /// Reads the transformer's tensors, under the reference's names.
    ///
    /// Errors: a tensor is missing or mis-shaped, or the config contradicts the tensors.
    pub fn load(weights: &Weights, config: &TransformerConfig) -> Result<Self> {
        Self::load_over(weights, config, &[])
    }

    /// As [`load`](Self::load), over the devices of some parts: what comes before the blocks is on the first one, what
    /// comes after them on the last. Without a part all is on the weights' device.
    ///
    /// Errors: as there, and the parts do not have all blocks.
    pub fn load_over(weights: &Weights, config: &TransformerConfig, parts: &[Part]) -> Result<Self> {
        let depths = (
            config.depth_double_blocks.unwrap_or_else(|| weights.count("double_blocks", "img_attn_qkv.weight")),
            config.depth_single_blocks.unwrap_or_else(|| weights.count("single_blocks", "linear1.weight")),
        );
        if depths.1 == 0 {
            return Err(Error::input("depth_single_blocks", "the checkpoint has no single block, expected one"));
        }
        let whole = [Part { device: weights.device().clone(), blocks: depths.0 + depths.1 }];
        let parts = if parts.is_empty() { &whole[..] } else { parts };
        let ranges = ranges(parts, depths.0 + depths.1)?;
        let (first, last) = (&parts[0].device, &parts[parts.len() - 1].device);
        let (on_last, weights) = (weights.on(last).pp("final_layer"), &weights.on(first));
        let img_in = PatchEmbed::load(&weights.pp("img_in"))?;
        let (hidden, channels) = (img_in.hidden(), img_in.channels());
        let [head] = weights.dims("single_blocks.0.q_norm.weight")?;
        let heads = hidden.checked_div(head).unwrap_or(0);
        if config.rope_dim_list.iter().sum::<usize>() != head {
            let reason = format!("{:?}: expected a sum of {head}, the width of a head", config.rope_dim_list);
            return Err(Error::input("rope_dim_list", reason));
        }
        let adapted = config.adapted_blocks(depths.0, weights.count("audio_adapter_blocks", "to_q.weight"))?;
        let (mut double_blocks, mut single_blocks, mut adapters) = (Vec::new(), Vec::new(), Vec::new());
        let (mut spans, mut unswapped) = (Vec::new(), Vec::new());
        for (number, (part, range)) in parts.iter().zip(ranges).enumerate() {
            if number > 0 {
                memory::moved(number, 0);
            }
            let here = weights.on(&part.device);
            let coming = here.later();
            let (mut extents, mut others) = (Vec::new(), 0);
            for block in range.clone() {
                let name = match block.checked_sub(depths.0) {
                    None => format!("double_blocks.{block}"),
                    Some(single) => format!("single_blocks.{single}"),
                };
                let of_block = coming.pp(&name);
                if block < depths.0 {
                    double_blocks.push(DoubleBlock::load(&of_block, hidden)?);
                } else {
                    single_blocks.push(SingleBlock::load(&of_block, hidden)?);
                }
                extents.push(of_block.extent());
                if adapted.contains(&block) {
                    let of_adapter = here.pp(format!("audio_adapter_blocks.{}", adapters.len()));
                    adapters.push(AudioAdapter::load(&of_adapter, hidden)?);
                    others += of_adapter.extent().bytes();
                }
            }
            if number + 1 == parts.len() {
                others += on_last.extent().bytes();
            }
            spans.push(Span::new(part, range, extents));
            unswapped.push(others);
        }
        // Now the last part is at work.
        let final_layer = FinalLayer::load(&on_last, hidden)?;
        if spans.len() > 1 {
            memory::moved(0, 0);
        }
        let blocks: u64 = spans.iter().flat_map(|span: &Span| span.swap.sizes()).sum();
        if let Some((first, others)) = unswapped.split_first_mut() {
            *first = weights.extent().bytes().saturating_sub(blocks + others.iter().sum::<u64>());
        }
        let transformer = Self {
            ref_in: PatchEmbed::load(&weights.pp("ref_in"))?,
            before_proj: Linear::load_sized(&weights.pp("before_proj"), hidden, hidden)?,
            txt_in: TokenRefiner::load(&weights.pp("txt_in"), heads)?,
            time_in: TimeEmbedder::load(&weights.pp("time_in"))?,
            motion_exp: TimeEmbedder::load(&weights.pp("motion_exp"))?,
            motion_pose: TimeEmbedder::load(&weights.pp("motion_pose"))?,
            fps_proj: TimeEmbedder::load(&weights.pp("fps_proj"))?,
            vector_in: Embedder::load(&weights.pp("vector_in"), "in_layer", "out_layer")?,
            audio_proj: AudioProjection::load(&weights.pp("audio_proj"), hidden)?,
            double_blocks,
            adapters,
            adapted,
            single_blocks,
            final_layer,
            rope_dims: config.rope_dim_list,
            rope_theta: config.rope_theta,
            unswapped,
            spans,
            dtype: weights.dtype(),
            device: first.clone(),
            img_in,
        };
        let widths = transformer.widths();
        TransformerConfig::agree("hidden_size", config.hidden_size, hidden)?;
        TransformerConfig::agree("num_heads", config.num_heads, heads)?;
        TransformerConfig::agree("in_channels", config.in_channels, channels)?;
        TransformerConfig::agree("text_states_dim", config.text_states_dim, widths.text)?;
        TransformerConfig::agree("text_states_dim_2", config.text_states_dim_2, widths.pooled)?;
        for (name, found, expected) in [
            ("ref_in", transformer.ref_in.hidden(), hidden),
            ("ref_in", transformer.ref_in.channels(), channels),
            ("final_layer", transformer.final_layer.out(), 4 * channels),
            ("time_in", transformer.time_in.out(), hidden),
            ("motion_exp", 4 * transformer.motion_exp.out(), hidden),
            ("motion_pose", 4 * transformer.motion_pose.out(), hidden),
            ("fps_proj", transformer.fps_proj.out(), hidden),
            ("vector_in", transformer.vector_in.out(), hidden),
        ] {
            if found != expected {
                return Err(Error::input(name, format!("gives a width of {found}, expected {expected}")));
            }
        }
        Ok(transformer)
    }
}
