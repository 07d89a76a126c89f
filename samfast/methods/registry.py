# SPDX-License-Identifier: Apache-2.0
"""The methods by name. A new one is a folder next to this file and an entry in ``METHODS``."""

import dataclasses
from typing import Any, ClassVar

from samfast.adapters.method import Method
from samfast.methods.adapt_former.method import AdaptFormer
from samfast.methods.cobot.method import CobotLora
from samfast.methods.conv_lora.method import ConvLora
from samfast.methods.kronecker.method import Kronecker
from samfast.methods.lora.method import Lora
from samfast.methods.ta_lora.method import TaLora


@dataclasses.dataclass(frozen=True)
class DecoderOnly(Method):
    """No adapter: training changes only what ``attach`` is told to train."""

    name: ClassVar[str] = "decoder"
    target: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]  # no option here
    lacks_all = "has no adapters"

    def summary(self) -> str:
        return "no adapters; train only the mask decoder"

    def smallest_layer(self) -> None:
        return None


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Lora, ConvLora, CobotLora, AdaptFormer, Kronecker, TaLora, DecoderOnly)
}

VARIANTS: dict[str, Method] = {  # by name on the command line
    name: variant for method in METHODS.values() for name, variant in method.variants().items()
}


def method_from_config(config: Any) -> Method:
    """Build the method that ``Method.config`` describes; raise ValueError if there is none."""
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise ValueError(f"{config!r} does not describe a method")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    options = {key: value for key, value in values.items() if key != "name"}
    kind = METHODS.get(config["name"])
    if kind is None:
        raise ValueError(f"unknown method {config['name']!r}; known are {', '.join(METHODS)}")
    unknown = sorted(set(options) - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"method {kind.name!r} has no option {unknown[0]!r}")
    return kind(**options)
