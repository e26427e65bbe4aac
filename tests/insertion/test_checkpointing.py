"""Gradient checkpointing runs a layer again during backward: same gradients, and nothing counted twice."""

import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from insertion.hosts import FUSERS, PLACES, images, inserted, tiny
from tokenlearner import learners


def copies(host, **options):
    """The same model without and with checkpointing."""
    plain = inserted(host, **options).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    return plain, checkpointed


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def loss_of(model, x):
    torch.manual_seed(1)
    return model(x).square().mean()


@pytest.mark.parametrize(("fuser", "at"), PLACES)
@pytest.mark.parametrize("kind", ["mlp", "gate"])
def test_loss_gradients_and_statistics_are_those_without(fuser, at, kind):
    host, x = tiny(drop_path_rate=0.3, proj_drop_rate=0.1, init_values=0.1), images(batch=4)
    plain, checkpointed = copies(host, at=at, kind=kind, fuser=fuser, dropout=0.1)
    runs = []
    checkpointed.blocks[3].norm1.register_forward_hook(lambda *_: runs.append(1))
    losses = [loss_of(model, x) for model in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert len(runs) == 2  # or nothing was run again
    assert_close(*losses)
    assert_close(gradients(checkpointed), gradients(plain))
    assert_close(dict(checkpointed.named_buffers()), dict(plain.named_buffers()))
    if kind == "gate":
        for learner in learners(checkpointed).values():
            assert learner.alpha.norm.num_batches_tracked == 1
            assert learner.alpha.norm.running_mean.abs().max() > 0


# Each kind that looks at the grid's shape, so that a wrong one gives other gradients.
@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("kind", ["conv", "gate", "grid"])
def test_two_sizes_before_their_backwards(kind, fuser):
    host, xs = tiny(dynamic_img_size=True), [images(32, 32), images(16, 48)]
    plain, checkpointed = copies(host, kind=kind, fuser=fuser)
    for order in [(0, 1), (1, 0)]:
        losses = [loss_of(checkpointed, x) for x in xs]
        for i in order:
            losses[i].backward()
            found = gradients(checkpointed)
            loss_of(plain, xs[i]).backward()
            assert_close(found, gradients(plain))


@pytest.mark.parametrize("fuser", FUSERS)
def test_transposed_images_one_step_after_the_other(fuser):
    host = tiny(dynamic_img_size=True)
    plain, checkpointed = copies(host, kind="conv", fuser=fuser)
    for size in [(16, 64), (64, 16), (32, 32)]:  # 16 patches each
        x = images(*size)
        for model in (plain, checkpointed):
            loss_of(model, x).backward()
        assert_close(gradients(checkpointed), gradients(plain))


@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shapes_with_as_many_patches_waiting_for_their_backwards(order, fuser):
    plain, checkpointed = copies(tiny(dynamic_img_size=True), kind="conv", fuser=fuser)
    xs = [images(16, 64), images(64, 16)]  # 16 patches each
    losses = [loss_of(checkpointed, x) for x in xs]
    for i in order:
        losses[i].backward()
        found = gradients(checkpointed)
        loss_of(plain, xs[i]).backward()
        assert_close(found, gradients(plain))
        loss_of(checkpointed, images(32, 32))  # and a third, which never gets its backward


@pytest.mark.parametrize("fuser", FUSERS)
def test_an_evaluation_between_forward_and_backward_does_no_harm(fuser):
    host, x = tiny(dynamic_img_size=True), images(16, 64)
    plain, checkpointed = copies(host, kind="conv", fuser=fuser)
    loss = loss_of(checkpointed, x)
    with torch.no_grad():
        checkpointed(images(64, 16))
    loss.backward()
    loss_of(plain, x).backward()
    assert_close(gradients(checkpointed), gradients(plain))


@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_checkpointed_as_a_whole(fuser, use_reentrant):
    plain, checkpointed = copies(tiny(dynamic_img_size=True), kind="gate", fuser=fuser)
    checkpointed.set_grad_checkpointing(False)
    for size in [(16, 64), (64, 16)]:
        x = images(*size).requires_grad_()
        checkpoint(checkpointed, x, use_reentrant=use_reentrant).square().mean().backward()
        found, x.grad = x.grad, None
        plain(x).square().mean().backward()
        assert_close(found, x.grad)
        assert_close(gradients(checkpointed), gradients(plain))
    assert_close(dict(checkpointed.named_buffers()), dict(plain.named_buffers()))
