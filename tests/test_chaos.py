"""Five faults of every kind in one search; `make chaos` has thirty of them."""

from pathlib import Path

import pytest
from chaos import KINDS, endure


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_search_under_five_faults_decides_the_same(tmp_path: Path) -> None:
    chaos = endure(5, seed=5, folder=tmp_path)
    assert sorted(chaos.happened) == sorted(KINDS)
    assert chaos.starts >= 3  # the driver was killed, and stopped
