# SPDX-License-Identifier: Apache-2.0
"""Runs before any test module is imported."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# Triton decides at import whether kernels are interpreted; without a GPU that is how they run.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes of pytest-xdist share the cores.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from samfast.integrations.torchvision import declare_missing_schemas

declare_missing_schemas()


@pytest.fixture(scope="session", autouse=True)
def patched_once():
    """A launch in Triton's interpreter patches Triton's language for its module. By itself each
    call from there to another function of ours does so again, which takes most of the time."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    patching = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if not self.fn.__module__.startswith("samfast"):
            return patching(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
    yield
    InterpretedFunction.__call__ = patching


# Half a minute to ten seconds each where kernels are interpreted and graphs compiled on two cores,
# each beside a shorter case of the same property; `make test-slow` runs them.
LONG = (
    "conv_experts/test_conv_lora.py::test_published_numbers[windows_train-triton]",
    "conv_experts/test_conv_lora.py::test_a_loss_that_is_not_used_gives_the_gate_zeros[triton]",
    "conv_experts/test_conv_lora.py::test_fourteen_launches_and_no_sync[True]",
    "conv_experts/test_conv_lora.py::test_published_numbers[scale5-triton]",
    "conv_experts/test_conv_lora.py::test_saved_bytes[triton]",
    "conv_experts/test_autograd.py::test_opcheck_of_the_two_halves[triton]",
    "conv_experts/test_autograd.py::test_inputs_are_not_written_and_bits_repeat[triton]",
    "relpos_attention/test_autograd.py::test_compile_fullgraph[windows]",
    "relpos_attention/test_triton.py::test_every_order_gives_the_same_bits[one-hot]",
    "relpos_attention/test_triton.py::test_layouts[one-hot-spread]",
    "models/test_segment_chunks.py::test_compiles_without_a_graph_break",
    "training/test_finetune.py::test_two_runs_with_one_seed_are_equal",
    "modules/test_lora_training.py::test_vit_tiny_converges_as_the_literal_method",
    "conv_experts/test_autograd.py::test_odd_memory[triton]",
    "relpos_attention/test_triton.py::test_padded_windows[bias-dtype0]",
    "relpos_attention/test_triton.py::test_tiles_that_are_full",
    "relpos_attention/test_autograd.py::test_opcheck_of_the_two_halves[windows-triton]",
    "relpos_attention/test_autograd.py::test_only_the_wanted_gradients_are_made[windows-triton]",
    "conv_experts/test_triton.py::test_padded_windows[dtype0]",
    "relpos_attention/test_triton.py::test_kinds_of_padding[lines-rows]",
    "relpos_attention/test_triton.py::test_kinds_of_padding[lines-None]",
    "relpos_attention/test_triton.py::test_layouts[one-hot-turned]",
    "relpos_attention/test_triton.py::test_offsets_beyond_two_to_the_31",
    "lora_linear/test_guarded.py::test_offsets_beyond_two_to_the_31",
    "sam_block/test_triton.py::test_offsets_beyond_two_to_the_31",
    "modules/test_conv_lora_training.py::test_vit_tiny_converges_as_the_literal_method",
    "modules/test_conv_lora_black_box.py::test_black_box[triton-depthwise-error_budget]",
    "modules/test_conv_lora_black_box.py::test_black_box[auto-full-compiled]",
    "modules/test_conv_lora_golden.py::test_golden[tokens_train-triton]",
    "modules/test_rel_pos_attention_black_box.py::test_black_box[SamBlock-auto-compiled]",
    "modules/test_sam_block_model.py::test_compiled_whole[everywhere-batches0]",
    "training/test_conv_lora_recipe.py::test_two_runs_with_one_seed_are_equal",
    "training/test_dry_run.py::test_casts_as_autocast_does[bfloat16]",
    "training/test_dry_run.py::test_equals_a_real_step[minimal]",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.nodeid.endswith(LONG):
            item.add_marker(pytest.mark.slow)


SMALL_MODELS = ("models", "modules", "training")


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
