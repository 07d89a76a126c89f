# SPDX-License-Identifier: Apache-2.0
"""What options of several commands have in common: their texts and choices."""

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "cuda")
PRECISION = (
    "Dtype of matrix products (auto: fp32 on a CPU, bf16 on a GPU, fp16 on a GPU without bf16)"
)
BACKEND = "Kernels to run"
FUSE = "Run the fused encoder; --no-fuse runs segment_anything's encoder, for comparison"
CHUNK = "Objects that the mask decoder processes at once"
THREADS = "Number of torch's CPU threads"
CHECKPOINT = "The SAM weights that the adapter was trained on"
NOT_RANDOM = "required, unless the weights were random"
ADAPTER = "Folder that finetune wrote: a run, or an adapter such as runs/NAME/adapter/last"
