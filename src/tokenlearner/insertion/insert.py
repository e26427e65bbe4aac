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

from tokenlearner.core.fuser import Reproject, TokenFuser, Unpool
from tokenlearner.core.learner import Kind, Pool, TokenLearner
from tokenlearner.insertion.layers import (
    FusedLayer,
    GridRecord,
    LearnTokens,
    drop_hooks,
    evaluating,
    slices_of,
    split_prefix,
)
from tokenlearner.insertion.spec import FUSERS, FuserKind, Insertion, Mix, resolve_at
from tokenlearner.insertion.timm import TimmViT, is_compiled

ModelT = TypeVar("ModelT", bound=nn.Module)

_SPEC = "token_learner_insertion"  # the attribute of the model that holds its Insertion


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
) -> ModelT:
    """Inserts a TokenLearner into ``model``, in place, and returns the model (paper, section 3.1).

    Without a fuser one learner sits before layer ``at``, and every layer from there on runs on ``num_tokens`` tokens
    (and the prefix tokens: cls, registers, distillation, which pass around). With one, every layer from ``at`` on
    becomes TokenLearner → Transformer → fuser with residual, so the model keeps all its tokens.

    In a video host (``ViViT``) the same learner makes ``num_tokens`` tokens of every slice of the clip, so the layers
    run on ``num_tokens`` × slices.

    The host's own state-dict keys do not change, and :func:`remove` restores it. The grid comes from the host's patch
    embedding at run time, so non-square and dynamic image sizes work.

    Args:
        model: A timm ``VisionTransformer``, or :class:`tokenlearner.models.ViViT`.
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

    Raises:
        TypeError: The model is no host we know.
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
    if isinstance(extra_layers, bool) or not isinstance(extra_layers, int) or extra_layers < 0:
        raise ValueError(f"extra_layers must be a whole number from 0 on, not {extra_layers!r}")
    depth = len(host.layers())
    layers = depth + extra_layers
    index = resolve_at(at, depth, layers)
    if fuser and index == layers:
        raise ValueError(
            f"at={at} is after the last of {layers} layers, so there is no layer to fuse; give a smaller at"
        )
    spec = Insertion(num_tokens, index, depth, kind, fuser, extra_layers, pool, hidden_dim, dropout, mix)

    # Everything that can fail is built before the host is touched.
    fused = range(index, layers) if fuser else range(index, index + 1)
    learners = {i: _like_host(host, partial(_new_learner, spec, host)) for i in fused}
    fusers = {i: _like_host(host, partial(_new_fuser, spec, host, learners[i])) for i in fused} if fuser else {}
    extra = [host.new_identity_layer(depth + i) for i in range(extra_layers)]

    record = GridRecord()
    host.append_layers(extra)
    host.watch_grid(record)
    for i in fused:
        if fuser:
            block = host.layers()[i]
            host.layers()[i] = FusedLayer(block, learners[i], fusers[i], host.num_prefix_tokens, record)
        else:
            carrier = host.layers()[i] if i < layers else host.after_layers()
            carrier.token_learner = learners[i]
            carrier.register_forward_pre_hook(LearnTokens(host.num_prefix_tokens, record), with_kwargs=True)
    setattr(model, _SPEC, spec)
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
    for _, carrier in _carriers(model):
        if isinstance(carrier, FusedLayer):
            del carrier.token_learner, carrier.token_fuser
            position = next(i for i, layer in enumerate(host.layers()) if layer is carrier)
            host.layers()[position] = carrier.block
        else:
            del carrier.token_learner
            drop_hooks(carrier, LearnTokens)
    host.truncate_layers(spec.host_depth)
    delattr(model, _SPEC)
    return model


def insertion_of(model: nn.Module) -> Insertion | None:
    """What is inserted in ``model``, or None."""
    return getattr(model, _SPEC, None)


def learners(model: nn.Module) -> dict[int, TokenLearner]:
    """The TokenLearners of ``model`` by the index of the layer they feed."""
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
    clips of t slices, in float32; see :meth:`TokenLearner.maps` for their scale. The model runs in eval mode and is
    left as it was.

    Raises:
        ValueError: The model has no TokenLearner, or its kind has no maps.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile returned wraps the model; hooks go into the latter
    carriers = _carriers(model)
    if not carriers:
        raise ValueError(f"{type(model).__name__} has no TokenLearner; insert(model) one first")
    found: dict[int, Tensor] = {}

    def keep(index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        count, record = _context(module)
        _, X = split_prefix(args[0], count)
        grid = record.read(args[0], X.shape[1])
        A = cast(TokenLearner, module.token_learner).maps(*slices_of(X, grid))
        found[index] = A if len(grid) == 2 else rearrange(A, "(b t) s h w -> b t s h w", t=grid[0])

    handles = [
        carrier.register_forward_pre_hook(lambda m, a, i=index: keep(i, m, a), prepend=True)
        for index, carrier in carriers
    ]
    try:
        with evaluating(model), _uncompiled(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def host_of(model: nn.Module) -> TimmViT:
    """The adapter for ``model``'s family.

    Raises:
        TypeError: No family we know, with what to give instead.
    """
    if TimmViT.fits(model):
        return TimmViT(model)
    raise TypeError(TimmViT.why_not(model))


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


def _new_learner(spec: Insertion, host: TimmViT) -> TokenLearner:
    return TokenLearner(
        host.dim,
        spec.num_tokens,
        spec.kind,
        grid=host.grid() if spec.kind == "dense" else None,
        pool=spec.pool,
        hidden_dim=spec.hidden_dim,
        dropout=spec.dropout,
    )


def _new_fuser(spec: Insertion, host: TimmViT, learner: TokenLearner) -> nn.Module:
    if spec.fuser == "fuser":
        frames = host.slices() if spec.mix == "clip" else None
        return TokenFuser(
            host.dim, spec.num_tokens, num_frames=frames, hidden_dim=spec.hidden_dim, dropout=spec.dropout
        )
    if spec.fuser == "unpool":
        return Unpool(normalize=learner.pool == "softmax" or spec.kind == "grid")
    return Reproject(host.dim, host.num_heads)


def _like_host(host: TimmViT, build: Any) -> Any:
    """Builds a module on the host's device, in its dtype and mode."""
    parameter = next(p for p in host.layers().parameters() if p.is_floating_point())
    with torch.device(parameter.device):
        module = build()
    return module.to(parameter.dtype).train(host.model.training)
