from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_ray.errors import ConfigError
from tale_ray.model.balance import balance


def test_equal_layers_are_dealt_evenly() -> None:
    assert balance([1] * 8, 0, 0, 4) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert balance([1] * 3, 0, 0, 1) == (0, 0, 0)
    assert balance([1] * 3, 0, 0, 3) == (0, 1, 2)
    assert balance([2, 1, 1, 1, 1], 0, 0, 3) == (0, 1, 1, 2, 2)


def test_embedding_and_head_count_with_the_outermost_stages() -> None:
    assert balance([1] * 6, 2, 0, 2) == (0, 0, 1, 1, 1, 1)
    assert balance([1] * 6, 0, 2, 2) == (0, 0, 0, 0, 1, 1)
    assert balance([1] * 4, 9, 0, 2) == (0, 1, 1, 1), "a stage holds a layer, however large the embedding is"


@given(
    layers=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    first=st.integers(0, 3),
    last=st.integers(0, 3),
    data=st.data(),
)
def test_no_other_cut_has_a_smaller_largest_stage(
    layers: list[int], first: int, last: int, data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(layers)))
    stages = balance(layers, first, last, num_stages)
    assert list(stages) == sorted(stages)
    assert set(stages) == set(range(num_stages))
    every = [
        tuple(sum(at >= cut for cut in cuts) for at in range(len(layers)))
        for cuts in combinations(range(1, len(layers)), num_stages - 1)
    ]
    assert _largest(stages, layers, first, last) == min(_largest(each, layers, first, last) for each in every)


def _largest(stages: tuple[int, ...], layers: list[int], first: int, last: int) -> int:
    held = [0] * (stages[-1] + 1)
    held[0] += first
    held[-1] += last
    for stage, size in zip(stages, layers, strict=True):
        held[stage] += size
    return max(held)


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers_are_refused(num_stages: int) -> None:
    with pytest.raises(ConfigError, match=f"{num_stages} pipeline stages cannot be made of 3 layers: .* 1 to 3"):
        balance([1, 1, 1], 0, 0, num_stages)
