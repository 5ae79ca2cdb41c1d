"""Tests of clamp.py and eval_linear.py against independent references, without network or GPU."""

import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
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
PAPER = dict(center=False, max_reach=math.inf)


def embeddings(m, b, d, noise=0.3, seed=0, dtype=torch.float64):
    """b clouds of m points in d dimensions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(b, d, generator=generator, dtype=torch.float64)
    offsets = noise * torch.randn(m, b, d, generator=generator, dtype=torch.float64)
    return (centers + offsets).to(dtype)


def tiny_network(seed=0, norm=nn.BatchNorm2d):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), norm(8), nn.Tanh(), nn.Flatten())
    return nn.Sequential(OrderedDict(backbone=backbone, projector=nn.Linear(8 * 49, 16)))


# -------- packing loss


def loop_loss(z, radius_scale=7.0, max_reach=1.5, center=True):
    """The equations, one image and one pair at a time, with the full covariance matrix."""
    m, b, d = z.shape
    mean = sum(z[k, i] for k in range(m) for i in range(b)) / (m * b) if center else 0
    unit = [[(z[k, i] - mean) / (z[k, i] - mean).norm() for k in range(m)] for i in range(b)]
    centers, radii = [], []
    for views in unit:
        middle = sum(views) / m
        covariance = sum(torch.outer(v - middle, v - middle) for v in views) / (m - 1)
        centers.append(middle)
        radii.append(radius_scale * (covariance.trace() / min(m, d) + 1e-12).sqrt())
    energy, neighbours = 0, [0] * b
    for i in range(b):
        for j in range(b):
            distance = (centers[i] - centers[j]).norm() if i != j else None
            reach = min(radii[i] + radii[j], torch.tensor(max_reach, dtype=z.dtype))
            if i != j and 1e-3 < distance < reach:
                energy = energy + (1 - distance / reach) ** 2 / 2
                neighbours[i] += 1
    return torch.log(energy + torch.tensor(1e-6)), centers, radii, neighbours


@pytest.mark.parametrize("shape", [(4, 7, 5), (2, 6, 16), (5, 4, 3), (2, 30, 4)])
@pytest.mark.parametrize("options", [{}, PAPER, dict(radius_scale=4.0), dict(max_reach=1.3)])
def test_loss_and_gradient_equal_the_equations(shape, options):
    z, reference = (embeddings(*shape).requires_grad_() for _ in range(2))
    loss, geometry = clamp.packing_loss(z, **options)
    expected, centers, radii, neighbours = loop_loss(reference, **options)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.to(loss), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(z.grad, reference.grad, rtol=1e-9, atol=1e-10)
    assert sum(neighbours) > 0
    centers, b = torch.stack(centers).detach(), shape[1]
    spectrum = torch.linalg.eigvalsh(torch.cov(centers.T))
    expected = {"radius": sum(radii).item() / b, "neighbours": sum(neighbours) / b,
                "spread": (centers - centers.mean(0)).norm(dim=1).square().mean().sqrt().item(),
                "participation_ratio": (spectrum.sum() ** 2 / spectrum.square().sum()).item()}
    assert {k: v.item() for k, v in geometry.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", ["coincident", "one image", "zero radii", "apart", "same centres",
                                  "bfloat16", "half"])
def test_gradients_are_finite(case):
    z = {"coincident": torch.ones(4, 8, 16),
         "one image": embeddings(4, 1, 16),
         "zero radii": embeddings(4, 8, 16, noise=0.0),
         "apart": torch.eye(8).expand(4, 8, 8) + 1e-5 * torch.randn(4, 8, 8),
         "same centres": embeddings(4, 1, 16).expand(4, 40, 16),
         "bfloat16": embeddings(4, 8, 16, dtype=torch.bfloat16),
         "half": embeddings(4, 8, 16, dtype=torch.half)}[case]
    z = z.clone().requires_grad_()
    loss, geometry = clamp.packing_loss(z)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()
    assert all(value.isfinite() for value in geometry.values())
    assert loss.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)


def test_close_centres_in_float32_have_the_gradient_of_float64():
    z = embeddings(4, 40, 32, noise=0.05)
    z[:, 1] = z[:, 0] + 2e-2 / math.sqrt(32) * embeddings(1, 1, 32, noise=0, seed=1)[:, 0]
    grads = []
    for dtype in (torch.float64, torch.float32):
        x = z.detach().clone().to(dtype).requires_grad_()
        clamp.packing_loss(x)[0].backward()
        grads.append(x.grad.double())
    assert grads[0].any() and (grads[1] - grads[0]).norm() < 1e-3 * grads[0].norm()


def test_loss_ignores_autocast_and_refuses_other_shapes():
    z = embeddings(4, 9, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = clamp.packing_loss(z)[0]
    assert inside == clamp.packing_loss(z)[0]
    for wrong in z[:1], z[0]:
        with pytest.raises(ValueError, match="views >= 2"):
            clamp.packing_loss(wrong)


# -------- processes


def spawn(function, world, *args):
    """Run function(*args) on `world` processes of one thread."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(join, (world, port, function, args), world)


def join(rank, world, port, function, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    function(*args)
    dist.barrier()
    dist.destroy_process_group()


def contrast(z):
    """A loss of the kind that a user may write: it compares all embeddings of all processes."""
    return (z.flatten(0, 1) @ z.flatten(0, 1).T).logsumexp(1).mean(), {}


def loss_of_share(folder):
    """The losses and DDP's averages of their gradients for this process's share of 12 images."""
    (rank, world), results = clamp.rank_and_world(), []
    for loss_fn in (clamp.packing_loss, contrast):
        torch.manual_seed(0)
        model = nn.Linear(6, 5).double()
        ddp = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        x = embeddings(3, 12, 6)[:, rank * 12 // world:(rank + 1) * 12 // world]
        loss, _ = loss_fn(clamp.gather(ddp(x)))
        (world * loss).backward()
        results += [loss.detach(), model.weight.grad]
        del ddp
    torch.save(results, f"{folder}/loss-{world}-{rank}.pt")


class FixedViews(clamp.MultiViewAugment):
    """The same shifts of every image each time, so that all processes make the same views."""

    def __call__(self, images):
        assert (self.size, self.crop_scale, self.jitter[0]) == (32, [0.2, 1.0], 0.4)  # the flags'
        x = clamp.normalize(images / 255)
        return torch.stack([x, x.roll(5, 3), x.flip(3)])


def train_shares(folder):
    loss_of_share(folder)
    rank, world = clamp.rank_and_world()
    # DDP gives every process the first one's weights. Batch norm has each process's statistics.
    network = tiny_network(seed=rank, norm=nn.Identity)
    args = clamp.parse_args(["--limit", "24", "--batch-size", "12", "--epochs", "3", "--lr", "4",
                             "--amp", "off", "--out", f"{folder}/run-{world}"])
    clamp.train(args, network=network, augment=FixedViews)


def test_several_processes_have_the_gradient_of_one_and_train_alike(tmp_path):
    train_shares(str(tmp_path))
    for world in (2, 3, 4):
        spawn(train_shares, world, str(tmp_path))
    one, whole = (torch.load(tmp_path / f) for f in ("loss-1-0.pt", "run-1/checkpoint.pt"))
    for world in (2, 3, 4):
        for rank in range(world):
            for a, b in zip(torch.load(tmp_path / f"loss-{world}-{rank}.pt"), one):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        network = torch.load(tmp_path / f"run-{world}" / "checkpoint.pt")["network"]
        torch.testing.assert_close(network, whole["network"], rtol=1e-3, atol=2e-5)
        ours, expected = (read_log(tmp_path / f"run-{n}")[2] for n in (world, 1))
        assert ours == pytest.approx(expected, rel=1e-3)


# -------- augmentation


def pictures(n=12, height=20, width=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, 3, height // 4, width // 4, generator=generator)
    x = F.interpolate(noise, (height, width), mode="bilinear")
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
    """Draws again, in the order of the steps, what the augmentation drew."""
    augment = clamp.MultiViewAugment(40, 2, (1, 1), blur_p=[1.0, 0.3], solarize_p=[0.0, 0.6])
    x = pictures(40, 16, 16)
    operators = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for k in range(2):
        torch.manual_seed(k)
        views = augment.photometric(x, k)
        torch.manual_seed(k)
        flip, jitter = torch.rand(40) < 0.5, torch.rand(40) < 0.8
        order = torch.randperm(4).tolist()
        changes = {j: torch.empty(40).uniform_(-1, 1) * augment.jitter[j] for j in order}
        gray, blur = torch.rand(40) < 0.2, torch.rand(40) < augment.blur_p[k]
        sigma, solarize = torch.empty(40).uniform_(0.1, 2.0), torch.rand(40) < augment.solarize_p[k]
        for i in range(40):
            y = TF.hflip(x[i]) if flip[i] else x[i]
            for j in order if jitter[i] else []:
                y = operators[j](y, changes[j][i].item() + (j < 3))
            y = TF.rgb_to_grayscale(y, 3) if gray[i] else y
            y = TF.gaussian_blur(y, 5, sigma[i].item()) if blur[i] else y
            y = TF.solarize(y, 0.5) if solarize[i] else y
            # a pixel on the threshold of solarising may fall on either side
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
    weight, bias, zero = torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2)
    params = [nn.Parameter(p.clone()) for p in (weight, bias, zero)]
    optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.9)
    velocity = [0, 0, 0]
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        for k, (p, g) in enumerate(zip((weight, bias, zero), grads)):
            params[k].grad = g.clone()
            scale = 1
            if p.ndim > 1:
                if eta and p.any():
                    scale = eta * p.norm() / (g.norm() + 0.01 * p.norm())
                g = g + 0.01 * p
            velocity[k] = 0.9 * velocity[k] + scale * g
        weight, bias, zero = (p - 0.5 * v for p, v in zip((weight, bias, zero), velocity))
        clamp.lars(optimizer, eta, weight_decay=0.01)
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in params], [weight, bias, zero])


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
    for k in range(n):
        width, height = sizes[k % len(sizes)]
        x = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed + k))
        TF.to_pil_image(x).save(folder / f"{k:03}.{'png' if k % 2 else 'jpg'}")


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
def test_a_broken_picture_is_named(sizes, tmp_path):
    write_pictures(tmp_path / "train" / "ant", 6, sizes)
    file = tmp_path / "train" / "ant" / "002.jpg"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(clamp.UserError, match="ant/002.jpg: cannot be decoded .*; remove it"):
        images, _ = clamp.load_data(str(tmp_path), "train")  # reads all if they have one size
        list(clamp.image_batches(images, torch.arange(6)[None], torch.clone, CPU, workers=1))


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
    bank, labels = torch.randn(60, 4), torch.arange(60) % 3
    bank += F.one_hot(labels, 4) * 1.5
    queries = bank + torch.randn(60, 4)

    def classify(query, bank, labels):
        cosine = [F.cosine_similarity(query, row, dim=0).item() for row in bank]
        votes = [0.0] * 3
        for i in sorted(range(len(bank)), key=lambda i: -cosine[i])[:5]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        return votes.index(max(votes))

    correct = [classify(q, bank, labels) == y for q, y in zip(queries, labels)]
    ours = clamp.knn_accuracy(bank, labels, queries, labels, k=5)
    assert ours == pytest.approx(100 * sum(correct) / 60)


def fit_options(*flags):
    """What probe() and finetune() take: images of 8 px, features that are their means."""
    args = eval_linear.parse_args(["run", "--batch-size", "20", *flags])
    options = dict(size=8, device=CPU, dtype=torch.float32, workers=0)
    torch.manual_seed(0)
    images, labels = (255 * torch.rand(50, 3, 8, 8)).byte(), torch.arange(50) % 4
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False))
    split = eval_linear.make_split(images, labels, backbone, options)
    return split, dict(classes=4, backbone=backbone, args=args, options=options)


def batch_rows(args):
    """The rows of every step's batch, as eval_linear's batches() draws them."""
    for epoch in range(args.epochs):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(epoch))
        yield from order[:40].view(2, 20)


def test_probe_equals_separate_torch_classifiers():
    split, options = fit_options("--epochs", "4")
    rates = [0.03, 0.3]
    x = (split.features - split.features.mean(0)) / split.features.std(0)
    for rate, logits in zip(rates, eval_linear.probe(split, split, rates, **options)):
        head = nn.Linear(5, 4)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        for rows in batch_rows(options["args"]):
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows]), split.labels[rows]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(logits, head(x).detach(), rtol=1e-4, atol=1e-5)


def test_finetuning_by_hand(monkeypatch):
    """The backbone's learning rate is 0.05 of the classifier's; momentum and cosine."""
    split, options = fit_options("--finetune", "--epochs", "3")
    plain = dict(jitter_p=0, gray_p=0, blur_p=[0])
    augment = clamp.MultiViewAugment
    whole = augment(8, 1, (1, 1), 0, **plain)
    monkeypatch.setattr(clamp, "MultiViewAugment", lambda *_, **__: whole)
    torch.manual_seed(1)
    ours, = eval_linear.finetune(split, split, [0.4], **options)
    torch.manual_seed(1)
    head = nn.Linear(5, 4)
    weights = [w.detach() for w in (options["backbone"][1].weight, head.weight, head.bias)]
    x = TF.normalize(split.images / 255, clamp.MEAN, clamp.STD).flatten(1)
    velocities = [0, 0, 0]
    for step, rows in enumerate(batch_rows(options["args"])):
        weights = [w.requires_grad_() for w in weights]
        logits = x[rows] @ weights[0].T @ weights[1].T + weights[2]
        F.cross_entropy(logits, split.labels[rows]).backward()
        rate = 0.4 * (1 + math.cos(math.pi * step / 6)) / 2
        velocities = [0.9 * v + w.grad for v, w in zip(velocities, weights)]
        weights = [(w - rate * scale * v).detach()
                   for w, v, scale in zip(weights, velocities, (0.05, 1, 1))]
    expected = x @ weights[0].T @ weights[1].T + weights[2]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_labels_by_fraction_and_by_list(tmp_path):
    labels = torch.tensor([0] * 40 + [1] * 80 + [3] * 3)
    files = np.array([f"{k}/{i:03}.jpg" for i, k in enumerate(labels.tolist())])
    rows = eval_linear.labelled_rows(files, labels, 0.1, seed=0)
    assert labels[rows].bincount().tolist() == [4, 8, 0, 1] and len(set(rows.tolist())) == 13
    assert not torch.equal(rows, eval_linear.labelled_rows(files, labels, 0.1, seed=1))
    (tmp_path / "list").write_text("002.jpg 100.jpg\n")
    assert eval_linear.labelled_rows(files, labels, str(tmp_path / "list"), 0).tolist() == [2, 100]
    with pytest.raises(clamp.UserError, match="of its 2 names, 0 belong"):
        eval_linear.labelled_rows(files[:2], labels, str(tmp_path / "list"), 0)


# -------- training


def train_once(out, *flags, loss_fn=None):
    clamp.train(clamp.parse_args([*TINY, "--out", str(out), *flags]), loss_fn, tiny_network())


def fail_at(monkeypatch, call):
    """The given call of the packing loss, which is the default loss, is interrupted."""
    def interrupted(*args, calls=[], loss=clamp.packing_loss, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)
    monkeypatch.setattr(clamp, "packing_loss", interrupted)


def read_log(folder):
    """The lines of log.jsonl, without the time they took."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(record.pop("seconds") >= 0 for record in records)
    return records


def assert_same_runs(whole, other):
    a, b = (torch.load(out / "checkpoint.pt") for out in (whole, other))
    torch.testing.assert_close(a["network"], b["network"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    a, b = (torch.load(out / "backbone.pt") for out in (whole, other))
    assert a["epoch"] == b["epoch"] == 3
    torch.testing.assert_close(a["backbone"], b["backbone"], rtol=0, atol=0)
    assert read_log(whole) == read_log(other) and len(read_log(whole)) == 3
    assert not list(other.glob("*.part"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train_once(out)
    return out


def test_run_interrupted_in_an_epoch_and_in_a_save_ends_as_the_whole_one(whole_run, tmp_path,
                                                                         monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, 5)
        train_once(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 1
    for failing, epoch in ((1, 1), (2, 1), (3, 2), (2, 2)):  # each epoch replaces two files
        replaced = []

        def replace(part, path, replace=os.replace):
            replaced.append(path)
            if len(replaced) == failing:
                raise KeyboardInterrupt
            replace(part, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", replace)
            train_once(tmp_path)
        assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == epoch
    train_once(tmp_path)
    assert_same_runs(whole_run, tmp_path)


def test_interrupted_streamed_run_ends_as_the_whole_one(tmp_path, monkeypatch):
    write_pictures(tmp_path / "photos", 64, ((40, 50), (70, 30)))
    data = ["--data", str(tmp_path / "photos")]
    train_once(tmp_path / "whole", *data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, 5)
        train_once(tmp_path / "parts", *data)
    train_once(tmp_path / "parts", *data)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_ends_as_the_whole_one(stop, whole_run, tmp_path):
    script = f"import test_clamp; test_clamp.train_once({str(tmp_path)!r})"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on their number
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, cwd=HERE,
                               env=os.environ | threads)
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait() == -stop
    train_once(tmp_path)
    assert_same_runs(whole_run, tmp_path)


class Stranger:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("damage", ["cut", "stranger", "missing", "lone"])
def test_damaged_checkpoint_is_named_and_kept(damage, whole_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = (whole_run / "checkpoint.pt").read_bytes()[:-1000]
    content = pickle.dumps(Stranger(), protocol=2) if damage == "stranger" else content
    for name in ("checkpoint.pt", "backbone.pt"):
        Path(name).write_bytes(content)
    if damage in ("missing", "lone"):
        Path("checkpoint.pt" if damage == "missing" else "backbone.pt").unlink()
    with pytest.raises(clamp.UserError, match="checkpoint.pt: missing or damaged"):
        train_once(tmp_path)
    with pytest.raises(clamp.UserError, match="backbone.pt"):
        eval_linear.evaluate(eval_linear.parse_args([str(tmp_path)]))
    assert next(Path().glob("*.pt")).read_bytes() == content and not Path("executed").exists()


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
    args = clamp.parse_args([*TINY, "--out", str(tmp_path)])
    clamp.train(args, network=network, data=(images, labels))
    assert read_log(tmp_path)[2]["knn"] == 100
    for flags in ([], ["--augment"], ["--random-init"]):
        few = ["--batch-size", "36", "--epochs", "5"]
        args = eval_linear.parse_args([str(tmp_path), *few, *flags])
        result = eval_linear.evaluate(args, tiny_network().backbone, data=2 * [(images, labels)])
        assert result["top1"] == 100 and result["n_train"] == 80
    own, _ = eval_linear.load_backbone(tmp_path, backbone=tiny_network().backbone)
    assert torch.equal(own[0].weight, network.backbone[0].weight)
    with pytest.raises(clamp.UserError, match="another backbone"):
        eval_linear.load_backbone(tmp_path)
    with pytest.raises(clamp.UserError, match="another own data, own network"):
        clamp.train(clamp.parse_args([*TINY, "--out", str(tmp_path)]))


# -------- command line


def run(*command, code=0, **options):
    """Run a script as a user would; returns its result after checking the exit status."""
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE, **options)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def test_command_line_end_to_end(tmp_path):
    out = tmp_path / "run"
    train = ["clamp.py", *TINY, "--epochs", "2", "--out", out]
    assert "writing" in run(*train).stdout
    files = {"views.png", "log.jsonl", "checkpoint.pt", "backbone.pt"}
    assert {file.name for file in out.iterdir()} == files
    assert Image.open(out / "views.png").size == (2 * 34 + 2, 8 * 34 + 2)
    log = read_log(out)
    assert [line["epoch"] for line in log] == [1, 2]
    assert {"loss", "radius", "neighbours", "lr", "knn"} <= log[0].keys()
    network = torchvision.models.resnet18()
    saved = torch.load(out / "backbone.pt")["backbone"]
    assert network.load_state_dict(saved, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert "finished" in run(*train).stdout and len(read_log(out)) == 2

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
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*torchrun, "clamp.py", *TINY, "--amp", "off", "--out", tmp_path)
    backbone, _ = eval_linear.load_backbone(tmp_path)  # rank 0's, with its batch norm
    images, labels = clamp.load_data("patterns", "train", limit=96)
    torch.manual_seed(0)
    order = torch.randperm(96)
    features = clamp.extract_features(backbone, images, order, 32, CPU, torch.float32)
    (queries, bank), (y, bank_y) = features.split(48), labels[order].split(48)
    log = read_log(tmp_path)
    assert len(log) == 3 and log[2]["knn"] == clamp.knn_accuracy(bank, bank_y, queries, y)
    flags = ["--epochs", "2", "--amp", "off", "--lr", "0.03", "--limit", "501"]
    results = [json.loads(run(*launch, "eval_linear.py", tmp_path, *flags).stdout.splitlines()[-1])
               for launch in ([], torchrun)]
    assert results[0] == pytest.approx(results[1])
    for method in ("--finetune", "--augment"):
        run(*torchrun, "eval_linear.py", tmp_path, "--epochs", "1", "--limit", "300", method)
    assert json.loads((tmp_path / "linear.jsonl").read_text().splitlines()[3])["n_train"] == 300


def one_line(capfd, script, argv):
    """The line on stderr with which a script's command line refuses argv, exit status 2."""
    def main():
        args = script.parse_args([str(a) for a in argv])
        clamp.train(args) if script is clamp else script.evaluate(args)

    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        clamp.command_line(main)
    shown = capfd.readouterr().err.split("\r")[-1].strip()
    assert stop.value.code == 2 and "error: " in shown, shown
    return shown


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
    ("--recipe imagenet1k", "--data imagenet: no folder imagenet; give one, or patterns"),
    ("--data no/such", "--data no/such: no folder no/such; give one, or patterns, cifar10"),
    ("--data {tmp}/empty", "empty: no pictures in"),
    ("--data {tmp}/broken", "0.jpg: cannot be decoded (cannot identify"),
    ("--data cifar10", "--data cifar10: cannot download"),
    ("--device cuda", "--device cuda: no GPU for process 1"),
    ("--out {tmp}/file", "{tmp}/file"),
    ("--frobnicate", "unrecognized arguments: --frobnicate"),
])
def test_bad_flags_give_one_line_and_write_nothing(flags, words, tmp_path, capfd, monkeypatch):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir(), (tmp_path / "broken").mkdir()
    for name in ("file", "broken/0.jpg", "broken/1.png", "broken/2.png"):
        (tmp_path / name).write_bytes(b"not a picture")
    before = sorted(tmp_path.rglob("*"))

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    monkeypatch.setattr(no_network, "url", "URL", raising=False)
    argv = ["--device", "cpu", "--out", tmp_path / "run", *flags.format(tmp=tmp_path).split()]
    shown = one_line(capfd, clamp, argv).splitlines()
    assert words.format(tmp=tmp_path) in shown[-1] and len(shown) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluations_that_do_not_fit_give_one_line(tmp_path, capfd):
    write_pictures(tmp_path / "flat", 33, ((40, 50), (70, 30)))
    clamp.save(tmp_path, backbone={
        "settings": vars(clamp.parse_args([])), "epoch": 3,
        "backbone": clamp.build_backbone("resnet18").state_dict()})
    before = sorted(tmp_path.rglob("*"))
    for argv, words in (
            ([tmp_path / "flat" / "001.png"], "001.png: missing, damaged"),
            ([tmp_path, "--data", tmp_path / "flat"], "has no labels; evaluation needs train/"),
            ([tmp_path, "--labels", "2"], "--labels: 2: give 1e-06 to 1.0"),
            ([tmp_path, "--labels", "nosuch"], "--labels: invalid fraction_or_existing_file value"),
            ([tmp_path, "--limit", "200"], "--batch-size 256: must be at most 180, the images to"),
            ([tmp_path, "--lr", "-1"], "--lr: -1: give 0.0 or more")):
        assert words in one_line(capfd, eval_linear, argv).splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_recipes_change_the_published_defaults_and_help_shows_them():
    published = clamp.parse_args(["--recipe", "cifar10-published"])
    assert (published.data, published.radius_scale, published.views, published.batch_size,
            published.epochs, published.lr, published.stem, published.projector) == (
            "cifar10", 7.0, 16, 128, 1000, 0.1, "cifar", [2048, 256])
    assert clamp.parse_args([]).recipe == "patterns"
    own = clamp.parse_args(["--data", "photos", "--lr", "1", "--epochs", "2"])
    assert (own.recipe, own.max_reach, own.lr, own.warmup_epochs) == ("small", 1.2, 1, 2 / 3)
    shown = " ".join(run("clamp.py", "--recipe", "imagenet1k", "--help").stdout.split())
    assert "(default: 8.5)" in shown and "(default: 1.1)" in shown
