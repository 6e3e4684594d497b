"""Times our networks against PyTorch, side by side: f32, two threads, full width, random weights.

    pip install torch
    cargo build --release -p e2e --bin bench
    python tests/bench/pytorch.py [--threads 2] [--only NAME] [--bench target/release/bench]

Every measurement is a process of its own; ours and PyTorch's take turns, three rounds, and the table has the median
of the rounds' medians. `working` is the most memory above weights and inputs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HIDDEN, HEADS, TEXT = 3072, 24, 610

ROWS = {
    "double-718": ["block", "--kind", "double", "--tokens", "718"],
    "double-2786": ["block", "--kind", "double", "--tokens", "2786"],
    "single-718": ["block", "--kind", "single", "--tokens", "718"],
    "single-2786": ["block", "--kind", "single", "--tokens", "2786"],
    "whisper": ["whisper"],
    "vae-decode": ["vae-decode", "--frames", "17", "--side", "16", "--runs", "0"],
}


def memory(field):
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(run, runs):
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before, seconds = memory("VmRSS:"), []
    for i in range(runs + 1):
        begin = time.perf_counter()
        out = run()
        if i > 0 or runs == 0:
            seconds.append(time.perf_counter() - begin)
        assert bool(out.isfinite().all())
    return {
        "seconds": statistics.median(seconds),
        "working_bytes": max(0, memory("VmHWM:") - before),
    }


def attend(torch, q, k, v):
    out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])
    return out[0].transpose(0, 1).reshape(q.shape[1], HIDDEN)


class Heads:
    """Splits q, k, v, normalises q and k over a head and turns adjacent channels."""

    def __init__(self, torch):
        self.torch = torch
        self.q, self.k = torch.ones(128), torch.ones(128)

    def turn(self, x, table):
        if table is None:
            return x
        cos, sin = table
        a, b = x[..., 0::2], x[..., 1::2]
        return self.torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    def __call__(self, qkv, table):
        norm = self.torch.nn.functional.rms_norm
        q, k, v = qkv.view(-1, 3, HEADS, 128).permute(1, 2, 0, 3)
        return self.turn(norm(q, (128,), self.q, 1e-6), table), self.turn(norm(k, (128,), self.k, 1e-6), table), v


def table(torch, turned, still):
    angles = torch.rand(turned, 64)
    cos, sin = torch.ones(turned + still, 64), torch.zeros(turned + still, 64)
    cos[:turned], sin[:turned] = angles.cos(), angles.sin()
    return cos, sin


def linear(torch, inp, out):
    layer = torch.nn.Linear(inp, out)
    layer.requires_grad_(False)
    return layer


def modulated(torch, x, shift, scale):
    return torch.nn.functional.layer_norm(x, (HIDDEN,), eps=1e-6) * (1 + scale) + shift


def double_block(torch, tokens):
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    streams = []
    for _ in range(2):
        streams.append({
            "mod": linear(torch, HIDDEN, 6 * HIDDEN), "qkv": linear(torch, HIDDEN, 3 * HIDDEN), "heads": Heads(torch),
            "proj": linear(torch, HIDDEN, HIDDEN),
            "fc1": linear(torch, HIDDEN, 4 * HIDDEN), "fc2": linear(torch, 4 * HIDDEN, HIDDEN),
        })
    images = tokens - TEXT
    xs, vec = [torch.rand(images, HIDDEN), torch.rand(TEXT, HIDDEN)], torch.rand(1, HIDDEN)
    tables = [table(torch, images, 0), None]

    def run():
        mods = [s["mod"](silu(vec)).view(6, HIDDEN) for s in streams]
        parts = [s["heads"](s["qkv"](modulated(torch, x, m[0], m[1])), t) for s, x, m, t in zip(streams, xs, mods, tables)]
        q, k, v = (torch.cat(pair, 1) for pair in zip(*parts))
        seen, outs = attend(torch, q, k, v).split([images, TEXT]), []
        for s, x, m, o in zip(streams, xs, mods, seen):
            x = x + m[2] * s["proj"](o)
            x = x + m[5] * s["fc2"](gelu(s["fc1"](modulated(torch, x, m[3], m[4])), approximate="tanh"))
            outs.append(x)
        return outs[0]

    return run


def single_block(torch, tokens):
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    mod, linear1 = linear(torch, HIDDEN, 3 * HIDDEN), linear(torch, HIDDEN, 7 * HIDDEN)
    linear2, heads = linear(torch, 5 * HIDDEN, HIDDEN), Heads(torch)
    x, vec = torch.rand(tokens, HIDDEN), torch.rand(1, HIDDEN)
    turn = table(torch, tokens - TEXT, TEXT)

    def run():
        m = mod(silu(vec)).view(3, HIDDEN)
        qkv, mlp = linear1(modulated(torch, x, m[0], m[1])).split([3 * HIDDEN, 4 * HIDDEN], 1)
        seen = attend(torch, *heads(qkv, turn))
        return x + m[2] * linear2(torch.cat((seen, gelu(mlp, approximate="tanh")), 1))

    return run


def whisper(torch):
    gelu, norm = torch.nn.functional.gelu, torch.nn.functional.layer_norm
    conv1, conv2 = torch.nn.Conv1d(80, 384, 3, padding=1), torch.nn.Conv1d(384, 384, 3, 2, padding=1)
    conv1.requires_grad_(False), conv2.requires_grad_(False)
    layers = [
        [linear(torch, 384, 384) for _ in range(4)] + [linear(torch, 384, 1536), linear(torch, 1536, 384)]
        for _ in range(4)
    ]
    mel, positions, one = torch.rand(1, 80, 3000), torch.rand(1500, 384), torch.ones(384)

    def run():
        x = gelu(conv2(gelu(conv1(mel)))).transpose(1, 2)[0] + positions
        for q, k, v, o, fc1, fc2 in layers:
            y = norm(x, (384,), one, one, 1e-5)
            split = lambda t: t.view(1500, 6, 64).transpose(0, 1)[None]
            seen = torch.nn.functional.scaled_dot_product_attention(split(q(y)), split(k(y)), split(v(y)))
            x = x + o(seen[0].transpose(0, 1).reshape(1500, 384))
            x = x + fc2(gelu(fc1(norm(x, (384,), one, one, 1e-5))))
        return norm(x, (384,), one, one, 1e-5)

    return run


def vae_decode(torch, frames, side):
    f = torch.nn.functional

    def conv(inp, out, k):
        layer = torch.nn.Conv3d(inp, out, k)
        layer.requires_grad_(False)
        return lambda x: layer(f.pad(x, (k // 2, k // 2, k // 2, k // 2, k - 1, 0), mode="replicate") if k > 1 else x)

    def norm(channels, silu):
        one = torch.ones(channels)
        if silu:
            return lambda x: f.silu(f.group_norm(x, 32, one, one, 1e-6), inplace=True)
        return lambda x: f.group_norm(x, 32, one, one, 1e-6)

    def resnet(inp, out):
        n1, c1, n2, c2 = norm(inp, True), conv(inp, out, 3), norm(out, True), conv(out, out, 3)
        shortcut = conv(inp, out, 1) if inp != out else (lambda x: x)
        return lambda x: shortcut(x) + c2(n2(c1(n1(x))))

    def upsample(factors):
        def up(x):
            if factors[0] == 1:
                return f.interpolate(x, scale_factor=factors, mode="nearest")
            first, rest = x.split((1, x.shape[2] - 1), 2)
            first = f.interpolate(first[:, :, 0], scale_factor=factors[1:], mode="nearest")[:, :, None]
            return torch.cat((first, f.interpolate(rest.contiguous(), scale_factor=factors, mode="nearest")), 2)

        return up

    group, q, k, v, o = norm(512, False), *(linear(torch, 512, 512) for _ in range(4))

    def attention(x):
        _, c, t, h, w = x.shape
        y = group(x).flatten(2).transpose(1, 2)
        frame = torch.arange(t).repeat_interleave(h * w)
        mask = frame[None, :] <= frame[:, None]
        seen = f.scaled_dot_product_attention(q(y)[:, None], k(y)[:, None], v(y)[:, None], attn_mask=mask)[:, 0]
        return x + o(seen).transpose(1, 2).view(1, c, t, h, w)

    steps = [conv(16, 16, 1), conv(16, 512, 3), resnet(512, 512), attention, resnet(512, 512)]
    inp = 512
    for i, out in enumerate((512, 512, 256, 128)):
        for _ in range(3):
            steps.append(resnet(inp, out))
            inp = out
        if i < 3:
            steps += [upsample((1 if i == 0 else 2, 2, 2)), conv(out, out, 3)]
    steps += [norm(128, True), conv(128, 3, 3)]
    z = torch.rand(1, 16, frames, side, side)

    def run():
        x = z
        for step in steps:
            x = step(x)
        return x

    return run


def row(name, threads):
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if name.startswith("double-"):
        return measure(double_block(torch, int(name.split("-")[1])), 3)
    if name.startswith("single-"):
        return measure(single_block(torch, int(name.split("-")[1])), 3)
    if name == "whisper":
        return measure(whisper(torch), 3)
    return measure(vae_decode(torch, 17, 16), 0)


def child(command, threads):
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--bench", default="target/release/bench")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(row(given.row, given.threads)))
        return
    print("| network | ours, s | PyTorch, s | ratio | ours, working MB | PyTorch, working MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, arguments in ROWS.items():
        if given.only not in (None, name):
            continue
        rounds = 1 if name == "vae-decode" else given.rounds
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(child([given.bench, *arguments], given.threads))
            theirs.append(child([sys.executable, __file__, "--row", name, "--threads", str(given.threads)], given.threads))
        middle = lambda rows, key: statistics.median(r[key] for r in rows)
        a, b = middle(ours, "seconds"), middle(theirs, "seconds")
        mb = lambda rows: f"{middle(rows, 'working_bytes') / 1e6:.0f}"
        print(f"| {ours[0]['name']} | {a:.3f} | {b:.3f} | {a / b:.2f} | {mb(ours)} | {mb(theirs)} |", flush=True)


if __name__ == "__main__":
    main()
