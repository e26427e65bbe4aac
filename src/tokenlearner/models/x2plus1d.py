"""X(2+1)D-M, the backbone of the paper's bottleneck transformers: X3D-M with each 3-D convolution split in two, dense.

X3D-M (arXiv 2004.04730): widths 24, 48, 96, 192, depths 3, 5, 11, 7, blocks 2.25 times as wide inside, every stage
halving the frame. X(2+1)D-M makes each depthwise 3×3×3 a full 1×3×3 and a full 3×1×1, the stem's a 1×3×3 and a 5×1×1.
A block is then the bottleneck block with the module "Conv2D + Conv1D", and a space-time module of the paper is another
middle in the last blocks. Squeeze-excitation and swish stay away: nothing in the paper asks for them.

Counted at 64 frames of 256² with two per multiply-add this is 532.5 GFLOPs, the paper's 532, if X3D's two layers of
the head, 192 → 432 → 2048, both run before pooling. X3D pools between them, which would make it 525.2.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.models.bottleneck import MODULES, bottleneck, conv_norm

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
        drop_rate: Dropout before the classifier.
        widths, depths: Of the stages.
        expansion: Width inside a block over width of its output; 2.25 makes it 432 in the last stage.
        head_width: Channels that are pooled.
        options: Of the module, see :func:`tokenlearner.models.bottleneck.middle`.

    Raises:
        InputError: No such module, options it doesn't take, or more blocks to swap than can be.
    """

    def __init__(
        self,
        module: str = PLAIN,
        num_classes: int = 400,
        in_chans: int = 3,
        *,
        num_frames: int = 64,
        swapped: int = 3,
        drop_rate: float = 0.5,
        widths: tuple[int, ...] = (24, 48, 96, 192),
        depths: tuple[int, ...] = (3, 5, 11, 7),
        expansion: float = 2.25,
        head_width: int = 2048,
        **options: Any,
    ) -> None:
        super().__init__()
        if module not in MODULES:
            raise InputError(f"no module {module!r}; there are {', '.join(map(repr, MODULES))}")
        if not 0 <= swapped < depths[-1]:
            raise InputError(
                f"swapped is 0 to {depths[-1] - 1} of the last stage's {depths[-1]} blocks, whose first has to halve "
                f"the frame, and not {swapped}"
            )
        self.module, self.num_frames = module, num_frames
        self.num_features = self.head_hidden_size = head_width
        self.drop_rate = drop_rate
        self.stem = nn.Sequential(
            conv_norm(in_chans, widths[0], (1, 3, 3), 2), conv_norm(widths[0], widths[0], (5, 1, 1))
        )
        stages = []
        for stage, (in_dim, dim, depth) in enumerate(zip((widths[0], *widths), widths, depths)):
            last = swapped if stage == len(widths) - 1 else 0
            width = int(dim * expansion)
            blocks = [bottleneck(PLAIN, in_dim, width, dim, stride=2)]
            blocks += [bottleneck(PLAIN, dim, width) for _ in range(depth - last - 1)]
            blocks += [bottleneck(module, dim, width, num_frames=num_frames, **options) for _ in range(last)]
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
        return self.final(self.stages(self.stem(x)))

    def forward_head(self, x: Float[Tensor, "b d t h w"], pre_logits: bool = False) -> Float[Tensor, "b classes"]:
        x = self.head_drop(x.mean(dim=(2, 3, 4)))
        return x if pre_logits else self.head(x)

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
