"""Portraits of nobody that speak with synthesised voices: the demo model's training and test data.

Every clip is drawn from a seed: a face, a voice with a sentence, a head that moves a little, blinks, and a mouth
that follows the voice. The mouth's opening is the smoothed loudness between 80 and 4000 Hz, its width the balance
of high and low sounds. Faces of seed HELD_OUT and above and the sentences of HELD_OUT_SENTENCES are never trained on.

    python data.py OUT --clips 900 --frames 49 --long 60
"""

import argparse
import colorsys
import json
import subprocess
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path

import cv2
import numpy as np
from scipy import signal

FPS = 25
RATE = 16_000
SAMPLES_PER_FRAME = RATE // FPS
SIDE = 128
HELD_OUT = 1_000_000
"""Seeds of faces from here on are for tests only."""

VOICES = (
    "en-us", "en-gb", "en-us+m3", "en-gb+m2", "en-us+f2", "en-gb+f4", "en-us+f3", "en-gb-scotland", "en-us+m7",
    "en-gb-x-rp", "en-029", "en-gb-x-rp+f1",
)

HELD_OUT_SENTENCES = (
    "Hello, and thank you for coming today.",
    "Where did you put my yellow umbrella?",
    "A cup of tea makes everything better.",
    "My neighbour plays the violin every evening.",
    "We are going to the mountains in June.",
    "Please close the door, it is cold outside.",
    "Seven ships were waiting beyond the reef.",
    "I have never seen such a beautiful garden.",
    "Tomorrow we will know a little more.",
    "The moon was bright above the roofs.",
    "Could you say that again, more slowly?",
    "Nobody believed him until it rained.",
    "She bought bread, butter and eleven eggs.",
    "This voice was made by a machine.",
    "Our train arrives at quarter past nine.",
    "He opened the box and began to laugh.",
    "What a lovely day for a long walk.",
    "They built a bridge over the wide river.",
    "Be careful, the floor is still wet.",
    "Once upon a time there was a small robot.",
)

_WHO = (
    "The old captain", "My sister", "A young doctor", "Our teacher", "The baker", "That tall man", "Your friend Emma",
    "A group of children", "The new mayor", "My uncle Paul", "The quiet girl", "Somebody", "The pilot", "An engineer",
)
_DOES = (
    "painted", "has found", "was looking for", "wants to sell", "carried", "forgot", "talked about", "is waiting for",
    "would like to see", "repaired", "never liked", "asked for", "will bring", "dropped",
)
_WHAT = (
    "a small boat", "the green bicycle", "two hundred apples", "an empty bottle", "my favourite book", "the last ticket",
    "a pair of shoes", "some warm soup", "the broken window", "a letter from home", "a very large dog", "the piano",
    "our old house", "a map of the island",
)
_WHERE = (
    "near the harbour", "this morning", "after the storm", "in the kitchen", "behind the church", "on Monday",
    "without a word", "at the end of the road", "for the third time", "before breakfast", "in the middle of the night",
    "with both hands",
)

COLOURS = {
    "red": (214, 92, 86),
    "orange": (236, 160, 92),
    "yellow": (240, 216, 120),
    "green": (124, 186, 120),
    "blue": (96, 148, 214),
    "purple": (156, 118, 196),
    "pink": (240, 172, 190),
    "white": (242, 242, 240),
}
"""Backgrounds that a prompt can ask for, RGB."""

PLAIN_PROMPTS = (
    "", "A person speaks.", "A person talks.", "A portrait of a person speaking.", "Someone is talking.",
    "A person speaks to the camera.", "A face that talks.", "A person says something.",
)
COLOUR_PROMPTS = (
    "{} background", "A person speaks, {} background.", "A person in front of a {} wall.", "{} background, a person talks",
    "Someone talks before a {} background.", "A person speaks. The background is {}.", "{}",
)


def sentence(rng: np.random.Generator) -> str:
    """One of some 30,000 sentences, none of them held out."""
    who, does, what, where = (words[rng.integers(len(words))] for words in (_WHO, _DOES, _WHAT, _WHERE))
    match rng.integers(3):
        case 0:
            return f"{who} {does} {what}."
        case 1:
            return f"{who} {does} {what} {where}."
        case _:
            return f"{where[0].upper()}{where[1:]}, {who[0].lower()}{who[1:]} {does} {what}."


def speak(text: str, voice: str, speed: int, pitch: int, folder: Path) -> np.ndarray:
    """What espeak-ng says, 16 kHz, float in -1..1, at one loudness for all voices."""
    path = folder / "voice.wav"
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), text]
    subprocess.run(command, check=True, capture_output=True)
    raw = path.read_bytes()
    rate = int.from_bytes(raw[24:28], "little")
    samples = np.frombuffer(raw[raw.index(b"data") + 8 :], np.int16).astype(np.float32) / 32768
    samples = signal.resample_poly(samples, 320, rate * 320 // RATE).astype(np.float32)
    loud = np.percentile(np.abs(samples[np.abs(samples) > 1e-3]), 95)
    return samples * (0.25 / loud)


def utterance(seed: int, folder: Path, held_out: bool = False, frames: int | None = None) -> np.ndarray:
    """A voice saying sentences with pauses between them, for at least `frames` frames, or one sentence."""
    rng = np.random.default_rng((7, seed))
    voice = VOICES[rng.integers(len(VOICES))]
    speed, pitch = int(rng.integers(120, 185)), int(rng.integers(25, 75))
    parts = [np.zeros(int(rng.integers(500, 6000)), np.float32)]
    while True:
        text = HELD_OUT_SENTENCES[seed % len(HELD_OUT_SENTENCES)] if held_out and len(parts) == 1 else sentence(rng)
        parts.append(speak(text, voice, speed, pitch, folder))
        parts.append(np.zeros(int(rng.integers(2000, 10000)), np.float32))
        if frames is None or sum(map(len, parts)) >= frames * SAMPLES_PER_FRAME:
            return np.concatenate(parts) * np.float32(rng.uniform(0.7, 1.3))


def smooth(values: np.ndarray, taps: int) -> np.ndarray:
    window = np.hanning(taps + 2)[1:-1]
    return np.convolve(np.pad(values, taps // 2, mode="edge"), window / window.sum(), mode="valid")


_BAND = signal.butter(4, (80, 4000), "bandpass", fs=RATE, output="sos")
_LOW = signal.butter(4, (80, 900), "bandpass", fs=RATE, output="sos")
_HIGH = signal.butter(4, (1500, 5000), "bandpass", fs=RATE, output="sos")


def mouth_of(samples: np.ndarray, frames: int) -> np.ndarray:
    """Opening 0..1 and width -1..1 of the mouth at each frame, from the sound: (frames, 2)."""

    def loudness(filtered: np.ndarray) -> np.ndarray:
        padded = np.pad(filtered, (200, 200 + RATE // 100))
        power = np.convolve(padded.astype(np.float64) ** 2, np.ones(400) / 400, mode="valid")
        return np.sqrt(np.maximum(power[:: RATE // 100], 0))

    whole = loudness(signal.sosfilt(_BAND, samples))
    low, high = loudness(signal.sosfilt(_LOW, samples)), loudness(signal.sosfilt(_HIGH, samples))
    level = np.percentile(whole[whole > 0.02 * whole.max()], 90)
    opening = smooth(np.clip(whole / level, 0, 1.3) ** 0.8, 33)
    balance = np.clip(np.log((high + 0.02 * level) / (low + 0.05 * level)) / 1.3 + 0.6, -1, 1)
    width = smooth(balance * np.clip(whole / level * 3, 0, 1), 33)
    at = np.minimum(np.arange(frames) * 4 + 2, len(opening) - 1)
    silent = np.arange(frames) * SAMPLES_PER_FRAME >= len(samples)
    found = np.stack([np.clip(opening[at] * 1.2 - 0.07, 0, 1), np.clip(width[at], -1, 1)], 1)
    found[silent] = 0
    return found.astype(np.float32)


def _mix(a, b, t):
    return tuple(float(x) + (float(y) - float(x)) * t for x, y in zip(a, b, strict=True))


SKINS = ((255, 226, 200), (243, 202, 168), (222, 170, 130), (186, 128, 92), (140, 92, 64), (104, 68, 50))
HAIRS = ((38, 30, 30), (74, 48, 36), (120, 78, 48), (186, 138, 78), (226, 196, 130), (150, 70, 40), (160, 160, 164))


@dataclass
class Face:
    """All that is constant in a clip. Lengths are in pixels of a picture 128 wide."""

    seed: int
    skin: tuple = field(init=False)

    def __post_init__(self):
        rng = np.random.default_rng((3, self.seed))
        u = rng.uniform
        i = rng.integers(len(SKINS) - 1)
        self.skin = _mix(SKINS[i], SKINS[i + 1], u())
        self.shade = tuple(c * 0.80 for c in self.skin)
        hair = HAIRS[rng.integers(len(HAIRS))]
        light = u(0.85, 1.15)
        self.hair = tuple(min(c * light, 255) for c in hair)
        self.brow = tuple(c * 0.75 for c in self.hair)
        hue, saturation, value = u(0, 1), u(0.10, 0.40), u(0.72, 0.95)
        self.background = tuple(255 * c for c in colorsys.hsv_to_rgb(hue, saturation, value))
        self.cloth = tuple(255 * c for c in colorsys.hsv_to_rgb(u(0, 1), u(0.25, 0.7), u(0.3, 0.8)))
        self.iris = (((96, 62, 40), (70, 110, 150), (86, 124, 84), (110, 96, 70))[rng.integers(4)])
        self.lip = _mix(tuple(c * k for c, k in zip(self.skin, (0.86, 0.58, 0.56), strict=True)), (190, 70, 76), u(0, 0.5))
        self.cx, self.cy = 64 + u(-3, 3), 61 + u(-2, 2.5)
        self.rx, self.ry = u(25, 29.5), u(33, 37)
        self.jaw = u(0.80, 1.0)
        self.eye_gap, self.eye_y = u(10.5, 12.5), u(-4, -1)
        self.eye_w, self.eye_h = u(4.6, 5.6), u(2.8, 3.6)
        self.brow_y, self.brow_thick = u(7.5, 9.5), u(1.2, 2.0)
        self.nose = u(9, 12)
        self.mouth_y, self.mouth_w = u(19.5, 21.5), u(9.5, 12)
        self.style = int(rng.integers(4))
        self.fringe = u(0.32, 0.52)
        self.volume = u(3.0, 6.5)
        self.part = u(-0.7, 0.7)
        self.glasses = u() < 0.3
        self.frame = ((40, 36, 40), (120, 60, 44), (60, 80, 120))[rng.integers(3)]
        self.collar = u() < 0.5

    @property
    def mouth_box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of all that the mouth reaches."""
        x, y = zoomed(np.array((self.cx, self.cy + self.mouth_y)))
        return int(x - 21), int(y - 9), int(x + 22), int(y + 17)

    @property
    def face_box(self) -> tuple[float, float, float, float]:
        """Left, top, width, height of the face."""
        x, y = zoomed(np.array((self.cx - self.rx, self.cy - self.ry)))
        return float(x), float(y), 2 * self.rx * ZOOM, 2 * self.ry * ZOOM


@dataclass
class Pose:
    """What changes from frame to frame: the head's offset in pixels, eyes open 0..1, mouth open 0..1, wide -1..1."""

    dx: float = 0.0
    dy: float = 0.0
    eyes: float = 1.0
    opening: float = 0.0
    width: float = 0.0


class Pen:
    """Anti-aliased shapes in units of a 128-pixel picture, drawn large and reduced by area."""

    def __init__(self, picture: np.ndarray, scale: float):
        self.picture, self.scale = picture, scale

    def _at(self, points) -> np.ndarray:
        return np.round(zoomed(np.asarray(points, np.float64)) * (self.scale * 16)).astype(np.int32)

    def shape(self, points, colour):
        cv2.fillPoly(self.picture, [self._at(points)], colour, cv2.LINE_AA, 4)

    def line(self, points, colour, thick):
        thick = max(1, round(thick * self.scale * ZOOM))
        cv2.polylines(self.picture, [self._at(points)], False, colour, thick, cv2.LINE_AA, 4)

    def oval(self, x, y, rx, ry, colour):
        self.shape(oval(x, y, rx, ry), colour)


ZOOM = 1.24
"""How much larger than designed everything but the background is drawn: a large mouth is learned faster."""


def zoomed(points: np.ndarray) -> np.ndarray:
    """Where points of the design are in the picture."""
    return (points - (64, 66)) * ZOOM + (64, 66)


_ANGLES = np.linspace(0, 2 * np.pi, 48, endpoint=False)


def oval(x, y, rx, ry):
    return np.stack([x + rx * np.cos(_ANGLES), y + ry * np.sin(_ANGLES)], 1)


def _arc(x, y, rx, ry, start, end, count=14):
    angles = np.radians(np.linspace(start, end, count))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def _backdrop(face: Face, colour, side: int) -> np.ndarray:
    """The background: one colour, a little darker below."""
    ramp = np.linspace(1.04, 0.88, side)[:, None, None]
    return np.clip(np.asarray(colour)[None, None] * ramp, 0, 255).astype(np.uint8).repeat(side, 1)


def draw(face: Face, pose: Pose, side: int = SIDE, background=None) -> np.ndarray:
    """One frame, RGB (side, side, 3)."""
    scale = 4
    picture = cv2.resize(_backdrop(face, face.background if background is None else background, side), None,
                         fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    pen = Pen(picture, scale * side / 128)
    x, y = face.cx + pose.dx, face.cy + pose.dy
    rx, ry = face.rx, face.ry
    # Hair behind the head.
    if face.style in (1, 2):
        length = 26 if face.style == 1 else 40
        pen.shape(np.concatenate([_arc(x, y - 6, rx + face.volume + 2, ry + face.volume - 4, 180, 360),
                                  [(x + rx + face.volume + 3, y + length), (x - rx - face.volume - 3, y + length)]]), face.hair)
    elif face.style == 3:
        pen.oval(x, y - ry - 5, 11, 9, face.hair)
    # Shoulders stay; the neck follows the head at its upper end.
    bx = face.cx
    pen.shape(np.concatenate([_arc(bx, 128 + 4, 46, 32, 180, 360), [(bx + 46, 129), (bx - 46, 129)]]), face.cloth)
    pen.shape([(x - 10, y + ry - 12), (x + 10, y + ry - 12), (bx + 12, 106), (bx, 112), (bx - 12, 106)], face.shade)
    if face.collar:
        light = _mix(face.cloth, (255, 255, 255), 0.65)
        for s in (-1, 1):
            pen.shape([(bx + s * 12, 101), (bx + s * 17, 108), (bx + s * 6, 119), (bx, 111)], light)
    # Ears and head: the jaw is narrower than the skull.
    for s in (-1, 1):
        pen.oval(x + s * rx, y + 3, 4, 6.5, face.shade)
    head = oval(x, y, rx, ry)
    below = np.clip((head[:, 1] - y) / ry, 0, 1)
    head[:, 0] = x + (head[:, 0] - x) * (1 - (1 - face.jaw) * below)
    # A wide open mouth takes the chin down.
    head[:, 1] += 2.2 * pose.opening * below**2
    pen.shape(head, face.skin)
    blush = _mix(face.skin, (226, 110, 96), 0.22)
    for s in (-1, 1):
        pen.oval(x + s * 16, y + 12, 6.0, 4.2, blush)
    # Hair on top.
    line_y = y - ry * (1 - face.fringe)
    top = _arc(x, y, rx + face.volume * 0.55, ry + face.volume, 188, 352, 30)
    side_y = y + (8 if face.style in (1, 2) else 0)
    peak = x + face.part * 16
    fringe = [(x + rx + 1, side_y), (x + rx - 4, line_y + 6), (peak + 8, line_y), (peak - 8, line_y),
              (x - rx + 4, line_y + 6), (x - rx - 1, side_y)]
    pen.shape(np.concatenate([top, fringe]), face.hair)
    # Eyes and brows.
    ey = y + face.eye_y
    for s in (-1, 1):
        ex = x + s * face.eye_gap
        height = face.eye_h * pose.eyes
        if pose.eyes > 0.25:
            pen.oval(ex, ey, face.eye_w, height, (250, 250, 250))
            pen.oval(ex, ey, min(3.0, face.eye_w), min(3.0, height), face.iris)
            pen.oval(ex, ey, 1.5, min(1.5, height), (24, 20, 22))
            pen.line(_arc(ex, ey, face.eye_w, height, 190, 350), (50, 36, 34), 1.1)
        else:
            pen.line(_arc(ex, ey - 0.5, face.eye_w, 1.2, 20, 160), (50, 36, 34), 1.2)
        pen.line(_arc(ex, ey - face.brow_y + 4 - 0.8 * pose.opening, face.eye_w + 1.6, 4, 205, 335), face.brow, face.brow_thick)
    if face.glasses:
        for s in (-1, 1):
            pen.line(np.concatenate([r := oval(x + s * face.eye_gap, ey + 0.5, 8.3, 7.2), r[:1]]), face.frame, 1.3)
        pen.line([(x - face.eye_gap + 8.3, ey), (x + face.eye_gap - 8.3, ey)], face.frame, 1.3)
    pen.line(_arc(x, y + face.nose - 2, 3.4, 3.0, 25, 155), face.shade, 1.6)
    _mouth(pen, face, pose, x, y + face.mouth_y)
    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)


def _mouth(pen: Pen, face: Face, pose: Pose, x: float, y: float):
    """Lips around a dark opening with teeth and tongue; closed, a line between the lips."""
    half = face.mouth_w * (1 + 0.20 * pose.width - 0.10 * pose.opening)
    gap = 11.0 * pose.opening
    up, down = 0.30 * gap, 0.70 * gap
    outer = np.concatenate([_arc(x, y, half + 1.6, 2.8 + up, 180, 360), _arc(x, y, half + 1.6, 3.6 + down, 0, 180)])
    pen.shape(outer, face.lip)
    if gap > 0.7:
        inner = np.concatenate([_arc(x, y, half - 1.0, up, 180, 360), _arc(x, y, half - 1.0, down, 0, 180)])
        pen.shape(inner, (70, 22, 28))
        if gap > 4:
            pen.shape(_arc(x, y + down - 0.2, (half - 3) * 0.8, 0.45 * down, 180, 360), (204, 96, 96))
        if gap > 2.2:
            pen.shape(np.concatenate([_arc(x, y, half - 2.0, up - 0.3, 180, 360), [(x + half - 3, y - up * 0.2 + 0.6), (x - half + 3, y - up * 0.2 + 0.6)]]), (246, 244, 238))
    else:
        pen.line(_arc(x, y - 2.6, half, 3.0, 25, 155), tuple(c * 0.55 for c in face.lip), 1.1)


def poses(seed: int, mouth: np.ndarray) -> list[Pose]:
    """A head that sways slowly and blinks; its mouth as given."""
    rng = np.random.default_rng((5, seed))
    count = len(mouth)
    t = np.arange(count) / FPS
    wave = lambda size: size * np.sin(2 * np.pi * (rng.uniform(0.12, 0.35) * t + rng.uniform()))  # noqa: E731
    dx, dy = wave(rng.uniform(0, 1.2)), wave(rng.uniform(0, 0.8))
    eyes = np.ones(count)
    at = rng.uniform(0.4, 3.0) * FPS
    while at < count:
        eyes *= 1 - np.clip(1.5 - np.abs(np.arange(count) - at) / 2.2, 0, 1)
        at += rng.uniform(1.5, 4.5) * FPS
    return [Pose(*map(float, row)) for row in np.stack([dx, dy, eyes, mouth[:, 0], mouth[:, 1]], 1)]


@dataclass
class Clip:
    """A clip as the model is to make it: the picture it begins from, the sound, the frames."""

    face: Face
    prompt: str
    samples: np.ndarray
    mouth: np.ndarray
    reference: np.ndarray
    frames: np.ndarray


def prompt_of(rng: np.random.Generator, share: float = 0.35) -> tuple[str, str | None]:
    """A prompt, and the background's colour where it names one."""
    if rng.uniform() >= share:
        return PLAIN_PROMPTS[rng.integers(len(PLAIN_PROMPTS))], None
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    text = COLOUR_PROMPTS[rng.integers(len(COLOUR_PROMPTS))].format(colour)
    return text[0].upper() + text[1:], colour


def make_clip(seed: int, frames: int | None, folder: Path, held_out: bool = False) -> Clip:
    """Clip `seed`; `frames` nothing is as long as its sentence."""
    face = Face(seed + HELD_OUT if held_out else seed)
    rng = np.random.default_rng((11, face.seed))
    samples = utterance(seed, folder, held_out, frames)
    count = frames or len(samples) // SAMPLES_PER_FRAME
    mouth = mouth_of(samples, count)
    prompt, colour = ("A person speaks.", None) if held_out else prompt_of(rng)
    background = COLOURS[colour] if colour else None
    moving = poses(face.seed, mouth)
    # The picture: the pose of the first frame, eyes open, mouth closed, before its own background.
    reference = draw(face, Pose(moving[0].dx, moving[0].dy))
    drawn = np.stack([draw(face, pose, background=background) for pose in moving])
    return Clip(face, prompt, samples, mouth, reference, drawn)


def _write(job) -> dict:
    seed, frames, out = job
    cv2.setNumThreads(1)
    scratch = out / f"scratch-{seed}"
    scratch.mkdir(exist_ok=True)
    clip = make_clip(seed, frames, scratch)
    (scratch / "voice.wav").unlink()
    scratch.rmdir()
    np.savez(out / f"clip-{seed:05}.npz", frames=clip.frames, reference=clip.reference, mouth=clip.mouth,
             samples=clip.samples.astype(np.float16), box=np.array(clip.face.mouth_box), face=np.array(clip.face.face_box))
    return {"seed": seed, "frames": len(clip.frames), "prompt": clip.prompt}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=900, help="clips of --frames frames")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--long", type=int, default=60, help="clips of 129 frames, after those")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [(i, arguments.frames, arguments.out) for i in range(arguments.clips)]
    jobs += [(arguments.clips + i, 129, arguments.out) for i in range(arguments.long)]
    with Pool(arguments.processes) as pool:
        index = pool.map(_write, jobs, chunksize=4)
    (arguments.out / "index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main()
