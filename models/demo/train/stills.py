"""Makes the same clips with other settings, and a sheet of their frames with time and score.

    python stills.py HELD_OUT VIDEOS sheet.jpg --avatar AVATAR --quality QUALITY --models MODELS --count 2

Prints the same figures as a table: the seconds of the processor (of all its cores) that `avatar generate` took for one
video, and medians of what `quality` measures.
"""

import argparse
import json
import resource
import subprocess
from pathlib import Path

import cv2
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = [["--steps", str(steps)] for steps in (10, 20, 30, 50)]
VARIANTS = [
    *STEPS,
    *([*flags, "--guidance-scale", "2.5"] for flags in STEPS[1:3]),
    *([*flags, "--no-feature-cache"] for flags in STEPS[2:]),
]
SHOWN = (4, 12, 20, 28, 36)
"""Frames of the first clip on the sheet."""


def spent() -> float:
    """Seconds of the processor that the programs run from here have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def frames(path: Path) -> list[np.ndarray]:
    video, found = cv2.VideoCapture(str(path)), []
    while (frame := video.read())[0]:
        found.append(frame[1][..., ::-1])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", type=Path, help="folder of held_out.py")
    parser.add_argument("videos", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--avatar", type=Path, required=True)
    parser.add_argument("--quality", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2, help="clips of each setting")
    a = parser.parse_args()

    names = sorted(path.stem for path in a.held_out.glob("*.json"))[: a.count]
    figure, axes = plt.subplots(len(VARIANTS), len(SHOWN), figsize=(1.5 * len(SHOWN) + 3, 1.5 * len(VARIANTS)))
    print("| settings | seconds | correlation | still, dB | flicker |\n| --- | --- | --- | --- | --- |")
    for row, flags in zip(axes, VARIANTS, strict=True):
        setting = " ".join(flags)
        folder, seconds = a.videos / setting.replace("-", "").replace(" ", "-"), []
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            inputs = ["--image", a.held_out / f"{name}.png", "--audio", a.held_out / f"{name}.wav"]
            out = ["--models", a.models, "--out", folder / f"{name}-own.mp4", "--quiet"]
            start = spent()
            subprocess.run([a.avatar, "generate", "--prompt", "A person speaks.", *inputs, *out, *flags], check=True)
            seconds.append(spent() - start)
        told = subprocess.run([a.quality, a.held_out, "--videos", folder, "--count", str(len(names)), "--json"],
                              check=True, capture_output=True)
        of = json.loads(told.stdout)["median"]
        score = f"{np.median(seconds):.1f} | {of['correlation']:.2f} | {of['still_psnr']:.1f} | {of['flicker']:.2f}"
        print(f"| `{setting}` | {score} |", flush=True)
        shown = frames(folder / f"{names[0]}-own.mp4")
        for axis, frame in zip(row, SHOWN, strict=True):
            axis.imshow(shown[frame])
            axis.set_axis_off()
        text = f"{setting}\n{np.median(seconds):.1f} s, mouth {of['correlation']:.2f}\nstill {of['still_psnr']:.1f} dB"
        row[0].text(-0.08, 0.5, text, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(left=0.27, right=0.995, top=0.995, bottom=0.005, wspace=0.03, hspace=0.03)
    figure.savefig(a.sheet, dpi=80)


if __name__ == "__main__":
    main()
