"""use() and what it leaves alone: values where a kernel can't serve, state, copies, files, the insertion."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import tokenlearner
from tokenlearner.core import NeighbourTokenLearner, TokenFuser, TokenLearner
from tokenlearner.errors import InputError
from tokenlearner.kernels import obstacle, switch, use


def learner(**options):
    return TokenLearner(16, 3, "mlp", hidden_dim=8, **options).bfloat16()


def host():
    """Every parameter shaken, so that no zero-initialised layer hides a mistake."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    return shaken(model.eval())


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def feature_map(dtype=torch.bfloat16):
    return torch.randn(2, 3, 5, 16).to(dtype)


@pytest.fixture
def ready(monkeypatch):
    """As on a machine where kernels could run, for tests that see what else is in the way."""
    monkeypatch.setattr(switch, "_INSTALLED", True)
    monkeypatch.setattr(switch, "_INTERPRETED", True)


def refused(module, x):
    """The obstacle, after the output with the switch on was seen to be the plain one, bit for bit."""
    plain = copy.deepcopy(module)
    use(module)
    module.eval(), plain.eval()
    assert torch.equal(module(x), plain(x))
    return obstacle(module, x)


def test_without_triton_or_a_gpu_all_is_as_it_was(monkeypatch):
    monkeypatch.setattr(switch, "_INSTALLED", False)
    assert refused(learner(), feature_map()) == "Triton is not installed"
    monkeypatch.setattr(switch, "_INSTALLED", True)
    monkeypatch.setattr(switch, "_INTERPRETED", False)
    assert refused(learner(), feature_map()) == "the feature map is on the cpu, and kernels need a CUDA GPU"


def test_other_dtypes_run_plain(ready):
    assert "torch.float32, and kernels take bfloat16" in refused(learner().float(), feature_map(torch.float32))
    module, x = learner().float(), feature_map()
    assert obstacle(module, x) == "the weights are not torch.bfloat16 as the feature map is"
    with torch.autocast("cpu", torch.bfloat16):
        assert obstacle(module, x) is None
        assert obstacle(learner(), x) is None
        assert "float32" in obstacle(module, x.float())
    with torch.autocast("cpu", torch.float16):
        assert obstacle(module, x) == "the feature map is torch.bfloat16 under an autocast to torch.float16"


def test_what_a_kernel_would_skip_runs_plain(ready):
    module, calls = learner(), []
    module.alpha.fc1.register_forward_hook(lambda *_: calls.append(1))
    assert refused(module, feature_map()) == "a layer of the MLP has hooks, which a kernel would not call"
    assert calls == [1, 1]  # the module and its copy
    module = learner()
    module.alpha.fc2 = nn.Sequential(module.alpha.fc2)  # as an adapter would be put around it
    assert refused(module, feature_map()) == "a layer of the MLP is not PyTorch's own"
    module = learner(dropout=0.5)
    assert obstacle(module, feature_map()) == "dropout is on"
    assert obstacle(module.eval(), feature_map()) is None


@pytest.mark.parametrize(
    ("dim", "tokens", "hidden"), [(16, 65, 8), (16, 3, 129), (8, 3, 8)], ids=["tokens", "hidden", "channels"]
)
def test_sizes_beyond_the_kernels_run_plain(ready, dim, tokens, hidden):
    module = TokenLearner(dim, tokens, hidden_dim=hidden).bfloat16()
    sentence = refused(module, torch.randn(1, 2, 3, dim).bfloat16())
    assert sentence == f"kernels take up to 128 hidden units and 64 tokens, and 16 channels or more, not {hidden}, " + (
        f"{tokens} and {dim}"
    )


@pytest.mark.usefixtures("without_shape_checks")
def test_exports_run_without_triton(ready, monkeypatch):
    module, x = use(learner().eval()), feature_map()
    exported = torch.export.export(module, (x,))
    assert "tokenlearner" not in str(exported.graph)
    assert torch.equal(exported.module()(x), use(copy.deepcopy(module), False)(x))
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert refused(module, x) == "an export has to run without Triton"


def test_a_fuser_of_other_kinds_runs_plain(ready):
    fuser = TokenFuser(16, 3, hidden_dim=8).bfloat16()
    assert obstacle(fuser, feature_map()) is None
    assert obstacle(TokenFuser(16, 3, beta="linear"), feature_map()) == "kernels are for kind 'mlp' and beta 'mlp'"
    plain = copy.deepcopy(fuser).float()
    tokens, x = torch.randn(2, 3, 16), feature_map(torch.float32)
    assert torch.equal(use(fuser).float()(tokens, x), plain(tokens, x))


def test_models_without_a_module_for_it_are_refused():
    for model in (nn.Linear(2, 2), TokenLearner(8, 2, "conv"), NeighbourTokenLearner(8, 2)):
        with pytest.raises(InputError, match=f"{type(model).__name__} has no TokenLearner of kind 'mlp'"):
            use(model)


def test_state_and_copies():
    module = learner()
    before = copy.deepcopy(module.state_dict())
    use(module)
    assert module.state_dict().keys() == before.keys()
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied._kernel is switch.learned
    assert use(module, False)._kernel is None
    assert use(module) is module


def test_a_host_with_kernels_is_saved_loaded_and_given_back(tmp_path):
    bare = host()
    model = tokenlearner.insert(copy.deepcopy(bare), 3, at=2, fuser="fuser")
    x = torch.randn(1, 3, 32, 32)
    plain = model(x)
    assert all(block.token_learner._kernel for block in use(model).blocks[2:])
    assert all(block.token_fuser._kernel for block in model.blocks[2:])
    assert torch.equal(model(x), plain)  # float32
    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path))
    assert torch.equal(loaded(x), plain)
    assert all(block.token_learner._kernel is None for block in loaded.blocks[2:])
    tokenlearner.remove(model)
    assert torch.equal(model(x), bare(x))


def test_a_host_on_the_kernels_uses_the_tokens_it_is_told_to(device):
    """Host, fuser and all, and with the first tokens alone: bfloat16 as near to float64 as the plain model is."""
    model = shaken(tokenlearner.insert(host(), 3, at=3, fuser="fuser", hidden_dim=8))
    x = torch.randn(1, 3, 32, 32)
    for tokens in (3, 2):
        exact = tokenlearner.set_num_tokens(copy.deepcopy(model).double(), tokens)(x.double())
        rounded = tokenlearner.set_num_tokens(copy.deepcopy(model).to(device, torch.bfloat16), tokens)
        plain = rounded(x.to(device, torch.bfloat16)).double().cpu()
        fused = use(rounded)(x.to(device, torch.bfloat16)).double().cpu()
        assert not torch.equal(fused, plain)
        assert (fused - exact).norm() < 1.5 * (plain - exact).norm() + 1e-3 * exact.norm()
