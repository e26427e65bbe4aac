"""FSDP2 on one process: sharding first is refused, inserting first works."""

import copy

import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import ParallelScalingBlock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from insertion.hosts import FUSERS, images, inserted, tiny
from tokenlearner import insert, insertion_of


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [lambda model: model, lambda model: model.blocks[3]])
def test_a_sharded_host_is_refused(mesh, parts):
    model = tiny()
    fully_shard(parts(model), mesh=mesh)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"the model is sharded.*insert, then fully_shard"):
        insert(model)
    assert list(model.state_dict()) == keys
    assert insertion_of(model) is None


@pytest.mark.parametrize("fuser", FUSERS)
def test_an_inserted_model_can_be_sharded_layer_by_layer(mesh, fuser):
    model = inserted(tiny(block_fn=ParallelScalingBlock, qkv_bias=False), fuser=fuser)
    sharded, x = copy.deepcopy(model), images()
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for _ in range(2):
        outs = []
        for m in (model, sharded):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            outs.append(m(x))
            outs[-1].square().mean().backward()
            optimizer.step()
        assert_close(outs[1], outs[0])
    assert_close({k: v.full_tensor() for k, v in sharded.state_dict().items()}, dict(model.state_dict()))
