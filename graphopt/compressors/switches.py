"""What people switch by hand in a prepared module: observers and rounding, everywhere or in a module."""

from __future__ import annotations

from abc import ABC, abstractmethod

from graphopt.errors import InputError
from graphopt.prepared import ActivationQuantizer, WeightQuantizer

__all__ = ["AnyQuantizer", "Switches"]

AnyQuantizer = ActivationQuantizer | WeightQuantizer


class Switches(ABC):
    """Switches of quantizers; once one is used, schedules no longer count."""

    _by_hand = False

    @abstractmethod
    def _quantizers(self) -> list[AnyQuantizer]:
        """All of a prepared module."""

    def enable_observer(self, module: str | None = None) -> None:
        """Let ranges follow the data, everywhere or in the module of that name.

        Schedules no longer count from then on.
        """
        self._set(module, observing=True)

    def disable_observer(self, module: str | None = None) -> None:
        """Keep ranges as they are."""
        self._set(module, observing=False)

    def enable_fake_quant(self, module: str | None = None) -> None:
        """Round, everywhere or in the module of that name."""
        self._set(module, rounding=True)

    def disable_fake_quant(self, module: str | None = None) -> None:
        """Do not round."""
        self._set(module, rounding=False)

    def _set(self, module: str | None, **flags: bool) -> None:
        self._by_hand = True
        chosen = [
            quantizer
            for quantizer in self._quantizers()
            if module is None
            or quantizer.origin.module == module
            or quantizer.origin.module.startswith(f"{module}.")
        ]
        if not chosen:
            known = sorted({quantizer.origin.module for quantizer in self._quantizers()})
            raise InputError(f"no quantizer belongs to module {module!r}; there are: {known}")
        for quantizer in chosen:
            for flag, value in flags.items():
                setattr(quantizer, flag, value)
            if isinstance(quantizer, WeightQuantizer):
                quantizer.forget()
