# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: their format, reading, writing, and whether they belong on a model."""
