import pytest
import torch
from torch import nn

from graphopt.mixed_precision import analyze
from graphopt.search.mixed_precision.sensitivity_table import SensitivityTable
from graphopt.search.mixed_precision.sweep import Point, Sweep


@pytest.fixture(scope="module")
def table() -> SensitivityTable:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(layers).eval()
    x = torch.randn(4, 8)
    return analyze(model, (x,), [2, 4], [x], ["psnr", "kl"])


def test_chart_has_a_row_per_layer_in_the_order_of_the_network(table: SensitivityTable) -> None:
    chart = table.chart()
    assert chart.names == ("0.weight", "2.weight")
    assert chart.axis == "psnr (dB)"
    assert not chart.log
    assert [name for name, _ in chart.series] == ["2-bit", "4-bit"]
    for name, values in chart.series:
        assert list(values) == [table.values("psnr")[f"0.{layer}"][name] for layer in chart.names]
    assert table.chart("kl").log


def test_curve_has_a_line_per_solver_and_what_was_measured_beside_it() -> None:
    points = (
        Point("recipe", "milp", 3.0, 3.0, 300, 0.8),
        Point("recipe", "milp", 4.0, 4.0, 400, 0.9),
        Point("recipe", "greedy", 4.0, 3.9, 390, 0.85),
        Point("uniform", "4-bit", None, 4.1, 410, 0.7),
        Point("uncompressed", "", None, 32.0, 3200, 0.95),
    )
    sweep = Sweep(points, (), "psnr")
    chart = sweep.chart()
    assert chart.y == "psnr (dB)"
    lines = dict(chart.lines)
    assert lines["mixed precision, milp"] == ((3.0, 0.8, "milp"), (4.0, 0.9, "milp"))
    assert lines["mixed precision, greedy"] == ((3.9, 0.85, "greedy"),)
    assert chart.marks[0] == ("uniform", ((4.1, 0.7, "4-bit"),))
    assert chart.level == ("uncompressed", 0.95)
    assert chart.marks[1][1] == ((sweep.knee.bits_per_weight, sweep.knee.score, sweep.knee.label),)


@pytest.mark.integration
def test_drawn_rows_are_named_and_the_first_layer_is_on_top(table: SensitivityTable) -> None:
    pytest.importorskip("matplotlib")
    axes = table.plot()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0.weight", "2.weight"]
    low, high = axes.get_ylim()
    assert low > high
    assert axes.get_title()
