# SPDX-License-Identifier: Apache-2.0
"""Code for other libraries, one file each, imported on first use."""
