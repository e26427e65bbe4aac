"""VectorAttention against the sum written out pair by pair and channel by channel, and what it costs."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from naive import randomized, relative_error
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

from tokenlearner.core.vector import VectorAttention

D, R, G, HIDDEN = 6, 4, 3, 5


def make(**options):
    options = {"relation_dim": R, "num_weights": G, "hidden_dim": HIDDEN, **options}
    return randomized(VectorAttention(D, **options)).double()


def relu(v):
    return v * (v > 0)


def by_pairs(layer, x):
    """y_i[c] = Σ_j softmax_j(MLP(relu(q_i − k_j)))[weight of c] · v_j[c]: (n, d) → (n, d)."""
    n, d = x.shape
    shared_by = d // layer.num_weights
    q, k, v = ([part.weight @ token for token in x] for part in (layer.q, layer.k, layer.v))
    rows = []
    for i in range(n):
        logits = []
        for j in range(n):
            hidden = relu(layer.fc1.weight @ relu(q[i] - k[j]) + layer.fc1.bias)
            logits.append(layer.fc2.weight @ hidden)
        row = []
        for c in range(d):
            weights = torch.stack([logit[c // shared_by] for logit in logits]).exp()
            row.append(sum(weights[j] * v[j][c] for j in range(n)) / weights.sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7], ids=str)
@pytest.mark.parametrize("num_weights", [1, G, D], ids=["one weight", "shared", "a weight per channel"])
def test_agrees_with_the_sum_over_pairs(num_weights, chunk):
    """Outputs and every gradient, in float64; chunks of 1 and 3 of the 7 queries are computed again in backward."""
    layer = make(num_weights=num_weights, chunk=chunk)
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = torch.stack([by_pairs(layer, one) for one in x])
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)

    out = layer(x)
    assert relative_error(out, expected) < 1e-12
    for gradient, expected_gradient in zip(torch.autograd.grad((out * direction).sum(), inputs), wanted):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert relative_error(layer(x), expected) < 1e-12


def test_second_derivatives_pass_through_the_recomputation():
    layer = make(chunk=2)
    x = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_frozen_parts_get_no_gradient_and_the_rest_the_same():
    layer, x = make(chunk=2), torch.randn(2, 5, D, dtype=torch.float64)
    layer(x).sum().backward()
    expected = layer.fc1.weight.grad.clone()
    layer.zero_grad()
    layer.q.requires_grad_(False)
    layer.k.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.q.weight.grad is None
    torch.testing.assert_close(layer.fc1.weight.grad, expected)

    only_mlp = make(chunk=2)
    for part in (only_mlp.q, only_mlp.k, only_mlp.v):
        part.requires_grad_(False)
    only_mlp.load_state_dict(layer.state_dict())
    only_mlp(x).sum().backward()
    torch.testing.assert_close(only_mlp.fc1.weight.grad, expected)


def test_equal_relations_give_the_mean_of_the_values():
    layer, x = make(), torch.randn(2, 7, D, dtype=torch.float64)
    torch.nn.init.zeros_(layer.fc2.weight)
    assert relative_error(layer(x), layer.v(x).mean(dim=1, keepdim=True).expand(-1, 7, -1)) < 1e-12


def test_each_channel_attends_for_itself():
    """What scalar attention can't do: channel group 0 looks at one token, group 1 at another, for the same query."""
    layer = make(num_weights=2, hidden_dim=R, chunk=1)
    x = torch.randn(1, 4, D, dtype=torch.float64)
    torch.nn.init.zeros_(layer.q.weight)
    torch.nn.init.eye_(layer.fc1.weight)
    torch.nn.init.zeros_(layer.fc1.bias)
    layer.k.weight.data = -torch.linalg.pinv(x[0]).T  # k_j = −e_j, so the relation with token j is e_j
    layer.fc2.weight.data = 1000.0 * torch.eye(R, dtype=torch.float64)[[2, 0]]
    v = layer.v(x)
    expected = torch.cat([v[:, 2, :3], v[:, 0, 3:]], dim=-1)
    torch.testing.assert_close(layer(x), expected[:, None].expand(-1, 4, -1))


def test_the_chunk_left_out_depends_on_size_alone():
    layer = VectorAttention(432)
    assert layer._queries_at_a_time(1, 512) == 2**23 // (512 * 128)
    assert layer._queries_at_a_time(8, 512) == 16
    assert layer._queries_at_a_time(10**6, 512) == 1


def test_autocast_and_copies():
    layer = make(chunk=2).float()
    x = torch.randn(2, 7, D, requires_grad=True)
    direction = torch.randn(2, 7, D)
    expected = layer(x)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = copy.deepcopy(layer)(x)
    assert relative_error(out, expected) < 0.03
    (gradient,) = torch.autograd.grad((out * direction).sum(), x)  # recomputed in bfloat16 too, outside the region
    assert relative_error(gradient, wanted) < 0.1


@pytest.mark.slow
def test_compiled_it_is_the_same(without_shape_checks):
    layer = make(chunk=3)
    x = torch.randn(2, 6, D, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0])
    torch._dynamo.reset()


def test_export_with_a_dynamic_batch(without_shape_checks):
    layer, x = make(), torch.randn(2, 6, D, dtype=torch.float64)
    program = export(layer, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 6, D, dtype=torch.float64)
    torch.testing.assert_close(program.module()(more), layer(more))


def test_what_it_costs():
    with torch.device("meta"):
        layer, x = VectorAttention(432), torch.empty(1, 512, 432)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
    n = 512
    assert counter.get_total_flops() == 2 * (n * 432 * (2 * 128 + 432) + n * n * (24 * (128 + 24) + 432))
    assert sum(p.numel() for p in layer.parameters()) == 432 * (2 * 128 + 432) + 128 * 24 + 24 + 24 * 24
    assert layer.elementwise_flops(n) == n * n * (128 + 128 + 24 + 5 * 24)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read off /proc")
def test_memory_stays_under_two_gigabytes():
    """Of a forward and backward pass on 8 × 512 tokens of 432 channels, of whose pairs alone one tensor has 3.6 GB.

    Not by getrusage: a process begins with its parent's peak there.
    """
    script = """
        import re
        import torch
        from tokenlearner.core.vector import VectorAttention

        peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        torch.set_num_threads(1)
        layer, x = VectorAttention(432), torch.randn(8, 512, 432, requires_grad=True)
        layer(x[:1, :8]).sum().backward()  # libraries load
        before = peak()
        layer(x).square().mean().backward()
        print(peak() - before)
        assert x.grad.isfinite().all() and x.grad.std() > 0
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=280, check=True
    )
    assert 10e6 < int(result.stdout) < 2e9


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="5 does not divide 6"):
        VectorAttention(6, num_weights=5)
    with pytest.raises(ValueError, match="chunk must be a positive whole number, not 0"):
        VectorAttention(6, num_weights=3, chunk=0)
    with pytest.raises(ValueError, match=r"takes \(b, n, 6\), and got shape \(2, 4, 5\)"):
        make()(torch.randn(2, 4, 5, dtype=torch.float64))
