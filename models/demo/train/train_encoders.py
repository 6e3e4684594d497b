"""Trains the small encoders by themselves: Whisper's on how far a mouth opens, the text networks on what prompts ask
for, the vision tower on what a picture's parts look like.

    python train_encoders.py audio OUT --clips CLIPS --minutes 5
    python train_encoders.py text OUT --minutes 2
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from networks import ClipText, Llava, Whisper, log_mel
from optim import Optimiser, Run
from text import CLIP, COLOURS, LLAVA, NEGATIVE, PREFIX, Texts, pixels

WHISPER = {"width": 64, "inner": 128, "layers": 4, "heads": 4}


def recording(rng, clips: list[np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
    """One utterance or several one after the other, at most 30 s, as spectrum; the mouth at each frame."""
    parts, mouths = [], []
    for _ in range(1 if rng.uniform() < 0.7 else int(rng.integers(2, 7))):
        samples = clips[rng.integers(len(clips))].astype(np.float32)
        samples = samples[: len(samples) // data.SAMPLES_PER_FRAME * data.SAMPLES_PER_FRAME]
        parts.append(samples)
        mouths.append(data.mouth_of(samples, len(samples) // data.SAMPLES_PER_FRAME))
    samples = np.concatenate(parts)[: 30 * data.RATE]
    return log_mel(torch.from_numpy(samples)), np.concatenate(mouths)[: 30 * data.FPS]


def audio(out: Path, folder: Path, minutes: float):
    network = Whisper(**WHISPER)
    heads = nn.ModuleList([nn.Linear(WHISPER["width"], 2) for _ in range(WHISPER["layers"] + 1)])
    run = Run(out, "audio", minutes, ["loss", "correlation"])
    parameters = [p for p in [*network.parameters(), *heads.parameters()]]
    optimiser = Optimiser(parameters, 2e-3)
    if state := run.resume():
        network.load_state_dict(state["network"])
        heads.load_state_dict(state["heads"])
        optimiser.restore(state["optimiser"])
    paths = sorted(folder.glob("clip-*.npz"))
    clips = [np.load(path)["samples"] for path in paths]
    held = clips[:20]
    clips = clips[20:]
    rng = np.random.default_rng(1 + run.steps)
    mean_loss, last, since = 0.0, run.elapsed, run.steps

    def correlation() -> float:
        found = []
        test = np.random.default_rng(5)
        with torch.no_grad():
            for _ in range(8):
                mel, mouth = recording(test, held)
                got = heads[-1](network(mel[None])[0, :, -1])[: 2 * len(mouth) : 2, 0]
                found.append(np.corrcoef(got.numpy(), mouth[:, 0])[0, 1])
        return float(np.median(found))

    while run.done < 1:
        batch = [recording(rng, clips) for _ in range(3)]
        states = network(torch.stack([mel for mel, _ in batch]))
        loss = 0.0
        for i, (_, mouth) in enumerate(batch):
            target = torch.from_numpy(mouth)
            for level, head in enumerate(heads):
                got = head(states[i, : 2 * len(mouth) : 2, level])
                loss = loss + F.mse_loss(got, target) / len(batch) * (1.0 if level == len(heads) - 1 else 0.3)
        loss.backward()
        optimiser.step(run.rate())
        run.steps += 1
        mean_loss += (loss.item() - mean_loss) * max(0.05, 1 / (run.steps - since))
        if run.elapsed - last > 30:
            last = run.elapsed
            run.log(loss=mean_loss, correlation=correlation())
        run.save(60, network=network.state_dict(), heads=heads.state_dict(), optimiser=optimiser.state())
    run.log(loss=mean_loss, correlation=correlation())
    run.save(network=network.state_dict(), heads=heads.state_dict(), optimiser=optimiser.state())


def text(out: Path, minutes: float):
    texts = Texts(out)
    llava, clip = Llava(LLAVA | {"image_token": texts.id("<image>")}), ClipText(**CLIP)
    heads = nn.ModuleDict({"llava": nn.Linear(LLAVA["width"], 10), "clip": nn.Linear(CLIP["width"], 10),
                           "picture": nn.Linear(LLAVA["width"], 3)})
    run = Run(out, "text", minutes, ["loss", "right_llava", "right_clip", "picture_error"])
    optimiser = Optimiser([*llava.parameters(), *clip.parameters(), *heads.parameters()], 2e-3)
    if state := run.resume():
        llava.load_state_dict(state["llava"])
        clip.load_state_dict(state["clip"])
        heads.load_state_dict(state["heads"])
        optimiser.restore(state["optimiser"])
    rng = np.random.default_rng(1 + run.steps)
    means, last, since = np.zeros(4), run.elapsed, run.steps
    side, patch = LLAVA["grid"], LLAVA["patch"]
    while run.done < 1:
        losses, right, ids, masks, wanted, error = 0.0, 0, [], [], [], 0.0
        for _ in range(8):
            prompt, colour = data.prompt_of(rng, 0.7)
            prompt = PREFIX + prompt
            kind = COLOURS.index(colour) + 1 if colour else 0
            if rng.uniform() < 0.06:
                prompt, kind = NEGATIVE, 9
            view = pixels(data.draw(data.Face(int(rng.integers(data.HELD_OUT))), data.Pose()))
            states, mask = llava(*texts.llava_tokens(prompt), view, texts.crop)
            guess = heads["llava"](states[: int(mask.sum())].mean(0))
            losses = losses + F.cross_entropy(guess, torch.tensor(kind)) / 8
            right += int(guess.argmax() == kind) / 8
            seen = heads["picture"](llava.picture(view[None])[0])
            parts = view.unflatten(1, (side, patch)).unflatten(3, (side, patch)).mean((2, 4)).flatten(1).T
            losses = losses + F.mse_loss(seen, parts) / 8
            error += F.mse_loss(seen, parts).item() / 8
            for store, value in zip((ids, masks), texts.clip_tokens(prompt), strict=True):
                store.append(value)
            wanted.append(kind)
        guess = heads["clip"](clip(torch.stack(ids), torch.stack(masks)))
        losses = losses + F.cross_entropy(guess, torch.tensor(wanted))
        losses.backward()
        optimiser.step(run.rate())
        run.steps += 1
        now = np.array([losses.item(), right, (guess.argmax(1) == torch.tensor(wanted)).float().mean().item(), error])
        means += (now - means) * max(0.05, 1 / (run.steps - since))
        if run.elapsed - last > 20 or run.done >= 1:
            last = run.elapsed
            run.log(**dict(zip(run.columns, means, strict=True)))
        run.save(60, llava=llava.state_dict(), clip=clip.state_dict(), heads=heads.state_dict(), optimiser=optimiser.state())
    run.save(llava=llava.state_dict(), clip=clip.state_dict(), heads=heads.state_dict(), optimiser=optimiser.state())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["audio", "text"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=Path, help="folder of data.py")
    parser.add_argument("--minutes", type=float, default=3, help="of the processor: two busy cores give two a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.part == "text" else 2)
    cv2.setNumThreads(1)
    torch.manual_seed(1)
    if arguments.part == "audio":
        audio(arguments.out, arguments.clips, arguments.minutes)
    else:
        text(arguments.out, arguments.minutes)


if __name__ == "__main__":
    main()
