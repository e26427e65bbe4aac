"""The baseline that has no notion of time: an image ViT sees every frame by itself, and their features are averaged."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokenlearner.errors import InputError


class FrameAverageViT(VisionTransformer):
    """A timm VisionTransformer for clips (b, c, t, h, w) of any length; the head reads the mean over their frames.

    The order of the frames can't make a difference.
    """

    takes_clips = True
    """Told apart by this from models of images, without importing the class."""

    def forward_features(
        self, x: Float[Tensor, "b c t h w"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b t n d"]:
        """The tokens of every frame.

        Raises:
            InputError: ``x`` is no batch of clips.
        """
        if x.ndim != 5:
            raise InputError(f"the model takes clips as (b, c, t, h, w), and got shape {tuple(x.shape)}")
        tokens = super().forward_features(rearrange(x, "b c t h w -> (b t) c h w"), attn_mask, is_causal)
        return rearrange(tokens, "(b t) n d -> b t n d", b=len(x))

    def forward_head(self, x: Float[Tensor, "b t n d"], pre_logits: bool = False) -> Tensor:
        frames = super().forward_head(rearrange(x, "b t n d -> (b t) n d"), pre_logits=True)
        mean = rearrange(frames, "(b t) d -> b t d", b=len(x)).mean(dim=1)
        return mean if pre_logits else self.head(mean)
