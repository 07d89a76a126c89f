# SPDX-License-Identifier: Apache-2.0
"""Models without samfast's own operators, which other programs run.

form    a copy of a model whose adapters are plain modules of torch
parts   SAM's halves as ``samfast export`` writes them
onnx_files   ONNX files of these
onnx_check   these files in onnxruntime against torch
"""
