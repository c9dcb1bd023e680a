"""Training mode drops, adds noise and averages as the model does in training."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiers import cases
from torch import Tensor, nn

from graphopt.errors import StateError
from graphopt.palettization import KMeansPalettizer
from graphopt.pruning import MagnitudePruner
from graphopt.quantization import Quantizer, QuantizerConfig


def behind(layer: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(8, 8), layer), shape


class Attention(nn.Module):
    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


class Fused(nn.Module):
    """Calls attention itself, with dropout in training alone."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.fc, self.rate = nn.Linear(8, 8), rate

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        rate = self.rate if self.training else 0.0
        return F.scaled_dot_product_attention(y, y, y, dropout_p=rate)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(8, 8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Shared(nn.Module):
    """Reads what an in-place dropout has written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.drop(y)
        return y * 2


NETS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dropout": behind(nn.Dropout(0.5), (4, 8)),
    "dropout in place": behind(nn.Dropout(0.5, inplace=True), (4, 8)),
    "read behind in place": (Shared(), (4, 8)),
    "dropout1d": behind(nn.Dropout1d(0.5), (4, 6, 8)),
    "dropout2d": behind(nn.Dropout2d(0.5), (4, 6, 5, 8)),
    "dropout2d in place": behind(nn.Dropout2d(0.5, inplace=True), (4, 6, 5, 8)),
    "dropout3d": behind(nn.Dropout3d(0.5), (2, 6, 3, 5, 8)),
    "alpha": behind(nn.AlphaDropout(0.5), (4, 8)),
    "feature alpha": behind(nn.FeatureAlphaDropout(0.5), (2, 6, 3, 5, 8)),
    "rrelu": behind(nn.RReLU(), (4, 8)),
    "rrelu in place": behind(nn.RReLU(0.1, 0.9, inplace=True), (4, 8)),
    "lstm": (Recurrent(nn.LSTM), (2, 4, 8)),
    "gru": (Recurrent(nn.GRU), (2, 4, 8)),
    "attention": (Attention(weights=False), (2, 4, 8)),
    "attention with weights": (Attention(weights=True), (2, 4, 8)),
    "fused attention": (Fused(), (2, 4, 8)),
    "encoder": (nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True), (2, 4, 8)),
}
COMPRESSORS: dict[str, Callable[[nn.Module], Any]] = {
    "quantizer": Quantizer,
    "palettizer": KMeansPalettizer,
    "pruner": MagnitudePruner,
}


OTHERS = ("dropout2d", "attention with weights")


@pytest.mark.parametrize(
    ("name", "compressor"),
    cases(NETS, COMPRESSORS, default=lambda name, kind: kind == "quantizer" or name in OTHERS),
)
def test_training_is_random_and_evaluation_is_not(name: str, compressor: str) -> None:
    model, shape = copy.deepcopy(NETS[name])
    made = COMPRESSORS[compressor](model)
    prepared, x = made.prepare((torch.randn(shape),)), torch.randn(shape)
    with made.training_mode():
        first, second = prepared(x), prepared(x)
        first.sum().backward()
    assert not torch.equal(first, second)
    assert torch.equal(prepared(x), prepared(x))
    torch.save(copy.deepcopy(prepared), io.BytesIO())


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("lstm", "gru")])
def test_what_is_dropped_is_what_the_model_drops(name: str) -> None:
    """With no rounding and the same random numbers the model's own outputs come out."""
    model, shape = copy.deepcopy(NETS[name])
    quantizer = Quantizer(model, QuantizerConfig())
    prepared, x = quantizer.prepare((torch.randn(shape),)), torch.randn(shape)
    quantizer.disable_fake_quant()
    quantizer.disable_observer()
    with quantizer.training_mode():
        torch.manual_seed(5)
        got = prepared(x)
    model.train()
    torch.manual_seed(5)
    torch.testing.assert_close(got, model(x.clone()))


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_batch_norms_average_as_the_models(momentum: float | None, convolution: bool) -> None:
    torch.manual_seed(0)
    if convolution:
        layers = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8, momentum=momentum))
    else:
        layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8, momentum=momentum))
    data = [torch.randn(6, 4, 5) if convolution else torch.randn(6, 4) + n for n in range(3)]
    quantizer = Quantizer(layers, QuantizerConfig())
    prepared = quantizer.prepare((data[0],))
    quantizer.disable_fake_quant()
    with quantizer.training_mode():
        for x in data:
            prepared(x)
    layers.train()
    for x in data:
        layers(x)
    own = dict(prepared.named_buffers())
    for name, value in layers.named_buffers():
        torch.testing.assert_close(own[name], value)


def test_dropout_of_training_alone_is_refused() -> None:
    class Hidden(Fused):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return F.dropout(y, 0.25) if self.training else y

    quantizer = Quantizer(Hidden(0.0))
    quantizer.prepare((torch.randn(2, 4, 8),))
    with pytest.raises(StateError, match="1 calls of dropout with rate 0.25"):
        quantizer.training_mode().__enter__()


def test_model_that_fails_in_training_is_refused_where_attention_is_unknown() -> None:
    class Fails(Fused):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("labels are missing")
            return super().forward(x)

    model = Fails()
    quantizer = Quantizer(model)
    quantizer.prepare((torch.randn(2, 4, 8),))
    with pytest.raises(StateError, match="labels are missing"):
        quantizer.training_mode().__enter__()
    assert model.training


class Noisy(nn.Module):
    """A layer, and something that is random in training alone."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.block = nn.Linear(8, 8), _Noise(noise)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.fc(x))


class _Noise(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x) if self.training else x


def rows_kept(x: Tensor) -> Tensor:
    return x * x.new_empty([len(x), 1]).bernoulli_(0.5) / 0.5


NOISES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "stochastic depth": (rows_kept, r"\(block\) calls bernoulli 1 times"),
    "depth by a comparison": (lambda x: x * (torch.rand(len(x), 1) < 0.5), "calls rand 1"),
    "added noise": (lambda x: x + torch.randn_like(x), "calls randn_like 1"),
    "multiplied noise": (lambda x: x * torch.normal(1.0, 0.1, x.shape), "calls normal 1"),
    "uniform noise": (lambda x: x + torch.empty_like(x).uniform_(-1, 1), "calls uniform 1"),
    "layers left out": (lambda x: x if random.random() < 0.5 else x * 0, "Python's random"),
    "numpy's noise": (
        lambda x: x + float(np.random.rand()),
        "numpy.random",
    ),
    "dropout in training alone": (lambda x: F.dropout(x, 0.3), "1 calls of dropout with rate 0.3"),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_training_alone_is_refused_with_its_place(name: str) -> None:
    noise, words = NOISES[name]
    model = Noisy(noise).eval()
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    quantizer = Quantizer(model, QuantizerConfig.presets.w8())
    quantizer.prepare((torch.randn(4, 8),))
    with pytest.raises(StateError, match=words), quantizer.training_mode():
        pass
    assert not model.training
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]


def test_noise_of_evaluation_is_in_the_graph_and_trains() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.randn_like(x)

    quantizer = Quantizer(Always().eval(), QuantizerConfig.presets.w8())
    prepared = quantizer.prepare((torch.randn(4, 8),))
    x = torch.ones(4, 8)
    with quantizer.training_mode():
        assert not torch.equal(prepared(x), prepared(x))


def test_batch_of_one_is_no_hindrance_to_batch_norms() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).eval()
    quantizer = Quantizer(model, QuantizerConfig.presets.w8())
    quantizer.prepare((torch.randn(1, 8),))
    with quantizer.training_mode() as prepared:
        del prepared
