# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer next to MLPs, also under SAM-COBOT's coefficients."""
