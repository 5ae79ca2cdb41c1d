"""CLAMP: contrastive self-supervised learning as neural manifold packing (arXiv 2506.13717).

The augmented views of an image form a small cloud on the unit sphere. The loss wraps each cloud in
a ball, and balls that overlap repel each other. The energy of this packing trains a ResNet without
labels.

    python clamp.py                        minutes on a laptop, nothing to download
    python clamp.py --data cifar10         less than an hour on two CPU cores
    python clamp.py --data my/photos       a folder of your own images
    torchrun --nproc-per-node 8 clamp.py --recipe imagenet1k --data my/imagenet

The run folder gets views.png (augmented views, one image a row), log.jsonl (one line an epoch),
checkpoint.pt (the same command continues from it) and backbone.pt (for eval_linear.py).
"""

import argparse
import copy
import json
import math
import os
import random
import sys
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import roi_align
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm


class UserError(Exception):
    """An error that the user can put right; it says how."""


# -------- packing loss

def balls(z, radius_scale=7.0):
    """Wrap the views of each image in a ball: z [m, b, d] -> centres Z_i [b, d], radii r_i [b].

        points on the unit sphere: z minus the mean of all embeddings, divided by its length
        Z_i, L_i = mean and covariance (divided by m - 1) of image i's m points
        r_i = radius_scale * sqrt(Tr(L_i) / min(m, d))

    min(m, d) is the authors' bound on the rank of L_i (m - 1 would be exact, for m <= d).
    float64 stays, other types become float32."""
    if z.ndim != 3 or len(z) < 2:
        raise ValueError(f"z must be [views >= 2, images, d], and is {list(z.shape)}")
    m, b, d = z.shape
    z = z if z.dtype == torch.float64 else z.float()
    z = F.normalize(z - z.mean((0, 1)), dim=2)
    trace = z.var(0).sum(1)  # Tr(L_i), the sum of the variances
    return z.mean(0), radius_scale * (trace / min(m, d) + 1e-12).sqrt()


def overlap(centers, radii, max_reach=1.5):
    """How far balls overlap, [b, b]: 1 - |Z_i - Z_j| / min(r_i + r_j, max_reach). It is negative
    for centres that are further apart than that, and -inf for pairs that do not count. As in the
    authors' code, these are i = j, and centres closer than 1e-3, which lack a clear direction.

    At first, r_i is 2 to 4 if radius_scale is 7. So r_i + r_j is above max_reach, and only the
    centres have a gradient, which pushes them apart. A centre is a mean of unit vectors. It is
    longer if these agree, and only long centres can be far apart. So views come to agree, too."""
    exact = centers.double()  # in float32, the matrix product in cdist errs by up to 1e-3
    # The gradient of cdist is 0 where the distance is 0, not NaN.
    distance = torch.cdist(exact, exact).to(centers.dtype)
    reach = (radii[:, None] + radii).clamp(max=max_reach)
    return torch.where(distance < 1e-3, -math.inf, 1 - distance / reach)


def packing_loss(z, radius_scale=7.0, max_reach=1.5):
    """log(E + 1e-6), where E is the energy of the packing of embeddings z [m, b, d], which need not
    be normalised: half the sum over i != j of max(0, overlap)^2 (arXiv 2506.13717, with the
    constants of the authors' code)."""
    x = overlap(*balls(z, radius_scale), max_reach)
    # To try another potential, change this line. E has to be >= 0, and x = -inf has to give a
    # constant, such as 0.
    energy = x.relu().square().sum() / 2
    return (energy + 1e-6).log()


@torch.no_grad()
def packing_numbers(z, radius_scale=7.0, max_reach=1.5):
    """Scalars that describe the packing of z [m, b, d], for the log."""
    centers, radii = balls(z, radius_scale)
    neighbours = overlap(centers, radii, max_reach) > 0
    offsets = (centers - centers.mean(0)).double()
    covariance = offsets.T @ offsets / len(offsets)
    variance = covariance.trace()
    return {
        "radius": radii.mean(),
        "neighbours": neighbours.sum() / len(radii),  # centres within reach of a centre, on average
        "spread": variance.sqrt(),  # root mean square distance of the centres from their mean
        # (sum of eigenvalues)^2 / sum of squares: the number of directions, from 1 to d
        "participation_ratio": variance**2 / covariance.square().sum().clamp(min=1e-30)}


# -------- augmentation

def random_boxes(n, height, width, scale, device):
    """n crop boxes (left, top, right, bottom), [n, 4], for images of height x width. As in
    RandomResizedCrop, a box is the first of ten tries that fits into the image. If none fits, it is
    the largest with sides between 3:4 and 4:3, at a random place (torchvision: in the middle)."""
    # The tries are [10, n].
    area = height * width * torch.empty(10, n, device=device).uniform_(*scale)
    aspect = torch.empty_like(area).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (0 < h) & (h <= height) & (0 < w) & (w <= width)
    first = fits.int().argmax(0, keepdim=True)  # argmax returns the first maximum
    # If none fits: the whole image, its longer side cut to 4/3 of the shorter.
    h = torch.where(fits.any(0), h.gather(0, first)[0], min(height, round(width * 4 / 3)))
    w = torch.where(fits.any(0), w.gather(0, first)[0], min(width, round(height * 4 / 3)))
    u, v = torch.rand(2, n, device=device)
    left, top = (u * (width - w + 1)).floor(), (v * (height - h + 1)).floor()
    return torch.stack([left, top, left + w, top + h], 1)


# The next functions compute what torchvision's do, on images x [n, 3, h, w] with values in 0..1.
# But each image has its own change or sigma [n, 1, 1, 1], and with 0 it stays as it is.
# torchvision's factors are 1 + change. Only its hue_factor is the change itself.

def brightness(x, change):
    return (x * (1 + change)).clamp(0, 1)


def contrast(x, change):
    mean = v2.functional.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
    return mean.lerp(x, 1 + change).clamp(0, 1)  # lerp extrapolates, too


def saturation(x, change):
    return v2.functional.rgb_to_grayscale(x).lerp(x, 1 + change).clamp(0, 1)


def hue(x, change):
    """Turn the hue by `change` of the colour circle: from RGB to HSV and back."""
    red, green, blue = x.unbind(1)  # [n, h, w] each
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    safe = chroma.clamp(min=1e-8)  # not to divide by 0
    # The angle is in sixths of a turn: red is at 0, green at 2, blue at 4.
    angle = torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    angle = torch.where(high == red, (green - blue) / safe, angle)
    angle = (angle + 6 * change[:, 0]) % 6  # change[:, 0] is [n, 1, 1]
    # The purest colour of this angle: its least channel is 0, its greatest 1. As the angle moves
    # away from a channel's own, the channel is 1 up to a distance of 1, and 0 from 2 on.
    red, green, blue = (angle - 3).abs() - 1, 2 - (angle - 2).abs(), 2 - (angle - 4).abs()
    pure = torch.stack([red, green, blue], 1).clamp(0, 1)
    return low[:, None] + chroma[:, None] * pure


def gaussian_blur(x, sigma, kernel):
    """Blur with `kernel` taps, reflecting at the borders. sigma is in pixels. All channels of all
    images go through the same two convolutions, as groups with a kernel each."""
    n, channels, height, width = x.shape
    taps = torch.arange(kernel, device=x.device) - kernel // 2
    sigma = sigma.view(n, 1).clamp(min=1e-3)  # at 0, only the middle tap counts
    weights = (-0.5 * (taps / sigma).square()).softmax(1)  # a Gaussian whose sum is 1
    weights = weights.repeat_interleave(channels, 0)[:, None]  # [n * channels, 1, kernel]
    x = F.pad(x, [kernel // 2] * 4, mode="reflect").flatten(0, 1)[None]  # [1, n * channels, ...]
    x = F.conv2d(x, weights[:, :, :, None], groups=n * channels)
    x = F.conv2d(x, weights[:, :, None, :], groups=n * channels)
    return x.view(n, channels, height, width)


def normalize(x):
    """Normalise x [n, 3, h, w] by ImageNet's mean and standard deviation."""
    red, green, blue = x.unbind(1)  # a tensor of constants would have to be copied to the GPU
    return torch.stack([(red - 0.485) / 0.229, (green - 0.456) / 0.224, (blue - 0.406) / 0.225], 1)


@dataclass
class MultiViewAugment:
    """Random views of images, by the steps of SimCLR and BYOL, on the images' device. crop() is
    called when images are loaded. The instance is called in the training loop."""
    size: int  # of a view, in pixels
    views: int  # m
    crop_scale: tuple = (0.08, 1.0)  # least and largest share of the image's area
    flip_p: float = 0.5
    jitter: tuple = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: tuple = (0.5,)  # view k uses blur_p[k % len(blur_p)], and solarize_p alike
    solarize_p: tuple = (0.0,)

    def crop(self, images):
        """Random crops, uint8 [b, m, 3, size, size], of images uint8 [b, 3, H, W] in memory. Images
        from files differ in size, so they come one by one: [3, H, W] -> [m, 3, size, size]."""
        if images.ndim == 3:
            crop = v2.RandomResizedCrop(self.size, self.crop_scale)
            return torch.stack([crop(images) for _ in range(self.views)])
        b, _, height, width = images.shape
        boxes = random_boxes(b * self.views, height, width, self.crop_scale, images.device)
        index = torch.arange(b, device=images.device).repeat_interleave(self.views)
        boxes = torch.cat([index[:, None], boxes], 1)  # [b * m, 5]: first, the index of the image
        # Resizing is bilinear. sampling_ratio=-1 means: where it shrinks, it averages.
        crops = roi_align(images.float(), boxes, self.size, sampling_ratio=-1, aligned=True)
        return crops.round().byte().unflatten(0, (b, self.views))

    def uniform(self, x, low, high):
        """A random number for each crop of x, [m * b, 1, 1, 1]."""
        return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

    def chance(self, x, *p):
        """True or false for each crop of x, [m * b, 1, 1, 1]. View k has probability
        p[k % len(p)]."""
        of_views = self.uniform(x, 0, 1).chunk(self.views)
        return torch.cat([u < p[k % len(p)] for k, u in enumerate(of_views)])

    def __call__(self, crops):
        """Crops uint8 [b, m, 3, size, size] -> normalised float32 views [m, b, 3, size, size]."""
        x = crops.transpose(0, 1).flatten(0, 1) / 255  # view 0 of all images comes first
        x = torch.where(self.chance(x, self.flip_p), x.flip(3), x)
        return normalize(self.photometric(x)).unflatten(0, (self.views, -1))

    def photometric(self, x):
        """Change the colours of crops x [m * b, 3, size, size] in 0..1, view 0's first."""
        jittered = self.chance(x, self.jitter_p)
        adjust = brightness, contrast, saturation, hue
        for j in torch.randperm(4).tolist():  # one order for all crops
            change = self.uniform(x, -self.jitter[j], self.jitter[j])
            x = adjust[j](x, torch.where(jittered, change, 0))
        x = torch.where(self.chance(x, self.gray_p), v2.functional.rgb_to_grayscale(x), x)
        sigma = torch.where(self.chance(x, *self.blur_p), self.uniform(x, 0.1, 2.0), 0)
        x = gaussian_blur(x, sigma, 2 * (self.size // 20) + 1)  # 3 taps at 32 px, 23 at 224
        solarized = torch.minimum(x, 1 - x)  # 1 - x from 0.5 on
        return torch.where(self.chance(x, *self.solarize_p), solarized, x)


def build_augment(args, kind=MultiViewAugment):
    """A MultiViewAugment, or a subclass of it. Each field has the setting of the same name in args.
    Fields that a subclass adds keep their defaults."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(MultiViewAugment)})


# -------- processes

def rank_and_world():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_processes(args):
    """Join torchrun's processes. Returns this one's device and the dtype of autocast."""
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"no GPU for process {local_rank + 1}; start fewer, or use --device cpu")
    device = torch.device(f"cuda:{local_rank}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported()  # without it, bf16 is slow
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    amp = args.amp
    if amp == "auto":
        amp = "bf16" if bf16 else "fp16" if cuda else "off"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def gather(z):
    """z [m, b / world, d] of each process -> [m, b, d]. All processes then compute the same loss,
    but each gets only the gradient that flows through its own part. Summed over processes, this is
    the whole gradient. DDP averages instead, so train() multiplies the loss by `world`."""
    rank, world = rank_and_world()
    if world == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(world)]
    dist.all_gather(parts, z.detach().contiguous())
    parts[rank] = z
    return torch.cat(parts, 1)


# -------- network and optimiser

def build_backbone(arch, stem="imagenet", zero_init=False):
    """torchvision's ResNet without its classifier: images [n, 3, h, w] -> features [n, f].
    stem: "imagenet", or "cifar" for small images: 3x3, stride 1, no max-pool. The padding is 2, as
        in the authors' code, so 32 px become 34.
    zero_init: residual branches start from zero."""
    backbone = getattr(torchvision.models, arch)(zero_init_residual=zero_init)
    backbone.num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if stem == "cifar":
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=2, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone


def build_network(args):
    """Backbone and projector (Linear-ReLU-...-Linear, no batch norm): images [n, 3, h, w] ->
    embeddings [n, d]. Only training uses the projector."""
    backbone = build_backbone(args.arch, args.stem, args.zero_init)
    projector = torchvision.ops.MLP(backbone.num_features, args.projector)
    return nn.Sequential(OrderedDict(backbone=backbone, projector=projector))


def place(network, device):
    """Move a network to the device. On several GPUs, batch norm is synchronised."""
    if device.type == "cuda" and rank_and_world()[1] > 1:  # CPUs have no SyncBatchNorm
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(device, memory_format=torch.channels_last)


def embed(network, x, dtype):
    """The network's output, float32 [n, d], for images x [n, 3, h, w], under autocast to dtype."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return network(x.contiguous(memory_format=torch.channels_last)).float()


class LARS(torch.optim.SGD):
    """SGD with weight decay and layer-wise rates (arXiv 1708.03888). For each weight tensor w, the
    gradient g becomes
        ratio * (g + weight_decay w),  ratio = eta |w| / (|g| + weight_decay |w|).
    The ratio is 1 if |w| or |g| is 0, or if eta = 0, which is plain SGD with weight decay. Biases
    and batch norm keep their gradients."""

    def __init__(self, parameters, lr, momentum, weight_decay, eta):
        super().__init__(parameters, lr, momentum)
        self.weight_decay, self.eta = weight_decay, eta

    @torch.no_grad()
    def step(self):
        weights = [p for group in self.param_groups for p in group["params"]
                   if p.ndim > 1 and p.grad is not None]
        grads = [p.grad for p in weights]
        # torch._foreach_* takes all tensors of a list at once.
        if self.eta:  # before grads change
            w_norm, g_norm = (torch.stack(torch._foreach_norm(x)) for x in (weights, grads))
            ratio = self.eta * w_norm / (g_norm + self.weight_decay * w_norm + 1e-8)
            ratio = torch.where((w_norm > 0) & (g_norm > 0), ratio, 1)
        torch._foreach_add_(grads, weights, alpha=self.weight_decay)
        if self.eta:
            torch._foreach_mul_(grads, ratio.unbind())  # each tensor by its own
        super().step()


def lr_scale(step, warmup, total):
    """Factor on the learning rate: linear over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# -------- training

def train(args, loss_fn=None, network=None, augment=None, data=None, optimizer=None):
    """Train with the settings args, as parse_args returns them. Parts of your own replace what
    args describe:

    loss_fn: z [m, b, d], the embeddings of the images of all processes -> scalar. Parameters of its
        own are not trained.
    network: a module, images [n, 3, size, size] -> [n, d]; its .backbone is saved and evaluated
    augment: a subclass of MultiViewAugment, of which an instance is made with the settings args
    data: a pair, images uint8 [n, 3, H, W] and labels int64 [n], -1 if unknown
    optimizer: parameters -> a torch optimizer, whose learning rates are the peaks of the schedule

    Raises UserError if the settings do not fit the data, the machine or the run folder."""
    # Plain types, which can be saved and compared: lists for tuples, and numbers for numpy's.
    plain = json.dumps(vars(args), default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    args = argparse.Namespace(**json.loads(plain))
    if data is not None and args.recipe == "patterns":  # the default, with 3 epochs
        raise UserError("data: the recipe patterns is too short for other images; name another "
                        "one, as in parse_args(['--recipe', 'small'])")
    if network is not None and not hasattr(network, "backbone"):
        raise UserError("network: give it a .backbone, which is saved and evaluated")
    device, dtype = start_processes(args)
    rank, world = rank_and_world()
    parts = dict(loss_fn=loss_fn, network=network, augment=augment, data=data, optimizer=optimizer)
    own = [name for name, part in parts.items() if part is not None]
    # What differences() compares if a run continues. The keys stand in error messages.
    settings = vars(args) | {"own": own, "data": args.data if data is None else "own"}
    dataset = load_data(args.data, "train", args.limit, args.seed, data).to(device)
    n = len(dataset.labels)
    settings |= {"number of images": n, "precision": str(dtype)}
    out, checkpoint = Path(args.out), load_checkpoint(args.out, settings)
    start, log = (checkpoint["epoch"], checkpoint["log"]) if checkpoint else (0, [])
    steps = n // args.batch_size  # of an epoch
    if args.batch_size % world or not steps:
        raise UserError(f"--batch-size {args.batch_size}: must be at most {n}, the number of "
                        f"images, and divisible by {world}, the number of processes")
    # A node that does not see the run folder would start from epoch 0.
    agree(settings | {"first epoch": start})

    torch.manual_seed(args.seed)  # for the weights
    loss_fn = loss_fn or (lambda z: packing_loss(z, args.radius_scale, args.max_reach))
    augment = build_augment(args, augment or MultiViewAugment)
    network = place(network or build_network(args), device)
    make_optimizer = optimizer or partial(LARS, lr=args.lr * args.batch_size / 256, momentum=0.9,
                                          weight_decay=args.weight_decay, eta=args.eta)
    optimizer = make_optimizer(network.parameters())
    # Before a checkpoint is loaded, whose rates are those of its last step.
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    saved = dict(network=network, optimizer=optimizer, scaler=scaler)
    for name, part in saved.items():
        if checkpoint and checkpoint[name]:  # the scaler has no state without fp16
            part.load_state_dict(checkpoint[name])
    if args.compile:
        network.compile(mode=args.compile)  # the read-out calls network.backbone, not compiled
    # model is what is trained, network what is saved and evaluated.
    model = nn.parallel.DistributedDataParallel(network) if world > 1 else network

    if rank == 0:
        readout = pick_readout(dataset, args)  # images for a k-NN test after each epoch
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        classes = len(dataset.labels[dataset.labels >= 0].unique()) or "unknown"
        action = "continuing" if checkpoint else "writing"
        if start == args.epochs:
            action = "already finished:"
        print(f"{settings['data']}: {n} images of {classes} classes, {steps} steps an epoch; "
              f"torch {torch.__version__}, {world} x {name}, {dtype}; "
              f"{action} {out}/")
        if not checkpoint:
            claim(out)  # fails if another command begins here, too
            save(out, log, settings, 0, saved)  # from now on, other settings are refused
    # (step, rows) for each step of the loops below.
    batches = draw_batches(n, args.batch_size, range(start, args.epochs), args.seed, rank, world)
    # Their crops. One stream serves all epochs, because it takes seconds to start loader workers.
    stream = image_batches(dataset, batches, augment.crop, device, args.workers, args.seed)
    warmup = round(min(args.warmup_epochs, args.epochs / 3) * steps)
    total = args.epochs * steps
    bar = progress(total=total, initial=start * steps, unit="step")
    for epoch in range(start, args.epochs):
        began, readings = time.time(), []
        model.train()
        for k in range(steps):
            step = epoch * steps + k
            crops = next(stream)  # [b / world, m, 3, size, size]
            torch.manual_seed(seed_of(args.seed, step, rank))  # next() may seed, too
            views = augment(crops)  # [m, b / world, 3, size, size]
            z = embed(model, views.flatten(0, 1), dtype).unflatten(0, views.shape[:2])
            z = gather(z)  # [m, b, d]
            loss = loss_fn(z)
            optimizer.zero_grad()
            scaler.scale(world * loss).backward()  # DDP takes the mean; see gather()
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * lr_scale(step, warmup, total)
            scaler.step(optimizer)
            scaler.update()

            bar.update()
            if step == 0 and rank == 0:
                few = views[:8, :8].transpose(0, 1)  # [images, views, 3, size, size]
                save_image(few.flatten(0, 1), out / "views.png", nrow=few.shape[1], normalize=True)
            # Reading numbers makes a GPU wait, so it is done at 21 steps or fewer. The last is one
            # of them, because no NaN may be saved.
            if k % math.ceil(steps / 20) == 0 or k + 1 == steps:
                readings.append(read_numbers(loss, z, network, args, epoch))
                bar.set_postfix(loss=readings[-1]["loss"], neighbours=readings[-1]["neighbours"])

        seconds = time.time() - began
        # image_batches() has collected messages about files. Every process takes part.
        dataset.unreadable = set().union(*from_all(dataset.unreadable))
        if rank == 0:
            record = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
                      "views_per_second": steps * args.batch_size * args.views / seconds}
            record |= {x: sum(r[x] for r in readings) / len(readings) for x in readings[0]}
            if readout:
                record["train_knn"] = knn_readout(network, readout, args.size, device, dtype)
            if dataset.unreadable:
                record["unreadable"] = len(dataset.unreadable)
            if device.type == "cuda":
                record["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            bar.write(", ".join(f"{x} {number:.4g}" for x, number in record.items()))
            log.append(record)
            save(out, log, settings, epoch + 1, saved)
    bar.close()
    if dist.is_initialized():
        dist.barrier()  # whichever process reads the files next, they are complete
    # The command line of eval_linear.py knows only networks and data that flags describe.
    if rank == 0 and "network" not in own and "data" not in own:
        print(f"finished; next: python eval_linear.py {out}")


# -------- log and run folder

def progress(*args, **options):
    """A tqdm bar, in the first process and on a terminal only."""
    first = rank_and_world()[0] == 0
    return tqdm(*args, disable=None if first else True, **options)  # None: only on a terminal


def read_numbers(loss, z, network, args, epoch):
    """Numbers for the log. The packing's numbers are logged for any loss, because they show a
    collapse. Raises UserError, in all processes, if the loss or a weight is not finite."""
    numbers = {"loss": loss} | packing_numbers(z, args.radius_scale, args.max_reach)
    numbers["weight_norm"] = nn.utils.get_total_norm(network.parameters())
    numbers = {name: number.item() for name, number in numbers.items()}
    if not math.isfinite(numbers["loss"] + numbers["weight_norm"]):
        raise UserError(f"epoch {epoch + 1}: the loss or a weight is not finite; give a lower --lr "
                        "(or mend parts of your own), and another --out")
    return numbers


def differences(settings, others):
    """The names of settings that differ. out and workers may differ, because they change no
    results, and recipe and amp, because they lead to other settings, which are compared. A run may
    continue on another device or number of processes, too, but with other random numbers."""
    names = (settings.keys() | others.keys()) - {"out", "device", "workers", "recipe", "amp"}
    return ", ".join(sorted(x for x in names if settings.get(x) != others.get(x)))


def from_all(value):
    """The values that the processes have, as a list."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def agree(facts):
    """Raise UserError if the settings and other facts (a dict) of processes have differences()."""
    for other in from_all(facts):
        if differences(facts, other):
            raise UserError(f"the processes differ in {differences(facts, other)}; give all of "
                            "them the same flags, images and run folder")


def load_checkpoint(out, settings):
    """The checkpoint in the folder out, or None for a new run. Raises UserError if it cannot be
    continued with these settings."""
    path = Path(out, "checkpoint.pt")
    if not path.exists() and not Path(out, "backbone.pt").exists():
        return None
    try:  # fails for a backbone.pt alone, which a new run would overwrite
        checkpoint = torch.load(path, "cpu", weights_only=True)
        changed = differences(settings, checkpoint["settings"])
    except Exception:  # torch.load raises many types
        raise UserError(f"{path}: missing or damaged; give another --out")
    if changed:
        raise UserError(f"{out}/ holds a run with another {changed}; give another --out")
    return checkpoint


def claim(out):
    """Begin a run in a folder. If several commands do so at once, all but one raise UserError."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        open(out / "log.jsonl", "x").close()  # fails if it exists
    except FileExistsError:
        raise UserError(f"{out}/log.jsonl is there without a checkpoint: another run is just "
                        "beginning; give another --out, or, if none is active, remove this file")


def write(content, path):
    """torch.save() with errors that name the file."""
    try:
        torch.save(content, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({error}); is the disk full?")


def save(out, log, settings, epoch, saved):
    """Write log.jsonl, backbone.pt and checkpoint.pt. A run continues from checkpoint.pt alone,
    which has the log, too. In case the process is killed, checkpoint.pt is replaced last and whole.
    saved: the network, the optimizer and the scaler by their names"""
    state = {"epoch": epoch, "settings": settings}
    backbone = saved["network"].backbone.state_dict()
    write(state | {"backbone": backbone}, out / "backbone.part")
    states = {name: part.state_dict() for name, part in saved.items()}
    write(state | {"log": log} | states, out / "checkpoint.part")
    (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    os.replace(out / "backbone.part", out / "backbone.pt")
    os.replace(out / "checkpoint.part", out / "checkpoint.pt")


# -------- read-out

def center_crop(images, size):
    """Crop the central square, 7/8 of the shorter side, of images uint8 [..., 3, H, W], and resize
    it to [..., 3, size, size]. Images of this size stay as they are: those of CIFAR and patterns,
    and those that have been cropped before."""
    if images.shape[-2:] == (size, size):
        return images
    side = max(1, round(min(images.shape[-2:]) * 7 / 8))
    return v2.functional.resize(v2.functional.center_crop(images, side), [size, size])


@torch.no_grad()
def extract_features(backbone, data, rows, size, device, dtype, workers=0):
    """Features float32 [n, f] of the images `rows` [n]. The backbone has to be in eval mode."""
    crop, batches = partial(center_crop, size=size), rows.split(256)
    # image_batches() takes (step, rows). Only random crops depend on the step.
    stream = image_batches(data, enumerate(batches), crop, device, workers)
    bar = progress(stream, "features", len(batches), leave=False)
    parts = [embed(backbone, normalize(x / 255), dtype).cpu() for x in bar]
    return torch.cat(parts).to(device)  # joined on the CPU, to save memory of a GPU


def knn_accuracy(bank, bank_labels, queries, labels, k=20):
    """Accuracy in % if the k nearest features of the bank [n, f] vote on the class of each query
    [q, f]. Votes are weighted by exp(cosine / 0.07) (arXiv 1805.01978)."""
    bank, correct = F.normalize(bank), 0
    for q, y in zip(queries.split(1024), labels.split(1024)):
        cosine, nearest = (F.normalize(q) @ bank.T).topk(min(k, len(bank)))
        votes = F.one_hot(bank_labels[nearest]) * (cosine / 0.07).exp()[:, :, None]
        correct += (votes.sum(1).argmax(1) == y).sum().item()
    return 100 * correct / len(queries)


def pick_readout(data, args):
    """Up to 5,000 labelled images, cropped and in memory, for a look after each epoch."""
    rows = (data.labels >= 0).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(args.seed)
    rows = rows[torch.randperm(len(rows), generator=generator)[:5000]]
    if len(rows) < 2:
        return None
    crop, cpu = partial(center_crop, size=args.size), torch.device("cpu")
    batches = image_batches(data, enumerate(rows.split(256)), crop, cpu, args.workers)
    images = torch.cat(list(progress(batches, "read-out", leave=False)))
    return Data(images, data.labels[rows])


def knn_readout(network, readout, size, device, dtype):
    """20-NN accuracy in %: half of the images are queries, the other half the bank.
    pick_readout() has put them in random order."""
    network.eval()  # until the next epoch
    n, y = len(readout.labels), readout.labels.to(device)
    x = extract_features(network.backbone, readout, torch.arange(n), size, device, dtype)
    return knn_accuracy(x[n // 2:], y[n // 2:], x[:n // 2], y[:n // 2])


# -------- data
DATASETS = "patterns", "cifar10", "cifar100"
EXTENSIONS = *IMG_EXTENSIONS, ".gif", ".jfif", ".avif", ".heic"
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
          "valid": "val", "validation": "val"}  # names of folders, in upper or lower case


@dataclass
class Data:
    """n images, in memory or in files. Training uses labels for the k-NN read-out only."""
    images: torch.Tensor  # uint8 [n, 3, H, W], or None if the files are read when needed
    labels: torch.Tensor  # int64 [n], -1 if unknown
    files: np.ndarray = None  # n names. (A list would be copied by each loader worker.)
    unreadable: set = field(default_factory=set)  # error messages of files, each printed once

    def to(self, device):
        """Move the images. Labels stay on the CPU."""
        if self.images is not None:
            self.images = self.images.to(device)
        return self

    def select(self, rows):
        images = None if self.images is None else self.images[rows]
        files = None if self.files is None else self.files[rows.numpy()]
        return Data(images, self.labels[rows], files, self.unreadable)

    def report(self, problems):
        """Print those of these error messages that are new."""
        for problem in sorted(set(problems) - self.unreadable):
            tqdm.write(f"unreadable: {problem}")
            self.unreadable.add(problem)


def draw_patterns(n, seed):
    """n grey textures of six kinds in turn: images uint8 [n, 3, 32, 32] and labels int64 [n]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    def wave(t):
        return torch.cos(2 * math.pi * t)

    side = torch.arange(32) - 16
    x, y = side + uniform(-8, 8), side[:, None] + uniform(-8, 8)  # [n, 1, 32] and [n, 32, 1]
    angle, period = uniform(0, 2 * math.pi), uniform(5, 8)
    u = (x * angle.cos() + y * angle.sin()) / period
    v = (y * angle.cos() - x * angle.sin()) / period
    stripes = wave(u)
    checks = (4 * wave(u / 2) * wave(v / 2)).tanh()
    dots = ((wave(u) + wave(v) - 1) * 4).sigmoid()
    rings = wave(torch.hypot(u, v))
    zigzag = wave(u + (v - v.round()).abs())
    rays = torch.cos(8 * torch.atan2(v, u))
    labels = torch.arange(n) % 6
    # All kinds [6, n, 32, 32] are drawn, and one is taken for each image.
    images = torch.stack([stripes, checks, dots, rings, zigzag, rays])[labels, torch.arange(n)]
    images = (images - images.mean((1, 2), keepdim=True)) / images.std((1, 2), keepdim=True)
    images = images * uniform(0.08, 0.25) + uniform(0.4, 0.6)
    images += uniform(0, 0.08) * torch.randn(n, 32, 32, generator=generator)
    return (images.clamp(0, 1) * 255).byte()[:, None].repeat(1, 3, 1, 1), labels


def load_data(name, split, limit=None, seed=0, own=None):
    """The "train" or "test" images of one of DATASETS or of a folder. Without test images, the Data
    is empty. limit: keep this many, chosen at random. own: a pair (images, labels)."""
    if own is not None or name == "own":  # the name that a run on own images saves
        try:
            images, labels = own
            n, channels, _, _ = images.shape
            fits = (channels == 3 and labels.shape == (n,)
                    and (images.dtype, labels.dtype) == (torch.uint8, torch.int64))
        except (AttributeError, TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError("data: give a pair of tensors, images uint8 [n, 3, H, W] and labels "
                            "int64 [n]")
        data = Data(images, labels)
    elif name == "patterns":
        n, pattern_seed = (5000, 0) if split == "train" else (2000, 1)
        data = Data(*draw_patterns(n, pattern_seed))
    else:
        data = download(name, split) if name in DATASETS else list_images(Path(name), split)
    if limit:
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
        data = data.select(order[:limit])
    if data.images is None and len(data.files):
        data = keep_in_memory(data)
    return data


def download(name, split):
    """A torchvision data set, downloaded to data/."""
    source = getattr(torchvision.datasets, name.upper())
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the first process of each node
        try:
            source("data", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data {name}: cannot download {source.url} to data/ ({error})")
    if dist.is_initialized():
        dist.barrier()
    data = source("data", train=split == "train")
    images = torch.tensor(data.data).permute(0, 3, 1, 2).contiguous()
    return Data(images, torch.tensor(data.targets))


def walk_images(path):
    """For each folder below path: the names of the folders that lead to it, and its image files.
    Hidden names, __MACOSX and run folders are left out."""
    def fail(error):
        if not isinstance(error, FileNotFoundError):  # list_images() says what is missing
            raise error

    for at, folders, names in os.walk(path, followlinks=True, onerror=fail):
        # A link to a folder above it would be walked again and again.
        if os.path.realpath(at) in {os.path.realpath(parent) for parent in Path(at).parents}:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX"
                            and not Path(at, name, "checkpoint.pt").exists())
        files = [os.path.join(at, name) for name in sorted(names)
                 if name[0] != "." and name.lower().endswith(EXTENSIONS)]
        yield Path(at).relative_to(path).parts, files


def list_images(path, split):
    """Data of a folder, with the files' names only. An image's class is the first folder below
    path, or below path/train, path/test or path/val.
    Training images: all in train/, or without train/ all that are not in test/ or val/.
    Test images: all with a class in test/, or if there are none, in val/."""
    # Lists of (file, class). The last is for all other folders.
    parts = {"train": [], "test": [], "val": [], "": []}
    for folders, files in walk_images(path):
        part = SPLITS.get(folders[0].lower(), "") if folders else ""
        if part:
            folders = folders[1:]
        label = folders[0] if folders else None
        parts[part] += [(file, label) for file in files]

    def labelled(part):
        return [(file, label) for file, label in parts[part] if label]

    # valid/ beside invalid/ is a class. So a split without classes, beside classes, is refused.
    if labelled("") and not labelled("train"):
        for part in parts:
            if parts[part] and not labelled(part):
                raise UserError(f"--data {path}: {part}/ has no class folders, but there are some "
                                "beside it; rename it if it is a class, or move it")
    train = parts["train"] or parts[""]
    test = labelled("test") or labelled("val")
    if not train:
        raise UserError(f"--data {path}: no images there; give {', '.join(DATASETS)}, or a folder "
                        "of images, of <class>/, or of train/<class>/ and test/<class>/")
    classes = sorted({label for _, label in train if label})
    if len(classes) < 2:  # a single folder is no class: no labels, and nothing to test
        classes, test = [], []
    numbers = {label: k for k, label in enumerate(classes)}
    unknown = {label for _, label in test} - numbers.keys()
    if unknown:
        raise UserError(f"--data {path}: no training images of {', '.join(sorted(unknown))}")
    images = train if split == "train" else test
    labels = torch.tensor([numbers.get(label, -1) for _, label in images], dtype=torch.int64)
    return Data(None, labels, np.array([file for file, _ in images]))


def read_image(file, size=None):
    """Returns (image, None), or (None, error message) for a file that cannot be read. The image is
    uint8 [3, H, W], upright, and its transparent parts are on mid-grey (128).
    size: (width, height) to which an image of another size is cropped and resized."""
    try:
        with Image.open(str(file)) as image:  # str, because numpy has a type of its own
            if image.mode[0] in "IF":  # I, I;16 and F have 16 or 32 bits
                raise ValueError("more than 8 bits a channel; convert it to 8 bits")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "#808080"), image)
            image = image.convert("RGB")
        return v2.functional.pil_to_tensor(ImageOps.fit(image, size) if size else image), None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types
        return None, f"{file}: {getattr(error, 'strerror', None) or error}"


def keep_in_memory(data):
    """Read all files now if they need at most 4 GB, and 80 % of a sample have one size of at most
    256 px. Images of other sizes are fitted to it. Otherwise data stays as it is."""
    n = len(data.files)
    sample = data.files[np.linspace(0, n - 1, min(n, 30)).astype(int)]
    images, problems = zip(*map(read_image, sample))
    sizes = Counter(image.shape[1:] for image in images if image is not None)
    if not sizes:
        raise UserError(problems[0])
    (height, width), count = sizes.most_common(1)[0]
    small = max(height, width) <= 256 and 3 * height * width * n <= 2**32
    if not small or count < 0.8 * len(sample):
        return data
    images, problems = zip(*(read_image(file, (width, height))
                             for file in progress(data.files, "reading", leave=False)))
    if rank_and_world()[0] == 0:  # every process has the same problems
        data.report(problem for problem in problems if problem)
    data = data.select(torch.tensor([k for k in range(n) if images[k] is not None]))
    data.images = torch.stack([image for image in images if image is not None])
    return data


def seed_of(*integers):
    """A seed that follows from some integers, the same in every process and run."""
    return random.Random(str(integers)).getrandbits(63)  # it hashes the text by SHA-512


def draw_batches(n, batch_size, epochs, seed, rank=0, world=1):
    """Yields (step, rows) for each step of these epochs of n images. rows [batch_size / world] are
    row numbers of images: the part of the batch that the process `rank` of `world` takes. All
    processes draw the same batches. An incomplete last batch of an epoch is left out."""
    steps = n // batch_size
    for epoch in epochs:
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        batches = torch.randperm(n, generator=generator).split(batch_size)[:steps]
        for k, rows in enumerate(batches):
            yield epoch * steps + k, rows.chunk(world)[rank]


def read_or_next(files, row):
    """The image in files[row], or if it cannot be read, the next one that can. Also returns a list
    of error messages."""
    problems = []
    for k in range(len(files)):
        image, problem = read_image(files[(row + k) % len(files)])
        if image is not None:
            return image, problems
        problems.append(problem)
    raise UserError(problems[0])


class Crops(torch.utils.data.Dataset):
    """dataset[step, rows] returns (crops, problems): crop(images) for the images in `rows`, a list,
    and error messages. In place of a file that cannot be read, the next one is taken. It has the
    wrong label then. (Training does not use labels, the k-NN read-out may err a little, and the
    evaluation refuses such files.)

    On one kind of device, random crops follow from seed, step and rows alone. So a run can be
    continued, with any number of loader workers."""

    def __init__(self, data, crop, seed):
        self.data, self.crop, self.seed = data, crop, seed

    def __getitem__(self, item):
        step, rows = item
        torch.manual_seed(seed_of(self.seed, step, *rows))
        images = self.data.images
        if images is not None:
            rows = torch.tensor(rows).to(images.device, non_blocking=True)
            return self.crop(images[rows]), []
        crops, problems = [], []
        for row in rows:
            image, new_problems = read_or_next(self.data.files, row)
            crops.append(self.crop(image))
            problems += new_problems
        return torch.stack(crops), problems


def image_batches(data, batches, crop, device, workers=0, seed=0):
    """Yields crop(images) on `device` for each (step, rows) of `batches`. Images in memory are
    cropped together, those in files one by one, by `workers` processes."""
    from_files = data.images is None
    loader = torch.utils.data.DataLoader(
        Crops(data, crop, seed), sampler=((step, rows.tolist()) for step, rows in batches),
        batch_size=None,  # nothing is collated: Crops makes a batch from each item of the sampler
        num_workers=workers if from_files else 0, pin_memory=from_files and device.type == "cuda")
    for crops, problems in loader:
        data.report(problems)
        # pick_readout() may copy from a GPU to the CPU. Without blocking, it could read too early.
        yield crops.to(device, non_blocking=device.type == "cuda")


# -------- settings
# The recipes patterns, small and photos are ours, the others are published. lr is for 256 images a
# batch. "photos", "imagenet100" and "imagenet" are folders, unless --data names another.

SMALL = dict(
    data="cifar10", radius_scale=7.0, max_reach=1.2,  # better than the authors' 1.5 with two views
    views=2, batch_size=128, epochs=30, warmup_epochs=1.0, lr=0.4, eta=0.0,
    arch="resnet18", stem="imagenet",  # on a CPU, the CIFAR stem takes 15 times as long
    zero_init=True, projector=[2048, 256], size=32, crop_scale=[0.2, 1.0],
    jitter=[0.4, 0.4, 0.2, 0.1], blur_p=[0.5], solarize_p=[0.0])
IMAGENET = dict(
    data="imagenet", radius_scale=8.5, max_reach=1.5, views=4, batch_size=512, epochs=100,
    warmup_epochs=10.0, lr=1.1, eta=1e-3, arch="resnet50", stem="imagenet", zero_init=False,
    projector=[8192, 8192, 512], size=224, crop_scale=[0.08, 1.0], jitter=[0.4, 0.4, 0.2, 0.1],
    blur_p=[1.0, 0.1], solarize_p=[0.0, 0.2])
RECIPES = {
    "patterns": SMALL | dict(data="patterns", max_reach=1.5, views=4, batch_size=32, epochs=3,
                             lr=1.6),
    "small": SMALL,
    "photos": SMALL | dict(data="photos", size=64, crop_scale=[0.08, 1.0], epochs=50),
    "cifar10-published": dict(
        data="cifar10", radius_scale=7.0, max_reach=1.5, views=16, batch_size=128, epochs=1000,
        warmup_epochs=10.0, lr=2.0, eta=1e-3, arch="resnet18", stem="cifar", zero_init=False,
        projector=[2048, 256], size=32, crop_scale=[0.08, 1.0], jitter=[0.8, 0.8, 0.8, 0.2],
        blur_p=[0.5], solarize_p=[0.0]),
    "imagenet100": IMAGENET | dict(data="imagenet100", epochs=200, lr=2.0),
    "imagenet1k": IMAGENET,
}


def within(kind, low, high=math.inf):
    """A flag's type: a finite int or float from low to high."""
    def number(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: give {limits}")
        return value
    return number


def data_name(text):
    """A flag's type: one of DATASETS, or a folder, as a whole path."""
    if not text:
        raise argparse.ArgumentTypeError(f"give a folder, or {', '.join(DATASETS)}")
    return text if text in DATASETS else os.path.abspath(text)


def parse_args(argv=None):
    """The settings, from the command line or from the list argv."""
    parser = argparse.ArgumentParser(
        "clamp.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # a flag that is not given is left out of the result
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train CLAMP. Defaults stand in brackets. The recipe sets the other flags.",
        epilog="\n".join(f"recipe {name}: {settings}" for name, settings in RECIPES.items()))
    add = parser.add_argument
    share = within(float, 0, 1)
    add("--recipe", choices=RECIPES, help="(chosen by --data)")
    add("--data", type=data_name, help=f"{', '.join(DATASETS)}, or a folder of images")
    add("--limit", type=within(int, 1), default=None,
        help="train on this many random images (all)")
    add("--out", default=None, help="run folder (runs/<data>)")
    add("--radius-scale", type=within(float, 1e-3), help="r_s, factor on the radii")
    add("--max-reach", type=within(float, 1e-3), help="c, largest reach of two balls")
    add("--views", type=within(int, 2), help="m, views of an image")
    add("--batch-size", type=within(int, 2), help="b, images a step, over all processes")
    add("--epochs", type=within(int, 1), help="passes over the images")
    add("--warmup-epochs", type=within(float, 0), help="capped at a third of the epochs")
    add("--lr", type=within(float, 0), help="peak learning rate at batch size 256")
    add("--eta", type=within(float, 0), help="LARS trust coefficient; 0: plain SGD")
    add("--weight-decay", type=within(float, 0), default=1e-6,
        help="except on biases and batch norm (1e-6)")
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), help="backbone")
    add("--stem", choices=("imagenet", "cifar"), help="cifar: 3x3, no max-pool")
    add("--zero-init", action=argparse.BooleanOptionalAction,
        help="start residual branches from zero")
    add("--projector", type=within(int, 1), nargs="+", help="widths of its layers")
    add("--size", type=within(int, 32), help="side of a view in pixels")
    add("--crop-scale", type=share, nargs=2, help="least and largest share of the area")
    add("--flip-p", type=share, default=0.5, help="probability of a flip (0.5)")
    add("--jitter", type=share, nargs=4, help="brightness, contrast, saturation, hue")
    add("--jitter-p", type=share, default=0.8, help="probability of colour jitter (0.8)")
    add("--gray-p", type=share, default=0.2, help="probability of grey (0.2)")
    add("--blur-p", type=share, nargs="+", help="probability of blur; views take them in turn")
    add("--solarize-p", type=share, nargs="+", help="of solarising, likewise")
    add("--compile", choices=("default", "reduce-overhead"), default=None,
        help="mode of torch.compile (off)")
    add_machine_flags(parser)

    given = vars(parser.parse_args(argv))
    if "recipe" not in given:
        by_data = {"patterns": "patterns", "cifar10": "small", "cifar100": "small"}
        given["recipe"] = by_data.get(given.get("data", "patterns"), "photos")
    # A flag that has a default is always given. So a recipe can set only flags that have none.
    settings = copy.deepcopy(RECIPES[given["recipe"]]) | given
    args = argparse.Namespace(**settings)
    args.data = data_name(args.data)  # the folder of a recipe, too, becomes a whole path
    args.crop_scale = sorted(args.crop_scale)
    args.out = args.out or f"runs/{Path(args.data).name}"
    if Path(args.out).resolve() == Path(args.data).resolve():
        parser.error("--out: give another folder than --data")
    return args


def add_machine_flags(parser):
    """Flags that eval_linear.py has too."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto)")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision (auto)")
    add("--workers", type=within(int, 0), default=min(8, os.cpu_count() or 1),
        help="loader workers of each process (cores, at most 8)")
    add("--seed", type=within(int, 0, 2**62), default=0, help="seed of random numbers (0)")


def command_line(main):
    """Run main(). An error that the user can put right gives one line and exit status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for file names that it cannot encode
    try:
        main()
    except Exception as error:
        # From a loader worker, the text is a traceback with the message at its end.
        message = str(error).split("UserError: ")[-1].strip()
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if out_of_memory or "allocate memory" in message:
            message = "out of memory; lower --batch-size or --size, and give another --out"
        elif "shared memory" in message or "DataLoader worker (pid" in message:
            message = ("the loader workers lack shared memory; give --workers 0, or enlarge "
                       "/dev/shm (docker run --shm-size)")
        elif not isinstance(error, (UserError, OSError)):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)  # torchrun then stops the other processes
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(lambda: train(parse_args()))
