"""Scales that migrate in `compress`, in the pipelines, from files and in `Quantizer`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import pipelines
from graphopt.config.joint import JointConfig
from graphopt.quantization import Quantizer, QuantizerConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.c = nn.Linear(8, 4)
        spread = 10.0 ** torch.linspace(-1, 1, 8)
        with torch.no_grad():
            self.norm.weight.copy_(spread)
            self.b.weight.div_(spread)
            self.b.weight.mul_(spread.flip(0)[:, None])
            self.c.weight.div_(spread.flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(self.norm(self.a(x)))))


DATA = [torch.randn(8, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]
FRESH = torch.randn(32, 8, generator=torch.Generator().manual_seed(9))


def config(*, migrate: bool = True) -> QuantizerConfig:
    chosen = QuantizerConfig.presets.w8a8_affine()
    chosen.migrate_scales = migrate
    return chosen


def test_all_ways_in_give_the_same() -> None:
    model = Net().eval()
    wanted = graphopt.compress(model, (DATA[0],), config(), DATA).module()(FRESH)
    by_pipeline = pipelines.quantize(config(), DATA).run(model, (DATA[0],)).module()
    assert torch.equal(by_pipeline(FRESH), wanted)
    quantizer = Quantizer(model, config())
    prepared = quantizer.prepare((DATA[0],))
    before = dict(prepared.named_parameters())
    quantizer.calibrate(DATA)
    assert torch.equal(quantizer.finalize(backend="torch")(FRESH), wanted)
    assert torch.equal(prepared(FRESH), wanted)
    assert all(after is before[name] for name, after in prepared.named_parameters())
    manual = Quantizer(model, config())
    prepared = manual.prepare((DATA[0],))
    with manual.calibration_mode():
        for x in DATA:
            prepared(x)
    assert torch.equal(manual.finalize(backend="torch")(FRESH), wanted)


def test_it_helps_and_can_be_switched_off_in_a_file() -> None:
    model = Net().eval()
    off = JointConfig.from_dict(
        {
            "quantization_config": {
                **config().to_dict()["quantization_config"],
                "migrate_scales": False,
            }
        }
    )
    assert not off.quantization.migrate_scales
    errors = [
        float((graphopt.compress(model, (DATA[0],), c, DATA).module()(FRESH) - model(FRESH)).norm())
        for c in (config(), off)
    ]
    assert errors[0] < 0.5 * errors[1]
    assert "migrate-scales" not in pipelines.quantize(off.quantization, DATA).names


def test_training_keeps_what_migrated() -> None:
    quantizer = Quantizer(Net().eval(), config())
    prepared = quantizer.prepare((DATA[0],))
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)  # before the calibration
    quantizer.calibrate(DATA)
    calibrated = prepared(FRESH).detach()
    with quantizer.training_mode():
        F.mse_loss(prepared(DATA[0]), torch.zeros(8, 4)).backward()
        optimizer.step()
        quantizer.step()
    assert not torch.equal(prepared(FRESH), calibrated)
    quantizer.calibrate(DATA)  # ranges alone: training has begun
    torch.testing.assert_close(quantizer.finalize(backend="torch")(FRESH), prepared(FRESH))
