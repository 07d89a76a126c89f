# SPDX-License-Identifier: Apache-2.0
"""The methods by their names on the command line: options, recipes, rates, runs with boxes."""

import json

import pytest
import torch

import samfast
from samfast.models import TRAINED_DECODER, Task, build_sam
from samfast.training import loop
from samfast.training.build import attach_method, build_base
from samfast.training.checks import check_settings
from samfast.training.evaluate import evaluate, validation_loader
from samfast.training.folders import load_split
from samfast.training.loop import finetune
from samfast.training.predict import load_adapted
from samfast.training.recipe import method_of, with_recipe
from samfast.training.segmenters import Segmenter
from samfast.training.settings import METHODS, FinetuneSettings

DEFAULTS = {
    "lora": lambda: samfast.Lora(),
    "conv-lora": lambda: samfast.ConvLora(),
    "cobot-lora": lambda: samfast.CobotLora(),
    "adaptformer": lambda: samfast.AdaptFormer(),
    "cobot-adaptformer": lambda: samfast.AdaptFormer(cobot=True),
    "kronecker": lambda: samfast.Kronecker(),
    "ta-lora": lambda: samfast.TaLora(tasks=("classes", "depth")),
    "decoder": lambda: samfast.DecoderOnly(),
}
TASKS = (Task("classes", "semantic", 3), Task("depth", "regression"))
RELATED = ("cobot-lora", "cobot-adaptformer")
NEW = ("cobot-lora", "adaptformer", "cobot-adaptformer", "kronecker")


def test_a_recipe_has_the_library_s_defaults():
    assert tuple(DEFAULTS) == METHODS
    for name, default in DEFAULTS.items():
        settings = FinetuneSettings(model="vit_tiny", method=name)
        tasks = TASKS if name == "ta-lora" else None
        assert method_of(settings, tasks) == default()
        filled = with_recipe(settings)
        # As --lr; 100 times that is for who asks for it. A core would move too far.
        assert filled.relation_lr == (0.05 * filled.lr if name == "ta-lora" else None)
        expected = ("polynomial", "structure") if name == "conv-lora" else ("cosine", "bce-dice")
        assert (filled.schedule, filled.loss, filled.lr) == (*expected, 1e-3)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        (
            "cobot-lora",
            {"rank": 8, "zero_start": True},
            lambda: samfast.CobotLora(rank=8, zero_start=True),
        ),
        (
            "adaptformer",
            {"bottleneck": 8, "dropout": 0.0},
            lambda: samfast.AdaptFormer(bottleneck=8, dropout=0.0),
        ),
        (
            "cobot-adaptformer",
            {"bottleneck": 8, "target": (r"image_encoder\.blocks\.[01]\.mlp",)},
            lambda: samfast.AdaptFormer(
                bottleneck=8, cobot=True, target=r"image_encoder\.blocks\.[01]\.mlp"
            ),
        ),
        (
            "kronecker",
            {"kron_n": 2, "rank": 3, "alpha": 6.0, "dropout": 0.2, "target": ("lin1", "lin2")},
            lambda: samfast.Kronecker(2, 3, 6.0, 0.2, ("lin1", "lin2")),
        ),
    ],
)
def test_options_reach_the_method(method, options, expected):
    settings = FinetuneSettings(model="vit_tiny", method=method, **options)
    check_settings(FinetuneSettings(**{**vars(settings), "dry_run": True}))
    assert method_of(settings) == expected()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "arguments", "pattern"),
    [
        ("lora", ("--bottleneck", 8), "bottleneck is 8, but method lora has none"),
        ("lora", ("--kron-n", 2), "kron_n is 2, but method lora has none"),
        ("lora", ("--zero-start",), "zero_start is True, but method lora has none"),
        ("kronecker", ("--relation-lr", 0.1), r"relation_lr is 0\.1, but method kronecker"),
        ("kronecker", ("--slices", "q", "v"), "slices are q, v, but method kronecker has none"),
        ("kronecker", ("--kron-n", 5), r"kron_n is 5, which does not divide the \d+ inputs of im"),
        ("kronecker", ("--kron-n", 0), "kron_n is 0; it must be at least 1"),
        ("kronecker", ("--rank", 0), "rank is 0"),
        ("cobot-lora", ("--rank", 6), "rank is 6, but the four parts of a quaternion"),
        ("cobot-lora", ("--alpha", 8), r"alpha is 8\.0, but method cobot-lora has none"),
        ("cobot-lora", ("--dropout", 0.1), r"dropout is 0\.1, but method cobot-lora has none"),
        ("cobot-lora", ("--target", "proj"), "target is proj, but method cobot-lora adapts q and"),
        ("cobot-lora", ("--relation-lr", 0), r"relation_lr is 0\.0; it must be above 0"),
        ("cobot-adaptformer", ("--zero-start",), "zero_start is True, but method cobot-adap"),
        ("cobot-adaptformer", ("--bottleneck", 6), "bottleneck is 6, but the four parts of a quat"),
        ("adaptformer", ("--bottleneck", 0), "bottleneck is 0"),
        ("adaptformer", ("--rank", 4), "rank is 4, but method adaptformer has none"),
        ("adaptformer", ("--relation-lr", 1), r"relation_lr is 1\.0, but method adaptformer has"),
        ("adaptformer", ("--target", "qkv"), "target 'qkv' matches no layer"),
        ("adaptformer", ("--experts", 4), "experts is 4, but method adaptformer has none"),
        ("decoder", ("--target", "qkv"), "target is qkv, but method decoder has no adapters"),
        ("decoder", ("--dropout", 0.1), r"dropout is 0\.1, but method decoder has no adapters"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(refused, shared_data, method, arguments, pattern):
    data = ("--data", shared_data, "--model", "vit_tiny", "--image-size", 64)
    refused("finetune", *data, "--method", method, *arguments, pattern=pattern)


@pytest.mark.slow_on_cpu("cobot-lora", "cobot-adaptformer", "adaptformer")
@pytest.mark.parametrize("method", NEW)
def test_a_backend_that_a_method_lacks_is_refused_at_once(
    refused, shared_data, method, monkeypatch
):
    if torch.cuda.is_available():
        pytest.skip("triton runs on a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused(
        *("finetune", "--data", shared_data, "--model", "vit_tiny", "--image-size", 64),
        *("--no-fuse", "--method", method, "--backend", "triton"),
        pattern="backend 'triton' cannot run ",
    )


@pytest.mark.parametrize("name", RELATED)
def test_relation_and_heads_have_groups_of_their_own(name):
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    samfast.attach(sam, DEFAULTS[name](), train=TRAINED_DECODER)
    names = {id(p): n for n, p in samfast.trainable_parameters(sam)}

    def named(group):
        return [names[id(p)] for p in group["params"]]

    plain = samfast.parameter_groups(sam, 1e-3, 0.1)
    assert [(g["lr"], g["weight_decay"]) for g in plain] == [(1e-3, 0.1), (1e-3, 0.0)]
    groups = samfast.parameter_groups(sam, 1e-3, 0.1, relation_lr=0.1)
    rates = [(g["lr"], g["weight_decay"]) for g in groups]
    assert rates == [(1e-3, 0.1), (1e-3, 0.0), (0.1, 0.1), (0.1, 0.0)]
    matrices, vectors = ({n.rpartition(".")[2] for n in named(group)} for group in groups[2:])
    assert matrices == {"FacT_c", "FacT_p", "heads"} and vectors == {"gamma"}
    assert sum(n.endswith(("FacT_c", "FacT_p")) for n in named(groups[2])) == 2  # shared: once
    assert len(named(groups[2])) == 2 + 6 and len(named(groups[3])) == 6
    moved = {*named(groups[2]), *named(groups[3])}
    for before, after in zip(plain, groups[:2], strict=True):
        assert named(after) == [n for n in named(before) if n not in moved]
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), True, "0.1"])
def test_a_relation_has_a_rate_that_is_one(rate):
    sam = samfast.attach(build_sam("vit_tiny", image_size=64, seed=0), samfast.CobotLora())
    with pytest.raises(ValueError, match=r"relation_lr is .*; it must be a finite number, 0"):
        samfast.parameter_groups(sam, 1e-3, relation_lr=rate)


def test_without_relation_it_has_no_rate():
    sam = samfast.attach(build_sam("vit_tiny", image_size=64, seed=0), samfast.Lora())
    with pytest.raises(ValueError, match=r"relation_lr is 0\.1, but no adapter here has"):
        samfast.parameter_groups(sam, 1e-3, 0.1, relation_lr=0.1)


@pytest.mark.slow_on_cpu(but=["lora"])
@pytest.mark.parametrize(
    "method",
    [
        "cobot-lora",
        pytest.param("adaptformer", marks=pytest.mark.slow),
        "cobot-adaptformer",
        "kronecker",
    ],
)
def test_two_steps_with_boxes(shared_data, tmp_path, method):
    """Everything that is trained moves, the rest does not, and the files give the same scores."""
    still = {"relation_lr": 1e-30} if method in RELATED else {}
    settings = FinetuneSettings(
        **{"data": shared_data, "output": tmp_path / "out", "model": "vit_tiny", "image_size": 64},
        **{"epochs": 1, "repeats": 1, "lr": 3e-3, "val_fraction": 0.34, "overlays": 0},
        **{"method": method, "prompt": "box", **still},
    )
    summary = finetune(settings)
    assert summary["steps"] == 2
    before = build_base(settings)
    loop.seed_everything(settings.seed)
    attach_method(before, settings)
    sam = load_adapted(tmp_path / "out" / "adapter" / "best")
    after = dict(sam.named_parameters())
    trained = {n for n, _ in samfast.trainable_parameters(before)}
    relation = {n for n in trained if n.endswith(("FacT_c", "FacT_p", "heads", "gamma"))}
    assert bool(relation) == (method in RELATED)
    for name, parameter in before.named_parameters():
        moves = name in trained and name not in relation
        change = (parameter - after[name]).abs().max().item()
        assert (change > 1e-29) == moves, name  # a step of 1e-30 shows where zeros were
    pairs = load_split(shared_data, val_fraction=0.34).val
    scores = evaluate(Segmenter(sam), validation_loader(pairs, 64, 2, prompt="box"))
    assert scores == (summary["val_dice"], summary["val_iou"])
    record = samfast.read_adapter_config(tmp_path / "out" / "adapter" / "best")
    assert samfast.modules.methods.method_from_config(record["method"]) == DEFAULTS[method]()
    saved = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert saved["relation_lr"] == still.get("relation_lr")
    assert (record["extra"]["prompt"], record["extra"]["box_jitter"]) == ("box", 1.0)
