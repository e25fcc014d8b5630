"""docs/troubles.md, trouble by trouble: BatchNorm has it, the converted network does not."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import normfree
from tests.helpers import assert_allclose

PAGE = Path(__file__).parent.parent / "docs" / "troubles.md"


def network(norm=nn.BatchNorm2d):
    """Convolutions, one with a stride, and a classifier behind an average over positions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, padding=1), norm(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def images(count, size=8, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def converted(model=None, size=8):
    return normfree.convert(network() if model is None else model, images(16, size)).model.train()


def pair():
    """A network with BatchNorm and a converted one."""
    return network().train(), converted()


def gradients(model, x, parts):
    """Gradients of a batch's mean loss, accumulated from so many parts."""
    model.zero_grad()
    for part, labels in zip(x.chunk(parts), (torch.arange(len(x)) % 4).chunk(parts), strict=True):
        (F.cross_entropy(model(part), labels, reduction="sum") / len(x)).backward()
    return [p.grad.clone() for p in model.parameters()]


def same(mine, others, **tolerances):
    return all(torch.allclose(one, other, **tolerances) for one, other in zip(mine, others, strict=True))


def test_expected_more_than_1_value_per_channel():
    bn, free = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)), None
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        bn(images(1))
    free = converted(bn)
    free(images(1)).sum().backward()
    assert all(p.grad.isfinite().all() for p in free.parameters())


def test_a_last_batch_of_one_image():
    bn, free = pair()
    one = images(1)
    among = torch.cat([one, images(5, seed=2)])
    assert not torch.allclose(bn(one), bn(among)[:1], atol=1e-2)
    assert_allclose(free(one), free(among)[:1], atol=1e-6)


def test_opacus_refuses_batch_norm():
    validators = pytest.importorskip("opacus.validators")
    from normfree.privacy import per_sample_gradients

    bn, free = pair()
    assert validators.ModuleValidator.validate(bn)
    assert not validators.ModuleValidator.validate(free)
    private = per_sample_gradients(free)
    private(images(3).requires_grad_()).square().sum().backward()
    assert all(p.grad_sample.shape == (3, *p.shape) for p in private.parameters())


def test_vmap_over_examples():
    bn, free = pair()

    def loss(parameters, model, x):
        return torch.func.functional_call(model, parameters, x[None]).square().sum()

    for model in (bn, free):
        parameters = dict(model.named_parameters())
        each = torch.func.vmap(torch.func.grad(loss), (None, None, 0))
        if model is bn:
            with pytest.raises(RuntimeError, match=r"(?i)in-?place|running"):
                each(parameters, model, images(3))
        else:
            found = each(parameters, model, images(3))
            whole = torch.func.grad(lambda p: torch.func.functional_call(free, p, images(3)).square().sum())(parameters)
            for name, values in found.items():
                assert_allclose(values.sum(0), whole[name], rtol=1e-4, atol=1e-5)


def test_averaging_the_parameters_of_clients_averages_all_that_was_trained():
    """FedAvg, and an exponential moving average without buffers: BatchNorm's statistics are left behind."""
    for model, complete in zip(pair(), (False, True), strict=True):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(images(8)).square().sum().backward()
        optimizer.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert (changed <= dict(model.named_parameters()).keys()) is complete


def test_an_average_of_weights_needs_no_pass_over_the_data():
    """torch.optim.swa_utils.update_bn has nothing to do."""
    for model, good in zip(pair(), (False, True), strict=True):
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(3):
            model(images(8))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
            averaged.update_parameters(model)
        before = averaged.eval()(images(8))
        torch.optim.swa_utils.update_bn([images(8)], averaged)
        assert torch.allclose(averaged.eval()(images(8)), before) is good


def test_checkpointing_runs_a_forward_pass_twice():
    for model, good in zip(pair(), (False, True), strict=True):
        once, twice = copy.deepcopy(model), copy.deepcopy(model)
        once(images(8)).sum().backward()
        x = images(8).requires_grad_()
        checkpoint(twice, x, use_reentrant=False).sum().backward()
        assert same(once.buffers(), twice.buffers()) is good
        assert same([p.grad for p in once.parameters()], [p.grad for p in twice.parameters()], atol=1e-6)


def test_synchronized_statistics():
    """A network made for several GPUs trains on any device, and compiles into one graph, without a collective."""
    bn = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    free = converted(bn)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in free.modules())
    compiled = torch.compile(free, backend="eager", fullgraph=True)
    assert_allclose(compiled(images(8)), free(images(8)), atol=1e-6)


def test_accumulated_gradients_are_those_of_the_large_batch():
    for model, good in zip(pair(), (False, True), strict=True):
        assert same(gradients(model, images(8), 1), gradients(model, images(8), 4), atol=1e-5) is good


def test_one_overflow_stays_in_the_statistics():
    for model, good in zip(pair(), (False, True), strict=True):
        model(images(8) * torch.inf)
        assert bool(model.eval()(images(8)).isfinite().all()) is good


def test_training_and_eval_mode_agree():
    for model, good in zip(pair(), (False, True), strict=True):
        assert torch.allclose(model.train()(images(8)), model.eval()(images(8)), atol=1e-5) is good


def test_tiles_are_the_whole():
    """Of convolutions with a halo of their reach; statistics of a tile are not those of the image."""
    for norm, good in ((lambda c: nn.GroupNorm(2, c), False), (nn.InstanceNorm2d, False), (None, True)):
        model = network(nn.BatchNorm2d if norm is None else norm)[:6]  # before the average over positions
        model = converted(model, 32).eval() if norm is None else model.eval()
        x = images(1, 32)
        whole = model(x)
        tile = model(x[..., :24])[..., :8]  # 16 pixels, and 8 more that the border must not reach
        assert torch.allclose(tile, whole[..., :8], atol=1e-5) is good


def test_views_in_a_batch_do_not_tell_of_each_other():
    """In contrastive learning BatchNorm betrays which images are in a batch together."""
    for model, good in zip(pair(), (False, True), strict=True):
        x = images(4).requires_grad_()
        (leak,) = torch.autograd.grad(model(x)[0].sum(), x)
        assert bool((leak[1:] == 0).all()) is good


def test_a_gradient_penalty_is_one_per_example():
    """WGAN-GP asks for the gradient of each output by its own input."""
    for model, good in zip(pair(), (False, True), strict=True):
        x = images(4).requires_grad_()
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
        (together,) = torch.autograd.grad((model(x)[:, 0] * weights).sum(), x, create_graph=True)
        penalty = (together.flatten(1).norm(dim=1) / weights - 1).square().mean()
        penalty.backward()  # a second derivative
        alone = []
        for index in range(4):
            one = x[index : index + 1].detach().requires_grad_()
            out = copy.deepcopy(model)(one)[0, 0] * weights[index]
            alone.append(torch.autograd.grad(out, one)[0])
        assert torch.allclose(torch.cat(alone), together, atol=1e-5) is good


def test_the_page_names_every_test_and_no_other():
    tests = {name for name, value in globals().items() if name.startswith("test_") and inspect.isfunction(value)}
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named == tests - {"test_the_page_names_every_test_and_no_other"}
