"""X(2+1)D-M, the backbone of the paper's bottleneck transformers: X3D-M with each 3-D convolution split in two, dense.

X3D-M (arXiv 2004.04730): widths 24, 48, 96, 192, depths 3, 5, 11, 7, blocks 2.25 times as wide inside, every stage
halving the frame. X(2+1)D-M makes each depthwise 3×3×3 a full 1×3×3 and a full 3×1×1, the stem's a 1×3×3 and a 5×1×1.
A block is then the bottleneck block with the module "Conv2D + Conv1D", and a space-time module of the paper is another
middle in the last blocks. Squeeze-excitation and swish stay away: nothing in the paper asks for them.

Counted at 64 frames of 256² with two per multiply-add this is 532.5 GFLOPs, the paper's 532, if X3D's two layers of
the head, 192 → 432 → 2048, both run before pooling. X3D pools between them, which would make it 525.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Float
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenlearner.errors import InputError
from tokenlearner.models.bottleneck import MODULES, bottleneck, conv_norm
from tokenlearner.models.creating import create, default_cfgs_of, model_cfg
from tokenlearner.models.presets import WEIGHTS

__all__ = ["PLAIN", "X2Plus1D"]  # register_model adds each model's name

PLAIN = "Conv2D + Conv1D"


class X2Plus1D(nn.Module):
    """The backbone, with the middle of its last blocks swapped for ``module``. Clips (b, 3, t, h, w) → (b, classes).

    The plain backbone takes frames of any size and any number; modules with an MLP-Mixer or a TokenLearner want t to be
    ``num_frames``. At 64 frames of 256² the last stage, and so the module, sees 64×8×8, and at 224² 64×7×7.

    Args:
        module: A key of :data:`MODULES`; the default is the plain backbone.
        num_classes: Classes, or 0 for pooled features.
        in_chans: Channels of a frame.
        num_frames: Frames of a clip.
        swapped: Blocks with ``module``, the last ones of the last stage. Table 10's totals say there are three, and
            since the blocks after a stage's first all cost the same, they don't say which.
        img_size: Height and width of the frames the model is made for. Nothing is built by it: it is kept for those who
            prepare clips for the model.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that a clip passes the last block by its shortcut alone, in training; it grows from
            0 at the first block.
        widths, depths: Of the stages.
        expansion: Width inside a block over width of its output; 2.25 makes it 432 in the last stage.
        head_width: Channels that are pooled.
        options: Of the module, see :func:`tokenlearner.models.bottleneck.middle`.

    Raises:
        InputError: No such module, options it doesn't take, more blocks to swap than can be, or not as many widths as
            depths.
    """

    takes_clips = True
    """Told apart by this from models of images, without importing the class."""

    def __init__(
        self,
        module: str = PLAIN,
        num_classes: int = 400,
        in_chans: int = 3,
        *,
        num_frames: int = 64,
        img_size: int | tuple[int, int] = 224,
        swapped: int = 3,
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        widths: tuple[int, ...] = (24, 48, 96, 192),
        depths: tuple[int, ...] = (3, 5, 11, 7),
        expansion: float = 2.25,
        head_width: int = 2048,
        **options: Any,
    ) -> None:
        super().__init__()
        if module not in MODULES:
            raise InputError(f"no module {module!r}; there are {', '.join(map(repr, MODULES))}")
        if len(widths) != len(depths):
            raise InputError(f"widths and depths are one of each for a stage, and not {widths} and {depths}")
        if not 0 <= swapped < depths[-1]:
            raise InputError(
                f"swapped is 0 to {depths[-1] - 1} of the last stage's {depths[-1]} blocks, whose first has to halve "
                f"the frame, and not {swapped}"
            )
        self.num_frames, self.in_chans = num_frames, in_chans
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.arguments: dict[str, Any] = {
            "module": module,
            "in_chans": in_chans,
            "num_frames": num_frames,
            "img_size": self.img_size,
            "swapped": swapped,
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
            "widths": widths,
            "depths": depths,
            "expansion": expansion,
            "head_width": head_width,
            **options,
        }
        """What it was built with, for saving; ``num_classes`` can change, and stands on the model."""
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = head_width
        self.drop_rate = drop_rate
        self.stem = nn.Sequential(
            conv_norm(in_chans, widths[0], (1, 3, 3), 2), conv_norm(widths[0], widths[0], (5, 1, 1))
        )
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for stage, (in_dim, dim, depth) in enumerate(zip((widths[0], *widths), widths, depths)):
            last = swapped if stage == len(widths) - 1 else 0
            width = int(dim * expansion)
            blocks = [bottleneck(PLAIN, in_dim, width, dim, stride=2, drop_path=next(rates))]
            blocks += [bottleneck(PLAIN, dim, width, drop_path=next(rates)) for _ in range(depth - last - 1)]
            blocks += [
                bottleneck(module, dim, width, drop_path=next(rates), num_frames=num_frames, **options)
                for _ in range(last)
            ]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        dim, inner = widths[-1], int(widths[-1] * expansion)
        self.final = nn.Sequential(conv_norm(dim, inner, (1, 1, 1)), conv_norm(inner, head_width, (1, 1, 1)))
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b classes"]:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t i j"]:
        """The ``num_features`` channels that are pooled."""
        x = self.stem(x)
        if self.grad_checkpointing:
            for block in itertools.chain(*self.stages):
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = self.stages(x)
        return self.final(x)

    def forward_head(self, x: Float[Tensor, "b d t h w"], pre_logits: bool = False) -> Float[Tensor, "b classes"]:
        x = self.head_drop(x.mean(dim=(2, 3, 4)))
        return x if pre_logits else self.head(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Runs each block again during backward, to save the memory of what is inside it."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's rule for layer-wise learning rates: stem, each block (``coarse``: stage), ``final``, classifier."""
        inside = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": inside, "final": r"^final"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, or none for 0 classes. Pooling is the mean over space and time: ``"avg"``."""
        if global_pool not in (None, "avg"):
            raise InputError(f"X2Plus1D pools by 'avg', not {global_pool!r}")
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)


_M: dict[str, Any] = {"img_size": 224, "num_frames": 64}
_MICRO: dict[str, Any] = {
    "img_size": 64,
    "num_frames": 8,
    "widths": (16, 32, 64),
    "depths": (1, 2, 4),
    "head_width": 128,
    "drop_rate": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "x2plus1d_m": _M,
    "x2plus1d_m_tokenlearner": {**_M, "module": "TokenLearner"},
    "x2plus1d_micro": _MICRO,
    "x2plus1d_micro_tokenlearner": {**_MICRO, "module": "TokenLearner"},
}
"""timm's name → arguments of :class:`X2Plus1D`."""

default_cfgs = default_cfgs_of(
    {
        name: model_cfg(arguments["img_size"], 400, fixed_input_size=False, first_conv="stem.0.0")
        for name, arguments in MODELS.items()
    },
    WEIGHTS,
)


def _entry(name: str) -> Callable[..., nn.Module]:
    """The function timm calls to make the model of that name."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if kwargs.get("features_only"):
            raise InputError(f"{name} has no features_only; its forward_features gives the last feature map")
        model: Any = create(name, X2Plus1D, pretrained, {**MODELS[name], **kwargs}, loader=None)
        model.pretrained_cfg["input_size"] = (model.in_chans, *model.img_size)
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"X2Plus1D with {MODELS[name]}."
    return entry


globals().update({name: register_model(_entry(name)) for name in MODELS})
