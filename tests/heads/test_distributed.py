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

ADMITTING = {
    "nearest": lambda: NearestETFClassifier(12, 4, momentum="cumulative").double(),
    "class means": lambda: ClassMeanClassifier(12, 4, ignore_index=-100).double(),
    "nearest frame of a code": lambda: NearestFrameClassifier(12, 6, frame=normal(6, 3, seed=3)).double(),
}
REFUSED = {  # targets of two samples on each rank, whether the features of rank 1 are finite, and the message
    "seen before": (([4, 5], [5, 0]), True, "seen before: 0"),
    "left out": (([4, 4], [6, 6]), True, "none of 5"),
    "negative": (([4, 4], [-1, 4]), True, "at least 0"),
    "not finite": (([4, 4], [4, 4]), False, "features must be finite"),
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


def admit(head, shards, trained):
    """Return the state after classes 4 and 5 were admitted by one shard of their samples, and then class 6."""
    if trained:  # otherwise the given samples determine the global mean
        known = normal(12, 12, seed=1) + 0.3, torch.arange(12) % 4
        head(*(part[shards[0]] for part in known))
    features, targets = normal(9, 12, seed=2) + 4, torch.tensor([4, 4, 4, 4, 5, 4, 5, 5, 5])
    head.admit(features[shards[1]], targets[shards[1]])
    if isinstance(head, ClassMeanClassifier):
        head.eval()
        last = normal(3, 12, seed=3)[shards[2]]
        head.admit(last, torch.full((len(last),), 6))
    return head.state_dict()


def refuse(head, targets, features):
    """Return whether a refused admission leaves the head unchanged, and its message."""
    head(normal(8, 12, seed=1), torch.arange(8) % 4)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    try:
        head.admit(features, torch.tensor(targets))
    except ValueError as error:
        return all(torch.equal(before[name], value) for name, value in head.state_dict().items()), str(error)
    return False, ""


def features_of_rank(rank, finite):
    features = normal(2, 12, seed=4 + rank)
    features[0, 0] = features[0, 0] if finite or rank == 0 else torch.nan
    return features


WHOLE = (slice(None),) * 3


def admitted_by(rank):
    """States of the heads; class 4 has samples on both ranks, classes 5 and 6 on rank 1 only."""
    shards = (slice(0, 7), slice(0, 4), slice(0, 0)) if rank == 0 else (slice(7, 12), slice(4, 9), slice(0, 3))
    return {
        f"{name}, {trained}": admit(make(), shards, trained)
        for name, make in ADMITTING.items()
        for trained in (False, True)
    }


def worker(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    torch.set_num_threads(1)
    start = sum(SIZES[:rank])
    shard = slice(start, start + SIZES[rank])
    torch.save({name: run(make(), shard) for name, make in HEADS.items()}, f"{folder}/trained-{rank}.pt")
    overflows = {name: run_with_overflow_on_one_rank(make(), rank) for name, make in OVERFLOWING.items()}
    torch.save(overflows, f"{folder}/overflows-{rank}.pt")
    torch.save(admitted_by(rank), f"{folder}/admitted-{rank}.pt")
    refused = {
        name: refuse(ClassMeanClassifier(12, 4).double(), targets[rank], features_of_rank(rank, finite))
        for name, (targets, finite, _) in REFUSED.items()
    }
    torch.save(refused, f"{folder}/refused-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of all cases on each rank, from one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(worker, (str(folder),), nprocs=len(SIZES))
    return {
        case: [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
        for case in ("trained", "overflows", "admitted", "refused")
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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ADMITTING)
def test_classes_admitted_by_ranks_are_those_of_one_process(results, name, trained):
    expected = admit(ADMITTING[name](), WHOLE, trained)
    of_ranks = [result[f"{name}, {trained}"] for result in results["admitted"]]
    for state in of_ranks:
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert state[key].shape == value.shape
                assert (state[key].double() - value.double()).abs().max() < 1e-6, key
                assert torch.equal(state[key], of_ranks[0][key]), key


@pytest.mark.parametrize("name", REFUSED)
def test_an_admission_that_is_invalid_on_one_rank_is_refused_by_all(results, name):
    for rank in range(len(SIZES)):
        unchanged, message = results["refused"][rank][name]
        assert unchanged
        assert REFUSED[name][2] in message
