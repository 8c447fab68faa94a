"""Two processes with batches of unequal size against one process on the concatenated batch."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.functional import cross_entropy

from helpers import generator, normal
from neuralcollapse import ClassMeanClassifier, FixedETFClassifier, NearestETFClassifier, NearestFrameClassifier

SIZES, STEPS = (11, 5), 3
CODE = normal(4, 2, seed=3)
HEADS = {
    "nearest": lambda: NearestETFClassifier(8, 4, momentum=0.3).double(),
    "nearest, cumulative": lambda: NearestETFClassifier(8, 4, momentum="cumulative", feature_norm=None).double(),
    "previous means": lambda: ClassMeanClassifier(8, 4, momentum=0.3).double(),
    "differentiable means": lambda: ClassMeanClassifier(8, 4, means="differentiable", momentum=0.3).double(),
    "fixed": lambda: FixedETFClassifier(8, 4).double(),
    "nearest frame of a code": lambda: NearestFrameClassifier(8, 4, geometry=CODE, momentum=0.3).double(),
    "nearest frame of the means": lambda: NearestFrameClassifier(8, 4, geometry="means", rank=2).double(),
}


def data(step):
    total = sum(SIZES)
    return normal(total, 8, seed=step) + 0.3, torch.randint(4, (total,), generator=generator(step))


def run(head, shard):
    """A few steps on one shard of each batch; the gradient of the loss summed over the shards, and the state."""
    gradients = []
    for step in range(STEPS):
        features, targets = (tensor[shard] for tensor in data(step))
        features.requires_grad_()
        loss = cross_entropy(head(features, targets), targets, reduction="sum") / sum(SIZES)
        gradients.append(torch.autograd.grad(loss, features)[0])
    return torch.stack(gradients, 1), head.state_dict()


def worker(rank, name, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    torch.set_num_threads(1)
    start = sum(SIZES[:rank])
    torch.save(run(HEADS[name](), slice(start, start + SIZES[rank])), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", HEADS)
def test_ranks_agree_with_one_process(name, tmp_path):
    multiprocessing.spawn(worker, (name, str(tmp_path)), nprocs=len(SIZES))
    expected_gradients, expected_state = run(HEADS[name](), slice(None))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    assert (torch.cat([gradients for gradients, _ in results]) - expected_gradients).abs().max() < 1e-6
    for _, state in results:
        for key, value in expected_state.items():
            assert (state[key].double() - value.double()).abs().max() < 1e-6
            assert torch.equal(state[key], results[0][1][key])
