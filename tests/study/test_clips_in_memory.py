"""Runs on clips: which clips there are, what is random about them, the models, and a training of each kind."""

import itertools
import statistics
from dataclasses import replace

import pytest
import torch
from filmed_squares import film
from sklearn.datasets import load_digits

from tokenlearner.data import moving_digits
from tokenlearner.data.clips import ClipTransform
from tokenlearner.errors import InputError
from tokenlearner.inspection.cost import cost
from tokenlearner.models.bottleneck import MODULES, middle
from tokenlearner.models.opening import open_trained
from tokenlearner.study import interactions
from tokenlearner.study.clips import (
    VIVIT,
    X2PLUS1D,
    Clips,
    Fold,
    Middle,
    Noisy,
    Slices,
    ViViTClips,
    X2Plus1DClips,
    accuracy,
    build_vivit,
    build_x2plus1d,
    digits,
    folds_of,
    vivit,
    x2plus1d,
)
from tokenlearner.study.interactions import Windows
from tokenlearner.study.study import Job
from tokenlearner.training.video_demo import vivit as vivit_of_the_demo

DIGITS = Fold("digits", None, None, 8, (1, 8, 20, 20))  # type: ignore[arg-type]
FILMED = {"data": "ut_interaction", "frames": 4, "side": 32, "fps": 5.0, "views": (1, 2), "batch_size": 4}


# ---- moving digits


def test_noise_is_new_while_learning_and_a_clips_own_when_scored():
    clips = moving_digits.load(16).test
    plain = torch.stack([clip for clip, _, _ in clips.__getitems__(list(range(200)))])
    torch.testing.assert_close(Noisy(clips, 0.0, fixed=True)[7][0], plain[7])
    learned, scored = Noisy(clips, 2.0, fixed=False), Noisy(clips, 2.0, fixed=True)
    noise = torch.stack([clip for clip, _, _ in scored.__getitems__(list(range(200)))]) - plain
    assert float(noise.std()) == pytest.approx(2.0, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    torch.testing.assert_close(scored[7][0] - plain[7], noise[7])
    assert not torch.equal(scored[8][0] - plain[8], noise[7])
    assert not torch.equal(learned[7][0], learned[7][0])
    assert [scored[i][1:] for i in (7, 8)] == [(7, 7), (0, 8)]


def test_moving_digits_are_scored_on_digits_that_were_not_learned_from():
    train, test = digits(Clips(clips=64, test_clips=900))
    assert (len(train), len(test)) == (64, 900)
    learned, held_out = ({tuple(d.flatten().tolist()) for d in part.clips.digits} for part in (train, test))
    everything = {tuple(d.flatten().tolist()) for d in torch.from_numpy(load_digits().images / 16).float()}
    assert learned | held_out == everything
    assert not learned & held_out
    assert torch.bincount(test.clips.labels).tolist() == [113] * 4 + [112] * 4
    assert all(test[i][1] != test[i + 450][1] for i in range(20))  # the same digit, in another order
    torch.testing.assert_close(digits(Clips(clips=64, test_clips=900))[1][5][0], test[5][0])


# ---- windows


def grey(*levels: int, height: int = 8, width: int = 12) -> torch.Tensor:
    """A clip whose frames are of these levels, a little brighter from column to column."""
    frames = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, height, width, 3)
    return frames + torch.arange(width, dtype=torch.uint8)[:, None]


def levels_of(clip: torch.Tensor) -> list[int]:
    """By the first column of a clip that was cropped at the left."""
    return [round(float(level) * 255) for level in clip[0, :, 0, 0]]


def transform(**options) -> ClipTransform:
    return ClipTransform(8, 8, flip=0.0, mean=(0.0,) * 3, std=(1.0,) * 3, **options)


def test_windows_to_be_scored_are_spread_over_clip_and_width():
    clips = [grey(*range(0, 200, 20)), grey(7, 50)]
    scored = Windows(clips, (3, 1), transform(), frames=4, views=(2, 3))
    assert len(scored) == 2
    x, label, place = scored[0]
    assert (x.shape, label, place) == ((6, 3, 4, 8, 8), 3, 0)
    # Ten frames leave six free: windows begin at 1.5 and 4.5, rounded; crops at columns 0, 2 and 4.
    first, second = [40, 60, 80, 100], [80, 100, 120, 140]
    assert [levels_of(view) for view in x] == [[a + b for a in start] for start in (first, second) for b in (0, 2, 4)]
    assert [levels_of(view) for view in scored[1][0][::3]] == [[7, 50, 50, 50]] * 2  # shown on


def test_windows_to_learn_from_begin_anywhere():
    learned = Windows([grey(*range(0, 70, 10), width=8)], (0,), transform(), frames=4)
    seen = {tuple(levels_of(learned[0][0])) for _ in range(60)}
    assert seen == {tuple(range(start, start + 40, 10)) for start in (0, 10, 20, 30)}


# ---- files


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return film(tmp_path_factory.mktemp("squares"), (1, 2, 11, 12), each=3)


def test_sets_and_sequences_are_told_apart(data):
    files = [str(file) for file in interactions.interactions(data, "2", [12]).files]
    assert len(files) == 6
    assert all("set2_seq12" in file for file in files)
    assert len(interactions.interactions(data, "1")) == 12
    assert interactions.interactions(data, "1").classes == ("still", "moving")  # and not "other"


def test_clips_are_decoded_whole_at_a_rate(data):
    clips, listed = interactions.decoded(data, "1", 5.0, 24)
    assert {tuple(clip.shape) for clip in clips} == {(8, 24, 32, 3)}  # 1.6 seconds, at half the size
    moving = clips[listed.labels.index(1)]
    bright = [(frame.float().mean(dim=(0, 2)) > 60).nonzero().flatten().tolist() for frame in moving]
    assert all(later[0] - earlier[0] == 3 for earlier, later in itertools.pairwise(bright))  # 6 pixels, halved


def test_each_set_is_learned_from_and_the_other_scored(data):
    first, second = interactions.directions(data, frames=4, side=32, fps=5.0, views=(1, 2))
    assert [fold[0] for fold in (first, second)] == ["set1", "set2"]
    assert first[3] == second[3] == 2
    for _, train, test, _ in (first, second):
        assert len(train) == len(test) == 12
        assert train[0][0].shape == (3, 4, 32, 32)
        assert test[0][0].shape == (2, 3, 4, 32, 32)
        pixels = torch.cat([clip.flatten(0, 2) for clip in train.clips]).float() / 255
        for normed in (train.transform, test.transform):  # both by what is learned from
            assert normed.mean == pytest.approx(pixels.mean(dim=0).tolist())
            assert normed.std == pytest.approx(pixels.std(dim=0).tolist())
    assert first[1].clips is second[2].clips


def test_a_folder_without_the_clips_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must hold UT-Interaction as ut_interaction/clips\.csv"):
        folds_of(Clips(data="ut_interaction"), tmp_path)


# ---- models


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_last_three_blocks_have_the_module(module, size):
    settings = X2PLUS1D[size]
    fold = DIGITS if size == "cpu" else Fold("set1", None, None, 6, (3, 16, 112, 112))  # type: ignore[arg-type]
    with torch.device("meta"):
        model = build_x2plus1d(Middle(module, module), settings, fold)
        options = {"num_tokens": 8, "num_weights": settings.num_weights} if "TokenLearner" in module else {}
        width = int(2.25 * settings.widths[-1])
        heads: dict[str, int] = {"key_dim": settings.key_dim, "num_heads": settings.heads}
        one = middle(module, width, num_frames=fold.input_size[1], **heads, **options)
    last = [*model.stages[-1]]
    assert len(last) >= 4
    for block in last[-3:]:
        assert [(n, p.shape) for n, p in block.middle.named_parameters()] == [
            (n, p.shape) for n, p in one.named_parameters()
        ]
    plain = [(n, p.shape) for n, p in middle("Conv2D + Conv1D", width).named_parameters()]
    assert [(n, p.shape) for n, p in last[-4].middle.named_parameters()] == plain


@pytest.mark.parametrize("kind", ["conv1", "grid", "average", "dense"])
def test_every_form_of_alpha_fits_the_block(kind):
    model = build_x2plus1d(Middle(kind, "Conv2D + TokenLearner", kind), X2PLUS1D["cpu"], DIGITS).eval()
    assert {m.kind for m in model.modules() if hasattr(m, "kind")} == {kind}
    x = torch.randn(2, 1, 8, 20, 20)
    with torch.inference_mode():
        assert torch.allclose(model(x)[1], model(x[1:])[0], atol=1e-5)


TOKENS = {
    Slices("plain"): [100] * 4,
    Slices("8", 8): [100, 100, 32, 32],
    Slices("8 n", 8, "neighbours", 3): [100, 100, 32, 32],
    Slices("32 w", 32, "window", 4): [100, 100, 32, 32],
    Slices("8 w", 8, "window", 2): [100, 100, 16, 16],
    Slices("frames", frame_average=True): [25] * 4,
}


@pytest.mark.parametrize("variant", TOKENS, ids=lambda variant: variant.label)
def test_tokens_of_the_small_vivit(variant):
    model = build_vivit(variant, VIVIT["cpu"], DIGITS)
    assert list(cost(model, DIGITS.input_size).tokens) == TOKENS[variant]
    at_start = model.pos_embed if not variant.frame_average else model.pos_embed.repeat(1, 4, 1)
    of_place = vivit_of_the_demo().pos_embed.unflatten(1, (4, 25))
    if variant.frame_average:  # the places alone: what the slices add is left out
        of_place = of_place - (of_place - at_start.unflatten(1, (4, 25))).mean(dim=2, keepdim=True)
    torch.testing.assert_close(at_start, of_place.flatten(1, 2))


def test_a_vivit_starts_from_an_image_model():
    """Of clips of one picture again and again, both models make on average what the image model makes of it."""
    name = "tokenlearner_micro4_32_plain.cifar10"
    image_model = open_trained(name)
    settings = replace(VIVIT["gpu"], init=name, patch=4)
    fold = Fold("set1", None, None, 6, (3, 4, 32, 32))  # type: ignore[arg-type]
    picture = torch.randn(2, 3, 32, 32)
    clip = picture[:, :, None].expand(-1, -1, 4, -1, -1)
    with torch.inference_mode():
        expected = image_model.blocks(image_model._pos_embed(image_model.patch_embed(picture))).mean(dim=1)
        for variant in (Slices("frames", frame_average=True), Slices("plain")):
            model = build_vivit(variant, settings, fold).eval()
            model.norm = torch.nn.Identity()  # theirs is before the mean over the tokens, the image model's after it
            found = model.forward_features(clip).unflatten(0, (2, -1)).flatten(1, -2).mean(dim=1)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---- runs


def test_accuracy_is_the_share_that_is_right():
    class Brightest(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3, 4))

    clips = [(torch.rand(3, 2, 4, 4), i % 3, i) for i in range(11)]
    expected = statistics.mean(int(clip.mean(dim=(1, 2, 3)).argmax()) == label for clip, label, _ in clips)
    assert accuracy(Brightest(), clips, 4) == pytest.approx(expected)
    views = [(torch.stack([clip, clip.flip(0)]), 1, i) for clip, _, i in clips]  # their mean says 0 or 1, never 2
    expected = statistics.mean(float(c.mean(dim=(1, 2, 3))[1] > c.mean(dim=(1, 2, 3))[::2].mean()) for c, _, _ in clips)
    assert accuracy(Brightest(), views, 4) == pytest.approx(expected)


def test_an_x2plus1d_learns_which_squares_move(data, tmp_path):
    settings = X2Plus1DClips(**FILMED, epochs=6, lr=2e-2, warmup_epochs=0.0, widths=(8,), key_dim=6, heads=2)
    job = Job(Middle("plain"), settings, 0, data, tmp_path / "run")
    row = x2plus1d(job)
    assert row["accuracy"] == pytest.approx((row["from_set1"] + row["from_set2"]) / 2)
    assert row["accuracy"] > 0.9
    with torch.device("meta"):
        counted = cost(build_x2plus1d(job.variant, settings, folds_of(settings, data)[0]), (3, 4, 32, 32))
    assert (row["macs"], row["parameters"]) == (counted.macs, counted.parameters)
    assert x2plus1d(job)["accuracy"] == row["accuracy"]  # gone on with at its end: the same weights


def test_a_vivit_is_trained_on_moving_digits_without_files(tmp_path):
    settings = ViViTClips(epochs=1, clips=32, test_clips=40, width=16, warmup_epochs=0.0, noise=0.5)
    row, other = (vivit(Job(Slices("8", 8), settings, seed, tmp_path, tmp_path / str(seed))) for seed in (0, 1))
    assert row["train_loss"] != other["train_loss"]
    assert row["tokens_per_layer"] == "100 100 32 32"
    assert row["accuracy"] * 40 == pytest.approx(round(row["accuracy"] * 40))
    assert "from_digits" not in row
