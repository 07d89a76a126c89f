# SPDX-License-Identifier: Apache-2.0
"""What a program of one's own may do while ``finetune`` trains."""

from typing import Any

from torch import Tensor


class Callback:
    """Functions that ``finetune`` calls, in every process; each does nothing unless overridden.

    run is a ``samfast.training.run.Run``. They may read all of it: ``run.sam``, ``run.model``,
    ``run.optimizer``, ``run.step``, ``run.rows``, ``run.best``. What they change or draw from
    random generators changes the training. ``run.stop(reason)`` ends it after the epoch at hand,
    with all results.

    Example:
        class Log(Callback):
            def on_epoch(self, run, row):
                wandb.log(row)

        finetune(settings, callbacks=[Log()])
    """

    def on_begin(self, run: Any) -> None:
        """Before the first step; a resumed run is where it goes on from."""

    def on_step(self, run: Any, loss: Tensor) -> None:
        """After each optimizer step. loss: of its last batch, on the device, without graph"""

    def on_epoch(self, run: Any, row: dict[str, Any]) -> None:
        """After an epoch was validated and saved. row: its line of ``metrics.csv``"""

    def on_end(self, run: Any, summary: dict[str, Any]) -> None:
        """At the end of a run that was not interrupted. summary: what ``finetune`` returns"""


def check_callbacks(callbacks: Any) -> None:
    """Raise ValueError for what is not a sequence of callbacks."""
    if isinstance(callbacks, Callback):
        raise ValueError(f"callbacks is one {type(callbacks).__name__}; give a list of them")
    for own in callbacks:
        missing = [name for name in vars(Callback) if name.startswith("on_")]
        missing = [name for name in missing if not callable(getattr(own, name, None))]
        if missing:
            raise ValueError(
                f"callbacks has a {type(own).__name__} without {missing[0]}; make it a "
                "samfast.training.callbacks.Callback"
            )
