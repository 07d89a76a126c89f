# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.rope.op import rope
from samfast.kernels.rope.tables import axial_tables, tables_of

__all__ = ["axial_tables", "rope", "tables_of"]
