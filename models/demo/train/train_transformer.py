"""Encodes the clips, then trains the transformer on them.

    python train_transformer.py encode OUT --clips CLIPS --count 450
    python train_transformer.py train OUT --minutes 40
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from networks import ClipText, Llava, Transformer, Whisper, log_mel, windows
from optim import Optimiser, Run
from text import CLIP, LLAVA, NEGATIVE, PREFIX, Texts, pixels
from train_encoders import WHISPER
from vae import DEMO, Vae

TRANSFORMER = {
    "hidden_size": 160,
    "num_heads": 4,
    "rope_dim_list": [8, 16, 16],
    "rope_theta": 256.0,
    "in_channels": 16,
    "depth_double_blocks": 2,
    "depth_single_blocks": 4,
    "text_states_dim": LLAVA["width"],
    "text_states_dim_2": CLIP["width"],
    "audio_double_blocks": [0, 1],
    "audio_values": 10 * 5 * WHISPER["width"],
    "audio_inner": 128,
    "adapter": 96,
}
LATENTS = 30
"""Latent frames of a batch."""
SHIFT = 3.0
"""Bends the times of training towards noise, as the product's grid does."""
MOUTH = 8.0
"""How much more a latent of the mouth counts."""


def vae(out: Path) -> Vae:
    network = Vae(DEMO)
    network.inflate()
    for name in ("vae-decoder.pt", "vae-clips.pt"):
        if (out / name).exists():
            network.load_state_dict(torch.load(out / name, weights_only=False)["network"])
            return network
    raise SystemExit(f"{out} holds no trained VAE")


class Encoders:
    """The trained text networks and Whisper's, frozen."""

    def __init__(self, out: Path):
        self.texts = Texts(out)
        self.llava = Llava(LLAVA | {"image_token": self.texts.id("<image>")})
        self.clip, self.whisper = ClipText(**CLIP), Whisper(**WHISPER)
        state = torch.load(out / "text.pt", weights_only=False)
        self.llava.load_state_dict(state["llava"])
        self.clip.load_state_dict(state["clip"])
        self.whisper.load_state_dict(torch.load(out / "audio.pt", weights_only=False)["network"])

    def prompt(self, prompt: str, picture: np.ndarray) -> dict[str, Tensor]:
        """States of a prompt: the rows that are valid, those at the mask's end, and the pooled one."""
        ids, mask = self.texts.llava_tokens(prompt)
        states, rows = self.llava(ids, mask, pixels(picture), self.texts.crop)
        valid, tail = int(rows.sum()), LLAVA["grid"] ** 2 - 1
        ids, mask = self.texts.clip_tokens(prompt)
        return {"states": states[:valid].clone(), "tail": states[-tail:].clone(), "pooled": self.clip(ids[None], mask[None])[0]}

    def speech(self, samples: np.ndarray) -> Tensor:
        """Features as the product makes them: (S, states, width), 50 a second, as far as the sound goes."""
        samples = torch.from_numpy(samples.astype(np.float32))[: 30 * data.RATE]
        return self.whisper(log_mel(samples)[None])[0, : -(-len(samples) // 320)]


@torch.no_grad()
def encode(out: Path, clips: Path, count: int, long: int, frames: int):
    network, encoders = vae(out), Encoders(out)
    index = {e["seed"]: e for e in json.loads((clips / "index.json").read_text())}
    seeds = sorted(index)
    short = [s for s in seeds if index[s]["frames"] < 129][:count]
    chosen = [(s, frames) for s in short] + [(s, 129) for s in seeds if index[s]["frames"] == 129][:long]
    np.random.default_rng(2).shuffle(chosen)
    folder = out / "latents"
    folder.mkdir(exist_ok=True)
    for i, (seed, length) in enumerate(chosen):
        path = folder / f"{seed}.pt"
        if path.exists():
            continue
        clip = np.load(clips / f"clip-{seed:05}.npz")
        x = torch.from_numpy(np.concatenate([clip["frames"][:length]])).float()[None] / 127.5 - 1
        reference = torch.from_numpy(clip["reference"]).float()[None, None] / 127.5 - 1
        latents, still = network.encode(x)[0][0], network.encode(reference)[0][0]
        samples = clip["samples"].astype(np.float32)
        torch.save({
            "latents": latents.permute(3, 0, 1, 2).half(), "reference": still.permute(3, 0, 1, 2).half(),
            "speech": encoders.speech(samples).half(), "box": torch.from_numpy(clip["box"]),
            "prompt": encoders.prompt(PREFIX + index[seed]["prompt"], clip["reference"]),
            "negative": encoders.prompt(NEGATIVE, clip["reference"]),
        }, path)
        if i % 20 == 0:
            print(i, "of", len(chosen), flush=True)


def joined(prompts: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Text states, mask and pooled states of a batch. Rows that nothing sees are left out."""
    longest = max(len(p["states"]) for p in prompts)
    tail = len(prompts[0]["tail"])
    states = torch.zeros(len(prompts), longest + tail, prompts[0]["states"].shape[1])
    mask = torch.zeros(len(prompts), longest + tail, dtype=torch.long)
    for i, p in enumerate(prompts):
        valid = len(p["states"])
        states[i, :valid], states[i, longest:] = p["states"], p["tail"]
        # As many ones as rows are valid, but the last ones stand at the end.
        mask[i, : valid - tail], mask[i, longest:] = 1, 1
    return states, mask, torch.stack([p["pooled"] for p in prompts])


class Clips:
    """Encoded clips in memory, latents scaled."""

    def __init__(self, out: Path):
        files = sorted((out / "latents").glob("*.pt"))
        self.clips = [torch.load(path, weights_only=False) for path in files]
        scale_path = out / "scale.json"
        if not scale_path.exists():
            std = torch.stack([c["latents"].float().std() for c in self.clips[:200]]).mean().item()
            scale_path.write_text(json.dumps({"scaling_factor": round(1 / std, 6)}))
        self.scale = json.loads(scale_path.read_text())["scaling_factor"]
        self.long = [c for c in self.clips if c["latents"].shape[1] == 33]
        # The first ones are held out, to look at the loss.
        brief = [c for c in self.clips if c["latents"].shape[1] < 33]
        self.held, self.clips = brief[:8], brief[8:] + self.long
        self.usual = brief[0]["latents"].shape[1]

    def batch(self, rng, clips: list, count: int, frames: int, drop: bool = True):
        clips = [c for c in clips if c["latents"].shape[1] >= frames]
        chosen = [clips[rng.integers(len(clips))] for _ in range(count)]
        x, ref, audio, prompts, masks, weights = [], [], [], [], [], []
        for clip in chosen:
            latents = clip["latents"].float() * self.scale
            total = latents.shape[1]
            start = 0 if rng.uniform() < 0.7 or not drop else int(rng.integers(max(1, total - frames + 1)))
            latents = latents[:, start : start + frames]
            speech = windows(clip["speech"].float(), torch.arange(4 * start, 4 * start + 4 * frames - 3))
            kind = rng.uniform() if drop else 1.0
            if kind < 0.15:
                speech = torch.zeros_like(speech)
            prompts.append(clip["negative"] if kind < 0.08 else clip["prompt"])
            masks.append(torch.full((1, 1, *latents.shape[2:]), 0.6 if drop and rng.uniform() < 0.2 else 1.0))
            left, top, right, bottom = (int(v) for v in clip["box"])
            weight = torch.ones(latents.shape[2:])
            weight[top // 8 : -(-bottom // 8), left // 8 : -(-right // 8)] += MOUTH
            x.append(latents)
            ref.append(clip["reference"].float().expand(-1, frames, -1, -1) * self.scale)
            audio.append(speech)
            weights.append(weight / weight.mean())
        weight = torch.stack(weights)[:, None, None]
        return torch.stack(x), torch.stack(ref), torch.stack(audio), joined(prompts), torch.stack(masks), weight


def loss_of(network, batch, noise, u) -> Tensor:
    x, ref, audio, (text, text_mask, pooled), face, weight = batch
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    s = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - s) * x + s * noise
    v = network(noisy, sigma * 1000, text, text_mask, pooled, ref, audio, face)
    return ((v - (noise - x)).square() * weight).mean()


@torch.no_grad()
def held_out(network, clips: Clips) -> dict[str, float]:
    """The loss with the right speech, with none and with another's."""
    rng, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
    batch = clips.batch(rng, clips.held, 8, min(clips.usual, 9), drop=False)
    noise = torch.randn(batch[0].shape, generator=generator)
    u = torch.linspace(0.2, 0.9, 8)
    swap = lambda audio: (*batch[:2], audio, *batch[3:])  # noqa: E731
    return {
        "right": loss_of(network, batch, noise, u).item(),
        "silent": loss_of(network, swap(torch.zeros_like(batch[2])), noise, u).item(),
        "wrong": loss_of(network, swap(batch[2].roll(1, 0)), noise, u).item(),
    }


def train(out: Path, minutes: float, rate: float):
    torch.manual_seed(1)
    network = Transformer(TRANSFORMER)
    network.start()
    clips = Clips(out)
    run = Run(out, "transformer", minutes, ["loss", "right", "silent", "wrong"])
    optimiser = Optimiser(list(network.parameters()), rate)
    if state := run.resume():
        network.load_state_dict(state["network"])
        optimiser.restore(state["optimiser"])
    # What is exported: an average over the last steps, which is usable before the run is over.
    average = copy.deepcopy(network).requires_grad_(False)
    if state:
        average.load_state_dict(state["average"])
    rng = np.random.default_rng(10 + run.steps)
    mean_loss, last, since = 0.0, run.elapsed, run.steps
    print(f"{len(clips.clips)} clips, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters", flush=True)
    while run.done < 1:
        if clips.long and rng.uniform() < 0.12:
            frames = int(rng.choice([9, 17, 33]))
            batch = clips.batch(rng, clips.long, max(1, LATENTS // frames), frames)
        else:
            frames = int(rng.integers(3, min(clips.usual, 9) + 1))
            batch = clips.batch(rng, clips.clips, LATENTS // frames, frames)
        count = len(batch[0])
        u = (torch.arange(count) + torch.rand(count)) / count
        loss = loss_of(network, batch, torch.randn_like(batch[0]), u)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step(run.rate())
        run.steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()),
                                 max(0.01, 9 / (10 + run.steps)))
        mean_loss += (loss.item() - mean_loss) * max(0.02, 1 / (run.steps - since))
        if run.elapsed - last > 40:
            last = run.elapsed
            run.log(loss=mean_loss, **held_out(average, clips))
        run.save(60, network=network.state_dict(), average=average.state_dict(), optimiser=optimiser.state())
    run.log(loss=mean_loss, **held_out(average, clips))
    run.save(network=network.state_dict(), average=average.state_dict(), optimiser=optimiser.state())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["encode", "train"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=Path, help="folder of data.py")
    parser.add_argument("--count", type=int, default=450, help="clips to encode")
    parser.add_argument("--frames", type=int, default=33, help="of each of them")
    parser.add_argument("--long", type=int, default=16, help="clips of 129 frames to encode besides")
    parser.add_argument("--minutes", type=float, default=40, help="of the processor: two busy cores give two a minute")
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    if arguments.part == "encode":
        encode(arguments.out, arguments.clips, arguments.count, arguments.long, arguments.frames)
    else:
        train(arguments.out, arguments.minutes, arguments.rate)


if __name__ == "__main__":
    main()
