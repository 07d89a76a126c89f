# SPDX-License-Identifier: Apache-2.0
"""Export models without samfast's own operators, for other programs.

form    a copy of a model whose adapters are plain torch modules
parts   SAM's halves, as ``samfast export`` writes them
onnx_files   ONNX files of these parts
onnx_check   the files in onnxruntime, compared with torch
"""
