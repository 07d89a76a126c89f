# SPDX-License-Identifier: Apache-2.0
"""attach, merge and adapter folders on Hugging Face's SamModel, and between it and Sam."""

import copy

import pytest
import torch
from budgets import within_budget
from torch import nn

pytest.importorskip("transformers")

from hugging_face_models import SIDE, images, model, prompts, twin

import samfast
from samfast.adapters.attachment import attachment
from samfast.adapters.base_digest import identity_of
from samfast.files import adapter_files
from samfast.models import TRAINED_DECODER, binary_head, encode, segment

SLOW = pytest.mark.slow
METHODS = {
    "lora": samfast.Lora(rank=2, target=("qkv", "lin1")),
    "slices": samfast.Lora(rank=2, slices=("q", "v")),
    "conv-lora": samfast.ConvLora(rank=3, experts=3),
    "cobot-lora": samfast.CobotLora(rank=4),
    "kronecker": samfast.Kronecker(n=4),
    "ta-lora": samfast.TaLora(tasks=2, ranks=(4, 4, 2), dropout=0.0, orthogonality=0.1),
    "decoder": samfast.DecoderOnly(),
}
QUICK = ("lora", "conv-lora", "cobot-lora")
MERGED = ("slices", "kronecker", "ta-lora")
EVERY = [(name, way) for name in METHODS for way in ("to Sam", "to SamModel")]
CROSSED = [("lora", "to Sam"), ("cobot-lora", "to SamModel")]


def moved(sam, seed=1):
    """Trained tensors as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(sam):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * noise.to(parameter)
    return sam


def adapted(method, of=None, **options):
    return moved(samfast.attach(of or model(), method, **options))


def logits(sam):
    with torch.no_grad():
        return segment(sam, images(), **prompts("both"))


def test_leaf_targets_match_in_the_encoder_only():
    sam = model()
    wrapped = nn.Sequential(sam)
    assert samfast.attach(wrapped, METHODS["lora"], train="0.mask_decoder") is wrapped
    assert attachment(sam).layers == tuple(
        f"vision_encoder.layers.{i}.{leaf}" for i in range(2) for leaf in ("attn.qkv", "mlp.lin1")
    )
    with pytest.raises(ValueError, match=r"'q_proj' matches no layer in vision_encoder; linear"):
        samfast.attach(model(), samfast.Lora(target="q_proj"))
    whole = samfast.attach(model(), samfast.Lora(target=r".*self_attn\.q_proj"))
    assert attachment(whole).layers[0] == "mask_decoder.transformer.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in METHODS]
)
def test_an_adapter_lives_on_a_sam_model(name, tmp_path):
    start = logits(model())
    sam = adapted(METHODS[name])
    expected = logits(sam)
    assert not torch.equal(expected, start)
    report = samfast.report(sam)
    parts = {"mask_decoder"} if name == "decoder" else {"mask_decoder", "vision_encoder"}
    assert set(report.trained_by_part) == parts and report.method == METHODS[name]
    groups = samfast.parameter_groups(sam, lr=1e-3, weight_decay=0.1)
    trained = [p for _, p in samfast.trainable_parameters(sam)]
    assert sum(len(group["params"]) for group in groups) == len(trained)

    (segment(sam.train(), images()).square().mean() + samfast.aux_loss(sam)).backward()
    unread = set(report.unread)
    reached = {n for n, p in samfast.trainable_parameters(sam) if p.grad is not None}
    assert reached >= {n for n, _ in samfast.trainable_parameters(sam)} - unread
    folder = samfast.save_adapter(sam.eval(), tmp_path / "adapter")
    record = samfast.read_adapter_config(folder)
    assert record["image_size"] == SIDE and record["encoder"] == "vision_encoder"
    loaded = samfast.load_adapter(model(), folder)
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(ValueError, match="was trained on another base"):
        samfast.load_adapter(model(seed=1), folder)


@pytest.mark.parametrize("name", ["lora", *(pytest.param(n, marks=SLOW) for n in MERGED)])
def test_merging(name):
    sam = adapted(METHODS[name])
    stock = model().state_dict()
    state = samfast.merged_state_dict(sam)
    assert list(state) == list(stock)
    plain = model(seed=1)
    plain.load_state_dict(state)
    before, merged = logits(sam), logits(samfast.merge(sam))
    assert torch.equal(merged, logits(plain)) and not torch.equal(merged, logits(model()))
    assert (merged - before).abs().max() < 1e-4 * before.abs().max()
    assert torch.equal(logits(samfast.unmerge(sam)), before)


def test_shares_are_made_once_in_the_encoders_forward(monkeypatch):
    """The hooks of SAM-COBOT and TA-LoRA are the encoder's."""
    sam = adapted(METHODS["cobot-lora"])
    assert len(sam.vision_encoder._forward_pre_hooks) == 1 and not sam._forward_pre_hooks
    for layer in sam.vision_encoder.layers:
        monkeypatch.setattr(layer.attn.qkv, "alone", None)
    encode(sam, images())


def test_tasks_are_set():
    sam = adapted(samfast.TaLora(tasks=("a", "b"), ranks=(4, 4, 2)))
    first, second = (logits(samfast.set_task(sam, task)) for task in ("a", "b"))
    assert not torch.equal(first, second)
    merged = logits(samfast.merge(sam, task="a"))
    assert (merged - first).abs().max() < 1e-4 * first.abs().max()
    assert len(sam.vision_encoder._forward_pre_hooks) == 1 and not sam._forward_pre_hooks


def test_the_frozen_encoder_is_cast(tmp_path):
    sam = samfast.attach(model(), samfast.Lora(rank=2), base_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in sam.named_parameters() if "lora_" not in name}
    for name, dtype in dtypes.items():
        inside = name.startswith("vision_encoder.")
        assert dtype == (torch.bfloat16 if inside else torch.float32), name
    moved(sam)
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    again = samfast.load_adapter(model(), folder, base_dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(sam))
    samfast.load_adapter(model(), folder)
    samfast.load_adapter(twin(model(eps=1e-5)), folder)


@pytest.mark.parametrize(
    ("name", "way"),
    [*CROSSED, *(pytest.param(*case, marks=SLOW) for case in EVERY if case not in CROSSED)],
)
def test_each_library_takes_the_others_adapter(name, way, tmp_path):
    """On the same base, in training form: as exact as segment_anything's own."""
    sam = model(eps=1e-5)
    options = {"train": (*TRAINED_DECODER, "prompt_encoder")}
    mine, other = (sam, twin(sam)) if way == "to Sam" else (twin(sam), sam)
    saved = adapted(METHODS[name], mine, **options)
    folder = samfast.save_adapter(saved, tmp_path / "adapter")
    loaded = samfast.load_adapter(other, folder, trainable=True)
    stock, ours = (saved, loaded) if way == "to SamModel" else (loaded, saved)
    exact = samfast.load_adapter(twin(model(eps=1e-5)).double(), folder)
    exact.double()
    arguments = prompts("both")
    within_budget(
        logits(ours).detach(),
        lambda: segment(stock, images(), **arguments).detach(),
        lambda: segment(exact, images(), **arguments).detach(),
        torch.float32,
    )
    again = samfast.save_adapter(loaded, tmp_path / "again")
    back = samfast.load_adapter(mine_again(way), again)
    trained = dict(saved.named_parameters())
    for tensor, parameter in back.named_parameters():
        assert torch.equal(parameter, trained[tensor]), tensor
    with pytest.raises(ValueError, match="was trained on another base"):
        samfast.load_adapter(twin(model(eps=1e-5, seed=1)), folder)


def as_exact_as(ours, stock):
    """Masks within the budget of another model that computes the same."""
    exact = copy.deepcopy(stock).double()
    within_budget(logits(ours), lambda: logits(stock), lambda: logits(exact), torch.float32)


def mine_again(way):
    return model(eps=1e-5) if way == "to Sam" else twin(model(eps=1e-5))


def test_a_binary_head_comes_along(tmp_path):
    saved = adapted(METHODS["lora"], binary_head(model(eps=1e-5)), train=TRAINED_DECODER)
    folder = samfast.save_adapter(saved, tmp_path / "adapter")
    loaded = samfast.load_adapter(twin(model(eps=1e-5)), folder)
    assert loaded.mask_decoder.mask_tokens.weight.shape == (1, 32)
    as_exact_as(loaded, saved)
    stock = samfast.merged_state_dict(saved)
    model(seed=1).load_state_dict(stock)


def test_what_the_other_model_lacks_is_named(tmp_path):
    folder = samfast.save_adapter(
        adapted(METHODS["lora"], model("hq"), train="mask_decoder.hq_token"), tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match=r"tensor mask_decoder\.hq_token\.weight, which the model"):
        samfast.load_adapter(twin(model()), folder)
    saved = adapted(METHODS["lora"], model("hq"), train=())
    folder = samfast.save_adapter(saved, tmp_path / "encoder")
    with pytest.raises(ValueError, match="was trained on another base"):
        samfast.load_adapter(twin(model()), folder)
    assert torch.equal(logits(samfast.load_adapter(model("hq"), folder)), logits(saved))


def test_folders_from_before_load(monkeypatch, tmp_path):
    """samfast 0.1.0 took the identity by Hugging Face's names, and did not keep the encoder's."""
    record_of = adapter_files._record_of_base

    def old(sam, trained):
        record = record_of(sam, trained)
        del record["encoder"]
        prints = adapter_files.fingerprints(sam, trained)
        return {**record, "base_identity": identity_of(prints)}

    monkeypatch.setattr(adapter_files, "_record_of_base", old)
    sam = adapted(METHODS["lora"])
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    assert torch.equal(logits(samfast.load_adapter(model(), folder)), logits(sam))
    with pytest.raises(ValueError, match="was trained on another base"):
        samfast.load_adapter(model(seed=1), folder)


def test_peft_reads_and_writes_the_same_folders(tmp_path):
    peft = pytest.importorskip("peft")
    saved = adapted(samfast.Lora(rank=2))
    folder = samfast.save_adapter(saved, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(model(), folder).eval()
    as_exact_as(read, saved)
    read.save_pretrained(tmp_path / "theirs")
    as_exact_as(samfast.load_adapter(model(), tmp_path / "theirs"), saved)
    pair = (model(eps=1e-5), twin(model(eps=1e-5)))
    mine, theirs = (samfast.load_adapter(start, tmp_path / "theirs") for start in pair)
    as_exact_as(theirs, mine)


def test_a_matrix_with_two_places_is_not_pefts(tmp_path):
    """PEFT would copy one of them, and prompts and image would have other positions."""
    sam = adapted(samfast.Lora(rank=2), train="prompt_encoder")
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    assert "peft_type" not in (folder / "adapter_config.json").read_text()
    assert torch.equal(logits(samfast.load_adapter(model(), folder)), logits(sam))


def test_fused_blocks_keep_the_adapter(tmp_path):
    sam = adapted(samfast.Lora(rank=2))
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    fused = samfast.fuse(samfast.load_adapter(model(), folder))
    assert set(samfast.report(fused).blocks.values()) == {"fused"}
    exact = samfast.load_adapter(model().double(), folder).double()
    within_budget(logits(fused), lambda: logits(sam), lambda: logits(exact), torch.float32)


def test_files_of_samed(tmp_path):
    def file(blocks):
        shapes = {"a": (2, 32), "b": (32, 2)}
        content = {
            f"w_{part}_{i:03}": 0.1 * torch.randn(shape)
            for i in range(2 * blocks)
            for part, shape in shapes.items()
        }
        whole = ("prompt_encoder", "mask_decoder")
        state = twin(model(seed=1)).state_dict()
        content |= {name: t for name, t in state.items() if name.startswith(whole)}
        torch.save(content, tmp_path / f"{blocks}.pth")
        return tmp_path / f"{blocks}.pth"

    path = file(2)
    pair = (model(eps=1e-5), twin(model(eps=1e-5)))
    mine, theirs = (samfast.load_adapter(start, path) for start in pair)
    as_exact_as(mine, theirs)
    with pytest.raises(ValueError, match="adapts 1 blocks, but the model has 2, and the file does"):
        samfast.load_adapter(model(), file(1))


def test_adaptformer_is_refused():
    nothing = r"in vision_encoder, which has no MLPBlock at all; samfast\.models\.build_sam\("
    with pytest.raises(ValueError, match=nothing):
        samfast.attach(model(), samfast.AdaptFormer(bottleneck=8))
