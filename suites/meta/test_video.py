"""Videos from files: frames in order, films at two a second, and one line for what is no video."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixtures.core import video
from fixtures.core.errors import UserError
from fixtures.core.video import read_video


def picture(grey: int, width: int = 30) -> Image.Image:
    """One frame of one colour."""
    return Image.new("RGB", (width, 20), (grey, grey, grey))


def greys(frames: np.ndarray) -> list[int]:  # type: ignore[type-arg]
    """The colour of each frame."""
    return [int(frame[0, 0, 0]) for frame in frames]


def test_folder_of_frames(tmp_path: Path) -> None:
    """A folder's images are its frames, ordered by the numbers in their names; hidden files are none."""
    for number in (10, 2, 1):
        picture(number).save(tmp_path / f"frame{number}.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    frames = read_video(tmp_path)
    assert (frames.shape, frames.dtype, greys(frames)) == ((3, 20, 30, 3), np.uint8, [1, 2, 10])


def test_animation(tmp_path: Path) -> None:
    """An animated GIF's frames are taken as they are, a still image is a video of one."""
    first, *others = (picture(grey) for grey in (0, 100, 200))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    assert greys(read_video(tmp_path / "a.gif")) == [0, 100, 200]
    first.save(tmp_path / "a.png")
    assert greys(read_video(tmp_path / "a.png")) == [0]


def test_animation_that_lies(tmp_path: Path) -> None:
    """An animation of more pixels than its bytes can hold is refused before it fills the memory; a large one is not."""
    first, second = (Image.new("L", (4500, 4000), grey) for grey in (0, 100))
    first.save(tmp_path / "large.gif", save_all=True, append_images=[second])
    assert greys(read_video(tmp_path / "large.gif")) == [0, 100]
    small, other = picture(0), picture(100)
    small.save(tmp_path / "lies.gif", save_all=True, append_images=[other])
    content = bytearray((tmp_path / "lies.gif").read_bytes())
    content[6:10] = (14136).to_bytes(2, "little") + (2145).to_bytes(2, "little")  # its screen
    (tmp_path / "lies.gif").write_bytes(content)
    size = len(content)
    with pytest.raises(UserError, match=f"lies.gif: says that it has 30321720 pixels, which {size} bytes do not hold"):
        read_video(tmp_path / "lies.gif")


def capture_of(count: int, rate: float) -> Any:
    """OpenCV as far as it is used, with a film of so many frames whose blue counts them."""

    class Capture:
        def __init__(self, _: str) -> None:
            self.number = -1

        def get(self, _: int) -> float:
            return rate

        def grab(self) -> bool:
            self.number += 1
            return self.number < count

        def retrieve(self) -> tuple[bool, Any]:
            frame = np.zeros((20, 30, 3), np.uint8)
            frame[..., 0] = self.number  # blue is OpenCV's first
            return True, frame

        def release(self) -> None:
            pass

    return SimpleNamespace(VideoCapture=Capture, CAP_PROP_FPS=5)


@pytest.fixture
def film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is no image, on a machine with OpenCV alone."""
    monkeypatch.setattr(video, "find_spec", lambda name: object() if name == "cv2" else None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    return tmp_path / "a.mp4"


def test_film(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A film is looked at twice a second, whatever its rate, and its colours are red, green and blue."""
    monkeypatch.setitem(sys.modules, "cv2", capture_of(count=100, rate=30.0))
    frames = read_video(film)
    assert frames[:, 0, 0].tolist() == [[0, 0, blue] for blue in (0, 15, 30, 45, 60, 75, 90)]


def test_film_by_a_real_decoder(tmp_path: Path) -> None:
    """PyAV's frames come out as they went in, two a second."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    file = tmp_path / "a.mkv"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 30, 20, "bgr0"
        for grey in range(0, 200, 10):  # two seconds
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture(grey)), format="rgb24")))
        container.mux(stream.encode())
    assert greys(read_video(file)) == [0, 50, 100, 150]


def broken(_: Path) -> Iterator[Any]:
    """A decoder that finds the file invalid."""
    raise ValueError("Invalid data found\nwhen processing input")
    yield


def test_no_video(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no video is refused in one line that names the file and says why."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    picture(0).save(tmp_path / "mixed" / "0.png")
    picture(0, width=31).save(tmp_path / "mixed" / "1.png")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.png").write_text("no image")
    picture(0, width=20 * 201).save(tmp_path / "thin.png")
    monkeypatch.setitem(video.DECODERS, "cv2", broken)
    for path, said in (
        (tmp_path / "nowhere", "no such file"),
        (tmp_path / "empty", "holds no frames"),
        (tmp_path / "mixed", "frames of different sizes (30x20 and 31x20)"),
        (tmp_path / "text", "not an image"),
        (tmp_path / "thin.png", "crop it"),
        (film, "cv2 cannot read it as a film (Invalid data found)"),
    ):
        with pytest.raises(UserError) as error:
            read_video(path)
        assert str(path) in str(error.value)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_nothing_reads_films(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a decoder a film is refused with what would help."""
    monkeypatch.setattr(video, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install av; or give a folder of frames, or an animated GIF"):
        read_video(film)


def test_too_long(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More frames than are looked at are refused, before all of them are in memory."""
    monkeypatch.setattr(video, "MOST_FRAMES", 3)
    read: list[int] = []

    def endless(_: Path) -> Iterator[Any]:
        while True:
            read.append(1)
            yield len(read) - 1, lambda: np.zeros((20, 30, 3), np.uint8)

    monkeypatch.setitem(video.DECODERS, "cv2", endless)
    with pytest.raises(UserError, match="more than 3 frames"):
        read_video(film)
    assert len(read) == 4
    (tmp_path / "many").mkdir()
    for number in range(5):
        picture(number).save(tmp_path / "many" / f"{number}.png")
    with pytest.raises(UserError, match="more than 3 frames"):
        read_video(tmp_path / "many")
