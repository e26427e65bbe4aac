"""The paper's ViViTs (tables 6 to 8) as data: 32 frames in tubelets of 2, so 16 slices, with tokens learned per slice.

Names are those of ``presets.py`` behind ``tokenlearner_vivit_``. L/10 stands at 220, since 10 does not divide 224.
H/16's size is not printed; it stands at 224. As in the image experiments tokens are learned by v1.0 (``conv``).
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


def _presets() -> list[VideoPreset]:
    return [
        VideoPreset("l", 16, 224),
        VideoPreset("l", 16, 320),
        VideoPreset("h", 16, 224),
        VideoPreset("l", 16, 224, 16, 12),
        VideoPreset("l", 16, 224, 8, 18),
        VideoPreset("l", 14, 224, 16, 18),
        *(VideoPreset("l", 10, 220, 16, 18, fuser) for fuser in (None, "fuser")),
    ]


VIDEO_PRESETS: dict[str, VideoPreset] = {preset.name: preset for preset in _presets()}
