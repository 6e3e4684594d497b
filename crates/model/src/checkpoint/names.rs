//! Tensors' names in published files, and the networks' own.

use std::borrow::Cow;

use super::Network;

/// The network's name for a tensor of a file, or nothing where the tensor is of a part that the network lacks.
///
/// What is not known stays as it is, so that a network refuses it by the name that the file has.
#[must_use]
pub fn network_name(network: Network, name: &str) -> Option<String> {
    let name = match network {
        // The decoder is another network, and so is what follows it.
        Network::Whisper => Cow::Borrowed(name.strip_prefix("model.").unwrap_or(name)),
        Network::Clip if of_clips_other_half(name) => return None,
        Network::Vae => Cow::Owned(name.replace("vae.", "")),
        Network::Llava | Network::Clip | Network::Transformer => Cow::Borrowed(name),
    };
    Some(name.into_owned())
}

fn of_clips_other_half(name: &str) -> bool {
    const PARTS: [&str; 3] = ["vision_model.", "visual_projection.", "text_projection."];
    name == "logit_scale" || PARTS.iter().any(|part| name.starts_with(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn renamed(network: Network, name: &str) -> Option<String> {
        network_name(network, name)
    }

    #[test]
    fn whisper_may_carry_a_leading_model() {
        for name in ["model.encoder.conv1.weight", "encoder.conv1.weight"] {
            assert_eq!(renamed(Network::Whisper, name).as_deref(), Some("encoder.conv1.weight"));
        }
        assert_eq!(renamed(Network::Whisper, "encoder.model.x").as_deref(), Some("encoder.model.x"));
    }

    #[test]
    fn the_vaes_names_may_hold_vae_anywhere() {
        assert_eq!(
            renamed(Network::Vae, "vae.encoder.conv_in.conv.bias").as_deref(),
            Some("encoder.conv_in.conv.bias")
        );
        assert_eq!(renamed(Network::Vae, "quant_conv.weight").as_deref(), Some("quant_conv.weight"));
    }

    #[test]
    fn of_clip_only_the_text_half_is_taken() {
        for name in ["vision_model.post_layernorm.bias", "visual_projection.weight", "logit_scale"] {
            assert_eq!(renamed(Network::Clip, name), None, "{name}");
        }
        assert_eq!(
            renamed(Network::Clip, "text_model.final_layer_norm.bias").unwrap(),
            "text_model.final_layer_norm.bias"
        );
        // Neither half's: it stays, and is refused.
        assert_eq!(renamed(Network::Clip, "surprise").as_deref(), Some("surprise"));
    }

    #[test]
    fn the_transformer_and_llava_have_their_names_in_the_files() {
        for network in [Network::Transformer, Network::Llava] {
            assert_eq!(renamed(network, "model.x").as_deref(), Some("model.x"));
        }
    }
}
