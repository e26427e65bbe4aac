"""The paper's ViViTs (tables 6 to 8) as data: 32 frames in tubelets of 2, so 16 slices, with tokens learned per slice.

Names are those of ``presets.py`` behind ``tokenlearner_vivit_``. L/10 stands at 220, since 10 does not divide 224.
H/16's size is not printed; it stands at 224. As in the image experiments tokens are learned by v1.0 (``conv``).

``VIDEO_HOSTS`` are plain ViViTs to train and to insert into, named as timm names ViTs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenlearner.models.presets import Preset


@dataclass(frozen=True)
class VideoPreset(Preset):
    """One model of clips; ``tokens`` are per slice, ``tubelet`` is the tubelets' frames."""

    num_classes: int = 400
    """Kinetics-400."""
    frames: int = 32
    tubelet: int = 2

    @property
    def name(self) -> str:
        return super().name.replace("tokenlearner_", "tokenlearner_vivit_", 1)

    def host_arguments(self) -> dict[str, Any]:
        """The ViViT to insert into: no class token, the head on the mean of all tokens."""
        return {**super().host_arguments(), "num_frames": self.frames, "tubelet_size": self.tubelet}


@dataclass(frozen=True)
class VideoHost(VideoPreset):
    """A ViViT without TokenLearner: ``vivit_base_patch16x2_224`` has patches of 16×16 pixels and 2 frames."""

    @property
    def name(self) -> str:
        size = _WORDS.get(self.size, self.size)
        return f"vivit_{size}_patch{self.patch}x{self.tubelet}_{self.resolution}"


_WORDS = {"ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}


def _presets() -> list[VideoPreset]:
    return [
        VideoPreset("l", 16, 224),
        VideoPreset("l", 16, 320),
        VideoPreset("h", 16, 224),
        VideoPreset("l", 16, 224, 16, 12),
        VideoPreset("l", 16, 224, 8, 18),
        VideoPreset("l", 14, 224, 16, 18),
        *(VideoPreset("l", 10, 220, 16, 18, fuser) for fuser in (None, "fuser")),
        # Ours, for small clips; the paper has no such model.
        VideoPreset("micro", 8, 64, 8, 2, kind="mlp", frames=16),
    ]


VIDEO_PRESETS: dict[str, VideoPreset] = {preset.name: preset for preset in _presets()}
VIDEO_HOSTS: dict[str, VideoHost] = {
    host.name: host
    for host in (
        *(VideoHost(size, 16, 224) for size in _WORDS),
        VideoHost("l", 14, 224),
        VideoHost("l", 10, 220),
        VideoHost("micro", 8, 64, frames=16),
    )
}
