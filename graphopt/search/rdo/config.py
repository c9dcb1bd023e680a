"""RDOConfig: what `graphopt.rdo.optimize` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from graphopt.backends.registry import ExportBackend
from graphopt.config.base import read_yaml
from graphopt.errors import ConfigError
from graphopt.search.mixed_precision.candidates import Candidate, as_candidates
from graphopt.specs import QuantizationSpec
from graphopt.specs.model import SpecModel, config_error

__all__ = ["BlockOptions", "FeedbackOptions", "RDOConfig", "RoundingOptions"]


class BlockOptions(SpecModel):
    """Rate-distortion optimisation of one block after the other.

    Attributes:
        scales: Search each scale (and zero point) for the least error; False takes the range of the
            weight.
        choose: Choose candidates again by what they do to the block's outputs; False keeps those of
            the sensitivities.
        rounds: Cycles over the layers of a block at most; a block ends earlier where a cycle changes
            nothing or the error on held-out samples does not fall.
        width: Values that may be alive between two blocks: 2 cuts U-Nets, see
            `graphopt.partition.find_blocks`.
        min_layers: Fewest compressed layers of a block.

    Examples:
        >>> graphopt.rdo.RDOConfig(target_bits=4, blocks={"rounds": 1}).blocks == BlockOptions(rounds=1)
        True
    """

    scales: bool = True
    choose: bool = True
    rounds: int = Field(default=3, ge=1)
    width: int = Field(default=1, ge=1)
    min_layers: int = Field(default=1, ge=1)


class FeedbackOptions(SpecModel):
    """Hessian-guided calibration of each layer.

    Attributes:
        enabled: Feed the error of each column on to the later ones (GPTQ, arXiv 2210.17323).
        damping: Share of the mean diagonal that is added to the Hessian.
        compensate: Aim at the exact layer's outputs on exact inputs (GPTAQ, arXiv 2504.02692), and let
            biases take up the mean of the error.

    Examples:
        >>> FeedbackOptions().damping
        0.01
    """

    enabled: bool = True
    damping: float = Field(default=0.01, gt=0)
    compensate: bool = True


class RoundingOptions(SpecModel):
    """Adaptive rounding of whole blocks (AdaRound, arXiv 2004.10568; BRECQ, arXiv 2102.05426).

    Attributes:
        blocks: "sensitive" rounds the blocks with the largest losses, which together hold `share` of
            the loss; "all" or "none".
        share: See above.
        steps: Steps of Adam per block, one batch each.
        learning_rate: Of the rounding variables.
        warm_up: Share of the steps before the regulariser sets in.
        beta: Exponent of the regulariser `1 − |2h − 1|^β`, from its first to its last value.
        regulariser: Its weight, relative to the block's error before.
        scales: Train scales, table entries and biases along with the roundings.
        weighting: How errors at a block's outputs count: "fisher" by the squared gradient of the
            loss at each element (BRECQ), "mean" by its mean over the samples of a batch, which is
            less noisy, "none" all alike.
        drop: Probability that an element of a quantized activation stays unrounded in a step (QDrop,
            arXiv 2203.05740).

    Examples:
        >>> RoundingOptions(blocks="all", steps=200).steps
        200
    """

    blocks: Literal["sensitive", "all", "none"] = "sensitive"
    share: float = Field(default=0.5, gt=0, le=1)
    steps: int = Field(default=1000, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    warm_up: float = Field(default=0.2, ge=0, lt=1)
    beta: tuple[float, float] = (20.0, 2.0)
    regulariser: float = Field(default=50.0, gt=0)
    scales: bool = True
    weighting: Literal["fisher", "mean", "none"] = "mean"
    drop: float = Field(default=0.5, ge=0, lt=1)


class RDOConfig(SpecModel):
    """What `optimize` does to a model.

    Attributes:
        candidates: What every layer can become, as `graphopt.mixed_precision.as_candidates` reads
            it; a plain number of bits is an integer with a scale per output channel, or with
            `family="palette"` a palette.
        family: What a plain number of bits is.
        layer_candidates: Regular expression over names of tensors or modules, or types → candidates.
        target_bits: Largest mean of bits per weight, scales included. Tables are counted, too.
        rate_weight: λ itself, loss per bit, instead of a target.
        rate: What a weight costs: "fixed" is what its stored form takes, "entropy" what an ideal coder
            makes of its elements (scales and tables are counted as they are stored).
        metric: What is to be preserved: "kl" (nats; logits along the last axis), "mse", "psnr" or
            "cosine".
        draws: Random directions per sample of which sensitivities are made.
        gradient_memory: Bytes that gradients at the outputs of blocks may take; what does not fit is
            computed for some blocks at a time.
        fold_batchnorm: Fold batch norms before anything else.
        activations: Spec of quantized activations, or None.
        blocks: Rate-distortion optimisation.
        feedback: Hessian-guided calibration.
        rounding: Adaptive rounding.
        held_out: Share of the calibration batches that decides whether a step has helped.
        backend: Target whose sizes and limits count. None stores every width as it is.
        seed: Seed of everything that is drawn.

    Examples:
        >>> RDOConfig(target_bits=4.19, candidates=[4, 6, 8]).family
        'integer'
    """

    candidates: list[Any] | dict[str, Any] = Field(default=[4, 6, 8])
    family: Literal["integer", "palette"] = "integer"
    layer_candidates: dict[str, list[Any] | dict[str, Any]] = Field(default_factory=dict)
    target_bits: float | None = Field(default=None, gt=0)
    rate_weight: float | None = Field(default=None, ge=0)
    rate: Literal["fixed", "entropy"] = "fixed"
    metric: Literal["kl", "mse", "psnr", "cosine"] = "kl"
    draws: int = Field(default=4, ge=1)
    gradient_memory: int = Field(default=1 << 30, ge=0)
    fold_batchnorm: bool = True
    activations: QuantizationSpec | None = None
    blocks: BlockOptions = Field(default_factory=BlockOptions)
    feedback: FeedbackOptions = Field(default_factory=FeedbackOptions)
    rounding: RoundingOptions = Field(default_factory=RoundingOptions)
    held_out: float = Field(default=0.25, ge=0, lt=1)
    backend: ExportBackend | None = None
    seed: int = 0

    @field_validator("activations", mode="before")
    @classmethod
    def _named_type(cls, value: Any) -> Any:
        return {"dtype": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.target_bits is None) == (self.rate_weight is None):
            raise ValueError("give target_bits or rate_weight, and not both")
        self.all_candidates()
        return self

    def all_candidates(self) -> tuple[tuple[Candidate, ...], dict[str, tuple[Candidate, ...]]]:
        """Candidates of every layer, and those of layers that have their own.

        Raises:
            ConfigError: One cannot be read.
        """
        own = {pattern: self._read(group) for pattern, group in self.layer_candidates.items()}
        return self._read(self.candidates), own

    def _read(self, given: list[Any] | dict[str, Any]) -> tuple[Candidate, ...]:
        if isinstance(given, dict):
            return as_candidates({name: self._whole(spec) for name, spec in given.items()})
        return as_candidates([self._whole(spec) for spec in given])

    def _whole(self, given: Any) -> Any:
        if self.family == "integer" and isinstance(given, int):
            return f"int{given}"
        return given

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read plain values.

        Raises:
            ConfigError: A key is unknown or a value is wrong; the message has its path.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{cls.__name__}: expected a mapping, got {type(data).__name__}")
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise config_error(cls.__name__, error) from None

    @classmethod
    def from_yaml(cls, source: str | Path | IO[Any]) -> Self:
        """Read a YAML file or stream.

        Raises:
            ConfigError: It is no YAML mapping, or see `from_dict`.
        """
        return cls.from_dict(read_yaml(source, cls.__name__))

    def to_yaml(self) -> str:
        """The whole config as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
