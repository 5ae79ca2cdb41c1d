"""Tests of clamp.py and eval_linear.py against independent references, without network or GPU."""

import itertools
import json
import math
import os
import re
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
ADAM = partial(torch.optim.AdamW, lr=0.02, eps=1e-2)  # with a small eps, rounding would count
TINY = "--epochs 3 --limit 96 --batch-size 32 --views 2 --size 32 --workers 1".split()


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


def refused(words, function, *args, **parts):
    pytest.raises(clamp.UserError, function, *args, **parts).match(words)


# -------- packing loss

def loop_loss(z, radius_scale=7.0, max_reach=1.5):
    """The equations, one image and one pair at a time, with the full covariance matrix."""
    m, b, d = z.shape
    z = z - sum(z.flatten(0, 1)) / (m * b)
    clouds = [torch.stack([view / view.norm() for view in views]) for views in z.unbind(1)]
    centers = [sum(cloud) / m for cloud in clouds]
    radii = [radius_scale * (x.T.cov().trace() / min(m, d) + 1e-12).sqrt() for x in clouds]
    energy, neighbours = 0, 0
    for i, j in itertools.permutations(range(b), 2):
        distance = (centers[i] - centers[j]).norm()
        reach = (radii[i] + radii[j]).clamp(max=max_reach)
        if 1e-3 < distance < reach:
            energy, neighbours = energy + (1 - distance / reach) ** 2 / 2, neighbours + 1
    spread = torch.linalg.eigvalsh(torch.stack(centers).T.cov(correction=0))
    return (energy + 1e-6).log(), {
        "radius": sum(radii) / b, "neighbours": torch.tensor(neighbours / b),
        "spread": spread.sum().sqrt(),
        "participation_ratio": spread.sum() ** 2 / spread.square().sum()}


@pytest.mark.parametrize("shape", [(4, 7, 5), (2, 6, 16), (5, 4, 3), (2, 30, 16)])
@pytest.mark.parametrize("options", [
    {}, dict(max_reach=math.inf), dict(radius_scale=4.0), dict(max_reach=1.4)])
def test_loss_gradient_and_numbers_equal_the_equations(shape, options):
    z = embeddings(*shape)
    z[:, 0] = z[:, 1] + 1e-4  # closer than 1e-3
    z[:, 2] = z[:, 3] + 3e-3 * torch.randn(shape[2])  # hard in float32
    z.requires_grad_()
    loss, (expected, numbers) = clamp.packing_loss(z, **options), loop_loss(z, **options)
    assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    ours, expected, in_float32 = (torch.autograd.grad(x, z)[0] for x in (
        loss, expected, clamp.packing_loss(z.float(), **options)))
    assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    assert (in_float32 - expected).norm() < 1e-4 * expected.norm()
    ours = clamp.packing_numbers(z, **options)
    assert_close(ours, numbers, rtol=1e-6, atol=0, check_dtype=False)
    assert ours["neighbours"] > 0


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


def test_overlap_autocast_nan_and_wrong_shapes():
    centers, z = torch.tensor([[0.0, 0], [3, 4], [3, 4.005], [0, 20]]) / 10, embeddings(4, 9, 6)
    x = clamp.overlap(centers, torch.tensor([0.5, 0.5, 0.5, 1.5]), max_reach=1.6)
    assert_close(x[0], torch.tensor([-math.inf, 0.5, 1 - math.hypot(0.3, 0.4005), 1 - 2 / 1.6]))
    assert x[1, 2] == -math.inf and torch.equal(x, x.T)
    with torch.autocast("cpu", torch.bfloat16):
        loss = clamp.packing_loss(z.float())
    assert loss == clamp.packing_loss(z.float())
    for wrong in z[:1], z[0]:
        pytest.raises(ValueError, clamp.packing_loss, wrong).match("views >= 2")
    z[1, 2, 3] = math.nan
    assert clamp.packing_loss(z).isnan()


# -------- augmentation

def pictures(n=12, height=20, width=28):
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(n, 3, height // 4, width // 4), (height, width), mode="bilinear")
    x[0] = 0.5  # grey: no hue, no saturation
    x[1] = x[1].round()  # corners of the colour cube
    return x


def test_boxes_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(0)
    draw = partial(torchvision.transforms.RandomResizedCrop.get_params, ratio=(3 / 4, 4 / 3))
    x, scale = torch.zeros(3, 24, 40), (0.08, 1.0)
    left, top, right, bottom = clamp.random_boxes(4000, 24, 40, scale, CPU).T
    theirs = torch.tensor([draw(x, scale) for _ in range(4000)], dtype=torch.float32).T
    assert left.min() == top.min() == 0 and right.max() == 40 and bottom.max() == 24
    for a, b in zip((top, left, bottom - top, right - left), theirs, strict=True):
        assert_close([a.mean(), a.std()], [b.mean(), b.std()], rtol=0.06, atol=0.1)
    for height, width in (10, 100), (10, 101), (91, 8), (9, 9):  # nothing fits
        *_, h, w = draw(torch.zeros(3, height, width), (1, 1))
        boxes = clamp.random_boxes(50, height, width, (1, 1), CPU)
        assert (boxes[:, 2:] - boxes[:, :2] == torch.tensor([w, h])).all()
        assert boxes.min() == 0 and (boxes[:, 2:].amax(0) <= torch.tensor([width, height])).all()


def test_crops_are_bilinear_and_averages_where_they_shrink():
    images, plain = (pictures(6, 32, 32) * 255).byte(), dict(flip_p=0, jitter_p=0, gray_p=0)

    def views(size, box):  # of all images, cut out by the same box
        boxes = torch.tensor(box, dtype=torch.float32).expand(12, 4)
        with mock.patch.object(clamp, "random_boxes", lambda *_: boxes):
            augment = clamp.MultiViewAugment(size, 2, blur_p=[0], **plain)
            return augment(augment.crop(images))

    for left, top, w, h in (0, 0, 32, 32), (5, 12, 21, 7), (31, 0, 1, 32):
        x, y = left + (torch.arange(40) + 0.5) * w / 40, top + (torch.arange(40) + 0.5) * h / 40
        grid = torch.stack(torch.meshgrid(x / 16 - 1, y / 16 - 1, indexing="xy"), 2)
        expected = F.grid_sample(images.float(), grid.expand(6, -1, -1, -1), padding_mode="border",
                                 align_corners=False)
        ours = views(40, (left, top, left + w, top + h))
        expected = TF.normalize(expected.round() / 255, MEAN, STD).expand(2, -1, -1, -1, -1)
        assert_close(ours, expected, rtol=0, atol=0.018)  # 1/255: some are rounded the other way
        assert ((ours - expected).abs() > 1e-4).float().mean() < 0.02
    for size, box in (8, (4, 8, 28, 32)), (12, (0, 5, 24, 29)):
        left, top, right, bottom = box
        expected = F.avg_pool2d(images[:, :, top:bottom, left:right].float(), 24 // size).round()
        expected = TF.normalize(expected / 255, MEAN, STD)
        assert_close(views(size, box)[1], expected, rtol=0, atol=0.018)
    middle = pictures()[:, :, 1:19, 5:23]  # 7/8 of 20
    assert_close(clamp.center_crop(pictures(), 16), TF.resize(middle, [16, 16], antialias=True))


@pytest.mark.parametrize("size", [20, 40, 88])  # 3, 5 and 9 taps of blur
def test_views_equal_torchvision_given_the_same_parameters(size):
    """Draws again, in the order of the steps, what the augmentation drew for 5 views of 30."""
    augment, n = clamp.MultiViewAugment(size, 5, jitter=(0.8, 0.8, 0.8, 0.5),
                                        blur_p=[1.0, 0.3, 0.0], solarize_p=[0.0, 0.6]), 150
    x, view = (pictures(n, 16, 16) * 255).byte(), torch.arange(n) // 30
    torch.manual_seed(0)
    views = augment(x.unflatten(0, (5, 30)).transpose(0, 1)).flatten(0, 1)
    torch.manual_seed(0)
    flip, jitter, order = torch.rand(n) < 0.5, torch.rand(n) < 0.8, torch.randperm(4).tolist()
    changes = {j: torch.empty(n).uniform_(-1, 1) * augment.jitter[j] for j in order}
    gray, blur = torch.rand(n) < 0.2, torch.rand(n) < torch.tensor([1, 0.3, 0, 1, 0.3])[view]
    sigma, solarize = torch.empty(n).uniform_(0.1, 2.0), torch.rand(n) < 0.6 * (view % 2)
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


def test_every_view_is_its_own_and_own_colours_are_flipped_and_normalised():
    images = (pictures(5, 32, 32)[[2, 3, 3]] * 255).byte()
    torch.manual_seed(0)
    views = (augment := clamp.MultiViewAugment(24, 5))(augment.crop(images))
    assert views.shape == (5, 3, 3, 24, 24) and views.dtype == torch.float32
    assert torch.pdist(views.flatten(0, 1).flatten(1)).min() > 0.1
    crops = clamp.MultiViewAugment(32, 2, (1, 1)).crop(images)  # whole images
    plain = clamp.MultiViewAugment(32, 2, flip_p=0, jitter_p=0, gray_p=0, blur_p=[0])(crops)
    Inverted = type("Inverted", (clamp.MultiViewAugment,), {"photometric": lambda self, x: 1 - x})
    inverted = Inverted(32, 2, flip_p=1)(crops)
    for views, expected in ((plain, images / 255), (inverted, 1 - images.flip(3) / 255)):
        assert_close(views, TF.normalize(expected, MEAN, STD).expand(2, 3, 3, 32, 32))


# -------- network, optimiser

@pytest.mark.parametrize("arch, features, blocks", [("resnet18", 512, 8), ("resnet50", 2048, 16)])
@pytest.mark.parametrize("stem, left", [("imagenet", 1), ("cifar", 5)])
def test_network_is_torchvisions_backbone_and_a_projector(arch, features, blocks, stem, left):
    args = clamp.parse_args(["--arch", arch, "--stem", stem, "--projector", "7", "5"])  # zero init
    network, x = clamp.build_network(args).eval(), torch.randn(2, 3, 32, 32)
    f, (w, b, w2, b2) = network.backbone(x), network.projector.parameters()
    for dtype, tolerance in (torch.float32, 1e-5), (torch.bfloat16, 0.1):
        z = clamp.embed(network, x, dtype)
        assert_close(z, (f @ w.T + b).relu() @ w2.T + b2, rtol=tolerance, atol=tolerance)
    backbone, theirs = clamp.build_backbone(arch, stem), getattr(torchvision.models, arch)()
    zeros, fewer = (sum(not p.any() for p in x.parameters()) for x in (network.backbone, backbone))
    assert zeros == fewer + blocks and f.shape == (2, features) == (2, backbone.num_features)
    if stem == "imagenet":
        theirs.fc = nn.Identity()
        theirs.load_state_dict(backbone.state_dict())
        assert_close(backbone(x), theirs(x))
    backbone.avgpool = nn.Identity()
    assert backbone(x).shape == (2, features * left**2)


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


# -------- data

def write_pictures(folder, n, sizes=ONE_SIZE, seed=0):
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    for k in range(n):
        width, height = sizes[k % len(sizes)]
        file = folder / f"{k:03}.{'png' if k % 2 else 'jpg'}"
        TF.to_pil_image(torch.rand(3, height, width)).save(file)


@pytest.mark.parametrize("names", [
    "a/1:0 a/2.JPG:0 a/notes.txt b/1:1 b/deep/er/1.webp:1 c/1:2", "train/a/1:-1 test/a/1", "1:-1",
    "train/a/1:0 train/b/1:1 test/a/1:t0 test/b/1:t1 c/1 2", "a/1:0 b/1:1 3:-1", "a/1:-1 a/2:-1",
    "train/a/1:0 train/b/1:1 val/a/1:t0 test/1", "train/a/1:0 train/b/1:1 val/a/1 test/b/1:t1",
    "Training/a/1:0 Training/b/1:1 Valid/a/1:t0",
    "train/a/1:0 train/b/1:1 train/a/up>../.. test/b/1:t1",
    "a/1:0 b/1:1 c>b c/1:2", "a/1:0 b/1:1 val/a/1:t0", "train/1:-1 test/1",
    "train/a/1:0 train/b/1:1 train/1:-1 c/1 test/1 2",
    "a/1:0 b/1:1 b/up>.. ../x/1 c>../x c/1:2",
    "a/1:0 b/1:1 a/.2 a/._1.png .c/1 a/.thumbnails/1 __MACOSX/a/1 run/views run/checkpoint.pt"])
def test_folders(names, tmp_path):
    """After : is the label, with t for a test image; names without are left out. > is a link."""
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


def test_images_of_nearly_one_size_are_kept_in_memory_and_patterns_are_too(tmp_path):
    write_pictures(tmp_path / "one/ant", 12), write_pictures(tmp_path / "one/bee", 18, seed=1)
    Image.effect_noise((36, 32), 90).save(tmp_path / "one/ant/005.png")
    Image.effect_noise((32, 40), 90).save(tmp_path / "one/ant/007.png")
    data, few = (clamp.load_data(str(tmp_path / "one"), "train", limit, 3) for limit in (None, 5))
    assert data.images.dtype == torch.uint8 and data.labels.tolist() == [0] * 12 + [1] * 18
    for file, image in zip(data.files, data.images, strict=True):  # the middle of the odd sizes
        expected = TF.center_crop(Image.open(file).convert("RGB"), [32, 32])
        assert torch.equal(image, TF.pil_to_tensor(expected))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))[:5]
    assert torch.equal(few.images, data.images[order]) and few.labels.equal(data.labels[order])
    for k, sizes in enumerate((TWO_SIZES, ((32, 257),))):
        write_pictures(tmp_path / str(k), 2, sizes)
        assert clamp.load_data(str(tmp_path / str(k)), "train").images is None
    train, again, test = (clamp.load_data("patterns", part) for part in ("train", "train", "test"))
    assert train.images.shape == (5000, 3, 32, 32) and torch.equal(train.images, again.images)
    assert len(torch.cat([train.images, test.images])[:, 0].unique(dim=0)) == 7000
    assert train.images.dtype == torch.uint8 and train.labels.bincount().min() == 833


def test_pictures_are_read_upright_in_rgb_on_mid_grey_or_refused(tmp_path):
    torch.manual_seed(0)
    noise, exif = TF.to_pil_image(torch.rand(4, 12, 16)), Image.Exif()

    def read(name, mode, **options):  # what clamp makes of a picture, and what Pillow does
        picture = noise.convert("RGB") if mode in ("P", "CMYK") else noise
        picture.convert(mode).save(tmp_path / name, **options)
        assert Image.open(tmp_path / name).mode == mode
        return clamp.read_image(tmp_path / name)[0], Image.open(tmp_path / name)

    for kind in "CMYK.jpg", "CMYK.tif", "1.png", "L.jpg", "P.png", "P.bmp", "RGB.webp":
        ours, picture = read(kind, kind.split(".")[0])
        assert torch.equal(ours, TF.pil_to_tensor(picture.convert("RGB")))
    for exif[0x0112], turn in enumerate((0, 3, 1, 5, 4, 6, 2), 2):  # numbers of Image.Transpose
        ours, picture = read("turned.png", "RGB", exif=exif)
        assert torch.equal(ours, TF.pil_to_tensor(picture.transpose(turn)))
    for mode, options in (("RGBA", {}), ("LA", {}), ("P", dict(transparency=bytes(range(256))))):
        ours, picture = read("transparent.png", mode, **options)
        *color, alpha = TF.pil_to_tensor(picture.convert("RGBA")).double()
        expected = 128 + (torch.stack(color) - 128) * alpha / 255
        assert alpha.std() > 50 and (ours - expected).abs().max() <= 1
    Image.fromarray(np.full((4, 4), 300, "uint16")).save(tmp_path / "16 bits.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    (tmp_path / "folder.png").mkdir(), (tmp_path / "text.png").write_text("<html>")
    for name, reason in (("16 bits.png", "more than 8 bits a channel; convert it to 8 bits$"),
                         ("float.tif", "more than 8 bits a channel; convert it to 8 bits$"),
                         ("folder.png", "Is a directory$"), ("text.png", "cannot identify image"),
                         ("missing.png", "No such file or directory$")):
        image, problem = clamp.read_image(tmp_path / name)
        assert image is None and re.match(f"{tmp_path / name}: {reason}", problem)


@pytest.mark.parametrize("sizes, n", [(ONE_SIZE, 45), (TWO_SIZES, 48)])  # in memory, streamed
def test_broken_pictures_are_left_out_and_named_once(sizes, n, tmp_path, capfd):
    data = tmp_path / "data"
    write_pictures(data / "ant", 24, sizes), write_pictures(data / "bee", 24, sizes, seed=1)
    broken = [data / name for name in ("ant/000.jpg", "bee/007.png", "bee/023.png")]
    for file, content in zip(broken, (broken[0].read_bytes()[:400], b"", b"<html>")):
        file.write_bytes(content)
    flags = ["--data", data, "--batch-size", "15"]
    train_once(tmp_path / "run", *flags)
    printed = capfd.readouterr().out
    assert f"{data}: {n} images of 2 classes" in printed
    assert [printed.count(f"unreadable: {file}: ") for file in broken] == [1, 1, 1]
    assert [record["unreadable"] for record in read_log(tmp_path / "run")] == [3, 3, 3]
    line = refusal(capfd, eval_linear, tmp_path / "run", "--batch-size", 15,
                   backbone=tiny_network().backbone)
    assert "3 images, named above, cannot be read" in line
    for file in data.rglob("*.*"):
        file.write_bytes(b"")
    line = refusal(capfd, clamp, *flags, "--out", tmp_path / "other")
    assert "000.jpg: cannot identify image file" in line


def test_streamed_views_come_from_the_right_picture_with_any_workers(tmp_path):
    for k, color in enumerate(torch.eye(3)):
        noisy = color.view(3, 1, 1) * (1 + torch.rand(40, 50 + 10 * k)) / 2
        TF.to_pil_image(noisy).save(tmp_path / f"{k}.png")
    (tmp_path / "3.png").touch()  # broken: 0.png takes its place
    augment = clamp.MultiViewAugment(16, 3, jitter_p=0, gray_p=0, blur_p=[0.0])
    batches, runs = list(enumerate(torch.tensor([[2, 0], [1, 3]]))), []
    for workers, first in (0, 0), (2, 0), (0, 1):  # the last begins with the second batch
        data = clamp.load_data(str(tmp_path), "train")
        stream = clamp.image_batches(data, batches[first:], augment.crop, CPU, workers, seed=5)
        runs.append(torch.stack(list(stream)))
        for (_, rows), x in zip(batches[first:], map(augment, runs[-1])):
            assert x.shape == (3, 2, 3, 16, 16) and (x.mean((3, 4)).argmax(2) == rows % 3).all()
        assert len(data.unreadable) == 1
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0][1:], runs[2])
    assert not torch.equal(runs[0][0, 0, 0], runs[0][0, 0, 1])  # views of an image differ


# -------- evaluation

def evaluate(run, *flags, **parts):
    return eval_linear.evaluate(eval_linear.parse_args([*map(str, (run, *flags))]), **parts)


def test_knn_equals_a_loop():
    torch.manual_seed(0)
    bank, labels = torch.randn(300, 4), torch.arange(300) % 3
    queries = bank + torch.randn(300, 4)
    cosine = F.cosine_similarity(queries[:, None], bank, dim=2)
    votes = [[sum(math.exp(c / 0.07) for c, y in sorted(zip(row, labels.tolist()))[-5:] if y == k)
              for k in range(3)] for row in cosine.tolist()]
    expected = 100 * (torch.tensor(votes).argmax(1) == labels).float().mean()
    assert clamp.knn_accuracy(bank, labels, queries, labels, k=5) == pytest.approx(expected)


def torch_logits(network, rates, x, labels):
    """Logits of x by a network that torch's SGD has trained, with a rate for each layer."""
    groups = [dict(params=layer.parameters(), lr=lr) for layer, lr in zip(network, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for _, rows in clamp.draw_batches(50, 20, range(3), seed=0):
        optimizer.zero_grad(), F.cross_entropy(network(x[rows]), labels[rows]).backward()
        optimizer.step(), schedule.step()
    return network(x).detach()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_probe_and_finetuning_equal_torch(dtype, tolerance, monkeypatch):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False))
    data = clamp.Data((255 * torch.rand(60, 3, 8, 8)).byte(), torch.arange(60) % 4)
    options = dict(size=8, device=CPU, dtype=dtype, workers=0)
    split = eval_linear.make_split(data, torch.randperm(60)[:50], backbone, options)
    args = eval_linear.parse_args("run --batch-size 20 --epochs 3".split())
    options = dict(classes=4, backbone=backbone, args=args, options=options)
    x, rates = (split.features - split.features.mean(0)) / split.features.std(0), [0.03, 0.3]
    for rate, logits in zip(rates, eval_linear.probe(split, split, rates, **options)):
        head = nn.Linear(5, 4)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        expected = torch_logits(nn.Sequential(head), [rate], x, split.labels)
        assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(clamp.MultiViewAugment, "crop", lambda _, images: images[:, None])
    monkeypatch.setattr(clamp.MultiViewAugment, "__call__",
                        lambda _, crops: clamp.normalize(crops[:, 0] / 255)[None])
    ours, = eval_linear.finetune(split, split, [0.4], **options)
    torch.manual_seed(args.seed)
    network = nn.Sequential(backbone[1], nn.Linear(5, 4))
    x = TF.normalize(data.images[split.rows] / 255, MEAN, STD).flatten(1)
    expected = torch_logits(network, [0.05 * 0.4, 0.4], x, split.labels)  # a slower backbone
    assert_close(ours, expected, rtol=10 * tolerance, atol=tolerance)


def test_labels_by_fraction_and_by_list(tmp_path):
    names, labels, first = tmp_path / "list", torch.tensor([0] * 40 + [1] * 80 + [2]), [4, 8, 1]
    data = clamp.Data(None, labels, np.array([f"{k}/{i:03}.jpg" for i, k in enumerate(labels)]))
    rows = torch.randperm(121)
    tenth = [row for k, row in enumerate(rows.tolist())
             if (labels[rows[:k]] == labels[row]).sum() < first[labels[row]]]
    names.write_text("002.jpg\n100.jpg\n")
    for part, kept in (None, rows.tolist()), (0.1, tenth), (str(names), [2, 100]):
        ours = eval_linear.choose_rows(data, rows, part).tolist()
        assert ours == [row for row in rows.tolist() if row in kept]
    data.files[3] = "2/002.jpg"  # two files of one name, and none of the other
    for few in rows[rows > 3], rows[rows > 100], rows[rows < 4]:
        refused("list: 2 names fit [012] training", eval_linear.choose_rows, data, few, str(names))


def test_without_labels_features_and_neighbours_are_written(tmp_path):
    images, data, run = (pictures(20, 64, 64) * 255).byte(), tmp_path / "data", tmp_path / "run"
    data.mkdir(), run.mkdir()
    files = [str(data / f"{k:02}.png") for k in range(20)]
    for image, file in zip(images, files):
        TF.to_pil_image(image).save(file)
    torch.manual_seed(0)
    untrained, backbone = (clamp.build_backbone("resnet18").eval() for _ in range(2))
    torch.save({"epoch": 4, "settings": vars(clamp.parse_args(["--data", str(data)])),
                "backbone": backbone.state_dict()}, run / "backbone.pt")
    assert evaluate(run, "--amp", "off") is None
    saved, picture = torch.load(run / "features.pt"), (run / "neighbours.png").read_bytes()
    x = TF.normalize(images / 255, MEAN, STD)
    features, others = backbone(x).detach(), untrained(x)
    assert_close(saved["features"], features, rtol=1e-4, atol=1e-4)
    assert saved["files"] == files and set(saved) == {"files", "features"}
    tiles = TF.pil_to_tensor(Image.open(run / "neighbours.png")).unfold(1, 66, 66).unfold(2, 66, 66)
    for row in tiles.permute(1, 2, 0, 3, 4)[..., 2:, 2:]:
        (image,), *shown = ([k for k in range(20) if images[k].equal(tile)] for tile in row)
        near = [F.cosine_similarity(x, x[[image]]).argsort(descending=True)[1:9].view(8, 1).tolist()
                for x in (features, others)]
        assert shown == [[], *near[0], [], *near[1]]  # after white tiles
    for flags in (["--random-init"], ["--labels", "0.1"], ["--augment"], ["--finetune"]):
        refused("the images have no labels", evaluate, run, *flags)
    assert tiles.shape[1:3] == (12, 19) and (run / "neighbours.png").read_bytes() == picture


def test_without_test_images_a_fifth_is_held_out(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 3)  # without labels
    write_pictures(tmp_path / "data/ant", 20), write_pictures(tmp_path / "data/bee", 20, seed=1)
    train_once(tmp_path / "run", "--data", tmp_path / "data")
    spy, few = mock.Mock(wraps=eval_linear.make_split), "--batch-size 16 --epochs 1".split()
    monkeypatch.setattr(eval_linear, "make_split", spy)
    for flags, epoch in ([], 3), (["--random-init"], 0):
        result = evaluate(tmp_path / "run", *few, *flags, backbone=tiny_network().backbone)
        assert [result[x] for x in ("n_train", "n_test", "epoch", "epochs")] == [32, 8, epoch, 3]
    train, test, *floor = (call.args[1].tolist() for call in spy.mock_calls)
    assert sorted(train + test) == [*range(3, 43)] and len(test) == 8 and floor == [train, test]


# -------- training

def train_once(out, *flags, **parts):
    args = clamp.parse_args([*TINY, "--out", str(out), *map(str, flags)])
    clamp.train(args, **{"network": tiny_network(), **parts})


def read_log(folder):
    """The lines of log.jsonl, without the time they took."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    views = [record.pop("seconds") * record.pop("views_per_second") for record in records]
    assert views == pytest.approx([round(x) for x in views]) and min(views) > 0
    return records


def assert_same_runs(whole, other):
    a, b = (torch.load(out / "checkpoint.pt") | torch.load(out / "backbone.pt")
            for out in (whole, other))
    for part in ("epoch", "network", "optimizer", "scaler", "backbone"):
        assert_close(a[part], b[part], rtol=0, atol=0)
    assert read_log(whole) == read_log(other) and len(read_log(whole)) == a["epoch"] == 3
    assert not list(other.glob("*.part"))


class FixedViews(clamp.MultiViewAugment):  # without random numbers, which processes draw apart
    def crop(self, images):
        return images

    def __call__(self, images):
        assert (self.size, self.crop_scale, self.jitter[0]) == (32, [0.2, 1.0], 0.4)  # the flags'
        x = clamp.normalize(images / 255)
        return torch.stack([x, x.roll(5, 3), x.flip(3)])


def train_share(out):
    """Differ from the other processes, and be refused; then train, with an interruption."""
    rank, images = int(os.environ["RANK"]), torch.zeros(42, 3, 32, 32, dtype=torch.uint8)
    for n, seed, names in (36 + rank, 0, "number of images"), (36, rank, "seed"):
        flags = f"--recipe small --batch-size 12 --seed {seed}".split()
        refused(f"the processes differ in {names}; give all of them the same", train_once, out,
                *flags, data=(images[:n], torch.arange(n)))
    assert not Path(out).exists()
    effects = [mock.DEFAULT] * 4 + [KeyboardInterrupt] + [mock.DEFAULT] * 6
    # DDP gives every process the first one's weights. Batch norm has each process's statistics.
    parts = dict(loss_fn=mock.Mock(wraps=clamp.packing_loss, side_effect=effects), optimizer=ADAM,
                 network=tiny_network(rank, norm=nn.Identity), augment=FixedViews)
    train = partial(train_once, out, *"--limit 36 --batch-size 12 --amp off".split(), **parts)
    pytest.raises(KeyboardInterrupt, train)
    save = clamp.save
    clamp.save = lambda *args: (time.sleep(0.3), save(*args))
    for name, divisor in ("ours", 1), ("theirs", 3):  # one step by LARS
        train_once(f"{out}-{name}", *"--limit 12 --batch-size 12 --epochs 1 --eta 0.01".split(),
                   "--amp", "off", loss_fn=lambda z: clamp.packing_loss(z) / divisor,
                   network=tiny_network(rank, norm=nn.Identity), augment=FixedViews)
        assert torch.load(f"{out}-{name}/backbone.pt")["epoch"] == 1  # in all processes
    clamp.command_line(train)


def test_three_processes_train_with_an_own_optimizer_as_a_loop_does(tmp_path):
    torchrun(3, "-c", f"import test_clamp; test_clamp.train_share('{tmp_path}/run')")
    network, numbers, drawn = tiny_network(norm=nn.Identity), [], []
    optimizer, images = ADAM(network.parameters()), clamp.load_data("patterns", "train", 36).images
    for step, rows in clamp.draw_batches(36, 12, range(3), seed=0):
        x = TF.normalize(images[rows] / 255, MEAN, STD)
        z = network(torch.cat([x, x.roll(5, 3), x.flip(3)])).unflatten(0, (3, 12))
        optimizer.zero_grad(), clamp.packing_loss(z).backward()
        scale = (step + 1) / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 6)) / 2
        optimizer.param_groups[0]["lr"] = 0.02 * scale
        optimizer.step()
        numbers.append(loop_loss(z.detach().double())[1]), drawn.append(rows.tolist())
    assert sorted(sum(drawn[:3], [])) == sorted(sum(drawn[3:6], [])) == [*range(36)]
    saved, record = torch.load(tmp_path / "run/checkpoint.pt"), read_log(tmp_path / "run")[2]
    assert_close(saved["network"], network.state_dict(), rtol=1e-4, atol=1e-5)
    for name in numbers[0]:
        assert record[name] == pytest.approx(sum(x[name].item() for x in numbers[6:]) / 3, rel=1e-3)
    # With 1/3 of the gradient, as after DDP in the authors' code, LARS moves weights as before.
    ours, theirs = (torch.load(f"{tmp_path}/run-{x}/checkpoint.pt")["network"]
                    for x in ("ours", "theirs"))
    for name, start in tiny_network(norm=nn.Identity).named_parameters():
        moved, share = ours[name] - start.detach(), 1 if start.ndim > 1 else 3
        assert moved.any()
        assert_close(moved / share, theirs[name] - start.detach(), rtol=1e-2, atol=1e-6)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    train_once(out := tmp_path_factory.mktemp("whole"))
    return out


def test_interrupted_streamed_run_ends_as_the_whole_one(tmp_path):
    whole, parts, photos = (tmp_path / name for name in ("whole", "parts", "photos"))
    write_pictures(photos, 96, TWO_SIZES)
    flags = ["--data", photos, "--amp", "fp16"]  # whose scaler has to be continued, too
    train_once(whole, *flags)
    stop, full = KeyboardInterrupt(), OSError(28, "No space left on device")
    for module, name, call, error, epoch in (  # an epoch has three steps, and replaces two files
            (clamp, "packing_loss", 2, stop, 0), (os, "replace", 1, stop, 0),
            (os, "replace", 2, stop, 0), (torch, "save", 2, full, 0), (os, "replace", 3, stop, 1),
            (torch, "save", 1, RuntimeError("writing failed"), 1), (os, "replace", 2, stop, 1)):
        effects = [mock.DEFAULT] * (call - 1) + [error]
        with mock.patch.object(module, name, wraps=getattr(module, name), side_effect=effects):
            raised = pytest.raises((KeyboardInterrupt, clamp.UserError), train_once, parts, *flags)
        if module is torch:
            words = f".part: cannot be written ({error}); is the disk full?"
            assert str(raised.value).startswith(f"{parts}/") and words in str(raised.value)
        assert torch.load(parts / "checkpoint.pt")["epoch"] == epoch
        refused("a run with another lr; give another --out", train_once, parts, *flags, "--lr", 9)
    train_once(parts, *flags, "--workers", 0)
    assert_same_runs(whole, parts)


def test_of_two_runs_that_begin_at_once_one_is_refused(whole_run, tmp_path):
    refused("another run is just beginning; give", train_once, tmp_path, optimizer=lambda p: (
        train_once(tmp_path) or torch.optim.SGD(p, 0.1)))  # the first one has found no checkpoint
    assert_same_runs(whole_run, tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pt"])
def test_damaged_checkpoint_is_named_and_kept(name, whole_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stranger = b"cos\nmkdir\n(Vexecuted\ntR."  # a pickle that calls os.mkdir("executed")
    for content in stranger, (whole_run / name).read_bytes()[:-1000]:
        Path(name).write_bytes(content)
        refused("checkpoint.pt: missing or damaged", train_once, tmp_path)
        refused("backbone.pt: missing, damaged", evaluate, tmp_path)
        assert Path(name).read_bytes() == content and not Path("executed").exists()


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_numbers_that_are_not_finite_stop_the_run(amp, tmp_path):
    def loss_fn(z):
        zero = z.square().mean() * (0 if next(calls) == 6 else 1)
        return zero.sqrt() if amp == "off" else zero / zero * zero  # NaN is a weight, or the loss
    calls, flags = itertools.count(1), ["--amp", amp]  # with fp16, a step by NaN is left out
    refused("epoch 2: .* not finite; .* another", train_once, tmp_path, *flags, loss_fn=loss_fn)
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 1


def test_own_images_in_memory_and_own_backbone_are_trained_and_evaluated(tmp_path, capsys):
    """Red and blue pictures are told apart by the features of any network."""
    images, labels = torch.full((80, 3, 32, 32), 40, dtype=torch.uint8), torch.arange(80) % 2
    images[torch.arange(80), 2 * labels] = 200
    network, args = tiny_network(), clamp.parse_args([*TINY, "--recipe", "small", "--limit", "70"])
    args.out, args.lr, args.seed = tmp_path, np.float64(args.lr), np.int64(0)  # as scripts may do
    clamp.train(args, network=network, data=(images, labels))
    assert re.search("(?s) 70 images of 2 classes(?!.*finished)", capsys.readouterr().out)
    assert read_log(tmp_path)[2]["train_knn"] == 100
    for flags in ([], ["--augment"], ["--random-init"]):
        result = evaluate(tmp_path, "--batch-size", "36", "--epochs", "5", *flags,
                          backbone=tiny_network().backbone, data=2 * [(images, labels)])
        assert result["top1"] == 100 and result["n_train"] == 80
    own, _ = eval_linear.load_backbone(tmp_path, backbone=tiny_network().backbone)
    assert torch.equal(own[0].weight, network.backbone[0].weight)
    refused("another backbone", eval_linear.load_backbone, tmp_path)
    refused("has the trained weights; pass a new one", evaluate, tmp_path, "--random-init",
            backbone=network.backbone, data=2 * [(images, labels)])
    refused("images from memory", evaluate, tmp_path, backbone=tiny_network().backbone)
    refused("give a pair of", evaluate, tmp_path, backbone=tiny_network().backbone,
            data=((images, labels), None))
    refused("give it a .backbone", clamp.train, args, network=nn.Flatten(), data=(images, labels))
    for out, recipe, data, words in (
            (tmp_path, "small", None, "holds a run with another data, own"),
            (tmp_path / "new", "small", (images / 255, labels), "give a pair of tensors, images"),
            (tmp_path / "new", "small", (images, labels.int()), "and labels int64"),
            (tmp_path / "new", "small", (images, labels[:50]), "give a pair of tensors"),
            (tmp_path / "new", "small", images, "give a pair of tensors"),
            (tmp_path / "new", "patterns", (images, labels), "name another one")):
        flags = "--limit", 70, "--recipe", recipe, "--data", "patterns"
        refused(words, train_once, out, *flags, data=data)
    assert not (tmp_path / "new").exists()


# -------- command line

def test_command_line_end_to_end_and_two_processes_evaluate_as_one(tmp_path):
    out, files = tmp_path / "run", {"views.png", "log.jsonl", "checkpoint.pt", "backbone.pt"}
    train = ["clamp.py", *TINY, "--epochs", "2", "--out", out]
    assert re.search("writing(.|\n)*finished; next: python eval_linear.py", run(*train).stdout)
    assert set(os.listdir(out)) == files and Image.open(out / "views.png").size == (70, 274)
    log, again = read_log(out), run(*train).stdout
    assert [line["epoch"] for line in log] == [1, 2] and {"loss", "lr", "train_knn"} <= {*log[0]}
    assert "already finished: " in again and read_log(out) == log
    error = run(*train, "--lr", "0.3", code=2).stderr
    assert re.fullmatch("clamp.py: error: .* another lr; give another --out\n", error)
    probe = ["eval_linear.py", out, *"--epochs 1 --amp off --limit 501 --lr 0.03".split()]
    run(*probe), run(*probe, "--random-init")
    torchrun(2, *probe), torchrun(2, *probe, "--augment"), torchrun(2, *probe, "--finetune")
    assert set(os.listdir(out)) == files | {"linear.jsonl", "neighbours.png"}
    lines = [json.loads(line) for line in (out / "linear.jsonl").read_text().splitlines()]
    assert [line.pop("settings")["random_init"] for line in lines] == [0, 1, 0, 0, 0]
    assert all((line["n_train"], line["n_test"]) == (501, 2000) for line in lines)
    assert lines[2] == pytest.approx(lines[0]) and lines[1]["top1"] != lines[0]["top1"]


def refusal(capfd, script, *argv, **parts):
    """The one line on stderr with which a script's command line refuses argv, exit status 2."""
    main = clamp.train if script is clamp else eval_linear.evaluate
    with pytest.raises(SystemExit) as stop:
        clamp.command_line(lambda: main(script.parse_args([*map(str, argv)]), **parts))
    line, = capfd.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and "error: " in line
    return line


@pytest.mark.parametrize("flags, words", [
    ("--batch-size 6000", "--batch-size 6000: must be at most 5000, the number of images"),
    ("--epochs -3", "--epochs: -3: give 1 or more"), ("--lr nan", "--lr: nan: give 0 or more"),
    ("--lr inf", "--lr: inf: give 0 or more"), ("--jitter 0 0 2 0", "--jitter: 2: give 0 to 1"),
    ("--projector abc", "--projector: invalid"), ("--frobnicate", "arguments: --frobnicate"),
    ("--recipe imagenet1k", "/imagenet: no images there; give patterns, cifar10, cifar100, or a"),
    ("--data {tmp}/empty", "--data {tmp}/empty: no images there"),
    ("--data {tmp}/data", "--data {tmp}/data: no training images of B"),
    ("--data {tmp}/pills", "val/ has no class folders, but there are some beside it; rename"),
    ("--data {tmp}/bus", "train/ has no class folders, but there are some beside it"),
    ("--data ", "--data: give a folder, or patterns, cifar10, cifar100"),
    ("--data cifar10", "--data cifar10: cannot download"), ("--out {tmp}/empty/x", "{tmp}/empty/x"),
    ("--device cuda", "no GPU for process 1; start fewer, or use --device cpu"),
    ("{run}/log.jsonl", "log.jsonl: missing, damaged"), ("{run} --labels 2", "2: give 1e-06 to 1"),
    ("{run} --labels nosuch", "nosuch: no such file"),
    ("{run} --limit 200", "--batch-size 256: must be at most 180, the images to train on")])
def test_bad_flags_give_one_line(flags, words, whole_run, tmp_path, capfd, monkeypatch):
    for name in ("data/train/a", "data/train/b", "data/test/B", "bus/car", "bus/train", "empty",
                 "pills/invalid", "pills/Valid"):
        write_pictures(tmp_path / name, name != "empty")
    (tmp_path / "empty/x").touch()
    before = {*tmp_path.rglob("*"), *whole_run.rglob("*")}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", mock.Mock(side_effect=OSError, url=""))
    if flags[:5] == "{run}":
        script, parts = eval_linear, {"backbone": tiny_network().backbone}
    else:
        script, parts, flags = clamp, {}, "--device cpu --out {tmp}/run " + flags
    flags, words = (x.format(tmp=tmp_path, run=whole_run) for x in (flags, words))
    assert words in refusal(capfd, script, *flags.split(" "), **parts)
    assert before == {*tmp_path.rglob("*"), *whole_run.rglob("*")}


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory; lower --batch-size or --size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--workers 0"),
    (RuntimeError("unable to open shared memory object </torch_7>"), "enlarge /dev/shm")])
def test_too_little_memory_gives_one_line(error, words, capfd, monkeypatch):
    monkeypatch.setattr(clamp, "train", mock.Mock(side_effect=error))
    assert words in refusal(capfd, clamp)
    pytest.raises(ZeroDivisionError, clamp.command_line, lambda: 1 / 0)  # with a traceback


def test_recipes_and_data_set_the_defaults(capsys):
    for recipe, expected in {
            "cifar10-published": dict(data="cifar10", views=16, batch_size=128, epochs=1000, lr=2.0,
                                      stem="cifar", projector=[2048, 256], radius_scale=7.0),
            "imagenet100": dict(arch="resnet50", epochs=200, lr=2.0, radius_scale=8.5, views=4),
            "imagenet1k": dict(epochs=100, lr=1.1, batch_size=512, projector=[8192, 8192, 512],
                               blur_p=[1.0, 0.1], solarize_p=[0.0, 0.2], max_reach=1.5, eta=1e-3),
            "patterns": {}, "small": {}, "photos": dict(size=64)}.items():
        args = vars(clamp.parse_args(["--recipe", recipe]))
        assert args == args | expected
        assert {name for name in args if args[name] is None} == {"limit", "compile"}
    for data, recipe in (("patterns", "patterns"), ("cifar10", "small"), ("cifar100", "small"),
                         ("./patterns", "photos"), ("my/cifar10", "photos"), ("/a", "photos")):
        args = clamp.parse_args(["--data", data])
        assert args.recipe == recipe and args.out == f"runs/{data.split('/')[-1]}"
        assert args.data == (data if recipe != "photos" else os.path.abspath(data))
    own = clamp.parse_args("--lr 1 --epochs 2 --crop-scale 1 .2 --no-zero-init".split())
    assert (own.recipe, own.lr, own.crop_scale, own.zero_init) == ("patterns", 1, [0.2, 1], False)
    own.projector.append(7), own.jitter.clear()  # leaves the recipes as they are
    again = clamp.parse_args([])
    assert (again.lr, len(again.jitter), again.projector) == (1.6, 4, [2048, 256])
    pytest.raises(SystemExit, clamp.parse_args, ["--help"])
    assert re.search(r"\nrecipe imagenet1k: .* 'lr': 1.1,", capsys.readouterr().out)
