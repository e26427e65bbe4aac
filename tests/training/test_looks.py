"""What the report shows of a model: the right picture, caption and maps together."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from tokenlearner.data.videos import probe
from tokenlearner.insertion.insert import attention_maps, insert
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.maps import overlay, picture_of
from tokenlearner.models.vivit import ViViT
from tokenlearner.training import looks as module
from tokenlearner.training.looks import film_looks, looks_at, one_of_each


def test_looks_go_with_their_images():
    """The head answers by its bias alone, so the second class is always predicted."""
    host = VisionTransformer(img_size=(8, 12), patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=2)
    torch.nn.init.zeros_(host.head.weight)
    host.head.bias.data = torch.tensor([0.0, 1.0, 0.5])
    model = insert(host, 2, at=1).eval()
    preprocessing = Preprocessing((3, 8, 12), (0.5,) * 3, (0.25,) * 3)
    images = torch.randn(3, 3, 8, 12)
    looks = looks_at(model, images, torch.tensor([1, 0, 2]), preprocessing, ("ant", "bee", "cat"))
    assert [look.caption for look in looks] == ["bee", "bee, is ant", "bee, is cat"]
    maps = attention_maps(model, images)[1]
    for look, image, own in zip(looks, images, maps, strict=True):
        picture = picture_of(image, preprocessing)
        assert look.picture.tobytes() == picture.tobytes()
        assert [shown.tobytes() for shown in look.overlays] == [overlay(picture, a).tobytes() for a in own]
    assert len({shown.tobytes() for look in looks for shown in look.overlays}) == 6


@pytest.fixture
def vivit() -> ViViT:
    """The head answers by its bias alone: the second class, or the second and third of several."""
    host = ViViT(32, 16, 4, 2, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    torch.nn.init.zeros_(host.head.weight)
    host.head.bias.data = torch.tensor([-1.0, 1.0, 0.5])
    return insert(host, 2, at=1).eval()


PREPROCESSING = Preprocessing((3, 32, 32), (0.5,) * 3, (0.25,) * 3, frames=4, fps=5.0)


def test_films_go_with_their_clips(vivit, tmp_path, monkeypatch):
    clips, drawn = torch.randn(3, 3, 4, 32, 32), []
    draw = module.draw_film
    monkeypatch.setattr(module, "draw_film", lambda *args: drawn.append(args[1]) or draw(*args))
    looks = film_looks(vivit, clips, torch.tensor([1, 0, 1]), PREPROCESSING, ("a/nt", "bee's  hive", "c"), tmp_path)
    assert [look.caption for look in looks] == ["bee's  hive", "bee's  hive, is a/nt", "bee's  hive"]
    names = ["bee-s-hive", "a-nt", "bee-s-hive-2"]
    assert [look.video for look in looks] == [tmp_path / f"{name}.mp4" for name in names]
    assert [look.sheet for look in looks] == [tmp_path / f"{name}.png" for name in names]
    assert all(torch.equal(*pair) for pair in zip(drawn, clips, strict=True))
    assert [probe(look.video).duration for look in looks] == [pytest.approx(0.8)] * 3
    assert all(look.sheet.is_file() for look in looks)


def test_films_of_clips_of_several_classes(vivit, tmp_path):
    labels = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    names = ("ant " * 99, "bee", "cat")
    looks = film_looks(vivit, torch.randn(3, 3, 4, 32, 32), labels, PREPROCESSING, names, tmp_path)
    assert [look.caption for look in looks[:2]] == ["bee, cat", "bee, cat, is nothing"]
    assert [look.video.name for look in looks[:2]] == ["bee-cat.mp4", "nothing.mp4"]
    assert looks[2].video.name == f"{'ant-' * 15}"[:-1] + ".mp4"  # a disk takes no name as long as all of it


def test_one_of_each_class_in_order():
    assert one_of_each(torch.tensor([4, 0, 4, 2, 0])) == [1, 3, 0]
