# SPDX-License-Identifier: Apache-2.0
"""Switches in the environment."""

import os


def switch(name: str, default: bool, words: str) -> bool:
    """Whether a variable is 1 and not 0; the default if it is unset or empty.

    words: the meaning of 1 and 0   Raises ValueError for another value.
    """
    value = os.environ.get(name) or str(int(default))
    if value not in ("0", "1"):
        raise ValueError(f"{name} is {value!r}; set it to {words}")
    return value == "1"
