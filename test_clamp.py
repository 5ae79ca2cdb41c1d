"""Tests of clamp.py and eval_linear.py against independent references, without network or GPU."""

import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from functools import partial
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
from torch.testing import assert_close

import clamp
import eval_linear

HERE, CPU = Path(__file__).parent, torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
ONE_SIZE, TWO_SIZES = ((32, 32),), ((40, 50), (70, 30))  # pictures to be kept in memory, or not
TINY = shlex.split("--epochs 3 --limit 96 --batch-size 32 --views 2 --projector 32 16 --size 32 "
                   "--workers 1")


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
    (m, b, d), centers, radii, energy, neighbours = z.shape, [], [], 0, 0
    for views in (z - z.mean((0, 1)) if center else z).unbind(1):
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
def test_loss_gradient_and_numbers_equal_the_equations(shape, options):
    z = embeddings(*shape)
    z[:, 0] = z[:, 1] + 1e-4  # closer than 1e-3
    z.requires_grad_()
    loss, (expected, numbers) = clamp.packing_loss(z, **options), loop_loss(z, **options)
    assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradient, expected = (torch.autograd.grad(x, z)[0] for x in (loss, expected))
    assert_close(gradient, expected, rtol=1e-9, atol=1e-10)
    ours = clamp.packing_numbers(z, **options)
    assert_close(ours, numbers, rtol=1e-6, atol=0, check_dtype=False)
    assert ours["neighbours"] > 0


def test_close_centres_in_float32_have_the_gradient_of_float64():
    z = embeddings(4, 40, 32, noise=0.05)
    z[:, 1] = z[:, 0] + 2e-2 / math.sqrt(32) * torch.randn(32)
    exact, ours = (torch.autograd.grad(clamp.packing_loss(x), x)[0]
                   for x in (z.requires_grad_(), z.detach().float().requires_grad_()))
    assert exact.any() and (ours - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("z", [  # of one point; one image; zero radii; apart; the same centres
    torch.ones(4, 8, 16), embeddings(4, 1, 16), embeddings(4, 8, 16, noise=0),
    torch.eye(8) + 1e-5 * torch.randn(4, 8, 8), embeddings(4, 1, 16).expand(4, 40, 16),
    embeddings(4, 8, 16).bfloat16(), embeddings(4, 8, 16).half()])
def test_gradients_are_finite(z):
    z = z.clone().requires_grad_()
    loss, distance = clamp.packing_loss(z), 1 - clamp.overlap(*clamp.balls(z))
    attraction = (distance.clamp(min=0.3) ** -12 - distance.clamp(min=0.3) ** -6).sum()
    for value in loss, attraction:  # the distance is infinite for pairs that do not count
        assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()
    assert all(value.isfinite() for value in clamp.packing_numbers(z).values())
    assert loss.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)


def test_overlap_by_hand_autocast_nan_and_wrong_shapes():
    centers = torch.tensor([[0.0, 0], [0.3, 0.4], [0.3, 0.4005], [0, 2]])
    x = clamp.overlap(centers, torch.tensor([0.5, 0.5, 0.5, 1.5]), max_reach=1.6)
    assert_close(x[0], torch.tensor([-math.inf, 0.5, 1 - math.hypot(0.3, 0.4005), 1 - 2 / 1.6]))
    assert x[1, 2] == -math.inf and torch.equal(x, x.T)
    z = embeddings(4, 9, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = clamp.packing_loss(z)
    assert inside == clamp.packing_loss(z)
    for wrong in z[:1], z[0]:
        with pytest.raises(ValueError, match="views >= 2"):
            clamp.packing_loss(wrong)
    z[1, 2, 3] = math.nan
    assert clamp.packing_loss(z).isnan() and clamp.packing_loss(z, center=False).isnan()


# -------- augmentation

def pictures(n=12, height=20, width=28):
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(n, 3, height // 4, width // 4), (height, width), mode="bilinear")
    x[0] = 0.5  # grey: no hue, no saturation
    x[1] = x[1].round()  # corners of the colour cube
    return x


@pytest.mark.parametrize("size", [8, 16, 40])
def test_crops_equal_torchvision(size):
    x = pictures()
    torch.manual_seed(0)
    boxes = clamp.random_boxes(x, (0.05, 1.0))
    boxes[:, 0], boxes[:, 1] = torch.tensor([0, 0, 20, 28]), torch.tensor([19, 27, 1, 1])
    for picture, box, ours in zip(x, boxes.T, clamp.resized_crop(x, boxes, size)):
        expected = TF.resized_crop(picture, *box.int().tolist(), [size, size], antialias=True)
        assert_close(ours, expected, rtol=0, atol=1e-5)
    ours, middle = clamp.center_crop((x * 255).byte(), size) / 255, x[:, :, 1:19, 5:23]  # 7/8
    assert_close(ours, TF.resize(middle, [size, size], antialias=True), rtol=0, atol=2 / 255)
    assert clamp.center_crop(middle, 18) is middle


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    crop, picture = torchvision.transforms.RandomResizedCrop, torch.zeros(3, 24, 40)
    ours = clamp.random_boxes(picture.expand(4000, 3, 24, 40), (0.08, 1.0)).T
    theirs = [crop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= torch.tensor([24, 40])).all()
    for x, y in zip(ours.T, torch.tensor(theirs).float().T):
        assert_close((x.mean(), x.square().mean()), (y.mean(), y.square().mean()), rtol=0.06, atol=0.1)
    for height, width in (10, 100), (10, 101), (91, 8), (9, 9):  # nothing fits: the centre
        box = crop.get_params(torch.zeros(3, height, width), (1.0, 1.0), (3 / 4, 4 / 3))
        boxes = clamp.random_boxes(torch.zeros(50, 3, height, width), (1.0, 1.0))
        assert (boxes.T == torch.tensor(box)).all()


@pytest.mark.parametrize("size", [20, 40, 88])  # 3, 5 and 9 taps of blur
def test_views_equal_torchvision_given_the_same_parameters(size):
    """Draws again, in the order of the steps, what the augmentation drew for 5 views of 30."""
    augment, n = clamp.MultiViewAugment(size, 5, jitter=(0.8, 0.8, 0.8, 0.5),
                                        blur_p=[1.0, 0.3, 0.0], solarize_p=[0.0, 0.6]), 150
    x = (pictures(n, 16, 16) * 255).byte()
    torch.manual_seed(0)
    views = augment(x.unflatten(0, (5, 30)).transpose(0, 1)).flatten(0, 1)  # as from files
    torch.manual_seed(0)
    flip, jitter, order = torch.rand(n) < 0.5, torch.rand(n) < 0.8, torch.randperm(4).tolist()
    changes = {j: torch.empty(n).uniform_(-1, 1) * augment.jitter[j] for j in order}
    gray = torch.rand(n) < 0.2
    blur = (torch.rand(5, 30) < torch.tensor([[1], [0.3], [0], [1], [0.3]])).flatten()
    sigma = torch.empty(n).uniform_(0.1, 2.0)
    solarize = (torch.rand(5, 30) < torch.tensor([[0], [0.6], [0], [0.6], [0]])).flatten()
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for i in range(n):
        y = (TF.hflip(x[i]) if flip[i] else x[i]) / 255
        for j in order if jitter[i] else []:
            y = adjust[j](y, changes[j][i].item() + (j < 3))
        y = TF.rgb_to_grayscale(y, 3) if gray[i] else y
        y = TF.gaussian_blur(y, 2 * (size // 20) + 1, sigma[i].item()) if blur[i] else y
        y = TF.solarize(y, 0.5) if solarize[i] else y
        # rounding may put a pixel on either side of the threshold of solarising
        different = (views[i] - TF.normalize(y, MEAN, STD)).abs() > 1e-4
        assert different.float().mean() < (0.01 if solarize[i] else 1e-9)


class Inverted(clamp.MultiViewAugment):
    def photometric(self, x):
        return 1 - x


def test_every_view_is_its_own_and_own_colours_are_flipped_and_normalised():
    images = (pictures(5, 32, 32)[[2, 3, 3]] * 255).byte()
    torch.manual_seed(0)
    views = clamp.MultiViewAugment(24, 5)(images)
    assert views.shape == (5, 3, 3, 24, 24) and views.dtype == torch.float32
    assert torch.pdist(views.flatten(0, 1).flatten(1)).min() > 0.1
    plain = clamp.MultiViewAugment(32, 2, (1, 1), 0, jitter_p=0, gray_p=0, blur_p=[0])(images)
    inverted = Inverted(32, 2, (1, 1), flip_p=1)(images)
    for views, expected in ((plain, images / 255), (inverted, 1 - images.flip(3) / 255)):
        assert_close(views, TF.normalize(expected, MEAN, STD).expand(2, 3, 3, 32, 32))


# -------- network, optimiser

@pytest.mark.parametrize("arch, features, blocks", [("resnet18", 512, 8), ("resnet50", 2048, 16)])
@pytest.mark.parametrize("stem, left", [("imagenet", 1), ("cifar", 5)])
def test_backbone_is_torchvisions(arch, features, blocks, stem, left):
    backbone, theirs = clamp.build_backbone(arch, stem), getattr(torchvision.models, arch)()
    assert backbone.state_dict().keys() == {k for k in theirs.state_dict() if k[:3] != "fc."}
    zeros, more = (sum(not p.any() for p in network.parameters()) for network in (
        backbone, clamp.build_backbone(arch, stem, zero_init=True)))
    assert more == zeros + blocks
    x, theirs.fc = torch.randn(2, 3, 32, 32), nn.Identity()
    if stem == "imagenet":
        theirs.load_state_dict(backbone.state_dict())
        assert_close(backbone(x), theirs(x))
    assert backbone.eval()(x).shape == (2, features) == (2, backbone.num_features)
    backbone.avgpool = nn.Identity()
    assert backbone(x).shape == (2, features * left**2)


def test_embeddings_are_the_projectors_in_float32():
    network, seen = clamp.build_network(clamp.parse_args(["--projector", "7", "5"])).eval(), []
    x, (w, b, w2, b2) = torch.randn(2, 3, 32, 32), network.projector.parameters()
    z = (network.backbone(x) @ w.T + b).relu() @ w2.T + b2
    assert_close(clamp.embed(network, x, torch.float32), z)
    network.register_forward_hook(lambda _, x, z: seen.append((x[0].stride(1), z.dtype)))
    half = clamp.embed(network, x, torch.bfloat16)
    assert half.dtype == torch.float32 and seen == [(1, torch.bfloat16)]  # channels_last
    assert_close(half, z, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("eta", [0.1, 0])
def test_lars_by_hand(eta):
    torch.manual_seed(0)
    expected = [torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2), torch.randn(3, 2)]
    params, unused = [nn.Parameter(p.clone()) for p in expected], nn.Parameter(torch.ones(2, 2))
    optimizer = clamp.LARS([*params, unused], lr=0.5, momentum=0.9, weight_decay=0.01, eta=eta)
    velocity = [0, 0, 0, 0]  # of a weight, a bias, a zero weight, and one whose gradient is zero
    for _ in range(3):
        for k, p in enumerate(expected):
            params[k].grad = g = torch.randn_like(p) * (k < 3)
            if p.ndim > 1:
                scale = eta * p.norm() / (g.norm() + 0.01 * p.norm())
                g = (scale if eta and p.any() and g.any() else 1) * (g + 0.01 * p)
            velocity[k] = 0.9 * velocity[k] + g
            expected[k] = p - 0.5 * velocity[k]
        optimizer.step()
        assert_close([p.detach() for p in params], expected)
    assert (unused == 1).all()


# -------- data

def test_patterns_are_balanced_seeded_disjoint_grey_and_not_told_by_pixels():
    (x, y), (again, _), (test_x, test_y) = ((data.images, data.labels) for data in (
        clamp.load_data("patterns", split) for split in ("train", "train", "test")))
    assert x.dtype == torch.uint8 and x.shape == (5000, 3, 32, 32) and torch.equal(x, again)
    assert (x == x[:, :1]).all() and max(y.bincount()) - min(y.bincount()) <= 1
    assert len(torch.cat([x, test_x])[:, 0].unique(dim=0)) == 7000
    pixels, test_pixels = (F.pad(i[:, 0].flatten(1) / 255, (0, 1), value=1) for i in (x, test_x))
    gram = pixels.T @ pixels + 10 * torch.eye(1025)
    weight = torch.linalg.solve(gram, pixels.T @ F.one_hot(y).float())
    assert ((test_pixels @ weight).argmax(1) == test_y).float().mean() < 0.55


def write_pictures(folder, n, sizes=ONE_SIZE, seed=0):
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    for k in range(n):
        width, height = sizes[k % len(sizes)]
        picture = TF.to_pil_image(torch.rand(3, height, width))
        picture.save(folder / f"{k:03}.{'png' if k % 2 else 'jpg'}")


@pytest.mark.parametrize("names", [
    "a/1:0 a/2.JPG:0 a/notes.txt b/1:1 b/deep/er/1.webp:1 c/1:2",
    "train/a/1:0 train/b/1:1 test/a/1:t0 test/b/1:t1 c/1 2",
    "train/a/1:0 train/b/1:1 val/a/1:t0 test/1", "train/a/1:0 train/b/1:1 val/a/1 test/b/1:t1",
    "a/1:0 b/1:1 val/a/1:t0", "a/1:0 b/1:1 3:-1", "1:-1 2:-1", "train/1:-1 train/2:-1 test/1",
    "a/1:-1 a/2:-1", "train/a/1:-1 test/a/1", "a/1:0 b/1:1 b/up>.. b/b>../b ../x/1 c>../x c/1:2",
    "a/1:0 b/1:1 a/.2 a/._1.png .c/1 a/.thumbnails/1 __MACOSX/a/1 run/views run/checkpoint.pt"])
def test_folders(names, tmp_path):
    """A name is followed by its label, with t if it is a test image, or by nothing if it is left
    out. A name before > is a link."""
    expected = {"train": [], "test": []}
    for name, _, label in (name.partition(":") for name in names.split()):
        name, _, target = name.partition(">")
        file = tmp_path / "root" / (name if target or Path(name).suffix else f"{name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(target) if target else file.touch()
        if label:
            expected["test" if label[0] == "t" else "train"] += [(str(file), int(label.strip("t")))]
    for split, pairs in expected.items():
        data = clamp.list_images(tmp_path / "root", split)
        assert sorted(zip(data.files.tolist(), data.labels.tolist())) == sorted(pairs)


def test_images_of_nearly_one_size_are_kept_in_memory(tmp_path):
    write_pictures(tmp_path / "one/ant", 12), write_pictures(tmp_path / "one/bee", 18, seed=1)
    Image.effect_noise((36, 32), 90).save(tmp_path / "one/ant/005.png")
    Image.effect_noise((32, 40), 90).save(tmp_path / "one/ant/007.png")
    data = clamp.load_data(str(tmp_path / "one"), "train")
    assert data.images.dtype == torch.uint8 and data.labels.tolist() == [0] * 12 + [1] * 18
    for file, image in zip(data.files, data.images, strict=True):  # the middle of the odd sizes
        expected = TF.center_crop(Image.open(file).convert("RGB"), [32, 32])
        assert torch.equal(image, TF.pil_to_tensor(expected))
    few = clamp.load_data(str(tmp_path / "one"), "train", limit=5, seed=3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))[:5]
    assert torch.equal(few.images, data.images[order]) and few.labels.equal(data.labels[order])
    for k, sizes in enumerate((TWO_SIZES, ((32, 257),))):
        write_pictures(tmp_path / str(k), 2, sizes)
        assert clamp.load_data(str(tmp_path / str(k)), "train").images is None


def test_pictures_are_read_upright_in_rgb_and_on_mid_grey(tmp_path):
    torch.manual_seed(0)
    noise, exif = TF.to_pil_image(torch.rand(4, 12, 16)), Image.Exif()

    def read(name, mode, **options):
        """What clamp makes of a picture of this mode, and what Pillow makes of it."""
        picture = noise.convert("RGB") if mode in ("P", "CMYK") else noise
        picture.convert(mode).save(tmp_path / name, **options)
        picture = Image.open(tmp_path / name)
        assert picture.mode == mode
        return clamp.read_image(tmp_path / name), picture

    for name, mode in (("1.jpg", "CMYK"), ("1.tif", "CMYK"), ("1.png", "1"), ("1.jpg", "L"),
                       ("1.png", "P"), ("1.bmp", "P"), ("1.webp", "RGB")):
        ours, picture = read(name, mode)
        assert torch.equal(ours, TF.pil_to_tensor(picture.convert("RGB")))
    for exif[0x0112], turn in enumerate((0, 3, 1, 5, 4, 6, 2), 2):  # numbers of Image.Transpose
        ours, picture = read("2.png", "RGB", exif=exif)
        assert torch.equal(ours, TF.pil_to_tensor(picture.transpose(turn)))
    for mode, options in (("RGBA", {}), ("LA", {}), ("P", dict(transparency=bytes(range(256))))):
        ours, picture = read("3.png", mode, **options)
        *color, alpha = TF.pil_to_tensor(picture.convert("RGBA")).double()
        expected = 128 + (torch.stack(color) - 128) * alpha / 255
        assert alpha.std() > 50 and (ours - expected).abs().max() <= 1


def test_files_that_cannot_be_read_are_refused_with_the_reason(tmp_path, monkeypatch):
    def refused(name, reason):
        with pytest.raises(clamp.UserError, match=f"^{tmp_path / name}: {reason}"):
            clamp.read_image(tmp_path / name)

    Image.fromarray(np.full((4, 4), 300, "uint16")).save(tmp_path / "deep.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    (tmp_path / "folder.png").mkdir(), (tmp_path / "text.png").write_text("<html>")
    for name in "deep.png", "float.tif":
        refused(name, "more than 8 bits a channel; convert it to 8 bits$")
    refused("missing.png", "No such file or directory$"), refused("folder.png", "Is a directory$")
    refused("text.png", "cannot identify image")
    monkeypatch.setattr(Image, "open", mock.Mock(side_effect=PermissionError(13, "Not allowed")))
    refused("text.png", "Not allowed$")


@pytest.mark.parametrize("sizes, n", [(ONE_SIZE, 45), (TWO_SIZES, 48)])  # in memory, streamed
def test_broken_pictures_are_left_out_and_named_once(sizes, n, tmp_path, capfd):
    for k, name in enumerate(("ant", "bee")):
        write_pictures(tmp_path / "data" / name, 24, sizes, seed=k)
    broken = [tmp_path / "data" / name for name in ("ant/000.jpg", "bee/007.png", "bee/023.png")]
    for file, content in zip(broken, (broken[0].read_bytes()[:400], b"", b"<html>")):
        file.write_bytes(content)
    flags = ["--data", tmp_path / "data", "--batch-size", "15"]
    train_once(tmp_path / "run", *flags)
    printed = capfd.readouterr().out
    assert f"{tmp_path}/data: {n} images of 2 classes" in printed
    assert [printed.count(f"unreadable: {file}: ") for file in broken] == [1, 1, 1]
    assert [record["unreadable"] for record in read_log(tmp_path / "run")] == [3, 3, 3]
    line = refusal(capfd, eval_linear, tmp_path / "run", backbone=tiny_network().backbone)
    assert "3 images, named above, cannot be read" in line
    for file in (tmp_path / "data").rglob("*.*"):
        file.write_bytes(b"")
    line = refusal(capfd, clamp, *TINY, *flags, "--out", tmp_path / "other")
    assert line.endswith(" and other images cannot be read")


def test_streamed_views_come_from_the_right_picture_with_any_workers(tmp_path):
    for k, color in enumerate(torch.eye(3)):
        x = color.view(3, 1, 1) * (1 + torch.rand(40, 50 + 10 * k)) / 2
        TF.to_pil_image(x).save(tmp_path / f"{k}.png")
    (tmp_path / "3.png").touch()  # broken: 0.png takes its place
    augment = clamp.MultiViewAugment(16, 3, jitter_p=0, gray_p=0, blur_p=[0.0])
    batches, runs = torch.tensor([[2, 0], [1, 3]]), []
    for workers, step in (0, 0), (2, 0), (0, 1):  # the last begins with the second batch
        data = clamp.load_data(str(tmp_path), "train")
        stream = clamp.image_batches(data, batches[step:], augment.crop, CPU, workers, 5, step)
        runs.append(torch.stack(list(stream)))
        for rows, x in zip(batches[step:] % 3, map(augment, runs[-1])):
            assert x.shape == (3, 2, 3, 16, 16) and (x.mean((3, 4)).argmax(2) == rows).all()
        assert len(data.unreadable) == 1
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0][1:], runs[2])
    assert not torch.equal(runs[0][0, 0, 0], runs[0][0, 0, 1])  # views of an image differ


# -------- evaluation

def evaluate(run, *flags, **parts):
    return eval_linear.evaluate(eval_linear.parse_args([*map(str, (run, *flags))]), **parts)


def test_knn_equals_a_loop():
    torch.manual_seed(0)
    bank, labels, correct = torch.randn(300, 4), torch.arange(300) % 3, 0
    queries = bank + torch.randn(300, 4)
    for query, label in zip(queries, labels):
        cosine, votes = F.cosine_similarity(query, bank), [0.0] * 3
        for i in cosine.argsort(descending=True)[:5]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        correct += votes.index(max(votes)) == label
    ours = clamp.knn_accuracy(bank, labels, queries, labels, k=5)
    assert ours == pytest.approx(100 * correct / 300)


def fit_options(*flags):
    """What probe() and finetune() take: images of 8 px, and five features of each."""
    args = eval_linear.parse_args(["run", "--batch-size", "20", "--epochs", "3", *flags])
    options = dict(size=8, device=CPU, dtype=torch.float32, workers=0)
    torch.manual_seed(0)
    data = clamp.Data((255 * torch.rand(60, 3, 8, 8)).byte(), torch.arange(60) % 4)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False))
    split = eval_linear.make_split(data, torch.randperm(60)[:50], backbone, options)
    return split, dict(classes=4, backbone=backbone, args=args, options=options)


def torch_logits(network, rates, x, labels):
    """Logits of x by a network that torch's SGD has trained for three epochs on the batches of
    clamp.draw_batches(), with a learning rate for each layer."""
    groups = [dict(params=layer.parameters(), lr=lr) for layer, lr in zip(network, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for rows in torch.cat([random_order(50, epoch)[:40] for epoch in range(3)]).view(6, 20):
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return network(x).detach()


def random_order(n, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash((0, epoch))))


def test_probe_equals_separate_torch_classifiers():
    split, options = fit_options()
    rates, x = [0.03, 0.3], (split.features - split.features.mean(0)) / split.features.std(0)
    for rate, logits in zip(rates, eval_linear.probe(split, split, rates, **options)):
        head = nn.Linear(5, 4)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        expected = torch_logits(nn.Sequential(head), [rate], x, split.labels)
        assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_finetuning_equals_torch_with_a_slower_backbone(dtype, tolerance, monkeypatch):
    split, options = fit_options("--finetune")
    options["options"]["dtype"] = dtype
    monkeypatch.setattr(clamp.MultiViewAugment, "__call__",
                        lambda _, images: clamp.normalize(images / 255)[None])
    torch.manual_seed(1)
    ours, = eval_linear.finetune(split, split, [0.4], **options)
    torch.manual_seed(1)
    network = nn.Sequential(options["backbone"][1], nn.Linear(5, 4))
    x = TF.normalize(split.data.images[split.rows] / 255, MEAN, STD).flatten(1)
    expected = torch_logits(network, [0.05 * 0.4, 0.4], x, split.labels)
    assert_close(ours, expected, rtol=10 * tolerance, atol=tolerance)


def test_labels_by_fraction_and_by_list(tmp_path):
    labels, left = torch.tensor([0] * 40 + [1] * 80 + [3] * 3), {0: 4, 1: 8, 3: 1}  # a tenth
    files = np.array([f"{k}/{i:03}.jpg" for i, k in enumerate(labels.tolist())])
    data, rows, expected = clamp.Data(None, labels, files), torch.randperm(123), []
    for row in rows.tolist():
        left[labels[row].item()] -= 1
        expected += [row] if left[labels[row].item()] >= 0 else []
    (tmp_path / "list").write_text("002.jpg\n100.jpg\n")
    listed = [row for row in rows.tolist() if row in (2, 100)]
    for part, kept in (None, rows.tolist()), (0.1, expected), (str(tmp_path / "list"), listed):
        assert eval_linear.choose_rows(data, rows, part).tolist() == kept
    for few, n in (rows[rows > 2], 1), (rows[rows > 100], 0):
        with pytest.raises(clamp.UserError, match=f"its 2 names fit {n} training files"):
            eval_linear.choose_rows(data, few, str(tmp_path / "list"))


def test_without_labels_features_and_neighbours_are_written(tmp_path):
    images, run = (pictures(20, 64, 64) * 255).byte(), tmp_path / "run"
    (tmp_path / "data").mkdir(), run.mkdir()
    for k, image in enumerate(images):
        TF.to_pil_image(image).save(tmp_path / f"data/{k:02}.png")
    settings = vars(clamp.parse_args(["--data", str(tmp_path / "data")]))
    torch.manual_seed(0)
    untrained, backbone = (clamp.build_backbone("resnet18").eval() for _ in range(2))
    torch.save({"epoch": 4, "settings": settings, "backbone": backbone.state_dict()},
               run / "backbone.pt")
    assert evaluate(run, "--amp", "off") is None
    saved, picture = torch.load(run / "features.pt"), (run / "neighbours.png").read_bytes()
    with torch.no_grad():
        features = [network(TF.normalize(images / 255, MEAN, STD)) for network in (backbone, untrained)]
    assert saved["files"] == [f"{tmp_path}/data/{k:02}.png" for k in range(20)]
    assert_close(saved["features"], features[0], rtol=1e-4, atol=1e-4)
    tiles = TF.pil_to_tensor(Image.open(run / "neighbours.png")).unfold(1, 66, 66).unfold(2, 66, 66)
    for row in tiles.permute(1, 2, 0, 3, 4)[..., 2:, 2:]:
        (image,), *shown = ([k for k in range(20) if images[k].equal(tile)] for tile in row)
        for x in features:  # a white tile, and the eight nearest
            near = F.cosine_similarity(x, x[[image]]).argsort(descending=True).tolist()
            near.remove(image)
            assert shown[:9] == [[], *([k] for k in near[:8])]
            shown = shown[9:]
    evaluate(run, "--random-init")
    assert tiles.shape[1:3] == (12, 19) and (run / "neighbours.png").read_bytes() == picture


def test_without_test_images_a_fifth_is_held_out(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 3)  # without labels
    for k, name in enumerate(("ant", "bee")):
        write_pictures(tmp_path / "data" / name, 20, seed=k)
    train_once(tmp_path / "run", "--data", tmp_path / "data")
    spy = mock.Mock(wraps=eval_linear.make_split)
    monkeypatch.setattr(eval_linear, "make_split", spy)
    for flags in ["--epochs", "1"], ["--epochs", "1", "--random-init"]:
        result = evaluate(tmp_path / "run", "--batch-size", "16", *flags,
                          backbone=tiny_network().backbone)
        assert [result[x] for x in ("n_train", "n_test", "epoch", "epochs")] == [32, 8, 3, 3]
    test, train, floor_test, floor_train = (call.args[1].tolist() for call in spy.mock_calls)
    assert sorted(test + train) == list(range(3, 43)) and len(test) == 8
    assert floor_test == test and floor_train == train


# -------- training

def train_once(out, *flags, **parts):
    args = clamp.parse_args([*TINY, "--out", str(out), *map(str, flags)])
    clamp.train(args, **{"network": tiny_network(), **parts})


def read_log(folder):
    """The lines of log.jsonl, without the time they took."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for record in records:
        views = record.pop("seconds") * record.pop("views_per_second")
        assert views == pytest.approx(round(views)) and views > 0
    return records


def assert_same_runs(whole, other):
    a, b = (torch.load(out / "checkpoint.pt") | torch.load(out / "backbone.pt")
            for out in (whole, other))
    for part in ("epoch", "network", "optimizer", "scaler", "backbone"):
        assert_close(a[part], b[part], rtol=0, atol=0)
    assert read_log(whole) == read_log(other) and len(read_log(whole)) == a["epoch"] == 3
    assert not list(other.glob("*.part"))


class FixedViews(clamp.MultiViewAugment):
    """The same shifts of every image each time, so that all processes make the same views."""

    def __call__(self, images):
        assert (self.size, self.crop_scale, self.jitter[0]) == (32, [0.2, 1.0], 0.4)  # the flags'
        x = clamp.normalize(images / 255)
        return torch.stack([x, x.roll(5, 3), x.flip(3)])


def train_share(out):
    """Train on 24 images, on this process's share. First, differing processes must be refused."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    data = torch.zeros(64 + rank, 3, 32, 32, dtype=torch.uint8), torch.arange(64 + rank)
    for flags, parts, names in ((["--seed", rank], {}, "seed"),
                                (["--recipe", "small"], {"data": data}, "number of images")):
        if world > 1:
            with pytest.raises(clamp.UserError, match=f"the processes differ in {names}; give all"):
                train_once(out, "--batch-size", 12, *flags, **parts)
            assert not Path(out).exists()
    # DDP gives every process the first one's weights. Batch norm has each process's statistics.
    network = tiny_network(seed=rank, norm=nn.Identity)
    args = clamp.parse_args(["--limit", "24", "--batch-size", "12", "--epochs", "3", "--lr", "4",
                             "--amp", "off", "--out", str(out)])
    clamp.command_line(lambda: clamp.train(args, network=network, augment=FixedViews))


def test_three_processes_train_as_one_does(tmp_path):
    train_share(tmp_path / "one")
    torchrun(3, "-c", f"import test_clamp; test_clamp.train_share('{tmp_path}/three')")
    one, three = (torch.load(tmp_path / f"{n}/checkpoint.pt") for n in ("one", "three"))
    assert_close(three["network"], one["network"], rtol=1e-4, atol=5e-6)
    ours, expected = (read_log(tmp_path / n)[2] for n in ("three", "one"))
    assert ours == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train_once(out)
    return out


def test_interrupted_streamed_run_ends_as_the_whole_one(tmp_path):
    whole, parts, photos = (tmp_path / name for name in ("whole", "parts", "photos"))
    write_pictures(photos, 96, TWO_SIZES)
    flags = ["--data", photos, "--amp", "fp16"]  # whose scaler has to be continued, too
    train_once(whole, *flags)
    for module, name, call, epoch in (  # an epoch has three steps, and replaces two files
            (clamp, "packing_loss", 2, 0), (os, "replace", 1, 0), (os, "replace", 2, 0),
            (os, "replace", 3, 1), (os, "replace", 2, 1)):
        effects = [mock.DEFAULT] * (call - 1) + [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt), mock.patch.object(
                module, name, wraps=getattr(module, name), side_effect=effects):
            train_once(parts, *flags)
        assert torch.load(parts / "checkpoint.pt")["epoch"] == epoch
        with pytest.raises(clamp.UserError, match="holds a run with another lr; give another"):
            train_once(parts, *flags, "--lr", 9)
    train_once(parts, *flags, "--workers", 0)
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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write")])
def test_full_disk_and_a_run_that_begins_meanwhile_do_no_harm(error, whole_run, tmp_path):
    def optimizer(parameters):  # the outer run has already found no checkpoint
        effects = [mock.DEFAULT] * 3 + [error]  # two files for epoch 0, and one of two for epoch 1
        with pytest.raises(clamp.UserError, match=f"^{tmp_path}/: cannot be written .*disk full"), \
                mock.patch.object(torch, "save", wraps=torch.save, side_effect=effects):
            train_once(tmp_path)
        return torch.optim.SGD(parameters, 0.1)

    with pytest.raises(clamp.UserError, match="another run has begun here; give another --out"):
        train_once(tmp_path, optimizer=optimizer)
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 0
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
        evaluate(tmp_path)
    assert Path(name).read_bytes() == content and not Path("executed").exists()


@pytest.mark.parametrize("gradient", [True, False])
def test_numbers_that_are_not_finite_stop_the_run(gradient, tmp_path):
    def loss_fn(z):
        zero = z.square().mean() * (0 if next(calls) == 6 else 1)
        return zero.sqrt() if gradient else zero / zero * zero  # 0 has no derivative; 0 / 0

    calls = itertools.count(1)
    with pytest.raises(clamp.UserError, match="epoch 2: .* not finite; .* another --out"):
        train_once(tmp_path, loss_fn=loss_fn)
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 1


def test_own_optimizer_is_used_and_continued_and_any_loss_is_described(tmp_path):
    """Against a loop whose learning rate rises for three of nine steps, and then falls."""
    def loss_fn(z):
        seen.append(z.detach().double())
        if len(seen) == 5:  # in the second epoch
            raise KeyboardInterrupt
        return (z - 1).square().mean()

    seen, adam = [], partial(torch.optim.AdamW, lr=0.02)
    network, again, by_hand = (tiny_network(norm=nn.Identity) for _ in range(3))
    parts = dict(loss_fn=loss_fn, augment=FixedViews, optimizer=adam)
    with pytest.raises(KeyboardInterrupt):
        train_once(tmp_path, "--amp", "off", network=network, **parts)
    train_once(tmp_path, "--amp", "off", network=again, **parts)
    optimizer, images = adam(by_hand.parameters()), clamp.load_data("patterns", "train", 96).images
    rows = torch.cat([random_order(96, epoch) for epoch in range(3)]).view(9, 32)
    for step, x in enumerate(TF.normalize(images / 255, MEAN, STD)[rows]):
        optimizer.zero_grad()
        (by_hand(torch.cat([x, x.roll(5, 3), x.flip(3)])) - 1).square().mean().backward()
        scale = (step + 1) / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 6)) / 2
        optimizer.param_groups[0]["lr"] = 0.02 * scale
        optimizer.step()
    assert_close(again.state_dict(), by_hand.state_dict(), rtol=1e-4, atol=1e-5)
    numbers, record = [loop_loss(z)[1] for z in seen[-3:]], read_log(tmp_path)[2]
    for name in numbers[0]:
        mean = sum(x[name].item() for x in numbers) / 3
        assert record[name] == pytest.approx(mean, rel=1e-3)


def test_own_images_in_memory_and_own_backbone_are_trained_and_evaluated(tmp_path, capsys):
    """Red and blue pictures are told apart by the features of any network."""
    images, labels = torch.full((80, 3, 32, 32), 40, dtype=torch.uint8), torch.arange(80) % 2
    images[torch.arange(80), 2 * labels] = 200
    network, small = tiny_network(), ["--recipe", "small", "--limit", "70"]
    args = clamp.parse_args([*TINY, *small])
    args.out, args.lr = tmp_path, np.float64(args.lr)  # as a script may set them
    clamp.train(args, network=network, data=(images, labels))
    printed = capsys.readouterr().out
    assert " 70 images of 2 classes" in printed and "finished" not in printed
    assert read_log(tmp_path)[2]["train_knn"] == 100
    for flags in ([], ["--augment"], ["--random-init"]):
        result = evaluate(tmp_path, "--batch-size", "36", "--epochs", "5", *flags,
                          backbone=tiny_network().backbone, data=2 * [(images, labels)])
        assert result["top1"] == 100 and result["n_train"] == 80
    own, _ = eval_linear.load_backbone(tmp_path, backbone=tiny_network().backbone)
    assert torch.equal(own[0].weight, network.backbone[0].weight)
    with pytest.raises(clamp.UserError, match="another backbone"):
        eval_linear.load_backbone(tmp_path)
    for out, recipe, data, words in (
            (tmp_path, "small", None, "holds a run with another own"),
            (tmp_path / "new", "small", (images / 255, labels), "are torch.float32; give uint8"),
            (tmp_path / "new", "patterns", (images, labels), "name a recipe")):
        with pytest.raises(clamp.UserError, match=words):
            train_once(out, *small, "--recipe", recipe, data=data)
    assert not (tmp_path / "new").exists()


# -------- command line

def test_command_line_end_to_end(tmp_path):
    out, files = tmp_path / "run", {"views.png", "log.jsonl", "checkpoint.pt", "backbone.pt"}
    train = ["clamp.py", *TINY, "--epochs", "2", "--out", out]
    printed = run(*train).stdout
    assert "writing" in printed and "finished; next: python eval_linear.py" in printed
    assert set(os.listdir(out)) == files
    assert Image.open(out / "views.png").size == (2 * 34 + 2, 8 * 34 + 2)
    log = read_log(out)
    assert [line["epoch"] for line in log] == [1, 2]
    assert {"loss", "radius", "neighbours", "lr", "train_knn"} <= log[0].keys()
    network, saved = torchvision.models.resnet18(), torch.load(out / "backbone.pt")["backbone"]
    assert network.load_state_dict(saved, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert "finished" in run(*train).stdout and read_log(out) == log

    result = run("eval_linear.py", out, "--epochs", "2").stdout.splitlines()[-1]
    run("eval_linear.py", out / "backbone.pt", "--epochs", "2", "--random-init", "--limit", "500")
    assert set(os.listdir(out)) == files | {"linear.jsonl", "neighbours.png"}
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
    data = clamp.load_data("patterns", "train", limit=96)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    features = clamp.extract_features(backbone, data, order, 32, CPU, torch.float32)
    (queries, bank), (y, bank_y) = features.split(48), data.labels[order].split(48)
    log = read_log(tmp_path)
    assert len(log) == 3 and log[2]["train_knn"] == clamp.knn_accuracy(bank, bank_y, queries, y)
    probe = ["eval_linear.py", tmp_path, "--epochs", "2", "--amp", "off", "--limit", "501"]
    one, two = (json.loads(result.stdout.splitlines()[-1])
                for result in (run(*probe, "--lr", "0.03"), torchrun(2, *probe, "--lr", "0.03")))
    assert one == pytest.approx(two)
    for method in ("--finetune", "--augment"):
        torchrun(2, "eval_linear.py", tmp_path, "--epochs", "1", "--limit", "300", method)
    assert json.loads((tmp_path / "linear.jsonl").read_text().splitlines()[3])["n_train"] == 300


def refusal(capfd, script, *argv, **parts):
    """The one line on stderr with which a script's command line refuses argv, exit status 2."""
    main = clamp.train if script is clamp else eval_linear.evaluate
    with pytest.raises(SystemExit) as stop:
        clamp.command_line(lambda: main(script.parse_args([*map(str, argv)]), **parts))
    line, = capfd.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and "error: " in line
    return line


@pytest.mark.parametrize("flags, words", [
    ("--views 1", "--views: 1: give 2 or more"),
    ("--batch-size 6000", "--batch-size 6000: must be at most 5000, the number of images"),
    ("--epochs -3", "--epochs: -3: give 1 or more"),
    ("--lr nan", "--lr: nan: give 0 or more"),
    ("--lr inf", "--lr: inf: give 0 or more"),
    ("--radius-scale 0", "--radius-scale: 0: give 0.001 or more"),
    ("--jitter 0 0 2 0", "--jitter: 2: give 0 to 1"),
    ("--projector abc", "--projector: invalid"),
    ("--projector 64 0", "--projector: 0: give 1 or more"),
    ("--recipe imagenet1k", "/imagenet: no images there; give patterns, cifar10, cifar100, or a"),
    ("--data {tmp}/empty", "--data {tmp}/empty: no images there"),
    ("--data {tmp}/data", "--data {tmp}/data: no training images of B"),
    ("--data ''", "--data: give a folder, or patterns, cifar10, cifar100"),
    ("--data cifar10", "--data cifar10: cannot download"),
    ("--device cuda", "no GPU for process 1; start fewer, or use --device cpu"),
    ("--out {tmp}/empty/file", "{tmp}/empty/file"),
    ("--frobnicate", "unrecognized arguments: --frobnicate")])
def test_bad_flags_give_one_line_and_write_nothing(flags, words, tmp_path, capfd, monkeypatch):
    for name in "train/a", "train/b", "test/B":
        write_pictures(tmp_path / "data" / name, 1)
    (tmp_path / "empty").mkdir(), (tmp_path / "empty/file").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", mock.Mock(side_effect=OSError, url=""))
    flags, words = shlex.split(flags.format(tmp=tmp_path)), words.format(tmp=tmp_path)
    assert words in refusal(capfd, clamp, "--device", "cpu", "--out", tmp_path / "run", *flags)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("run, flags, words", [
    ("log.jsonl", "", "log.jsonl: missing, damaged"),
    (".", "--labels 2", "--labels: 2: give 1e-06 to 1"),
    (".", "--labels nosuch", "--labels: invalid fraction_or_existing_file value"),
    (".", "--limit 200", "--batch-size 256: must be at most 180, the images to train on")])
def test_evaluations_that_do_not_fit_give_one_line(run, flags, words, whole_run, capfd):
    before, flags = sorted(whole_run.iterdir()), [whole_run / run, *flags.split()]
    assert words in refusal(capfd, eval_linear, *flags, backbone=tiny_network().backbone)
    assert sorted(whole_run.iterdir()) == before


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory; lower --batch-size or --size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--workers 0"),
    (RuntimeError("unable to open shared memory object </torch_7>"), "enlarge /dev/shm")])
def test_too_little_memory_gives_one_line(error, words, capfd, monkeypatch):
    monkeypatch.setattr(clamp, "train", mock.Mock(side_effect=error))
    assert words in refusal(capfd, clamp)
    with pytest.raises(RuntimeError, match="a mistake"):  # of this code keeps its traceback
        clamp.command_line(mock.Mock(side_effect=RuntimeError("a mistake")))


def test_recipes_and_data_set_the_defaults(capsys, monkeypatch):
    for recipe, expected in {
            "cifar10-published": dict(data="cifar10", radius_scale=7.0, views=16, batch_size=128,
                                      epochs=1000, lr=0.1, stem="cifar", projector=[2048, 256]),
            "imagenet100": dict(arch="resnet50", epochs=200, lr=2.0, radius_scale=8.5, views=4),
            "imagenet1k": dict(epochs=100, lr=1.1, batch_size=512, projector=[8192, 8192, 512],
                               blur_p=[1.0, 0.1], solarize_p=[0.0, 0.2], max_reach=1.5, eta=1e-3,
                               warmup_epochs=10.0, weight_decay=1e-6, jitter=[0.4, 0.4, 0.2, 0.1]),
            }.items():
        published = vars(clamp.parse_args(["--recipe", recipe]))
        assert published == published | expected
    for recipe in clamp.RECIPES:
        args = vars(clamp.parse_args(["--recipe", recipe]))
        assert {name for name in args if args[name] is None} == {"limit", "compile"}
    for data, recipe in (("patterns", "patterns"), ("cifar10", "small"), ("cifar100", "small"),
                         ("./patterns", "photos"), ("my/cifar10", "photos"), ("/a", "photos")):
        args = clamp.parse_args(["--data", data])
        assert args.recipe == recipe and args.out == f"runs/{data.split('/')[-1]}"
        assert args.data == (data if recipe != "photos" else os.path.abspath(data))
    own = clamp.parse_args(shlex.split("--data photos --lr 1 --epochs 2 --crop-scale 1 .2"))
    assert (own.size, own.lr, own.warmup_epochs, own.crop_scale) == (64, 1, 2 / 3, [0.2, 1])
    monkeypatch.setattr(sys, "argv", ["clamp.py"])
    assert clamp.parse_args().recipe == "patterns"
    with pytest.raises(SystemExit):
        clamp.parse_args(["--recipe", "imagenet1k", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--radius-scale 8.5 " in shown and "--lr 1.1" in shown
