# SPDX-License-Identifier: Apache-2.0
"""Files of SAMed and Sam_LoRA on a plain Sam: the same output, and what is refused."""

import copy
import re

import literal_wrappers as wrappers
import pytest
import safetensors.torch
import torch
from budgets import all_within_budget
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from wrapped_models import photographs, sam

import samfast
from samfast.models import segment

QKV = "image_encoder.blocks.{}.attn.qkv"


def trained(model=None, rank=2):
    """SAMed's model as after training: factors, prompt encoder and decoder."""
    torch.manual_seed(0)
    model = wrappers.LoRA_Sam(sam() if model is None else model, rank).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "linear_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "epoch_159.pth"
    trained().save_lora_parameters(path)
    return path


def changed(file, change):
    """The file with a change of its tensors."""
    state = torch.load(file)
    change(state)
    torch.save(state, file)
    return file


@pytest.mark.slow_on_cpu("lora.safetensors")
@pytest.mark.parametrize("name", ["lora.pth", "lora.safetensors"])
def test_the_same_masks(name, tmp_path):
    stock, path = trained(), tmp_path / name
    if path.suffix == ".safetensors":  # Sam_LoRA's: the frozen rest is as it was
        stock.sam.load_state_dict(sam().state_dict(), strict=False)
        safetensors.torch.save_file(stock.numbered(), path)
    else:
        stock.save_lora_parameters(path)
    model = sam()
    assert samfast.load_adapter(model, path) is model
    method = samfast.report(model).method
    assert (method.rank, method.slices, method.alpha) == (2, ("q", "v"), None)
    x, double = photographs(), copy.deepcopy(stock).double()
    with torch.no_grad():
        all_within_budget(
            segment(model, x), lambda: segment(stock, x), lambda: segment(double, x), torch.float32
        )
        assert not torch.equal(segment(model, x), segment(sam(), x))


def test_what_is_trained_and_saved(file, tmp_path):
    model = samfast.load_adapter(sam(), file, trainable=True)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = ("prompt_encoder.", "mask_decoder.")
    assert all(name.startswith(parts) or ".lora_" in name for name in wanted)
    assert {n for n, _ in model.named_parameters() if n.startswith(parts)} <= wanted
    assert {name for name in wanted if ".lora_" in name} == {
        f"{QKV.format(i)}.lora_{letter}" for i in range(2) for letter in "AB"
    }
    again = samfast.load_adapter(sam(), samfast.save_adapter(model, tmp_path / "adapter"))
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert samfast.read_adapter_config(file)["base_digest"] is None


@pytest.mark.slow_on_cpu
def test_a_model_with_the_method_gets_the_tensors(file):
    model = samfast.attach(sam(), samfast.Lora(rank=2, slices=("q", "v")))
    samfast.load_adapter(model, file)
    for name, value in samfast.load_adapter(sam(), file).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.slow_on_cpu
def test_a_merged_model(file):
    stock, model = trained(), samfast.merge(samfast.load_adapter(sam(), file).eval())
    x, double = photographs(), copy.deepcopy(stock).double()
    with torch.no_grad():
        all_within_budget(
            segment(model, x), lambda: segment(stock, x), lambda: segment(double, x), torch.float32
        )


def test_a_classifier_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "lora.safetensors"
    state = {**trained().numbered(), "fc_768in_10out": torch.ones(10, 768)}
    safetensors.torch.save_file(state, path)
    with pytest.warns(UserWarning, match="has fc_768in_10out, the weight of a classifier") as found:
        samfast.load_adapter(sam(), path)
    assert found[0].filename == __file__


@pytest.mark.slow_on_cpu
def test_a_decoder_of_classes(tmp_path):
    """SAMed's decoder has a mask token for each class; a Sam built like it takes the file."""

    def of_classes():
        model = sam()
        options = {"embedding_dim": 256, "mlp_dim": 2048, "num_heads": 8}
        model.mask_decoder = MaskDecoder(
            num_multimask_outputs=8,
            transformer=TwoWayTransformer(depth=2, **options),
            transformer_dim=256,
        )
        return model

    path = tmp_path / "lora.pth"
    trained(of_classes()).save_lora_parameters(path)
    match = r"a decoder with 9 mask tokens, .* has 4; build .*\(num_multimask_outputs=8\), which"
    with pytest.raises(ValueError, match=match):
        samfast.load_adapter(sam(), path)
    model = samfast.load_adapter(of_classes(), path)
    assert torch.equal(
        model.mask_decoder.mask_tokens.weight, torch.load(path)["mask_decoder.mask_tokens.weight"]
    )


REFUSED = {
    "of another rank": (
        lambda s: s.update(w_a_001=torch.ones(3, 192)),
        "its w_a_001 and w_b_001 have shapes (3, 192) and (192, 2), while w_a_000 has (2, 192)",
    ),
    "without a b": (
        lambda s: s.pop("w_b_003"),
        "it has 4 w_a and 3 w_b, which do not pair up as q and v; look at w_b_003",
    ),
    "of half a layer": (
        lambda s: [s.pop(key) for key in ("w_a_003", "w_b_003")],
        "it has 3 w_a and 3 w_b, which do not pair up as q and v; look at w_a_003",
    ),
    "with LoRA in the decoder": (
        lambda s: s.update(sa_a_000=torch.ones(2, 256)),
        "it has a tensor sa_a_000, which is neither LoRA of the image encoder nor in the prompt "
        "encoder or mask decoder",
    ),
    "with something else": (
        lambda s: s.update(epoch=3),
        "its epoch is a int, not a plain tensor",
    ),
    "with a number for a name": (
        lambda s: s.update({3: torch.ones(2)}),
        "it has a key 3, which is a int, not a name",
    ),
    "with a sparse tensor": (
        lambda s: s.update(w_a_000=s["w_a_000"].to_sparse()),
        "its w_a_000 is a torch.sparse_coo, not a plain tensor",
    ),
    "with a number of four digits": (
        lambda s: s.update(w_a_0000=s["w_a_000"]),
        "it has a tensor w_a_0000, which is neither LoRA of the image encoder nor in the prompt "
        "encoder or mask decoder",
    ),
    "without LoRA": (
        lambda s: [s.pop(key) for key in [*s] if key.startswith("w_")],
        "it has no w_a_000, so SAMed or Sam_LoRA did not write it; for an adapter of samfast or "
        "PEFT, pass its folder",
    ),
    "with NaN": (
        lambda s: s.update(w_a_000=torch.full((2, 192), float("nan"))),
        "image_encoder.blocks.0.attn.qkv.lora_A contains NaN or infinity",
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, file):
    change, reason = REFUSED[what]
    match = f"^adapter {re.escape(str(file))} cannot be used: {re.escape(reason)}$"
    with pytest.raises(ValueError, match=match):
        samfast.load_adapter(sam(), changed(file, change))


def test_a_file_that_is_damaged(file):
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged or not a PyTorch checkpoint"):
        samfast.load_adapter(sam(), file)


def test_a_part_of_the_decoder(file):
    changed(file, lambda state: state.pop("mask_decoder.iou_token.weight"))
    match = "only a part of mask_decoder; mask_decoder.iou_token.weight and 0 more tensors are mis"
    with pytest.raises(ValueError, match=match):
        samfast.load_adapter(sam(), file)


def test_a_tensor_the_model_has_not(file):
    changed(file, lambda state: state.update({"mask_decoder.more": torch.ones(2)}))
    model = sam()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has a tensor mask_decoder.more, which the model"):
        samfast.load_adapter(model, file)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_file_of_some_blocks_only(file):
    """It does not say of which."""
    model = sam()
    model.image_encoder.blocks.append(copy.deepcopy(model.image_encoder.blocks[0]))
    match = "adapts 2 blocks, but the model has 3, and the file does not say which ones"
    with pytest.raises(ValueError, match=match):
        samfast.load_adapter(model, file)
    del model.image_encoder.blocks[1:]
    with pytest.raises(ValueError, match=r"a Linear image_encoder.blocks.1.attn.qkv, but the mod"):
        samfast.load_adapter(model, file)


def test_a_model_of_the_owners_reads_the_file_itself(file):
    model = wrappers.LoRA_Sam(sam(), 2)
    with pytest.raises(ValueError, match=r"already has .* load_lora_parameters\(file\) of its"):
        samfast.load_adapter(model, file)
