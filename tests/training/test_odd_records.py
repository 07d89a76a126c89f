# SPDX-License-Identifier: Apache-2.0
"""Adapter records that are odd but signed: one sentence from predict and evaluate."""

import json
import shutil

import pytest
import safetensors.torch

import samfast
from samfast import cli
from samfast.files import format as adapter_format
from samfast.files.record import check_record
from samfast.methods.registry import VARIANTS
from samfast.models import MultiTaskSam, build_sam
from samfast.training.tasks import TaskSpec

ODD = [None, 5, -1, 10**20, float("nan"), True, "x", [], {}, [5], ["x"], [[]]]
FINE = {  # keys whose other values may be right as well
    *("samfast", "base_dtype", "image_size", "head", "classes", "extra", "base_identity"),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder of one mask; of the decoder it holds one token, so it is read quickly."""
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    samfast.attach(sam, samfast.DecoderOnly(), train="mask_decoder.iou_token")
    folder = tmp_path_factory.mktemp("odd") / "one"
    kept = {"prompt": "none", "foreground": [255], "threshold": None, "bands": None}
    return samfast.save_adapter(sam, folder, range="auto", **kept)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of one task, as small."""
    spec = TaskSpec("m")
    sam = MultiTaskSam(build_sam("vit_tiny", image_size=64, seed=0), [spec.task])
    method = samfast.TaLora(tasks=("m",), ranks=(2, 2, 1))
    samfast.attach(sam, method, train="mask_decoders.m.iou_token")
    folder = tmp_path_factory.mktemp("odd") / "many"
    return samfast.save_adapter(sam, folder, tasks=[spec.config()], prompt="none")


def signed(folder, target, path, value):
    """A copy of the folder whose record has another value, and its digest again."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(adapter_format.TENSORS))
    with safetensors.safe_open(folder / adapter_format.TENSORS, "pt") as file:
        record = json.loads(file.metadata()["samfast"])["record"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    at = record
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    content = {"record": record, "sha256": adapter_format.digest(record, tensors)}
    data = safetensors.torch.save(tensors, metadata={"samfast": json.dumps(content)})
    (target / adapter_format.TENSORS).write_bytes(data)
    return target


@pytest.mark.slow_on_cpu("many")
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "kind, path, value, pattern",
    [
        ("one", ("base", "name"), ["x"], r"base name \['x'\], not a name"),
        ("one", ("base", "name"), "vit_x", "was trained on vit_x; known are vit_tiny"),
        ("one", ("base", "seed"), 10**20, "base seed 1(0+), not a whole number of 64 bits"),
        ("one", ("base", "image_size"), {}, "base image_size {}, not a number of pixels"),
        ("one", ("base", "checkpoint"), 5, "base checkpoint 5, not a file name"),
        ("one", ("base",), ..., "base None, not an object"),
        ("one", ("base_digest",), "x", "base_digest 'x', not a digest of 64"),
        ("one", ("layers",), ["a", "a"], "not a list of different names"),
        ("one", ("method",), ..., "None does not describe a method"),
        ("one", ("method", "depth"), 1, "method 'decoder' has no option 'depth'"),
        ("one", ("extra",), [], r"extra \[\], not an object"),
        ("one", ("extra", "prompt"), {}, "was trained with prompt {}; known are none, box"),
        ("one", ("extra", "foreground"), 5, "its foreground is 5; expected a list of mask values"),
        ("one", ("extra", "foreground"), [[]], r"its foreground is \[\[\]\]; expected a list"),
        ("one", ("extra", "foreground"), [], "foreground is empty"),
        ("one", ("extra", "threshold"), "1", "its threshold is '1'; expected a finite number"),
        ("one", ("extra", "bands"), 5, "image options hold 5; expected text"),
        ("one", ("extra", "range"), "9,1", "cannot be used: range is '9,1'"),
        ("many", ("classes",), ..., "does not describe tasks"),
        ("many", ("extra", "tasks"), [], "its tasks do not match its decoders"),
        ("many", ("extra", "tasks", 0, "name"), 5, "a task has name 5, not a text"),
        ("many", ("extra", "tasks", 0, "weight"), "1", "task m has weight '1', not a number"),
        ("many", ("extra", "tasks", 0, "derive"), "x", "has an unknown derive 'x'"),
        ("many", ("extra", "tasks", 0, "ignore"), ["x"], r"has ignore \['x'\], not numbers"),
        ("many", ("extra", "tasks", 0, "kind"), [], r"task m has kind \[\], not a text"),
        ("many", ("method", "ranks"), [10**20, 2, 1], "their product must be at most"),
    ],
)
def test_an_odd_record_ends_in_one_sentence(
    kind, path, value, pattern, request, refused, shared_data, tmp_path
):
    folder = request.getfixturevalue(kind)
    adapter = ("--adapter", signed(folder, tmp_path / "adapter", path, value))
    image = shared_data / "images" / "p0.png"
    refused("predict", image, *adapter, pattern=f"adapter .*{pattern}")
    refused("evaluate", "--data", shared_data, *adapter, pattern=f"adapter .*{pattern}")


def test_every_key_of_the_schema_refuses_odd_values(one):
    record = adapter_format.read_adapter_config(one)
    check_record(record)
    for inside in ((), ("base",)):
        keys = record["base"] if inside else set(record) - {"format", "method", *FINE}
        for key in keys:
            accepted = []
            for value in ODD:
                changed = {**record, "base": {**record["base"]}}
                (changed["base"] if inside else changed)[key] = value
                try:
                    check_record(changed)
                except ValueError as error:
                    assert key in str(error)
                else:
                    accepted.append(value)
            assert len(accepted) <= 4, (key, accepted)


def paths(content, before=()):
    """The way to every value of a record, but of a list only to its first and last item."""
    pairs = list(content.items() if isinstance(content, dict) else enumerate(content))
    for key, value in pairs if isinstance(content, dict) else pairs[:: max(1, len(pairs) - 1)]:
        yield (*before, key)
        if isinstance(value, (dict, list)):
            yield from paths(value, (*before, key))


def sweep(folder, chosen, data, tmp_path, capfd):
    """evaluate with each of these values odd or missing: it runs, or says one sentence."""
    arguments = ["evaluate", "--data", str(data), "--adapter"]
    for path in chosen:
        for value in (..., *ODD):
            adapter = signed(folder, tmp_path / "swept", path, value)
            code = cli.main([*arguments, str(adapter)])
            assert code in (0, 2), (path, value)
            assert capfd.readouterr().err.count("\n") == (1 if code else 0), (path, value)
            shutil.rmtree(adapter)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "many"])
def test_no_odd_value_ends_in_a_traceback(kind, request, shared_data, tmp_path, capfd):
    folder = request.getfixturevalue(kind)
    found = paths(adapter_format.read_adapter_config(folder))
    sweep(folder, found, shared_data, tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, m in VARIANTS.items() if not m.needs_tasks and m.target])
def test_no_odd_option_ends_in_a_traceback(name, shared_data, tmp_path, capfd):
    """The options of every method, in folders without a decoder, which are small."""
    sam = samfast.attach(build_sam("vit_tiny", image_size=64, seed=0), VARIANTS[name], train=())
    folder = samfast.save_adapter(sam, tmp_path / "adapter", foreground=[255])
    found = paths(adapter_format.read_adapter_config(folder)["method"], ("method",))
    sweep(folder, found, shared_data, tmp_path, capfd)
