# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, a folder each: options in method.py, modules in layer.py."""
