# SPDX-License-Identifier: Apache-2.0
"""Tests that `make test-slow` runs and `make test` does not, where kernels are interpreted.

Each stands beside a quicker one of the same property.
"""

# By file and parameter. What autograd, layouts and modules ask of an operator they ask on the
# backends of a CPU; the interpreted kernels have their own files, and narrow dtypes one a file.
KINDS = (
    ("test_autograd.py", "triton"),
    ("black_box.py", "triton"),
    ("lora_linear/test_values.py", "triton-float16"),
    ("expert_gate/test_gate.py", "triton-34x1x2x5x3"),
    ("sam_block/test_stages.py", "triton-21x"),
    ("adapt_former/test_side.py", "test_triton["),
    ("sam_block/test_autograd.py", "torch.bfloat16"),
)
TESTS = (
    "conv_experts/test_conv_lora.py::test_published_numbers[windows_train-triton]",
    "conv_experts/test_conv_lora.py::test_a_loss_that_is_not_used_gives_the_gate_zeros[triton]",
    "conv_experts/test_conv_lora.py::test_fourteen_launches_and_no_sync[True]",
    "conv_experts/test_conv_lora.py::test_published_numbers[scale5-triton]",
    "conv_experts/test_conv_lora.py::test_saved_bytes[triton]",
    "relpos_attention/test_autograd.py::test_compile_fullgraph[windows]",
    "relpos_attention/test_triton.py::test_every_order_gives_the_same_bits[one-hot]",
    "models/test_segment_chunks.py::test_compiles_without_a_graph_break",
    "training/test_finetune.py::test_two_runs_with_one_seed_are_equal",
    "modules/test_lora_training.py::test_vit_tiny_converges_as_the_literal_method",
    "relpos_attention/test_triton.py::test_padded_windows[bias-dtype0]",
    "relpos_attention/test_triton.py::test_tiles_that_are_full",
    "conv_experts/test_triton.py::test_padded_windows[dtype0]",
    "relpos_attention/test_triton.py::test_kinds_of_padding[lines-rows]",
    "relpos_attention/test_triton.py::test_kinds_of_padding[lines-None]",
    "relpos_attention/test_triton.py::test_offsets_beyond_two_to_the_31",
    "lora_linear/test_guarded.py::test_offsets_beyond_two_to_the_31",
    "sam_block/test_triton.py::test_offsets_beyond_two_to_the_31",
    "modules/test_conv_lora_training.py::test_vit_tiny_converges_as_the_literal_method",
    "modules/test_conv_lora_black_box.py::test_black_box[auto-full-compiled]",
    "modules/test_conv_lora_golden.py::test_golden[tokens_train-triton]",
    "modules/test_rel_pos_attention_black_box.py::test_black_box[SamBlock-auto-compiled]",
    "modules/test_sam_block_model.py::test_compiled_whole[everywhere-batches0]",
    "training/test_conv_lora_recipe.py::test_two_runs_with_one_seed_are_equal",
    "training/test_dry_run.py::test_casts_as_autocast_does[bfloat16]",
    "training/test_dry_run.py::test_equals_a_real_step[minimal]",
    "relpos_attention/test_triton.py::test_kinds_of_padding[one-hot-bias]",
    "relpos_attention/test_triton.py::test_kinds_of_padding[one-hot-rows]",
    "relpos_attention/test_triton.py::test_layouts[one-hot-packed]",
    "relpos_attention/test_triton.py::test_layouts[one-hot-spread]",
    "relpos_attention/test_triton.py::test_layouts[one-hot-turned]",
    "relpos_attention/test_triton.py::test_heads_in_two_parts[80-float16]",
    "relpos_attention/test_triton.py::test_heads_in_two_parts[48-float32]",
    "relpos_attention/test_triton.py::test_heads_in_two_parts[48-float16]",
    "relpos_attention/test_triton.py::test_only_what_is_wanted[True-False]",
    "relpos_attention/test_values.py::test_a_map_of_sam[torch]",
    "conv_experts/test_triton.py::test_values[8x14x14x14x14-r1-12345678]",
    "conv_experts/test_triton.py::test_values[4x3x18x3x18-r1-2514]",
    "conv_experts/test_triton.py::test_values[1x18x2x18x2-r2-2]",
    "conv_experts/test_triton.py::test_values[8x9x13x9x13-r1-12345678-depthwise]",
    "conv_experts/test_triton.py::test_padded_windows[dtype2]",
    "expert_gate/test_triton.py::test_more_samples_than_a_block[False]",
    "modules/test_conv_lora_golden.py::test_golden[scale2-triton]",
    "modules/test_conv_lora_compiled.py::test_batches_and_token_counts_may_change",
    "modules/test_rel_pos_attention.py::test_attention_of_a_large_map[auto]",
    "modules/test_aux_loss.py::test_compiled_model",
    "gpu/test_conv_lora_layer.py::test_experts_repeat_bit_for_bit[triton]",
    "training/test_fused_training.py::test_the_same_training_with_and_without[conv-lora]",
    "test_packaging.py::test_imports_of_this_installation[elsewhere]",
    "test_packaging.py::test_an_editable_installation_works_elsewhere",
)


def is_long(name: str) -> bool:
    """Of a test's full name. Those for a GPU only prove here that they can run."""
    path, _, test = name.partition("::")
    if path.startswith("tests/gpu/"):
        return True
    return name.endswith(TESTS) or any(path.endswith(f) and p in test for f, p in KINDS)
