# SPDX-License-Identifier: Apache-2.0
"""Pages of the Python reference: each public name once, under the module that users import."""

import importlib
import inspect
from collections.abc import Callable

import samfast
from samfast.integrations.torchvision import declare_missing_schemas

PAGES = {  # by the page, the module and what it is for
    "samfast": ("samfast", "What a script needs most. `import samfast` loads neither Triton nor "
                "another library; each name is imported on first use."),
    "functional": ("samfast.functional", "Every operation as a function. Each takes `backend=` "
                   "and has a backward of its own; [Backends](backends.md) says which run where."),
    "modules": ("samfast.modules", "Adapted and fused layers. `samfast.attach` and `samfast.fuse` "
                "put them into a model; build one yourself where you write the model."),
    "models": ("samfast.models", "SAM itself: build it, load weights, and a differentiable forward "
               "for batches."),
    "files": ("samfast.files", "Adapter folders, and what is read from files of other programs."),
    "integrations": ("samfast.integrations", "`samfast.fuse` finds modules of other libraries by "
                     "itself; call these to ask or to translate."),
    "training": ("samfast.training", "What the command line runs, for your own program. Settings "
                 "are dataclasses; [Command line](command-line.md) lists their fields."),
    "counters": ("samfast.counters", "Count launches, host syncs, bytes, FLOP and saved bytes of "
                 "any call."),
}  # fmt: skip
NAMED = {  # of modules that have no list of public names
    "files": ("adapter_files.save_adapter", "adapter_files.load_adapter",
              "format.read_adapter_config"),
    "integrations": ("check.check", "peft_config.translated", "sam3", "timm_sam",
                     "transformers_sam", "transformers_sam3", "peft_layers", "micro_sam",
                     "qkv_wrappers"),
    "training": ("loop.finetune", "score.score", "predict.predict", "callbacks.Callback"),
    "counters": ("count", "Counts", "counting", "saved_bytes", "SavedBytes"),
}  # fmt: skip


def page_of(name: str) -> Callable[[], str]:
    """What makes one page of the reference."""
    return lambda: page(name)


def page(name: str) -> str:
    """A page: its module's purpose, then one entry for each public name."""
    module, about = PAGES[name]
    entries = [_entry(target, heading) for target, heading in names(name)]
    return f"# {module}\n\n{about}\n\n" + "\n".join(entries)


def names(name: str) -> list[tuple[str, str]]:
    """(where a public name is defined, what users call it) in alphabetical order."""
    module = PAGES[name][0]
    if name in NAMED:
        return [(f"{module}.{place}", f"{module}.{place}") for place in NAMED[name]]
    if name == "samfast":
        return [(f"{place}.{n}", f"samfast.{n}") for n, place in sorted(samfast._EXPORTS.items())]
    declare_missing_schemas()
    found, owner = [], importlib.import_module(module)
    for public in sorted(owner.__all__):
        value = getattr(owner, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            found.append((f"{value.__module__}.{value.__qualname__}", f"{module}.{public}"))
    return found


def _entry(target: str, heading: str) -> str:
    label = heading.rpartition(".")[2]
    return f"::: {target}\n    options:\n      heading: {heading}\n      toc_label: {label}\n"
