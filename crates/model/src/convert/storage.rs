//! Which tensor is stored how.

use std::{fmt, str::FromStr};

use crate::{
    blueprint::Network,
    weights::{Encoding, ggml},
};

/// What a checkpoint's weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Everything in bf16.
    Bf16,
    /// Everything in f16.
    F16,
    /// Everything in f32.
    F32,
    /// The large linear layers in e4m3fn, with one scale for each.
    Fp8,
    /// The large linear layers in signed bytes, with one scale for each row.
    Int8,
    /// The large linear layers in GGUF's 8-bit blocks.
    Q8_0,
    /// The large linear layers in GGUF's 4-bit blocks of 256.
    Q4K,
}

/// The form of a file of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `*.safetensors`
    Safetensors,
    /// `*.gguf`
    Gguf,
}

/// How a tensor is to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// In which encoding.
    pub encoding: Encoding,
    /// Whether that is another one than asked for, because the tensor's rows do not fit it.
    pub fallback: bool,
}

impl Storage {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::Bf16, Self::F16, Self::F32, Self::Fp8, Self::Int8, Self::Q8_0, Self::Q4K];

    /// The name that the command line takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.encoding().name()
    }

    fn encoding(self) -> Encoding {
        match self {
            Self::Bf16 => Encoding::Bf16,
            Self::F16 => Encoding::F16,
            Self::F32 => Encoding::F32,
            Self::Fp8 => Encoding::F8E4M3,
            Self::Int8 => Encoding::I8,
            Self::Q8_0 => Encoding::Q8_0,
            Self::Q4K => Encoding::Q4K,
        }
    }

    /// Whether every tensor is stored alike, as a plain number.
    #[must_use]
    pub fn is_plain(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16 | Self::F32)
    }

    /// The form of a network's file.
    #[must_use]
    pub fn form(self, network: Network) -> Form {
        match (self, network) {
            (Self::Q8_0 | Self::Q4K, Network::Transformer | Network::Llava) => Form::Gguf,
            _ => Form::Safetensors,
        }
    }

    /// How a tensor is stored that now is stored as `own`.
    ///
    /// A plain precision is that of every tensor. Where the large linear layers are quantised, the VAE and Whisper
    /// keep their own plain type, and of the other networks everything else is in 16 bits: its own type if that is
    /// one of 16 bits, otherwise bf16.
    #[must_use]
    pub fn target(self, network: Network, name: &str, shape: &[usize], own: Encoding) -> Target {
        let wanted = self.encoding();
        if self.is_plain() {
            return Target { encoding: wanted, fallback: false };
        }
        if network.quantises(name, shape) {
            let fits = |encoding: &Encoding| ggml::fits(*encoding, shape);
            let encoding = match wanted {
                Encoding::Q4K | Encoding::Q8_0 => [wanted, Encoding::Q8_0].into_iter().find(fits),
                other => Some(other),
            };
            let encoding = encoding.unwrap_or(Encoding::Bf16);
            return Target { encoding, fallback: encoding != wanted };
        }
        let encoding = match (network, own) {
            (_, Encoding::Bf16 | Encoding::F16) => own,
            (Network::Whisper | Network::VaeEncoder | Network::VaeDecoder, _) => Encoding::F32,
            _ => Encoding::Bf16,
        };
        Target { encoding, fallback: false }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Storage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|p| p.name() == text).ok_or_else(|| format!("not one of {}", names()))
    }
}
