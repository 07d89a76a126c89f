# SPDX-License-Identifier: Apache-2.0
"""Callbacks: a program's own code, called while ``finetune`` trains."""

from typing import Any

from torch import Tensor


class Callback:
    """Base class for callbacks of ``finetune``; override any of its methods.

    Every process calls them. run is a ``samfast.training.run.Run``; read ``run.sam``,
    ``run.model``, ``run.optimizer``, ``run.step``, ``run.rows`` and ``run.best``. Changing them, or
    drawing from the random generators, changes training. ``run.stop(reason)`` ends training after
    this epoch, with all results.

    Example:
        class Log(Callback):
            def on_epoch(self, run, row):
                wandb.log(row)

        finetune(settings, callbacks=[Log()])
    """

    def on_begin(self, run: Any) -> None:
        """Called before the first step; a resumed run is already at its state."""

    def on_step(self, run: Any, loss: Tensor) -> None:
        """Called after each optimizer step. loss: of its last batch, on the device, detached"""

    def on_epoch(self, run: Any, row: dict[str, Any]) -> None:
        """Called after an epoch is validated and saved. row: its line of ``metrics.csv``"""

    def on_end(self, run: Any, summary: dict[str, Any]) -> None:
        """Called when a run ends without interruption. summary: what ``finetune`` returns"""


def check_callbacks(callbacks: Any) -> None:
    """Raise ValueError unless this is a sequence of callbacks."""
    if isinstance(callbacks, Callback):
        raise ValueError(f"expected a list of callbacks, got a {type(callbacks).__name__}")
    for own in callbacks:
        missing = [name for name in vars(Callback) if name.startswith("on_")]
        missing = [name for name in missing if not callable(getattr(own, name, None))]
        if missing:
            raise ValueError(
                f"callbacks has a {type(own).__name__} without {missing[0]}; inherit "
                "samfast.training.callbacks.Callback"
            )
