"""Tests of clamp.py and eval_linear.py against independent references, without network or GPU."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn

import clamp
import eval_linear

HERE = Path(__file__).parent
CPU = torch.device("cpu")
TINY = ["--epochs", "3", "--limit", "96", "--batch-size", "32", "--views", "2", "--projector",
        "32", "16", "--workers", "1"]


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    """What is compared here is exact on CPUs only. experiments/test_cuda.py tests a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts
        yield


def embeddings(m, b, d, noise=0.3):
    """b clouds of m points in d dimensions, in float64."""
    torch.manual_seed(0)
    return torch.randn(b, d, dtype=torch.float64) + noise * torch.randn(m, b, d)


def tiny_network(seed=0, norm=nn.BatchNorm2d):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), norm(8), nn.Tanh(), nn.Flatten())
    return nn.Sequential(OrderedDict(backbone=backbone, projector=nn.Linear(8 * 49, 16)))


def run(*command, code=0):
    """Run a script as a user would; returns its result after checking the exit status."""
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def torchrun(processes, *command):
    """Run a script, or -c and a line of Python, on several processes."""
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
               "--no-python", sys.executable, *command)


# -------- packing loss


def loop_loss(z, radius_scale=7.0, max_reach=1.5, center=True):
    """The equations, one image and one pair at a time, with the full covariance matrix."""
    m, b, d = z.shape
    mean = sum(z.flatten(0, 1)) / (m * b) if center else 0
    centers, radii, energy, neighbours = [], [], 0, 0
    for views in (z - mean).unbind(1):
        unit = torch.stack([view / view.norm() for view in views])
        centers.append(sum(unit) / m)
        radii.append(radius_scale * (unit.T.cov().trace() / min(m, d) + 1e-12).sqrt())
    for i, j in itertools.permutations(range(b), 2):
        distance = (centers[i] - centers[j]).norm()
        reach = (radii[i] + radii[j]).clamp(max=max_reach)
        if 1e-3 < distance < reach:
            energy = energy + (1 - distance / reach) ** 2 / 2
            neighbours += 1
    variances = torch.linalg.eigvalsh(torch.stack(centers).T.cov(correction=0))
    return (energy + 1e-6).log(), {
        "radius": sum(radii) / b, "neighbours": torch.tensor(neighbours / b),
        "spread": variances.sum().sqrt(),
        "participation_ratio": variances.sum() ** 2 / variances.square().sum()}


@pytest.mark.parametrize("shape", [(4, 7, 5), (2, 6, 16), (5, 4, 3), (2, 30, 4)])
@pytest.mark.parametrize("options", [
    {}, dict(center=False, max_reach=math.inf), dict(radius_scale=4.0), dict(max_reach=1.4)])
def test_loss_and_gradient_equal_the_equations(shape, options):
    z = embeddings(*shape)
    z[:, 0] = z[:, 1] + 1e-4  # closer than 1e-3
    z.requires_grad_()
    (loss, geometry), (expected, expected_geometry) = (
        function(z, **options) for function in (clamp.packing_loss, loop_loss))
    gradient, expected_gradient = (torch.autograd.grad(x, z)[0] for x in (loss, expected))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(geometry, expected_geometry, rtol=1e-6, atol=0, check_dtype=False)
    assert geometry["neighbours"] > 0


@pytest.mark.parametrize("z", [
    pytest.param(torch.ones(4, 8, 16), id="coincident"),
    pytest.param(embeddings(4, 1, 16), id="one image"),
    pytest.param(embeddings(4, 8, 16, noise=0), id="zero radii"),
    pytest.param(torch.eye(8) + 1e-5 * torch.randn(4, 8, 8), id="apart"),
    pytest.param(embeddings(4, 1, 16).expand(4, 40, 16), id="same centres"),
    pytest.param(embeddings(4, 8, 16).bfloat16(), id="bfloat16"),
    pytest.param(embeddings(4, 8, 16).half(), id="half"),
])
def test_gradients_are_finite(z):
    z = z.clone().requires_grad_()
    loss, geometry = clamp.packing_loss(z)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()
    assert all(value.isfinite() for value in geometry.values())
    assert loss.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)


def test_close_centres_in_float32_have_the_gradient_of_float64():
    z = embeddings(4, 40, 32, noise=0.05)
    z[:, 1] = z[:, 0] + 2e-2 / math.sqrt(32) * torch.randn(32)
    exact, ours = (torch.autograd.grad(clamp.packing_loss(x)[0], x)[0]
                   for x in (z.requires_grad_(), z.detach().float().requires_grad_()))
    assert exact.any() and (ours - exact).norm() < 1e-3 * exact.norm()


def test_loss_ignores_autocast_and_refuses_other_shapes():
    z = embeddings(4, 9, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = clamp.packing_loss(z)[0]
    assert inside == clamp.packing_loss(z)[0]
    for wrong in z[:1], z[0]:
        with pytest.raises(ValueError, match="views >= 2"):
            clamp.packing_loss(wrong)


# -------- augmentation


def pictures(n=12, height=20, width=28):
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(n, 3, height // 4, width // 4), (height, width), mode="bilinear")
    x[0] = 0.5  # grey: no hue, no saturation
    x[1] = x[1].round()  # corners of the colour cube
    return x


@pytest.mark.parametrize("ours, theirs, low, high", [
    (clamp.brightness, lambda x, change: TF.adjust_brightness(x, 1 + change), -0.8, 0.8),
    (clamp.contrast, lambda x, change: TF.adjust_contrast(x, 1 + change), -0.8, 0.8),
    (clamp.saturation, lambda x, change: TF.adjust_saturation(x, 1 + change), -0.8, 0.8),
    (clamp.hue, TF.adjust_hue, -0.5, 0.5),
    (lambda x, s: clamp.gaussian_blur(x, s, 3), lambda x, s: TF.gaussian_blur(x, 3, s), 0.1, 2),
    (lambda x, s: clamp.gaussian_blur(x, s, 9), lambda x, s: TF.gaussian_blur(x, 9, s), 0.1, 2),
    (lambda x, _: clamp.normalize(x), lambda x, _: TF.normalize(x, clamp.MEAN, clamp.STD), 0, 1),
])
def test_operators_equal_torchvision(ours, theirs, low, high):
    x = pictures()
    parameter = torch.linspace(low, high, len(x))
    expected = torch.stack([theirs(picture, p.item()) for picture, p in zip(x, parameter)])
    torch.testing.assert_close(ours(x, parameter.view(-1, 1, 1, 1)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 40])
def test_resized_crop_equals_torchvision(size):
    x = pictures()
    torch.manual_seed(0)
    boxes = clamp.draw_boxes(x, (0.05, 1.0))
    boxes[:, 0], boxes[:, 1] = torch.tensor([0, 0, 20, 28]), torch.tensor([19, 27, 1, 1])
    for picture, box, ours in zip(x, boxes.T, clamp.resized_crop(x, boxes, size)):
        expected = TF.resized_crop(picture, *box.int().tolist(), [size, size], antialias=True)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    crop, picture = torchvision.transforms.RandomResizedCrop, torch.zeros(3, 24, 40)
    scale = 0.08, 1.0
    ours = clamp.draw_boxes(picture.expand(4000, 3, 24, 40), scale).T
    theirs = torch.tensor([crop.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(4000)])
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= torch.tensor([24, 40])).all()
    for a, b in ((ours, theirs.float()), (ours.square(), theirs.float().square())):
        torch.testing.assert_close(a.mean(0), b.mean(0), rtol=0.06, atol=0.1)
    for height, width in ((10, 100), (10, 101), (91, 8), (9, 9)):  # nothing fits: the centre
        box = crop.get_params(torch.zeros(3, height, width), (1.0, 1.0), (3 / 4, 4 / 3))
        boxes = clamp.draw_boxes(torch.zeros(50, 3, height, width), (1.0, 1.0))
        assert (boxes.T == torch.tensor(box)).all()


def test_views_equal_torchvision_given_the_same_parameters():
    """Draws again, in the order of the steps, what the augmentation drew for 5 views of 30."""
    augment, n = clamp.MultiViewAugment(40, 5, blur_p=[1.0, 0.3, 0.0], solarize_p=[0.0, 0.6]), 150
    x = pictures(n, 16, 16)
    torch.manual_seed(0)
    views = augment.photometric(x)
    torch.manual_seed(0)
    flip, jitter, order = torch.rand(n) < 0.5, torch.rand(n) < 0.8, torch.randperm(4).tolist()
    changes = {j: torch.empty(n).uniform_(-1, 1) * augment.jitter[j] for j in order}
    gray, sigma = torch.rand(n) < 0.2, torch.empty(n).uniform_(0.1, 2.0)
    blur = (torch.rand(5, 30) < torch.tensor([[1], [0.3], [0], [1], [0.3]])).flatten()
    solarize = (torch.rand(5, 30) < torch.tensor([[0], [0.6], [0], [0.6], [0]])).flatten()
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for i in range(n):
        y = TF.hflip(x[i]) if flip[i] else x[i]
        for j in order if jitter[i] else []:
            y = adjust[j](y, changes[j][i].item() + (j < 3))
        y = TF.rgb_to_grayscale(y, 3) if gray[i] else y
        y = TF.gaussian_blur(y, 5, sigma[i].item()) if blur[i] else y
        y = TF.solarize(y, 0.5) if solarize[i] else y
        # rounding may put a pixel on either side of the threshold of solarising
        different = (views[i] - TF.normalize(y, clamp.MEAN, clamp.STD)).abs() > 1e-4
        assert different.float().mean() < (0.01 if solarize[i] else 1e-9)


def test_every_view_of_every_image_is_its_own():
    images = (pictures(5, 32, 32)[[2, 3, 3]] * 255).byte()
    torch.manual_seed(0)
    views = clamp.MultiViewAugment(24, 5, (1, 0.08))(images)
    assert views.shape == (5, 3, 3, 24, 24) and views.dtype == torch.float32
    assert torch.pdist(views.flatten(0, 1).flatten(1)).min() > 0.1
    plain = clamp.MultiViewAugment(32, 2, (1, 1), 0, jitter_p=0, gray_p=0, blur_p=[0])(images)
    expected = TF.normalize(images / 255, clamp.MEAN, clamp.STD)
    torch.testing.assert_close(plain, expected.expand(2, 3, 3, 32, 32))


# -------- network, optimiser


@pytest.mark.parametrize("arch, features", [("resnet18", 512), ("resnet50", 2048)])
@pytest.mark.parametrize("stem, left", [("imagenet", 1), ("cifar", 5)])
def test_backbone_has_torchvisions_keys_outputs_and_gradients(arch, features, stem, left):
    backbone, theirs = clamp.build_backbone(arch, stem), getattr(torchvision.models, arch)()
    assert backbone.state_dict().keys() == {k for k in theirs.state_dict() if k[:3] != "fc."}
    assert backbone.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, features)
    backbone.avgpool = nn.Identity()
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, features * left**2)
    if stem == "imagenet":
        backbone.avgpool, theirs.fc = theirs.avgpool, nn.Identity()
        theirs.load_state_dict(backbone.state_dict())
        for size in ((32, 32), (40, 16), (16, 40)):  # layer3: maps of 2 x 2, 3 x 1 and 1 x 3
            x = torch.randn(8, 3, *size, dtype=torch.float64)
            ours, expected = (network.double().train()(x) for network in (backbone, theirs))
            (ours.square().sum() - expected.square().sum()).backward()
            torch.testing.assert_close(ours, expected)
        for p, q in zip(backbone.parameters(), theirs.parameters()):
            torch.testing.assert_close(p.grad, -q.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.1, 0])
def test_lars_by_hand(eta):
    torch.manual_seed(0)
    expected = [torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2)]  # weight, bias, zero weight
    params = [nn.Parameter(p.clone()) for p in expected]
    optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.9)
    velocity = [0, 0, 0]
    for _ in range(3):
        for k, p in enumerate(expected):
            params[k].grad = g = torch.randn_like(p)
            if p.ndim > 1:
                scale = eta * p.norm() / (g.norm() + 0.01 * p.norm()) if eta and p.any() else 1
                g = scale * (g + 0.01 * p)
            velocity[k] = 0.9 * velocity[k] + g
            expected[k] = p - 0.5 * velocity[k]
        clamp.lars(optimizer, eta, weight_decay=0.01)
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in params], expected)


def test_schedule():
    scale = [clamp.lr_scale(step, 10, 110) for step in range(110)]
    assert scale[:11] == pytest.approx([0.1 * k for k in range(1, 11)] + [1])
    assert scale[60] == pytest.approx(0.5) and 0 < scale[109] < 1e-3


# -------- data


def test_patterns_are_balanced_seeded_disjoint_grey_and_not_told_by_pixels():
    (x, y), (again, _), (test_x, test_y) = (
        clamp.load_data("patterns", split) for split in ("train", "train", "test"))
    assert x.dtype == torch.uint8 and x.shape == (5000, 3, 32, 32) and torch.equal(x, again)
    assert (x == x[:, :1]).all() and max(y.bincount()) - min(y.bincount()) <= 1
    rows, test_rows = ({image.numpy().tobytes() for image in i} for i in (x, test_x))
    assert len(rows) == len(x) and not rows & test_rows
    pixels, test_pixels = (F.pad(i[:, 0].flatten(1).double() / 255, (0, 1), value=1)
                           for i in (x, test_x))
    gram = pixels.T @ pixels + 10 * torch.eye(1025, dtype=torch.float64)
    weight = torch.linalg.solve(gram, pixels.T @ F.one_hot(y).double())
    assert ((test_pixels @ weight).argmax(1) == test_y).float().mean() < 0.55


def write_pictures(folder, n, sizes=((32, 32),), seed=0):
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    for k in range(n):
        width, height = sizes[k % len(sizes)]
        picture = TF.to_pil_image(torch.rand(3, height, width))
        picture.save(folder / f"{k:03}.{'png' if k % 2 else 'jpg'}")


def test_folders(tmp_path):
    for part in ("train", "val"):
        for k, name in enumerate(("ant", "bee", "cat")):
            write_pictures(tmp_path / "small" / part / name, 4, seed=100 * k)
    images, labels = clamp.load_data(str(tmp_path / "small"), "train")
    assert images.shape == (12, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    bee = Image.open(tmp_path / "small/train/bee/001.png")
    assert torch.equal(images[5], TF.pil_to_tensor(bee))
    assert clamp.load_data(str(tmp_path / "small"), "test")[1].tolist() == labels.tolist()
    few, few_labels = clamp.load_data(str(tmp_path / "small"), "train", limit=5, seed=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))[:5]
    assert torch.equal(few, images[order]) and torch.equal(few_labels, labels[order])

    write_pictures(tmp_path / "flat" / "nested", 4, ((40, 50), (70, 30)))
    images, labels = clamp.load_data(str(tmp_path / "flat"), "train")
    assert [Path(f).name for f in images] == ["000.jpg", "001.png", "002.jpg", "003.png"]
    assert (labels == -1).all()


@pytest.mark.parametrize("sizes", [((32, 32),), ((40, 50), (70, 30))])
def test_a_broken_picture_is_named(sizes, tmp_path, capfd):
    write_pictures(tmp_path / "ant", 32, sizes)
    file = tmp_path / "ant/002.jpg"
    file.write_bytes(file.read_bytes()[:400])
    line = refusal(capfd, clamp, *TINY, "--data", tmp_path, "--out", tmp_path / "run")
    assert "ant/002.jpg: cannot be decoded" in line and line.endswith("; remove it")


def test_streamed_views_come_from_the_right_picture(tmp_path):
    for k, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        Image.new("RGB", (50 + 10 * k, 40), color).save(tmp_path / f"{k}.png")
    images, _ = clamp.load_data(str(tmp_path), "train")
    augment = clamp.MultiViewAugment(16, 3, (1, 0.08), jitter_p=0, gray_p=0, blur_p=[0.0])
    batches = torch.tensor([[2, 0], [1, 2]])
    for workers in (0, 2):
        crops = list(clamp.image_batches(images, batches, augment.crop, CPU, workers))
        for rows, x in zip(batches, map(augment, crops)):
            assert x.shape == (3, 2, 3, 16, 16)
            assert (x.mean((3, 4)).argmax(2) == rows).all()
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    features = clamp.extract_features(network, images, torch.arange(3), 16, CPU, torch.float32)
    assert features.argmax(1).tolist() == [0, 1, 2]


# -------- evaluation


def test_knn_equals_a_loop():
    torch.manual_seed(0)
    bank, labels = torch.randn(300, 4), torch.arange(300) % 3
    queries = bank + torch.randn(300, 4)
    correct = 0
    for query, label in zip(queries, labels):
        cosine, votes = F.cosine_similarity(query, bank), [0.0] * 3
        for i in cosine.argsort(descending=True)[:5]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        correct += votes.index(max(votes)) == label
    ours = clamp.knn_accuracy(bank, labels, queries, labels, k=5)
    assert ours == pytest.approx(100 * correct / 300)


def fit_options(*flags):
    """What probe() and finetune() take: images of 8 px, and five features of each."""
    args = eval_linear.parse_args(["run", "--batch-size", "20", *flags])
    options = dict(size=8, device=CPU, dtype=torch.float32, workers=0)
    torch.manual_seed(0)
    images, labels = (255 * torch.rand(50, 3, 8, 8)).byte(), torch.arange(50) % 4
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False))
    split = eval_linear.make_split(images, labels, backbone, options)
    return split, dict(classes=4, backbone=backbone, args=args, options=options)


def torch_logits(network, rates, x, labels, epochs):
    """Logits of x by a network that torch's SGD has trained on the batches of
    eval_linear.batches(), with a learning rate for each layer."""
    groups = [dict(params=layer.parameters(), lr=lr) for layer, lr in zip(network, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * epochs)
    for epoch in range(epochs):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(epoch))
        for rows in order[:40].view(2, 20):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return network(x).detach()


def test_probe_equals_separate_torch_classifiers():
    split, options = fit_options("--epochs", "4")
    rates = [0.03, 0.3]
    x = (split.features - split.features.mean(0)) / split.features.std(0)
    for rate, logits in zip(rates, eval_linear.probe(split, split, rates, **options)):
        head = nn.Linear(5, 4)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        expected = torch_logits(nn.Sequential(head), [rate], x, split.labels, epochs=4)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_finetuning_equals_torch_with_a_slower_backbone(dtype, tolerance, monkeypatch):
    split, options = fit_options("--finetune", "--epochs", "3")
    options["options"]["dtype"] = dtype
    monkeypatch.setattr(clamp.MultiViewAugment, "__call__",
                        lambda _, images: clamp.normalize(images / 255)[None])
    torch.manual_seed(1)
    with torch.no_grad():  # as in evaluate()
        ours, = eval_linear.finetune(split, split, [0.4], **options)
    torch.manual_seed(1)
    network = nn.Sequential(options["backbone"][1], nn.Linear(5, 4)).requires_grad_()
    x = TF.normalize(split.images / 255, clamp.MEAN, clamp.STD).flatten(1)
    expected = torch_logits(network, [0.05 * 0.4, 0.4], x, split.labels, epochs=3)
    torch.testing.assert_close(ours, expected, rtol=10 * tolerance, atol=tolerance)


def test_labels_by_fraction_and_by_list(tmp_path):
    labels = torch.tensor([0] * 40 + [1] * 80 + [3] * 3)
    files = np.array([f"{k}/{i:03}.jpg" for i, k in enumerate(labels.tolist())])
    rows = eval_linear.labelled_rows(files, labels, 0.1, seed=0)
    assert labels[rows].bincount().tolist() == [4, 8, 0, 1] and len(set(rows.tolist())) == 13
    assert not torch.equal(rows, eval_linear.labelled_rows(files, labels, 0.1, seed=1))
    (tmp_path / "list").write_text("002.jpg\n100.jpg\n")
    assert eval_linear.labelled_rows(files, labels, str(tmp_path / "list"), 0).tolist() == [2, 100]
    with pytest.raises(clamp.UserError, match="its 2 names fit 0 training files"):
        eval_linear.labelled_rows(files[:2], labels, str(tmp_path / "list"), 0)


# -------- training


def train_once(out, *flags, loss_fn=None):
    clamp.train(clamp.parse_args([*TINY, "--out", str(out), *flags]), loss_fn, tiny_network())


def read_log(folder):
    """The lines of log.jsonl, without the time they took."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(record.pop("seconds") >= 0 for record in records)
    return records


def assert_same_runs(whole, other):
    a, b = (torch.load(out / "checkpoint.pt") | torch.load(out / "backbone.pt")
            for out in (whole, other))
    for part in ("epoch", "network", "optimizer", "scaler", "backbone"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert read_log(whole) == read_log(other) and len(read_log(whole)) == a["epoch"] == 3
    assert not list(other.glob("*.part"))


class FixedViews(clamp.MultiViewAugment):
    """The same shifts of every image each time, so that all processes make the same views."""

    def __call__(self, images):
        assert (self.size, self.crop_scale, self.jitter[0]) == (32, [0.2, 1.0], 0.4)  # the flags'
        x = clamp.normalize(images / 255)
        return torch.stack([x, x.roll(5, 3), x.flip(3)])


def train_share(out):
    # DDP gives every process the first one's weights. Batch norm has each process's statistics.
    network = tiny_network(seed=int(os.environ.get("RANK", 0)), norm=nn.Identity)
    args = clamp.parse_args(["--limit", "24", "--batch-size", "12", "--epochs", "3", "--lr", "4",
                             "--amp", "off", "--out", str(out)])
    clamp.command_line(lambda: clamp.train(args, network=network, augment=FixedViews))


def test_three_processes_train_as_one_does(tmp_path):
    train_share(tmp_path / "one")
    torchrun(3, "-c", f"import test_clamp; test_clamp.train_share('{tmp_path}/three')")
    one, three = (torch.load(tmp_path / f"{n}/checkpoint.pt") for n in ("one", "three"))
    torch.testing.assert_close(three["network"], one["network"], rtol=1e-4, atol=5e-6)
    ours, expected = (read_log(tmp_path / n)[2] for n in ("three", "one"))
    assert ours == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train_once(out)
    return out


def test_interrupted_streamed_run_ends_as_the_whole_one(tmp_path):
    whole, parts, photos = (tmp_path / name for name in ("whole", "parts", "photos"))
    write_pictures(photos, 96, ((40, 50), (70, 30)))
    flags = ["--data", str(photos), "--amp", "fp16"]  # whose scaler has to be continued, too
    train_once(whole, *flags)
    for module, name, call, epoch in (  # an epoch has three steps, and replaces two files
            (clamp, "packing_loss", 5, 1), (os, "replace", 1, 1), (os, "replace", 2, 1),
            (os, "replace", 3, 2), (os, "replace", 2, 2)):
        effects = [mock.DEFAULT] * (call - 1) + [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt), mock.patch.object(
                module, name, wraps=getattr(module, name), side_effect=effects):
            train_once(parts, *flags)
        assert torch.load(parts / "checkpoint.pt")["epoch"] == epoch
    train_once(parts, *flags)
    assert_same_runs(whole, parts)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_ends_as_the_whole_one(stop, whole_run, tmp_path):
    script = f"import test_clamp; test_clamp.train_once('{tmp_path}')"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on their number
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, cwd=HERE,
                               env=os.environ | threads)
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait() == -stop
    train_once(tmp_path)
    assert_same_runs(whole_run, tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pt"])
@pytest.mark.parametrize("damage", ["cut", "stranger"])
def test_damaged_checkpoint_is_named_and_kept(name, damage, whole_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = b"cos\nmkdir\n(Vexecuted\ntR."  # a pickle that calls os.mkdir("executed")
    if damage == "cut":
        content = (whole_run / name).read_bytes()[:-1000]
    Path(name).write_bytes(content)
    with pytest.raises(clamp.UserError, match="checkpoint.pt: missing or damaged"):
        train_once(tmp_path)
    with pytest.raises(clamp.UserError, match="backbone.pt: missing, damaged"):
        eval_linear.evaluate(eval_linear.parse_args([str(tmp_path)]))
    assert Path(name).read_bytes() == content and not Path("executed").exists()


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    def loss_fn(z):
        calls.append(1)
        zero = z.square().mean() * (0 if len(calls) == 6 else 1)
        return zero.sqrt() if gradient else zero / zero * zero, {}  # 0 has no derivative; 0 / 0

    for gradient in (True, False):
        calls, out = [], tmp_path / str(gradient)
        with pytest.raises(clamp.UserError, match="epoch 2: .*not finite; give another --out"):
            train_once(out, loss_fn=loss_fn)
        assert torch.load(out / "checkpoint.pt")["epoch"] == 1


def test_own_images_in_memory_and_own_backbone_are_trained_and_evaluated(tmp_path):
    """Red and blue pictures are told apart by the features of any network."""
    images, labels = torch.full((80, 3, 32, 32), 40, dtype=torch.uint8), torch.arange(80) % 2
    images[torch.arange(80), 2 * labels] = 200
    network = tiny_network()
    args = clamp.parse_args([*TINY])
    args.out, args.lr = tmp_path, np.float64(args.lr)  # as a script may set them
    clamp.train(args, network=network, data=(images, labels))
    assert read_log(tmp_path)[2]["knn"] == 100
    few = [str(tmp_path), "--batch-size", "36", "--epochs", "5"]
    for flags in ([], ["--augment"], ["--random-init"]):
        args = eval_linear.parse_args([*few, *flags])
        result = eval_linear.evaluate(args, tiny_network().backbone, data=2 * [(images, labels)])
        assert result["top1"] == 100 and result["n_train"] == 80
    own, _ = eval_linear.load_backbone(tmp_path, backbone=tiny_network().backbone)
    assert torch.equal(own[0].weight, network.backbone[0].weight)
    with pytest.raises(clamp.UserError, match="another backbone"):
        eval_linear.load_backbone(tmp_path)
    with pytest.raises(clamp.UserError, match="another data, network"):
        clamp.train(clamp.parse_args([*TINY, "--out", str(tmp_path)]))
    with pytest.raises(clamp.UserError, match="images are torch.float32; give uint8"):
        clamp.train(clamp.parse_args(["--out", f"{tmp_path}/float"]), data=(images / 255, labels))


# -------- command line


def test_command_line_end_to_end(tmp_path):
    out = tmp_path / "run"
    train = ["clamp.py", *TINY, "--epochs", "2", "--out", out]
    assert "writing" in run(*train).stdout
    assert set(os.listdir(out)) == {"views.png", "log.jsonl", "checkpoint.pt", "backbone.pt"}
    assert Image.open(out / "views.png").size == (2 * 34 + 2, 8 * 34 + 2)
    log = read_log(out)
    assert [line["epoch"] for line in log] == [1, 2]
    assert {"loss", "radius", "neighbours", "lr", "knn"} <= log[0].keys()
    network = torchvision.models.resnet18()
    saved = torch.load(out / "backbone.pt")["backbone"]
    assert network.load_state_dict(saved, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert "finished" in run(*train).stdout and read_log(out) == log

    result = run("eval_linear.py", out, "--epochs", "2").stdout.splitlines()[-1]
    run("eval_linear.py", out / "backbone.pt", "--epochs", "2", "--random-init", "--limit", "500")
    written, floor = map(json.loads, (out / "linear.jsonl").read_text().splitlines())
    assert written.pop("settings")["epochs"] == 2 and json.loads(result) == written
    assert floor["settings"]["random_init"] and floor["settings"]["limit"] == 500
    assert floor["n_train"] == 500 and floor["n_test"] == 2000 and floor["top1"] != written["top1"]
    refused = run(*train, "--lr", "0.3", code=2).stderr
    assert refused.startswith("clamp.py: error: ") and "another lr; give another --out" in refused
    assert refused.count("\n") == 1


def test_two_processes_train_and_evaluate_as_one_does(tmp_path):
    torchrun(2, "clamp.py", *TINY, "--amp", "off", "--out", tmp_path)
    backbone, _ = eval_linear.load_backbone(tmp_path)  # rank 0's, with its batch norm
    images, labels = clamp.load_data("patterns", "train", limit=96)
    torch.manual_seed(0)
    order = torch.randperm(96)
    features = clamp.extract_features(backbone, images, order, 32, CPU, torch.float32)
    (queries, bank), (y, bank_y) = features.split(48), labels[order].split(48)
    log = read_log(tmp_path)
    assert len(log) == 3 and log[2]["knn"] == clamp.knn_accuracy(bank, bank_y, queries, y)
    probe = ["eval_linear.py", tmp_path, "--epochs", "2", "--amp", "off", "--limit", "501"]
    one, two = (json.loads(result.stdout.splitlines()[-1])
                for result in (run(*probe, "--lr", "0.03"), torchrun(2, *probe, "--lr", "0.03")))
    assert one == pytest.approx(two)
    for method in ("--finetune", "--augment"):
        torchrun(2, "eval_linear.py", tmp_path, "--epochs", "1", "--limit", "300", method)
    assert json.loads((tmp_path / "linear.jsonl").read_text().splitlines()[3])["n_train"] == 300


def refusal(capfd, script, *argv):
    """The one line on stderr with which a script's command line refuses argv, exit status 2."""
    main = clamp.train if script is clamp else eval_linear.evaluate
    with pytest.raises(SystemExit) as stop:
        clamp.command_line(lambda: main(script.parse_args([*map(str, argv)])))
    line, = capfd.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and "error: " in line
    return line


@pytest.mark.parametrize("flags, words", [
    ("--views 1", "--views: 1: give 2 or more"),
    ("--batch-size 6000", "--batch-size 6000: must be at most 5000, the number of images"),
    ("--limit 0", "--limit: 0: give 1 or more"),
    ("--epochs -3", "--epochs: -3: give 1 or more"),
    ("--lr nan", "--lr: nan: give 0.0 or more"),
    ("--lr inf", "--lr: inf: give 0.0 or more"),
    ("--radius-scale 0", "--radius-scale: 0: give 0.001 or more"),
    ("--jitter 0 0 2 0", "--jitter: 2: give 0.0 to 1.0"),
    ("--projector abc", "--projector: invalid number value: 'abc'"),
    ("--projector 64 0", "--projector: 0: give 1 or more"),
    ("--recipe imagenet1k", "--data imagenet: no folder imagenet; give one, or patterns, cifar10"),
    ("--data no/such", "--data no/such: no folder no/such; give one, or patterns, cifar10"),
    ("--data {tmp}/empty", "empty: no pictures in"),
    ("--data cifar10", "--data cifar10: cannot download"),
    ("--device cuda", "no GPU for process 1; start fewer, or use --device cpu"),
    ("--out {tmp}/file", "{tmp}/file"),
    ("--frobnicate", "unrecognized arguments: --frobnicate"),
])
def test_bad_flags_give_one_line_and_write_nothing(flags, words, tmp_path, capfd, monkeypatch):
    (tmp_path / "empty").mkdir(), (tmp_path / "file").touch()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", mock.Mock(side_effect=OSError, url=""))
    flags, words = flags.format(tmp=tmp_path).split(), words.format(tmp=tmp_path)
    assert words in refusal(capfd, clamp, "--device", "cpu", "--out", tmp_path / "run", *flags)
    assert {path.name for path in tmp_path.rglob("*")} == {"empty", "file"}


def test_evaluations_that_do_not_fit_give_one_line(tmp_path, capfd):
    write_pictures(tmp_path / "flat", 33, ((40, 50), (70, 30)))
    clamp.save(tmp_path, backbone={"settings": vars(clamp.parse_args([])),
                                   "backbone": clamp.build_backbone("resnet18").state_dict()})
    before = sorted(tmp_path.rglob("*"))
    for argv, words in (
            ([tmp_path / "flat" / "001.png"], "001.png: missing, damaged"),
            ([tmp_path, "--data", tmp_path / "flat"], "has no labels; evaluation needs train/"),
            ([tmp_path, "--labels", "2"], "--labels: 2: give 1e-06 to 1.0"),
            ([tmp_path, "--labels", "nosuch"], "--labels: invalid fraction_or_existing_file value"),
            ([tmp_path, "--limit", "200"], "--batch-size 256: must be at most 180, the images to"),
            ([tmp_path, "--lr", "-1"], "--lr: -1: give 0.0 or more")):
        assert words in refusal(capfd, eval_linear, *argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_recipes_change_the_published_defaults_and_help_shows_them():
    published = vars(clamp.parse_args(["--recipe", "cifar10-published"]))
    assert published == published | dict(data="cifar10", radius_scale=7.0, views=16, batch_size=128,
                                         epochs=1000, lr=0.1, stem="cifar", projector=[2048, 256])
    assert clamp.parse_args([]).recipe == "patterns"
    own = clamp.parse_args(["--data", "photos", "--lr", "1", "--epochs", "2"])
    assert (own.recipe, own.max_reach, own.lr, own.warmup_epochs) == ("small", 1.2, 1, 2 / 3)
    shown = " ".join(run("clamp.py", "--recipe", "imagenet1k", "--help").stdout.split())
    assert "(default: 8.5)" in shown and "(default: 1.1)" in shown
