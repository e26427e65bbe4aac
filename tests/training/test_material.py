"""How training pictures are cropped: a part at full size, or the picture as it is evaluated, moved."""

import numpy as np
import pytest
import torch
from PIL import Image

from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.training.material import training_transform
from tokenlearner.training.recipe import AugmentRecipe

PLAIN = {"auto_augment": None, "color_jitter": 0.0}
SHIFTED = AugmentRecipe(**PLAIN, hflip=0.0, crop="shifted")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8))


def moves(
    x: torch.Tensor, evaluated: torch.Tensor, most: tuple[int, int], empty: torch.Tensor
) -> list[tuple[int, int]]:
    """All (down, right) by which ``x`` is ``evaluated`` moved over ``empty``."""
    _, h, w = x.shape
    wide = empty[:, None, None].expand(-1, h + 2 * most[0], w + 2 * most[1]).clone()
    wide[:, most[0] : most[0] + h, most[1] : most[1] + w] = evaluated
    return [
        (most[0] - top, most[1] - left)
        for top in range(2 * most[0] + 1)
        for left in range(2 * most[1] + 1)
        if torch.equal(wide[:, top : top + h, left : left + w], x)
    ]


@pytest.mark.parametrize("size", [(40, 24), (16, 32)], ids=["wide", "exact"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_shifted_picture_is_the_evaluated_one_moved_over_black(crop_mode, size):
    torch.manual_seed(0)
    picture = noise(*size)
    preprocessing = Preprocessing((3, 32, 16), crop_pct=0.9, crop_mode=crop_mode)
    evaluated = preprocessing.transform()(picture)
    transform = training_transform(preprocessing, SHIFTED)
    black = -torch.tensor(preprocessing.mean) / torch.tensor(preprocessing.std)
    seen = {found for _ in range(60) for found in moves(transform(picture), evaluated, (4, 2), black)}
    assert {down for down, _ in seen} == set(range(-4, 5))
    assert {right for _, right in seen} == set(range(-2, 3))
    assert all(len(moves(transform(picture), evaluated, (4, 2), black)) == 1 for _ in range(10))


def test_it_is_flipped_too_and_grey_where_the_model_is():
    preprocessing = Preprocessing((1, 16, 16), (0.5,), (0.25,), crop_pct=1.0)
    picture = noise(16, 16)
    evaluated = preprocessing.transform()(picture)
    transform = training_transform(preprocessing, AugmentRecipe(**PLAIN, hflip=1.0, crop="shifted"))
    (found,) = moves(transform(picture).flip(-1), evaluated, (2, 2), torch.tensor([-2.0]))
    assert max(map(abs, found)) <= 2


def test_a_resized_crop_covers_the_share_it_is_told():
    """A picture of two halves: a crop of a twentieth shows one of them nearly always, a whole one both."""
    picture = Image.fromarray(np.repeat(np.repeat([[[0], [255]]], 32, 0), 16, 1).repeat(3, 2).astype(np.uint8))
    preprocessing = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)

    def both(scale: tuple[float, float]) -> int:
        crop = training_transform(preprocessing, AugmentRecipe(**PLAIN, scale=scale))
        return sum(bool((x.min() < 0) & (x.max() > 0)) for x in (crop(picture) for _ in range(30)))

    assert both((1.0, 1.0)) == 30
    assert both((0.05, 0.05)) < 20
