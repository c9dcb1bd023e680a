from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from graphopt.config.base import CompressionConfig, type_name
from graphopt.config.selection import ModuleFrame, Selector, StateUse
from graphopt.errors import ConfigError
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    OpKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity, PerTensorGranularity
from graphopt.pruning import MagnitudePrunerConfig
from graphopt.quantization import QuantizationScheme, QuantizationSpec, QuantizerConfig

LINEAR = "torch.nn.modules.linear.Linear"

# In the documented YAML form of coreai-opt: anchors in a block of their own, every field present.
FULL_YAML = """
palettization_spec:
  grouped: &grouped
    n_bits: 2
    granularity: {type: per_grouped_channel, axis: 0, group_size: 8}
    cluster_dim: 1
    enable_per_channel_scale: false
    lut_qspec:
      dtype: int8
      qscheme: symmetric
      qformulation: zp
      granularity: {type: per_tensor, axis: null}
      fake_quantize_cls: default
      qparam_calculator_cls: default
      range_calculator_cls: minmax
      float_range: [null, null]
      scale_dtype: null
    training_strategy_spec: {type: default}
kmeans_palettization_config:
  global_config:
    op_state_spec: {weight: *grouped, in_proj_weight: null}
    op_input_spec: null
    op_output_spec: null
    op_type_config:
      conv2d: {op_state_spec: {weight: {n_bits: 6}}}
    op_name_config: {"linear_.*": null}
    module_input_spec: null
    module_output_spec: null
    module_state_spec: {"fc.weight": {n_bits: 8}}
    enable_fast_kmeans_mode: true
    rounding_precision: 4
    pat_schedule: {enable_fake_palettize: 10}
  module_type_configs: {torch.nn.modules.conv.Conv2d: null}
  module_name_configs: {"layer1.*": {op_state_spec: {"*": {n_bits: 1}}}}
"""

QUANTIZATION_YAML = """
quantization_config:
  execution_mode: eager
  preserved_attributes: [config]
  global_config:
    op_state_spec:
      weight:
        dtype: int4
        granularity: {type: per_block, block_size: 32, axis: 1}
        qscheme: symmetric_with_clipping
    op_input_spec: {"*": {dtype: uint8, qscheme: asymmetric, qparam_calculator_cls: global_minmax}}
    op_output_spec: null
    qat_schedule: {enable_observer: 0, enable_fake_quant: 100, disable_observer: 500}
  kv_cache_quant_configs:
    kv_update: {op_quantizer_config: {op_input_spec: null, op_output_spec: null}}
"""


def test_every_documented_field_loads_from_yaml() -> None:
    config = KMeansPalettizerConfig.from_yaml(io.StringIO(FULL_YAML))
    assert config.global_config is not None
    spec = config.global_config.op_state_spec["weight"]
    assert spec.n_bits == 2
    assert spec.granularity == PerGroupedChannelGranularity(axis=0, group_size=8)
    assert spec.lut_qspec == QuantizationSpec(dtype=torch.int8)
    assert config.global_config.op_input_spec == {"*": None}
    assert config.module_type_configs == {"torch.nn.modules.conv.Conv2d": None}
    quantization = QuantizerConfig.from_yaml(io.StringIO(QUANTIZATION_YAML))
    weight = quantization.global_config.op_state_spec["weight"]
    assert weight.dtype is torch.int4
    assert weight.qscheme is QuantizationScheme.SYMMETRIC_WITH_CLIPPING


@pytest.mark.parametrize(
    "config",
    [
        KMeansPalettizerConfig.from_yaml(io.StringIO(FULL_YAML)),
        KMeansPalettizerConfig.presets.w4(),
        KMeansPalettizerConfig.presets.w8().without(nn.Conv2d, "head"),
        QuantizerConfig.from_yaml(io.StringIO(QUANTIZATION_YAML)),
        QuantizerConfig(),
        QuantizerConfig.presets.w4_per_block(),
        MagnitudePrunerConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configs_survive_yaml_and_json(config: CompressionConfig, tmp_path: Path) -> None:
    config.to_yaml(tmp_path / "c.yaml")
    config.to_json(tmp_path / "c.json")
    assert type(config).from_yaml(tmp_path / "c.yaml") == config
    assert type(config).from_json(tmp_path / "c.json") == config
    assert type(config).from_dict(yaml.safe_load((tmp_path / "c.yaml").read_text())) == config


def test_unknown_key_is_refused_with_its_path() -> None:
    text = FULL_YAML.replace("cluster_dim", "cluster_dims", 1)
    path = "kmeans_palettization_config.global_config.op_state_spec.weight.cluster_dims: unknown"
    with pytest.raises(ConfigError, match=path):
        KMeansPalettizerConfig.from_yaml(io.StringIO(text))
    with pytest.raises(ConfigError, match="KMeansPalettizerConfig.globl: unknown key"):
        KMeansPalettizerConfig(globl=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PalettizationSpec(n_bits=5), "n_bits.*got 5"),
        (lambda: PalettizationSpec(cluster_dim=0), "cluster_dim"),
        (lambda: PerGroupedChannelGranularity(group_size=0), "group_size"),
        (lambda: PerGroupedChannelGranularity(axis=2, group_size=4), "axis"),
        (lambda: PalettizationSpec(lut_qspec=QuantizationSpec(dtype=torch.int4)), "lut_qspec"),
        (lambda: QuantizationSpec(dtype="int5"), "int5"),
        (lambda: QuantizationSpec(dtype="nonsense"), "unknown dtype"),
        (
            lambda: QuantizationSpec(
                dtype=torch.float8_e5m2, qscheme=QuantizationScheme.ASYMMETRIC
            ),
            "zero point",
        ),
        (
            lambda: ModuleKMeansPalettizerConfig(op_input_spec={"*": PalettizationSpec()}),
            "weights only",
        ),
        (lambda: KMeansPalettizerConfig.from_yaml(io.StringIO("- 1")), "expected a mapping"),
        (lambda: KMeansPalettizerConfig.from_yaml(io.StringIO("a: [")), "not valid YAML"),
        (lambda: KMeansPalettizerConfig.from_json(io.StringIO("{")), "not valid JSON"),
    ],
)
def test_wrong_values_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()


def test_specs_are_frozen() -> None:
    spec = PalettizationSpec()
    with pytest.raises(ConfigError, match="frozen"):
        spec.n_bits = 2  # type: ignore[misc]


def test_assignment_to_configs_is_checked() -> None:
    config = KMeansPalettizerConfig()
    with pytest.raises(ConfigError, match="weight_threshold"):
        config.weight_threshold = -1


def test_field_without_meaning_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from graphopt.config import base

    base._said.clear()
    with caplog.at_level(logging.INFO, logger="graphopt"):
        ModuleKMeansPalettizerConfig(rounding_precision=6)
        ModuleKMeansPalettizerConfig(rounding_precision=7)
    said = [record for record in caplog.records if "rounding_precision" in record.getMessage()]
    assert len(said) == 1


def test_defaults_are_those_of_the_documentation() -> None:
    assert KMeansPalettizerConfig().global_config == ModuleKMeansPalettizerConfig()
    assert KMeansPalettizerConfig(global_config=None).global_config is None
    assert KMeansPalettizerConfig(module_name_configs={"a": None}).global_config is not None
    specs = ModuleKMeansPalettizerConfig().op_state_spec
    assert set(specs) == {"weight", "in_proj_weight"}
    assert specs["weight"] == PalettizationSpec(n_bits=4, granularity=PerTensorGranularity())
    assert ModuleKMeansPalettizerConfig(op_state_spec=None).op_state_spec == {"*": None}
    preset = KMeansPalettizerConfig.presets.w4(group_size=2).global_config
    grouped = PerGroupedChannelGranularity(axis=0, group_size=2)
    assert preset is not None
    assert preset.op_state_spec["weight"] == PalettizationSpec(n_bits=4, granularity=grouped)


def test_module_types_have_one_name() -> None:
    assert type_name(nn.Linear) == type_name("torch.nn.Linear") == type_name(LINEAR) == LINEAR
    assert type_name("my_script.Thing") == "my_script.Thing"


def test_only_for_and_without_edit_in_place() -> None:
    config = KMeansPalettizerConfig.presets.w8().only_for(nn.Linear, "head")
    assert config.global_config is None
    assert set(config.module_type_configs) == {LINEAR}
    assert config.without("head").module_name_configs == {"head": None}
    with pytest.raises(ConfigError, match="None already"):
        config.only_for("x")
    with pytest.raises(ConfigError, match="module class or a module name"):
        config.without(3)


def use(tensor: str = "layer1.fc.weight", node: str = "linear_3", role: str = "weight") -> StateUse:
    frames = (
        ModuleFrame("", "Net"),
        ModuleFrame("layer1", "Block"),
        ModuleFrame("layer1.fc", LINEAR),
    )
    return StateUse(tensor, node, ("linear", "aten.linear.default"), role, frames)


def bits(n_bits: int) -> PalettizationSpec:
    return PalettizationSpec(n_bits=n_bits)


def module(n_bits: int, **more: object) -> ModuleKMeansPalettizerConfig:
    return ModuleKMeansPalettizerConfig(op_state_spec={"weight": bits(n_bits)}, **more)


def selected(config: KMeansPalettizerConfig, state: StateUse) -> int | None:
    spec = Selector(config).select(state).spec
    return None if spec is None else spec.n_bits


def test_name_beats_type_beats_global() -> None:
    config = KMeansPalettizerConfig(global_config=module(1))
    assert selected(config, use()) == 1
    config.set_module_type(nn.Linear, module(2))
    assert selected(config, use()) == 2
    config.set_module_name("layer1", module(3))
    assert selected(config, use()) == 3
    config.set_module_name("layer1.fc", None)
    assert selected(config, use()) is None


def test_last_listed_of_several_matching_names_wins() -> None:
    config = KMeansPalettizerConfig(
        module_name_configs={"layer1.fc": module(2), "layer.*": module(6)}
    )
    assert selected(config, use()) == 6
    config.set_module_name("layer1.fc", module(3))
    assert selected(config, use()) == 3


def test_names_match_in_full() -> None:
    config = KMeansPalettizerConfig(global_config=None, module_name_configs={"layer": module(2)})
    assert selected(config, use()) is None


def test_precedence_inside_a_module() -> None:
    config = module(1)
    whole = KMeansPalettizerConfig(global_config=config)
    assert selected(whole, use()) == 1
    op = OpKMeansPalettizerConfig(op_state_spec={"weight": bits(2)})
    whole.set_global(config := module(1, op_type_config={"linear": op}))
    assert selected(whole, use()) == 2
    by_name = OpKMeansPalettizerConfig(op_state_spec={"weight": bits(3)})
    whole.set_global(module(1, op_type_config={"linear": op}, op_name_config={"linear_.": by_name}))
    assert selected(whole, use()) == 3
    whole.set_module_name(
        "layer1",
        module(1, op_name_config={"linear_.": by_name}, module_state_spec={"fc.weight": bits(6)}),
    )
    assert selected(whole, use()) == 6
    whole.set_global(module(1, op_type_config={"linear": None})).set_module_name("layer1", None)
    whole.module_name_configs = {}
    assert selected(whole, use()) is None


def test_own_name_of_a_state_beats_its_role() -> None:
    specs = {"weight": bits(2), "in_proj_weight": bits(6)}
    config = KMeansPalettizerConfig(global_config=ModuleKMeansPalettizerConfig(op_state_spec=specs))
    assert selected(config, use("attention.in_proj_weight")) == 6
    assert selected(config, use("attention.W")) == 2
    assert selected(config, use("attention.bias", role="bias")) is None


def test_invalid_pattern_is_named() -> None:
    config = KMeansPalettizerConfig(module_name_configs={"layer(": None})
    with pytest.raises(ConfigError, match=r"'layer\(' is not a valid regular expression"):
        Selector(config).select(use())


# --- forms that coreai-opt's documentation shows ------------------------------------------------------
def test_presets_of_modules_go_into_configs_of_the_whole() -> None:
    from graphopt.quantization.config import ExecutionMode, ModuleQuantizerConfig

    config = QuantizerConfig.presets.w4(execution_mode=ExecutionMode.GRAPH)
    config.set_module_type(nn.Embedding, ModuleQuantizerConfig.presets.w8())
    config.set_module_name(
        "head", ModuleQuantizerConfig.presets.w4_per_block(block_size=16, axis=1)
    )
    assert config.set_execution_mode("graph") is config
    assert config.global_config == QuantizerConfig.presets.w4().global_config
    whole = {
        name: (
            getattr(QuantizerConfig.presets, name)().global_config,
            getattr(ModuleQuantizerConfig.presets, name)(),
        )
        for name in ("w8", "w4", "w4_per_block", "w8a8", "w8a8_affine", "w4a8", "fp8", "mxfp4")
    }
    assert all(first == second for first, second in whole.values())


def test_registered_statistics_are_named_by_configs_and_calibrate() -> None:
    from graphopt.quantization import Quantizer
    from graphopt.quantization.config import ModuleQuantizerConfig
    from graphopt.quantization.spec import (
        QParamsCalculatorBase,
        QuantizationSpec,
        RunningRangeMixin,
    )

    @QParamsCalculatorBase.register("widest")
    class Widest(RunningRangeMixin, QParamsCalculatorBase):
        """The widest range of all tensors."""

        def update_running_range(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
            return (
                torch.minimum(self.running_min, min_val),
                torch.maximum(self.running_max, max_val),
            )

    def scales(name: str) -> list[float | None]:
        spec = {"*": QuantizationSpec(qparam_calculator_cls=name)}
        inside = ModuleQuantizerConfig(op_input_spec=spec, op_output_spec=spec)
        quantizer = Quantizer(
            nn.Sequential(nn.Linear(4, 4)).eval(), QuantizerConfig(global_config=inside)
        )
        torch.manual_seed(0)
        quantizer.prepare((torch.randn(2, 4),))
        quantizer.calibrate([torch.randn(2, 4), 3 * torch.randn(2, 4), torch.randn(2, 4)])
        return [record.scale for record in quantizer.program().report().activations]

    torch.manual_seed(0)
    first = scales("widest")
    torch.manual_seed(0)
    assert first == scales("global_minmax")
    assert QuantizationSpec(qparam_calculator_cls="widest").qparam_calculator_cls is Widest
    with pytest.raises(ConfigError, match="already names"):
        QParamsCalculatorBase.register("global_minmax")(Widest)


PRUNING = """
pruning_spec: &half
  target_sparsity: 0.5
  pruning_scheme: {type: unstructured}
magnitude_pruning_config:
  global_config:
    op_state_spec: {weight: *half}
    sparsity_schedule: {type: polynomial_decay, total_iters: 5}
  module_type_configs:
    torch.nn.modules.conv.Conv2d:
      op_state_spec:
        weight: {target_sparsity: 0.75, pruning_scheme: {type: n_m_structured, n: 2, m: 4, axis: 1}}
  module_name_configs:
    head: null
"""


def test_pruning_configs_are_read_from_yaml() -> None:
    from io import StringIO

    from graphopt.pruning.config import MagnitudePrunerConfig, PolynomialDecaySchedule
    from graphopt.pruning.spec import NMStructured, Unstructured, default_weight_pruning_spec

    config = MagnitudePrunerConfig.from_yaml(StringIO(PRUNING))
    assert config.global_config is not None
    assert config.global_config.sparsity_schedule == PolynomialDecaySchedule(total_iters=5)
    spec = config.global_config.op_state_spec["weight"]
    assert spec == default_weight_pruning_spec()
    assert isinstance(spec.pruning_scheme, Unstructured)
    conv = config.module_type_configs["torch.nn.modules.conv.Conv2d"].op_state_spec["weight"]
    assert conv.pruning_scheme == NMStructured(n=2, m=4, axis=1)
    assert config.module_name_configs["head"] is None
