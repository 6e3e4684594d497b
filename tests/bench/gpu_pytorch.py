"""Times in PyTorch, on a card, what the GPU suite times, one JSON object a line: `name` and median `seconds`.

The names are the suite's own. Blocks are written out plainly, in bf16, with PyTorch's attention.
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F

HEADS, HEAD = 24, 128
WIDTH = HEADS * HEAD
TEXT = 610
TOKENS = (718, 9_000, 72_000)


def median(run):
    run()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def told(name, run):
    with torch.inference_mode():
        print(json.dumps({"name": name, "seconds": median(run)}), flush=True)


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / 2


def linear(out, inp):
    return random(out, inp) / inp**0.5, random(out)


def modulated(x, shift, scale):
    return (F.layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + scale) + shift).to(x.dtype)


def turned(x, cos, sin):
    pairs = x.float().unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
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

    def __init__(self):
        self.modulation, self.qkv = linear(6 * WIDTH, WIDTH), linear(3 * WIDTH, WIDTH)
        self.proj, self.up, self.down = linear(WIDTH, WIDTH), linear(4 * WIDTH, WIDTH), linear(WIDTH, 4 * WIDTH)
        self.norms = random(2, HEAD)

    def before(self, x, m, angles):
        return heads(F.linear(modulated(x, m[0], m[1]), *self.qkv), self.norms, angles)

    def after(self, x, seen, m):
        x = x + m[2] * F.linear(seen, *self.proj)
        hidden = F.gelu(F.linear(modulated(x, m[3], m[4]), *self.up), approximate="tanh")
        return x + m[5] * F.linear(hidden, *self.down)


def angles_of(tokens):
    angles = torch.randn(tokens, HEAD // 2, device="cuda")
    return angles.cos(), angles.sin()


def double(tokens):
    image, text, vec = random(tokens - TEXT, WIDTH), random(TEXT, WIDTH), random(1, WIDTH)
    streams, angles = (Stream(), Stream()), angles_of(tokens - TEXT)

    def run():
        of = [F.linear(F.silu(vec), *s.modulation)[0].chunk(6) for s in streams]
        i, t = streams[0].before(image, of[0], angles), streams[1].before(text, of[1], None)
        seen = attend(*(torch.cat(pair, 1) for pair in zip(i, t)))
        return streams[0].after(image, seen[: tokens - TEXT], of[0]), streams[1].after(text, seen[tokens - TEXT :], of[1])

    return run


def single(tokens):
    x, vec, angles = random(tokens, WIDTH), random(1, WIDTH), angles_of(tokens)
    modulation, norms = linear(3 * WIDTH, WIDTH), random(2, HEAD)
    first, last = linear(7 * WIDTH, WIDTH), linear(WIDTH, 5 * WIDTH)

    def run():
        shift, scale, gate = F.linear(F.silu(vec), *modulation)[0].chunk(3)
        qkv, mlp = F.linear(modulated(x, shift, scale), *first).split((3 * WIDTH, 4 * WIDTH), -1)
        seen = attend(*heads(qkv, norms, angles))
        return x + gate * F.linear(torch.cat((seen, F.gelu(mlp, approximate="tanh")), -1), *last)

    return run


def main():
    torch.manual_seed(0)
    for tokens in TOKENS:
        q, k, v = (random(1, HEADS, tokens, HEAD) for _ in range(3))
        told(f"attention, {tokens} tokens, bf16", lambda: F.scaled_dot_product_attention(q, k, v))
        told(f"double block, {tokens} tokens, bf16", double(tokens))
        told(f"single block, {tokens} tokens, bf16", single(tokens))


if __name__ == "__main__":
    main()
