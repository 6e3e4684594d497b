"""What the GPU suite times, in PyTorch: one JSON object a line with `name`, median `seconds` and a `sample` of the result.

    gpu_pytorch.py [--device cuda] [--tokens 718,9000,72000]

The names are the suite's own, and so are inputs and weights, value by value: the suite holds its results against the
samples. Blocks are written out plainly, in bf16, with PyTorch's attention. What does not fit is left out.
"""

import argparse
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F

HEADS, HEAD = 24, 128
WIDTH = HEADS * HEAD
TEXT = 610
# Channels of a head that turn with frame, row and column.
ROPE = (16, 56, 56)
# Rows of a sample, and which columns are in it.
ROWS, COLUMNS = 8, 8
BITS = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
DEVICE = "cuda"


def signed(x):
    """64 bits as PyTorch has them, whose products wrap like those of numbers without a sign."""
    return x - (1 << 64) if x >> 63 else x


def shifted(x, by):
    return (x >> by) & ((1 << (64 - by)) - 1)


def mixed(x):
    """SplitMix64's finaliser, of a number or of a tensor of them."""
    wrapped = (lambda n: n) if torch.is_tensor(x) else (lambda n: n & BITS)
    constant = signed if torch.is_tensor(x) else (lambda n: n)
    x = wrapped((x ^ shifted(x, 30)) * constant(0xBF58476D1CE4E5B9))
    x = wrapped((x ^ shifted(x, 27)) * constant(0x94D049BB133111EB))
    return x ^ shifted(x, 31)


def values(shape, seed, name="", mean=0.0, deviation=3**-0.5):
    """Uniform values that depend on seed, name and position alone, as the suite makes them."""
    text = 0xCBF29CE484222325
    for byte in name.encode():
        text = ((text ^ byte) * 0x100000001B3) & BITS
    source = mixed(mixed((seed + GOLDEN) & BITS) ^ text)
    out = torch.empty(math.prod(shape), device=DEVICE, dtype=torch.bfloat16)
    for start in range(0, len(out), 1 << 24):
        index = torch.arange(start + 1, min(start + (1 << 24), len(out)) + 1, device=DEVICE)
        bits = shifted(mixed(index * signed(GOLDEN) + signed(source)), 40)
        uniform = bits.float() / (1 << 23) - 1.0
        out[start : start + len(index)] = mean + uniform * (deviation * 3**0.5)
    return out.reshape(shape)


def median(run):
    run()
    wait()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def told(name, make):
    """`make` gives a function whose result is `(tokens, width)`."""
    try:
        with torch.inference_mode():
            run = make()
            out = run()
            rows = [i * (len(out) - 1) // (ROWS - 1) for i in range(ROWS)]
            sample = out[rows][:, ::COLUMNS].float().flatten().tolist()
            print(json.dumps({"name": name, "seconds": median(run), "sample": sample}), flush=True)
    except torch.cuda.OutOfMemoryError:
        print(f"{name}: out of memory", file=sys.stderr)


def layer(name, out, inp, gain=1.0):
    return values((out, inp), 1, f"{name}.weight", 0.0, gain / inp**0.5), values((out,), 1, f"{name}.bias", 0.0, 0.02)


def scale(name):
    return values((HEAD,), 1, f"{name}.weight", 1.0, 0.02)


def modulated(x, shift, scale):
    return (F.layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + scale) + shift).to(x.dtype)


def turned(x, cos, sin):
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def rms(x, weight):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def heads(qkv, norms, angles):
    q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD)).permute(1, 2, 0, 3).unbind(0)
    q, k = rms(q, norms[0]), rms(k, norms[1])
    if angles is not None:
        q, k = turned(q, *angles), turned(k, *angles)
    return q, k, v


def attend(q, k, v):
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)


class Stream:
    """Picture or text of a double block."""

    def __init__(self, name):
        name = f"double_blocks.0.{name}"
        self.modulation, self.qkv = layer(f"{name}_mod.linear", 6 * WIDTH, WIDTH, 0.3), layer(f"{name}_attn_qkv", 3 * WIDTH, WIDTH)
        self.proj = layer(f"{name}_attn_proj", WIDTH, WIDTH)
        self.up, self.down = layer(f"{name}_mlp.fc1", 4 * WIDTH, WIDTH), layer(f"{name}_mlp.fc2", WIDTH, 4 * WIDTH)
        self.norms = scale(f"{name}_attn_q_norm"), scale(f"{name}_attn_k_norm")

    def before(self, x, m, angles):
        return heads(F.linear(modulated(x, m[0], m[1]), *self.qkv), self.norms, angles)

    def after(self, x, seen, m):
        x = x + m[2] * F.linear(seen, *self.proj)
        hidden = F.gelu(F.linear(modulated(x, m[3], m[4]), *self.up), approximate="tanh")
        return x + m[5] * F.linear(hidden, *self.down)


def angles_of(images, still):
    """Pictures are one row of tokens of the frame -1; `still` tokens behind them do not turn."""
    parts = []
    for positions, width in zip((torch.tensor([-1.0]), torch.tensor([0.0]), torch.arange(images)), ROPE):
        angles = positions.double()[:, None] * 256.0 ** (-2.0 * torch.arange(width // 2).double() / width)
        parts.append(angles.expand(images, -1))
    angles = F.pad(torch.cat(parts, 1), (0, 0, 0, still)).to(DEVICE)
    return angles.cos().float(), angles.sin().float()


def inputs(tokens):
    return values((tokens - TEXT, WIDTH), 1), values((TEXT, WIDTH), 2), values((1, WIDTH), 3)


def double(tokens):
    image, text, vec = inputs(tokens)
    streams, angles = (Stream("img"), Stream("txt")), angles_of(tokens - TEXT, 0)

    def run():
        of = [F.linear(F.silu(vec), *s.modulation)[0].chunk(6) for s in streams]
        i, t = streams[0].before(image, of[0], angles), streams[1].before(text, of[1], None)
        seen = attend(*(torch.cat(pair, 1) for pair in zip(i, t)))
        # The text's result too, though nobody looks at it.
        streams[1].after(text, seen[tokens - TEXT :], of[1])
        return streams[0].after(image, seen[: tokens - TEXT], of[0])

    return run


def single(tokens):
    image, text, vec = inputs(tokens)
    x, angles, name = torch.cat((image, text)), angles_of(tokens - TEXT, TEXT), "single_blocks.0"
    modulation, norms = layer(f"{name}.modulation.linear", 3 * WIDTH, WIDTH, 0.3), (scale(f"{name}.q_norm"), scale(f"{name}.k_norm"))
    first, last = layer(f"{name}.linear1", 7 * WIDTH, WIDTH), layer(f"{name}.linear2", WIDTH, 5 * WIDTH)

    def run():
        shift, factor, gate = F.linear(F.silu(vec), *modulation)[0].chunk(3)
        qkv, mlp = F.linear(modulated(x, shift, factor), *first).split((3 * WIDTH, 4 * WIDTH), -1)
        seen = attend(*heads(qkv, norms, angles))
        return x + gate * F.linear(torch.cat((seen, F.gelu(mlp, approximate="tanh")), -1), *last)

    return run


def attention(tokens):
    q, k, v = (values((HEADS, tokens, HEAD), seed) for seed in (1, 2, 3))
    return lambda: attend(q, k, v)


def main():
    global DEVICE
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="718,9000,72000")
    arguments = parser.parse_args()
    DEVICE = arguments.device
    for tokens in map(int, arguments.tokens.split(",")):
        told(f"attention, {tokens} tokens, bf16", lambda: attention(tokens))
        told(f"double block, {tokens} tokens, bf16", lambda: double(tokens))
        told(f"single block, {tokens} tokens, bf16", lambda: single(tokens))


if __name__ == "__main__":
    main()
