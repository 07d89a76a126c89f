# SPDX-License-Identifier: Apache-2.0
"""What other libraries need from samfast, one library a file; each is imported on first use."""
