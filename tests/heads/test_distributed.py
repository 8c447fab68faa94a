"""Two processes with batches of unequal size against one process on the concatenated batch."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.functional import cross_entropy

from helpers import generator, normal
from neuralcollapse import ClassMeanClassifier, FixedETFClassifier, NearestETFClassifier, NearestFrameClassifier
from neuralcollapse.heads import LeadingDirections

SIZES, STEPS = (11, 5), 3
CODE = normal(4, 2, seed=3)
HEADS = {
    "nearest": lambda: NearestETFClassifier(8, 4, momentum=0.3).double(),
    "nearest, cumulative": lambda: NearestETFClassifier(8, 4, momentum="cumulative", feature_norm=None).double(),
    "previous means": lambda: ClassMeanClassifier(8, 4, momentum=0.3).double(),
    "differentiable means": lambda: ClassMeanClassifier(8, 4, means="differentiable", momentum=0.3).double(),
    "fixed": lambda: FixedETFClassifier(8, 4).double(),
    "nearest frame of a code": lambda: NearestFrameClassifier(8, 4, frame=CODE, momentum=0.3).double(),
    "nearest frame of the means": lambda: NearestFrameClassifier(8, 4, frame=LeadingDirections(2)).double(),
}
OVERFLOWING = {
    "nearest": lambda: NearestETFClassifier(12, 5),
    "previous means": lambda: ClassMeanClassifier(12, 5),
    "fixed": lambda: FixedETFClassifier(12, 5),
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


def run_with_overflow_on_one_rank(head, rank):
    """Return whether a batch not finite on rank 0 alone changes nothing on this rank, and the error in fp32."""
    targets = torch.arange(20) % 5
    head(normal(20, 12, seed=rank, dtype=torch.bfloat16), targets)
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    features = normal(20, 12, seed=2 + rank, dtype=torch.float32)
    if rank == 0:
        features[3, 5] = torch.inf
    head(features.bfloat16(), targets)
    unchanged = all(torch.equal(before[name], buffer) for name, buffer in head.named_buffers())
    try:
        head(features, targets)
    except ValueError as error:
        return unchanged, str(error)
    return unchanged, ""


def worker(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    torch.set_num_threads(1)
    start = sum(SIZES[:rank])
    shard = slice(start, start + SIZES[rank])
    torch.save({name: run(make(), shard) for name, make in HEADS.items()}, f"{folder}/trained-{rank}.pt")
    overflows = {name: run_with_overflow_on_one_rank(make(), rank) for name, make in OVERFLOWING.items()}
    torch.save(overflows, f"{folder}/overflows-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of all cases on each rank, from one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(worker, (str(folder),), nprocs=len(SIZES))
    return {
        case: [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
        for case in ("trained", "overflows")
    }


@pytest.mark.parametrize("name", HEADS)
def test_ranks_agree_with_one_process(results, name):
    expected_gradients, expected_state = run(HEADS[name](), slice(None))
    of_ranks = [result[name] for result in results["trained"]]
    assert (torch.cat([gradients for gradients, _ in of_ranks]) - expected_gradients).abs().max() < 1e-6
    for _, state in of_ranks:
        for key, value in expected_state.items():
            assert (state[key].double() - value.double()).abs().max() < 1e-6
            assert torch.equal(state[key], of_ranks[0][1][key])


@pytest.mark.parametrize("name", OVERFLOWING)
def test_a_batch_that_is_not_finite_on_one_rank_is_left_out_by_all(results, name):
    for rank in range(len(SIZES)):
        unchanged, message = results["overflows"][rank][name]
        assert unchanged
        assert "features must be finite" in message
