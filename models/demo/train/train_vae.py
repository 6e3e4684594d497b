"""Trains the VAE: first on pictures, then on clips. Each part goes on from where it was cut off.

    python train_vae.py images OUT --minutes 25
    python train_vae.py clips OUT --minutes 25
    python train_vae.py decoder OUT --minutes 10    # the decoder alone, with the encoder as it is
"""

import argparse
import threading
import queue
from pathlib import Path

import cv2
import numpy as np
import torch

import data
from optim import Optimiser, Run
from vae import DEMO, Vae

MOUTH = 8.0
"""How much more a pixel of the mouth's box counts."""
AREAS = 2.0
"""Weight of the mean colours of 8x8 areas, and of their hues."""
KL = 2e-4


def picture_batch(rng, count: int) -> tuple[np.ndarray, list]:
    """Faces in any state, each one frame: (count, 1, 128, 128, 3) and the mouths' boxes."""
    faces = [data.Face(int(rng.integers(data.HELD_OUT))) for _ in range(count)]
    return np.stack([still(rng, face) for face in faces])[:, None], [face.mouth_box for face in faces]


def still(rng, face: data.Face) -> np.ndarray:
    opening = rng.uniform() if rng.uniform() < 0.75 else 0.0
    eyes = rng.uniform() if rng.uniform() < 0.2 else 1.0
    pose = data.Pose(rng.uniform(-1.2, 1.2), rng.uniform(-0.8, 0.8), eyes, opening, rng.uniform(-1, 1) * (opening > 0))
    colours = list(data.COLOURS.values())
    background = colours[rng.integers(len(colours))] if rng.uniform() < 0.25 else None
    return data.draw(face, pose, background=background)


def clip_batch(rng, mouths: list[np.ndarray], frames: int) -> tuple[np.ndarray, list]:
    """A new face speaking as in one of the clips: (1, frames, 128, 128, 3)."""
    face = data.Face(int(rng.integers(data.HELD_OUT)))
    mouth = mouths[rng.integers(len(mouths))]
    start = rng.integers(len(mouth) - frames + 1)
    colours = list(data.COLOURS.values())
    background = colours[rng.integers(len(colours))] if rng.uniform() < 0.25 else None
    poses = data.poses(int(rng.integers(1 << 40)), mouth)[start : start + frames]
    return np.stack([data.draw(face, pose, background=background) for pose in poses])[None], [face.mouth_box]


CROP = 64
"""Side of the crops: a quarter of the work of a whole picture for all that moves most."""


def mouth_batch(rng, mouths: list[np.ndarray], count: int, frames: int) -> tuple[np.ndarray, list]:
    """Mouths of several clips, on the latents' grid: (count, frames, CROP, CROP, 3), and their boxes in these crops."""
    crops, boxes = [], []
    for _ in range(count):
        pictures, [(left, top, right, bottom)] = clip_batch(rng, mouths, frames)
        x, y = (int(np.clip((a + b) // 2 - CROP // 2 + rng.integers(-8, 9), 0, data.SIDE - CROP)) // 8 * 8
                for a, b in ((left, right), (top, bottom)))
        crops.append(pictures[0, :, y : y + CROP, x : x + CROP])
        inside = np.clip((left - x, top - y, right - x, bottom - y), 0, CROP)
        boxes.append(tuple(int(v) for v in inside))
    return np.stack(crops), boxes


def ahead(make, depth: int = 6):
    """Batches made in a thread, a few ahead."""
    ready = queue.Queue(depth)

    def work():
        while True:
            ready.put(make())

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()


def tensors(batch: tuple[np.ndarray, list]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels -1..1 and their weights (B, 1, H, W, 1) of mean 1."""
    pictures, boxes = batch
    x = torch.from_numpy(pictures).float() / 127.5 - 1
    weight = torch.ones(len(pictures), 1, *pictures.shape[2:4], 1)
    for i, (left, top, right, bottom) in enumerate(boxes):
        weight[i, :, top:bottom, left:right] += MOUTH
    return x, weight / weight.mean()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * torch.log10(((a.clamp(-1, 1) - b) / 2).square().mean()).item()


@torch.no_grad()
def held_out(network: Vae, batches: list) -> tuple[float, float]:
    """PSNR of reconstructions from the means: whole pictures, mouths."""
    whole, mouth = [], []
    for x, _, boxes in batches:
        y = network.decode(network.encode(x)[0])
        whole += [psnr(a, b) for a, b in zip(y, x, strict=True)]
        for (left, top, right, bottom), a, b in zip(boxes, y, x, strict=True):
            mouth.append(psnr(a[:, top:bottom, left:right], b[:, top:bottom, left:right]))
    return float(np.mean(whole)), float(np.mean(mouth))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["images", "clips", "decoder"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=25, help="of the processor: two busy cores give two a minute")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clips", type=Path, help="folder of data.py, for how mouths move")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    cv2.setNumThreads(1)
    torch.manual_seed(1)
    rng = np.random.default_rng(1)

    network = Vae(DEMO)
    moving = arguments.part != "images"
    if moving:
        network.inflate()
    run = Run(arguments.out, f"vae-{arguments.part}", arguments.minutes, ["loss", "whole_psnr", "mouth_psnr", "latent_std"])
    state = run.resume()
    if state:
        network.load_state_dict(state["network"])
        rng = np.random.default_rng(run.steps)
    elif moving:
        before = arguments.out / ("vae-images.pt" if arguments.part == "clips" else "vae-clips.pt")
        network = Vae(DEMO)
        if arguments.part == "decoder":
            network.inflate()
        network.load_state_dict(torch.load(before, weights_only=False)["network"])
        network.inflate()
    trained = list(network.parameters())
    if arguments.part == "decoder":
        trained = [p for n, p in network.named_parameters() if n.startswith(("decoder", "post_quant"))]
        for p in network.parameters():
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
    optimiser = Optimiser(trained, arguments.rate)
    if state:
        optimiser.restore(state["optimiser"])

    mouths = []
    if moving:
        mouths = [np.load(path)["mouth"] for path in sorted(arguments.clips.glob("clip-*.npz"))]
    test_rng = np.random.default_rng(99)
    held = []
    for i in range(2 if moving else 4):
        if moving:
            face = data.Face(data.HELD_OUT + i)
            mouth = mouths[i][:9]
            frames = np.stack([data.draw(face, p) for p in data.poses(i, mouth)])[None]
            batch = (frames, [face.mouth_box])
        else:
            faces = [data.Face(data.HELD_OUT + 4 * i + k) for k in range(4)]
            batch = (np.stack([still(test_rng, f) for f in faces])[:, None], [f.mouth_box for f in faces])
        held.append((*tensors(batch), batch[1]))

    def make():
        if not moving:
            return picture_batch(rng, arguments.batch)
        frames = int(rng.choice([5, 9]))
        # Whole pictures alone at the end: normalisation sees all of a picture.
        if rng.uniform() < 0.8 and run.spent < 0.75 * run.seconds:
            return mouth_batch(rng, mouths, 4, frames)
        return clip_batch(rng, mouths, frames)

    batches = ahead(make)
    mean_loss, last, since = 0.0, run.elapsed, run.steps
    while run.done < 1:
        x, weight = tensors(next(batches))
        with torch.set_grad_enabled(arguments.part != "decoder"):
            mean, logvar = network.encode(x)
            z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        y = network.decode(z)
        d = y - x
        loss = ((d.abs() + d.square()) * weight).mean()
        # Colours of whole areas: little in a sum over pixels, much to the eye.
        areas = d.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((3, 5))
        areas = torch.cat([areas, areas - areas.mean(-1, keepdim=True)], -1)
        loss = loss + AREAS * areas.abs().mean()
        loss = loss + KL * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step(run.rate())
        run.steps += 1
        mean_loss += (loss.item() - mean_loss) * max(0.02, 1 / (run.steps - since))
        if run.elapsed - last > 90:
            last = run.elapsed
            whole, mouth = held_out(network, held)
            run.log(loss=mean_loss, whole_psnr=whole, mouth_psnr=mouth, latent_std=mean.std().item())
        run.save(90, network=network.state_dict(), optimiser=optimiser.state())
    if run.steps == since:
        return
    whole, mouth = held_out(network, held)
    run.log(loss=mean_loss, whole_psnr=whole, mouth_psnr=mouth, latent_std=mean.std().item())
    run.save(network=network.state_dict(), optimiser=optimiser.state())


if __name__ == "__main__":
    main()
