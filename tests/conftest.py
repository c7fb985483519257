"""Annotations become checks of each call in the rooms that pyright cannot hold to strict mode.

Tensor shapes are among them. The launcher is under strict pyright, which costs its tests nothing.
"""

import os

import pytest
from jaxtyping import install_import_hook

# Whoever runs the tests: a composed configuration is remembered, and Jobs carry their owner's name.
os.environ["USER"] = "ada"

# Before any test imports the package: each call of an annotated function of these is then checked.
# The tower lets an int stand where a float is asked for, as type checkers do.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(["stillhouse.distill", "stillhouse.evals", "stillhouse.results"], CHECKER)


def pytest_configure(config: pytest.Config) -> None:
    """Also on a machine with a GPU the tests are of the CPU, and see the same numbers; but those
    that are of a GPU see it."""
    asked = config.option.markexpr
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
