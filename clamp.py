"""CLAMP: contrastive self-supervised learning as neural manifold packing (arXiv 2506.13717).

The augmented views of an image form a small cloud on the unit sphere. Each cloud is wrapped in an
ellipsoid, which the loss treats as a ball. Balls that overlap repel each other, and the energy of
this packing trains a ResNet without labels.

    torchrun clamp.py                      minutes on a laptop, nothing to download
    torchrun clamp.py --data cifar10       one or two hours on two CPU cores
    torchrun clamp.py --data photos        your own folder of pictures
    torchrun --nproc-per-node 8 clamp.py --recipe imagenet1k --data imagenet

The run folder gets views.png (augmented views, one image a row), log.jsonl (one line an epoch),
checkpoint.pt (the same command continues from it) and backbone.pt (for eval_linear.py).
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.datasets import folder
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

# -------- packing loss

def packing_loss(z, radius_scale=7.0, max_reach=1.5, center=True):
    """The logarithm of the packing's energy (arXiv 2506.13717, constants of its authors' code).
    z: embeddings [m, b, d] of m >= 2 views of b images. Types other than float64 become float32.

        Z_i, L_i = mean and covariance of image i's views on the unit sphere
        r_i = radius_scale * sqrt(Tr(L_i) / min(m, d))
        E = 1/2 sum over i != j of max(0, 1 - |Z_i - Z_j| / min(r_i + r_j, max_reach))^2
        loss = log(E + 1e-6)

    As in the authors' code, centres closer than 1e-3 do not repel each other.
    center: subtract the mean of all embeddings before they are projected onto the sphere.

    Returns the loss and a dict of detached numbers that describe the packing."""
    if z.ndim != 3 or len(z) < 2:
        raise ValueError(f"packing_loss takes z [views >= 2, images, d], not {list(z.shape)}")
    m, b, d = z.shape
    z = z if z.dtype == torch.float64 else z.float()
    if center:
        z = z - z.mean((0, 1))
    z = F.normalize(z, dim=2)
    centers = z.mean(0)  # Z_i
    trace = (z - centers).square().sum((0, 2)) / (m - 1)  # Tr(L_i)
    radii = radius_scale * (trace / min(m, d) + 1e-12).sqrt()  # r_i

    exact = centers.double()  # in float32 cdist errs by up to 1e-3
    distance = torch.cdist(exact, exact).to(z.dtype)
    reach = (radii[:, None] + radii).clamp(max=max_reach)
    repel = (distance > 1e-3) & (distance < reach)  # false if i = j
    overlap = (1 - distance / reach).where(repel, 0)
    energy = overlap.square().sum() / 2
    loss = (energy + 1e-6).log()

    with torch.no_grad():
        offsets = exact - exact.mean(0)
        covariance = offsets.T @ offsets / b
        variance = covariance.trace()
        geometry = {
            "radius": radii.mean(),
            "neighbours": repel.sum() / b,  # mean number per image
            "spread": variance.sqrt(),  # of the centres around their mean
            # 1 if the centres lie on a line, d if they spread equally in all directions
            "participation_ratio": variance**2 / covariance.square().sum().clamp(min=1e-30),
        }
    return loss, geometry


# -------- augmentation
# brightness() to gaussian_blur() compute what torchvision's do, but each picture has a number of
# its own: x is [n, 3, h, w] in 0..1, change or sigma is [n, 1, 1, 1], and 0 changes nothing.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's; tensors would delay a GPU


def draw_boxes(x, scale):
    """Crop boxes (top, left, height, width) [4, n] for x [n, 3, h, w], as RandomResizedCrop draws
    them: the first of ten tries that fits, or else the largest central box of an allowed shape."""
    n, _, height, width = x.shape
    area = height * width * torch.empty(10, n, device=x.device).uniform_(*sorted(scale))
    aspect = torch.empty_like(area).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (0 < h) & (h <= height) & (0 < w) & (w <= width)
    found, first = fits.any(0), fits.int().argmax(0, keepdim=True)
    h = h.gather(0, first)[0].where(found, min(height, round(width * 4 / 3)))
    w = w.gather(0, first)[0].where(found, min(width, round(height * 4 / 3)))
    room = torch.stack([height - h, width - w])
    corner = (torch.rand_like(room) * (room + 1)).floor().where(found, room // 2)
    return torch.cat([corner, torch.stack([h, w])])


def resize_matrix(start, length, size, full):
    """Matrices [n, size, full] that resize the pixels start..start+length of a line of `full`
    pixels to `size` pixels, bilinear and antialiased."""
    scale = (length / size)[:, None, None]
    target = torch.arange(size, device=start.device)[:, None]
    source = torch.arange(full, device=start.device) - start[:, None, None]  # 0 is the box's start
    distance = (source + 0.5 - (target + 0.5) * scale).abs()
    weight = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    weight = weight.where((source >= 0) & (source < length[:, None, None]), 0)
    return weight / weight.sum(2, keepdim=True)


def resized_crop(x, boxes, size):
    """Cut a box [4, n] out of each picture of x [n, 3, h, w] and resize it to size x size."""
    top, left, height, width = boxes
    rows = resize_matrix(top, height, size, x.shape[2])[:, None]  # the same for all channels
    columns = resize_matrix(left, width, size, x.shape[3])[:, None]
    return rows @ x @ columns.mT


def brightness(x, change):
    return (x * (1 + change)).clamp(0, 1)


def contrast(x, change):
    mean = v2.functional.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
    return mean.lerp(x, 1 + change).clamp(0, 1)


def saturation(x, change):
    return v2.functional.rgb_to_grayscale(x).lerp(x, 1 + change).clamp(0, 1)


def hue(x, change):
    """Shift the hue by `change` turns of the colour circle."""
    value, largest = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    side = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, largest)  # g - b, b - r or r - g
    angle = 2 * largest + side / chroma.where(chroma > 0, 1) + 6 * change  # sixths of a turn
    # A channel is largest if its own angle is at most 1 away, and smallest from 2 away on.
    own = torch.arange(0, 6, 2, device=x.device).view(3, 1, 1)  # red 0, green 2, blue 4
    away = ((angle - own + 3) % 6 - 3).abs()
    return value - chroma * (away - 1).clamp(0, 1)


def gaussian_blur(x, sigma, kernel):
    """Blur with `kernel` taps, reflecting at the borders; sigma is in pixels."""
    n, channels, height, width = x.shape
    taps = torch.arange(kernel, device=x.device) - kernel // 2
    weights = (-0.5 * (taps / sigma.view(n, 1).clamp(min=1e-3)).square()).softmax(1)
    weights = weights.repeat_interleave(channels, 0)[:, None]  # [n * channels, 1, kernel]
    x = F.pad(x, [kernel // 2] * 4, mode="reflect").flatten(0, 1)[None]  # [1, n * channels, ...]
    x = F.conv2d(x, weights[:, :, :, None], groups=n * channels)
    x = F.conv2d(x, weights[:, :, None, :], groups=n * channels)
    return x.view(n, channels, height, width)


def normalize(x):
    return torch.stack([(c - mean) / std for c, mean, std in zip(x.unbind(1), MEAN, STD)], 1)


@dataclass
class MultiViewAugment:
    """uint8 images [b, 3, H, W] -> float32 views [m, b, 3, size, size] on the images' device, by
    the steps of SimCLR and BYOL. View k uses blur_p[k % len(blur_p)], and solarize_p alike. Images
    from files come as crops [b, m, 3, size, size], which crop() made when they were read."""
    size: int
    views: int
    crop_scale: tuple = (0.08, 1.0)  # share of the picture's area, in any order
    flip_p: float = 0.5
    jitter: tuple = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: tuple = (0.5,)
    solarize_p: tuple = (0.0,)

    def __call__(self, images):
        if images.ndim == 5:
            x = images.transpose(0, 1).flatten(0, 1) / 255
        else:
            x = images.repeat(self.views, 1, 1, 1) / 255
            x = resized_crop(x, draw_boxes(x, self.crop_scale), self.size)
        return self.photometric(x).unflatten(0, (self.views, -1))

    def crop(self, picture):
        """uint8 [3, H, W] -> uint8 [m, 3, size, size]."""
        crop = v2.RandomResizedCrop(self.size, sorted(self.crop_scale))
        return torch.stack([crop(picture) for _ in range(self.views)])

    def photometric(self, x):
        """Turn crops [m * b, 3, size, size] in 0..1 into normalised views. View 0's come first."""
        def uniform(low, high):
            return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

        def chance(*p):  # view k uses p[k % len(p)]
            by_crop = torch.tensor(p)[torch.arange(len(x)) * self.views // len(x) % len(p)]
            return uniform(0, 1) < by_crop.view(-1, 1, 1, 1).to(x.device, non_blocking=True)

        x = torch.where(chance(self.flip_p), x.flip(3), x)
        jittered = chance(self.jitter_p)
        adjust = brightness, contrast, saturation, hue
        for j in torch.randperm(4).tolist():  # one order for all crops
            x = adjust[j](x, uniform(-self.jitter[j], self.jitter[j]).where(jittered, 0))
        x = torch.where(chance(self.gray_p), v2.functional.rgb_to_grayscale(x), x)
        sigma = uniform(0.1, 2.0).where(chance(*self.blur_p), 0)
        x = gaussian_blur(x, sigma, self.size // 20 * 2 + 1)  # about a tenth of the side
        return normalize(torch.where(chance(*self.solarize_p) & (x >= 0.5), 1 - x, x))


# -------- network and optimiser

class ResNetConv(nn.Conv2d):
    """nn.Conv2d; on a CPU and tiny maps, a matrix product that skips the padding. A map is tiny if
    the kernel always covers pixel (0, 0): 2 x 2 for 3x3. A step at 32 px is 1.4 times as fast."""

    def forward(self, x):
        (h, w), k, p = x.shape[2:], self.kernel_size[0], self.padding[0]
        tops, lefts = (range(0, side + 2 * p - k + 1, self.stride[0]) for side in (h, w))
        if x.is_cuda or max(tops[-1], lefts[-1]) > p:  # a place misses pixel (0, 0)
            return super().forward(x)
        x, weight = x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1)  # channels last
        taps = [weight[:, p - i:p - i + h, p - j:p - j + w] for i in tops for j in lefts]
        y = F.linear(x[:, :k - p, :k - p].flatten(1), torch.cat(taps).flatten(1))  # pixels in use
        return y.view(len(x), len(tops), len(lefts), -1).permute(0, 3, 1, 2)


def build_backbone(arch, stem="imagenet", zero_init=False):
    """torchvision's ResNet without its classifier: images [n, 3, h, w] -> features [n, f]. stem:
    "imagenet", or "cifar", the authors' for 32 px. zero_init: residual branches start from zero."""
    backbone = getattr(torchvision.models, arch)(zero_init_residual=zero_init)
    backbone.num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if stem == "cifar":
        backbone.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=2, bias=False)  # 32 -> 34 px
        backbone.maxpool = nn.Identity()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = ResNetConv  # the weights and their names stay
    return backbone


def build_network(args):
    """The backbone, and the projector (Linear-ReLU-...-Linear), which only training uses."""
    network = nn.Sequential()  # runs its attributes in this order
    network.backbone = build_backbone(args.arch, args.stem, args.zero_init)
    network.projector = torchvision.ops.MLP(network.backbone.num_features, args.projector)
    return network


def embed(network, x, dtype):
    """network's float32 output [..., d] for pictures x [..., 3, h, w], under autocast to dtype."""
    pictures = x.reshape(-1, *x.shape[-3:]).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return network(pictures).float().view(*x.shape[:-3], -1)


@torch.no_grad()
def lars(optimizer, eta, weight_decay):
    """Before optimizer.step(), replace the gradient g of each weight tensor w by
    eta |w| / (|g| + weight_decay |w|) * (g + weight_decay w)  (arXiv 1708.03888). The fraction is 1
    if eta, |w| or |g| is 0. Biases and batch norm keep their gradients."""
    weights = [p for p in optimizer.param_groups[0]["params"] if p.ndim > 1 and p.grad is not None]
    grads = [p.grad for p in weights]
    if eta:
        w_norm, g_norm = (torch.stack(torch._foreach_norm(x)) for x in (weights, grads))
        ratio = eta * w_norm / (g_norm + weight_decay * w_norm + 1e-8)
    torch._foreach_add_(grads, weights, alpha=weight_decay)
    if eta:
        torch._foreach_mul_(grads, ratio.where((w_norm > 0) & (g_norm > 0), 1).unbind())


def lr_scale(step, warmup, total):
    """Factor on the learning rate: linear over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return min(1, (step + 1) / warmup)  # a fractional warmup would pass 1
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# -------- data
# Images are a uint8 tensor [n, 3, H, W], or a numpy array of n file names if keep_in_memory() does
# not load them. Labels are int64 [n], -1 if unknown. Training uses them for its k-NN read-out only.
DATASETS = "patterns", "cifar10", "cifar100"


class UserError(Exception):
    """An error that the user can put right; it says how."""


def draw_patterns(n, seed):
    """n grey textures of six kinds in turn: images uint8 [n, 3, 32, 32] and labels int64 [n]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    def wave(t):
        return torch.cos(2 * math.pi * t)

    side = torch.arange(32) - 16
    x, y = side + uniform(-8, 8), side[:, None] + uniform(-8, 8)
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
    images = torch.stack([stripes, checks, dots, rings, zigzag, rays])[labels, torch.arange(n)]
    images = (images - images.mean((1, 2), keepdim=True)) / images.std((1, 2), keepdim=True)
    images = images * uniform(0.08, 0.25) + uniform(0.4, 0.6)
    images += uniform(0, 0.08) * torch.randn(n, 32, 32, generator=generator)
    return (images.clamp(0, 1) * 255).byte()[:, None].repeat(1, 3, 1, 1), labels


def load_data(name, split, limit=None, seed=0):
    """Images and labels of the "train" or "test" split of one of DATASETS or of a folder, which has
    train/<class>/ and test/<class>/ (or val/<class>/), or only pictures without labels. limit: keep
    this many images, chosen at random. Raises UserError if there is nothing to read."""
    if name == "patterns":
        images, labels = draw_patterns(5000, 0) if split == "train" else draw_patterns(2000, 1)
    elif name in DATASETS:
        images, labels = download(name, split)
    else:
        images, labels = list_pictures(Path(name), split)
    if limit:
        kept = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:limit]
        images, labels = images[kept.numpy()], labels[kept]  # files are a numpy array
    return images if torch.is_tensor(images) else keep_in_memory(images), labels


def download(name, split):
    """Images and labels of a torchvision data set, downloaded to data/."""
    source = getattr(torchvision.datasets, name.upper())
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the first process of each node
        try:
            source("data", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data {name}: cannot download {source.url} to data/ ({error})")
    if dist.is_initialized():
        dist.barrier()
    data = source("data", train=split == "train")
    return torch.tensor(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def list_pictures(path, split):
    """The files and labels of a folder."""
    labelled = (path / "train").is_dir()
    root = path / split if labelled else path
    if split == "test" and not root.is_dir():
        root = path / "val"
    if not root.is_dir():
        raise UserError(f"--data {path}: no folder {root}; give one, or {', '.join(DATASETS)}")
    classes = folder.find_classes(path / "train")[1] if labelled else {".": -1}  # unlabelled
    samples = folder.make_dataset(root, classes, folder.IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise UserError(f"--data {path}: no pictures in {root}")
    files, labels = zip(*samples)
    return np.array(files), torch.tensor(labels)


def read_picture(file):
    """The picture in a file, uint8 [3, H, W]."""
    try:
        return v2.functional.pil_to_tensor(folder.default_loader(file))
    except Exception as error:  # Pillow raises many types
        raise UserError(f"{file}: cannot be decoded ({error}); remove it") from None


def keep_in_memory(files):
    """One tensor, if all have one size up to 256 px and fit into 4 GB, or else the files."""
    images = []
    for file in tqdm(files, "decoding", leave=False, disable=rank_and_world()[0] > 0):
        images.append(read_picture(file))
        shape, first = images[-1].shape, images[0].shape
        if shape != first or max(shape) > 256 or first.numel() * len(files) > 2**32:
            return files
    return torch.stack(images)


def load_batch(files, transform):
    """Runs in a loader worker, where default_collate stacks the pictures in shared memory."""
    return torch.utils.data.default_collate([transform(read_picture(file)) for file in files])


def image_batches(images, batches, transform, device, workers=0):
    """Iterate over the images of each row of indices in `batches`. `workers` processes decode and
    transform files. The images of a tensor are not transformed."""
    if torch.is_tensor(images):
        return (images[rows.to(images.device, non_blocking=True)] for rows in batches)
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=[rows.tolist() for rows in batches], num_workers=workers,
        collate_fn=partial(load_batch, transform=transform), pin_memory=device.type == "cuda")
    return (pictures.to(device, non_blocking=True) for pictures in loader)


# -------- read-out and processes

def center_crop(images, size):
    """Resize and crop uint8 [..., 3, H, W] to [..., 3, size, size], unless that is their size."""
    if images.shape[-2:] == (size, size):
        return images
    return v2.functional.center_crop(v2.functional.resize(images, round(size * 8 / 7)), size)


@torch.no_grad()
def extract_features(backbone, images, rows, size, device, dtype, workers=0):
    """Features float32 [n, f] of the images `rows` [n] by a backbone in eval mode."""
    crop, total = partial(center_crop, size=size), math.ceil(len(rows) / 256)
    batches = image_batches(images, rows.split(256), crop, device, workers)
    bar = tqdm(batches, "features", total, leave=False, disable=rank_and_world()[0] > 0)
    parts = [embed(backbone, normalize(crop(x) / 255), dtype).cpu() for x in bar]
    return torch.cat(parts).to(device)  # torch.cat on a GPU takes twice the memory


def knn_accuracy(bank, bank_labels, queries, labels, k=20):
    """Accuracy in % of a vote of the k nearest rows of the bank [n, f] on each query [q, f],
    weighted by exp(cosine / 0.07) (arXiv 1805.01978)."""
    norms, correct = bank.norm(dim=1).clamp(min=1e-12), 0  # F.normalize(bank) takes more memory
    for q, y in zip(queries.split(1024), labels.split(1024)):
        cosine, nearest = (F.normalize(q) @ bank.T).div_(norms).topk(min(k, len(bank)))
        votes = F.one_hot(bank_labels[nearest]) * (cosine / 0.07).exp()[:, :, None]
        correct += (votes.sum(1).argmax(1) == y).sum().item()
    return 100 * correct / len(queries)


def rank_and_world():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(z):
    """z [m, b, d] of each process -> [m, world * b, d], with a gradient for this process's part.
    DDP averages the gradients instead of adding them, so backpropagate `world` times the loss."""
    rank, world = rank_and_world()
    if world == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(world)]
    dist.all_gather(parts, z.detach().contiguous())
    parts[rank] = z
    return torch.cat(parts, 1)


def start_processes(args):
    """Join torchrun's processes. Returns this one's device and autocast dtype."""
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"no GPU for process {local_rank + 1}; start fewer, or use --device cpu")
    device = torch.device(f"cuda:{local_rank}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if cuda
            else torch.cpu._is_avx512_bf16_supported())
    amp = ("bf16" if bf16 else "fp16" if cuda else "off") if args.amp == "auto" else args.amp
    return device, dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)[amp]


# -------- training

def save(out, **contents):
    """Write files NAME.pt whole or not at all, even if the process is killed meanwhile."""
    for name, content in contents.items():
        torch.save(content, out / f"{name}.part")
    for name in contents:  # after all have been written
        os.replace(out / f"{name}.part", out / f"{name}.pt")


def load_checkpoint(out, settings):
    """The checkpoint in `out`, whose settings must be these, or an empty one for a new run."""
    if not list(out.glob("*.pt")):  # a lone backbone.pt is refused below
        return {"epoch": 0, "log": []}
    try:
        checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        saved = checkpoint["settings"]
    except Exception:  # torch.load raises many types
        raise UserError(f"{out}/checkpoint.pt: missing or damaged; give another --out")
    names = (settings.keys() | saved.keys()) - {"out", "recipe", "device", "workers"}
    changed = ", ".join(sorted(k for k in names if settings.get(k) != saved.get(k)))
    if changed:
        raise UserError(f"{out}/ holds a run with another {changed}; give another --out")
    return checkpoint


def train(args, loss_fn=None, network=None, augment=None, data=None):
    """Train with args, as parse_args returns them. Other arguments replace what args describe:

    loss_fn: z [m, b, d], embeddings of the images of all processes -> loss, dict of numbers to log
    network: a module, pictures [n, 3, size, size] -> [n, d]; its .backbone is saved and evaluated
    augment: a subclass of MultiViewAugment
    data: images and labels, as load_data returns them"""
    args = argparse.Namespace(**json.loads(json.dumps(vars(args), default=str)))  # no Path, numpy
    device, dtype = start_processes(args)
    rank, world = rank_and_world()
    out, own = Path(args.out), dict(loss_fn=loss_fn, network=network, augment=augment, data=data)
    settings = vars(args) | {k: f"own {getattr(v, '__name__', type(v).__name__)}"
                             for k, v in own.items() if v is not None}
    checkpoint = load_checkpoint(out, settings)
    start, log = checkpoint["epoch"], checkpoint["log"]
    images, labels = data or load_data(args.data, "train", args.limit, args.seed)
    n, steps = len(labels), len(labels) // args.batch_size
    if args.batch_size % world or not steps:
        raise UserError(f"--batch-size {args.batch_size}: must be at most {n}, the number of "
                        f"images, and divisible by {world}, the number of processes")
    if torch.is_tensor(images) and images.dtype != torch.uint8:
        raise UserError(f"data: the images are {images.dtype}; give uint8 from 0 to 255")
    images = images.to(device) if torch.is_tensor(images) else images
    torch.manual_seed(args.seed)  # for knn_rows and the weights
    knn_rows = (labels >= 0).nonzero()[:, 0]
    knn_rows = knn_rows[torch.randperm(len(knn_rows))[:5000]]

    loss_fn = loss_fn or (lambda z: packing_loss(z, args.radius_scale, args.max_reach))
    augment = (augment or MultiViewAugment)(**{  # its fields are named as the flags
        f.name: getattr(args, f.name) for f in fields(MultiViewAugment)})
    network = network or build_network(args)
    if device.type == "cuda" and world > 1:  # CPUs have no SyncBatchNorm
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device, memory_format=torch.channels_last)
    if args.compile:
        network.compile(mode=args.compile)
    optimizer = torch.optim.SGD(network.parameters(), args.lr, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if start:
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # empty if not fp16
    model = nn.parallel.DistributedDataParallel(network) if world > 1 else network

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        print(f"{settings['data']}: {n} images, {steps} steps an epoch; {world} x {device.type}, "
              f"{dtype}; {'continuing' if start else 'writing'} {out}/")
    bar = tqdm(total=args.epochs * steps, initial=start * steps, unit="step", disable=rank > 0)
    for epoch in range(start, args.epochs):
        began, readings = time.time(), []
        seed = 10_000 * args.seed + epoch  # so that a continued run draws the same
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        batches = order[:steps * args.batch_size].view(steps, world, -1)[:, rank]
        torch.manual_seed(world * seed + rank)  # each process draws its own views
        model.train()
        stream = image_batches(images, batches, augment.crop, device, args.workers)
        for step, pictures in enumerate(stream):
            views = augment(pictures)
            lr = args.lr * args.batch_size / 256 * lr_scale(
                epoch * steps + step, args.warmup_epochs * steps, args.epochs * steps)
            optimizer.param_groups[0]["lr"] = lr
            loss, numbers = loss_fn(gather(embed(model, views, dtype)))
            optimizer.zero_grad()
            scaler.scale(world * loss).backward()  # see gather()
            scaler.unscale_(optimizer)
            lars(optimizer, args.eta, args.weight_decay)
            scaler.step(optimizer)
            scaler.update()
            bar.update()

            if (rank, epoch, step) == (0, 0, 0):
                grid = views[:8, :8].transpose(0, 1).flatten(0, 1)
                save_image(grid, out / "views.png", nrow=len(views[:8]), normalize=True)
            if step % math.ceil(steps / 20) == 0 or step + 1 == steps:  # item() waits for a GPU
                readings.append({"loss": loss.item()} | {k: float(numbers[k]) for k in numbers})
                bar.set_postfix({k: f"{v:.3g}" for k, v in list(readings[-1].items())[:3]})
                weight_norm = nn.utils.get_total_norm(network.parameters())  # loss may hide NaNs
                if not math.isfinite(readings[-1]["loss"]) or not weight_norm.isfinite():
                    raise UserError(f"epoch {epoch + 1}: the loss or a weight is not finite; give "
                                    "another --out and a lower --lr")
        if rank > 0:
            continue
        log.append({"epoch": epoch + 1, "lr": lr, "seconds": round(time.time() - began, 1)})
        log[-1] |= {k: sum(r[k] for r in readings) / len(readings) for k in readings[0]}
        if len(knn_rows) > 1:
            network.eval()
            features = extract_features(network.backbone, images, knn_rows, args.size, device,
                                        dtype, args.workers)
            half, y = len(knn_rows) // 2, labels[knn_rows].to(device)
            log[-1]["knn"] = knn_accuracy(features[half:], y[half:], features[:half], y[:half])
        bar.write(", ".join(f"{k} {v:.4g}" for k, v in log[-1].items()))
        (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        state = {"epoch": epoch + 1, "settings": settings}
        save(out, backbone=dict(state, backbone=network.backbone.state_dict()),
             checkpoint=dict(state, log=log, network=network.state_dict(),
                             optimizer=optimizer.state_dict(), scaler=scaler.state_dict()))
    bar.close()
    if rank == 0 and len(knn_rows) and not data:
        print(f"finished; next: python eval_linear.py {out}")


# -------- settings
# The flags' defaults are the published settings for CIFAR-10. A recipe lists what it changes.

IMAGENET = dict(  # published
    arch="resnet50", stem="imagenet", projector=[8192, 8192, 512], size=224, radius_scale=8.5,
    views=4, batch_size=512, jitter=[0.4, 0.4, 0.2, 0.1], blur_p=[1.0, 0.1], solarize_p=[0.0, 0.2])
SMALL = dict(  # ours: an hour or two on two CPU cores
    data="cifar10", stem="imagenet", zero_init=True, max_reach=1.2, views=2, epochs=30,
    warmup_epochs=1, lr=0.4, eta=0.0, crop_scale=[0.2, 1.0], jitter=[0.4, 0.4, 0.2, 0.1])
RECIPES = {
    "patterns": SMALL | dict(  # ours: minutes
        data="patterns", max_reach=1.5, views=4, batch_size=32, epochs=3, lr=1.6),
    "small": SMALL,
    "cifar10-published": dict(data="cifar10"),
    "imagenet100": IMAGENET | dict(data="imagenet100", epochs=200, lr=2.0),
    "imagenet1k": IMAGENET | dict(data="imagenet", epochs=100, lr=1.1),
}


def within(low, high=math.inf):
    """A flag's type: a finite number from low to high, and an int if low is one."""
    def number(text):
        value = type(low)(text)
        if not low <= value <= high or value == math.inf:
            limits = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: give {limits}")
        return value
    return number


def parse_args(argv=None):
    """The settings, from the command line or from the list argv."""
    parser = argparse.ArgumentParser(
        "clamp.py", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False,
        description="Train CLAMP. Help of a recipe: --recipe NAME --help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, share = parser.add_argument, within(0.0, 1.0)
    add("--recipe", choices=RECIPES, help="patterns without --data, small with it")
    add("--data", type=os.path.normpath, help=f"{', '.join(DATASETS)}, or a folder of pictures")
    add("--limit", type=within(1), help="train on this many images, chosen at random")
    add("--out", help="run folder; if None, runs/<data>")
    add("--radius-scale", type=within(1e-3), default=7.0, help="r_s, factor on the radii")
    add("--max-reach", type=within(1e-3), default=1.5, help="cap on the sum of two radii")
    add("--views", type=within(2), default=16, help="m, views of an image")
    add("--batch-size", type=within(2), default=128, help="b, images a step over all processes")
    add("--epochs", type=within(1), default=1000, help="passes over the images")
    add("--warmup-epochs", type=within(0.0), default=10, help="at most a third of the epochs")
    add("--lr", type=within(0.0), default=0.1, help="peak learning rate at batch size 256")
    add("--eta", type=within(0.0), default=1e-3, help="LARS trust coefficient; 0: plain SGD")
    add("--weight-decay", type=within(0.0), default=1e-6, help="except on biases and norms")
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18", help="backbone")
    add("--stem", choices=("imagenet", "cifar"), default="cifar", help="cifar: 3x3, no max-pool")
    add("--zero-init", action=argparse.BooleanOptionalAction, default=False,
        help="start residual branches from zero")
    add("--projector", type=within(1), nargs="+", default=[2048, 256], help="widths of its layers")
    add("--size", type=within(8), default=32, help="side of a view in pixels")
    add("--crop-scale", type=share, nargs=2, default=[0.08, 1.0], help="least and largest area")
    add("--flip-p", type=share, default=0.5, help="probability of a flip")
    add("--jitter", type=share, nargs=4, default=[0.8, 0.8, 0.8, 0.2],
        help="brightness, contrast, saturation, hue")
    add("--jitter-p", type=share, default=0.8, help="probability of colour jitter")
    add("--gray-p", type=share, default=0.2, help="probability of grey")
    add("--blur-p", type=share, nargs="+", default=[0.5], help="of blur; used by views in turn")
    add("--solarize-p", type=share, nargs="+", default=[0.0], help="of solarising, likewise")
    add("--compile", choices=("default", "reduce-overhead"), help="mode of torch.compile; for GPUs")
    add_machine_flags(parser)

    known, _ = parser.parse_known_args(argv)  # once for the recipe, once with its settings
    recipe = known.recipe or ("patterns" if known.data in (None, "patterns") else "small")
    parser.set_defaults(**RECIPES[recipe], recipe=recipe)
    add("-h", "--help", action="help", help="show this and exit")
    args = parser.parse_args(argv)
    args.warmup_epochs = min(args.warmup_epochs, args.epochs / 3)
    args.out = args.out or f"runs/{Path(args.data).resolve().name}"
    return args


def add_machine_flags(parser):
    """Flags that eval_linear.py has too."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--workers", type=within(0), default=min(8, os.cpu_count()), help="loaders per process")
    add("--seed", type=within(0), default=0, help="seed of all random numbers")


def command_line(main):
    """Run main(). An error that the user can put right gives one line and exit status 2."""
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:
        message = str(error).split("UserError: ")[-1].strip()  # a worker adds its traceback
        if isinstance(error, torch.OutOfMemoryError):
            message = "out of GPU memory; lower --batch-size or --limit"
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(lambda: train(parse_args()))
