# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: format, reading, writing, and checks that one fits a model."""
