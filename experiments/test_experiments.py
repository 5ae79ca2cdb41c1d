"""Tests of the scripts beside this file against independent references."""

import json
import math
import re
import subprocess
import sys
from functools import partial, wraps
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).parent))
import benchmark  # noqa: E402
import clamp  # noqa: E402
import eval_linear  # noqa: E402
import figures  # noqa: E402
import geometry  # noqa: E402
import peers  # noqa: E402
import speedrun  # noqa: E402
import sphere  # noqa: E402
import their_evaluation  # noqa: E402
from test_clamp import no_gpu, tiny_network, torchrun  # noqa: E402, F401

TINY = ["--limit", "64", "--batch-size", "32", "--epochs", "1", "--projector", "32", "16"]
ONE_STEP = [*TINY, "--limit", "32"]


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
        torch.testing.assert_close(peers.METHODS[name]["loss"](z), value)


def pairs(m):
    return [(v, w) for v in range(m) for w in range(m) if v != w]


def loop_w_mse(z):
    m, b, d = z.shape
    white = []
    for view in z:
        for x in view.split(2 * d):  # x = q r with r^T r = (2 d - 1) covariance
            q, r = torch.linalg.qr(x - x.mean(0))
            white += [v / v.norm() for v in q * r.diagonal().sign()]
    return sum((white[v * b + i] - white[w * b + i]).square().sum()
               for v, w in pairs(m) for i in range(b)) / len(pairs(m)) / b


def loop_shuffled_dbn(z):
    m, b, d = z.shape
    white = torch.zeros(m, b, d, dtype=z.dtype)
    torch.manual_seed(0)
    for v in range(m):
        for features in torch.randperm(d).split(16):  # ZCA makes every singular value the same
            x = z[v][:, features]
            left, _, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
            white[v, :, features] = math.sqrt(b) * left @ right
    return sum(F.mse_loss(white[v], white[w]) for v, w in pairs(m)) / len(pairs(m))


def loop_simsiam(z):
    m, b, d = z.shape
    prediction, projection = z[:, :, :d // 2], z[:, :, d // 2:].detach()
    return -sum(F.cosine_similarity(prediction[v, i], projection[w, i], dim=0)
                for v, w in pairs(m) for i in range(b)) / len(pairs(m)) / b


def loop_byol(z):
    m, b, d = z.shape
    prediction, target = F.normalize(z[:, :, :d // 2], dim=2), z[:, :, d // 2:].detach()
    target = target / target.norm(dim=2, keepdim=True)
    both = [(prediction[v] - target[w]).square().sum() / b for v, w in pairs(m)]
    return 2 * sum(both) / len(both)


def loop_swav(z):
    m, b, k = z.shape
    assigned = []
    for view in z.detach():
        q = torch.exp(view.T / 0.03)  # [prototypes, images], as in the paper
        for _ in range(3):
            for row in range(k):
                q[row] /= k * q[row].sum()
            for column in range(b):
                q[:, column] /= b * q[:, column].sum()
        assigned.append(b * q)
    return -sum(assigned[v][j, i] * (z[w, i, j] / 0.1 - (z[w, i] / 0.1).logsumexp(0))
                for v, w in pairs(m) for i in range(b) for j in range(k)) / len(pairs(m)) / b


def loop_ce_ssl(z):
    def simclr(twins):
        points = [x / x.norm() for twin in twins for x in twin]
        loss = 0
        for i, x in enumerate(points):
            others = torch.stack([x @ y / 0.1 for j, y in enumerate(points) if j != i])
            loss += others.logsumexp(0) - x @ points[i ^ 1] / 0.1
        return loss / len(points)

    _, b, d = z.shape
    change = [z[0, i, d // 2:] - z[1, i, d // 2:] for i in range(b)]
    return (0.6 * simclr([(z[0, i, :d // 2], z[1, i, :d // 2]) for i in range(b)])
            + 0.4 * simclr([(change[i], change[i + 1]) for i in range(0, b, 2)]))


def loop_dcl(z):
    m, b, _ = z.shape
    z, loss = F.normalize(z, dim=2) / math.sqrt(0.1), 0
    for i in range(b):
        others = torch.stack([z[u, j] for u in range(m) for j in range(b) if j != i])
        loss += sum((others @ z[v, i]).exp().sum().log() - z[v, i] @ z[w, i] for v, w in pairs(m))
    return loss / b / len(pairs(m))


def loop_sigreg(z):
    torch.manual_seed(0)
    m, b, d = z.shape
    directions, t = torch.randn(d, 256, dtype=z.dtype), torch.linspace(-3, 3, 33, dtype=z.dtype)
    statistic, normal = 0, (-t**2 / 2).exp()
    for view in z:
        for a in directions.T:
            x = torch.exp(1j * t[:, None] * (view @ a / a.norm())).mean(1) - normal
            statistic += b * torch.trapezoid(x.abs() ** 2 * normal, t) / 256 / m
    return 0.05 * statistic + 0.95 * ((z - z.mean(0)) ** 2).mean()


def loop_frossl(z):
    m, b, d = z.shape
    z = torch.stack([view / (view**2).sum(0).sqrt() for view in z])
    loss = m * sum((view - z.mean(0)).pow(2).sum() for view in z) / b
    for view in z:
        values = torch.linalg.eigvalsh(view.T @ view)
        loss += ((values / values.sum()) ** 2).sum().log()
    return loss


def loop_tcr(z):
    m, b, d = z.shape
    z = torch.stack([torch.stack([x / x.norm() for x in view]) for view in z])
    cosines = [F.cosine_similarity(view, z.mean(0), dim=1).mean() for view in z]
    rates = [(1 + d / (b * 0.2) * torch.linalg.svdvals(view) ** 2).log().sum() / 2 for view in z]
    return (-200 * sum(cosines) - sum(rates)) / m


def loop_ellipsoid(z):
    m, b, _ = z.shape
    z = F.normalize(z - z.mean((0, 1)), dim=2)
    centers, covariances, energy = z.mean(0), [x.T.cov().detach() for x in z.unbind(1)], 0
    for i, j in pairs(b):
        metric = torch.linalg.pinv(covariances[i] + covariances[j], rtol=1e-9, hermitian=True)
        step = centers[i] - centers[j]
        energy += (1 - (step @ metric @ step).sqrt() / 3).clamp(min=0) ** 2 / 2
    return (energy + 1e-6).log()


SHAPES = {"dcl": (3, 6, 5), "sigreg": (3, 8, 4), "frossl": (3, 6, 8), "tcr": (3, 8, 4),
          "ellipsoid": (3, 6, 8), "w_mse": (3, 12, 3),
          "shuffled_dbn": (3, 20, 32), "simsiam": (3, 6, 8), "byol": (2, 6, 8), "swav": (3, 6, 5),
          "ce_ssl": (2, 6, 8)}


def loss_of_share(name, rank=0, world=1):
    """A method's loss, and its gradient for this process's share of the images."""
    _, b, _ = shape = SHAPES[name]
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = z[:, rank * b // world:(rank + 1) * b // world].requires_grad_()
    torch.manual_seed(rank)
    loss = peers.METHODS[name]["loss"](clamp.gather(z))
    loss.backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradient_equal_the_papers_formula_in_loops(name):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(SHAPES[name], dtype=torch.float64, generator=generator).requires_grad_()
    expected = globals()[f"loop_{name}"](z)
    expected.backward()
    torch.testing.assert_close(loss_of_share(name), (expected.detach(), z.grad))


def tiny_backbone(*_):
    backbone = tiny_network().backbone
    backbone.num_features = 8 * 49
    return backbone


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """The folder of a run of one step; meanwhile, all backbones are tiny."""
    monkeypatch.setattr(clamp, "build_backbone", tiny_backbone)
    clamp.train(clamp.parse_args([*ONE_STEP, "--out", str(tmp_path)]))
    return tmp_path


def train_on_two(folder):
    clamp.start_processes(clamp.parse_args([]))
    rank, world = clamp.rank_and_world()
    torch.save({name: loss_of_share(name, rank, world) for name in SHAPES}, f"{folder}/{rank}.pt")
    clamp.build_backbone = tiny_backbone
    for name in SHAPES:
        peers.main(name, *ONE_STEP, "--out", f"{folder}/{name}")


def test_two_processes_have_the_loss_of_one_and_train(tmp_path):
    torchrun(2, "-c", "from experiments.test_experiments import clamp, train_on_two; "
                      f"clamp.command_line(lambda: train_on_two('{tmp_path}'))")
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in SHAPES:
        loss, gradient = loss_of_share(name)
        for share in shares:
            torch.testing.assert_close(share[name][0], loss, rtol=1e-11, atol=1e-12)
        joined = torch.cat([share[name][1] for share in shares], 1)
        torch.testing.assert_close(joined, gradient, rtol=1e-11, atol=1e-12)
        assert torch.load(tmp_path / name / "backbone.pt")["epoch"] == 1


@pytest.mark.parametrize("name", sorted(peers.METHODS.keys() - {"shuffled_dbn", "byol"}))
def test_a_peer_trains_and_its_backbone_is_measured(name, tmp_path, monkeypatch):
    if name != "vicreg":
        monkeypatch.setattr(clamp, "build_backbone", tiny_backbone)
    peers.main(name, *ONE_STEP, "--radius-scale", "1e6", "--out", str(tmp_path))
    log = json.loads((tmp_path / "log.jsonl").read_text())
    assert math.isfinite(log["loss"]) and log["radius"] > 1e4
    if name == "vicreg":
        flags = eval_linear.parse_args([str(tmp_path), "--epochs", "1", "--limit", "300"])
        assert eval_linear.evaluate(flags)["n_test"] == 2000
        result = geometry.measure(geometry.parse_args([str(tmp_path)]))
        assert result["n_test"] == 2000 and (tmp_path / "geometry.jsonl").exists()
        assert "alpha" in result["theirs"] and "size" not in result["theirs"]  # another projector


@pytest.mark.parametrize("name", ["shuffled_dbn", "byol"])
def test_interrupted_peer_ends_as_the_whole_one_and_another_is_refused(name, tmp_path, monkeypatch):
    def train(out):
        peers.main(name, *ONE_STEP, "--epochs", "2", "--out", str(tmp_path / out))
        return torch.load(tmp_path / out / "checkpoint.pt")

    @wraps(peers.METHODS[name]["loss"])
    def interrupted(z, calls=[], loss=peers.METHODS[name]["loss"], **numbers):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(z, **numbers)

    monkeypatch.setattr(clamp, "build_backbone", tiny_backbone)
    whole = train("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(peers.METHODS, name, peers.METHODS[name] | {"loss": interrupted})
        train("parts")
    assert torch.load(tmp_path / "parts" / "checkpoint.pt")["epoch"] == 1
    parts = train("parts")
    torch.testing.assert_close(parts["network"], whole["network"], rtol=0, atol=0)
    with pytest.raises(clamp.UserError, match="method"):
        peers.main("simclr", *ONE_STEP, "--epochs", "2", "--out", str(tmp_path / "whole"))


def test_main_hands_each_methods_parts_to_train(monkeypatch):
    calls = []
    monkeypatch.setattr(clamp, "train", lambda *parts: calls.append(parts))
    for name in ("byol", "byol", "ce_ssl", "ellipsoid"):
        peers.main(name, *TINY, "--epochs", "3")
    peers.main("swav", "--rounds", "4", *TINY, "--epsilon", "0.05")
    (_, loss, byol, plain), (_, _, again, _), (_, _, heads, pairs), packing, own = calls
    assert own[1].keywords == dict(temperature=0.1, epsilon=0.05, rounds=4) and own[0].rounds == 4
    assert loss.func is peers.byol and byol.steps == 6
    torch.testing.assert_close(byol.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert plain is None and pairs is peers.PairedAugment
    assert type(heads.projector) is peers.SideBySide
    assert packing[1].keywords == dict(reach=3.0)
    assert not any("running_mean" in key for key in packing[2].projector.state_dict())


def test_momentum_copy_follows_the_papers_schedule():
    flags = "--projector 8 4 --limit 20 --batch-size 8 --epochs 5 --device cpu"  # ten steps
    network, x = peers.BYOL(clamp.parse_args(flags.split())), torch.randn(4, 3, 32, 32)
    copies, online = [*network.target.parameters()], [*network.backbone.parameters(),
                                                     *network.projector.parameters()]
    expected = [p.detach().clone() for p in online]
    for step in range(3):
        tau = 1 - (1 - 0.99) * (math.cos(math.pi * step / 10) + 1) / 2
        expected = [tau * old + (1 - tau) * new.detach() for old, new in zip(expected, online)]
        network.train()(x).sum().backward()
        torch.testing.assert_close(copies, expected)
        assert all(p.grad is None for p in copies) and all(p.grad is not None for p in online)
        for p in online:
            p.data += torch.randn_like(p)
    z = network.eval()(x)
    torch.testing.assert_close(copies, expected)  # evaluation does not move it
    torch.testing.assert_close(z[:, 4:], network.target(x))
    torch.testing.assert_close(z[:, :4], network.predictor(network.projector(network.backbone(x))))


def test_networks_return_what_their_losses_take():
    args = clamp.parse_args(["--projector", "16", "8", "--batch-size", "128"])
    x = torch.randn(6, 3, 32, 32)
    for name in ("simsiam", "swav", "ce_ssl"):
        network = peers.METHODS[name]["network"](args)
        features = network.backbone(x)
        if name == "simsiam":
            h = network.projector(features)
            torch.testing.assert_close((h.mean(0), h.var(0, correction=0)),
                                       (torch.zeros(8), torch.ones(8)), atol=1e-3, rtol=0)
            expected = torch.cat([network[2][0](h), h], 1)
        elif name == "swav":
            h, prototypes = network.projector(features)[:, None], network[2].weight
            assert len(prototypes) == 96
            expected = F.cosine_similarity(h, prototypes[None], dim=2)
        else:
            first, second = network.projector.children()
            assert first[0].weight.shape == second[0].weight.shape == (16, 512)
            expected = torch.cat([first(features), second(features)], 1)
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_pairs_get_the_same_transformations():
    images = torch.randint(256, (6, 3, 32, 32)).byte()
    images[1::2] = images[::2]
    augment = peers.PairedAugment(32, 2)
    views = augment(augment.crop(images))
    assert torch.equal(views[:, ::2], views[:, 1::2])
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[:, 0], views[:, 2])
    for k in range(6):  # image k stays at place k
        images[k] = 40 * k
    views = peers.PairedAugment(32, 2, jitter_p=0.0)(augment.crop(images))
    expected = clamp.normalize(images / 255)
    torch.testing.assert_close(views, torch.stack([expected, expected]), rtol=0, atol=1e-3)


def test_with_huge_radii_only_centres_count():
    z = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fixed, free = (z.clone().requires_grad_() for _ in range(2))
    clamp.packing_loss(fixed, radius_scale=1e6).backward()
    centers = F.normalize(free - free.mean((0, 1)), dim=2).mean(0)
    distances = [(centers[i] - centers[j]).norm() for i, j in pairs(7)]
    (0.5 * sum((1 - r / 1.5).clamp(min=0) ** 2 for r in distances) + 1e-6).log().backward()
    torch.testing.assert_close(fixed.grad, free.grad)


@pytest.mark.parametrize("words, call", [
    ("'nope' is not one of simclr", lambda: peers.main("nope")),
    ("--views 3", lambda: peers.vicreg(torch.randn(3, 8, 4))),
    ("--views 3", lambda: peers.barlow_twins(torch.randn(3, 8, 4))),
    ("--views 3", lambda: peers.ce_ssl(torch.randn(3, 8, 4))),
    ("give a multiple of 8", lambda: peers.w_mse(torch.randn(2, 12, 4))),
    ("--group 16: has to divide 24", lambda: peers.shuffled_dbn(torch.randn(2, 20, 24))),
    ("be less than 16, the batch", lambda: peers.shuffled_dbn(torch.randn(2, 16, 32))),
    ("an even --batch-size", lambda: peers.PairedAugment(8, 2).crop(torch.zeros(3, 3, 8, 8))),
    ("one size", lambda: peers.PairedAugment(8, 2).crop(torch.zeros(3, 8, 8))),
])
def test_what_a_peer_cannot_take_is_said(words, call):
    with pytest.raises(clamp.UserError, match=words):
        call()


def test_dynamics_are_drawn(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    keys = "epoch", "radius", "neighbours", "spread", "participation_ratio"
    (tmp_path / "log.jsonl").write_text(json.dumps(dict.fromkeys(keys, 1)) + "\n")
    figures.main("dynamics", tmp_path)
    assert (tmp_path / "dynamics.png").exists()


def test_a_map_is_drawn(monkeypatch, tiny_run):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("sklearn")
    few = clamp.Data(*clamp.draw_patterns(120, 1))
    monkeypatch.setattr(clamp, "load_data", lambda *_: few)
    figures.main("map", tiny_run)
    assert Image.open(tiny_run / "map.png").width > 900
    few.labels[3] = -1
    with pytest.raises(clamp.UserError, match="test images with labels"):
        figures.main("map", tiny_run)


@pytest.mark.parametrize("words", [[], ["map"], ["accuracy", "run"], ["run"]])
def test_figures_says_what_it_draws_and_what_is_missing(words, monkeypatch):
    with pytest.raises(clamp.UserError, match="accuracy, dynamics RUN, or map RUN"):
        figures.main(*words)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import then fails
    with pytest.raises(clamp.UserError, match="matplotlib.* is missing"):
        figures.main("accuracy")


README = (Path(__file__).parents[1] / "README.md").read_text()
CHANGE_IT = README.split("\n## Change it\n")[1].split("\n## ")[0]
SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", CHANGE_IT, re.S)
            if "clamp.train(" in code]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_of_the_readme_train(code, tmp_path, monkeypatch):
    """On a few patterns in place of all data sets, in one epoch."""
    drawn = clamp.draw_patterns(64, 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clamp, "draw_patterns", lambda *_, **__: drawn)
    for name in "download", "list_images":
        monkeypatch.setattr(clamp, name, lambda *_: clamp.Data(*drawn))
    for script, few in (clamp, TINY), (eval_linear, ["--epochs", "1", "--batch-size", "32"]):
        monkeypatch.setattr(script, "parse_args", lambda flags=(), parse_args=script.parse_args,
                            few=few: parse_args([*flags, *few]))
    exec(code, {"__name__": "__main__"})
    file, = tmp_path.glob("runs/*/backbone.pt")
    assert torch.load(file)["epoch"] == 1


@pytest.mark.parametrize("alpha", [0.5, 1.04, 2.0])
def test_spectrum_of_data_drawn_with_a_known_exponent(alpha):
    torch.manual_seed(0)
    scales = torch.arange(1, 201) ** (-alpha / 2)
    rotation = torch.linalg.qr(torch.randn(200, 200)).Q
    features = (torch.randn(20_000, 200) * scales) @ rotation + 3
    eigenvalues, fitted = geometry.spectrum(features)
    assert fitted == pytest.approx(alpha, abs=0.03)
    assert eigenvalues.sum() == pytest.approx(features.double().var(0).sum().item())


@pytest.mark.parametrize("n", [300, 2048])
def test_their_alpha_of_exact_power_laws(n):
    for alpha in 0.7, 1.01, 2.3:
        eigenvalues = 5 * torch.arange(n, dtype=torch.float64) ** -alpha
        eigenvalues[:15], eigenvalues[1400:] = 1e9, 0  # outside of their ranks
        assert geometry.their_alpha(eigenvalues) == pytest.approx(alpha, abs=1e-3)


def test_their_alpha_equals_the_fit_that_they_use():
    fit = pytest.importorskip("scipy.optimize").curve_fit
    place = torch.arange(2048, dtype=torch.float64)
    bent = (place + 8) ** -1.2 * torch.linspace(1, 0.2, 2048)
    (_, power), _ = fit(lambda x, c, p: c * x**p, place[15:1400].numpy(), bent[15:1400].numpy())
    assert geometry.their_alpha(bent) == pytest.approx(-power, abs=1e-3)


def test_their_size_and_neighbours_equal_loops():
    m, b, d = 3, 40, 5
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(b, d, generator=generator, dtype=torch.float64) + 0.4 * torch.randn(
        m, b, d, generator=generator, dtype=torch.float64) + 2
    for radius_scale in 1.5, 2.5:
        centers, sizes = [], []
        for i in range(b):
            points = [z[k, i] - z.mean((0, 1)) for k in range(m)]
            points = [x / x.norm() for x in points]
            centers.append(sum(points) / m)
            trace = sum((x - centers[i]).square().sum() for x in points) / m
            sizes.append((trace / min(m, d) + 1e-12).sqrt())
        reach = [[0.99 * radius_scale * (x + y + 1e-6) for x in sizes] for y in sizes]
        near = [(centers[i] - centers[j]).norm() < reach[i][j] for i in range(b) for j in range(b)]
        assert b < sum(near) < b * b
        assert geometry.their_packing(z, radius_scale) == pytest.approx(
            {"size": sum(sizes).item() / b, "neighbours": sum(near).item() / b}, abs=1e-4)


def test_geometry_measures_what_the_authors_publish(tiny_run):
    numbers = [geometry.measure(geometry.parse_args([str(tiny_run), *flags]))["theirs"]
               for flags in ([], [], ["--random-init"])]
    assert numbers[0] == numbers[1] != numbers[2]
    for theirs in numbers:
        assert theirs["ranks"] == (16, 8 * 49) and theirs["images"] == 1024
        assert 0 < theirs["size"] < 1 <= theirs["neighbours"] <= 1024
    (tiny_run / "checkpoint.pt").unlink()
    assert "size" not in geometry.measure(geometry.parse_args([str(tiny_run)]))["theirs"]


def test_their_protocol_trains_in_train_mode_and_beats_chance(tiny_run, monkeypatch, capsys):
    seen, rates, embed, step = [], [], clamp.embed, torch.optim.Adam.step

    def watched_embed(network, x, dtype):
        seen.append((len(x), network.training))
        return embed(network, x, dtype)

    def watched_step(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer)

    monkeypatch.setattr(clamp, "embed", watched_embed)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    flags = ["--epochs", "3", "--batch-size", "32", "--limit", "1300", "--workers", "0"]
    their_evaluation.evaluate([str(tiny_run), *flags])
    steps = 1235 // 32  # 65 images are held out, and 64 of them scored
    tested = [(64, False), *7 * [(256, False)], (2000 // 32 * 32 - 7 * 256, False)]
    assert seen[:3 * (steps + len(tested))] == 3 * (steps * [(32, True)] + tested)
    expected = [[r * 32 / 256 * (1 + math.cos(math.pi * epoch / 3)) / 2 for r in (0.3, 0.1, 0.05)]
                for epoch in range(3) for _ in range(steps)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))
    out = capsys.readouterr().out
    theirs, ours = re.search(r"theirs, 3 epochs: (.*) %; eval_linear.py: (.*) %", out).groups()
    assert float(theirs) > 20 and float(ours) > 20  # 17 is chance; the network is tiny
    with pytest.raises(clamp.UserError, match="--batch-size 1024: needs 1024 test and 20480"):
        their_evaluation.evaluate([str(tiny_run)])


def test_their_protocol_takes_the_first_best_epoch_and_the_rate_best_on_test(
        tiny_run, monkeypatch, capsys):
    held_out, tested = [[50, 40, 60], [50, 45, 55]], [[30, 99, 20], [98, 31, 97]]
    scripted = iter([*held_out[0], *tested[0], *held_out[1], *tested[1]])
    monkeypatch.setattr(eval_linear, "accuracy", lambda *_: next(scripted))
    monkeypatch.setattr(eval_linear, "evaluate", lambda args: {"top1": args.epochs})
    flags = ["--epochs", "2", "--batch-size", "32", "--limit", "640"]
    their_evaluation.evaluate([str(tiny_run), *flags])
    assert capsys.readouterr().out.endswith("theirs, 2 epochs: 31.00 %; eval_linear.py: 100.00 %\n")


def test_packing_of_classes_takes_as_many_images_as_the_smallest_class_has():
    clouds = torch.randn(6, 5, 8)  # six images of each of five classes
    features, labels = clouds.flatten(0, 1), torch.arange(5).repeat(6)
    features, labels = torch.cat([features, torch.randn(3, 8)]), torch.cat([labels, labels[:3]])
    expected = clamp.packing_numbers(clouds, 2.0, 1.1)
    assert geometry.class_packing(features, labels, 2.0, 1.1) == pytest.approx(
        {k: v.item() for k, v in expected.items()})


def test_a_ball_is_drawn_in_its_place_size_and_colour():
    views = torch.tensor([[0.3, 0, 1], [-0.3, 0, 1], [0, 0.3, 1], [0, -0.3, 1]])
    z = torch.stack([views, -views], 1)  # two balls, in front of and behind the middle
    radius = clamp.packing_numbers(z, radius_scale=1.5)["radius"].item()
    skins = torch.eye(3)[[0, 2], :, None, None].repeat(1, 1, 128, 128)  # red, blue
    for turn, colour in (0, 0), (math.pi, 2):
        image = pil_to_tensor(sphere.draw(z, skins, 1.5, turn, side=280)).int()
        coloured = image.amax(0) - image.amin(0) > 20
        assert image[:, 140, 140].argmax() == colour
        assert coloured[140].sum() == pytest.approx(200 * radius, abs=2)


def test_sphere_films_a_tiny_run_and_draws_a_finished_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sphere, "draw", partial(sphere.draw, side=40))
    sphere.main(flags=[*TINY, "--projector", "32", "3"], folder=tmp_path)
    assert Image.open(tmp_path / "sphere.gif").n_frames == 2 + 20  # the end is held
    clamp.train(clamp.parse_args([*TINY, "--projector", "32", "3", "--out", str(tmp_path / "run")]))
    sphere.main(str(tmp_path / "run"))
    assert Image.open(tmp_path / "run" / "sphere.png").size == (2700, 450)
    with pytest.raises(clamp.UserError, match="a projector of three outputs"):
        sphere.main(flags=["--projector", "32", "4"])


def run_job(job, out, scale=4e-4, minutes=40 / 54, winner="--lr 1.6", clock=range(1000)):
    """The lines of the results. The clock is what each look at it tells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clamp, "build_backbone", tiny_backbone)
        patch.setattr(speedrun, "time", SimpleNamespace(monotonic=partial(next, iter(clock))))
        speedrun.main(job, "patterns", out, minutes, scale, winner)
    return [json.loads(line) for line in open(out / "results.jsonl")]


@pytest.mark.parametrize("job, scale, looks", [("ten_million", 4e-4, 5), ("long", 0.15, 10)])
def test_job_out_of_time_continues_and_ends_as_the_whole_one(job, scale, looks, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_job(job, whole, scale)
    with pytest.raises(SystemExit) as stop:
        run_job(job, parts, scale, clock=chain(range(looks), repeat(41)))
    assert not stop.value.code and "over: call again" in capsys.readouterr().out
    name = expected[0]["name"]
    assert torch.load(parts / name / "checkpoint.pt")["epoch"] == 2
    lines = run_job(job, parts, scale, minutes=9)  # the epochs that were chosen remain
    for key in "name", "epochs", "views", "linear", "knn":
        assert [line[key] for line in lines] == [line[key] for line in expected]
    weights = [torch.load(out / name / "checkpoint.pt")["network"] for out in (whole, parts)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert lines[0]["epochs"] == 4 and run_job(job, parts, scale) == lines  # nothing is left to do
    for flags, words in ({"winner": None}, "--winner"), ({"winner": "--lr 3"}, "another lr"):
        with pytest.raises(clamp.UserError, match=words):
            run_job(job, parts, scale, **flags)


def test_pilots_are_judged_on_held_out_images_and_may_diverge(tmp_path, monkeypatch):
    monkeypatch.setitem(speedrun.JOBS, "pilots", [
        ("wild", "clamp", f"{speedrun.BASE} --lr 1e30", 2), ("tame", "simclr", speedrun.SIMCLR, 2)])
    wild, tame = run_job("pilots", tmp_path)
    assert "not finite" in wild["error"] and tame["knn"] > 30  # chance: 17
    judged = json.loads((tmp_path / "tame" / "linear.jsonl").read_text())
    assert (judged["n_train"], judged["n_test"]) == (571, 144)  # 715 of the training images
    (train, _), (test, _) = speedrun.hold_out(torch.arange(30), torch.arange(30) % 3)
    assert train.sort().values.tolist() == [*range(24)] and len(test) == 6


def test_benchmark_compares_the_same_loss_and_runs():
    z = torch.randn(4, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(benchmark.broadcast_loss(z), clamp.packing_loss(z))
    script = [sys.executable, benchmark.__file__, "--quick"]
    shown = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    for words in ("packing loss, 4 views", "augmentation:", "training step", "streamed"):
        assert words in shown
