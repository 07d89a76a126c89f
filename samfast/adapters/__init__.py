# SPDX-License-Identifier: Apache-2.0
"""What all adapters share, whatever their method."""
