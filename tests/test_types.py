# SPDX-License-Identifier: Apache-2.0
"""What type checkers see of samfast. ``test_packaging`` runs a user's strict mypy on ``USER``."""

import ast
import importlib
import re
from pathlib import Path

import samfast

PACKAGE = Path(samfast.__file__).parent
USER = """
import torch

import samfast
from samfast import backends, counters
from samfast.functional import lora_linear
from samfast.models import MultiTaskSam, Task, build_sam, segment
from samfast.modules import ConvLoraLinear, LoraLinear, RelPosAttention

x = torch.zeros(2, 8)
sam = build_sam("vit_tiny", random_init=True)
model = MultiTaskSam(sam, [Task("roads")])
layer = LoraLinear(8, 6, rank=2)
routed = ConvLoraLinear(8, 6)
reveal_type(sam)  # Module
reveal_type(samfast.attach(model, samfast.Lora(rank=4)))  # MultiTaskSam
reveal_type(samfast.fuse(model, memory="balanced"))  # MultiTaskSam
reveal_type(samfast.merge(samfast.unfuse(model)))  # MultiTaskSam
reveal_type(samfast.load_adapter(sam, "adapter"))  # Module
reveal_type(samfast.report(sam).trained_parameters)  # int
reveal_type(samfast.aux_loss(sam))  # Tensor
reveal_type(samfast.parameter_groups(sam, 1e-4))  # list[dict[str, Any]]
reveal_type(segment(sam, x))  # Tensor
reveal_type(segment(sam, x, [x, x]))  # list[Tensor]
reveal_type(lora_linear(x, x, None, x, x, 1.0))  # Tensor
reveal_type(layer.forward(x))  # Tensor
reveal_type(layer.lora_A)  # Parameter
reveal_type(LoraLinear.from_linear(torch.nn.Linear(8, 6), 2))  # LoraLinear
reveal_type(routed.forward(x))  # Tensor
reveal_type(routed.forward(x, return_aux=True))  # tuple[Tensor, Tensor]
reveal_type(RelPosAttention.backend)  # str
reveal_type(backends.requested("auto"))  # str
reveal_type(counters.count(lambda: x).flops)  # int
samfast.fuse(sam, memory="small")  # [arg-type]
samfast.attach(sam, samfast.Lora(rank="4"))  # [arg-type]
segment(sam, x, 3)  # [call-overload]
samfast.no_such_name  # [attr-defined]
"""


def imports_of(tree: ast.AST) -> dict[str, str]:
    """The module that each name is imported from, ``package`` where that is the package itself."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in nodes for alias in node.names}


def test_the_stub_says_what_is_imported():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    expected = {**samfast._EXPORTS, **dict.fromkeys(samfast._SUBMODULES, "samfast")}
    assert imports_of(tree) == expected
    (version,) = (node for node in tree.body if isinstance(node, ast.AnnAssign))
    assert ast.unparse(version) == "__version__: str"


def test_what_modules_imports_late_is_typed():
    package = importlib.import_module("samfast.modules")
    tree = ast.parse((PACKAGE / "modules" / "__init__.py").read_text())
    (late,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(late.test) == "TYPE_CHECKING"
    assert imports_of(late) == package._INHERITING


def test_import_paths_of_users_pass_names_on():
    """A strict checker takes a name that is only imported for the module's own."""
    for path in (*(PACKAGE / "modules").glob("*.py"), PACKAGE / "integrations" / "peft.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        module = importlib.import_module(name.removesuffix(".__init__"))
        assert [n for n in module.__all__ if not hasattr(module, n)] == [], name
        imported = imports_of(ast.parse(path.read_text()))
        passed = {n for n, of in imported.items() if of.startswith("samfast") and n != "load"}
        assert passed - set(module.__all__) == set(), name


def told(output: str) -> dict[int, str]:
    """By line of the program the type that mypy reveals, or the kind of error."""
    said = {}
    for row in output.splitlines():
        if found := re.match(r'user\.py:(\d+): note: Revealed type is "(.*)"', row):
            said[int(found[1])] = re.sub(r"[\w.]+\.(?=\w)", "", found[2])
        elif found := re.match(r"user\.py:(\d+): error: .*  (\[[\w-]+\])", row):
            said[int(found[1])] = found[2]
    return said


def expected() -> dict[int, str]:
    """By line of ``USER`` what its comment says."""
    rows = enumerate(USER.splitlines(), 1)
    return {number: row.rpartition("  # ")[2] for number, row in rows if "  # " in row}
