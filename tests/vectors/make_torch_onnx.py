"""Makes torch_opset*.onnx and torch_onnx.json: what PyTorch's exporter writes, and what PyTorch computes.

The network has the parts that face detectors are made of, of an open size; its weights are random. The input is
sin(0.05 i) at element i of (1, 3, 32, 48).

    python tests/vectors/make_torch_onnx.py tests/vectors    (with torch; made with 2.9)
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.onnx._internal.torchscript_exporter import onnx_proto_utils

SHAPE = (1, 3, 32, 48)


class Parts(nn.Module):
    """Convolutions of all kinds, two sizes put together, and heads as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(12, 8, 3, 1, 1)
        self.apart = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 2, dilation=2), nn.LeakyReLU(0.1), nn.Hardswish())
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.mean = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.squeeze = nn.Linear(8, 8)
        self.scores = nn.Conv2d(16, 4, 1)
        self.boxes = nn.Conv2d(16, 8, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        x = F.silu(self.first(x))
        x = x + self.apart(x).clamp(-1.0, 2.0)
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3))))[..., None, None]
        small = self.mean(self.pool(self.wide(x * gate)))
        large = F.interpolate(small, scale_factor=2.0, mode="nearest")
        left, right = F.interpolate(large, size=x.shape[2:], mode="bilinear", align_corners=False).split(4, 1)
        x = torch.cat([x, left, torch.tanh(right)], 1)
        n = x.size(0)
        scores = self.scores(x).permute(0, 2, 3, 1).contiguous().view(n, -1, 2).softmax(-1)
        boxes = self.boxes(x).permute(0, 2, 3, 1).contiguous().view(n, -1, 4)
        centre, size = boxes[..., :2] * 0.1 + 0.5, torch.exp(boxes[..., 2:] * 0.2)
        return scores, torch.cat([centre - size / 2, centre + size**2 / 2], -1)


def main() -> None:
    """Writes the files."""
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    # It would only add functions of its own, which there are none of here, and asks for the onnx package.
    onnx_proto_utils._add_onnxscript_fn = lambda model, _: model
    torch.manual_seed(0)
    network = Parts().eval()
    picture = torch.sin(0.05 * torch.arange(3 * 32 * 48, dtype=torch.float64)).float().reshape(SHAPE)
    for opset in (11, 17):
        torch.onnx.export(
            network, (picture,), str(folder / f"torch_opset{opset}.onnx"), opset_version=opset, input_names=["x"],
            output_names=["scores", "boxes"], dynamic_axes={"x": {2: "height", 3: "width"}}, dynamo=False,
        )  # fmt: skip
    with torch.no_grad():
        outputs = network(picture)
    named = {name: [list(out.shape), out.flatten().tolist()] for name, out in zip(("scores", "boxes"), outputs)}
    rounded = {name: [shape, [round(value, 6) for value in values]] for name, (shape, values) in named.items()}
    (folder / "torch_onnx.json").write_text(json.dumps(rounded))


main()
