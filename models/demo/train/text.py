"""The demo model's text side: tokenizers, sizes, and prompts as the product makes tokens of them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import data

PREFIX = "Authentic, Realistic, Natural, High-quality, Lens-Fixed, "
NEGATIVE = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion, blurring, Lens changes"
)
BEFORE = "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video:<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
AFTER = "<|eot_id|>\nThe person looks like<image>"
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"]
CLIP_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
WORDS = 512
PROMPT_TOKENS = 256
CLIP_POSITIONS = 77
COLOURS = list(data.COLOURS)

LLAVA = {
    "vision": 32, "patch": 14, "grid": 3, "vision_layers": 2, "vision_inner": 64, "vision_heads": 4, "width": 64,
    "words": WORDS, "keys": 32, "inner": 128, "heads": 4, "kv_heads": 2, "layers": 4, "rope_theta": 500000.0,
}
CLIP = {"width": 64, "inner": 128, "layers": 2, "heads": 4, "words": WORDS, "positions": CLIP_POSITIONS, "end": 1}

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def _tokenizer(special: list[str], start: str, end: str | None) -> Tokenizer:
    """A byte-level tokenizer with merges for the words that prompts are made of."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [PREFIX, NEGATIVE, BEFORE, AFTER] * 3
    corpus += [PREFIX + text for text in data.PLAIN_PROMPTS]
    corpus += [PREFIX + text.format(colour) for text in data.COLOUR_PROMPTS for colour in COLOURS]
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    ids = [(s, tokenizer.token_to_id(s)) for s in (start, end) if s]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end or ''}".strip(), special_tokens=ids)
    return tokenizer


class Texts:
    """Both tokenizers, from a folder once they have been made there."""

    def __init__(self, folder: Path):
        self.paths = {"llava": folder / "llava-tokenizer.json", "clip": folder / "clip-tokenizer.json"}
        if not self.paths["llava"].exists():
            folder.mkdir(parents=True, exist_ok=True)
            _tokenizer(SPECIAL, SPECIAL[0], None).save(str(self.paths["llava"]))
            _tokenizer(CLIP_SPECIAL, *CLIP_SPECIAL).save(str(self.paths["clip"]))
        self.llava, self.clip = (Tokenizer.from_file(str(path)) for path in self.paths.values())
        self.id = self.llava.token_to_id
        self.eot = CLIP["end"]
        assert self.clip.token_to_id(CLIP_SPECIAL[1]) == self.eot
        self.crop = 1 + len(self.llava.encode(BEFORE, add_special_tokens=False).ids)

    def llava_tokens(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [self.id("<|begin_of_text|>"), *self.llava.encode(BEFORE + prompt + AFTER, add_special_tokens=False).ids]
        length = self.crop + PROMPT_TOKENS
        mask = [1] * len(ids) + [0] * (length - len(ids))
        return torch.tensor(ids + [self.id("<pad>")] * (length - len(ids))), torch.tensor(mask)

    def clip_tokens(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.clip.encode(prompt).ids
        if len(ids) > CLIP_POSITIONS:
            ids = [*ids[: CLIP_POSITIONS - 1], self.eot]
        mask = [1] * len(ids) + [0] * (CLIP_POSITIONS - len(ids))
        return torch.tensor(ids + [self.eot] * (CLIP_POSITIONS - len(ids))), torch.tensor(mask)

    def config(self) -> dict:
        """`config.json` of the text encoder's folder."""
        llava = {k: LLAVA[k] for k in ("heads", "kv_heads", "layers", "rope_theta", "vision_heads", "vision_layers")}
        llava |= {"bos_token": self.id("<|begin_of_text|>"), "image_token": self.id("<image>"), "pad_token": self.id("<pad>"),
                  "template": BEFORE + "{}" + AFTER, "prompt_tokens": PROMPT_TOKENS}
        return {"llava": llava, "clip": {"heads": CLIP["heads"], "eot_token": self.eot}}


def pixels(picture: np.ndarray) -> torch.Tensor:
    """What the vision tower sees of a picture (H, W, 3), uint8: (3, side, side)."""
    side = LLAVA["grid"] * LLAVA["patch"]
    small = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR), np.float32)
    return torch.from_numpy((small / 255 - _MEAN) / _STD).permute(2, 0, 1)


def write_config(path: Path, config: dict):
    path.write_text(json.dumps(config, indent=2) + "\n")
