# SPDX-License-Identifier: Apache-2.0
"""What a run's two parts hold of what is scored, and sentences about what they lack."""

from collections.abc import Iterable, Iterator, Sequence

from samfast.training.folders import CheckedPair, Split, View, listed
from samfast.training.foreground import Above, Foreground
from samfast.training.stacks import of_stacks


def has_foreground(values: Iterable[float], rule: Foreground) -> bool:
    """Whether one of a mask's values is foreground."""
    if rule is None or isinstance(rule, Above):
        threshold = 0.0 if rule is None else rule.threshold
        return any(value > threshold for value in values)
    return any(value in rule for value in values)


def check_foreground(
    found: Sequence[CheckedPair], rule: Foreground, part: str, of: str = ""
) -> None:
    """Raise ValueError if no mask of a part has foreground; as in ``without_foreground``."""
    if found and not any(has_foreground(own.values, rule) for own in found):
        raise ValueError(without_foreground(part, of))


def without_foreground(part: str, of: str = "") -> str:
    """The sentence about masks that hold no object.

    part: "training" or "validation"   of: which these are, such as " of task cells"
    """
    why = "the model has nothing to learn"
    if part == "validation":
        why = "every score is 1 for a model that predicts nothing"
    return (
        f"none of the {part} masks{of} has a foreground pixel, so that {why}; move images with an "
        "object there, or choose another --seed if samfast makes the split"
    )


def missing_values(
    train: Iterable[Iterable[float]], val: Iterable[Iterable[float]], counted: Iterable[float]
) -> list[float]:
    """The counted values that masks for training hold and masks for validation do not."""
    trained, scored = set().union(*train), set().union(*val)
    return sorted(value for value in counted if value in trained and value not in scored)


def missing_sentence(values: Sequence[float], what: str) -> Iterator[str]:
    """That training has what no validation mask has; nothing where that is not so."""
    if values:
        yield (
            f"{what} {listed(values)} occur{'s' if len(values) == 1 else ''} in training masks "
            "but in no validation mask, so no score covers "
            + ("it" if len(values) == 1 else "them")
        )


def stacks_sentence(split: Split[View]) -> Iterator[str]:
    """How many stacks the images of a split are slices of; nothing where they are none."""
    train, val = (len(of_stacks(own.image for own in part)) for part in (split.train, split.val))
    if train or val:
        yield f"images are slices of stacks: {train} for training and {val} for validation"


def few_levels_sentence(pairs: Sequence[View], found: Sequence[CheckedPair]) -> Iterator[str]:
    """That scaling leaves objects in a few grey values; nothing where it does not."""
    few = [(own.few, pair) for own, pair in zip(found, pairs, strict=True) if own.few is not None]
    if few:
        least, pair = min(few, key=lambda item: item[0])
        yield (
            f"--range auto leaves few grey values in objects ({least} in {pair.image}) in "
            f"{len(few)} of {len(found)} images; --range full or --range LOW,HIGH may keep more"
        )
