# SPDX-License-Identifier: Apache-2.0
"""Demonstration: a tiny SAM learns to find coins. ``python -m samfast.training.demo [--output
runs/demo]``.

Prints validation Dice untrained, with only the mask decoder trained, and with LoRA adapters.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from samfast.cli import let_waiting_threads_sleep


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; 0 when the adapter reached the Dice it must reach."""
    parser = argparse.ArgumentParser(prog="python -m samfast.training.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    let_waiting_threads_sleep()

    from samfast.training.demo_run import run

    return 0 if run(options.output, options.seed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
