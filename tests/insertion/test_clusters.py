"""Maps that start at clusters: where they look, and what is left alone."""

import torch
from sklearn.cluster import KMeans
from torch.testing import assert_close

import tokenlearner
from insertion.hosts import inserted, tiny
from tokenlearner.insertion.clusters import centres, start_at_clusters
from tokenlearner.models import open_trained


def blobs(number, each=200, dim=16):
    generator = torch.Generator().manual_seed(3)
    places = 8 * torch.randn(number, dim, generator=generator)
    return (places[:, None] + torch.randn(number, each, dim, generator=generator)).flatten(0, 1), places


def test_centres_are_those_of_k_means():
    features, _ = blobs(4)
    found = centres(features, 4, seed=1)
    theirs = KMeans(4, init=found.numpy(), n_init=1).fit(features.numpy())
    assert_close(torch.from_numpy(theirs.cluster_centers_).float(), found, atol=1e-4, rtol=0)


def test_with_fewer_positions_than_tokens_some_look_for_the_same():
    assert_close(centres(torch.eye(2, 5), 4).sort(dim=0).values, torch.eye(2, 5).repeat(2, 1).sort(dim=0).values)


def test_a_map_is_the_softmax_of_products_with_its_centre():
    model = tokenlearner.insert(tiny(depth=2), 4, 1)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    start_at_clusters(model, images, sharpness=5.0)
    seen = {}
    (learner,) = tokenlearner.learners(model).values()
    handle = learner.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    (maps,) = tokenlearner.attention_maps(model, images).values()
    with torch.no_grad():
        model(images)
    handle.remove()
    x = seen["x"].flatten(1, -2)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    logits = 5.0 * normed @ centres(normed.flatten(0, 1), 4).T / x.shape[-1]
    assert_close(maps.flatten(2), logits.softmax(dim=1).transpose(1, 2), atol=1e-5, rtol=1e-4)
    assert maps.std(dim=1).max() > 1e-3  # they differ from one another


def test_what_is_left_alone():
    images = torch.randn(2, 3, 32, 32)
    many = tokenlearner.insert(tiny(depth=2), 4, 1, hidden_dim=7)  # too few hidden units for two a token
    other = tokenlearner.insert(tiny(depth=2), 4, 1, "conv")
    plain = tiny(depth=2)
    for model in (many, other, plain):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        start_at_clusters(model.train(), images)
        assert model.training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_learner_of_a_fused_model_gets_clusters_of_its_own():
    model = inserted(tiny(depth=3), 3, 1, fuser="fuser")
    start_at_clusters(model, torch.randn(8, 3, 32, 32))
    one, other = (learner.alpha.fc1.weight[:3] for learner in tokenlearner.learners(model).values())
    assert not torch.allclose(one, other)


def test_the_model_begins_nearer_to_its_host():
    host = open_trained("tokenlearner_micro4_32_plain")
    torch.manual_seed(0)
    model = tokenlearner.insert(open_trained("tokenlearner_micro4_32_plain"), 8, 0.5)
    from sklearn.datasets import load_sample_images

    photos = torch.stack([torch.from_numpy(photo.copy()) for photo in load_sample_images().images]).permute(0, 3, 1, 2)
    pieces = photos.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[:256]
    images = (pieces / 255 - 0.45) / 0.25

    @torch.no_grad()
    def distance():
        return (model(images) - host(images)).square().mean()

    before = distance()
    start_at_clusters(model, images)
    assert distance() < 0.9 * before
