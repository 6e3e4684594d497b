"""Writes what was trained as a folder of models in the native layout, in 16 bits.

    python export.py RUN MODELS [--size 128 --steps 20 --guidance 1 --shift 3]
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from text import Texts, write_config
from train_encoders import WHISPER
from train_transformer import TRANSFORMER, vae
from vae import DEMO


def write(path: Path, tensors: dict[str, torch.Tensor]):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = {}
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all() and tensor.abs().max() < 6e4, name
        small[name] = tensor.half().contiguous()
    save_file(small, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--shift", type=float, default=3.0)
    a = parser.parse_args()

    state = vae(a.run).state_dict()
    scale = json.loads((a.run / "scale.json").read_text())["scaling_factor"]
    for stage, parts in (("image-encoder", ("encoder.", "quant_conv.")), ("vae-decode", ("decoder.", "post_quant_conv."))):
        write(a.models / stage / "model.safetensors", {k: v for k, v in state.items() if k.startswith(parts)})
        write_config(a.models / stage / "config.json", DEMO | {"scaling_factor": scale})

    audio = torch.load(a.run / "audio.pt", weights_only=False)["network"]
    write(a.models / "audio-encoder" / "model.safetensors", audio)
    write_config(a.models / "audio-encoder" / "config.json", {"heads": WHISPER["heads"]})

    text, texts = torch.load(a.run / "text.pt", weights_only=False), Texts(a.run)
    for name in ("llava", "clip"):
        write(a.models / "text-encoder" / name / "model.safetensors", text[name])
        shutil.copyfile(texts.paths[name], a.models / "text-encoder" / name / "tokenizer.json")
    write_config(a.models / "text-encoder" / "config.json", texts.config())

    network = torch.load(a.run / "transformer.pt", weights_only=False)["network"]
    write(a.models / "diffusion" / "model.safetensors", network)
    config = {k: v for k, v in TRANSFORMER.items() if k not in ("audio_values", "audio_inner", "adapter")}
    config["defaults"] = {"size": a.size, "steps": a.steps, "guidance_scale": a.guidance, "flow_shift": a.shift}
    write_config(a.models / "diffusion" / "config.json", config)

    lines = []
    for path in sorted(p for p in a.models.rglob("*") if p.is_file() and p.name != "SHA256SUMS"):
        content = path.read_bytes()
        assert len(content) < 16e6, f"{path}: {len(content)} bytes"
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {path.relative_to(a.models)}\n")
        print(f"{len(content):10} {path.relative_to(a.models)}")
    (a.models / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
