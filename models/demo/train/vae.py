"""The 3-D causal VAE, written for fast training on a CPU. Tensor names are those of the native checkpoint.

Activations are (batch, frames, rows, columns, channels). A 3-D convolution is a 2-D one over frames laid side by side
in the channels; an upsampling convolution is taken before its input grows, as small convolutions of summed taps.
Both are exact. One frame alone sees each filter's taps in time summed, which makes training on pictures cheap.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """x (B, T, H, W, C), weight (O, C, kh, kw), no padding."""
    b, t, h, w, c = x.shape
    y = F.conv2d(x.reshape(b * t, h, w, c).permute(0, 3, 1, 2), weight.contiguous(memory_format=torch.channels_last), bias, stride)
    return y.permute(0, 2, 3, 1).unflatten(0, (b, t))


def _pad_space(x: Tensor) -> Tensor:
    """One replicated row and column on all sides."""
    x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    return torch.cat([x[:, :, :, :1], x, x[:, :, :, -1:]], 3)


def _first_repeated(x: Tensor, times: int) -> Tensor:
    return torch.cat([x[:, :1].expand(-1, times, -1, -1, -1), x], 1)


class CausalConv(nn.Module):
    """Convolution that sees no later frame; borders replicated."""

    def __init__(self, inp: int, out: int, kernel: int = 3, stride=(1, 1), gain: float = 1.0):
        super().__init__()
        self.conv = nn.Module()
        # One tap in time until `inflate`: pictures need no more.
        self.conv.weight = nn.Parameter(torch.randn(out, inp, 1, kernel, kernel) * gain / (kernel * math.sqrt(inp)))
        self.conv.bias = nn.Parameter(torch.zeros(out))
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        if self.kernel == 1:
            return F.linear(x, weight[:, :, 0, 0, 0], bias)
        x = _pad_space(x)
        if x.shape[1] == 1:
            return _conv2d(x, weight.sum(2), bias, self.stride[1])
        step, frames = self.stride[0], x.shape[1]
        x = _first_repeated(x, 2)
        count = (frames - 1) // step + 1
        side_by_side = torch.cat([x[:, k : k + (count - 1) * step + 1 : step] for k in range(3)], -1)
        weight = weight.transpose(1, 2).flatten(1, 2)  # (O, 3C, 3, 3), taps in time outermost
        return _conv2d(side_by_side, weight, bias, self.stride[1])


class Upsample(nn.Module):
    """Nearest growth by 2 in space, and in time where said (the first frame alone stays one), then a convolution."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.conv = CausalConv(width, width)
        self.time = time

    def _space(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (B, T, H+2, W+2, C), weight (O, C, 3, 3) -> (B, T, 2H, 2W, O)."""
        h, w = x.shape[2] - 2, x.shape[3] - 2
        rows = (torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2),
                torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 2))
        parts = []
        for p in range(2):
            taps = rows[p]
            columns = (torch.stack([taps[..., 0], taps[..., 1] + taps[..., 2]], 3),
                       torch.stack([taps[..., 0] + taps[..., 1], taps[..., 2]], 3))
            line = [_conv2d(x[:, :, p : p + h + 1, q : q + w + 1], columns[q], self.conv.conv.bias) for q in range(2)]
            parts.append(torch.stack(line, 4))  # (B, T, H, W, 2, O)
        return torch.stack(parts, 3).flatten(4, 5).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.conv.weight
        x = _pad_space(x)
        if not self.time or x.shape[1] == 1:
            if x.shape[1] == 1:
                return self._space(x, weight.sum(2))
            x = _first_repeated(x, 2)
            x = torch.cat([x[:, k : x.shape[1] - 2 + k] for k in range(3)], -1)
            return self._space(x, weight.transpose(1, 2).flatten(1, 2))
        first = self._space(x[:, :1], weight.sum(2))
        pairs = torch.cat([x[:, :-1], x[:, 1:]], -1)
        odd = self._space(pairs, torch.cat([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 1))
        even = self._space(pairs, torch.cat([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 1))
        return torch.cat([first, torch.stack([odd, even], 2).flatten(1, 2)], 1)


class GroupNorm(nn.Module):
    """Statistics over a group's channels and all frames and positions, epsilon 1e-6."""

    def __init__(self, width: int, groups: int, silu: bool = True):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.groups, self.silu = groups, silu

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[0], x.shape[-1]
        flat = x.reshape(b, -1, c)
        mean_c = flat.mean(1)
        square_c = torch.linalg.vector_norm(flat, dim=1).square() / flat.shape[1]
        mean = mean_c.view(b, self.groups, -1).mean(2, keepdim=True)
        var = square_c.view(b, self.groups, -1).mean(2, keepdim=True) - mean.square()
        inverse = (var.clamp_min(0) + 1e-6).rsqrt().expand(b, self.groups, c // self.groups)
        scale = inverse.reshape(b, c) * self.weight
        shift = self.bias - (mean * inverse).reshape(b, c) * self.weight
        y = torch.addcmul(shift[:, None], flat, scale[:, None]).view(x.shape)
        return F.silu(y) if self.silu else y


class Resnet(nn.Module):
    def __init__(self, inp: int, out: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(inp, groups), GroupNorm(out, groups)
        self.conv1, self.conv2 = CausalConv(inp, out, gain=1.4), CausalConv(out, out, gain=0.2)
        if inp != out:
            self.conv_shortcut = CausalConv(inp, out, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Attention(nn.Module):
    """One head over all positions of all frames."""

    def __init__(self, width: int, groups: int, causal: bool):
        super().__init__()
        self.group_norm = GroupNorm(width, groups, silu=False)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        tokens = self.group_norm(x).view(b, 1, t * h * w, c)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        mask = None
        if self.causal and t > 1:
            frame = torch.arange(t).repeat_interleave(h * w)
            mask = frame[:, None] >= frame[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.to_out[0](y).view(x.shape)


class Mid(nn.Module):
    def __init__(self, width: int, groups: int, causal: bool):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(width, width, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(width, groups, causal)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        channels, layers, groups = config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"]
        self.conv_in = CausalConv(3, channels[0])
        self.down_blocks = nn.ModuleList()
        width = channels[0]
        for i, out in enumerate(channels):
            block = nn.Module()
            block.resnets = nn.ModuleList([Resnet(width if j == 0 else out, out, groups) for j in range(layers)])
            if i < 3:
                block.downsamplers = nn.ModuleList([nn.Module()])
                block.downsamplers[0].conv = CausalConv(out, out, stride=(1 if i == 0 else 2, 2))
            self.down_blocks.append(block)
            width = out
        self.mid_block = Mid(width, groups, config["mid_block_causal_attn"])
        self.conv_norm_out = GroupNorm(width, groups)
        self.conv_out = CausalConv(width, 2 * config["latent_channels"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0].conv(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        channels, layers, groups = config["block_out_channels"][::-1], config["layers_per_block"] + 1, config["norm_num_groups"]
        width = channels[0]
        self.conv_in = CausalConv(config["latent_channels"], width)
        self.mid_block = Mid(width, groups, config["mid_block_causal_attn"])
        self.up_blocks = nn.ModuleList()
        for i, out in enumerate(channels):
            block = nn.Module()
            block.resnets = nn.ModuleList([Resnet(width if j == 0 else out, out, groups) for j in range(layers)])
            if i < 3:
                block.upsamplers = nn.ModuleList([Upsample(out, time=i > 0)])
            self.up_blocks.append(block)
            width = out
        self.conv_norm_out = GroupNorm(width, groups)
        self.conv_out = CausalConv(width, 3, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        return self.conv_out(self.conv_norm_out(x))


class Vae(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        latent = config["latent_channels"]
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = CausalConv(2 * latent, 2 * latent, kernel=1)
        self.post_quant_conv = CausalConv(latent, latent, kernel=1)
        # The 1x1x1 convolutions at the bottleneck have no `.conv` in their names.
        for module in (self.quant_conv, self.post_quant_conv):
            module.weight, module.bias = module.conv.weight, module.conv.bias
            del module.conv

            def forward(x, m=module):
                return F.linear(x, m.weight[:, :, 0, 0, 0], m.bias)

            module.forward = forward

    def inflate(self):
        """Spreads filters for pictures over three taps in time, most of it on the frame itself."""
        for module in self.modules():
            if isinstance(module, CausalConv) and module.kernel == 3 and module.conv.weight.shape[2] == 1:
                spread = torch.tensor([0.1, 0.2, 0.7]).view(1, 1, 3, 1, 1)
                module.conv.weight = nn.Parameter(module.conv.weight.detach() * spread)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, H, W, 3) in -1..1 -> mean and logvar (B, T, h, w, C)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, -1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """(B, T, h, w, C) -> (B, 4T-3, 8h, 8w, 3)."""
        return self.decoder(self.post_quant_conv(z))


DEMO = {
    "block_out_channels": [16, 32, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 256,
    "sample_tsize": 64,
    "scaling_factor": 0.476986,
    "time_compression_ratio": 4,
    "spatial_compression_ratio": 8,
    "mid_block_add_attention": True,
    "mid_block_causal_attn": True,
}
