"""The baseline without time: equal to the image model on every frame, and blind to their order."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tokenlearner
from tokenlearner.errors import InputError
from tokenlearner.models.frame_average import FrameAverageViT

SHAPE = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def model():
    model = FrameAverageViT(**SHAPE).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def test_it_is_the_mean_of_what_the_image_model_makes_of_the_frames(model):
    image = VisionTransformer(**SHAPE).eval()
    image.load_state_dict(model.state_dict())
    clip = torch.randn(2, 3, 5, 8, 8)
    features = [image.forward_head(image.forward_features(clip[:, :, t]), pre_logits=True) for t in range(5)]
    mean = torch.stack(features).mean(dim=0)
    assert torch.allclose(model.forward_head(model.forward_features(clip), pre_logits=True), mean, atol=1e-6)
    assert torch.allclose(model(clip), image.head(mean), atol=1e-6)


def test_it_says_that_it_takes_clips(model):
    assert model.takes_clips
    assert not hasattr(VisionTransformer(**SHAPE), "takes_clips")


def test_the_order_of_the_frames_makes_no_difference(model):
    clip = torch.randn(2, 3, 6, 8, 8)
    assert torch.allclose(model(clip), model(clip[:, :, torch.randperm(6)]), atol=1e-6)
    assert not torch.allclose(model(clip), model(clip[:, :, :3]), atol=1e-3)


def test_it_costs_as_much_as_its_frames(model):
    one, four = (tokenlearner.cost(model, (3, t, 8, 8)).macs for t in (1, 4))
    assert four == 4 * one - 3 * 16 * 3  # one head


def test_a_batch_of_images_is_refused(model):
    with pytest.raises(InputError, match=r"clips as \(b, c, t, h, w\), and got shape \(2, 3, 8, 8\)"):
        model(torch.randn(2, 3, 8, 8))
