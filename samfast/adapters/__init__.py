# SPDX-License-Identifier: Apache-2.0
"""What every adapter has in common, whatever its method."""
