# SPDX-License-Identifier: Apache-2.0
"""What mkdocstrings asks for each object that it has read."""

import griffe

from docs.makers.shapes import markdown


class Shapes(griffe.Extension):
    """Rewrites every docstring for mkdocstrings."""

    def on_object(self, *, obj, **_):
        """Called for each object once it is read."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
