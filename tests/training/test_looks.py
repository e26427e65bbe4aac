"""What the report shows of a model: the right picture, caption and maps together."""

import torch
from timm.models.vision_transformer import VisionTransformer

from tokenlearner.insertion.insert import attention_maps, insert
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.maps import overlay, picture_of
from tokenlearner.training.looks import looks_at


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
