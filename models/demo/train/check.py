"""Holds these networks to the reference's recorded cases: python check.py ../../../tests/goldens"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def case(folder: Path, name: str):
    where = folder / name
    config = json.loads((where / "config.json").read_text())
    weights = folder / config.get("weights_from", name) / "weights.safetensors"
    return config, load_file(weights) if weights.exists() else {}, load_file(where / "inputs.safetensors"), load_file(where / "outputs.safetensors")


def hold(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float):
    error = ((got - want).abs().max() / want.abs().max()).item()
    print(f"{'ok  ' if error <= tolerance else 'FAIL'} {name}: {error:.2e} (allowed {tolerance:.0e})")
    return error <= tolerance


def vae(folder: Path) -> bool:
    from vae import Vae

    good = True
    for name in ("vae_causal_attn", "vae_plain_attn"):
        config, weights, inputs, outputs = case(folder, name)
        network = Vae(config)
        network.inflate()
        network.load_state_dict(weights)
        last, first = (0, 2, 3, 4, 1), (0, 4, 1, 2, 3)
        with torch.no_grad():
            mean, logvar = network.encode(inputs["x"].permute(last))
            decoded = network.decode(inputs["z"].permute(last))
        for key, got in (("mean", mean), ("logvar", logvar), ("decoded", decoded)):
            key = key if key in outputs else "y"
            good &= hold(f"{name} {key}", got.permute(first), outputs[key], config["tolerance_max_rel"])
    return good


def transformer(folder: Path) -> bool:
    from networks import Transformer

    good = True
    for name in ("dit_full", "dit_single_item"):
        config, weights, i, outputs = case(folder, name)
        audio = config["audio"]
        network = Transformer({
            **config, "audio_values": audio["window"] * audio["blocks"] * audio["channels"],
            "audio_inner": audio["intermediate"], "adapter": audio["adapter_dim"],
        })
        network.load_state_dict(weights)
        got = network(i["x"], i["t"], i["text_states"], i["text_mask"], i["text_states_2"], i["ref_latents"],
                      i["audio_prompts"], i["face_mask"], i["fps"], i["motion_exp"], i["motion_pose"])
        good &= hold(name, got, outputs["out"], config["tolerance_max_rel"])
    return good


def encoders(folder: Path) -> bool:
    from networks import ClipText, Llava, Whisper, log_mel, windows

    config, weights, inputs, outputs = case(folder, "whisper_encoder")
    network = Whisper(config["d_model"], config["ffn"], config["layers"], config["heads"], config["mels"])
    network.load_state_dict(weights)
    states = network(inputs["mel"][None])[0]
    tolerance = config["tolerance_max_rel"]
    good = hold("whisper_encoder", states[config["hidden_rows_index"]], outputs["hidden_rows"], tolerance)
    good &= hold("whisper windows", windows(states, torch.arange(25))[None], outputs["prompts_fps25"], tolerance)
    config, _, inputs, outputs = case(folder, "whisper_logmel")
    good &= hold("whisper_logmel", log_mel(inputs["wav"])[:, :208], outputs["mel"], config["tolerance_max_rel"])
    config, weights, inputs, outputs = case(folder, "clip_text")
    network = ClipText(config["hidden"], config["inter"], config["layers"], config["heads"], config["vocab"], 77)
    network.load_state_dict({k: v for k, v in weights.items() if not k.endswith("position_ids")})
    pooled = network(inputs["input_ids"], inputs["attention_mask"])
    good &= hold("clip_text", pooled, outputs["pooler_output"], config["tolerance_max_rel"])
    config, weights, inputs, outputs = case(folder, "llava_text")
    keys = weights["language_model.model.layers.0.self_attn.k_proj.weight"].shape[0]
    network = Llava({
        "vision": config["vh"], "patch": 14, "grid": config["image_side"] // 14, "vision_layers": config["vlayers"],
        "vision_inner": config["vinter"], "vision_heads": config["vheads"], "width": config["hidden"],
        "words": config["vocab"], "keys": keys, "inner": config["inter"], "heads": config["heads"],
        "kv_heads": config["kv"], "layers": config["layers"], "image_token": config["image_token"],
        "rope_theta": config["rope_theta"],
    })
    unused = network.load_state_dict(weights, strict=False)
    assert not unused.missing_keys, unused.missing_keys
    states, mask = network(inputs["input_ids"][0], inputs["attention_mask"][0], inputs["pixel_values"][0], config["crop"])
    good &= hold("llava_text", states, outputs["prompt_embeds"][0], config["tolerance_max_rel"])
    return good & bool((mask == outputs["prompt_mask"][0]).all())


def main():
    folder = Path(sys.argv[1])
    torch.set_grad_enabled(False)
    good = vae(folder) & transformer(folder) & encoders(folder)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
