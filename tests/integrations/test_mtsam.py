# SPDX-License-Identifier: Apache-2.0
"""MTSAM's QKVLinear and TDLinear fused: numbers, tasks, as drop-ins, what is left alone."""

import copy
import functools
import pickle

import black_box
import literal_mtsam as mtsam
import pytest
import torch
from black_box import Subject
from budgets import all_within_budget
from literal_mtsam import spread
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import samfast

WIDTH, TASKS = 32, 3
generated = mtsam.TDLinear.generate_tensor
CONFIG = {"R1": 5, "R2": 4, "R3": 2, "task_num": TASKS, "scaling": 0.5, "dropout_rate": 0.0}
QUICK = ("qv-autocast", "qv-checkpointing", "all-error_budget", "linear-autocast")


def moved(layer, seed=3):
    """A layer as after training; the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("td_"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer


def qkv(*enabled, kind=mtsam.QKVLinear, **config):
    torch.manual_seed(0)
    return moved(kind(WIDTH, 3 * WIDTH, list(enabled), CONFIG | config))


def linear(kind=mtsam.TDLinear, **config):
    torch.manual_seed(0)
    return moved(kind(WIDTH, 48, CONFIG | config))


def qv(**config):
    return qkv(True, False, True, **config)


def of_all(**config):
    return qkv(True, True, True, **config)


LAYERS = {"qv": qv, "all": of_all, "linear": linear}


def maps(groups=2, dtype=torch.float32):
    shape = groups * TASKS, 3, 4, WIDTH
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(module, x, *task):
    """{"y", "dx", every trained parameter's gradient}."""
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    y = module(x, *task)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y), materialize_grads=True)
    return dict(zip(["y", "dx", *trained], [y.detach(), *grads], strict=True))


def same_bits(ours, theirs):
    assert [*ours] == [*theirs]
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name


def as_exact_as(fused, stock, x, *task, dtype=torch.float32):
    double = copy.deepcopy(stock).double()
    stocks = functools.partial(run, stock, x, *task)
    exacts = functools.partial(run, double, x.double(), *task)
    all_within_budget(run(fused, x, *task), stocks, exacts, dtype)


def fused_of(stock):
    fused = samfast.fuse(copy.deepcopy(stock))
    kind = type(stock).__name__
    assert samfast.report(fused).others == {"": f"fused: literal_mtsam's {kind}"}
    return fused


@pytest.mark.slow_on_cpu(but=QUICK)
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", LAYERS)
def test_black_box(kind, check):
    """With dropout in eval, for a layer without any holds a function that no pickle takes."""
    stock = LAYERS[kind](dropout_rate=0.1).double().eval()
    check(Subject(fused_of(stock), stock, maps(1, torch.float64)))


@pytest.mark.parametrize("task", [(), (-1,), (0,), (2,)], ids=["default", "all", "first", "last"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_gradient(kind, task):
    stock = LAYERS[kind]()
    stock.weight.requires_grad_(True)
    fused = fused_of(stock)
    assert [*fused.state_dict()] == [*stock.state_dict()]
    as_exact_as(fused, stock, maps(), *task)
    assert {*samfast.report(fused).backends} == {"lora_linear", "task_core"}


def test_one_task_takes_any_batch():
    stock = qv()
    as_exact_as(fused_of(stock), stock, maps()[:1], 1)


def twice_on_rows(self, x, task_idx=-1):
    y = F.linear(x, self.weight, bias=self.bias)
    y = y + spread(self, x, self.generate_tensor(), task_idx)
    return 2 * y if x.dim() == 3 else y


def test_what_is_not_a_map_runs_the_owners_forward():
    """No run shows what it does there."""
    stock = linear(named(mtsam.TDLinear, forward=twice_on_rows))
    fused = samfast.fuse(copy.deepcopy(stock))
    for x in (maps().flatten(1, 2), maps()[0, 0]):
        same_bits(run(fused, x, 1), run(stock, x, 1))
    as_exact_as(fused, stock, maps(), 1)


def test_groups_are_in_the_order_of_the_tasks():
    fused, x = fused_of(qv()), maps()
    parts = [fused(part, t) for t, part in enumerate(x.chunk(TASKS))]
    torch.testing.assert_close(fused(x), torch.cat(parts))
    assert (fused(x, 0) - fused(x, 1)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["qv", "linear"])
def test_dropout_has_the_owners_distribution(kind):
    """Other random numbers, in training only: the mean of many runs is the owner's result."""
    stock = LAYERS[kind](dropout_rate=0.5)
    fused, x = fused_of(stock), maps(1)
    torch.manual_seed(0)
    with torch.no_grad():
        made = [torch.stack([m(x) for _ in range(100)]) for m in (fused, stock)]
        wanted = stock.eval()(x)
    for results in made:
        off = (results.mean(0) - wanted).norm() / (results.std(0) / 10).norm()
        assert 0.8 < off < 1.2
    assert made[0].std(0).norm() == pytest.approx(made[1].std(0).norm().item(), rel=0.05)
    as_exact_as(fused.eval(), stock, x)


def test_a_narrow_layer():
    stock = qv().bfloat16()
    as_exact_as(fused_of(stock), stock, maps(dtype=torch.bfloat16), dtype=torch.bfloat16)


def test_saves_less_than_the_owners():
    def saved(module):
        counted = {}

        def keep(tensor):
            counted[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            kept = module(maps().requires_grad_())
        return sum(counted.values()), kept

    stock = qv()
    assert saved(fused_of(stock))[0] < saved(stock)[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_state_and_identity(kind, tmp_path):
    stock = LAYERS[kind](dropout_rate=0.1).eval()
    fused = copy.deepcopy(stock)
    held, optimizer = dict(fused.named_parameters()), torch.optim.AdamW(fused.parameters(), 0.1)
    assert samfast.fuse(fused) is fused and samfast.fuse(fused) is fused
    assert all(fused.get_parameter(name) is p for name, p in held.items())
    assert isinstance(fused, type(stock))
    fused(maps()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(fused.td_G, stock.td_G)
    torch.save(fused.state_dict(), tmp_path / "layer.pt")
    plain = LAYERS[kind](dropout_rate=0.1)
    plain.load_state_dict(torch.load(tmp_path / "layer.pt"))
    state = plain.state_dict()
    assert all(torch.equal(state[name], value) for name, value in fused.state_dict().items())
    optimizer.zero_grad()
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(maps()), fused(maps()))
        assert samfast.report(twin).others == samfast.report(fused).others


@pytest.mark.parametrize("kind", LAYERS)
def test_unfuse_gives_the_same_bits(kind):
    stock, x = LAYERS[kind](), maps()
    fused = samfast.unfuse(fused_of(stock))
    assert type(fused) is type(stock)
    same_bits(run(fused, x, 1), run(stock, x, 1))


def test_other_tasks_and_shapes_run_the_owners_forward():
    stock = qv()
    fused, x = fused_of(stock), maps()
    assert torch.equal(fused(x, -2), stock(x, -2))  # the last but one, as in a list
    for given in ((x, TASKS), (x[:4],), (x.flatten(1, 2),)):
        for module in (stock, fused):
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                module(*given)


def of_a_later_task(self):
    tensor = generated(self)
    return torch.cat([tensor[:3], 2 * tensor[3:4], tensor[4:]])


def of_two_maps(self, x, task_idx=-1):
    update = spread(self, x, self.generate_tensor(), task_idx)
    if x.shape[0] == 2:
        update = 2 * update
    return F.linear(x, self.weight, bias=self.bias) + update


@pytest.mark.parametrize("method", [of_a_later_task, of_two_maps], ids=lambda m: m.__name__)
def test_what_only_some_tasks_or_batches_show(method):
    """Runs have the user's own count of tasks."""
    name = "generate_tensor" if method is of_a_later_task else "forward"
    stock = linear(named(mtsam.TDLinear, **{name: method}), task_num=9)
    fused = samfast.fuse(nn.ModuleList([copy.deepcopy(stock), linear()]))[0]
    assert type(fused) is type(stock)
    assert _RUN in samfast.report(fused).others[""]


def test_many_tasks():
    stock = qkv(True, False, True, task_num=9)
    fused, x = fused_of(stock), maps(6)
    for task in (-1, 6, 8):
        as_exact_as(fused, stock, x, task)


def named(base, **names):
    """A class of the name with other methods."""
    return type(base.__name__, (base,), {"__module__": __name__, **names})


def negated(self):
    core = torch.einsum("abv,tv->tab", self.td_G, self.td_U3)
    return -self.scaling * torch.einsum("tab,ia,ob->toi", core, self.td_U1, self.td_U2)


def by_a_switch(self):
    core = torch.einsum("abv,tv->tab", self.td_G, self.td_U3)
    scale = self.scaling if self.on else 0
    return scale * torch.einsum("tab,ia,ob->toi", core, self.td_U1, self.td_U2)


def of_reversed_groups(self, x, task_idx=-1):
    tensor = self.generate_tensor()
    if task_idx == -1:
        tensor = torch.stack([tensor[2], tensor[1], tensor[0]])
    y = torch.nn.functional.linear(x, self.weight, self.bias)
    return y + mtsam.spread(self, x, tensor, task_idx)


def of_three_arguments(self, x, task_idx=-1, scale=1):
    return mtsam.TDLinear.forward(self, x, task_idx)


def dropped_late(self, x, task_idx=-1):
    y = torch.nn.functional.linear(x, self.weight, self.bias)
    update = x @ self.generate_tensor()[max(task_idx, 0)].transpose(0, 1)
    return y + self.td_dropout(update)


_CODE = "has code that a run may not tell all of: the forward of TDLinear uses "
_RUN = "is not what its name says: its forward gives another output"
OTHERS = {
    negated: ("generate_tensor", _RUN),
    by_a_switch: ("generate_tensor", f"{_CODE}on"),
    dropped_late: ("forward", _RUN),
    of_reversed_groups: ("forward", f"{_CODE}mtsam, a module"),
    of_three_arguments: (
        "forward",
        "has a forward that takes (self, x, task_idx=-1, scale=1), not (self, x, task_idx=-1)",
    ),
}


def left_alone(stock):
    """Why it is left alone; it runs as it did."""
    fused = samfast.fuse(nn.ModuleList([copy.deepcopy(stock), linear()]))[0]
    assert type(fused) is type(stock)
    return samfast.report(fused).others[""].partition(", which ")[2], fused


@pytest.mark.parametrize("method", OTHERS, ids=lambda method: method.__name__)
def test_methods_of_other_programs(method):
    name, reason = OTHERS[method]
    stock = linear(named(mtsam.TDLinear, **{name: method}))
    stock.on = True
    found, fused = left_alone(stock)
    assert found.startswith(reason)
    same_bits(run(fused, maps(), 1), run(stock, maps(), 1))


def of_another_form(layer):
    layer.type = "cp"
    return "has type='cp', not 'tucker'"


def of_another_mask(layer):
    layer.ind = layer.ind.roll(WIDTH)
    return "has an ind that is not what enable_qkv says"


def of_a_mask_written_to(layer):
    layer.ind[:WIDTH], layer.ind[WIDTH : 2 * WIDTH] = False, True
    return "has an ind that is not what enable_qkv says"


def of_a_mask_written_to_as_data(layer):
    layer.ind.data[:WIDTH], layer.ind.data[WIDTH : 2 * WIDTH] = False, True
    return "has an ind that is not what enable_qkv says"


def of_a_mask_written_to_by_numpy(layer):
    mask = layer.ind.numpy()
    mask[:WIDTH], mask[WIDTH : 2 * WIDTH] = False, True
    return "has an ind that is not what enable_qkv says"


def of_another_count(layer):
    layer.task_num = 2
    return "has task_num=2, not 3"


def with_a_child(layer):
    layer.norm = nn.LayerNorm(4)
    return "has a child norm, which would be left out"


def with_a_function(layer):
    layer._modules.pop("td_dropout", None)
    layer.td_dropout = lambda x: 2 * x
    return "has a td_dropout that is neither nn.Dropout nor a function that changes nothing"


def with_a_closure(layer):
    factor = 2
    layer._modules.pop("td_dropout", None)
    layer.td_dropout = lambda x: x * factor
    return "has a td_dropout that is neither nn.Dropout nor a function that changes nothing"


def of_a_tensor(layer):
    layer.scaling = torch.tensor(0.5)
    return "has a scaling that is a Tensor, not a number"


CHANGES = (
    of_another_mask,
    of_a_mask_written_to,
    of_a_mask_written_to_as_data,
    of_a_mask_written_to_by_numpy,
    of_another_count,
    with_a_child,
    with_a_function,
    with_a_closure,
    of_a_tensor,
)


@pytest.mark.parametrize("change", (*CHANGES, of_another_form))
def test_builds_of_other_programs(change):
    stock = qv()
    reason = change(stock)
    found, fused = left_alone(stock)
    assert found == reason
    same_bits(run(fused, maps(), 1), run(stock, maps(), 1))


class Halved(nn.Module):
    def forward(self, core):
        return core / 2


@pytest.mark.parametrize("kind", LAYERS)
def test_a_parametrized_core_is_left_alone(kind):
    """Whose class is torch's, derived from the owner's."""
    stock = LAYERS[kind]()
    parametrize.register_parametrization(stock, "td_G", Halved())
    fused = samfast.fuse(nn.ModuleList([copy.deepcopy(stock), linear()]))
    owner = "QKVLinear" if kind != "linear" else "TDLinear"
    reason = "which has a child parametrizations, which would be left out"
    state = samfast.report(fused).others["0"]
    assert state == f"not fused: literal_mtsam's {owner}, {reason}"
    counts = (samfast.report(layer).adapter_parameters for layer in (fused[0], LAYERS[kind]()))
    assert len({*counts}) == 1
    same_bits(run(fused[0], maps(), 1), run(stock, maps(), 1))


def test_a_core_that_is_parametrized_after_fuse():
    stock = qv()
    fused = fused_of(stock)
    for module in (stock, fused):
        parametrize.register_parametrization(module, "td_G", Halved())
    assert samfast.report(fused).others[""].startswith("not fused: literal_mtsam's QKVLinear has a")
    same_bits(run(fused, maps(), 1), run(stock, maps(), 1))


def hooked_dropout(layer):
    layer.td_dropout.register_forward_hook(lambda module, args, y: 2 * y)
    return "has hooks or a forward of its own on td_dropout"


@pytest.mark.parametrize("change", (*CHANGES, hooked_dropout))
def test_what_is_changed_after_fuse_runs_the_owners_forward(change):
    stock = qv(dropout_rate=0.1).eval()
    fused = fused_of(stock)
    fused(maps())
    for module in (stock, fused):
        reason = change(module)
    assert samfast.report(fused).others[""] == f"not fused: literal_mtsam's QKVLinear {reason}"
    same_bits(run(fused, maps(), 1), run(stock, maps(), 1))


def test_a_patched_method_runs_as_it_is_patched(monkeypatch):
    stock = linear()
    fused = fused_of(stock)
    before = mtsam.TDLinear.generate_tensor
    monkeypatch.setattr(mtsam.TDLinear, "generate_tensor", lambda self: 2 * before(self))
    assert torch.equal(fused(maps()), stock(maps()))
    assert samfast.report(fused).others[""].startswith("not fused: literal_mtsam's TDLinear ")


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_a_patched_dropout_runs_as_it_is_patched(monkeypatch, name):
    stock = linear(dropout_rate=0.5)
    fused = fused_of(stock)
    monkeypatch.setattr(nn.Dropout, name, lambda self, x: 5 * x)
    reason = "another forward than torch's" if name == "forward" else "Dropout has a __call__"
    assert reason in samfast.report(fused).others[""]
    assert torch.equal(fused(maps()), stock(maps()))


def test_fuse_under_another_default_device():
    stock = qv()
    with torch.device("meta"):
        fused = samfast.fuse(copy.deepcopy(stock))
    as_exact_as(fused, stock, maps())


def test_a_class_of_that_name_without_a_core_is_nothing_to_samfast():
    class QKVLinear(nn.Linear):
        pass

    assert samfast.report(nn.Sequential(QKVLinear(4, 12))).others == {}


def test_calls_of_the_owner_are_named(tmp_path):
    model = samfast.fuse(nn.Sequential(qv()))
    owners = "the adapters of this Sequential are literal_mtsam's; "
    with pytest.raises(ValueError, match=owners + r"save model.state_dict\(\)"):
        samfast.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=owners + "MTSAM has no call that folds them"):
        samfast.merge(model)
    with pytest.raises(ValueError, match=owners + "a penalty on their factors is your program's"):
        samfast.aux_loss(model)
    with pytest.raises(ValueError, match="0 already has an adapter, literal_mtsam's QKVLinear"):
        samfast.attach(model, samfast.Lora(), train=())
    found = samfast.report(model)
    names = [n for n, p in model.named_parameters() if "td_" in n]
    assert found.adapter_parameters == sum(model.get_parameter(n).numel() for n in names)
