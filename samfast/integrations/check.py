# SPDX-License-Identifier: Apache-2.0
"""Check ``fuse`` on each installed library: ``python -m samfast.integrations.check``.

It builds a small encoder of each library, copies it and fuses the copy. The row shows how many
blocks ran as one operator, counted in a forward. It shows the largest error of output and
gradients, as a share of what the library's own rounding allows. It says if the state dict has the
same keys in the same order. The last two columns are bytes that a forward keeps for its backward,
before and after ``fuse``: ViT-B at 1024², batch 1, float32, counted on tensors without memory.
"""

import argparse
import copy
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import samfast
from samfast.counters import saved_bytes
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.kernels._common.budget import Budget

_BLOCK = ("samfast::sam_block", "samfast::sam_block_forward")
_LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "attn.proj", "lin1", "lin2"]}
_DEPTH = 2  # of the small encoders: a block with padded windows, and one with the whole map


class Size(NamedTuple):
    """The sizes of an encoder. whole: the blocks whose attention covers the whole map"""

    image: int
    width: int
    depth: int
    heads: int
    window: int
    whole: tuple[int, ...]


SMALL = Size(80, 32, _DEPTH, 2, 3, (1,))
VIT_B = Size(1024, 768, 12, 12, 14, (2, 5, 8, 11))


class Library(NamedTuple):
    """name: of the row   needs: packages   make: builds an encoder, which takes (B, 3, H, W)"""

    name: str
    needs: tuple[str, ...]
    make: Callable[[Size], nn.Module]

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


class Row(NamedTuple):
    """The findings on one library; error: the largest share of the budget, and of what."""

    name: str
    calls: int
    error: float
    what: str
    same_keys: bool
    before: int
    after: int

    @property
    def right(self) -> bool:
        """True if every block ran fused, within the budget, with the same names."""
        return self.calls == _DEPTH and self.error <= 1.0 and self.same_keys

    def __str__(self) -> str:
        keys = "same keys" if self.same_keys else "OTHER KEYS"
        saved = f"{self.before / 2**20:8.1f} -> {self.after / 2**20:7.1f} MiB"
        recognised = f"{self.calls} of {_DEPTH} blocks"
        return f"{self.name:34} {recognised}  {self.error:5.2f} ({self.what})  {keys}  {saved}"


def _segment_anything(package: str, size: Size) -> nn.Module:
    if package == "segment_anything":
        from samfast.integrations import segment_anything

        segment_anything.load()
    modeling = importlib.import_module(f"{package}.modeling.image_encoder")
    return modeling.ImageEncoderViT(
        img_size=size.image,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window,
        global_attn_indexes=size.whole,
    )


def _transformers(prefix: str, attention: str, size: Size) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{prefix}VisionConfig")(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        image_size=size.image,
        window_size=size.window,
        global_attn_indexes=list(size.whole),
        mlp_dim=4 * size.width,
        attn_implementation=attention,
    )
    return getattr(transformers, f"{prefix}VisionModel")(config)


def _timm(size: Size) -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM(
        img_size=size.image,
        num_classes=0,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        use_rel_pos=True,
        window_size=size.window,
        global_attn_indexes=size.whole,
    )


def _with_peft(make: Callable[[Size], nn.Module], size: Size) -> nn.Module:
    import peft

    return peft.get_peft_model(make(size), peft.LoraConfig(**_LORA))


_stock = functools.partial(_segment_anything, "segment_anything")
_sdpa = functools.partial(_transformers, "Sam", "sdpa")
LIBRARIES = (
    Library("segment_anything", ("segment_anything",), _stock),
    Library(
        "segment_anything_hq",
        ("segment_anything_hq", "timm"),
        functools.partial(_segment_anything, "segment_anything_hq"),
    ),
    Library(
        "transformers SamModel, eager",
        ("transformers",),
        functools.partial(_transformers, "Sam", "eager"),
    ),
    Library("transformers SamModel, sdpa", ("transformers",), _sdpa),
    Library(
        "transformers SamHQModel, sdpa",
        ("transformers",),
        functools.partial(_transformers, "SamHQ", "sdpa"),
    ),
    Library("timm samvit", ("timm",), _timm),
    Library(
        "PEFT on segment_anything",
        ("peft", "segment_anything"),
        functools.partial(_with_peft, _stock),
    ),
    Library(
        "PEFT on transformers, sdpa",
        ("peft", "transformers"),
        functools.partial(_with_peft, _sdpa),
    ),
)


def check(library: Library) -> Row:
    """Check one library, whose packages are installed, and return its row."""
    torch.manual_seed(0)
    stock = _moved(library.make(SMALL))
    fused = samfast.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, SMALL.image, SMALL.image)
    double = copy.deepcopy(stock).double()
    budget = Budget(lambda: _run(stock, x), lambda: _run(double, x.double()), torch.float32)
    shares = budget.shares(_run(fused, x))
    worst = max(shares, key=shares.__getitem__)
    what = "output" if worst.startswith("output") else f"gradient of {worst}"
    same_keys = [*fused.state_dict()] == [*stock.state_dict()]
    with torch.device("meta"):
        large = library.make(VIT_B)
    before = _saved(large)
    return Row(
        library.name, _calls(fused, x), shares[worst], what, same_keys, before,
        _saved(samfast.fuse(large)),
    )  # fmt: skip


def _moved(model: nn.Module) -> nn.Module:
    """Fill every parameter as after training, so that no table, bias or factor is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def output(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return all tensors of a forward that depend on the blocks."""
    y = model(x)
    y = y.get("last_hidden_state") if hasattr(y, "get") else y
    return [y] if isinstance(y, Tensor) else [y[0], *y[1]]


def _run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of x and of every trained parameter in use."""
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs = output(model, x)
    generator = torch.Generator().manual_seed(1)
    towards = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    leaves = [x, *trained.values()]
    grads = torch.autograd.grad(outputs, leaves, towards, materialize_grads=True)
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | dict(zip(["x", *trained], grads, strict=True))


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func._schema.name in _BLOCK
        return func(*args, **(kwargs or {}))


def _calls(model: nn.Module, x: Tensor) -> int:
    with _Calls() as calls:
        model(x)
    return calls.count


def _saved(model: nn.Module) -> int:
    images = torch.empty(1, 3, VIT_B.image, VIT_B.image, device="meta")
    known = [images, *model.parameters(), *model.buffers()]
    return saved_bytes(lambda: output(model, images), known).hooks


def main(arguments: list[str] | None = None) -> int:
    """Check each installed library and print its row; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m samfast.integrations.check",
        description="Check what samfast.fuse does with each installed library.",
    )
    parser.add_argument("--only", help="check only rows whose name contains this", default="")
    only = parser.parse_args(arguments).only
    declare_missing_schemas()
    wrong = 0
    for library in LIBRARIES:
        if only not in library.name:
            continue
        if missing := library.missing():
            print(f"{library.name:34} not installed: {', '.join(missing)}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = check(library)
        print(row, flush=True)
        wrong += not row.right
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
