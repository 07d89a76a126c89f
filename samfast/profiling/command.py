# SPDX-License-Identifier: Apache-2.0
"""``samfast profile``: checks, run and output files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samfast.adapters.options import options_of
from samfast.files.placing import write_whole
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models.sam3_folder import NAME as SAM3
from samfast.profiling.compare import compare
from samfast.profiling.context import result_of
from samfast.profiling.outputs import check_outputs, trace_bytes
from samfast.profiling.recorder import Recorder, plan
from samfast.profiling.script import run_script
from samfast.profiling.settings import ProfileSettings
from samfast.profiling.workload import MODEL, backend_of, build, model_flop
from samfast.training.checks import check_options

_OF_MODEL = (
    "model",
    "checkpoint",
    "method",
    "image_size",
    "batch",
    "memory",
    "device",
    "dtype",
    "backend",
)


def run_profile(settings: ProfileSettings) -> dict[str, Any]:
    """Profile as the settings say; return the result that ``--json`` prints.

    Raises ValueError or FileNotFoundError for wrong settings, files and scripts, before anything is
    written.
    """
    check_options(settings)
    _check_script_options(settings)
    if settings.compare and settings.model == SAM3:
        raise ValueError(
            f"--compare needs segment_anything's sizes, which {SAM3} does not have; leave it out, "
            "or use vit_b"
        )
    check_outputs(
        (settings.trace, settings.plot, settings.html), _is_drawn(settings), settings.script
    )
    settings = _from_here(settings)
    declare_missing_schemas()
    if settings.script is not None:
        result, recorder = _of_script(settings)
    else:
        with backend_of(settings):
            result, recorder = _of_model(settings)
    for path, data in _outputs(settings, result, recorder):
        write_whole(path, data())
    return result


def _from_here(settings: ProfileSettings) -> ProfileSettings:
    """The settings with absolute files, as a script may go to another folder."""
    names = ("trace", "plot", "html")
    given = {name: getattr(settings, name) for name in names}
    return dataclasses.replace(settings, **{n: p and p.absolute() for n, p in given.items()})


def _check_script_options(settings: ProfileSettings) -> None:
    """Raise ValueError for options of a model if a script is given."""
    if settings.script is None:
        return
    if settings.compare:
        raise ValueError("--compare builds its models itself; leave it out, or --script")
    for option in options_of(ProfileSettings):
        value = getattr(settings, option.name)
        if option.name in _OF_MODEL and value != option.default:
            flag = f"--{option.name.replace('_', '-')}"
            raise ValueError(
                f"{option.name} is {value}, but the script sets that itself; leave out {flag}, or "
                "--script"
            )


def _is_drawn(settings: ProfileSettings) -> bool:
    return settings.plot is not None or settings.html is not None


def _of_script(settings: ProfileSettings) -> tuple[dict[str, Any], Recorder]:
    steps = plan(settings.skip, settings.steps)
    assert settings.script is not None
    recorder = run_script(settings.script, settings.arguments, steps, settings.json)
    words = " ".join((str(settings.script), *settings.arguments))
    known = {"what": f"{len(recorder.seconds)} steps of {words}"}
    return result_of(recorder, settings.fresh_ceilings, known), recorder


def _of_model(settings: ProfileSettings) -> tuple[dict[str, Any], Recorder]:
    run = build(settings)
    with Recorder(plan(settings.skip, settings.steps), run.model) as recorder:
        for _ in range(settings.skip + settings.steps):
            run.step()
    recorder.plain = [run.timed() for _ in range(settings.steps)]  # as warm as those profiled
    name = settings.model or MODEL
    side, dtype = run.batch[0].shape[-1], str(run.dtype).removeprefix("torch.")
    memory = settings.memory or "fast"
    known = {
        "what": f"{name} at {side} pixels, {settings.method}, batches of {settings.batch}, memory "
        f"{memory}, {dtype}",
        "model": name,
        "method": settings.method,
        "image_size": side,
        "batch": settings.batch,
        "memory": memory,
        "model_flop": model_flop(settings),
    }
    result = result_of(recorder, settings.fresh_ceilings, known)
    if settings.compare:
        result["compare"] = compare(settings, run)
    return result, recorder


def _outputs(
    settings: ProfileSettings, result: dict[str, Any], recorder: Recorder
) -> list[tuple[Path, Callable[[], bytes]]]:
    """(file, what makes its content)"""
    made: list[tuple[Path, Callable[[], bytes]]] = []
    if settings.trace is not None:
        made.append((settings.trace, lambda: trace_bytes(recorder.profiler)))
    if _is_drawn(settings):
        from samfast.profiling.page import page
        from samfast.profiling.plot import plot_png

        if settings.plot is not None:
            made.append((settings.plot, lambda: plot_png(result)))
        if settings.html is not None:
            made.append((settings.html, lambda: page(result).encode()))
    return made
