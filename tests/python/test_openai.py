"""The `openai` package makes a video: only its address and three extra fields are ours."""

import base64
import time
from pathlib import Path

import openai
import pytest
from conftest import PORTRAIT, Server, check_video

POLL_SECONDS = 0.2
WAIT_SECONDS = 300

# The package announces the end of its vendor's own video service; the calls stay.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def client(server: Server):
    """A client of the running server."""
    with openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="unused", max_retries=0) as client:
        yield client


def data_url(recording: Path) -> str:
    """A recording as text."""
    return "data:audio/wav;base64," + base64.b64encode(recording.read_bytes()).decode()


def create(client: openai.OpenAI, recording: Path, **extra):
    """Asks for a video of the portrait."""
    with PORTRAIT.open("rb") as picture:
        return client.videos.create(
            prompt="A woman speaks.",
            input_reference=picture,
            extra_body={"audio": data_url(recording), "size": 64, **extra},
        )


def test_create_poll_download_and_delete(client: openai.OpenAI, speech: Path, tmp_path: Path) -> None:
    video = create(client, speech, steps=2, seed=7)
    assert video.object == "video"
    assert video.status in ("queued", "in_progress")

    deadline = time.monotonic() + WAIT_SECONDS
    progress = [video.progress]
    while video.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, f"{video.status} at {video.progress} %"
        time.sleep(POLL_SECONDS)
        video = client.videos.retrieve(video.id)
        progress.append(video.progress)
    assert video.status == "completed", video.error
    assert progress == sorted(progress) and progress[-1] == 100
    assert video.prompt == "A woman speaks."
    assert video.completed_at >= video.created_at

    path = tmp_path / "video.mp4"
    client.videos.download_content(video.id).write_to_file(path)
    check_video(path, speech)

    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_a_wrong_field_is_refused_by_name(client: openai.OpenAI, speech: Path) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, speech, steps=0)
    assert refused.value.param == "steps"
    assert "0" in refused.value.message and "200" in refused.value.message


def test_a_recording_that_is_none_is_refused_by_name(client: openai.OpenAI, tmp_path: Path) -> None:
    text = tmp_path / "speech.wav"
    text.write_text("no recording")
    with pytest.raises(openai.APIStatusError) as refused:
        create(client, text, steps=1)
    assert refused.value.status_code in (400, 415, 422)
    assert refused.value.param == "audio"
