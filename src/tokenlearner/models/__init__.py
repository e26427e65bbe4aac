"""The paper's models. Importing this registers them with timm: ``timm.create_model("tokenlearner_b16_384_8at6")``."""

from tokenlearner.models import vit as _vit  # noqa: F401 - registers the models
from tokenlearner.models.opening import open_trained
from tokenlearner.models.paper import paper_rows
from tokenlearner.models.pooling import PooledViT
from tokenlearner.models.presets import PRESETS, Preset
from tokenlearner.models.scenic import load_scenic
from tokenlearner.models.video_presets import VIDEO_PRESETS, VideoPreset
from tokenlearner.models.vivit import ViViT
from tokenlearner.models.weights import LoadedWeights, inflate, load_vit_weights

__all__ = [
    "PRESETS",
    "VIDEO_PRESETS",
    "LoadedWeights",
    "PooledViT",
    "Preset",
    "ViViT",
    "VideoPreset",
    "inflate",
    "load_scenic",
    "load_vit_weights",
    "open_trained",
    "paper_rows",
]
