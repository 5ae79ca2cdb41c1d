"""Tests of the scripts beside this file against independent references."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).parent))
import benchmark  # noqa: E402
import clamp  # noqa: E402
import figures  # noqa: E402
import geometry  # noqa: E402
import peers  # noqa: E402

TINY = ["--limit", "64", "--batch-size", "32", "--epochs", "1", "--projector", "32-16"]


def test_other_losses_equal_independent_formulas():
    b, d = 6, 4
    z = torch.randn(2, b, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = F.normalize(z, dim=2)
    similarity = (torch.cat([x, y]) @ torch.cat([x, y]).T / 0.1).fill_diagonal_(-math.inf)
    cross = torch.cat([*z], 1).T.corrcoef()[:d, d:] * (b - 1) / b
    covariances = [view.T.cov().fill_diagonal_(0) for view in z]
    stds = torch.stack([view.T.cov().diagonal() + 1e-4 for view in z]).sqrt()
    expected = {
        "simclr": F.cross_entropy(similarity, (torch.arange(2 * b) + b) % (2 * b)),
        "barlow_twins": ((cross - torch.eye(d)) ** 2 * torch.full((d, d), 0.005).fill_diagonal_(1)
                         ).sum() / d,
        "vicreg": ((z[0] - z[1]) ** 2).mean() + (1 - stds).clamp(min=0).mean()
                  + sum((c**2).sum() for c in covariances) / d / 25,
        "mmcr": -torch.linalg.eigvalsh((x + y).T @ (x + y) / 4).clamp(min=0).sqrt().sum() / b}
    for name, value in expected.items():
        torch.testing.assert_close(peers.METHODS[name][0](z)[0], value)


def test_a_peer_trains_and_its_backbone_is_measured(tmp_path):
    peers.main("vicreg", *TINY, "--out", str(tmp_path))
    result = geometry.measure(geometry.parse_args([str(tmp_path)]))
    assert result["n_test"] == 2000 and (tmp_path / "geometry.json").exists()
    with pytest.raises(clamp.UserError, match="'nope' is not one of simclr"):
        peers.main("nope")


def test_dynamics_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    keys = "epoch", "radius", "neighbours", "spread", "participation_ratio"
    (tmp_path / "log.jsonl").write_text(json.dumps(dict.fromkeys(keys, 1)) + "\n")
    monkeypatch.setattr(figures, "HERE", tmp_path)
    figures.dynamics(tmp_path)
    assert (tmp_path / "dynamics.png").exists()


@pytest.mark.parametrize("words", ["def simclr", "VisionTransformer"])
def test_snippets_of_the_readme_train(words, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code, = (code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if words in code)
    parse_args, out = clamp.parse_args, ["--out", str(tmp_path)]
    monkeypatch.setattr(clamp, "parse_args", lambda flags: parse_args([*flags, *TINY, *out]))
    exec(code, {"clamp": clamp, "nn": torch.nn, "torchvision": torchvision})
    assert (tmp_path / "backbone.pt").exists()


@pytest.mark.parametrize("alpha", [0.5, 1.04, 2.0])
def test_spectrum_of_data_drawn_with_a_known_exponent(alpha):
    torch.manual_seed(0)
    scales = torch.arange(1, 201) ** (-alpha / 2)
    rotation = torch.linalg.qr(torch.randn(200, 200)).Q
    features = (torch.randn(20_000, 200) * scales) @ rotation + 3
    eigenvalues, fitted = geometry.spectrum(features)
    assert fitted == pytest.approx(alpha, abs=0.03)
    assert eigenvalues.sum() == pytest.approx(features.double().var(0).sum().item())


def test_packing_of_classes_takes_as_many_images_as_the_smallest_class_has():
    clouds = torch.randn(6, 5, 8)  # six images of each of five classes
    features, labels = clouds.flatten(0, 1), torch.arange(5).repeat(6)
    features, labels = torch.cat([features, torch.randn(3, 8)]), torch.cat([labels, labels[:3]])
    _, expected = clamp.packing_loss(clouds, 2.0, 1.1)
    assert geometry.class_packing(features, labels, 2.0, 1.1) == pytest.approx(
        {k: v.item() for k, v in expected.items()})


def test_ten_clouds_are_packed_until_none_overlap():
    history = figures.pack()
    points, neighbours = history[-1]
    assert history[0][1] == 9 and neighbours == 0
    centers = points.mean(0)
    radii = 4 * ((points - centers).square().sum((0, 2)) / 49 / 3).sqrt()
    gaps = torch.cdist(centers, centers) - radii - radii[:, None]
    assert gaps[~torch.eye(10, dtype=torch.bool)].min() > 0


def test_benchmark_compares_the_same_loss_and_runs():
    z = torch.randn(4, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(benchmark.broadcast_loss(z)[0], clamp.packing_loss(z)[0])
    script = [sys.executable, benchmark.__file__, "--quick"]
    shown = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    for words in ("packing loss, 4 views", "augmentation:", "training step", "streamed"):
        assert words in shown
