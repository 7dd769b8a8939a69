"""The table of mutants fits the code: each mistake can be planted at exactly one place, and changes it."""

import ast

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_has_exactly_one_place(name):
    mutant = MUTANTS[name]
    source = (ROOT / "ddpm_lib" / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    mutated = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))
    assert (ROOT / "tests" / f"test_{mutant.tests}.py").exists()


def test_there_are_enough_mutants_in_every_part():
    assert len(MUTANTS) >= 20
    assert {mutant.file for mutant in MUTANTS.values()} >= {
        "schedule.py",
        "prediction.py",
        "loss.py",
        "sampling.py",
        "unet.py",
        "training.py",
        "checkpoint.py",
        "interop.py",
        "names.py",
        "onnx.py",
        "data.py",
        "download.py",
        "worlds.py",
        "metrics.py",
        "bound.py",
        "families.py",
    }
