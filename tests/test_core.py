"""The core install: torch and its few companions, no Pillow, no accelerate, no timm, no altair.

Also the smoke test on the oldest torch that is supported (`make oldest`), so this file imports nothing else.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree
from normfree.signal import SignalMonitor

EXTRAS = ("PIL", "accelerate", "altair", "onnx", "opacus", "sklearn", "timm", "torchvision", "vl_convert")
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def batch_norm_network():
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*stem, Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def without_extras(code):
    """Run code in a process in which no extra can be imported; what it prints."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_networks_train_and_their_gradients_are_finite():
    for name in ("nf_resnet26", "nf_regnet_b0", "bn_resnet26", "fixup_resnet26"):
        model = normfree.create_model(name, num_classes=5, **({} if "regnet" in name else {"width": 0.5}))
        optimizer = torch.optim.SGD(normfree.param_groups(model, 1e-4), 0.1)
        F.cross_entropy(model(X), torch.arange(4)).backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters()), name


def test_the_signal_is_measured_forward_and_backward():
    report = normfree.characterize(normfree.create_model("nf_resnet26", width=0.5), X, backward=True)
    assert [record.shortcut for record in report][:2] == ["projection", "identity"]
    report.check(max_variance=2, max_mean_to_std=1)
    assert all(record.gradient_variance > 0 for record in report)
    assert "neither explodes" in str(report) or "follows the prediction" in str(report)


def test_a_network_is_converted_saved_folded_and_exported(tmp_path):
    conversion = normfree.convert(batch_norm_network(), X)
    assert not conversion.kept
    path = conversion.save(tmp_path / "free.safetensors")
    model, again = conversion.model.eval(), normfree.load_converted(batch_norm_network(), path).eval()
    assert torch.equal(again(X), model(X))
    torch.testing.assert_close(normfree.fold(model)(X), model(X), rtol=1e-4, atol=1e-5)
    assert normfree.export(model, tmp_path / "free.pt2", to="pt2", size=32).difference < 1e-4


def test_what_a_trained_network_computes_is_kept():
    model = batch_norm_network()
    for _ in range(3):
        model(X)
    kept = normfree.convert(model, X, keep="function").model.eval()
    torch.testing.assert_close(kept(X), model.eval()(X), rtol=1e-4, atol=1e-5)


def test_the_signal_of_a_training_is_watched(tmp_path):
    model = normfree.create_model("nf_resnet26", width=0.5, num_classes=5)
    with SignalMonitor(model, every=2, path=tmp_path / "signal.csv") as monitor:
        for _ in range(3):
            F.cross_entropy(model(X), torch.arange(4)).backward()
    assert {row["step"] for row in monitor.rows} == {0, 2}
    assert len((tmp_path / "signal.csv").read_text().splitlines()) == 1 + len(monitor.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layers_equal_the_plain_layer_that_they_are(dtype):
    layer = normfree.ScaledWSConv2d(3, 6, 3, padding="same", stride=2, in_scale=1.7, skip_gain=0.5, dtype=dtype)
    weight, bias = layer.effective_parameters()
    plain = F.conv2d(F.pad(X.to(dtype), (0, 1, 0, 1)), weight, bias, stride=2)
    torch.testing.assert_close(layer(X.to(dtype)), plain)


def test_compiled_and_transformed_layers_compute_the_same():
    layer = normfree.ScaledWSConv2d(3, 6, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), layer(X))
    gradients = torch.func.vmap(lambda x: torch.func.grad(lambda y: layer(y[None]).sum())(x))(X)
    assert gradients.shape == X.shape


def test_the_monitor_needs_no_extra():
    assert (
        without_extras("from normfree.signal import SignalMonitor; print(SignalMonitor.__name__)") == "SignalMonitor\n"
    )


def test_commands_of_the_core_need_no_extra():
    for arguments in (["models", "nf_resnet26"], ["spp", "nf_resnet26", "--size", "32"]):
        out = without_extras(f"sys.argv = ['normfree', *{arguments}]\nfrom normfree.cli import main\nmain()")
        assert "nf_resnet26" in out
