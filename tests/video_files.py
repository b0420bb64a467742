"""Small video files, written by PyAV, in which picture i is a grey of its own."""

from pathlib import Path
from typing import Any

import av
import numpy as np

GREY = 12  # between two pictures
CODECS = {".mp4": ("libx264", "yuv420p"), ".webm": ("libvpx-vp9", "yuv420p"), ".gif": ("gif", "gray")}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def write_video(
    path: Path | str,
    count: int = 12,
    rate: int = 16,
    size: tuple[int, int] = (40, 48),
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    turned: int | None = None,
    **context: Any,
) -> bytes:
    """Writes `count` pictures of size (H, W), `rate` per second: picture i has the grey GREY * (i % 20), and its left
    upper quarter is brighter. options, container: of the encoder and of the file. turned: degrees. context: attributes
    of the encoder. Returns the bytes."""
    path, (high, wide) = Path(path), size
    codec, form = CODECS[path.suffix]
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = wide, high, form
        stream.codec_context.thread_count = 1  # the same bytes, however busy the machine is
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if turned is not None:
            stream.set_display_rotation(turned)
        for i in range(count):
            pixels = np.full((high, wide, 3), GREY * (i % 20), np.uint8)
            pixels[: high // 2, : wide // 2] += 20
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                output.mux(packet)
        for packet in stream.encode():
            output.mux(packet)
    return path.read_bytes()
