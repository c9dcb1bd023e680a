"""The calibration of palettes: gradients and inputs are collected while the user's data runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.analysis.matrix_form import weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.errors import CalibrationError, InputError
from graphopt.fitting.algorithms import ALGORITHMS, calibrated_word
from graphopt.fitting.evidence import Evidence, Palettes, Resources
from graphopt.fitting.sensitivity import GradientCollector, LossFn, label_free_loss
from graphopt.fitting.sensitivity.taps import TAPS, insert_taps
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.captured_module import CapturedModule, holder_of, set_tensor
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program, share_graph
from graphopt.ir.state import current_start, writes
from graphopt.progress import track
from graphopt.run.batches import Batch, StatefulCall, run_call
from graphopt.run.calibration_data import refuse_non_finite
from graphopt.run.synthetic_data import varied_calls

__all__ = [
    "Calibrator",
    "algorithms_of",
    "needs_gradients",
    "set_biases",
    "shapes_to_weigh",
    "without_data",
]


def algorithms_of(annotated: Program) -> dict[str, str]:
    """Name of each weight to be palettized → the algorithm that a calibration runs for it."""
    weights = find_weights(annotated.graph_module)
    specs = {
        weight.name: annotation.spec
        for weight in weights
        if (annotation := palette_annotation(weight.nodes[0])) is not None
    }
    uses = weight_uses(annotated.graph_module, [each for each in weights if each.name in specs])
    return {
        name: calibrated_word(spec, feedable=len(uses.get(name, ())) == 1)
        for name, spec in specs.items()
    }


def needs_gradients(algorithm: str) -> bool:
    """Whether an algorithm needs a backward pass over data."""
    chosen = ALGORITHMS[algorithm]
    return chosen.needs_sensitivities or chosen.needs_inputs


def without_data(gm: fx.GraphModule, weighed: Collection[str] = ()) -> list[str]:
    """Weights whose algorithms need data, each with the algorithm and the config path that asks for it.

    Args:
        gm: A graph that `AnnotatePalettization` has seen.
        weighed: Weights with known sensitivities, which are all that some algorithms need.
    """
    waiting = []
    for weight in find_weights(gm):
        annotation = palette_annotation(weight.nodes[0])
        if annotation is None:
            continue
        algorithm = ALGORITHMS.get(annotation.spec.algorithm)  # None for "auto"
        if algorithm is None:
            continue
        unweighed = algorithm.needs_sensitivities and weight.name not in weighed
        if algorithm.needs_inputs or unweighed:
            waiting.append(f"{weight.name}: {algorithm.name!r} ({annotation.path})")
    return waiting


def set_biases(gm: CapturedModule, biases: Mapping[str, Tensor]) -> None:
    """Give biases the values by which a fit has corrected them; tensors are replaced."""
    for path, value in biases.items():
        holder, name = holder_of(gm, path)
        set_tensor(holder, name, value)


def shapes_to_weigh(annotated: Program) -> dict[str, torch.Size]:
    """Name → shape of the weights whose errors sensitivities weigh."""
    algorithms = algorithms_of(annotated)
    return {
        weight.name: weight.tensor.shape
        for weight in find_weights(annotated.graph_module)
        if weight.name in algorithms and needs_gradients(algorithms[weight.name])
    }


class Calibrator:
    """Collects while the prepared module runs inside `calibration_mode`.

    Args:
        annotated: The program with its original weights.
        loss_fn: `loss_fn(output, target)`, the mean over a batch; None takes the label-free loss.
        label_free: "mse" or "kl", see `graphopt.sensitivity.label_free_loss`.
        per_sample: Square the gradient of every sample; False takes `E[δ²]·E[x²]`, cheaper and with
            less variance from few samples, but blind to which inputs and gradients come together.
        squares: Collect sensitivities even where no algorithm uses them, to save them.
        folder: Folder for the sums, which are mapped into memory; None keeps them there.
        seed: Seed of the label-free loss.
    """

    def __init__(
        self,
        annotated: Program,
        *,
        loss_fn: LossFn | None = None,
        label_free: str = "mse",
        per_sample: bool = True,
        squares: bool = False,
        folder: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.annotated = annotated
        self.algorithms = algorithms_of(annotated)
        self.batches: list[Batch] = []
        self.steps = 0
        self._calls = 0
        self._remarks: list[str] = []
        self._loss_fn = loss_fn
        self._label_free = label_free
        self._generator = torch.Generator().manual_seed(seed)
        chosen = [ALGORITHMS[name] for name in self.algorithms.values()]
        self._layerwise = any(algorithm.needs_inputs for algorithm in chosen)
        self._watched = [
            name for name, algorithm in self.algorithms.items() if needs_gradients(algorithm)
        ]
        self.collector = GradientCollector(
            per_sample=per_sample,
            squares=squares or any(algorithm.needs_sensitivities for algorithm in chosen),
            positions=self._layerwise,
            folder=folder,
        )

    def step(self, output: Any, target: Any = None) -> Tensor:
        """Take in one batch: runs the loss and its backward pass.

        Args:
            output: What the prepared module returned for the batch.
            target: Second argument of the loss function; not used by the label-free loss.

        Returns:
            The loss, detached.

        Raises:
            InputError: The loss depends on no watched weight.
        """
        if not self._watched:
            return torch.zeros(())
        batch = _batch_size(output)
        if self._loss_fn is None:
            loss, scale = label_free_loss(output, self._generator, self._label_free), 1.0
        else:
            loss = self._loss_fn(output, target)
            # gradients of a mean over the batch are those of one sample over the batch's size
            loss, scale = (loss.sum(), 1.0) if loss.ndim else (loss, float(batch))
        if not loss.requires_grad:
            raise InputError(
                "the loss has no gradient: call the prepared module inside the context with"
                " gradients enabled, and compute the loss from its output"
            )
        self.collector.scale = scale
        loss.backward()
        self.collector.samples += batch
        self.steps += 1
        return loss.detach()

    @contextmanager
    def watching(self, prepared: CapturedModule) -> Iterator[None]:
        """Let a prepared module run with its original weights, watched."""
        tapped = share_graph(self.annotated.graph_module)
        edit = Editor(tapped)
        edit.relax_views()
        insert_taps(edit, self.collector, self._watched)
        for node in [node for node in tapped.graph.nodes if writes(node) and not node.users]:
            edit.erase(node)  # gradients need the state as it was read
        before, graph = _state(prepared), prepared.graph
        hook = prepared.register_forward_pre_hook(self._remember, with_kwargs=True)
        try:
            for path in before:
                holder, name = holder_of(self.annotated.graph_module, path)
                _tensor(prepared, path).data = getattr(holder, name).detach()
            for parameter in prepared.parameters():
                parameter.requires_grad_(False)
            if hasattr(tapped, TAPS):
                prepared.add_module(TAPS, getattr(tapped, TAPS))
            prepared.graph = tapped.graph
            yield
        finally:
            hook.remove()
            if hasattr(prepared, TAPS):
                delattr(prepared, TAPS)
            prepared.graph = graph
            for path, (value, trained) in before.items():
                restored = _tensor(prepared, path)
                restored.data = value
                restored.requires_grad_(trained)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_non_finite(cast("CapturedModule", module), (args, kwargs), self._calls)
        self._calls += 1
        if self._layerwise or self.steps == 0:
            call, start = pytree.tree_map(_detached, ((args, kwargs), dict(current_start())))
            self.batches.append(StatefulCall(call, start) if start else call)
        else:
            self.batches.clear()

    def collect(self, prepared: CapturedModule, progress: bool | None) -> None:
        """Run the label-free loss on the inputs that were seen, if no step was made.

        Raises:
            CalibrationError: No data ran through the module.
        """
        if self.steps or not self._watched:
            return
        if not self.batches:
            raise CalibrationError(
                "no data ran inside calibration_mode(); call the prepared module there"
            )
        batches, kept = list(self.batches), self._layerwise
        with self.watching(prepared), torch.enable_grad():
            for batch in track(batches, "gradients", len(batches), enabled=progress):
                self.step(run_call(prepared, batch))
        self.batches = batches if kept else []

    def vary(self, prepared: CapturedModule, progress: bool | None) -> None:
        """Run random tokens as well, where those of the data are too few to fit layers' outputs to.

        Losses are label-free there. The remark that says so goes to what `palettes` gives.
        """
        if not self._layerwise or not self._watched:
            return
        calls, remark = varied_calls(prepared, self.batches, seed=0)
        if not calls:
            return
        self._remarks.append(remark)
        given, self._loss_fn = self._loss_fn, None
        try:
            with self.watching(prepared), torch.enable_grad():
                for batch in track(calls, "random tokens", len(calls), enabled=progress):
                    self.step(run_call(prepared, batch))
        finally:
            self._loss_fn = given

    def palettes(
        self,
        seed: int,
        progress: bool | None,
        *,
        correct_bias: bool,
        resources: Resources | None = None,
    ) -> Palettes:
        """Tables and codes after the data.

        Args:
            seed: Seed of whatever is drawn.
            progress: Show bars; None shows them on a terminal.
            correct_bias: Whether biases may take up the mean error of their layers.
            resources: Where layers are fitted.
        """
        evidence = Evidence(
            self.batches,
            self.collector.finish(),
            self.collector.saliency,
            self.collector.spread,
            correct_bias,
            seed,
            progress,
            resources=Resources() if resources is None else resources,
        )
        result = Palettes(remarks=list(self._remarks))
        for name, algorithm in ALGORITHMS.items():
            weights = [weight for weight, own in self.algorithms.items() if own == name]
            if weights:
                algorithm.fit(self.annotated, weights, evidence, result)
        return result


def _state(module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {
        name: (value.data, value.requires_grad)
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }


def _tensor(module: nn.Module, path: str) -> Tensor:
    holder, name = holder_of(module, path)
    tensor = getattr(holder, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _batch_size(output: Any) -> int:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    return 1
