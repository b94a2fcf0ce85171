"""After training: what is saved gives the same logits, loads in a fresh process, and is pushed."""

from itertools import product

import pytest

from tests.assets.tiny_models import KINDS, SHAPES, check_merged, write_base_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("model_type", "tied", "kind"), list(product(sorted(SHAPES), (True, False), KINDS))
)
def test_the_merged_model_is_the_base_with_its_adapter(tmp_path, model_type, tied, kind):
    base = write_base_model(tmp_path / "base", model_type, tied=tied)
    check_merged(base, tmp_path, kind)
