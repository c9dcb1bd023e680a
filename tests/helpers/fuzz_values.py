"""Plain values as people and programs get them wrong, and configs with parts exchanged for them."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

__all__ = ["TEMPLATES", "broken", "odd_values"]

_SPEC = {
    "n_bits": 4,
    "granularity": {"type": "per_grouped_channel", "axis": 0, "group_size": 8},
    "cluster_dim": 1,
    "enable_per_channel_scale": False,
    "lut_qspec": {"dtype": "int8", "granularity": {"type": "per_tensor"}},
}
_QSPEC = {
    "dtype": "int8",
    "qscheme": "symmetric",
    "granularity": {"type": "per_channel", "axis": 0},
    "float_range": [None, 1.0],
    "qparam_calculator_cls": "moving_average",
}
TEMPLATES: dict[str, dict[str, Any]] = {
    "palettization": {
        "kmeans_palettization_config": {
            "global_config": {
                "op_state_spec": {"weight": _SPEC, "in_proj_weight": None},
                "op_type_config": {"conv2d": {"op_state_spec": {"weight": {"n_bits": 6}}}},
                "op_name_config": {"linear_.*": None},
                "module_state_spec": {"fc.weight": {"n_bits": 8}},
            },
            "module_type_configs": {"torch.nn.Conv2d": None},
            "module_name_configs": {"layer1.*": {"op_state_spec": {"*": {"n_bits": 1}}}},
        }
    },
    "quantization": {
        "quantization_config": {
            "execution_mode": "eager",
            "preserved_attributes": ["config"],
            "global_config": {
                "op_state_spec": {"weight": {**_QSPEC, "qparam_calculator_cls": "static"}},
                "op_input_spec": {"*": _QSPEC, 0: None},
                "op_output_spec": None,
                "qat_schedule": {"enable_observer": 0, "enable_fake_quant": 100},
            },
            "module_name_configs": {"a": None},
        }
    },
    "pruning": {
        "magnitude_pruning_config": {
            "global_config": {"op_state_spec": {"weight": {"target_sparsity": 0.5}}},
            "module_name_configs": {"b": None},
        }
    },
    "rdo": {
        "candidates": {"2": 2, "x": {"palettize": _SPEC}, "y": "int8 a8"},
        "layer_candidates": {"fc.*": [8]},
        "target_bits": 4.2,
        "activations": _QSPEC,
        "rounding": {"steps": 10},
        "held_out": 0.25,
        "seed": 0,
    },
}

_ODD = (
    *(None, True, False, 0, 1, -1, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "*", "int4", "int8", "x", ".x.Y", "..a", "(a+)+b", "[", "os.system", "a.b.C", "ü\x00"),
    *([], {}, [None], {"": None}, {"*": None}, [[]], {"type": "per_tensor"}, {"n_bits": 4}),
)
_KEYS = st.one_of(
    st.sampled_from(["weight", "*", "type", "global_config", "n_bits", "dtype", "axis", "", "\n"]),
    st.sampled_from([0, 1, -1, True, False, None, 1.5]),
    st.text(max_size=6),
)


def odd_values() -> st.SearchStrategy[Any]:
    """A scalar, or a small nest of lists and mappings, some of them deep."""
    leaf = st.one_of(
        st.sampled_from(_ODD), st.integers(), st.floats(), st.text(max_size=8), st.booleans()
    )
    nested = st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
        max_leaves=6,
    )
    return nested | st.integers(1, 200).map(_deep)


def _deep(levels: int) -> Any:
    value: Any = None
    for level in range(levels):
        value = {"op_state_spec": value} if level % 2 else [value]
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


@st.composite
def broken(draw: Any, template: dict[str, Any]) -> Any:
    """A config with up to three of its values or keys exchanged, added or left out."""
    value: Any = {"root": copy.deepcopy(template)}
    for _ in range(draw(st.integers(0, 3))):
        places = [place for place in _places(value) if place]
        *path, key = draw(st.sampled_from(places))
        holder: Any = value
        for part in path:
            holder = holder[part]
        what = draw(st.sampled_from(["value", "value", "key", "add", "drop", "elsewhere"]))
        if what == "value" or not path:
            holder[key] = copy.deepcopy(draw(odd_values()))  # those of a list are one for all
        elif what == "drop":
            del holder[key]
        elif what == "elsewhere":
            source: Any = value
            for part in draw(st.sampled_from(places)):
                source = source[part]
            holder[key] = copy.deepcopy(source)
        elif isinstance(holder, dict):
            new = draw(_KEYS)
            holder[new] = holder.pop(key) if what == "key" else copy.deepcopy(draw(odd_values()))
    return value["root"]
