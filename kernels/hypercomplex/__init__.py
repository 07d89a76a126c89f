# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.hypercomplex.factors import kronecker_factors
from samfast.kernels.hypercomplex.op import hypercomplex_linear, kronecker_weight

__all__ = ["hypercomplex_linear", "kronecker_factors", "kronecker_weight"]
