"""What insert() refuses, in which words; and that a refusal leaves the host as it was."""

import copy

import pytest
import timm
import torch
from torch import nn

from insertion.hosts import DEPTH, FUSERS, images, tiny
from tokenlearner import insert, insertion_of


def compiled_block():
    model = tiny()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def compiled_in_place(module_of):
    model = tiny()
    module_of(model).compile(backend="eager")
    return model


def with_other_patch_embed():
    model = tiny()
    model.patch_embed = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2))
    return model


COMPILED = "is compiled and would not see the insertion; insert first"
HOSTS = {
    "resnet": (
        lambda: timm.create_model("resnet18"),
        TypeError,
        r"takes a plain ViT as host, such as a timm VisionTransformer \(docs/hosts.md\), and ResNet is none",
    ),
    "module": (lambda: nn.Linear(3, 3), TypeError, "and Linear is none"),
    "compiled": (lambda: torch.compile(tiny(), backend="eager"), TypeError, "insert first, compile after"),
    "compiled in place": (lambda: compiled_in_place(lambda m: m), ValueError, COMPILED),
    "block compiled in place": (lambda: compiled_in_place(lambda m: m.blocks[1]), ValueError, COMPILED),
    "compiled block": (compiled_block, ValueError, COMPILED),
    "wrapped": (lambda: nn.DataParallel(tiny()), TypeError, r"insert into the model itself \(DataParallel.module\)"),
    "patch dropout": (lambda: tiny(patch_drop_rate=0.1), ValueError, "create the host with patch_drop_rate=0"),
    "patch embedding": (with_other_patch_embed, ValueError, "Sequential does not tell the grid of its patches"),
    "no layers": (lambda: tiny(depth=0), ValueError, "no layers"),
}
ARGUMENTS = [
    ({"fuser": "fuser", "at": DEPTH}, "at=4 is after the last of 4 layers, so there is no layer to fuse"),
    ({"fuser": "fuser", "at": 1.0}, r"at=1\.0 is after the last of 4 layers"),
    ({"fuser": "unpool", "kind": "average"}, "'average' has none"),
    ({"fuser": "mixer"}, "fuser is None or one of fuser, unpool, reproject, not 'mixer'"),
    ({"fuser": "", "kind": "mlp"}, "fuser is None or one of"),
    ({"kind": "convs"}, "unknown kind 'convs'"),
    ({"kind": "mlp", "pool": "mean"}, "kind 'mlp' pools by 'softmax', not 'mean'"),
    ({"num_tokens": 0}, "num_tokens must be a positive whole number, not 0"),
    ({"hidden_dim": 0}, "hidden_dim must be a positive whole number, not 0"),
    ({"extra_layers": -1}, "extra_layers must be a whole number from 0 on, not -1"),
    ({"extra_layers": True}, "extra_layers must be a whole number from 0 on, not True"),
    ({"extra_layers": 1.0}, r"extra_layers must be a whole number from 0 on, not 1\.0"),
    ({"at": 7}, "outside the host's 4 layers"),
    ({"at": 7, "extra_layers": 2}, "outside the host's 6 layers"),
]


def state_of(model):
    hooks = [(m._forward_pre_hooks.copy(), m._forward_hooks.copy()) for m in model.modules()]
    return (
        repr(model),
        list(model.state_dict()),
        hooks,
        copy.copy(getattr(model, "feature_info", None)),
        {**vars(model)},
    )


@pytest.mark.parametrize(("build", "error", "sentence"), HOSTS.values(), ids=HOSTS)
def test_hosts(build, error, sentence):
    model = build()
    before = state_of(model)
    with pytest.raises(error, match=sentence):
        insert(model)
    assert state_of(model) == before
    assert insertion_of(model) is None


@pytest.mark.parametrize(("arguments", "sentence"), ARGUMENTS)
@pytest.mark.usefixtures("without_shape_checks")  # beartype would refuse some before we do
def test_arguments(arguments, sentence):
    model = tiny()
    before = state_of(model)
    with pytest.raises(ValueError, match=sentence):
        insert(model, **arguments)
    assert state_of(model) == before


@pytest.mark.parametrize("fuser", FUSERS)
def test_a_second_insertion(fuser):
    model = insert(tiny(), fuser=fuser, extra_layers=1)
    before, x = state_of(model), images()
    out = model(x)
    for host in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"already has 8 tokens \(mlp\) before layer 2 of 4.*call remove\(model\)"):
            insert(host, at=1)
    assert state_of(model) == before
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("fuser", FUSERS)
def test_masks_of_the_patches(fuser):
    model, x = insert(tiny(), fuser=fuser), images()
    out, mask = model(x), torch.ones(1, 1, 17, 17, dtype=torch.bool)
    with pytest.raises(ValueError, match="an attention mask over the patches does not fit the learned tokens"):
        model(x, attn_mask=mask)
    with pytest.raises(ValueError, match="causal attention has no meaning over learned tokens"):
        model(x, is_causal=True)
    assert torch.equal(model(x, attn_mask=None, is_causal=False), out)


def test_tokens_that_are_not_the_whole_grid():
    model = insert(tiny())
    with pytest.raises(RuntimeError, match="patch embedding has not run"):
        model.blocks(torch.randn(2, 17, 32))
    model.patch_drop = nn.Sequential(model.patch_drop, timm.layers.PatchDropout(0.5))
    with pytest.raises(ValueError, match="4×4 = 16 patches, but 8 tokens reached the TokenLearner"):
        model.train()(images())
