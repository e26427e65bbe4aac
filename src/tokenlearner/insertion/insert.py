"""The one verb: put a TokenLearner into a host transformer, take it out again, look at what it attends to.

Knows no particular host; what differs between libraries is in the adapter :func:`host_of` returns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import positive_int
from tokenlearner.core.fuser import Reproject, TokenFuser, Unpool
from tokenlearner.core.learner import Kind, Pool, TokenLearner
from tokenlearner.core.spacetime import NeighbourTokenLearner, WindowTokenLearner
from tokenlearner.insertion.host import Host
from tokenlearner.insertion.hosts import host_of
from tokenlearner.insertion.layers import (
    FusedLayer,
    GridRecord,
    LearnTokens,
    LeaveGrid,
    by_slice,
    drop_hooks,
    evaluating,
    hook_layer,
    input_of,
    is_compiled,
    slices_of,
    split_prefix,
    tokens_first,
    unmasked,
)
from tokenlearner.insertion.spec import FUSERS, FuserKind, Insertion, Mix, Over, resolve_at

__all__ = [
    "attention_maps",
    "host_of",
    "insert",
    "inserted_parameters",
    "insertion_of",
    "learners",
    "remove",
]

ModelT = TypeVar("ModelT", bound=nn.Module)

SPEC = "token_learner_insertion"  # the attribute of the model that holds its Insertion
_WINDOWS = {"neighbours": 3, "window": 2}  # the window for each `over`, where none is given


def insert(
    model: ModelT,
    num_tokens: int = 8,
    at: int | float = 0.5,
    kind: Kind = "mlp",
    fuser: FuserKind | None = None,
    extra_layers: int = 0,
    *,
    pool: Pool | None = None,
    hidden_dim: int = 64,
    dropout: float = 0.0,
    mix: Mix = "slice",
    over: Over = "slice",
    window: int | None = None,
) -> ModelT:
    """Inserts a TokenLearner into ``model``, in place, and returns the model (paper, section 3.1).

    Without a fuser one learner sits before layer ``at``, and every layer from there on runs on ``num_tokens`` tokens
    (and the prefix tokens: cls, registers, distillation, which pass around). With one, every layer from ``at`` on
    becomes TokenLearner → Transformer → fuser with residual, so the model keeps all its tokens.

    A learned token has no place on the grid. What a host tells its layers about places therefore does not reach the
    layers that run on learned tokens: rotary embeddings do not rotate them (prefix tokens are not rotated either), and
    a relative position bias is zero between them; what it has for the class token stays. Position embeddings added
    before the first layer are in the tokens already. Parameters that only such layers would use stay in the model and
    get no gradient.

    In a video host (``ViViT``) the same learner makes ``num_tokens`` tokens of every slice of the clip, so the layers
    run on ``num_tokens`` × slices; with ``over="window"`` of every ``window`` slices, so on as many times fewer.

    The host's own state-dict keys do not change, and :func:`remove` restores it. The grid comes from the host's patch
    embedding at run time, so non-square and dynamic image sizes work.

    Args:
        model: A plain ViT of timm (``VisionTransformer``, ``Eva``, ``Beit``, ``VisionTransformerRelPos``, ``NaFlexVit``
            for images, ``Cait``) or of transformers, or :class:`tokenlearner.models.ViViT`; docs/hosts.md has the list.
        num_tokens: Tokens S.
        at: An int is a layer index: ``at=6`` runs six layers on the full grid. A float in [0, 1] is a share of the
            host's own depth, rounded down: on 12 layers 0.5 is 6, 0.3 is 3. So ``at=1`` (after the first layer) and
            ``at=1.0`` (after the last) differ.
        kind: The form of α, see :class:`TokenLearner`.
        fuser: None, ``"fuser"`` (TokenFuser), ``"unpool"`` or ``"reproject"``.
        extra_layers: Layers of the host's own kind appended after its last. They start as the identity, so the
            output does not change until they are trained (with ``"unpool"`` it does: its maps start random and have
            no factor that could be zero).
        pool, hidden_dim, dropout: Passed to the TokenLearner (and hidden_dim, dropout to the fuser).
        mix: What a TokenFuser of a video host mixes: ``"slice"`` the tokens of one slice (official code), ``"clip"``
            all tokens of the clip (the paper's equation); then clips must keep the number of slices the host has now.
        over: What a token of a video host is learned from: ``"slice"`` one slice (the paper), ``"neighbours"`` one
            slice, with maps that also see the slices around it (:class:`NeighbourTokenLearner`), ``"window"`` several
            slices together (:class:`WindowTokenLearner`; without a fuser, which would need tokens of each slice). The
            latter two take the kinds that look at the picture: mlp, conv, conv1 and gate.
        window: With ``over="neighbours"`` the slices a map sees, an odd number, 3 when None; with ``over="window"``
            the slices that share their tokens, 2 when None, of which clips must have a multiple.

    Raises:
        TypeError: The model is no host we know, with the reason where it looks like one.
        ValueError: It is one, but compiled, sharded, already inserted, or dropping patches; or a size does not fit.
    """
    if (present := insertion_of(model)) is not None:
        raise ValueError(f"the model already has {present.describe()}; call remove(model) first")
    host = host_of(model)
    host.check()
    if fuser is not None and fuser not in FUSERS:
        raise ValueError(f"fuser is None or one of {', '.join(FUSERS)}, not {fuser!r}")
    if fuser == "unpool" and kind == "average":
        raise ValueError("fuser 'unpool' spreads tokens by the learner's maps, and kind 'average' has none")
    if mix not in ("slice", "clip"):
        raise ValueError(f"mix is 'slice' or 'clip', not {mix!r}")
    if mix == "clip" and (fuser != "fuser" or host.slices() is None):
        needed = "a host that takes clips" if fuser == "fuser" else "fuser='fuser'"
        raise ValueError(f"mix='clip' mixes the tokens of all slices in a TokenFuser, so it needs {needed}")
    window = _resolve_window(over, window, fuser, host)
    if isinstance(extra_layers, bool) or not isinstance(extra_layers, int) or extra_layers < 0:
        raise ValueError(f"extra_layers must be a whole number from 0 on, not {extra_layers!r}")
    depth = len(host.layers())
    layers = depth + extra_layers
    index = resolve_at(at, depth, layers)
    if fuser and index == layers:
        raise ValueError(
            f"at={at} is after the last of {layers} layers, so there is no layer to fuse; give a smaller at"
        )
    if index == layers and all(module is not host.after_layers() for module in model.modules()):
        raise ValueError(
            f"at={at} is after the last of {layers} layers, and {type(model).__name__} has no module there that all "
            "tokens pass; give a smaller at"
        )
    spec = Insertion(num_tokens, index, depth, kind, fuser, extra_layers, pool, hidden_dim, dropout, mix, over, window)

    # Everything that can fail is built before the host is touched.
    fused = range(index, layers) if fuser else range(index, index + 1)
    learners = {i: _like_host(host, partial(_new_learner, spec, host)) for i in fused}
    fusers = {i: _like_host(host, partial(_new_fuser, spec, host, learners[i])) for i in fused} if fuser else {}
    extra = [host.new_identity_layer(depth + i) for i in range(extra_layers)]

    record = GridRecord()
    host.append_layers(extra)
    host.watch_grid(record)
    host.lose_grid(index, layers, num_tokens)
    prefix, without_grid = host.num_prefix_tokens, host.without_grid
    for i in fused:
        if fuser:
            block = host.layers()[i]
            host.layers()[i] = FusedLayer(block, learners[i], fusers[i], prefix, record, without_grid)
        else:
            carrier = host.layers()[i] if i < layers else host.after_layers()
            carrier.token_learner = learners[i]
            hook_layer(carrier, LearnTokens(prefix, record, without_grid))
    if not fuser and without_grid is not unmasked:  # every layer is handed the grid's own, so each has to lose it
        for layer in list(host.layers())[index + 1 :]:
            hook_layer(layer, LeaveGrid(without_grid))
    setattr(model, SPEC, spec)
    if not fuser:
        host.guard_intermediates(spec)
    return model


def remove(model: ModelT) -> ModelT:
    """Takes the insertion out again, in place, and returns the model.

    Structure and state-dict keys are the host's own again; its weights are those it has now.

    Raises:
        ValueError: Nothing is inserted.
    """
    spec = insertion_of(model)
    if spec is None:
        raise ValueError(f"{type(model).__name__} has no TokenLearner to remove")
    host = host_of(model)
    host.unguard_intermediates()
    host.unwatch_grid()
    host.regain_grid()
    for layer in host.layers():
        drop_hooks(layer, LeaveGrid)
    for _, carrier in _carriers(model):
        if isinstance(carrier, FusedLayer):
            del carrier.token_learner, carrier.token_fuser
            position = next(i for i, layer in enumerate(host.layers()) if layer is carrier)
            host.layers()[position] = carrier.block
        else:
            del carrier.token_learner
            drop_hooks(carrier, LearnTokens)
    host.truncate_layers(spec.host_depth)
    delattr(model, SPEC)
    return model


def insertion_of(model: nn.Module) -> Insertion | None:
    """What is inserted in ``model``, or None."""
    return getattr(model, SPEC, None)


def learners(model: nn.Module) -> dict[int, TokenLearner]:
    """The TokenLearners of ``model`` by the index of the layer they feed.

    Where nothing was inserted: those the model was built with, numbered from 0 in the order of ``model.modules()``.
    """
    if insertion_of(model) is None:
        return dict(enumerate(module for module in model.modules() if isinstance(module, TokenLearner)))
    return {index: cast(TokenLearner, carrier.token_learner) for index, carrier in _carriers(model)}


def inserted_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Names and parameters that came with the insertion: learners, fusers and extra layers."""
    spec = insertion_of(model)
    if spec is None:
        return {}
    new_layers = {id(p) for layer in list(host_of(model).layers())[spec.host_depth :] for p in layer.parameters()}
    return {
        name: p
        for name, p in model.named_parameters()
        if id(p) in new_layers or {"token_learner", "token_fuser"} & set(name.split("."))
    }


@torch.no_grad()
def attention_maps(
    model: nn.Module, images: Float[Tensor, "b c *frames height width"]
) -> dict[int, Float[Tensor, "b *slices s h w"]]:
    """The maps of every TokenLearner in ``model`` for a batch of preprocessed images or clips.

    Returns a dictionary from layer index to maps over the patch grid, (b, s, h, w) for images and (b, t, s, h, w) for
    clips of t slices, in float32; see :meth:`TokenLearner.maps` for their scale. With ``over="window"`` a slice's maps
    are its part of its window's, so a ``"mlp"`` map sums to 1 over all slices of the window, not over one. The model
    runs in eval mode and is left as it was.

    A model that was built with TokenLearners and got none by :func:`insert` is looked at too: its maps have the keys
    :func:`learners` gives, those of a learner that is called several times are of its last call, and a learner that is
    not called is left out. One that sees k > 1 feature maps for every input, such as a clip's frames (those of one clip
    in a row), has maps (b, k, s, h, w).

    Args:
        model: As :func:`insert` returned it, or any network with TokenLearners that takes one tensor.
        images: The batch of b images or clips, as the model takes them.

    Raises:
        ValueError: The model has no TokenLearner, or its kind has no maps.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile returned wraps the model; hooks go into the latter
    if not learners(model):
        raise ValueError(f"{type(model).__name__} has no TokenLearner; insert(model) one first")
    found: dict[int, Tensor] = {}

    def keep_inserted(index: int, carrier: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count, record = _context(carrier)
        x = tokens_first(args, kwargs)[0][0]
        _, X = split_prefix(x, count)
        grid = record.read(x, X.shape[1])
        learner = cast(TokenLearner, carrier.token_learner)
        slices, frame = slices_of(X, grid)
        A = by_slice(learner, learner.maps(input_of(learner, slices, grid), frame))
        one_by_one = len(grid) == 3 and A.ndim == 4
        found[index] = rearrange(A, "(b t) s h w -> b t s h w", t=grid[0]) if one_by_one else A

    def keep_own(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        learner = cast(TokenLearner, module)
        A = by_slice(learner, learner.maps(*args, **kwargs))
        batch = len(images)
        several = A.ndim == 4 and len(A) > batch > 0 and len(A) % batch == 0
        found[index] = rearrange(A, "(b k) s h w -> b k s h w", b=batch) if several else A

    if insertion_of(model) is None:  # after other hooks, which may change what the learner gets
        handles = [
            learner.register_forward_pre_hook(partial(keep_own, index), with_kwargs=True)
            for index, learner in learners(model).items()
        ]
    else:  # before the insertion's own, which replaces it
        handles = [
            carrier.register_forward_pre_hook(partial(keep_inserted, index), prepend=True, with_kwargs=True)
            for index, carrier in _carriers(model)
        ]
    try:
        with evaluating(model), _uncompiled(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(found.items()))


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which a compiled model runs eagerly: compiled code does not see hooks that came later."""
    if any(is_compiled(module) for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _carriers(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """The modules that carry a learner, with the index of the layer it feeds."""
    if insertion_of(model) is None:
        return []
    host = host_of(model)
    places = [*enumerate(host.layers()), (len(host.layers()), host.after_layers())]
    return [(index, module) for index, module in places if "token_learner" in module._modules]


def _context(carrier: nn.Module) -> tuple[int, GridRecord]:
    if isinstance(carrier, FusedLayer):
        return carrier.num_prefix_tokens, carrier.record
    hook = next(hook for hook in carrier._forward_pre_hooks.values() if isinstance(hook, LearnTokens))
    return hook.num_prefix_tokens, hook.record


def _resolve_window(over: Over, window: int | None, fuser: FuserKind | None, host: Host) -> int | None:
    """The window to use, after a look at whether ``over`` goes with the rest."""
    if over != "slice" and over not in _WINDOWS:
        raise ValueError(f"over is 'slice', 'neighbours' or 'window', not {over!r}")
    if over == "slice":
        if window is not None:
            raise ValueError(
                f"window={window} counts slices for over='neighbours' or over='window', and over='slice' looks at one"
            )
        return None
    slices = host.slices()
    if slices is None:
        raise ValueError(f"over={over!r} learns tokens over time, so it needs a host that takes clips")
    window = positive_int("window", _WINDOWS[over] if window is None else window)
    if over == "window" and fuser is not None:
        raise ValueError(
            f"over='window' leaves no tokens of a single slice, which fuser={fuser!r} would spread over that slice; "
            "use over='neighbours', or no fuser"
        )
    if over == "window" and slices % window:
        raise ValueError(f"window={window} does not divide the {slices} slices of the host's clips; give one that does")
    return window


def _new_learner(spec: Insertion, host: Host) -> TokenLearner:
    options: dict[str, Any] = {"pool": spec.pool, "hidden_dim": spec.hidden_dim, "dropout": spec.dropout}
    if spec.window is None:
        grid = host.grid() if spec.kind == "dense" else None
        return TokenLearner(host.dim, spec.num_tokens, spec.kind, grid, **options)
    over_time = NeighbourTokenLearner if spec.over == "neighbours" else WindowTokenLearner
    return over_time(host.dim, spec.num_tokens, spec.kind, window=spec.window, **options)


def _new_fuser(spec: Insertion, host: Host, learner: TokenLearner) -> nn.Module:
    if spec.fuser == "fuser":
        frames = host.slices() if spec.mix == "clip" else None
        return TokenFuser(
            host.dim, spec.num_tokens, num_frames=frames, hidden_dim=spec.hidden_dim, dropout=spec.dropout
        )
    if spec.fuser == "unpool":
        return Unpool(normalize=learner.pool == "softmax" or spec.kind == "grid")
    return Reproject(host.dim, host.num_heads)


def _like_host(host: Host, build: Any) -> Any:
    """Builds a module on the host's device, in its dtype and mode."""
    parameter = next(p for p in host.layers().parameters() if p.is_floating_point())
    with torch.device(parameter.device):
        module = build()
    return module.to(parameter.dtype).train(host.model.training)
