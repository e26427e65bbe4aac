"""What TokenLearner is compared with: other ways to make a timm ViT cheaper, each by its paper's rule.

``tome`` merges tokens, ``prune`` drops them, ``merge_patches`` mixes them, and ``plain`` has the three that need no
method: a smaller ViT, a lower resolution, fewer layers. Fixed average pooling is the package's own
``insert(kind="grid")``. ``budgets`` finds the setting of each that costs what another model costs.

All take a timm VisionTransformer, leave it as it is and return another with the same interface and, but for the smaller
ViT, the same state-dict keys, so that the trained weights are in it.
"""

from peers.budgets import PEERS, Choice, at_latency, at_macs
from peers.patch_merger import PatchMerger, merge_patches
from peers.plain import lower_resolution, shorten, smaller_vit
from peers.pruning import prune
from peers.tome import tome

__all__ = [
    "PEERS",
    "Choice",
    "PatchMerger",
    "at_latency",
    "at_macs",
    "lower_resolution",
    "merge_patches",
    "prune",
    "shorten",
    "smaller_vit",
    "tome",
]
