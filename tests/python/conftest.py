"""What the tests share: a small checkpoint, a running `avatar serve`, and a look at finished videos."""

import json
import os
import queue
import shutil
import subprocess
import threading
import wave
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORTRAIT = ROOT / "models/demo/portrait.png"
SPEECH = ROOT / "models/demo/speech.wav"
FRAME_SECONDS = 1 / 25
READY_SECONDS = 60


@dataclass(frozen=True)
class Server:
    """Addresses of a running `avatar serve`, as host:port."""

    grpc: str
    http: str


@pytest.fixture(scope="session")
def avatar() -> Path:
    """The binary under test."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", "target"))
    binary = ROOT / target / "debug/avatar"
    assert binary.exists(), f"{binary} is not built: run `cargo build -p avatar` first"
    return binary


@pytest.fixture(scope="session")
def models(avatar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint") / "models"
    command = [avatar, "weights", "synth", "--size", "tiny", "--seed", "1", "--out", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def server(avatar: Path, models: Path, tmp_path_factory: pytest.TempPathFactory):
    """The system in one process, on free ports; it must end well after SIGTERM."""
    data = tmp_path_factory.mktemp("data")
    command = [avatar, "serve", "--models", models, "--data-dir", data]
    command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    try:
        words = lines.get(timeout=READY_SECONDS).split()
        assert words[0] == "ready", words
        addresses = dict(word.split("=", 1) for word in words[1:])
        yield Server(grpc=addresses["grpc"], http=addresses["http"])
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 1.2 seconds of the demo recording: enough to speak, quick to animate."""
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    with wave.open(str(SPEECH)) as whole, wave.open(str(path), "wb") as part:
        part.setparams(whole.getparams())
        part.writeframes(whole.readframes(round(1.2 * whole.getframerate())))
    return path


@pytest.fixture(scope="session")
def helm() -> str:
    """The helm program of the tests' environment."""
    found = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "venv/bin/helm"
    return str(found) if found.exists() else shutil.which("helm") or "helm"


def seconds_of(recording: Path) -> float:
    """Length of a WAV file."""
    with wave.open(str(recording)) as wav:
        return wav.getnframes() / wav.getframerate()


def check_video(path: Path, recording: Path, frames: int | None = None) -> None:
    """Holds a video against what is promised: one H.264 and one AAC stream, as long as the recording."""
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json", path]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert sorted(stream["codec_name"] for stream in seen["streams"]) == ["aac", "h264"]
    expected = seconds_of(recording)
    assert abs(float(seen["format"]["duration"]) - expected) <= FRAME_SECONDS
    video = next(stream for stream in seen["streams"] if stream["codec_type"] == "video")
    assert video["avg_frame_rate"] == "25/1"
    assert abs(int(video["nb_read_frames"]) * FRAME_SECONDS - expected) <= FRAME_SECONDS
    assert frames is None or int(video["nb_read_frames"]) == frames
    decode = ["ffmpeg", "-v", "error", "-xerror", "-i", path, "-f", "null", "-"]
    assert subprocess.run(decode, check=True, capture_output=True, timeout=60).stderr == b""
