"""What insertion needs to know of the vision models of transformers, and the reasons some of them can't be hosts.

Served are the models whose layers take (b, n, d) tokens in the order of the grid, and nothing that depends on a token's
place that could not be taken away. Learned tokens have no place: they are not rotated (DINOv3, V-JEPA 2), and between
them there is no relative position bias (BEiT), only that to and from the class token.

``output_hidden_states`` and ``output_attentions`` give what each layer had, so after a plain insertion they change in
length; with ``at=0`` the first hidden state already is the learned tokens.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenlearner.core.alpha import Grid
from tokenlearner.insertion import huggingface_saving as saving
from tokenlearner.insertion.host import Host
from tokenlearner.insertion.huggingface_families import FUSED, HOSTS, REFUSED
from tokenlearner.insertion.huggingface_layers import (
    NoteConvGrid,
    OffGridBias,
    RefuseMask,
    SkipPredictor,
    drop_all,
    forget_captures,
    return_checkpointing,
    take_fused_class,
    without_grid,
)
from tokenlearner.insertion.layers import GridRecord, WithoutGrid, drop_hooks, is_compiled
from tokenlearner.insertion.spec import Insertion


class HuggingFaceViT(Host):
    """Adapter for the vision transformers of transformers named in ``FAMILIES``, bare or with a classifier.

    The model's class and config become those of :mod:`tokenlearner.insertion.huggingface_saving`, derived from the
    former, until :func:`tokenlearner.remove`.
    """

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, PreTrainedModel)
        self.model = model
        self.family, path = next(HOSTS[kind] for kind in type(model).__mro__ if kind in HOSTS)
        self.tower = cast(Any, model).get_submodule(path)
        self.config = self.tower.config
        config = self.config
        self.num_tokens = 0  # known once the grid is lost
        self.dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_prefix_tokens = self.family.prefix + getattr(config, "num_register_tokens", 0)

    @staticmethod
    def fits(model: object) -> bool:
        return isinstance(model, tuple(HOSTS))

    @staticmethod
    def why_not(model: object) -> str:
        """Why ``model``, of transformers, is no host."""
        name = type(model).__name__
        for start, reason in REFUSED.items():
            if name.startswith(start):
                return f"{name} can't be a host: {reason}"
        return f"{name} is no host that is known; of transformers' models these are: " + ", ".join(
            kind.__name__ for kind in HOSTS
        )

    def check(self) -> None:
        """Refuses what would come out wrong.

        Raises:
            ValueError: With the reason.
        """
        model = self.model
        name = type(model).__name__
        if any(is_compiled(m) for m in model.modules()):
            raise ValueError("the model or a layer of it is compiled and would not see the insertion; insert first")
        if any(base.__name__ == "FSDPModule" for m in model.modules() for base in type(m).__mro__):
            raise ValueError("the model is sharded, and new parameters would stay unmanaged; insert, then fully_shard")
        if type(model) not in saving.MODELS and type(model) not in saving.MODELS.values():
            raise ValueError(
                f"{name} is a class of your own, which may use its layers in another way and which from_pretrained "
                f"could not find again; insert into a {next(k for k in type(model).__mro__ if k in HOSTS).__name__}"
            )
        inside = [place for place, m in model.named_modules() if "token_learner" in m._modules]
        if inside:
            raise ValueError(f"{name} already has a TokenLearner in {inside[0]}; remove it from the model it is in")
        if not isinstance(self._patches(), nn.Conv2d | nn.Conv3d):
            raise ValueError(
                f"the host's patches are made by a {type(self._patches()).__name__}, which does not tell their grid; "
                "load the model without fusion_config"
            )
        if not len(self.layers()):
            raise ValueError("the host has no layers")

    def layers(self) -> nn.ModuleList:
        return self.tower.get_submodule(self.family.layers)

    def after_layers(self) -> nn.Module:
        """The module every token passes after the last layer; one that is not in the model where there is none."""
        found = functools.reduce(getattr, self.family.after.split("."), self.tower) if self.family.after else None
        return found if isinstance(found, nn.Module) else nn.Identity()

    def grid(self) -> Grid:
        """The (h, w) of the image size the host was built for."""
        config = self.config
        size = getattr(config, "crop_size", None) or config.image_size
        tubelet = getattr(config, "tubelet_size", None)
        patch = tubelet[1:] if isinstance(tubelet, list | tuple) else config.patch_size
        (height, width), (rows, columns) = _pair(size), _pair(patch)
        return height // rows, width // columns

    def slices(self) -> int | None:
        """Slices of the clips the host was built for; None where it takes images."""
        config = self.config
        tubelet = getattr(config, "tubelet_size", None)
        if tubelet is None:
            return None
        frames: int = config.frames_per_clip if hasattr(config, "frames_per_clip") else config.num_frames
        return frames // (tubelet[0] if isinstance(tubelet, list | tuple) else tubelet)

    def watch_grid(self, record: GridRecord) -> None:
        if not isinstance(self.model, saving.WithTokenLearner):
            saving.take_class(self.model)
        self._patches().register_forward_hook(NoteConvGrid(record))

    def unwatch_grid(self) -> None:
        drop_hooks(self._patches(), NoteConvGrid)

    def lose_grid(self, first: int, last: int, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        if self.family.position in ("none", "bias"):
            self.tower.register_forward_pre_hook(RefuseMask(), with_kwargs=True)
        for bias in self._own_biases(first, last):
            bias.register_forward_hook(OffGridBias(num_tokens), with_kwargs=True)

    def regain_grid(self) -> None:
        drop_all(self.tower, RefuseMask, SkipPredictor)
        for bias in self._own_biases():
            drop_hooks(bias, OffGridBias)
        for layer in self.layers():
            return_checkpointing(layer)

    @property
    def without_grid(self) -> WithoutGrid:  # type: ignore[override]
        """A function; see :meth:`Host.without_grid`."""
        return without_grid(self.family.position, self.num_tokens, getattr(self.tower, "shared_position_bias", None))

    def settle(self, spec: Insertion) -> None:
        """What is left to do when the learners are in place."""
        forget_captures(self.model)
        for layer in self.layers():
            take_fused_class(layer, FUSED)
        if self.family.position == "index" and spec.fuser is None:
            self.tower.register_forward_pre_hook(SkipPredictor(), with_kwargs=True)

    def unsettle(self) -> None:
        """Undoes :meth:`settle`, with the host's own layers back in place."""
        forget_captures(self.model)
        saving.give_class_back(self.model)

    def new_identity_layer(self, index: int) -> nn.Module:
        """A fresh layer like the host's last, with its residual branches scaled by zero.

        Raises:
            ValueError: The branches of the host's layers could not be found.
        """
        layer = copy.deepcopy(self.layers()[-1]).requires_grad_()  # a frozen host's new layers are to train
        layer.apply(self.tower._init_weights)
        named = dict(layer.named_parameters())
        ends = [p for name, p in named.items() if name.endswith(_SCALES)]
        ends = ends or [p for name, p in named.items() if name.rpartition(".")[0].endswith(_BRANCH_ENDS)]
        with torch.no_grad():
            for parameter in ends:
                parameter.zero_()
        self._assert_identity(layer)
        return layer

    def append_layers(self, layers: list[nn.Module]) -> None:
        self.layers().extend(layers)

    def truncate_layers(self, depth: int) -> None:
        while len(self.layers()) > depth:
            del self.layers()[-1]

    def guard_intermediates(self, spec: Insertion) -> None:
        return  # no class that is served puts its layers' outputs back on the grid

    def unguard_intermediates(self) -> None:
        return

    def _own_biases(self, first: int = 0, last: int | None = None) -> list[nn.Module]:
        """The relative position biases that layers have to themselves."""
        found = [layer._modules.get("relative_position_bias") for layer in self.layers()[first:last]]
        return [bias for bias in found if bias is not None]

    def _patches(self) -> nn.Module:
        return self.tower.get_submodule(self.family.patches)

    def _assert_identity(self, layer: nn.Module) -> None:
        parameter = next(layer.parameters())
        if parameter.is_meta:
            return
        count = self.num_prefix_tokens + 4
        x = torch.linspace(-1, 1, count * self.dim, device=parameter.device, dtype=parameter.dtype)
        x = x.reshape(1, count, self.dim)
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
            "none": ((), {} if self.family.layer == "VideoMAELayer" else {"attention_mask": None}),
            "rope": ((), {"position_embeddings": (x.new_zeros(0, 1), x.new_zeros(0, 1))}),
            "index": ((None,), {}),
            "bias": ((), {"resolution": tuple(2 * side for side in _pair(self.config.patch_size))}),
        }
        args, kwargs = calls[self.family.position]
        mode = layer.training
        layer.eval()
        with torch.no_grad():
            out = layer(x, *args, **kwargs)
        layer.train(mode)
        if not torch.equal(_first(out), x):
            raise ValueError(
                f"extra_layers: can't tell which layers end the residual branches of {type(layer).__name__}, "
                "so new ones can't start as the identity; use extra_layers=0"
            )


# The parameters that scale a residual branch, and else the last linear layer of each, in every layer class served.
_SCALES = ("lambda1", "lambda_1", "lambda_2")
_BRANCH_ENDS = ("attention.o_proj", "self_attn.out_proj", "attention.proj", "output.dense", "mlp.fc2", "mlp.down_proj")


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
