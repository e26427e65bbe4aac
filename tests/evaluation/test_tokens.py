"""Tokens as they come out of a model that is stopped early are those of the whole forward pass, frame by frame."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import tokenlearner
from export.families import CLIPS, FAMILIES, clip_model, image_model, ready, x2plus1d
from insertion.hosts import DEPTH, images, inserted, naive_layers, tiny
from tokenlearner import Preprocessing
from tokenlearner.core import TokenLearner
from tokenlearner.data.clips import ClipTransform
from tokenlearner.data.streaming import Pictures
from tokenlearner.data.videos import DamagedVideo, FrameFolder, read_clip
from tokenlearner.data.write_video import write_video
from tokenlearner.errors import InputError
from tokenlearner.evaluation.tokens import inserted_alone, rate_of, stream_tokens, tokens_of
from tokenlearner.insertion import insertion_of, learners
from tokenlearner.insertion.hosts import host_of
from tokenlearner.insertion.huggingface_folder import TransformersModel

PREPROCESSING = Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop_pct=0.9)
WITHOUT_FUSER = [
    name
    for name in FAMILIES
    if not any(word in name for word in ("without", "fuser", "reproject", "unpool", "X(2+1)D"))
]


def made(family: str) -> nn.Module:
    if family.startswith("transformers"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    return FAMILIES[family]()


def input_of(model: nn.Module) -> torch.Tensor:
    """Two images or clips; video models of transformers that are not wrapped take frames first."""
    shape = model.preprocessing.model_input
    frames_first = (
        type(model).__module__.startswith(("transformers", "tokenlearner.insertion.hugg")) and len(shape) == 4
    )
    return torch.randn(2, *((shape[1], shape[0], *shape[2:]) if frames_first else shape))


def outputs_of(module: nn.Module, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What ``module`` returns while the whole of ``model`` runs."""
    found = []
    handle = module.register_forward_hook(
        lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    model(x)
    handle.remove()
    return found


# ---- the tokens of a batch


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
@pytest.mark.parametrize("at", [0, 2, DEPTH])
def test_tokens_are_those_of_the_pass_written_out_by_hand(at, options):
    host = tiny(fc_norm=False, **options)
    model = inserted(host, 3, at)
    x, seen = images(), {}
    last = naive_layers(host, model, x, seen)[-1][:, host.num_prefix_tokens :]
    assert_close(tokens_of(model, x), last)
    assert_close(tokens_of(model, x, "learned"), learners(model)[at](seen[at], (4, 4)))


@pytest.mark.parametrize("family", WITHOUT_FUSER)
@torch.no_grad()
def test_every_family_of_hosts(family):
    model = made(family)
    x, host, spec = input_of(model), host_of(model), insertion_of(model)
    (learned,) = outputs_of(next(m for m in model.modules() if isinstance(m, TokenLearner)), model, x)
    expected = learned.reshape(2, -1, spec.tokens, learned.shape[-1])
    found = tokens_of(model, x, "learned")
    assert_close(found, expected if host.slices() else expected[:, 0])

    if type(host).__name__ == "TimmCait":  # whose norm sees the class token too
        (last,) = outputs_of(model.blocks[-1], model, x)
    elif hasattr(model, "forward_features"):
        last = model.forward_features(x)
        last = last["patches"] if isinstance(last, dict) else last[:, host.num_prefix_tokens :]
    else:
        last = host.tower(x).last_hidden_state[:, host.num_prefix_tokens :]
    expected = last.reshape(2, -1, spec.tokens, last.shape[-1])
    assert_close(tokens_of(model, x), expected if host.slices() else expected[:, 0])


@pytest.mark.parametrize(("over", "slices"), [("slice", 3), ("neighbours", 3), ("window", 1)])
def test_a_clip_has_tokens_of_each_slice_or_window(over, slices):
    model = clip_model(over=over, window=3 if over != "slice" else None)
    x = torch.randn(2, *CLIPS.model_input)
    assert tokens_of(model, x).shape == (2, slices, 4, 32)
    assert_close(tokens_of(model, x).flatten(1, 2), model.forward_features(x))


@pytest.mark.parametrize("family", ["transformers ViT", "transformers ViViT"])
@torch.no_grad()
def test_a_model_from_a_folder_of_transformers(family):
    model = made(family)
    x = input_of(model)
    wrapped = TransformersModel(model)
    taken = x.transpose(1, 2) if wrapped.takes_clips else x  # it takes clips as ours do
    for layer in ("learned", "last"):
        assert_close(tokens_of(wrapped, taken, layer), tokens_of(model, x, layer))


def test_only_some_tokens_of_an_elastic_model():
    model = tokenlearner.set_num_tokens(inserted(tiny(), 6, 2), 2)
    x = images()
    assert_close(tokens_of(model, x), model.forward_features(x)[:, 1:])
    assert tokens_of(model, x, "learned").shape == (2, 2, 32)


def test_nothing_after_the_tokens_runs():
    model = inserted(tiny(), 4, 2)
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    tokens_of(model, images(), "learned")
    assert "blocks.1" in ran
    assert "norm" not in ran
    assert not any(name.startswith(("blocks.3", "blocks.2.attn", "head")) for name in ran)
    ran.clear()
    tokens_of(model, images())
    assert "norm" in ran
    assert not any(name.startswith("head") for name in ran)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


@pytest.mark.parametrize("family", ["mlp", "transformers ViT"])
def test_the_model_is_as_it_was(family):
    model = made(family)
    x = input_of(model)
    before = model(x)
    for layer in ("learned", "last"):
        tokens_of(model, x, layer)
    after = model(x)
    assert torch.equal(*(out if isinstance(out, torch.Tensor) else out.logits for out in (before, after)))


def test_gradients_flow_and_the_mode_stays():
    model = image_model().train()
    tokens_of(model, images(), "learned").sum().backward()
    assert model.training
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0
    assert model.blocks[0].attn.qkv.weight.grad is None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny(), "VisionTransformer has no TokenLearner: give"),
        (
            lambda: image_model(fuser="fuser"),
            "before layer 0 of 1 with fuser in every layer: a fuser puts the tokens back",
        ),
        (x2plus1d, "the TokenLearners of X2Plus1D are inside blocks"),
        (lambda: torch.compile(image_model(), backend="eager"), "the model is compiled"),
    ],
    ids=["none", "fuser", "X(2+1)D", "compiled"],
)
def test_models_without_such_tokens(model, reason):
    with pytest.raises(InputError, match=reason):
        inserted_alone(model())


def test_a_layer_that_is_none():
    with pytest.raises(InputError, match="layer is 'learned' or 'last', not 'first'"):
        tokens_of(image_model(), images(), "first")


# ---- the tokens of a video


@pytest.fixture(scope="module")
def noise() -> list[Image.Image]:
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)) for i in range(20)]


@pytest.fixture(scope="module")
def video(noise, tmp_path_factory) -> Path:
    return write_video(noise, tmp_path_factory.mktemp("videos") / "a.mp4", 10)


@pytest.fixture
def model() -> nn.Module:
    return ready(inserted(tiny(), 3, 2), PREPROCESSING)


def joined(rows) -> tuple[torch.Tensor, list[float | None]]:
    rows = list(rows)
    return (
        torch.from_numpy(np.concatenate([some.tokens for some in rows if len(some.tokens)])),
        [second for some in rows for second in some.seconds],
    )


@pytest.mark.parametrize("layer", ["learned", "last"])
@pytest.mark.parametrize(("fps", "times"), [(None, [i / 10 for i in range(20)]), (4.0, [k / 4 for k in range(8)])])
@torch.no_grad()
def test_rows_are_the_frames_one_by_one(model, video, layer, fps, times):
    prepare = PREPROCESSING.transform()
    frames = [prepare(Image.fromarray(frame)) for frame in read_clip(video, times).numpy()]
    expected = torch.cat([tokens_of(model, frame[None], layer) for frame in frames])
    for batch_size in (1, 7, 64):
        sizes = [rows.tokens.shape for rows in stream_tokens(model, video, layer=layer, fps=fps, batch_size=batch_size)]
        assert max(n for n, _, _ in sizes) == min(batch_size, len(times))
        found, seconds = joined(stream_tokens(model, video, layer=layer, fps=fps, batch_size=batch_size))
        assert seconds == pytest.approx(times)
        assert_close(found, expected)


def test_no_more_is_held_than_a_batch(model, video, monkeypatch):
    prepared = []
    transform = PREPROCESSING.transform()
    monkeypatch.setattr(Preprocessing, "transform", lambda _: lambda picture: prepared.append(1) or transform(picture))
    stream = stream_tokens(model, video, batch_size=3)
    assert (next(stream).tokens.shape, len(prepared)) == ((3, 3, 32), 3)
    assert (next(stream).numbers, len(prepared)) == ((3, 4, 5), 6)
    stream.close()


@pytest.mark.parametrize(("over", "steps"), [("slice", 2), ("window", 6)])
@torch.no_grad()
def test_windows_of_a_clip_host_follow_each_other(video, over, steps):
    model = clip_model(over=over, window=3 if over == "window" else None)
    model.preprocessing = Preprocessing((3, 16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), frames=6, fps=8.0, crop_pct=0.8)
    transform = ClipTransform(16, 20, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    times = [k / 8 for k in range(16)]  # two windows of six, and four frames
    expected = []
    for start in (0, 6, 12):
        window = [*times[start : start + 6], *[times[-1]] * (start + 6 - 16)]
        clip = transform(read_clip(video, window, short_side=20))
        expected += tokens_of(model, clip[None])[0]
    kept = -(-16 // steps)
    for batch_size in (1, 12, 100):
        rows = list(stream_tokens(model, video, batch_size=batch_size))
        found, seconds = joined(rows)
        assert_close(found, torch.stack(expected)[:kept])
        assert seconds == times[::steps]
        assert len(rows) == {1: 3, 12: 2, 100: 1}[batch_size]


def test_a_clip_host_takes_the_rate_it_is_given(video):
    model = clip_model()
    assert rate_of(model, video, None) == CLIPS.fps
    assert rate_of(model, video, 3.0) == 3.0
    _, seconds = joined(stream_tokens(model, video, fps=3.0))
    assert seconds == [0, 2 / 3, 4 / 3]
    model.preprocessing = Preprocessing((3, 16, 16), frames=6)
    assert rate_of(model, video, 3.0) == 3.0
    with pytest.raises(InputError, match="does not say how many frames its clips have, and how many a second"):
        next(stream_tokens(model, video))


def test_bf16_computes_in_less_and_answers_in_float32(model, video):
    exact, _ = joined(stream_tokens(model, video))
    rough, _ = joined(stream_tokens(model, video, precision="bf16"))
    assert rough.dtype == exact.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.05 * exact.norm()


# ---- the tokens of pictures


@pytest.fixture
def folder(noise, tmp_path) -> Path:
    for i in range(11):
        noise[i].save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("no picture")
    return tmp_path


@torch.no_grad()
def test_a_damaged_picture_is_left_out_and_named(model, folder, noise):
    rows = list(stream_tokens(model, Pictures(folder), batch_size=2))
    kept = [0, 1, 2, *range(4, 11)]
    assert [number for some in rows for number in some.numbers] == kept
    assert [name for some in rows for name in some.names] == [f"{i}.png" for i in kept]
    assert [Path(damaged.path).name for some in rows for damaged in some.damaged] == ["3.png"]
    found, seconds = joined(rows)
    assert seconds == [None] * 10
    prepare = PREPROCESSING.transform()
    assert_close(found, tokens_of(model, torch.stack([prepare(noise[i]) for i in kept])))
    with pytest.raises(InputError, match=r"3\.png: not an image"):
        list(stream_tokens(model, Pictures(folder), on_error="raise"))


def test_a_batch_of_damaged_pictures_alone_has_no_rows(model, folder):
    rows = list(stream_tokens(model, Pictures(folder), batch_size=1))
    assert [len(some.tokens) for some in rows] == [1, 1, 1, 0] + [1] * 7
    assert len(rows[3].damaged) == 1


def test_frames_of_a_video_in_a_folder(model, folder, noise):
    (folder / "3.png").unlink()
    found, seconds = joined(stream_tokens(model, FrameFolder(folder, 5.0), fps=2.5))
    assert seconds == [k / 2.5 for k in range(5)]
    every, _ = joined(stream_tokens(model, Pictures(folder)))
    assert_close(found, every[::2])


def test_a_damaged_frame_damages_a_clip(folder):
    with pytest.raises(InputError, match=r"3\.png: not an image"):
        list(stream_tokens(clip_model(), FrameFolder(folder, 5.0)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"precision": "fp8"}, "precision is 'float32' or 'bf16', not 'fp8'"),
        ({"fps": 0.0}, "fps is 0.0: give the frames a second, above 0"),
        ({"fps": math.nan}, "fps is nan"),
        ({"device": "cuda:99"}, "there is no device cuda:99"),
        ({"layer": "none"}, "layer is 'learned' or 'last'"),
    ],
)
def test_options_that_are_none(model, video, options, reason):
    with pytest.raises(InputError, match=reason):
        list(stream_tokens(model, video, **options))


def test_sources_that_do_not_fit(model, folder, tmp_path):
    with pytest.raises(InputError, match=r"holds pictures, and 2 a second of them are wanted: say with --frame-fps"):
        next(stream_tokens(model, Pictures(folder), fps=2.0))
    with pytest.raises(InputError, match=r"holds pictures, and the model takes clips: say with --frame-fps"):
        next(stream_tokens(clip_model(), Pictures(folder)))
    with pytest.raises(DamagedVideo, match="no video of a known format"):
        next(stream_tokens(model, folder / "3.png"))
    del model.preprocessing
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        next(stream_tokens(model, Pictures(folder)))
