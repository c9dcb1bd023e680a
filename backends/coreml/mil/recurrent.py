"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.backends.coreml.mil.values import Array, Rule, Values, tensor
from graphopt.errors import VerificationError

__all__ = ["RECURRENT"]


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "linear": lambda x: x,
    }[name]


def _scan(
    v: Values,
    cell: Callable[..., tuple[torch.Tensor, ...]],
    states: tuple[str, ...],
    banks: list[str],
) -> tuple[Array, ...]:
    """Run ``cell(x_t, *state, w_ih, w_hh, bias)`` over time, for one or two directions."""
    x, direction = tensor(v["x"]), str(v.get("direction", "forward"))
    init = [tensor(v[s]).chunk(len(banks), dim=-1) for s in states]
    seqs, finals = [], []
    for i, bank in enumerate(banks):
        w_ih, w_hh = tensor(v["weight_ih" + bank]), tensor(v["weight_hh" + bank])
        bias = (
            tensor(v["bias" + bank])
            if v.get("bias" + bank) is not None
            else torch.zeros(w_ih.shape[0])
        )
        state = tuple(s[i] for s in init)
        back = direction == "reverse" or bank == "_back"
        out: list[torch.Tensor] = []
        for step in x.flip(0) if back else x:
            state = cell(step, *state, w_ih, w_hh, bias)
            out.append(state[0])
        seqs.append(torch.stack(out[::-1] if back else out))
        finals.append(state)
    last = [torch.cat([f[k] for f in finals], -1) for k in range(len(states))]
    seq = torch.cat(seqs, -1) if v.get("output_sequence") else last[0][None]
    return tuple(a.numpy() for a in (seq, *last))


def lstm(v: Values) -> tuple[Array, ...]:
    """Gate order [input, forget, output, cell]; outputs (sequence, h, c)."""
    if v.get("peephole") is not None or v.get("clip") is not None:
        raise VerificationError("lstm: peephole or clip")
    gate = _activation(str(v.get("recurrent_activation", "sigmoid")))
    cell_act, act = (
        _activation(str(v.get("cell_activation", "tanh"))),
        _activation(str(v.get("activation", "tanh"))),
    )

    def cell(
        x: torch.Tensor,
        h: torch.Tensor,
        c: torch.Tensor,
        wi: torch.Tensor,
        wh: torch.Tensor,
        b: torch.Tensor,
    ):
        i, f, o, z = (x @ wi.T + h @ wh.T + b).chunk(4, -1)
        c = gate(f) * c + gate(i) * cell_act(z)
        return gate(o) * act(c), c

    banks = ["", "_back"] if str(v.get("direction", "forward")) == "bidirectional" else [""]
    return _scan(v, cell, ("initial_h", "initial_c"), banks)


def gru(v: Values) -> tuple[Array, ...]:
    """Gate order [reset, output, update]; ``input_bias`` (iOS17) is the part of the bias outside r * (...)."""
    gate, act = (
        _activation(str(v.get("recurrent_activation", "sigmoid"))),
        _activation(str(v.get("activation", "tanh"))),
    )
    extra = tensor(v["input_bias"]) if v.get("input_bias") is not None else None

    def cell(x: torch.Tensor, h: torch.Tensor, wi: torch.Tensor, wh: torch.Tensor, b: torch.Tensor):
        xr, xo, xz = (x @ wi.T + (extra if extra is not None else 0)).chunk(3, -1)
        hr, ho, hz = (h @ wh.T + b).chunk(3, -1)
        r, z = gate(xr + hr), gate(xz + hz)
        return ((1 - z) * act(xo + r * ho) + z * h,)

    return _scan(v, cell, ("initial_h",), [""])


def rnn(v: Values) -> tuple[Array, ...]:
    """H' = activation(x w_ih + h w_hh + bias)."""
    act = _activation(str(v.get("activation", "tanh")))

    def cell(x: torch.Tensor, h: torch.Tensor, wi: torch.Tensor, wh: torch.Tensor, b: torch.Tensor):
        return (act(x @ wi.T + h @ wh.T + b),)

    return _scan(v, cell, ("initial_h",), [""])


RECURRENT: dict[str, Rule] = {"lstm": lstm, "gru": gru, "rnn": rnn}
