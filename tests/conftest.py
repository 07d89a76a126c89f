# SPDX-License-Identifier: Apache-2.0
"""Runs before any test module is imported."""

import functools
import gc
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# Triton decides at import whether kernels are interpreted; without a GPU that is how they run.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What torch asks for before it calls a GPU's products deterministic; read when they are first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Processes of pytest-xdist share the cores; --threads says otherwise.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from junit_now import JunitNow
from marks import keep_where_meant, leave_each_value_once, leave_samples

from samfast.integrations.torchvision import declare_missing_schemas

declare_missing_schemas()


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    """A launch in Triton's interpreter patches Triton's language for its module. By itself each
    call from there to another function of ours does so again, which takes most of the time; and
    each patch looks for what there is to patch, each value for the type that NumPy has for its."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language.core import block_type, is_builtin, pointer_type
    from triton.runtime import interpreter

    called, found = interpreter.InterpretedFunction.__call__, {}
    type_of = functools.cache(interpreter._get_np_dtype)

    def call(self, *args, **kwargs):
        if not self.fn.__module__.startswith("samfast"):
            return called(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    def patch_builtins(package, builder, scope):
        if not found.get(package):  # nothing is found where a launch has patched it already
            members = inspect.getmembers(package, is_builtin)
            found[package] = [name for name, _ in members]
        for name in found[package]:
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    def numpy_type(dtype):
        one = dtype.element_ty if isinstance(dtype, block_type) else dtype
        return np.dtype(np.uint64) if isinstance(one, pointer_type) else type_of(one)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_patch_builtin", patch_builtins)
        patch.setattr(interpreter, "_get_np_dtype", numpy_type)
        yield


@pytest.fixture(scope="session", autouse=True)
def right_bfloat16():
    """Of the interpreter, by itself wrong."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from bfloat16 import mended

    with mended():
        yield


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, metavar="N", help="torch's threads in each process")
    parser.addoption(
        "--draws",
        default="1",
        metavar="N",
        help="run tests on N draws of their numbers, or on M:N",
    )
    parser.addoption(
        "--junit-now", type=Path, metavar="FILE", help="write junit xml after every test"
    )


def pytest_configure(config):
    if threads := config.getoption("threads"):
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
    if (path := config.getoption("junit_now")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(JunitNow(path))


def pytest_generate_tests(metafunc):
    draws = [int(number) for number in metafunc.config.getoption("draws").split(":")]
    if draws not in ([1], [0, 1]):
        metafunc.parametrize("same_numbers", range(*draws), indirect=True, ids="draw{}".format)


@pytest.fixture(autouse=True)
def same_numbers(request, monkeypatch):
    """In every run, whichever tests ran before in this process; other ones in other draws."""
    draw = getattr(request, "param", 0)
    if draw:

        class Generator(torch.Generator):
            def manual_seed(self, seed):
                return super().manual_seed(seed + draw * 1_000_003)

        seed = torch.manual_seed
        monkeypatch.setattr(torch, "Generator", Generator)
        monkeypatch.setattr(torch, "manual_seed", lambda given: seed(given + draw * 1_000_003))
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    made = yield
    if isinstance(made, list) and made:  # the cases of one test
        keep_where_meant(made, strict=not torch.cuda.is_available())
        leave_samples(made)
        leave_each_value_once(made)
    return made


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What needs a GPU is left out where there is none."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish():
    """What lives until the end need not be looked through whenever saved bytes are counted."""
    gc.collect()
    gc.freeze()


SMALL_MODELS = ("integrations", "models", "modules", "training")


@pytest.fixture(scope="module", autouse=True)
def one_thread(request):
    """Tests of models run on one thread: models this small gain nothing from more, and lose much
    where cores are shared. Tests of kernels keep the threads that users have."""
    if request.path.parent.name not in SMALL_MODELS:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
