"""An open video file, and which frame it shows when.

Decoding starts at the key frame before the time asked for. Containers promise little about where a seek lands (between
key frames in MPEG-TS, after the time asked for in an AVI with B-frames), so where the first frame that comes out is too
late, it is tried again from further back, and from the beginning in the end.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import VideoFrame

# What FFmpeg may take a file for. With all its formats it would play text files and fetch what playlists name.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts"
TOLERANCE = 6e-4
"""Seconds a frame may be stamped after the time at which it is shown: Matroska rounds its stamps to milliseconds."""
STEPS_BACK = (0.0, 2.0, 10.0)  # seconds before the time asked for, tried in turn before decoding from the beginning
MISSING = 1.0  # seconds a file may end before its header says so: headers round, and some count the sound


class RefusedError(Exception):
    """Why a file is no video; ``read_clip`` adds which file."""


class VideoFile:
    """An open video file: its frames as they are shown, with their seconds, from any time on."""

    def __init__(self, path: Path) -> None:
        mode = os.stat(path).st_mode  # noqa: PTH116 - Path("") would be the current folder
        if stat.S_ISDIR(mode):
            raise RefusedError("a folder, where a video file was expected; FrameFolder takes a folder of pictures")
        if not stat.S_ISREG(mode):
            raise RefusedError("a pipe, socket or device, where a video file was expected")
        self.path = path
        self.size = os.stat(path).st_size  # noqa: PTH116
        if not self.size:
            raise RefusedError("the file is empty")
        self._open()
        try:
            self.tick = float(self.stream.time_base or 1e-6)  # seconds, to 15 digits: exact enough for any stamp
            self.fps = float(self.stream.average_rate or 0)
            self.step = 1 / (self.fps or 25)
            self._check_whole()
            self.zero = self._first_stamp()
            self.promised = self._promised()
            self.duration = self.promised if self.promised else self._counted()[1]
        except BaseException:
            self.container.close()
            raise

    def _open(self) -> None:
        import av

        try:
            self.container = av.open(
                f"file:{self.path}",  # or a colon in its name would be taken for a protocol's
                metadata_errors="replace",
                container_options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
            )
        except (av.error.InvalidDataError, av.error.ArgumentError) as error:
            raise RefusedError(
                "no video of a known format (MP4, MOV, Matroska, WebM, AVI, GIF, MPEG-TS), or its header is damaged"
            ) from error
        except av.error.EOFError as error:
            raise RefusedError("holds no frame: ends after its header") from error
        covers = av.stream.Disposition.attached_pic
        pictures = [stream for stream in self.container.streams.video if not stream.disposition & covers]
        if not pictures:
            only_sound = bool(self.container.streams.audio)
            self.container.close()
            raise RefusedError("holds no video, only sound" if only_sound else "holds no video")
        self.stream = pictures[0]
        self.stream.codec_context.thread_count = 1  # workers share the cores already
        self._fresh = True

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def frames(self, since: float) -> Iterator[tuple[float, VideoFrame]]:
        """(seconds, frame) from the frame shown at ``since`` or an earlier one on."""
        for back in STEPS_BACK:
            if since - back <= 0:
                break
            if not self._seek(since - back):
                break
            found = self._decoded()
            first = next(found, None)
            if first is not None and first[0] <= since + TOLERANCE:
                yield first
                yield from found
                return
        self._rewind()
        yield from self._decoded(last=-self.step)

    def _seek(self, seconds: float) -> bool:
        """False where the format can't."""
        import av

        self._fresh = False
        try:
            self.container.seek(self._stamp(seconds), stream=self.stream)
        except av.error.FFmpegError:
            return False
        return True

    def _stamp(self, seconds: float) -> int:
        return self.zero + math.floor((seconds + TOLERANCE) / self.tick)

    def _rewind(self) -> None:
        """Opened again, because no seek is sure to reach the beginning."""
        if not self._fresh:
            self.container.close()
            self._open()
        self._fresh = False

    def _decoded(self, last: float | None = None) -> Iterator[tuple[float, VideoFrame]]:
        """Frames from the next key frame on; ``last`` is when the frame before was shown, for those without a stamp."""
        key = False
        lead: int | None = None
        for packet in self.container.demux(self.stream):
            if not key and packet.size:
                if not packet.is_keyframe:
                    continue
                key, lead = True, packet.pts
            for frame in packet.decode():
                stamp = frame.pts
                if stamp is None and last is None:
                    return  # the caller decodes from the beginning, where frames can be counted
                if stamp is not None and lead is not None and stamp < lead:
                    continue  # leans on frames before the key frame, which were not decoded
                last = (stamp - self.zero) * self.tick if stamp is not None else (last or 0.0) + self.step
                yield last, frame

    def key_before(self, time: float) -> float:
        """Seconds of the last key frame before ``time`` that is worth skipping to, by the index; -inf without one."""
        index = self.stream.index_entries
        found = index.search_timestamp(self._stamp(time))
        return (index[found].timestamp - self.zero) * self.tick - 2 * self.step if found >= 0 else -math.inf

    def ends(self, frame: VideoFrame, time: float) -> float:
        """Seconds at which the last frame ends."""
        return time + (frame.duration * self.tick if frame.duration else self.step)

    def check_end(self, end: float) -> None:
        if self.promised is not None and self.promised - end > MISSING:
            raise RefusedError(f"cut off: ends after {end:.2f} s of {self.promised:.2f} s")

    def count(self) -> int:
        """Frames, by the header or by packets."""
        return self.stream.frames or self._counted()[0]

    def _counted(self) -> tuple[int, float]:
        """(packets, seconds to the end of the last), without decoding."""
        self._rewind()
        count, end = 0, 0.0
        for packet in self.container.demux(self.stream):
            if packet.size:
                count += 1
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is not None:
                    step = packet.duration * self.tick if packet.duration else self.step
                    end = max(end, (stamp - self.zero) * self.tick + step)
        if not count:
            raise RefusedError("holds no frame")
        self.check_end(end)
        return count, end

    def _first_stamp(self) -> int:
        if self.container.format.name == "avi":  # has no stamps: FFmpeg counts from 0, decoders delay by a frame or two
            self._fresh = False
            return next((f.pts for f in self.container.decode(self.stream) if f.pts is not None), 0)
        return self.stream.start_time or 0

    def _promised(self) -> float | None:
        """Seconds by the header; None where it doesn't say."""
        if self.stream.duration:
            return self.stream.duration * self.tick
        written = re.fullmatch(r"(\d+):(\d+):([\d.]+)", self.stream.metadata.get("DURATION", ""))
        if written:
            end = int(written[1]) * 3600 + int(written[2]) * 60 + float(written[3])
        else:
            end = (self.container.duration or 0) / 1e6
        left = end - self.zero * self.tick
        return left if left > 0 else None

    def _check_whole(self) -> None:
        """``RefusedError`` where the header lists more than the file holds."""
        name, stream = self.container.format.name, self.stream
        entries = stream.index_entries
        if name.startswith("mov") and len(entries) and entries[-1].pos + entries[-1].size > self.size:
            raise RefusedError(f"cut off: its index ends at byte {entries[-1].pos + entries[-1].size}, "
                                f"the file at {self.size}")  # fmt: skip
        if name == "avi" and stream.frames and stream.duration and stream.duration < 0.95 * stream.frames:
            raise RefusedError(f"cut off: holds about {stream.duration} of {stream.frames} frames")
