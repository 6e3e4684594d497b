"""Writes one case of the transformer as PyTorch computes it, in the form of the recorded ones: random values, the sizes
of the demo model but narrower.

    python make_case.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from networks import Transformer


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(6)
    config = {
        "case": folder.name, "hidden_size": 48, "num_heads": 4, "rope_dim_list": [4, 4, 4], "rope_theta": 256,
        "depth_double_blocks": 2, "depth_single_blocks": 3, "mlp_width_ratio": 4, "in_channels": 16,
        "text_states_dim": 24, "text_states_dim_2": 20, "audio_double_blocks": [0, 1],
        "audio": {"window": 10, "blocks": 5, "channels": 8, "intermediate": 24, "adapter_dim": 32},
        "shape": {"b": 1, "t": 3, "lh": 6, "lw": 4, "L": 14, "valid": [11]}, "tolerance_max_rel": 2e-5,
    }
    audio = config["audio"]
    network = Transformer(config | {
        "audio_values": audio["window"] * audio["blocks"] * audio["channels"], "audio_inner": audio["intermediate"],
        "adapter": audio["adapter_dim"],
    })
    for name, p in network.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else 1.0 / p[0].numel() ** 0.5)
    mask = torch.tensor([[1] * 8 + [0] * 3 + [1] * 3])
    inputs = {
        "x": torch.randn(1, 16, 3, 6, 4), "t": torch.tensor([812.5]), "text_states": torch.randn(1, 14, 24),
        "text_mask": mask, "text_states_2": torch.randn(1, 20), "ref_latents": torch.randn(1, 16, 1, 6, 4).repeat(1, 1, 3, 1, 1),
        "audio_prompts": torch.randn(1, 9, 10, 5, 8), "face_mask": torch.rand(1, 1, 1, 6, 4), "fps": torch.tensor([25.0]),
        "motion_exp": torch.full((1, 4), 30), "motion_pose": torch.full((1, 4), 25),
    }
    with torch.no_grad():
        out = network(inputs["x"], inputs["t"], inputs["text_states"], mask, inputs["text_states_2"], inputs["ref_latents"],
                      inputs["audio_prompts"], inputs["face_mask"], inputs["fps"], inputs["motion_exp"], inputs["motion_pose"])
    save_file({k: v.detach().contiguous() for k, v in network.state_dict().items()}, folder / "weights.safetensors")
    save_file({k: v.contiguous() for k, v in inputs.items()}, folder / "inputs.safetensors")
    save_file({"out": out.contiguous()}, folder / "outputs.safetensors")
    config["tensors"] = {
        "inputs": {k: [str(v.dtype)[6:], list(v.shape)] for k, v in inputs.items()},
        "outputs": {"out": ["float32", list(out.shape)]},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
