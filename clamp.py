"""CLAMP: contrastive self-supervised learning as neural manifold packing, in one file.

Every image's augmented views form a small cloud on the unit sphere. The clouds are wrapped in
ellipsoids, ellipsoids that overlap repel, and the energy of that packing trains a ResNet without
labels. Method and published settings: arXiv 2506.13717.

    python clamp.py                      a laptop's CPU: drawn textures, nothing to download
    python clamp.py --data photos        your own folder of pictures
    python clamp.py --data cifar10       downloads it; an hour on two cores with bf16
    python clamp.py --recipe cifar10-published --out runs/published      one GPU, as published
    torchrun --nproc-per-node 8 clamp.py --recipe imagenet1k --data imagenet      one node
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        clamp.py --recipe imagenet1k --data imagenet     many nodes; --out on a shared disk

A run writes, into runs/<data>/ or --out:
    views.png        the augmented views, one image a row: look at it first
    settings.json    every flag's value
    log.jsonl        one line an epoch: loss, radius, neighbours, ..., now and then k-NN accuracy
    checkpoint.pt    everything needed to go on: the same command continues an unfinished run
    backbone.pt      the trained ResNet under torchvision's own key names, for eval_linear.py

The file reads in the order of the method: recipes, packing loss, augmentation, model, optimiser,
data, k-NN read-out, run folder, training loop, command line.
"""

import argparse
import io
import json
import math
import os
import sys
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# Recipes: the published settings (arXiv 2506.13717 and the authors' release), and three of ours
# (32 px, SGD without LARS, a laptop's CPU). Every key is also a flag.
# ---------------------------------------------------------------------------------------------

PUBLISHED = dict(  # for CIFAR-10
    data="cifar10", arch="resnet18", stem="small", zero_init=False, projector="2048-256", size=32,
    radius_scale=7.0, max_reach=1.5, views=16, batch_size=128, epochs=1000, warmup_epochs=10,
    lr=0.1, eta=1e-3, momentum=0.9, weight_decay=1e-6,  # lr: times batch / 256
    crop_scale=[0.08, 1.0], flip_p=0.5, jitter=[0.8, 0.8, 0.8, 0.2], jitter_p=0.8, gray_p=0.2,
    blur_kernel=3, blur_p=[0.5], solarize_p=[0.0], knn_every=10,
)
IMAGENET100 = PUBLISHED | dict(
    data=None, arch="resnet50", stem="imagenet", projector="8192-8192-512", size=224,
    radius_scale=8.5, views=4, batch_size=512, epochs=200, lr=2.0,
    jitter=[0.4, 0.4, 0.2, 0.1], blur_kernel=23, blur_p=[1.0, 0.1], solarize_p=[0.0, 0.2],
)
PATTERNS = PUBLISHED | dict(  # ours: three minutes on two CPU cores
    data="patterns", stem="imagenet", zero_init=True, views=8, batch_size=32, epochs=3,
    warmup_epochs=1, lr=1.6, eta=0.0, crop_scale=[0.2, 1.0], jitter=[0.4, 0.4, 0.2, 0.1],
    knn_every=1,
)
PICTURES = PATTERNS | dict(  # ours, for folders
    data=None, stem="medium", views=2, batch_size=128, epochs=16, lr=0.4, max_reach=1.2,
    knn_every=4,
)
RECIPES = {
    "patterns": PATTERNS,
    "pictures": PICTURES,
    "cifar10": PICTURES | dict(data="cifar10", epochs=12),
    "cifar10-published": PUBLISHED,
    "imagenet100": IMAGENET100,
    "imagenet1k": IMAGENET100 | dict(epochs=100, lr=1.1),
}

# ---------------------------------------------------------------------------------------------
# Packing loss. Needs torch alone.
# ---------------------------------------------------------------------------------------------


def rank_and_world():
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(x):
    """Sum of x over all processes; x itself where there is one."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


class AllReduceSum(torch.autograd.Function):
    """Sum over processes whose gradient is summed over processes too."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


def all_gather(x):
    """Rows of all processes [world * b, ...], in rank order, from each one's x [b, ...]."""
    if not dist.is_initialized():
        return x
    rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(rows, x.contiguous())
    return rows


def packing_loss(z, radius_scale=7.0, *, center=True, min_distance=1e-3, max_reach=1.5,
                 prefactor=0.25, eps_radius=1e-12, eps_energy=1e-6):
    """Logarithm of the overlap energy of the views' ellipsoids (arXiv 2506.13717):

        Z_i, L_i = mean and covariance of image i's views on the unit sphere
        r_i = radius_scale * sqrt(Tr(L_i) / min(m, d) + eps_radius)
        R_ij = min(r_i + r_j, max_reach)
        E = prefactor * sum over i != j of max(0, 1 - |Z_i - Z_j| / R_ij)^2
        loss = log(E + eps_energy)

    Args:
        z: embeddings [m, b, d] of m >= 2 views of b images, any float dtype. Computed in float32,
            or in float64 when z is; under autocast as well. (Where torch allows TF32, a GPU takes
            it for one product of the gradient.) With torch.distributed every process passes its
            own b images, the same number on each.
        radius_scale: r_s, how far an ellipsoid reaches beyond its cloud.
        center: subtract the mean of all embeddings before projecting onto the sphere.
        min_distance: centres closer than this do not interact (their direction is noise).
        max_reach: cap on r_i + r_j.
        prefactor: of the sum over ordered pairs; 1/4 in the release, 1/2 in the talk.
        eps_radius, eps_energy: added inside the square root and inside the logarithm.
        The defaults are the release's constants.

    Returns:
        loss: scalar, equal on all processes. Averaged over processes, as DDP does, its gradient
            is that of one process on the whole batch. First derivatives only.
        geometry: detached scalars over the whole batch: radius (mean r_i), neighbours (mean number
            of ellipsoids that one overlaps), with_neighbour (fraction that overlap any), spread
            (root mean square distance of the centres from their mean), participation_ratio (of
            the centres' covariance spectrum: 1 on a line, d where all directions count alike).

    Raises ValueError where z is not [m, b, d] with m >= 2.
    """
    if z.ndim != 3 or len(z) < 2:
        raise ValueError(f"packing_loss takes [views >= 2, images, d], not {list(z.shape)}")
    m, b, d = z.shape
    rank, world = rank_and_world()
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        if center:
            z = z - AllReduceSum.apply(z.sum((0, 1))) / (m * b * world)
        z = F.normalize(z, dim=-1)
        centers = z.mean(0)  # Z_i
        trace = (z - centers).square().sum((0, 2)) / (m - 1)  # Tr(L_i)
        radii = radius_scale * (trace / min(m, d) + eps_radius).sqrt()  # r_i

        # The gradient is written out, since autograd would keep b x b numbers: for each of this
        # process's images, dE/dZ_i and dE/dr_i, summed over the images of all ("ghosts", as in
        # molecular dynamics) a block of rows at a time.
        particles = torch.cat([centers, radii[:, None]], 1)
        ghosts = all_gather(particles.detach())
        y = ghosts[:, :-1] - ghosts[:, :-1].mean(0)  # differences are all that counts
        y_double = y.double()  # |x|^2 + |y|^2 - 2xy cancels for close pairs
        derivatives, sums = [], 0
        block = max(1, (2**24 if z.is_cuda else 2**20) // len(ghosts))  # 2**20: a CPU's cache
        end = (rank + 1) * b
        for start in range(rank * b, end, block):
            rows = slice(start, min(start + block, end))
            x, x_double = y[rows], y_double[rows]
            gram = x_double @ y_double.T
            squared = x_double.square().sum(1)[:, None] + y_double.square().sum(1) - 2 * gram
            squared = squared.to(z.dtype)
            reach = (ghosts[rows, -1:] + ghosts[:, -1]).clamp(max=max_reach)
            pairs = (squared > min_distance**2) & (squared < reach.square())
            pairs.diagonal(start).fill_(False)  # not with itself
            distance = squared.where(pairs, 1).sqrt()
            overlap = (1 - distance / reach).where(pairs, 0)
            stress = 2 * overlap / reach  # -d overlap^2 / d distance
            push = stress / distance  # along Z_i - Z_j
            shrink = (stress * (1 - overlap)).where(reach < max_reach, 0)  # d overlap^2 / d r_i
            # Of sum_j overlap_ij^2: d/dZ_i = -sum_j push_ij (x_i - y_j), and d/dr_i.
            derivatives.append(torch.cat([push @ y - push.sum(1, keepdim=True) * x,
                                          shrink.sum(1, keepdim=True)], 1))
            counts = pairs.sum(1)
            sums = sums + torch.stack([overlap.square().sum(), counts.sum(), (counts > 0).sum(),
                                       gram.square().sum()]).to(z.dtype)
        total_energy, neighbours, with_neighbour, gram_squared = all_reduce(sums)
        total = prefactor * total_energy + eps_energy
        # Zero, but with E's gradient, which autograd does not see in `total`. 2: i is in rows and
        # in columns; world: DDP will average.
        work = (particles * torch.cat(derivatives)).sum()
        surrogate = 2 * prefactor * world * (work - work.detach())
        loss = total.log() + surrogate / total
        variance = y.square().sum()
        geometry = {
            "radius": ghosts[:, -1].mean(),
            "neighbours": neighbours / (world * b),
            "with_neighbour": with_neighbour / (world * b),
            "spread": (variance / (world * b)).sqrt(),
            "participation_ratio": variance.square() / gram_squared.clamp(min=1e-30),
        }
    return loss, geometry


# ---------------------------------------------------------------------------------------------
# Augmentation. Batched on the images' device; every view of every image draws its own parameters.
# The operators take float [n, 3, h, w] in 0..1 and one parameter a picture, [n, 1, 1, 1], and agree
# with torchvision.transforms.functional on each picture to 1e-5 (in float32; TF32 is coarser). No
# constant is copied to the device on the way, which would wait for it. Needs rank_and_world, above.
# ---------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's networks


def draw_boxes(n, height, width, scale, device=None):
    """Crop boxes (top, left, height, width) [n, 4], drawn as torchvision's RandomResizedCrop does:
    area in `scale`, aspect in 3/4..4/3, the first of ten tries that fits, or else the centre."""
    area = height * width * torch.empty(n, 10, device=device).uniform_(*scale)
    aspect = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    center = round(min(height, width / ratio)), round(min(width, height * ratio))
    h = h.gather(1, first)[:, 0].where(fits.any(1), center[0])
    w = w.gather(1, first)[:, 0].where(fits.any(1), center[1])
    u, v = torch.rand(2, n, device=device)
    top = (u * (height - h + 1)).where(fits.any(1), (height - h) / 2).floor()
    left = (v * (width - w + 1)).where(fits.any(1), (width - w) / 2).floor()
    return torch.stack([top, left, h, w], 1)


def interpolation_weights(start, length, flip, size, full):
    """Resizing as a matrix [n, size, full]: pixels start..start+length of `full` become `size`,
    bilinear and antialiased, back to front where `flip`."""
    scale = (length / size)[:, None, None]
    out = torch.arange(size, device=start.device)
    out = torch.where(flip[:, None], size - 1 - out, out)[:, :, None]
    pixel = torch.arange(full, device=start.device) - start[:, None, None]  # in the crop's frame
    weights = (1 - (pixel + 0.5 - (out + 0.5) * scale).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def separable(x, rows, columns):
    """rows @ x @ columns^T for each picture and channel: any separable filter, as two products."""
    return rows[:, None] @ (x.flatten(1, 2) @ columns.mT).unflatten(1, x.shape[1:3])


def resized_crop(x, boxes, flip, size):
    """Crop boxes [n, 4], resize to size x size, flip left to right where `flip` [n] is true."""
    top, left, height, width = boxes.T
    upright = torch.zeros_like(flip)
    return separable(x, interpolation_weights(top, height, upright, size, x.shape[2]),
                     interpolation_weights(left, width, flip, size, x.shape[3]))


def luminance(x):
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def adjust_brightness(x, factor):
    return (x * factor).clamp(0, 1)


def adjust_contrast(x, factor):
    return luminance(x).mean((1, 2, 3), keepdim=True).lerp(x, factor).clamp(0, 1)


def adjust_saturation(x, factor):
    return luminance(x).lerp(x, factor).clamp(0, 1)


def adjust_hue(x, shift):
    """Turn the hue by `shift`, in turns of the colour circle (-0.5..0.5); back to RGB by
    channel = value - chroma * clamp(min(k, 4 - k), 0, 1), k = (5, 3, 1) + hue."""
    value, argmax = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    sector = torch.cat([g - b, b - r, r - g], 1).gather(1, argmax)
    hue = 2 * argmax + sector / chroma.where(chroma > 0, 1) + 6 * shift  # in sixths of a turn
    k = (hue + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, kernel):
    """Blur with `kernel` taps at reflecting borders, as a matrix for each picture; standard
    deviation sigma in pixels, zero leaves the picture as it is."""
    taps = torch.arange(kernel, device=x.device) - kernel // 2
    weights = (-0.5 * (taps / sigma.view(-1, 1).clamp(min=1e-3)).square()).softmax(1)

    def matrix(size):  # [n, size, size]
        source = torch.arange(size, device=x.device)[:, None] + taps
        source = (size - 1) - ((size - 1) - source.abs()).abs()  # reflected at both ends
        return (weights @ F.one_hot(source.T, size).to(x.dtype).flatten(1)).view(-1, size, size)

    return separable(x, matrix(x.shape[2]), matrix(x.shape[3]))


def normalize(x):
    return torch.stack([(c - mean) / std for c, mean, std in zip(x.unbind(-3), MEAN, STD)], -3)


class MultiViewAugment:
    """uint8 images [b, 3, H, W] -> float32 views [m, b, 3, size, size], on the images' device.

    Crop, flip, colour jitter, grey, blur, solarise, normalise, as in SimCLR and BYOL. `jitter` is
    the strength of brightness, contrast, saturation and hue. `blur_p` and `solarize_p` hold one
    probability for all views, or several that the views take in turn: (1.0, 0.1) for even and odd.
    The order of the jitter is drawn once a call. Random numbers come from torch's default
    generators. With torch.distributed every process passes its own b images and draws for the
    whole batch: seeded alike, N processes make the views that one would. For streamed pictures the
    work is divided: crop() in the loader, finish() here.
    """

    def __init__(self, size, views, crop_scale=(0.08, 1.0), flip_p=0.5, jitter=(0.8, 0.8, 0.8, 0.2),
                 jitter_p=0.8, gray_p=0.2, blur_kernel=3, blur_p=(0.5,), solarize_p=(0.0,)):
        self.size, self.views, self.crop_scale, self.flip_p = size, views, crop_scale, flip_p
        self.jitter, self.jitter_p, self.gray_p = jitter, jitter_p, gray_p
        self.blur_kernel, self.blur_p, self.solarize_p = blur_kernel, blur_p, solarize_p
        self.crop_one = v2.Compose([v2.RandomResizedCrop(size, crop_scale),
                                    v2.RandomHorizontalFlip(flip_p)])

    def __call__(self, images):
        b, _, height, width = images.shape
        n = self.views * b * rank_and_world()[1]
        boxes = self.own(draw_boxes(n, height, width, self.crop_scale, images.device))
        flip = self.own(torch.rand(n, device=images.device) < self.flip_p)
        pictures = images.float().repeat(self.views, 1, 1, 1)
        crops = resized_crop(pictures, boxes.flatten(0, 1), flip.flatten(), self.size)
        return self.photometric(crops.unflatten(0, (self.views, b)), self.draw(b, images.device))

    def crop(self, picture):
        """uint8 [3, H, W] -> uint8 crops [m, 3, size, size]: what a loader worker does."""
        return torch.stack([self.crop_one(picture) for _ in range(self.views)])

    def finish(self, crops):
        """The rest, batched on their device: uint8 crops [b, m, ...] -> views [m, b, ...]."""
        return self.photometric(crops.transpose(0, 1), self.draw(len(crops), crops.device))

    def own(self, drawn):
        """This process's part [m, b, ...] of what was drawn for all, [m * world * b, ...]."""
        rank, world = rank_and_world()
        return drawn.unflatten(0, (self.views, world, -1))[:, rank]

    def draw(self, b, device=None):
        """Photometric parameters of m views of b images: a dict of [m, b] tensors, but jitter
        [4, m, b] and order, a permutation of the four that the whole batch shares."""
        def uniform(low, high):
            n = self.views * b * rank_and_world()[1]
            return self.own(torch.empty(n, device=device).uniform_(low, high))

        def chance(p):  # p: one probability, or several that the views take in turn
            return torch.stack([row < p[k % len(p)] for k, row in enumerate(uniform(0, 1))])

        jittered = chance([self.jitter_p])
        factors = [uniform(max(0, 1 - s), 1 + s).where(jittered, 1) for s in self.jitter[:3]]
        shift = uniform(-self.jitter[3], self.jitter[3]).where(jittered, 0)
        return {
            "jitter": torch.stack([*factors, shift]),
            "order": torch.randperm(4).tolist(),  # of brightness, contrast, saturation, hue
            "gray": chance([self.gray_p]),
            "sigma": uniform(0.1, 2.0).where(chance(self.blur_p), 0),
            "solarize": chance(self.solarize_p),
        }

    def photometric(self, crops, drawn):
        """Colours, blur and normalisation of crops in 0..255 [m, b, 3, size, size], as drawn."""
        # [m, b] -> [m * b, 1, 1, 1]; jitter keeps its leading 4
        each = {k: v.reshape(*v.shape[:-2], -1, 1, 1, 1) for k, v in drawn.items() if k != "order"}
        adjust = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue
        pictures = crops.flatten(0, 1)
        # On a CPU a few pictures at a time, which stay in its cache: twice as fast at 224 px.
        chunk = len(pictures) if crops.is_cuda else max(1, 2**20 // pictures[0].numel())
        parts = []
        for start in range(0, len(pictures), chunk):
            rows = slice(start, start + chunk)
            x = pictures[rows] / 255
            for k in drawn["order"]:
                if self.jitter_p and self.jitter[k]:
                    x = adjust[k](x, each["jitter"][k, rows])
            if self.gray_p:
                x = torch.where(each["gray"][rows], luminance(x), x)
            if any(self.blur_p):
                x = gaussian_blur(x, each["sigma"][rows], self.blur_kernel)
            if any(self.solarize_p):
                x = torch.where(each["solarize"][rows] & (x >= 0.5), 1 - x, x)
            parts.append(normalize(x))
        return torch.cat(parts).view(crops.shape)


# ---------------------------------------------------------------------------------------------
# Model: a torchvision ResNet without its classifier, and a projector that is dropped afterwards.
# ---------------------------------------------------------------------------------------------


def build_backbone(arch, stem="imagenet", zero_init=False):
    """torchvision's `arch` with an identity for `fc`: images [n, 3, h, w] -> features [n, 512] or
    [n, 2048]. The stems "small" (3x3 convolution of stride 1, no max-pool) and "medium" (stride 2,
    no max-pool) are for images of 32 px: 4 and 2 px are left at the end, of "imagenet" 1.
    zero_init: each residual branch starts at zero, by its last batch norm (arXiv 1706.02677)."""
    backbone = getattr(torchvision.models, arch)(zero_init_residual=zero_init)
    backbone.num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if stem != "imagenet":
        stride = 1 if stem == "small" else 2
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone


def build_projector(features, widths):
    """Linear-ReLU-...-Linear from `features` through `widths`, such as "2048-256"."""
    sizes = [features, *map(int, widths.split("-"))]
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# ---------------------------------------------------------------------------------------------
# Optimiser
# ---------------------------------------------------------------------------------------------


class LARS(torch.optim.SGD):
    """SGD with momentum that first scales the gradient, with weight decay, of each tensor by
    eta * |w| / |g| (arXiv 1708.03888). Tensors of one dimension (biases, batch norm) get neither
    scaling nor decay. eta = 0: plain SGD."""

    def __init__(self, params, lr, eta=1e-3, momentum=0.9, weight_decay=0.0):
        super().__init__(params, lr, momentum)  # no weight decay, which would take all tensors
        self.eta, self.decay = eta, weight_decay

    @torch.no_grad()
    def step(self):
        weights = [p for group in self.param_groups for p in group["params"]
                   if p.ndim > 1 and p.grad is not None]
        grads = [p.grad for p in weights]
        torch._foreach_add_(grads, weights, alpha=self.decay)
        if self.eta:
            w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, grads))
            ratio = (self.eta * w / g).where((w > 0) & (g > 0), 1)
            torch._foreach_mul_(grads, ratio.unbind())
        super().step()


def lr_scale(step, warmup, total):
    """Factor on the peak learning rate: linear over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return min(1, (step + 1) / warmup)  # warmup may be a fraction
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# ---------------------------------------------------------------------------------------------
# Data: decoded once where it fits in memory, otherwise streamed from its files.
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something that the user can put right; the message says how. Anything below may raise it."""


@dataclass
class Data:
    labels: torch.Tensor  # int64 [n]; -1 where there is none
    images: torch.Tensor | None = None  # uint8 [n, 3, H, W]; None: stream the files
    files: list | None = None  # paths [n]; None for a data set by name
    unreadable: set = field(default_factory=set)  # files that could not be decoded


def wave(t):
    return torch.cos(2 * math.pi * t)


def line(t):
    """1 near whole numbers, 0 between."""
    return (2.4 - 16 * (t - t.round()).abs()).sigmoid()


TEXTURES = {  # u, v [n, h, w]: turned coordinates in periods -> brightness, in any range
    "stripes": lambda u, v: wave(u),
    "checks": lambda u, v: (4 * wave(u / 2) * wave(v / 2)).tanh(),
    "dots": lambda u, v: ((wave(u) + wave(v) - 1) * 4).sigmoid(),
    "grid": lambda u, v: torch.maximum(line(u), line(v)),
    "rings": lambda u, v: wave(torch.hypot(u, v)),
    "zigzag": lambda u, v: wave(u + (v - v.round()).abs()),
    "rays": lambda u, v: torch.cos(8 * torch.atan2(v, u)),
    "hexagons": lambda u, v: (-2.4 - 4 * wave(u) - 8 * wave(u / 2) * wave(0.75**0.5 * v)).sigmoid(),
    "bricks": lambda u, v: torch.maximum(line(u), line(v / 2 + 0.5 * (u.floor() % 2))),
    "spiral": lambda u, v: torch.cos(math.pi * torch.hypot(u, v) + 4 * torch.atan2(v, u)),
}


def draw_patterns(n, seed, size=32):
    """n grey textures of ten kinds in turn: images uint8 [n, 3, size, size], labels [n]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    labels = torch.arange(n) % len(TEXTURES)
    side = torch.arange(size) - size / 2
    x, y = side + uniform(-8, 8), side[:, None] + uniform(-8, 8)
    angle, period = uniform(0, 2 * math.pi), uniform(5, 8)
    u = (x * angle.cos() + y * angle.sin()) / period
    v = (y * angle.cos() - x * angle.sin()) / period
    images = torch.empty(n, size, size)
    for k, texture in enumerate(TEXTURES.values()):
        images[k::len(TEXTURES)] = texture(u[k::len(TEXTURES)], v[k::len(TEXTURES)])
    images = images - images.mean((1, 2), keepdim=True)
    images = images / images.std((1, 2), keepdim=True) * uniform(0.08, 0.25)
    images = images + uniform(0.4, 0.6)
    images += uniform(0, 0.08) * torch.randn(n, size, size, generator=generator)
    images = (images.clamp(0, 1) * 255).byte()
    return images[:, None].expand(-1, 3, -1, -1).contiguous(), labels


DATASETS = ("patterns", "cifar10", "cifar100", "stl10")


def load_data(name, split="train", data_dir="data", limit=None, seed=0, resident_gb=4.0):
    """Load a data set by name, or a folder of pictures by path.

    Args:
        name: one of DATASETS, or a folder with train/<class>/ (and test/ or val/ beside it), or
            a folder of pictures without labels; subfolders are searched.
        split: "train", "test", or "pretrain": train, with the unlabelled images where there are.
        limit: keep the first `limit` images of a shuffle seeded with `seed`.
        resident_gb: files of one size, up to 256 px, that take at most this much are decoded.

    Returns Data. Raises UserError where there is nothing to read.
    """
    if name == "patterns":
        images, labels = draw_patterns(*((2000, 1) if split == "test" else (5000, 0)))
    elif name in DATASETS:
        images, labels = download(name, split, data_dir)
    else:
        images, labels = find_pictures(Path(name), split)
    if limit and limit < len(labels):
        kept = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:limit]
        images = images[kept] if torch.is_tensor(images) else [images[i] for i in kept]
        labels = labels[kept]
    if torch.is_tensor(images):
        return Data(labels, images)
    return decode(images, labels, resident_gb)


def download(name, split, root):
    """CIFAR-10, CIFAR-100 or STL-10 through torchvision, which checks what it downloads."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank and dist.is_initialized():
        dist.barrier()  # one process of each node downloads
    source = getattr(torchvision.datasets, name.upper())
    try:
        if name == "stl10":
            part = "train+unlabeled" if split == "pretrain" else split
            data = source(root, part, download=True)
            images, labels = torch.from_numpy(data.data), data.labels
        else:
            data = source(root, train=split != "test", download=True)
            images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data {name}: cannot download to {root}/ ({error}); check the network, "
                        f"or put {source.url} there") from None
    if not local_rank and dist.is_initialized():
        dist.barrier()
    return images.contiguous(), torch.as_tensor(labels, dtype=torch.int64)


def find_pictures(path, split):
    """Files and labels below path/train, path/test or path/val; or below path, without labels."""
    if not path.is_dir():
        raise UserError(f"--data {path}/: no such folder, and not one of {', '.join(DATASETS)}")
    labelled = (path / "train").is_dir()
    root = path / "train" if labelled else path
    classes = sorted(f.name for f in root.iterdir() if f.is_dir() and f.name[0] != ".")
    if split == "test":
        root = next((path / part for part in ("test", "val") if (path / part).is_dir()), None)
        if root is None:
            raise UserError(f"--data {path}: no test/ or val/ folder in it; evaluation needs "
                            "train/<class>/ and test/<class>/")
    files = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        files += [os.path.join(folder, name) for name in names
                  if name.lower().endswith(IMG_EXTENSIONS) and name[0] != "."]
    if not files:
        raise UserError(f"--data {path}: no pictures below {root} ({' '.join(IMG_EXTENSIONS)})")
    files.sort()
    labels = torch.full((len(files),), -1)
    if labelled:
        index = {name: k for k, name in enumerate(classes)}
        labels = torch.tensor([index.get(Path(f).relative_to(root).parts[0], -1) for f in files])
    return files, labels


def read_picture(file):
    """uint8 RGB [3, H, W], whatever the file's mode; None where it cannot be decoded."""
    try:
        with Image.open(file) as picture:
            if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
                picture = picture.point(lambda value: value / 256)
            return v2.functional.pil_to_tensor(picture.convert("RGB"))
    except Exception:  # Pillow raises many kinds
        return None


def report_unreadable(files):
    if rank_and_world()[0] == 0:
        for file in sorted(files):
            tqdm.write(f"{file}: cannot be decoded, left out", file=sys.stderr)


def decode(files, labels, resident_gb):
    """Data of the files: to be streamed where they differ in size or are too large."""
    kept, unreadable = [], set()
    bar = tqdm(files, "decoding", unit="image", leave=False, disable=rank_and_world()[0] > 0)
    for k, file in enumerate(bar):
        picture = read_picture(file)
        if picture is None:
            unreadable.add(file)
            continue
        fits = picture.nbytes * len(files) <= resident_gb * 2**30 and max(picture.shape) <= 256
        if not fits or (kept and picture.shape != images.shape[1:]):
            return Data(labels, files=files)
        if not kept:
            images = picture.new_empty(len(files), *picture.shape)
        images[len(kept)] = picture
        kept.append(k)
    if not kept:
        raise UserError(f"--data: none of {len(files)} pictures such as {files[0]} can be decoded")
    report_unreadable(unreadable)
    return Data(labels[kept], images[:len(kept)], [files[k] for k in kept], unreadable)


class CenterView:
    """One normalised view, the same each time: shorter side to 8/7 size, then the centre; pictures
    of size x size stay whole. For evaluation; the same methods as MultiViewAugment, without m."""

    def __init__(self, size):
        self.size = size
        self.resize = v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)])

    def __call__(self, images):
        return self.finish(self.crop(images))

    def crop(self, images):
        """uint8 [..., 3, H, W] -> uint8 [..., 3, size, size]."""
        whole = images.shape[-2:] == (self.size, self.size)
        return images if whole else self.resize(images)

    def finish(self, crops):
        return normalize(crops / 255)


def crop_files(rows, files, crop, seed):
    """In a loader worker: crops of the files in `rows`, drawn from the seed and the file's number,
    whichever process does it. The next file stands in for one that cannot be decoded."""
    crops, unreadable = [], set()
    with torch.random.fork_rng(devices=[]):
        for row in rows:
            torch.default_generator.manual_seed(hash((seed, row)))  # the CPU's alone
            while (picture := read_picture(files[row])) is None:
                unreadable.add(files[row])
                if len(unreadable) == len(files):
                    raise UserError(f"--data: {files[row]} and all other pictures are gone")
                row = (row + 1) % len(files)
            crops.append(crop(picture))
    return torch.stack(crops), unreadable


def view_batches(data, batches, augment, device, workers=0, seed=0):
    """Yield augment's views of the images in each row of `batches` (indices [steps, b]). Images in
    memory are augmented on their device; files are decoded once and cropped by loader workers.
    Those that cannot be decoded are reported, and added to data.unreadable, after the last batch:
    take them all."""
    if data.images is not None:
        for rows in batches:
            yield augment(data.images[rows.to(data.images.device, non_blocking=True)])
        return
    # The data set is the list of batches; collate_fn, in a worker, turns each into crops.
    loader = torch.utils.data.DataLoader(
        [rows.tolist() for rows in batches], batch_size=None, num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=partial(crop_files, files=data.files, crop=augment.crop, seed=seed))
    found = set()
    for crops, unreadable in loader:
        yield augment.finish(crops.to(device, non_blocking=True))
        found |= unreadable
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, found)
        found = set().union(*everyones)
    report_unreadable(found - data.unreadable)
    data.unreadable |= found


# ---------------------------------------------------------------------------------------------
# Processes, precision, features and the k-NN read-out; eval_linear.py shares them.
# ---------------------------------------------------------------------------------------------


def start_processes(device="auto"):
    """Join torchrun's other processes, if it started this one. Returns this process's device."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--device cuda: no GPU for process {local_rank + 1}, there are "
                            f"{torch.cuda.device_count()}; --device cpu, or lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)


def autocast_dtype(amp, device):
    """The dtype of --amp; "auto" is bf16 where the hardware multiplies it, fp16 on older GPUs."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif amp == "auto":
        amp = "bf16" if torch.cpu._is_avx512_bf16_supported() else "off"
    if amp == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise UserError("--amp fp16: this CPU does not multiply it; use bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def embed(network, x, dtype):
    """network's output float32 [..., d] for pictures x [..., 3, h, w], autocast to dtype."""
    flat = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return network(flat).float().unflatten(0, x.shape[:-3])


@torch.no_grad()
def extract_features(backbone, data, rows, size, device, dtype, workers=0, desc="features"):
    """Features float32 [n, f] of the images `rows` [n] by the backbone, which is in eval mode, and
    the rows that could be read. The images are divided among processes, which all take rank 0's
    batch norm statistics; each returns all features."""
    rank, world = rank_and_world()
    for statistic in backbone.buffers() if world > 1 else []:  # on CPUs, each process's own so far
        dist.broadcast(statistic, 0)
    n = len(rows)
    share = rows[torch.arange(-(-n // world) * world).view(-1, world)[:, rank] % n]
    batches = share.split(512)
    views = view_batches(data, batches, CenterView(size), device, workers)
    bar = tqdm(views, desc, len(batches), unit="batch", disable=rank > 0, leave=False)
    features = all_gather(torch.cat([embed(backbone, x, dtype) for x in bar]))
    features = features.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:n]
    if data.images is None:
        read = torch.tensor([data.files[row] not in data.unreadable for row in rows])
        features, rows = features[read.to(device)], rows[read]
    return features, rows


def knn_accuracy(bank, bank_labels, queries=None, labels=None, k=20):
    """Accuracy in % of a k-nearest-neighbour vote weighted by exp(cosine / 0.07) (arXiv
    1805.01978). Without queries, each row of the bank is classified by the others."""
    bank = F.normalize(bank)
    alone = queries is None
    queries, labels = (bank, bank_labels) if alone else (F.normalize(queries), labels)
    correct = 0
    for start in range(0, len(queries), 1024):
        cosine = queries[start:start + 1024] @ bank.T
        if alone:
            cosine.diagonal(start).fill_(-1)
        cosine, nearest = cosine.topk(min(k, len(bank) - alone))
        votes = F.one_hot(bank_labels[nearest]) * (cosine / 0.07).exp()[:, :, None]
        correct += (votes.sum(1).argmax(1) == labels[start:start + 1024]).sum().item()
    return 100 * correct / len(queries)


# ---------------------------------------------------------------------------------------------
# Run folder
# ---------------------------------------------------------------------------------------------


def save(path, content):
    """Write whole or not at all: a run that is killed meanwhile keeps the file before."""
    part, memory = Path(f"{path}.part"), io.BytesIO()
    torch.save(content, memory)  # straight to a full disk, it would not say what is wrong
    try:
        with open(part, "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); the epoch before is kept: "
                        "make room and give the same command again") from None


def load(path):
    """What save() wrote, on the CPU. Runs no code from the file; raises many kinds of exception."""
    if zipfile.ZipFile(path).testzip():
        raise ValueError("damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(settings):
    """The checkpoint in the run folder, or None; raises UserError where it cannot be continued."""
    path = Path(settings["out"], "checkpoint.pt")
    # Where torchrun has restarted this process, --fresh was meant for the first start.
    fresh = settings["fresh"] and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if fresh:
        return None
    if not path.exists():
        if path.with_name("backbone.pt").exists():
            raise UserError(f"{path.parent}/: has a backbone.pt, but no checkpoint.pt to continue; "
                            "--fresh starts over, another --out keeps it")
        return None
    try:
        checkpoint = load(path)
        saved = checkpoint["settings"]
    except Exception:  # torch.load raises many kinds
        raise UserError(f"{path}: not a checkpoint of clamp.py, or a damaged one; --fresh starts "
                        "over, another --out keeps it") from None
    free = {"out", "fresh", "recipe", "device", "compile", "workers", "resident_gb", "data_dir",
            "knn_every"}  # what may differ
    for name in sorted(settings.keys() - free):
        if saved.get(name) != settings[name]:
            flag = "the loss" if name == "loss" else f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {settings[name]}, but {saved.get(name)} in the run in "
                            f"{path.parent}/: --fresh starts it over, another --out keeps it")
    return checkpoint


def save_backbone(out, checkpoint):
    """Write the part of a checkpoint that is kept after training."""
    kept = "arch", "stem", "size", "data", "radius_scale", "max_reach"
    weights = {name.removeprefix("backbone."): weight
               for name, weight in checkpoint["network"].items() if name.startswith("backbone.")}
    save(out / "backbone.pt", {k: checkpoint["settings"][k] for k in kept} | {
        "epoch": checkpoint["epoch"], "mean": MEAN, "std": STD, "backbone": weights})


def save_views(views, path):
    """A picture of up to 8 views [m, b, 3, s, s] of 8 images, one image a row."""
    grid = views[:8, :8].transpose(0, 1).flatten(0, 1).cpu()
    grid = grid * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torchvision.utils.save_image(grid, path, nrow=min(8, len(views)))


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train(args, loss_fn=packing_loss):
    """Train as args (from parse_args) say and write the run folder args.out.

    loss_fn(z, radius_scale) -> (loss, geometry): z float32 [m, b, d], this process's images;
    geometry, a dict of scalars to show and log, may be empty. packing_loss itself, but no wrapper
    of it, gets args.max_reach too.

    Raises UserError where the data or an earlier run in args.out do not fit, where the run
    diverges and where it cannot be saved.
    """
    device = start_processes(args.device)
    dtype = autocast_dtype(args.amp, device)
    rank, world = rank_and_world()
    main, out = rank == 0, Path(args.out)
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {world} processes")
    settings = vars(args) | {"loss": getattr(loss_fn, "__name__", type(loss_fn).__name__)}
    if loss_fn is packing_loss:
        loss_fn = partial(packing_loss, max_reach=args.max_reach)
    checkpoint = load_checkpoint(settings)
    start = checkpoint["epoch"] if checkpoint else 0
    if all_reduce(torch.tensor(start, device=device)) != start * world:
        raise UserError(f"--out {out}: its checkpoint.pt is not the same to all processes; name a "
                        "folder on a disk that all nodes share")
    if start == args.epochs:
        if main:
            save_backbone(out, checkpoint)  # which a kill may have forestalled
            print(f"{out}/ is finished ({start} epochs); --fresh trains anew, --out elsewhere")
        return

    data = load_data(args.data, "pretrain", args.data_dir, args.limit, args.seed, args.resident_gb)
    n = len(data.labels)
    if args.batch_size > n:
        raise UserError(f"--batch-size {args.batch_size}: only {n} images in {args.data}; lower it")
    if checkpoint and checkpoint["images"] != n:
        raise UserError(f"--data {args.data}: {n} images, but {checkpoint['images']} in the run in "
                        f"{out}/: --fresh starts it over, another --out keeps it")
    if data.images is not None:
        data.images = data.images.to(device)
    augment = MultiViewAugment(args.size, args.views, args.crop_scale, args.flip_p, args.jitter,
                               args.jitter_p, args.gray_p, args.blur_kernel, args.blur_p,
                               args.solarize_p)
    shuffle = torch.Generator().manual_seed(args.seed)
    labelled = (data.labels >= 0).nonzero()[:, 0]  # labels are for the k-NN read-out alone
    labelled = labelled[torch.randperm(len(labelled), generator=shuffle)[:5000]]

    torch.manual_seed(args.seed)
    backbone = build_backbone(args.arch, args.stem, args.zero_init)
    projector = build_projector(backbone.num_features, args.projector)
    network = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
    if device.type == "cuda" and world > 1:  # CPUs have no synchronised batch norm
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device, memory_format=torch.channels_last)
    watched = [t for t in network.state_dict().values() if t.is_floating_point()]
    optimizer = LARS(network.parameters(), args.lr, args.eta, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    log = []
    if checkpoint:
        log = checkpoint["log"]
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty without fp16
            scaler.load_state_dict(checkpoint["scaler"])
    if args.compile:
        network.compile()
    model = nn.parallel.DistributedDataParallel(network) if dist.is_initialized() else network

    steps = n // args.batch_size
    views_per_step = args.views * args.batch_size
    if main:
        out.mkdir(parents=True, exist_ok=True)
        if not checkpoint:
            for old in ("checkpoint.pt", "backbone.pt", "log.jsonl", "linear*.json",
                        "geometry*.json"):
                for file in out.glob(old):
                    file.unlink()
        (out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
        print(f"recipe {args.recipe}, {args.data}: {n} images "
              f"{'streamed' if data.images is None else 'in memory'}, {steps} steps an epoch of "
              f"{args.batch_size} x {args.views} views of {args.size} px; {args.arch}, {args.stem} "
              f"stem; {world} x {device.type}, {str(dtype)[6:]}; "
              f"{f'continuing after epoch {start} in' if start else 'writing'} {out}/", flush=True)
    with tqdm(total=args.epochs * steps * views_per_step, initial=start * steps * views_per_step,
              unit="view", unit_scale=True, disable=not main, mininterval=0.5) as bar:
        for epoch in range(start, args.epochs):
            started = time.time()
            # Seeded by the epoch: a continued run draws what an uninterrupted one would have.
            seed = 10_000 * args.seed + epoch
            torch.manual_seed(seed)
            shuffle.manual_seed(seed)
            order = torch.randperm(n, generator=shuffle)[:steps * args.batch_size]
            share = order.view(steps, world, -1)[:, rank]
            batches = view_batches(data, share, augment, device, args.workers, seed)
            model.train()
            history = []
            for step, views in enumerate(batches):
                if main and epoch == step == 0:
                    save_views(views, out / "views.png")
                lr = args.lr * args.batch_size / 256 * lr_scale(
                    epoch * steps + step, args.warmup_epochs * steps, args.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss, geometry = loss_fn(embed(model, views, dtype), args.radius_scale)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                metrics = {"loss": loss.detach(), **geometry}  # the bar shows the first three
                values = [torch.as_tensor(v, device=device).float() for v in metrics.values()]
                history.append(torch.stack(values))
                # Some 20 times an epoch: to read a number is to wait for the GPU.
                if step % (steps // 20 + 1) == 0 or step + 1 == steps:
                    shown = dict(zip(list(metrics)[:3], history[-1].tolist()), lr=lr)
                    bar.set_description(f"epoch {epoch + 1}/{args.epochs}", refresh=False)
                    bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
                    # In fp16 a loss may overflow: GradScaler skips that step.
                    loss_ok = scaler.is_enabled() or math.isfinite(shown["loss"])
                    norms = torch.stack(torch._foreach_norm(watched))
                    if not loss_ok or not norms.isfinite().all():
                        raise UserError(f"step {epoch * steps + step + 1}: {bar.postfix}: the loss "
                                        f"or a weight is not finite; {out}/ keeps epoch {epoch}; "
                                        "start over with a lower --lr, or --amp off")
                bar.update(views_per_step)

            history = torch.stack(history)
            finite = history.isfinite().all(1)  # fp16 skips a step that is not
            if not finite.any():
                raise UserError(f"epoch {epoch + 1}: no step was finite; {out}/ keeps the epoch "
                                "before; start over with --amp bf16 or off")
            means = history[finite].mean(0).tolist()
            record = {"epoch": epoch + 1, **dict(zip(metrics, means)), "lr": lr}
            if data.unreadable:
                record["unreadable"] = len(data.unreadable)
            last = epoch + 1 == args.epochs
            if len(labelled) > 1 and (last or (epoch + 1) % args.knn_every == 0):
                features, rows = extract_features(backbone.eval(), data, labelled, args.size,
                                                  device, dtype, args.workers, "k-NN")
                record["knn"] = knn_accuracy(features, data.labels[rows].to(device))
            record["seconds"] = round(time.time() - started, 1)
            log.append(record)
            if main:
                shown = [f"{k} {record[k]:.3g}" for k in list(metrics)[:3]]
                if "knn" in record:
                    shown.append(f"20-NN {record['knn']:.1f} % of {len(rows)} training images")
                bar.write(f"epoch {epoch + 1}: " + ", ".join(shown))
                (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
                checkpoint = {
                    "epoch": epoch + 1, "images": n, "settings": settings, "log": log,
                    "network": network.state_dict(), "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict()}
                save(out / "checkpoint.pt", checkpoint)
                save_backbone(out, checkpoint)
    if main:
        hint = f"; next: python eval_linear.py {out}" if len(labelled) > 1 else ""
        print(f"finished {out}/backbone.pt{hint}")


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Help with defaults, a line a flag; raises UserError."""

    def __init__(self, prog, **options):
        super().__init__(prog, usage=f"{prog} [--flag value ...]", allow_abbrev=False, **options,
                         formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(
                             prog, max_help_position=32, width=120))

    def error(self, message):
        raise UserError(message)


def number(kind, low, high=sys.float_info.max):
    """An argparse type: a finite number of `kind` within low..high."""
    def convert(text):
        if not low <= kind(text) <= high:
            endless = high == sys.float_info.max
            limits = f"a number from {low} up" if endless else f"within {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return kind(text)

    convert.__name__ = kind.__name__  # for argparse's message
    return convert


def data_name(text):
    """A data set's name, or a folder's: photos/ is photos, but cifar10/ is not the data set."""
    folder = str(Path(text))
    return text if text in DATASETS else folder + "/" * (folder in DATASETS)


def add_machine_flags(parser):
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="where to compute; auto: cuda where there is one")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="mixed precision")
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--workers", type=number(int, 0), default=max(1, min(8, cores)),
        help="loader processes for streamed pictures, of each process")
    add("--resident-gb", type=number(float, 0), default=4.0,
        help="keep images of one size, up to 256 px, in memory up to this; stream others")
    add("--data-dir", default="data", help="where downloads are kept")
    add("--seed", type=number(int, 0, 2**32), default=0, help="seed of all random numbers")


def parse_args(argv=None):
    """Settings from the command line, or from the list argv: a recipe's, overridden by flags."""
    count, nonnegative, share = number(int, 1), number(float, 0), number(float, 0, 1)
    parser = Parser("clamp.py", add_help=False,
                    description="Train CLAMP. --recipe NAME --help shows that recipe's defaults.")
    add = parser.add_argument
    add("--recipe", choices=RECIPES,
        help="settings that flags override; default: as --data, cifar10 for its kin, else pictures")
    add("--data", type=data_name, help=f"{', '.join(DATASETS)}, or a folder of pictures")
    add("--limit", type=count, help="use the first LIMIT images of a seeded shuffle")
    add("--out", help="run folder (default: runs/<data>)", default=argparse.SUPPRESS)
    add("--fresh", action="store_true", help="start the run in --out over")
    add("--radius-scale", type=number(float, 1e-3), help="r_s, size of the ellipsoids")
    add("--max-reach", type=number(float, 1e-3), help="cap on the sum of two radii")
    add("--views", type=number(int, 2), help="m, views of an image")
    add("--batch-size", type=number(int, 2), help="b, images a step, over all processes")
    add("--epochs", type=count, help="passes over the images")
    add("--warmup-epochs", type=nonnegative,
        help="linear warm-up, then a cosine to 0; by default at most a third of --epochs")
    add("--lr", type=nonnegative, help="peak learning rate, times batch/256")
    add("--eta", type=nonnegative, help="LARS trust coefficient; 0: plain SGD")
    add("--momentum", type=share, help="momentum")
    add("--weight-decay", type=nonnegative, help="weight decay, not of biases and norms")
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), help="torchvision network")
    add("--stem", choices=("imagenet", "medium", "small"),
        help="small: 3x3 stride 1, no max-pool; medium: stride 2, quarter the cost")
    add("--zero-init", action=argparse.BooleanOptionalAction,
        help="start each residual branch at zero")
    add("--projector", help="widths of the projector's layers")
    add("--size", type=number(int, 8), help="side of a view in pixels")
    add("--crop-scale", type=share, nargs=2, metavar="S", help="smallest, largest part of the area")
    add("--flip-p", type=share, help="probability of a flip")
    add("--jitter", type=nonnegative, nargs=4, metavar="J",
        help="strength of brightness, contrast, saturation, hue")
    add("--jitter-p", type=share, help="probability of colour jitter")
    add("--gray-p", type=share, help="probability of grey")
    add("--blur-kernel", type=count, help="taps of the Gaussian blur, odd")
    add("--blur-p", type=share, nargs="+", metavar="P",
        help="probability of blur; several are taken by the views in turn")
    add("--solarize-p", type=share, nargs="+", metavar="P",
        help="probability of solarising; several likewise")
    add("--knn-every", type=count, help="epochs between k-NN read-outs")
    add("--compile", action="store_true", help="torch.compile the network")
    add_machine_flags(parser)

    known, _ = parser.parse_known_args(argv)  # first for the recipe, then with its defaults
    recipe_of_data = {None: "patterns", "patterns": "patterns", "cifar10": "cifar10",
                      "cifar100": "cifar10", "stl10": "cifar10"}
    recipe = known.recipe or recipe_of_data.get(known.data, "pictures")
    defaults = dict(RECIPES[recipe], recipe=recipe)
    defaults["warmup_epochs"] = min(defaults["warmup_epochs"],
                                    (known.epochs or defaults["epochs"]) / 3)
    parser.set_defaults(**defaults)
    add("-h", "--help", action="help", help="show this and exit")
    args = parser.parse_args(argv)

    if args.data is None:
        parser.error(f"--recipe {recipe} needs --data FOLDER")
    if not all(width.isdigit() and int(width) for width in args.projector.split("-")):
        parser.error(f"--projector {args.projector}: not widths such as 2048-256")
    if args.crop_scale[0] > args.crop_scale[1] or not args.crop_scale[1]:
        parser.error(f"--crop-scale {args.crop_scale}: the smallest first, and not both 0")
    if args.jitter[3] > 0.5:
        parser.error(f"--jitter: hue {args.jitter[3]} is not within 0 and 0.5")
    if args.blur_kernel % 2 == 0 or args.blur_kernel > args.size:
        parser.error(f"--blur-kernel {args.blur_kernel}: not odd, or more than --size {args.size}")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs}: not less than --epochs {args.epochs}")
    args.out = getattr(args, "out", f"runs/{Path(args.data).resolve().name}")
    if Path(args.out).is_file():
        parser.error(f"--out {args.out}: is a file; name a folder")
    return args


def command_line(main, hint=""):
    """Run main(); an error that the user can put right ends it with one line, exit status 2, Ctrl-C
    with one that `hint` ends, exit status 130."""
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
    except (UserError, OSError) as error:
        time.sleep(3 * (rank > 0))  # rank 0 mostly says the same, and torchrun then ends the rest
        message = str(error).split("UserError: ")[-1].strip()  # a loader worker adds its traceback
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{Path(sys.argv[0]).name}: interrupted{hint}", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(lambda: train(parse_args()), "; the same command without --fresh goes on")
