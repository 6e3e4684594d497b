"""Draws the clips that are never trained on: what `quality` measures the product's videos against.

    python held_out.py OUT --count 20
    python held_out.py ../portrait.png --portrait 17      # the demo's portrait: a face that was never trained on

For each clip: NN.png (the portrait), NN.wav (the speech), NN.json (the mouth's box, and how far it is open in each drawn
frame, measured as `quality` measures it), NN.still.png (white where the drawn frames stand still). With --long also a clip
of several sentences, which takes several windows.
"""

import argparse
import json
import tempfile
import wave
from pathlib import Path

import cv2
import numpy as np

import data


def save_wave(path: Path, samples: np.ndarray):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(data.RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes())


def opening(frames: np.ndarray, box) -> np.ndarray:
    """How far the mouth is open in each frame: the dark pixels in the middle of its box."""
    left, top, right, bottom = (int(v) for v in box)
    middle, half = (left + right) // 2, 8
    part = frames[:, top:bottom, middle - half : middle + half].astype(np.float32)
    # Inside the mouth green and blue are low against the skin around it; lips are dark in the same way but constant.
    dark = part[..., 1:].mean(-1)
    skin = np.median(dark[:, -3:], axis=(1, 2), keepdims=True)
    return np.clip((skin - dark) / skin, 0, 1).mean((1, 2))


def save(out: Path, name: str, clip: data.Clip):
    box = [int(v) for v in clip.face.mouth_box]
    truth = {"mouth_box": box, "opening": [round(float(v), 5) for v in opening(clip.frames, box)]}
    cv2.imwrite(str(out / f"{name}.png"), clip.reference[..., ::-1])
    # What does not move: above all the background.
    still = clip.frames.astype(np.float32).std(0).max(-1) < 1.0
    cv2.imwrite(str(out / f"{name}.still.png"), still.astype(np.uint8) * 255)
    save_wave(out / f"{name}.wav", clip.samples)
    (out / f"{name}.json").write_text(json.dumps(truth) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first face and sentence")
    parser.add_argument("--long", type=int, metavar="FRAMES", help="makes one clip of so many frames instead")
    parser.add_argument("--portrait", type=int, metavar="N", help="draws face N, large, to the file OUT instead")
    a = parser.parse_args()
    if a.portrait is not None:
        face = data.Face(data.HELD_OUT + a.portrait)
        cv2.imwrite(str(a.out), data.draw(face, data.Pose(), side=512)[..., ::-1])
        return
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(a.first, a.first + (1 if a.long else a.count)):
            save(a.out, f"{i:02}", data.make_clip(i, a.long, Path(scratch), held_out=True))


if __name__ == "__main__":
    main()
