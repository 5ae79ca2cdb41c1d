"""Tests of clamp.py and eval_linear.py against independent references; CPU, no network.

    python -m pytest        the tests
    python test_clamp.py    the benchmark: what things cost beside the usual ways of doing them
"""

import ctypes
import functools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import v2

import clamp
import eval_linear

HERE = Path(__file__).parent
TINY = ["--epochs", "3", "--warmup-epochs", "1", "--limit", "96", "--batch-size", "32", "--views",
        "2", "--projector", "32-16", "--knn-every", "2", "--workers", "1"]
PAPER = dict(center=False, min_distance=0.0, max_reach=math.inf, prefactor=0.5, eps_radius=0.0,
             eps_energy=0.0)


def embeddings(m, b, d, noise=0.3, seed=0, dtype=torch.float64):
    """b clouds of m points in d dimensions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(b, d, generator=generator, dtype=torch.float64)
    offsets = noise * torch.randn(m, b, d, generator=generator, dtype=torch.float64)
    return (centers + offsets).to(dtype)


# ------------------------------------------------------------------------------ packing loss


def loop_loss(z, radius_scale=7.0, center=True, min_distance=1e-3, max_reach=1.5, prefactor=0.25,
              eps_radius=1e-12, eps_energy=1e-6):
    """The equations, one image and one pair at a time, with the full covariance matrix."""
    m, b, d = z.shape
    mean = sum(z[k, i] for k in range(m) for i in range(b)) / (m * b) if center else 0
    unit = [[(z[k, i] - mean) / (z[k, i] - mean).norm() for k in range(m)] for i in range(b)]
    centers, radii = [], []
    for views in unit:
        middle = sum(views) / m
        covariance = sum(torch.outer(v - middle, v - middle) for v in views) / (m - 1)
        centers.append(middle)
        radii.append(radius_scale * (covariance.trace() / min(m, d) + eps_radius).sqrt())
    energy, neighbours = 0, [0] * b
    for i in range(b):
        for j in range(b):
            distance = (centers[i] - centers[j]).norm() if i != j else None
            reach = min(radii[i] + radii[j], torch.tensor(max_reach, dtype=z.dtype))
            if i != j and min_distance < distance < reach:
                energy = energy + prefactor * (1 - distance / reach) ** 2
                neighbours[i] += 1
    return torch.log(energy + torch.tensor(eps_energy)), centers, radii, neighbours


@pytest.mark.parametrize("shape", [(4, 7, 5), (2, 6, 16), (5, 4, 3)])
@pytest.mark.parametrize("options", [{}, PAPER, dict(radius_scale=4.0), dict(max_reach=1.3)])
def test_loss_and_gradient_equal_the_equations(shape, options):
    z, reference = embeddings(*shape).requires_grad_(), embeddings(*shape).requires_grad_()
    loss, geometry = clamp.packing_loss(z, **options)
    expected, centers, radii, neighbours = loop_loss(reference, **options)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.to(loss), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(z.grad, reference.grad, rtol=1e-7, atol=1e-9)
    assert sum(neighbours) > 0
    centers, b = torch.stack(centers).detach(), shape[1]
    spectrum = torch.linalg.eigvalsh(torch.cov(centers.T))
    expected = {"radius": sum(radii).item() / b, "neighbours": sum(neighbours) / b,
                "with_neighbour": sum(count > 0 for count in neighbours) / b,
                "spread": (centers - centers.mean(0)).norm(dim=1).square().mean().sqrt().item(),
                "participation_ratio": (spectrum.sum() ** 2 / spectrum.square().sum()).item()}
    assert {k: v.item() for k, v in geometry.items()} == pytest.approx(expected, rel=1e-6)
    assert not any(value.requires_grad for value in geometry.values())


def test_gradcheck():
    for options in ({}, PAPER, dict(radius_scale=2.0, max_reach=1.2)):
        z = embeddings(3, 5, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: clamp.packing_loss(z, **options)[0], z)


def broadcast_loss(z, radius_scale=7.0):
    """The same energy by a [b, b, d] tensor of differences."""
    m, b, d = z.shape
    z = F.normalize(z - z.mean((0, 1)), dim=-1)
    centers = z.mean(0)
    trace = (z - centers).square().sum((0, 2)) / (m - 1)
    radii = radius_scale * (trace / min(m, d) + 1e-12).sqrt()
    distance = (centers[:, None] - centers + torch.eye(b, device=z.device)[..., None]).norm(dim=-1)
    reach = (radii[:, None] + radii).clamp(max=1.5)
    near = (distance > 1e-3) & (distance < reach) & ~torch.eye(b, device=z.device).bool()
    return ((1 - distance / reach).where(near, 0).square().sum() / 4 + 1e-6).log()


def test_loss_equals_the_broadcast_formulation():
    z, reference = embeddings(4, 60, 24).requires_grad_(), embeddings(4, 60, 24).requires_grad_()
    loss, expected = clamp.packing_loss(z)[0], broadcast_loss(reference)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(z.grad, reference.grad, rtol=1e-7, atol=1e-9)


def test_more_images_than_fit_in_a_block_of_rows():
    m, b, d = 2, 1500, 8  # 1500^2 > 2^20
    z, reference = (embeddings(m, b, d, noise=0.1).requires_grad_() for _ in range(2))
    loss, geometry = clamp.packing_loss(z, center=False)
    loss.backward()
    unit = F.normalize(reference, dim=-1)
    centers = unit.mean(0)
    radii = 7 * ((unit - centers).square().sum((0, 2)) / (m - 1) / m + 1e-12).sqrt()
    left, right = torch.triu_indices(b, b, 1)
    distance = torch.linalg.vector_norm(centers[left] - centers[right], dim=1)
    overlap = 1 - distance / (radii[left] + radii[right]).clamp(max=1.5)
    near = (overlap > 0) & (distance > 1e-3)
    expected = (0.5 * overlap.where(near, 0).square().sum() + 1e-6).log()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z.grad, reference.grad, rtol=1e-6, atol=1e-12)
    assert geometry["neighbours"] == pytest.approx(2 * near.sum().item() / b)


@pytest.mark.parametrize("case", ["coincident", "one image", "two views", "zero radii", "apart",
                                  "same centres", "bfloat16", "half"])
def test_gradients_are_finite(case):
    z = {"coincident": torch.ones(4, 8, 16),
         "one image": embeddings(4, 1, 16),
         "two views": embeddings(2, 8, 16),
         "zero radii": embeddings(4, 8, 16, noise=0.0),
         "apart": torch.eye(8).expand(4, 8, 8) + 1e-5 * torch.randn(4, 8, 8),
         "same centres": embeddings(4, 1, 16).expand(4, 8, 16),
         "bfloat16": embeddings(4, 8, 16, dtype=torch.bfloat16),
         "half": embeddings(4, 8, 16, dtype=torch.half)}[case]
    z = z.clone().requires_grad_()
    loss, geometry = clamp.packing_loss(z)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()
    assert all(value.isfinite() for value in geometry.values())
    assert loss.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)


def test_close_centres_in_float32_have_the_gradient_of_float64():
    z = embeddings(4, 16, 32, noise=0.05)
    z[:, 1] = z[:, 0] + 2e-2 / math.sqrt(32) * embeddings(1, 1, 32, noise=0, seed=1)[:, 0]
    grads = []
    for dtype in (torch.float64, torch.float32):
        x = z.detach().clone().to(dtype).requires_grad_()
        clamp.packing_loss(x)[0].backward()
        grads.append(x.grad.double())
    assert grads[0].any() and (grads[1] - grads[0]).norm() < 1e-3 * grads[0].norm()


def test_loss_is_invariant():
    z = embeddings(4, 9, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    loss = clamp.packing_loss(z)[0]
    for same in (z[:, torch.randperm(9)], z[torch.randperm(4)], z @ rotation, 5 * z, z + 3):
        torch.testing.assert_close(clamp.packing_loss(same)[0], loss)
    assert abs(clamp.packing_loss(z + 3, center=False)[0] - loss) > 1e-3


def pair(angle, spread=0.05):
    """Two clouds of 4 points on the unit sphere in 3-d, `angle` apart."""
    points = []
    for a in (0.0, angle):
        t = torch.tensor([-spread, spread, 0, 0], dtype=torch.float64)
        p = torch.tensor([0, 0, -spread, spread], dtype=torch.float64)
        points.append(torch.stack([(a + t).cos() * p.cos(), (a + t).sin() * p.cos(), p.sin()], 1))
    return torch.stack(points, 1).requires_grad_()


def test_overlapping_pair_moves_apart_and_shrinks_and_a_separated_pair_stays():
    def size_and_distance(z):
        z = F.normalize(z, dim=-1)
        return (z - z.mean(0)).norm(dim=-1).mean(), (z.mean(0)[0] - z.mean(0)[1]).norm()

    z = pair(angle=0.2)
    loss, geometry = clamp.packing_loss(z, center=False)
    loss.backward()
    assert geometry["neighbours"] == 1
    (size, distance), (size_after, distance_after) = map(size_and_distance, (z, z - 1e-3 * z.grad))
    assert distance_after > distance and size_after < size

    z = pair(angle=2.0)
    loss, geometry = clamp.packing_loss(z, center=False)
    loss.backward()
    assert geometry["neighbours"] == 0 and loss.item() == pytest.approx(math.log(1e-6))
    assert (z.grad == 0).all()


def test_loss_ignores_autocast_and_refuses_one_view():
    z = embeddings(4, 8, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = clamp.packing_loss(z)[0]
    assert inside == clamp.packing_loss(z)[0]
    for wrong in (z[:1], z[0]):
        with pytest.raises(ValueError, match="views >= 2"):
            clamp.packing_loss(wrong)


def loss_of_share(rank, world):
    """The loss, the DDP-averaged gradient and the geometry of this process's share of 12 images."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5).double()
    ddp = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    x = embeddings(3, 12, 6)[:, rank * 12 // world:(rank + 1) * 12 // world]
    loss, geometry = clamp.packing_loss(ddp(x))
    loss.backward()
    return loss.detach(), model.weight.grad, torch.stack(list(geometry.values()))


def plain_backbone(arch, stem, zero_init):
    """Without batch norm, whose statistics are each process's own on a CPU."""
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=4), torch.nn.ReLU(), torch.nn.Flatten(1, 3))
    backbone.num_features = 8 * 49
    return backbone


def join_processes(rank, world, port):
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo")


def train_shares(rank, world, port, folder):
    """Process `rank` of `world`: the loss alone, then training of resident and streamed images."""
    torch.set_num_threads(1)
    clamp.build_backbone = plain_backbone
    join_processes(rank, world, port)
    torch.save(loss_of_share(rank, world), f"{folder}/loss-{world}-{rank}.pt")
    for data in ("patterns", f"{folder}/photos"):
        clamp.train(clamp.parse_args([
            "--data", data, "--limit", "24", "--batch-size", "12", "--views", "3", "--epochs", "2",
            "--projector", "32-16", "--lr", "4", "--eta", "0", "--amp", "off", "--workers", "0",
            "--out", f"{folder}/{Path(data).name}-{world}"]))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_several_processes_train_what_one_does(tmp_path):
    write_pictures(tmp_path / "photos", 24, ((40, 50), (70, 30)))
    for world in (1, 2, 3, 4):
        torch.multiprocessing.spawn(train_shares, (world, free_port(), str(tmp_path)), world)
    one = torch.load(tmp_path / "loss-1-0.pt")
    for world in (2, 3, 4):
        for rank in range(world):
            for a, b in zip(torch.load(tmp_path / f"loss-{world}-{rank}.pt"), one):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        for data in ("patterns", "photos"):
            network, whole = (torch.load(tmp_path / f"{data}-{n}" / "checkpoint.pt")["network"]
                              for n in (world, 1))
            torch.testing.assert_close(network, whole, rtol=1e-3, atol=2e-5)
            ours, expected = (read_log(tmp_path / f"{data}-{n}")[1] for n in (world, 1))
            assert ours == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------ augmentation


def pictures(n=12, height=20, width=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, 3, height // 4, width // 4, generator=generator)
    x = F.interpolate(noise, (height, width), mode="bilinear")
    x[0] = 0.5  # grey: no hue, no saturation
    x[1] = x[1].round()  # corners of the colour cube
    return x


@pytest.mark.parametrize("ours, theirs, low, high", [
    (clamp.adjust_brightness, TF.adjust_brightness, 0.2, 1.8),
    (clamp.adjust_contrast, TF.adjust_contrast, 0.2, 1.8),
    (clamp.adjust_saturation, TF.adjust_saturation, 0.2, 1.8),
    (clamp.adjust_hue, TF.adjust_hue, -0.5, 0.5),
    (lambda x, s: clamp.gaussian_blur(x, s, 3), lambda x, s: TF.gaussian_blur(x, 3, s), 0.1, 2),
    (lambda x, s: clamp.gaussian_blur(x, s, 9), lambda x, s: TF.gaussian_blur(x, 9, s), 0.1, 2),
    (lambda x, _: clamp.luminance(x), lambda x, _: TF.rgb_to_grayscale(x), 0, 1),
    (lambda x, _: clamp.normalize(x), lambda x, _: TF.normalize(x, clamp.MEAN, clamp.STD), 0, 1),
])
def test_operators_equal_torchvision(ours, theirs, low, high):
    x = pictures()
    parameter = torch.linspace(low, high, len(x))
    expected = torch.stack([theirs(picture, p.item()) for picture, p in zip(x, parameter)])
    torch.testing.assert_close(ours(x, parameter.view(-1, 1, 1, 1)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 40])
def test_resized_crop_equals_torchvision(size):
    x, n = pictures(), 12
    torch.manual_seed(0)
    boxes, flip = clamp.draw_boxes(n, 20, 28, (0.05, 1.0)), torch.arange(n) % 2 == 0
    boxes[0] = torch.tensor([0, 0, 20, 28])
    boxes[1] = torch.tensor([19, 27, 1, 1])
    crops = clamp.resized_crop(x, boxes, flip, size)
    for picture, box, flipped, ours in zip(x, boxes, flip, crops):
        expected = TF.resized_crop(picture, *box.int().tolist(), [size, size], antialias=True)
        expected = TF.hflip(expected) if flipped else expected
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_views_equal_torchvision_given_the_same_parameters():
    augment = clamp.MultiViewAugment(16, 4, blur_kernel=5, blur_p=[1.0, 0.1], solarize_p=[0, 0.6])
    torch.manual_seed(1)
    x, drawn = torch.stack([pictures(6, 16, 16, seed) for seed in range(4)]), augment.draw(6)
    operators = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    views = augment.photometric(255 * x, drawn)
    for k in range(4):
        for i in range(6):
            y = x[k, i]
            for o in drawn["order"]:
                y = operators[o](y, drawn["jitter"][o, k, i].item())
            if drawn["gray"][k, i]:
                y = TF.rgb_to_grayscale(y, 3)
            if drawn["sigma"][k, i]:
                y = TF.gaussian_blur(y, 5, drawn["sigma"][k, i].item())
            if drawn["solarize"][k, i]:
                y = torch.where(y >= 0.5, 1 - y, y)
            y = TF.normalize(y, clamp.MEAN, clamp.STD)
            # a pixel on the threshold of solarising may fall on either side
            different = (views[k, i] - y).abs() > 1e-4
            assert different.float().mean() < (0.01 if drawn["solarize"][k, i] else 1e-9)


def test_drawn_parameters_have_the_distributions_asked_for():
    torch.manual_seed(0)
    augment = clamp.MultiViewAugment(8, 4, blur_p=[1.0, 0.1], solarize_p=[0.0, 0.2])
    drawn = augment.draw(5000)
    for key, expected in (("sigma", [1, 0.1, 1, 0.1]), ("solarize", [0, 0.2, 0, 0.2]),
                          ("gray", [0.2] * 4)):
        share = (drawn[key] != 0).float().mean(1)
        torch.testing.assert_close(share, torch.tensor(expected).float(), rtol=0, atol=0.02)
    brightness, _, _, hue = drawn["jitter"]
    assert (brightness == 1).float().mean() == pytest.approx(0.2, abs=0.02)
    assert ((hue == 0) == (brightness == 1)).all()
    assert brightness.min() >= 0.2 and brightness.max() <= 1.8 and hue.abs().max() <= 0.2
    assert len({tuple(augment.draw(1)["order"]) for _ in range(200)}) == 24


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    picture, scale = torch.zeros(3, 24, 40), (0.08, 1.0)
    ours = clamp.draw_boxes(4000, 24, 40, scale)
    crop = torchvision.transforms.RandomResizedCrop
    theirs = torch.tensor([crop.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(4000)])
    assert (ours[:, 0] + ours[:, 2] <= 24).all() and (ours[:, 1] + ours[:, 3] <= 40).all()
    assert (ours >= 0).all() and (ours[:, 2:] >= 1).all()
    for a, b in ((ours, theirs.float()), (ours.square(), theirs.float().square())):
        torch.testing.assert_close(a.mean(0), b.mean(0), rtol=0.06, atol=0.1)
    for height, width in ((10, 100), (10, 101), (91, 8)):  # nothing fits: the centre
        box = crop.get_params(torch.zeros(3, height, width), (1.0, 1.0), (3 / 4, 4 / 3))
        assert (clamp.draw_boxes(50, height, width, (1.0, 1.0)) == torch.tensor(box)).all()


def test_every_view_of_every_image_is_its_own():
    images = (pictures(5, 32, 32)[[2, 3, 3]] * 255).byte()
    torch.manual_seed(0)
    views = clamp.MultiViewAugment(24, 5)(images)
    assert views.shape == (5, 3, 3, 24, 24) and views.dtype == torch.float32
    distances = torch.pdist(views.flatten(0, 1).flatten(1))
    assert distances.min() > 0.1
    plain = clamp.MultiViewAugment(32, 2, (1, 1), 0, jitter_p=0, gray_p=0, blur_p=[0])(images)
    whole = clamp.CenterView(32)(images)
    expected = torchvision.transforms.v2.functional.normalize(images / 255, clamp.MEAN, clamp.STD)
    torch.testing.assert_close(whole, expected)
    assert plain.shape == (2, 3, 3, 32, 32)


# --------------------------------------------------------------- model, optimiser, schedule, k-NN


@pytest.mark.parametrize("arch, features", [("resnet18", 512), ("resnet50", 2048)])
@pytest.mark.parametrize("stem, left", [("imagenet", 1), ("medium", 2), ("small", 4)])
def test_backbone_has_torchvisions_keys(arch, features, stem, left):
    backbone = clamp.build_backbone(arch, stem)
    theirs = getattr(torchvision.models, arch)()
    expected = {k for k in theirs.state_dict() if not k.startswith("fc.")}
    assert backbone.state_dict().keys() == expected
    assert backbone.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, features)
    backbone.avgpool = torch.nn.Identity()
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, features * left**2)
    backbone.avgpool = theirs.avgpool
    if stem == "imagenet":
        theirs.fc = torch.nn.Identity()
        theirs.load_state_dict(backbone.state_dict())
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(theirs.eval()(x), backbone(x))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero_init", [False, True])
def test_zero_init_makes_residual_blocks_start_as_identities(arch, zero_init):
    backbone = clamp.build_backbone(arch, zero_init=zero_init)
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage[1:]:  # the first of a stage changes size or width
            x = torch.rand(2, len(block.conv1.weight[0]), 4, 4)
            assert torch.equal(block(x), x) == zero_init


def test_projector_follows_its_string():
    layers = clamp.build_projector(512, "2048-256")
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Linear"]
    assert [layer.weight.shape for layer in layers if hasattr(layer, "weight")] == [
        (2048, 512), (256, 2048)]


def test_lars_by_hand():
    torch.manual_seed(0)
    weight, bias, zero = torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2)
    params = [torch.nn.Parameter(p.clone()) for p in (weight, bias, zero)]
    optimizer = clamp.LARS(params, lr=0.5, eta=0.1, momentum=0.9, weight_decay=0.01)
    velocity = [0, 0, 0]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        g = params[0].grad + 0.01 * weight
        velocity[0] = 0.9 * velocity[0] + 0.1 * weight.norm() / g.norm() * g
        velocity[1] = 0.9 * velocity[1] + params[1].grad
        g = params[2].grad + 0.01 * zero
        velocity[2] = 0.9 * velocity[2] + (0.1 * zero.norm() / g.norm() if zero.any() else 1) * g
        weight, bias, zero = (p - 0.5 * v for p, v in zip((weight, bias, zero), velocity))
        optimizer.step()
        for p, expected in zip(params, (weight, bias, zero)):
            torch.testing.assert_close(p.detach(), expected)


def test_lars_without_eta_is_sgd():
    nets = [torch.nn.Linear(3, 2, bias=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = clamp.LARS(nets[0].parameters(), lr=0.1, eta=0.0, weight_decay=1e-2)
    theirs = torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(4):
        x = torch.randn(5, 3)
        for net, optimizer in zip(nets, (ours, theirs)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


def test_schedule():
    scale = [clamp.lr_scale(step, 10, 110) for step in range(110)]
    assert scale[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert scale[10] == 1 and scale[60] == pytest.approx(0.5) and 0 < scale[109] < 1e-3
    assert clamp.lr_scale(0, 0, 5) == 1


def test_knn_equals_a_loop():
    torch.manual_seed(0)
    bank, labels = torch.randn(60, 4), torch.arange(60) % 3
    bank += F.one_hot(labels, 4) * 1.5
    queries, query_labels = bank + torch.randn(60, 4), labels

    def classify(query, bank, labels):
        cosine = [F.cosine_similarity(query, row, dim=0).item() for row in bank]
        votes = [0.0] * 3
        for i in sorted(range(len(bank)), key=lambda i: -cosine[i])[:5]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        return votes.index(max(votes))

    correct = [classify(q, bank, labels) == y for q, y in zip(queries, query_labels)]
    ours = clamp.knn_accuracy(bank, labels, queries, query_labels, k=5)
    assert ours == pytest.approx(100 * sum(correct) / 60)
    rest = [torch.arange(60) != i for i in range(60)]
    correct = [classify(bank[i], bank[r], labels[r]) == labels[i] for i, r in enumerate(rest)]
    assert clamp.knn_accuracy(bank, labels, k=5) == pytest.approx(100 * sum(correct) / 60)


def test_heads_equal_separate_torch_classifiers():
    torch.manual_seed(0)
    steps, batch, width, classes, rates = 20, 16, 6, 4, [0.03, 0.3]
    x, y = torch.randn(steps, batch, width), torch.randint(classes, (steps, batch))
    ours = eval_linear.train_heads(zip(x, y), steps, rates, (width, classes), "cpu", "heads")
    for rate, weight in zip(rates, ours):
        head = torch.nn.Linear(width, classes, bias=False)
        torch.nn.init.zeros_(head.weight)
        optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(head(x[step]), y[step]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight.T, head.weight.detach(), rtol=1e-4, atol=1e-5)


def test_finetuning_by_hand():
    """Two layers, the first one's learning rate 0.05 of the second's, momentum and cosine."""
    torch.manual_seed(0)
    steps, lr = 6, 0.4
    x, y = torch.randn(steps, 8, 3, 2, 2), torch.randint(4, (steps, 8))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5, bias=False))
    tuned, head = eval_linear.finetune(network, zip(x, y), steps, lr, (5, 4), torch.float32, "")
    weights = [network[1].weight.detach(), torch.zeros(4, 5), torch.zeros(4)]
    velocities = [torch.zeros_like(w) for w in weights]
    for step in range(steps):
        weights = [w.requires_grad_() for w in weights]
        features = x[step].flatten(1) @ weights[0].T
        F.cross_entropy(features @ weights[1].T + weights[2], y[step]).backward()
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        velocities = [0.9 * v + w.grad for v, w in zip(velocities, weights)]
        weights = [(w - rate * scale * v).detach()
                   for w, v, scale in zip(weights, velocities, (0.05, 1, 1))]
    ours = [tuned[1].weight, head.weight, head.bias]
    torch.testing.assert_close([w.detach() for w in ours], weights, rtol=1e-4, atol=1e-6)
    assert not tuned.training and not torch.equal(tuned[1].weight, network[1].weight)


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_a_fraction_of_the_labels_is_balanced_and_seeded(fraction):
    labels = torch.tensor([0] * 40 + [1] * 80 + [3] * 3)
    data = clamp.Data(labels)
    rows = eval_linear.labelled_rows(data, fraction, seed=0)
    assert len(set(rows.tolist())) == len(rows)
    assert labels[rows].bincount().tolist() == [40 * fraction, 80 * fraction, 0, 1]
    assert torch.equal(rows, eval_linear.labelled_rows(data, fraction, seed=0))
    assert not torch.equal(rows, eval_linear.labelled_rows(data, fraction, seed=1))


@pytest.mark.parametrize("alpha", [0.5, 1.04, 2.0])
def test_spectrum_of_data_drawn_with_a_known_exponent(alpha):
    torch.manual_seed(0)
    scales = torch.arange(1, 201) ** (-alpha / 2)
    rotation = torch.linalg.qr(torch.randn(200, 200)).Q
    features = (torch.randn(20_000, 200) * scales) @ rotation + 3
    eigenvalues, fitted = eval_linear.spectrum(features)
    assert fitted == pytest.approx(alpha, abs=0.03)
    assert eigenvalues[0] == pytest.approx(1, rel=0.05)
    assert eigenvalues.sum() == pytest.approx(features.double().var(0).sum().item())


def test_packing_of_classes_equals_the_equations():
    clouds = embeddings(6, 5, 8, noise=0.8, dtype=torch.float32)
    features, labels = clouds.flatten(0, 1), torch.arange(5).repeat(6)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    features = torch.cat([features[order], torch.randn(3, 8)])  # class 7 has more than the others
    labels = torch.cat([labels[order] + (labels[order] == 4) * 3, torch.tensor([7, 7, 7])])
    _, _, radii, neighbours = loop_loss(clouds.double(), 2.0, max_reach=1.1)
    geometry = eval_linear.class_packing(features, labels, 2.0, 1.1)
    assert geometry["radius"] == pytest.approx(sum(radii).item() / 5, rel=1e-5)
    assert geometry["neighbours"] == pytest.approx(sum(neighbours) / 5)


# ------------------------------------------------------------------------------ data


def test_patterns_are_balanced_seeded_disjoint_grey_and_not_told_by_pixels():
    train, again, test = (clamp.load_data("patterns", split)
                          for split in ("train", "train", "test"))
    x, y, again, test_x, test_y = train.images, train.labels, again.images, test.images, test.labels
    assert x.dtype == torch.uint8 and x.shape[1:] == (3, 32, 32) and torch.equal(x, again)
    assert (x[:, 0] == x[:, 1]).all() and (x[:, 0] == x[:, 2]).all()
    assert len(set(y.bincount().tolist())) == 1 and len(y.bincount()) == 10
    rows = {bytes(image.numpy().tobytes()) for image in x}
    assert len(rows) == len(x) and not rows & {bytes(i.numpy().tobytes()) for i in test_x}
    pixels, test_pixels = (F.pad(i[:, 0].flatten(1).double() / 255, (0, 1), value=1)
                           for i in (x, test_x))
    gram = pixels.T @ pixels + 10 * torch.eye(1025, dtype=torch.float64)
    weight = torch.linalg.solve(gram, pixels.T @ F.one_hot(y).double())
    assert ((test_pixels @ weight).argmax(1) == test_y).float().mean() < 0.45


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
    train = clamp.load_data(str(tmp_path / "small"), "train")
    assert train.images.shape == (12, 3, 32, 32) and train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    bee = Image.open(tmp_path / "small/train/bee/001.png")
    assert torch.equal(train.images[5], TF.pil_to_tensor(bee))
    assert clamp.load_data(str(tmp_path / "small"), "test").labels.tolist() == train.labels.tolist()
    files = clamp.load_data(str(tmp_path / "small"), "train", resident_gb=1e-6).files
    assert [Path(f).name for f in files[:2]] == ["000.jpg", "001.png"]
    limited = clamp.load_data(str(tmp_path / "small"), "train", limit=5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:5]
    assert torch.equal(limited.images, train.images[order])
    assert torch.equal(limited.labels, train.labels[order])

    write_pictures(tmp_path / "mixed" / "deep", 4, ((40, 50), (70, 30)))
    mixed = clamp.load_data(str(tmp_path / "mixed"))
    assert len(mixed.files) == 4 and mixed.images is None and (mixed.labels == -1).all()
    with pytest.raises(clamp.UserError, match="no test/ or val/"):
        clamp.load_data(str(tmp_path / "mixed"), "test")


def test_pictures_of_any_mode_load_as_rgb_and_unreadable_ones_are_left_out(tmp_path, capfd):
    ramp = torch.arange(48 * 48).view(48, 48) / (48 * 48)
    gray = Image.fromarray((ramp * 255).byte().numpy())
    deep = Image.fromarray((ramp * 65535).int().numpy().astype("uint16"))
    modes = {"L": gray, "P": gray.convert("P"), "RGBA": gray.convert("RGBA"), "I;16": deep}
    for k, picture in enumerate(modes.values()):
        picture.save(tmp_path / f"{k}.png")
    gray.convert("RGB").convert("CMYK").save(tmp_path / "4.jpg", quality=100)
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / ".hidden").mkdir()
    gray.save(tmp_path / ".hidden" / "0.png")
    (tmp_path / "5.png").write_bytes(content[:len(content) // 2])
    for resident_gb in (1, 0):
        data = clamp.load_data(str(tmp_path), resident_gb=resident_gb)
        expected = gray.convert("RGB")
        if resident_gb:
            views = clamp.CenterView(48)(data.images)[None]
        else:
            augment = clamp.MultiViewAugment(48, 1, (1, 1), 0, jitter_p=0, gray_p=0, blur_p=[0])
            rows = torch.tensor([[0, 1, 2, 3, 4, 5]])
            views, = clamp.view_batches(data, rows, augment, torch.device("cpu"))
            assert torch.equal(views[:, 5], views[:, 0])  # the next file stands in
        assert data.unreadable == {str(tmp_path / "5.png")}
        for view in views[0]:
            error = view - clamp.normalize(TF.to_tensor(expected))
            assert error.abs().max() < 0.1
        assert capfd.readouterr().err.count("5.png: cannot be decoded") == 1


def test_streamed_views_come_from_the_right_picture(tmp_path):
    for k, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        Image.new("RGB", (50 + 10 * k, 40), color).save(tmp_path / f"{k}.png")
    data = clamp.load_data(str(tmp_path))
    augment = clamp.MultiViewAugment(16, 3, jitter_p=0, gray_p=0, blur_p=[0.0])
    batches = torch.tensor([[2, 0], [1, 2]])
    for workers in (0, 2):
        views = list(clamp.view_batches(data, batches, augment, torch.device("cpu"), workers))
        for rows, x in zip(batches, views):
            assert x.shape == (3, 2, 3, 16, 16)
            assert (x.mean((3, 4)).argmax(2) == rows).all()


# ------------------------------------------------------------------------------ training


def run(*command, code=0, **options):
    """Run a script as a user would; returns its result after checking the exit status."""
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE, **options)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def read_log(folder):
    """The lines of log.jsonl, without the time they took."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(record.pop("seconds") >= 0 for record in records)
    return records


def states(folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return checkpoint["network"], checkpoint["optimizer"]["state"]


def train_once(out, *flags, loss_fn=clamp.packing_loss):
    clamp.train(clamp.parse_args([*TINY, *flags, "--out", str(out)]), loss_fn)


def failing_at(call, error):
    """The packing loss, but the given call raises `error`."""
    calls = []

    @functools.wraps(clamp.packing_loss)  # runs remember the name of their loss
    def loss_fn(z, radius_scale):
        calls.append(1)
        if len(calls) == call:
            raise error
        return clamp.packing_loss(z, radius_scale)
    return loss_fn


def assert_same_runs(whole, other):
    for a, b in zip(states(whole), states(other)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    a, b = (torch.load(out / "backbone.pt") for out in (whole, other))
    assert a["epoch"] == b["epoch"] == 3
    torch.testing.assert_close(a["backbone"], b["backbone"], rtol=0, atol=0)
    logs = read_log(whole), read_log(other)
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert not list(other.glob("*.part"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train_once(out)
    return out


def test_run_interrupted_in_an_epoch_and_in_a_save_ends_as_the_whole_one(whole_run, tmp_path,
                                                                         monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train_once(tmp_path, loss_fn=failing_at(5, KeyboardInterrupt))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1
    for failing, epoch in ((1, 1), (2, 2), (2, 3)):  # saving checkpoint.pt, or then backbone.pt
        replaced = []

        def replace(part, path, replace=os.replace):
            replaced.append(path)
            if len(replaced) == failing:
                raise KeyboardInterrupt
            replace(part, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", replace)
            train_once(tmp_path)
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == epoch
    train_once(tmp_path)
    assert_same_runs(whole_run, tmp_path)


def test_interrupted_streamed_run_ends_as_the_whole_one(tmp_path):
    write_pictures(tmp_path / "photos", 64, ((40, 50), (70, 30)))
    data = ["--data", str(tmp_path / "photos"), "--max-reach", "1.5"]  # failing_at's
    train_once(tmp_path / "whole", *data)
    with pytest.raises(KeyboardInterrupt):
        train_once(tmp_path / "parts", *data, loss_fn=failing_at(5, KeyboardInterrupt))
    train_once(tmp_path / "parts", *data, "--workers", "0")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_max_reach_bounds_who_is_a_neighbour(tmp_path):
    few = ["--epochs", "1", "--warmup-epochs", "0"]
    for reach, neighbours in (("0.001", 0), ("2.5", 31)):  # centres are at most 2 apart
        train_once(tmp_path / reach, *few, "--max-reach", reach)
        assert read_log(tmp_path / reach)[0]["neighbours"] == neighbours


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_run_ends_as_the_whole_one(stop, whole_run, tmp_path):
    command = [sys.executable, "clamp.py", *TINY, "--out", str(tmp_path)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on their number
    process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, env=os.environ | threads,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(stop)
    message = process.communicate()[1].decode()
    assert process.returncode == (130 if stop == signal.SIGINT else -stop)
    assert "Traceback" not in message
    train_once(tmp_path)
    assert_same_runs(whole_run, tmp_path)


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_once(tmp_path, loss_fn=failing_at(5, KeyboardInterrupt))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    small = (10_000_000, resource.RLIM_INFINITY)
    message = run("clamp.py", *TINY, "--out", tmp_path, code=2, preexec_fn=lambda:
                  resource.setrlimit(resource.RLIMIT_FSIZE, small)).stderr.splitlines()[-1]
    assert "checkpoint.pt: cannot be written" in message and "File too large" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


class Stranger:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "stranger"])
def test_damaged_checkpoint_is_named_and_kept(damage, whole_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = bytearray((whole_run / "checkpoint.pt").read_bytes())
    middle = len(content) // 2
    content[middle:middle + 4] = bytes(255 - byte for byte in content[middle:middle + 4])
    content = {"cut": content[:-1000], "flipped": content, "empty": b"",
               "stranger": pickle.dumps(Stranger())}[damage]
    for name in ("checkpoint.pt", "backbone.pt"):
        Path(name).write_bytes(content)
    with pytest.raises(clamp.UserError, match="checkpoint.pt"):
        train_once(tmp_path, "--epochs", "4")
    with pytest.raises(clamp.UserError, match="backbone.pt"):
        eval_linear.evaluate(eval_linear.parse_args([str(tmp_path)]))
    assert Path("checkpoint.pt").read_bytes() == content and not Path("executed").exists()


def test_backbone_without_a_checkpoint_is_kept(whole_run, tmp_path):
    shutil.copy(whole_run / "backbone.pt", tmp_path)
    before = (tmp_path / "backbone.pt").read_bytes()
    with pytest.raises(clamp.UserError, match="no checkpoint.pt .* --fresh"):
        train_once(tmp_path)
    assert (tmp_path / "backbone.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    train_once(tmp_path, "--fresh", "--epochs", "1", "--warmup-epochs", "0")
    assert (tmp_path / "backbone.pt").read_bytes() != before


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    def bad_loss(z, _):
        calls.append(1)
        return z.square().mean() * (math.nan if len(calls) == 6 else 1), {"calls": len(calls)}

    def bad_gradient(z, _):
        calls.append(1)
        zero = z.square().mean() * (0 if len(calls) == 6 else 1)
        return zero.sqrt(), {"calls": len(calls)}  # finite, but its derivative is not at 0

    for k, loss_fn in enumerate((bad_loss, bad_gradient)):
        calls, out = [], tmp_path / str(k)
        with pytest.raises(clamp.UserError, match="step 6: .*calls=6.*lr=.* not finite") as error:
            train_once(out, loss_fn=loss_fn)
        assert ("loss=nan" in str(error.value)) == (loss_fn is bad_loss)
        assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_command_line_end_to_end(tmp_path):
    out = tmp_path / "run"
    train = ["clamp.py", *TINY, "--out", out]
    run(*train)
    files = {"views.png", "settings.json", "log.jsonl", "checkpoint.pt", "backbone.pt"}
    assert {file.name for file in out.iterdir()} == files
    assert Image.open(out / "views.png").size == (2 * 34 + 2, 8 * 34 + 2)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["batch_size"] == 32 and settings["lr"] == clamp.PATTERNS["lr"]
    log = read_log(out)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert ["knn" in line for line in log] == [False, True, True]
    assert {"loss", "radius", "neighbours", "lr"} <= log[0].keys()
    network = torchvision.models.resnet18()
    saved = torch.load(out / "backbone.pt")["backbone"]
    assert network.load_state_dict(saved, strict=False).missing_keys == ["fc.weight", "fc.bias"]

    assert "finished" in run(*train).stdout
    floors, result = [], run("eval_linear.py", out, "--epochs", "2").stdout.splitlines()
    written = json.loads((out / "linear.json").read_text())
    settings = written.pop("settings")
    assert settings["epochs"] == 2 and not settings["random_init"]
    assert json.loads(result[-1]) == written and written.keys() == {
        "top1", "top5", "knn", "lr", "data", "n_train", "n_test", "epoch", "seconds"}
    for _ in range(2):
        flags = ["--epochs", "2", "--random-init", "--limit", "500"]
        run("eval_linear.py", out / "backbone.pt", *flags)
        floor = json.loads((out / "linear-random-init-limit-500.json").read_text())
        floors.append(floor["knn"])
    assert floor["n_train"] == 500 and floor["n_test"] == 2000 and floors[0] == floors[1]
    assert json.loads((out / "linear.json").read_text()) == written | {"settings": settings}

    assert "continuing" not in run(*train, "--lr", "0.3", "--fresh", "--epochs", "2").stdout
    assert len(read_log(out)) == 2
    assert not (out / "linear.json").exists()


def test_two_processes_train_and_evaluate(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*torchrun, "clamp.py", *TINY, "--amp", "off", "--out", tmp_path)
    backbone, _ = eval_linear.load_backbone(tmp_path)  # rank 0's, with its batch norm
    data = clamp.load_data("patterns", limit=96)
    features, _ = clamp.extract_features(backbone, data, torch.arange(96), 32,
                                         torch.device("cpu"), torch.float32)
    log = read_log(tmp_path)
    assert len(log) == 3 and log[2]["knn"] == clamp.knn_accuracy(features, data.labels)
    results = []
    flags = ["--epochs", "2", "--amp", "off", "--lr", "0.03"]
    for launch in ([], torchrun):
        out = run(*launch, "eval_linear.py", tmp_path, *flags).stdout
        results.append(json.loads(out.splitlines()[-1]))
        del results[-1]["seconds"]
    assert results[0] == results[1]
    run(*torchrun, "eval_linear.py", tmp_path, *flags, "--finetune", "--labels", "0.01")
    assert json.loads((tmp_path / "linear-labels-0.01-finetune.json").read_text())["n_train"] == 50


def test_augmented_probe_learns_colours(tmp_path):
    """Pictures of two colours, streamed and in memory, are told apart by any network's features."""
    for part in ("train", "test"):
        for name, color in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            folder = tmp_path / "colors" / part / name
            folder.mkdir(parents=True)
            for k in range(20):
                Image.new("RGB", (32 + k % 2, 40), color).save(folder / f"{k}.png")
    data = ["--data", tmp_path / "colors", "--limit", "32"]
    run("clamp.py", *TINY, *data, "--out", tmp_path / "run")
    args = eval_linear.parse_args([str(tmp_path / "run"), "--augment", "--epochs", "5"])
    result = eval_linear.evaluate(args)
    assert result["top1"] == 100 and result["n_train"] == 40


def test_labels_transfer_finetuning_and_geometry_on_the_command_line(whole_run, tmp_path):
    for part in ("train", "test"):
        for k, name in enumerate(("ant", "bee", "cat")):
            write_pictures(tmp_path / "insects" / part / name, 20, ((40, 50),), seed=100 * k)
    (tmp_path / "list").write_text("ant/001.png\nbee/002.jpg\nant/003.png\ncat/001.png\n")
    shutil.copy(whole_run / "backbone.pt", tmp_path)

    def evaluate(*flags):
        out = run("eval_linear.py", tmp_path, "--workers", "0", "--epochs", "2", *flags).stdout
        return json.loads(out.splitlines()[-1])

    insects = ["--data", tmp_path / "insects"]
    transfer = evaluate(*insects)  # other pictures, of another size, with three classes
    assert (transfer["n_train"], transfer["n_test"], transfer["top5"]) == (60, 60, 100)
    assert evaluate(*insects, "--labels", tmp_path / "list")["n_train"] == 4
    tuned = evaluate("--labels", "0.01", "--finetune", "--lr", "0.2")
    assert (tuned["n_train"], tuned["n_test"], tuned["lr"]) == (50, 2000, 0.2)
    for flags in [], ["--random-init"]:
        geometry = evaluate("--geometry", *flags)
        assert geometry["ranks"] == [10, 100] and geometry["alpha"] > 0
    assert {file.name for file in tmp_path.glob("*.json")} == {
        "linear-insects.json", "linear-insects-labels-list.json",
        "linear-labels-0.01-finetune.json", "geometry.json", "geometry-random-init.json"}
    spectrum = json.loads((tmp_path / "geometry.json").read_text())["eigenvalues"]
    assert len(spectrum) == 512 and spectrum == sorted(spectrum, reverse=True)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_backbone_trains_in_a_detector(arch):
    """backbone.pt has the very keys of the ResNet inside torchvision's Faster R-CNN."""
    saved = clamp.build_backbone(arch).state_dict()
    features = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name=arch, weights=None)
    features.body.load_state_dict(saved)
    assert torch.equal(features.body.layer4[1].conv2.weight, saved["layer4.1.conv2.weight"])
    detector = torchvision.models.detection.FasterRCNN(features, num_classes=2, min_size=64)
    picture = torch.zeros(3, 64, 64)
    picture[:, 10:40, 20:60] = 1
    target = {"boxes": torch.tensor([[20.0, 10.0, 60.0, 40.0]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    losses = detector([picture], [target])
    sum(losses.values()).backward()
    optimizer.step()
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    assert not torch.equal(features.body.layer4[1].conv2.weight, saved["layer4.1.conv2.weight"])


def no_network(*_, **__):
    raise URLError("no network")


def one_line(capfd, script, argv):
    """The line on stderr with which a script's command line refuses argv, exit status 2."""
    def main():
        args = script.parse_args([str(a) for a in argv])
        clamp.train(args) if script is clamp else script.evaluate(args)

    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        clamp.command_line(main)
    shown = capfd.readouterr().err.split("\r")[-1].strip()
    assert stop.value.code == 2 and shown.count("\n") == 0 and "error: " in shown, shown
    return shown.split("error: ")[1]


@pytest.mark.parametrize("flags, words", [
    ("--views 1", "--views: 1 is not a number from 2 up"),
    ("--views two", "--views: invalid int value: 'two'"),
    ("--batch-size 1", "--batch-size: 1 is not a number from 2 up"),
    ("--batch-size 6000", "--batch-size 6000: only 5000 images"),
    ("--limit 0", "--limit: 0 is not a number from 1 up"),
    ("--limit 20", "--batch-size 32: only 20 images"),
    ("--epochs 0", "--epochs: 0 is not a number from 1 up"),
    ("--epochs -3", "--epochs: -3 is not a number from 1 up"),
    ("--epochs 2.5", "--epochs: invalid int"),
    ("--epochs 3 --warmup-epochs 3", "--warmup-epochs 3.0: not less than --epochs 3"),
    ("--warmup-epochs -1", "--warmup-epochs: -1 is not a number from 0 up"),
    ("--lr nan", "--lr: nan is not a number from 0 up"),
    ("--lr inf", "--lr: inf is not a number from 0 up"),
    ("--lr -1", "--lr: -1 is not a number from 0 up"),
    ("--lr high", "--lr: invalid float value: 'high'"),
    ("--momentum 1.5", "--momentum: 1.5 is not within 0 and 1"),
    ("--weight-decay -1", "--weight-decay: -1 is not a number from 0 up"),
    ("--eta -1", "--eta: -1 is not a number from 0 up"),
    ("--radius-scale 0", "--radius-scale: 0 is not a number from 0.001 up"),
    ("--max-reach 0", "--max-reach: 0 is not a number from 0.001 up"),
    ("--projector abc", "--projector abc: not widths such as"),
    ("--projector 2048,256", "--projector 2048,256: not widths such as"),
    ("--projector 64-0", "--projector 64-0: not widths such as"),
    ("--arch vgg11", "--arch: invalid choice: 'vgg11'"),
    ("--size 4", "--size: 4 is not a number from 8 up"),
    ("--crop-scale 0.9 0.1", "--crop-scale [0.9, 0.1]: the smallest first"),
    ("--crop-scale 0 0", "--crop-scale [0.0, 0.0]: the smallest first, and not both 0"),
    ("--flip-p 2", "--flip-p: 2 is not within 0 and 1"),
    ("--jitter 0.4 0.4 0.4", "--jitter: expected 4 arguments"),
    ("--jitter 0.4 0.4 0.4 0.6", "--jitter: hue 0.6 is not within 0 and 0.5"),
    ("--blur-kernel 4", "--blur-kernel 4: not odd"),
    ("--blur-kernel 33", "--blur-kernel 33: not odd, or more than --size 32"),
    ("--recipe resnet", "--recipe: invalid choice: 'resnet'"),
    ("--recipe imagenet1k", "--recipe imagenet1k needs --data FOLDER"),
    ("--data no/such", "--data no/such/: no such folder, and not one of patterns, cifar10"),
    ("--data cifar10/", "--data cifar10/: no such folder, and not one of patterns"),
    ("--data {tmp}/empty", "empty: no pictures below"),
    ("--data {tmp}/broken", "none of 3 pictures"),
    ("--data cifar10 --data-dir {tmp}/empty", "--data cifar10: cannot download"),
    ("--amp fp16", "--amp fp16: this CPU does not multiply it"),
    ("--amp int8", "--amp: invalid choice: 'int8'"),
    ("--device cuda", "--device cuda: no GPU"),
    ("--workers -1", "--workers: -1 is not a number from 0 up"),
    ("--seed x", "--seed: invalid int"),
    ("--out {tmp}/file", "--out {tmp}/file: is a file; name a folder"),
    ("--frobnicate", "unrecognized arguments: --frobnicate"),
])
def test_bad_flags_give_one_line_and_write_nothing(flags, words, tmp_path, capfd, monkeypatch):
    if "fp16" in flags and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU multiplies fp16")
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    for name in ("file", "broken/0.jpg", "broken/1.png", "broken/2.png"):
        (tmp_path / name).write_bytes(b"not a picture")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    argv = ["--device", "cpu", "--out", tmp_path / "run", *flags.format(tmp=tmp_path).split()]
    assert words.format(tmp=tmp_path) in one_line(capfd, clamp, argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_that_do_not_fit_give_one_line(whole_run, tmp_path, capfd):
    write_pictures(tmp_path / "flat", 33, ((40, 50), (70, 30)))
    write_pictures(tmp_path / "lost" / "train" / "ant", 4)
    write_pictures(tmp_path / "lost" / "test", 4)
    (tmp_path / "list").write_text("absent.png\n")
    (tmp_path / "none").write_text("\n")
    run_of = [*TINY, "--out", whole_run]
    before = {file: file.read_bytes() for file in whole_run.iterdir()}
    for script, argv, words in (
            (clamp, [*run_of, "--arch", "resnet34"], "--arch is resnet34, but resnet18 in the run"),
            (clamp, [*run_of, "--lr", "0.3"], "--lr is 0.3, but 1.6 in the run"),
            (clamp, [*run_of, "--data", tmp_path / "flat"], "--data is"),
            (eval_linear, [tmp_path / "nothing"], "nothing: no such file; name a run folder"),
            (eval_linear, [tmp_path / "flat"], "backbone.pt: no such file"),
            (eval_linear, [whole_run / "checkpoint.pt"], "checkpoint.pt: not a backbone"),
            (eval_linear, [whole_run, "--data", tmp_path / "flat"], "no test/ or val/ folder in"),
            (eval_linear, [whole_run, "--data", tmp_path / "lost"], "lost/test/000.jpg has none"),
            (eval_linear, [whole_run, "--labels", "2"], "--labels: 2 is neither"),
            (eval_linear, [whole_run, "--labels", "0"], "--labels: 0 is neither"),
            (eval_linear, [whole_run, "--labels", "nosuch"], "neither a fraction up to 1 nor a"),
            (eval_linear, [whole_run, "--labels", tmp_path / "list"], "0 training images, not of"),
            (eval_linear, [whole_run, "--labels", tmp_path / "none"], "names no image"),
            (eval_linear, [whole_run, "--limit", "2"], "--limit 2: 2 images are too few"),
            (eval_linear, [whole_run, "--geometry", "--limit", "9"], "leave --limit and --labels"),
            (eval_linear, [whole_run, "--geometry", "--finetune"], "--finetune: not allowed with"),
            (eval_linear, [whole_run, "--lr", "-1"], "--lr: -1 is not a number from 0 up"),
            (eval_linear, [whole_run, "--epochs", "0"], "--epochs: 0 is not a number from 1 up")):
        assert words in one_line(capfd, script, argv)
    assert before == {file: file.read_bytes() for file in whole_run.iterdir()}


def test_torchrun_refuses_once_and_restarts_after_a_death(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    refused = run(*torchrun, "clamp.py", "--batch-size", "33", "--out", tmp_path / "x", code=1)
    assert refused.stderr.count("error: --batch-size 33: not a multiple of 2 processes") == 1

    script = tmp_path / "dies.py"
    script.write_text(f"""if True:
        import os, sys
        sys.path.insert(0, {str(HERE)!r})
        import clamp
        calls = []

        def loss_fn(z, radius_scale):
            calls.append(1)
            if sys.argv[-1] == "die" and len(calls) == 5 and os.environ["RANK"] == "1":
                if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    os._exit(1)
            return clamp.packing_loss(z, radius_scale)

        clamp.command_line(lambda: clamp.train(clamp.parse_args(sys.argv[1:-1]), loss_fn))
    """)
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for name in ("live", "die"):
        again = run(*torchrun, "--max-restarts", "1", script, *TINY, "--fresh", "--out",
                    tmp_path / name, name, env=environment).stdout
        assert ("continuing after epoch 1" in again) == (name == "die")
    assert_same_runs(tmp_path / "live", tmp_path / "die")


def test_recipes_are_flags_and_help_takes_a_line_each():
    for recipe, settings in clamp.RECIPES.items():
        args = clamp.parse_args(["--recipe", recipe, "--data", "x"])
        assert all(getattr(args, k) == v for k, v in settings.items() if k != "data")
    assert clamp.parse_args(["--data", "cifar100"]).recipe == "cifar10"
    assert clamp.parse_args(["--data", "cifar10", "--lr", "1"]).lr == 1
    assert "(default: 8.5)" in run("clamp.py", "--recipe", "imagenet1k", "--help").stdout


def readme_code(words):
    """The Python example in the README that contains the words."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    code, = [block for block in blocks if words in block]
    return code


def test_readme_example_packs_ten_clouds_until_none_overlap():
    code = readme_code("optim.Adam")
    assert len(code.splitlines()) <= 25
    exec(code, names := {})
    points, neighbours = names["history"][-1]
    assert names["history"][0][1] == 9 and neighbours == 0
    centers = points.mean(0)
    radii = 4 * ((points - centers).square().sum((0, 2)) / 49 / 3).sqrt()
    gaps = torch.cdist(centers, centers) - radii - radii[:, None]
    assert gaps[~torch.eye(10, dtype=torch.bool)].min() > 0


def test_readme_example_of_other_losses(tmp_path):
    code = readme_code("simclr")
    exec(code, losses := {"__name__": "peers"})
    b, d = 6, 4
    z = embeddings(2, b, d)
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
        "mmcr": -torch.linalg.eigvalsh((x + y).T @ (x + y) / 4).sqrt().sum() / b}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name](z, 0)[0], value)
    (tmp_path / "peers.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n{code}")
    run(tmp_path / "peers.py", "vicreg", *TINY, "--out", tmp_path / "run")
    assert len(read_log(tmp_path / "run")) == 3


# ------------------------------------------------------------------------------ CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu():
    torch.set_float32_matmul_precision("highest")  # no TF32, which an earlier test may have set
    z = embeddings(4, 16, 32, dtype=torch.float32)
    a, b = z.clone().requires_grad_(), z.cuda().requires_grad_()
    clamp.packing_loss(a)[0].backward()
    with torch.autocast("cuda", torch.float16):
        clamp.packing_loss(b)[0].backward()
    torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-4, atol=1e-6)
    augment = clamp.MultiViewAugment(16, 2, blur_p=[1.0], solarize_p=[0.0])
    x = torch.stack([pictures(6, 16, 16, seed) for seed in range(2)])
    drawn = augment.draw(6)
    cuda = {k: v.cuda() if torch.is_tensor(v) else v for k, v in drawn.items()}
    torch.testing.assert_close(augment.photometric(255 * x.cuda(), cuda).cpu(),
                               augment.photometric(255 * x, drawn), rtol=0, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--amp", "fp16"], ["--compile"]])
def test_cuda_trains(flags, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    run(*torchrun, "clamp.py", *TINY, *flags, "--device", "cuda", "--out", tmp_path)
    log = read_log(tmp_path)
    assert len(log) == 3 and all(math.isfinite(line["loss"]) for line in log)


# ------------------------------------------------------------------------------ benchmark


def seconds(function, device, repeats=3):
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def loss_step(loss_fn, b, device):
    """A function that computes a loss and its gradient: 4 views, 512 dimensions, overlapping."""
    z = embeddings(4, b, 512, noise=0.7, dtype=torch.float32).to(device).requires_grad_()

    def step():
        loss = loss_fn(z)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
    return step


def peak_memory(step, device):
    """GB that a step needs at its peak, beyond what is there before it."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    ctypes.CDLL(None).malloc_trim(0)  # what was freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here; Linux only
    before = resident_memory("VmRSS")
    step()
    return (resident_memory("VmHWM") - before) / 2**20


def resident_memory(key):
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


class Stop(Exception):
    """Raised by a loss to end the training that it times."""


def training_step(args, device, repeats=6):
    """Median seconds from one call of the loss to the next within clamp.train."""
    stamps = []

    def loss_fn(z, radius_scale):
        if device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        if len(stamps) == repeats + 3:
            raise Stop
        return clamp.packing_loss(z, radius_scale)

    with tempfile.TemporaryDirectory() as out, pytest.raises(Stop):
        clamp.train(clamp.parse_args([*args, "--out", f"{out}/run"]), loss_fn)
    return sorted(b - a for a, b in zip(stamps[2:], stamps[3:]))[repeats // 2]


def training_step_of_process(rank, world, port, args):
    torch.set_num_threads(1)
    join_processes(rank, world, port)
    whole = training_step(args, torch.device("cpu"))
    if rank == 0:
        print(f"training step of {world} CPU processes of one thread: {1e3 * whole:.0f} ms")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def network_step(args, device):
    """A function: forward and backward of backbone and projector alone on a batch at hand."""
    args = clamp.parse_args(args)
    backbone = clamp.build_backbone(args.arch, args.stem, args.zero_init)
    projector = clamp.build_projector(backbone.num_features, args.projector)
    network = torch.nn.Sequential(backbone, projector).to(
        device, memory_format=torch.channels_last)
    views = torch.randn(args.views, args.batch_size, 3, args.size, args.size, device=device)
    dtype = clamp.autocast_dtype(args.amp, device)
    return lambda: clamp.embed(network, views, dtype).square().sum().backward()


def usual_transform(size, jitter, blur_kernel):
    """The augmentation as torchvision's transforms, one picture at a time."""
    return v2.Compose([
        v2.RandomResizedCrop(size, (0.08, 1.0)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(*jitter)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(blur_kernel, (0.1, 2.0))], 0.5),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(clamp.MEAN, clamp.STD)])


class UsualFolder(torch.utils.data.Dataset):
    """Every view is decoded and transformed in the loader."""

    def __init__(self, files, views, transform):
        self.files, self.views, self.transform = files, views, transform

    def __len__(self):
        return len(self.files) * self.views

    def __getitem__(self, k):
        with Image.open(self.files[k // self.views]) as picture:
            return self.transform(picture.convert("RGB"))


def benchmark():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{torch.get_num_threads()} CPU threads")
    print(f"{name}, torch {torch.__version__}, torchvision {torchvision.__version__}, medians")

    steps = [loss_step(loss_fn, 1024, device) for loss_fn in (clamp.packing_loss, broadcast_loss)]
    (ours, theirs), (less, more) = ([f(s, device) for s in steps] for f in (seconds, peak_memory))
    print(f"packing loss, 4 views of 1024 images, 512-d: {1e3 * ours:.1f} ms, {less:.2f} GB; "
          f"broadcast {1e3 * theirs:.0f} ms, {more:.2f} GB: {theirs / ours:.0f} times as fast, "
          f"1/{more / less:.0f} of the memory")
    for b in (2048, 4096, 8192) if device.type == "cpu" else (4096, 16384, 65536):
        peak = peak_memory(loss_step(clamp.packing_loss, b, device), device)
        print(f"packing loss, {b} images: {peak:.2f} GB")

    images = (pictures(512, 32, 32) * 255).byte().to(device)
    augment, usual = clamp.MultiViewAugment(32, 4), usual_transform(32, [0.8, 0.8, 0.8, 0.2], 3)
    ours = seconds(lambda: augment(images), device) / (4 * 512)
    cpu = images[:128].cpu()
    theirs = seconds(lambda: [usual(picture) for picture in cpu], torch.device("cpu")) / 128
    print(f"augmentation: {1 / ours:,.0f} views/s, torchvision picture by picture on the CPU "
          f"{1 / theirs:,.0f}: {theirs / ours:.1f} times as fast")

    for stem, views in (("small", 4), ("imagenet", 8)):
        batch = 512 if device.type == "cuda" else 32
        args = ["--recipe", "cifar10-published", "--data", "patterns", "--stem", stem,
                "--views", str(views), "--batch-size", str(batch), "--device", device.type]
        network, whole = seconds(network_step(args, device), device), training_step(args, device)
        print(f"training step, ResNet-18, {stem} stem, {views} views of {batch} images: "
              f"{1e3 * whole:.0f} ms, forward and backward alone {1e3 * network:.0f} ms: "
              f"{whole / network:.2f} times as long")

    few = 32 if device.type == "cpu" else 512
    args = ["--recipe", "pictures", "--stem", "imagenet", "--data", "patterns", "--epochs", "100"]
    for views, batch in ((2, few), (4, few), (8, few), (2, 2 * few), (2, 4 * few)):
        size = ["--views", str(views), "--batch-size", str(batch)]
        whole = training_step([*args, *size, "--device", device.type], device)
        print(f"training step, ImageNet stem, {views} views of {batch} images: {1e3 * whole:.0f} "
              f"ms, {1e6 * whole / views / batch:.0f} us a view")
    for world in (1, 2):
        size = ["--views", "8", "--batch-size", "32", "--device", "cpu"]
        torch.multiprocessing.spawn(
            training_step_of_process, (world, free_port(), [*args, *size]), world)

    with tempfile.TemporaryDirectory() as folder:
        for k, picture in enumerate(pictures(96, 376, 500)):
            TF.to_pil_image(picture).save(f"{folder}/{k}.jpg")
        data, cpu = clamp.load_data(folder), torch.device("cpu")
        augment = clamp.MultiViewAugment(224, 4, jitter=(0.4, 0.4, 0.2, 0.1), blur_kernel=23)
        usual = UsualFolder(data.files, 4, usual_transform(224, (0.4, 0.4, 0.2, 0.1), 23))
        batches = torch.arange(96).view(-1, 16)
        ours = seconds(lambda: list(clamp.view_batches(data, batches, augment, device, 1)), device)
        loader = torch.utils.data.DataLoader(usual, 64, num_workers=1)
        theirs = seconds(lambda: list(loader), cpu)
        print(f"streamed photographs, 1 worker, 4 views of 224 px: {384 / ours:.0f} views/s, "
              f"each view decoded and transformed in the loader {384 / theirs:.0f}: "
              f"{theirs / ours:.1f} times as fast")


if __name__ == "__main__":
    benchmark()
