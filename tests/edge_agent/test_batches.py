"""The order of a round's batches: seeded, like lengths together, no twins, the largest first."""

import pytest
import torch

from rankfleet.edge_agent.worker.batches import order


def sizes(count: int) -> list[int]:
    found: list[int] = torch.randint(3, 40, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    return found


@pytest.mark.parametrize(
    ("count", "batch", "steps"), [(50, 4, 40), (16, 16, 9), (20, 16, 12), (300, 8, 20), (7, 3, 50)]
)
def test_every_example_comes_once_before_any_comes_again(count: int, batch: int, steps: int) -> None:
    found = order(sizes(count), batch, steps, 5)
    assert [len(one) for one in found] == [batch] * steps
    assert found == order(sizes(count), batch, steps, 5)
    assert found != order(sizes(count), batch, steps, 6)
    times = [0] * count
    for one in found:
        for i in one:
            times[i] += 1
    assert max(times) - min(times) <= 1
    whole = [one for n, one in enumerate(found) if n * batch // count == ((n + 1) * batch - 1) // count]
    assert whole or count < batch
    assert sum(len(set(one)) == batch for one in found) >= len(whole)


def test_fewer_examples_than_a_batch_has_room_for() -> None:
    assert [len(one) for one in order([3, 4, 5], 8, 2, 0)] == [8, 8]
    assert {i for one in order([3, 4, 5], 8, 2, 0) for i in one} == {0, 1, 2}


def test_the_largest_batch_of_the_first_epoch_comes_first() -> None:
    lengths = sizes(50)
    tokens = [sum(lengths[i] for i in one) for one in order(lengths, 4, 40, 5)]
    assert tokens[0] == max(tokens[: 50 // 4])


def test_like_lengths_meet() -> None:
    lengths = sizes(400)
    padded = sum(max(lengths[i] for i in one) * 8 for one in order(lengths, 8, 50, 1))
    assert padded < 1.15 * sum(lengths)
