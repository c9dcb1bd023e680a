from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from graphopt.numerics import compiled, kernels_points


def test_compiled_code_is_loaded_without_the_compilers_tables() -> None:
    values = np.arange(8, dtype=np.float32)
    expected = float(kernels_points.sum_of_squares(values))  # the code is in the cache now
    code = (
        "import sys, numpy as np\n"
        "from graphopt.numerics import kernels_points\n"
        "print(kernels_points.sum_of_squares(np.arange(8, dtype=np.float32)),"
        " 'numba.np.random.legacy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(expected), "False"]
    assert expected == sum(x * x for x in range(8))


def test_code_that_cannot_be_loaded_so_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    @compiled.compiled()
    def tripled(x: int) -> int:
        return 3 * x

    monkeypatch.setattr(compiled, "rtsys", object())  # of another numba
    assert tripled(5) == 15
