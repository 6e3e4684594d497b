"""Writes small checkpoints as PyTorch saves them, and the values that a reader must find in them.

Run: pip install torch safetensors && python make.py

The same PyTorch writes the same tensors each time (seeded); another version may lay out its archives differently,
which is a reason to run it again. Written with PyTorch 2.15.

`values.safetensors` has the f32 value of every tensor under the name `file/tensor`. The hostile file is written
and never loaded: unpickling it would run a command.
"""

import os
import pathlib
from collections import OrderedDict

import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent


class Hostile:
    """Pickles to a call of `os.system`."""

    def __reduce__(self):
        return os.system, ("echo pwned",)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def module():
    """One tensor for each way that a state dict comes to hold one."""
    table = random(6, 4)
    return OrderedDict(
        {
            "single.weight": random(5, 3),
            "half.weight": random(4, 6).to(torch.float16),
            "brain.weight": random(3, 8, 1, 2).to(torch.bfloat16),
            "parameter.bias": torch.nn.Parameter(random(7)),
            "transposed.weight": random(3, 5).t().contiguous(),
            "rows.weight": table[2:5],  # shares its storage with the next, and starts within it
            "table.weight": table,
            "column.weight": table[1:2, 1:2],  # strides of sides that are 1 say nothing
            "scalar": torch.tensor(0.625),
            "empty": torch.zeros(0, 4),
            "position_ids": torch.arange(9),
            "int8.weight": torch.arange(-4, 4, dtype=torch.int8),
        }
    )


def fp8():
    """Two float8 weights among bfloat16 ones, and their scales."""
    weights = {
        "double_blocks.0.img_mod.linear.weight": random(8, 4).to(torch.float8_e4m3fn),
        "double_blocks.0.img_mod.linear.bias": random(8).to(torch.bfloat16),
        "single_blocks.0.linear1.weight": random(6, 4).to(torch.float8_e4m3fn),
        "final_layer.linear.weight": random(4, 4).to(torch.bfloat16),
    }
    scales = {"double_blocks.0.img_mod.linear": 0.0125, "single_blocks.0.linear1": 0.03125}
    return weights, scales


def main():
    values = {}

    def save(name, content, tensors, **how):
        torch.save(content, FOLDER / name, **how)
        for key, tensor in tensors.items():
            values[f"{name}/{key}"] = tensor.detach().to(torch.float32).contiguous().clone()

    tensors = module()
    save("module.pt", {"module": tensors, "epoch": 3, "args": {"names": ["a", None], "rate": 1e-3}}, tensors)
    save("protocol5.pt", {"module": tensors}, tensors, pickle_protocol=5)

    weights, scales = fp8()
    save("fp8.pt", {"module": weights}, weights)
    save("fp8_map.pt", {"module": scales}, {})
    shapes = zip(scales.items(), [(1,), ()])
    tensors = {key: torch.full(shape, scale) for (key, scale), shape in shapes}
    save("fp8_map_tensors.pt", {"module": tensors}, tensors)

    # A network's own state dict carries versions of its layers as an attribute.
    network = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 1), torch.nn.GroupNorm(1, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(random(*parameter.shape))
    save("state_dict.pt", {"state_dict": network.state_dict()}, network.state_dict())

    # Without tensors: such a pickle names their storages by memory addresses, so each run's file would differ.
    save("legacy.pt", {"epoch": 3}, {}, _use_new_zipfile_serialization=False)
    save("strided.pt", {"fine": random(2, 2), "strided": random(3, 5).t()}, {})
    save("hostile_os_system.pt", {"module": {"weight": random(2, 2), "hook": Hostile()}}, {})
    save_file(values, FOLDER / "values.safetensors")


if __name__ == "__main__":
    GENERATOR = torch.Generator().manual_seed(20)
    main()
