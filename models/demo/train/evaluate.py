"""Measures what the product makes: held-out faces with held-out sentences.

    python evaluate.py prepare WORK --count 20            # pictures and recordings
    python evaluate.py run WORK --avatar target/release/avatar --models models/demo/weights
    python evaluate.py measure WORK                       # prints the figures, writes results.csv

`run` calls the program once for each face with its own recording, and once with the recording of the next face, which
must not move the mouth as the first one says.
"""

import argparse
import csv
import subprocess
import wave
from pathlib import Path

import cv2
import numpy as np

import data


def prepare(work: Path, count: int):
    work.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        clip = data.make_clip(i, None, work, held_out=True)
        cv2.imwrite(str(work / f"{i:02}.png"), clip.reference[..., ::-1])
        save_wave(work / f"{i:02}.wav", clip.samples)
        np.savez(work / f"{i:02}.npz", frames=clip.frames, mouth=clip.mouth, box=clip.face.mouth_box,
                 reference=clip.reference)
    (work / "voice.wav").unlink()


def save_wave(path: Path, samples: np.ndarray):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(data.RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes())


def run(work: Path, avatar: Path, models: Path, extra: list[str]):
    pictures = sorted(work.glob("??.png"))
    for i, picture in enumerate(pictures):
        other = pictures[(i + 1) % len(pictures)]
        for kind, speech in (("own", picture), ("other", other)):
            out = work / f"{picture.stem}-{kind}.mp4"
            if not out.exists():
                command = [avatar, "generate", "--models", models, "--image", picture, "--audio", speech.with_suffix(".wav"),
                           "--prompt", "A person speaks.", "--out", out, "--quiet", *extra]
                subprocess.run([str(part) for part in command], check=True)


def read(path: Path) -> np.ndarray:
    """Frames of a video, (F, H, W, 3) RGB."""
    video, frames = cv2.VideoCapture(str(path)), []
    while True:
        good, frame = video.read()
        if not good:
            return np.stack(frames)
        frames.append(frame[..., ::-1])


def opening(frames: np.ndarray, box) -> np.ndarray:
    """How far the mouth is open in each frame: the dark pixels in the middle of its box."""
    left, top, right, bottom = (int(v) for v in box)
    middle, half = (left + right) // 2, 8
    part = frames[:, top:bottom, middle - half : middle + half].astype(np.float32)
    # Inside the mouth green and blue are low against the skin around it; lips are dark in the same way but constant.
    dark = part[..., 1:].mean(-1)
    skin = np.median(dark[:, -3:], axis=(1, 2), keepdims=True)
    return np.clip((skin - dark) / skin, 0, 1).mean((1, 2))


def correlations(measured: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """At lags -3..3 frames; at a positive lag the video is late."""
    found = []
    for lag in range(-3, 4):
        a = measured[max(lag, 0) : len(measured) + min(lag, 0)]
        b = truth[max(-lag, 0) : len(truth) + min(-lag, 0)]
        found.append(np.corrcoef(a, b)[0, 1])
    return np.array(found)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2) / 255**2 + 1e-12))


def measure(work: Path):
    rows = []
    for path in sorted(work.glob("*-own.mp4")):
        stem = path.stem[:2]
        known = np.load(work / f"{stem}.npz")
        frames, truth, box = read(path), known["frames"], known["box"]
        count = min(len(frames), len(truth))
        frames, truth = frames[:count], truth[:count]
        target = opening(truth, box)
        by_lag = correlations(opening(frames, box), target)
        other = work / f"{stem}-other.mp4"
        shuffled = np.nan
        if other.exists():
            swapped = opening(read(other), box)
            n = min(len(swapped), count)
            shuffled = np.corrcoef(swapped[:n], target[:n])[0, 1]
        # What does not move in the truth, away from the head: above all the background.
        still = truth.std(0).max(-1) < 1.0
        at_rest = psnr(frames[:, still], known["reference"][None][:, still])
        steps = np.abs(np.diff(frames[:, still].astype(np.float32), axis=0)).mean()
        rows.append({
            "clip": stem, "frames": count, "correlation": by_lag[3], "best_lag": int(by_lag.argmax()) - 3,
            "correlation_at_best": by_lag.max(), "shuffled": shuffled, "with_mouth_truth": np.corrcoef(opening(frames, box), known["mouth"][:count, 0])[0, 1],
            "static_psnr": at_rest, "psnr": psnr(frames, truth), "flicker": float(steps),
        })
    with (work / "results.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print("\nmedian of", len(rows), "clips:")
    for key in list(rows[0])[2:]:
        print(f"  {key}: {np.nanmedian([row[key] for row in rows]):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["prepare", "run", "measure"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--avatar", type=Path, default=Path("target/release/avatar"))
    parser.add_argument("--models", type=Path)
    parser.add_argument("extra", nargs="*", help="more arguments for the program, after --")
    a = parser.parse_args()
    if a.part == "prepare":
        prepare(a.work, a.count)
    elif a.part == "run":
        run(a.work, a.avatar, a.models, a.extra)
    else:
        measure(a.work)


if __name__ == "__main__":
    main()
