# SPDX-License-Identifier: Apache-2.0
"""The command line, ``samfast COMMAND`` or ``python -m samfast COMMAND``.

The commands are finetune, evaluate, predict, merge, export, warmup, profile and info.

Problems with options, files or memory end in one line on stderr, ``samfast: <sentence>``, and exit
code 2. A signal that stops a run gives 128 plus its number. SAMFAST_TRACEBACK=1 shows the
traceback. A bug ends in its traceback, a line that says where to report it, and exit code 1.
Several processes end in the same way (``samfast.training.ending``).
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from samfast.adapters.options import option
from samfast.training.ending import Ending, is_lost, run_together
from samfast.training.launched import ALONE, Launched, launched

_EXTRA = 'pip install "samfast[train]"'


@dataclass(frozen=True, kw_only=True)
class InfoSettings:
    """Show what is installed and which kernels run here."""

    check: bool = option(False, "Run every operation on every backend against float64")
    json: bool = option(False, "Print JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    let_waiting_threads_sleep()
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version"]:
        import samfast

        print(f"samfast {samfast.__version__}")
        return 0
    try:
        place = launched()
    except ValueError as error:
        _say(str(error))
        return 2
    if place.processes > 1:
        return run_together(place, lambda: _ending(argv, place), _say)
    ending = _ending(argv, place)
    if ending.sentence is not None:
        _say(ending.sentence)
    return ending.code


def _ending(argv: list[str], place: Launched) -> Ending:
    settings = None
    try:
        settings = _parsed(argv, place)
        return Ending(_run(settings, place, argv))
    except SystemExit as stop:  # tyro exits so: 0 after --help, 2 after a wrong option
        return Ending(stop.code if isinstance(stop.code, int) else 2)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", signal.SIGINT)
        return _stop(stop, str(stop) or "interrupted", 128 + number)
    except ModuleNotFoundError as error:
        missing = error.name is not None and error.name.partition(".")[0] != "samfast"
        return _stop(error, f"{error}: {_EXTRA}" if missing else str(error))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return _stop(error, str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and place.processes > 1 and is_lost(error):
            return _lost(error, place)
        if "DataLoader worker" in str(error):
            why = str(error).partition("\n")[0].rstrip(". ")
            return _stop(error, f"a process that loads images ended ({why}); use fewer --workers")
        if not _out_of_memory(error):
            return _bug(error)
        return _stop(error, _memory_sentence(error, settings))
    except Exception as error:
        return _bug(error)


def let_waiting_threads_sleep() -> None:
    """Ask OpenMP, before torch loads it, not to spin while threads wait for each other.

    If other processes need the same cores, spinning makes training on a CPU many times slower. On
    idle cores sleeping costs little. A choice in the environment is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _parsed(argv: list[str], place: Launched = ALONE) -> Any:
    from samfast.command_line import parse
    from samfast.profiling.settings import ProfileSettings, split_script
    from samfast.training.export_settings import ExportSettings
    from samfast.training.merge_settings import MergeSettings
    from samfast.training.settings import (
        EvaluateSettings,
        FinetuneSettings,
        PredictSettings,
        WarmupSettings,
    )

    of_script: tuple[str, ...] = ()
    if argv[:1] == ["profile"]:
        argv, of_script = split_script(argv)
    commands = {
        "finetune": FinetuneSettings,
        "evaluate": EvaluateSettings,
        "predict": PredictSettings,
        "merge": MergeSettings,
        "export": ExportSettings,
        "warmup": WarmupSettings,
        "profile": ProfileSettings,
        "info": InfoSettings,
    }
    if place.first:
        settings = parse(argv, commands)
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            settings = parse(argv, commands)  # the first process reports the problem
    return dataclasses.replace(settings, arguments=of_script) if of_script else settings


def _run(settings: Any, place: Launched, argv: Sequence[str]) -> int:
    from samfast.profiling.settings import ProfileSettings
    from samfast.training.export_settings import ExportSettings
    from samfast.training.merge_settings import MergeSettings
    from samfast.training.settings import (
        EvaluateSettings,
        FinetuneSettings,
        PredictSettings,
        WarmupSettings,
    )

    if place.processes > 1 and not isinstance(settings, FinetuneSettings):
        raise ValueError(
            f"{place.processes} processes were started, but only samfast finetune runs in more "
            "than one; start this without torchrun or accelerate launch"
        )
    if isinstance(settings, InfoSettings):
        from samfast import info

        return info.main(check=settings.check, json=settings.json)
    if isinstance(settings, EvaluateSettings):
        from samfast.training.score import score

        result = score(settings)
        closing = result.pop("table")
    elif isinstance(settings, PredictSettings):
        from samfast.training.predict import predict

        result = predict(settings)
        count = sum(len(image.get("tasks", [image])) for image in result["images"])
        made = "1 mask and its overlay are" if count == 1 else f"{count} masks and overlays are"
        closing = f"{made} in {result['output']}"
    elif isinstance(settings, MergeSettings):
        from samfast.training.merge import merge

        result = merge(settings)
        opens = f"{result['output']} opens with {result['opens']}"
        closing = "\n".join([opens, *result["notes"]])
    elif isinstance(settings, ExportSettings):
        from samfast.training.export import export

        result = export(settings)
        closing = (
            f"{result['output']} has {', '.join(result['files'])}; onnxruntime and torch differ by "
            f"at most {result['difference']:.1e}"
        )
    elif isinstance(settings, WarmupSettings):
        from samfast.training import warmup

        result = warmup.warmup(settings)
        closing = warmup.text(result)
    elif isinstance(settings, ProfileSettings):
        from samfast.profiling.command import run_profile
        from samfast.profiling.text import table

        result = run_profile(settings)
        closing = table(result)
    else:
        from samfast.training import dry_run
        from samfast.training.loop import finetune

        result = finetune(settings, command=argv)
        closing = dry_run.text(result) if settings.dry_run else None
    if settings.json:
        print(json.dumps(result, indent=2))
    elif closing is not None:
        print(closing)
    return 0


def _stop(error: BaseException, sentence: str, code: int = 2) -> Ending:
    if os.environ.get("SAMFAST_TRACEBACK") == "1":
        raise error
    return Ending(code, sentence)


def _bug(error: Exception) -> Ending:
    """Show the traceback, then one closing line."""
    place = f"please report it with the lines above at {_tracker()}"
    ending = _stop(error, f"this is a bug in samfast; {place}", 1)
    traceback.print_exception(error)
    return ending


def _tracker() -> str:
    """Return the address for bug reports, as the installed package gives it."""
    try:
        told = metadata.metadata("samfast").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        told = []
    urls = dict(line.split(", ", 1) for line in told)
    return urls.get("Issues") or urls.get("Homepage") or "the project's issue tracker"


def _lost(error: RuntimeError, place: Launched) -> Ending:
    others = "the other process" if place.processes == 2 else f"one of {place.processes} processes"
    sentence = f"{others} ended, so this one cannot continue; results of earlier epochs are kept"
    return _stop(error, sentence)._replace(lost=True)


def _say(sentence: str) -> None:
    print(f"samfast: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


def _memory_sentence(error: BaseException, settings: Any) -> str:
    import torch

    from samfast.training.advice import memory_advice

    advice = memory_advice(settings, not isinstance(error, torch.OutOfMemoryError))
    what = str(error).partition(". ")[0]
    return f"out of memory ({what}); {advice}" if what else f"out of memory; {advice}"


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    import torch

    # torch's CPU allocator raises a plain RuntimeError.
    cpu = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return cpu or isinstance(error, torch.OutOfMemoryError)
