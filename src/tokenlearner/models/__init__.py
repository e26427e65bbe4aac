"""The paper's models. Importing this registers them with timm: ``timm.create_model("tokenlearner_b16_384_8at6")``."""

from tokenlearner.models import vit as _vit  # noqa: F401 - registers the models
from tokenlearner.models.bottleneck import MODULES, bot_block, middle, module_rows
from tokenlearner.models.frame_average import FrameAverageViT
from tokenlearner.models.opening import open_trained
from tokenlearner.models.paper import paper_rows
from tokenlearner.models.pooling import PooledViT
from tokenlearner.models.presets import PRESETS, Preset
from tokenlearner.models.scenic import load_scenic
from tokenlearner.models.video_presets import VIDEO_HOSTS, VIDEO_PRESETS, VideoPreset
from tokenlearner.models.vivit import ViViT
from tokenlearner.models.weights import LoadedWeights, inflate, load_vit_weights
from tokenlearner.models.x2plus1d import X2Plus1D

__all__ = [
    "MODULES",
    "PRESETS",
    "VIDEO_HOSTS",
    "VIDEO_PRESETS",
    "FrameAverageViT",
    "LoadedWeights",
    "PooledViT",
    "Preset",
    "ViViT",
    "VideoPreset",
    "X2Plus1D",
    "bot_block",
    "inflate",
    "load_scenic",
    "load_vit_weights",
    "middle",
    "module_rows",
    "open_trained",
    "paper_rows",
]
