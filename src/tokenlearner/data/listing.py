"""What goes with a list of videos; without imports of weight, so that the command line's ``--help`` is quick."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listing:
    """What a list of videos, or a folder of them, does not say itself."""

    videos: Path | None = None
    """The folder of the videos that a list of Charades, Kinetics or AViD names."""
    classes: Path | None = None
    """Charades' class file, which it needs, or a file with a class a line in the order of the model's outputs."""
    val: Path | None = None
    """The list to evaluate on, where DATA is one to train on."""
    hierarchy: Path | None = None
    """AViD's hierarchy: a video is then of all classes above its own too."""
    frame_fps: float | None = None
    """Folders of pictures are videos of so many frames a second."""
