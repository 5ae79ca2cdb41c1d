"""Time and memory of the parts of clamp.py and of the usual ways of doing the same, in one run.

    python experiments/benchmark.py             some ten minutes on two CPU cores
    python experiments/benchmark.py --quick     tiny sizes, to see that it runs
"""

import argparse
import ctypes
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402

JITTER = 0.8, 0.8, 0.8, 0.2


def broadcast_loss(z, radius_scale=7.0):
    """The packing loss by a tensor [b, b, d] of differences."""
    m, b, d = z.shape
    z = F.normalize(z - z.mean((0, 1)), dim=2)
    centers = z.mean(0)
    trace = (z - centers).square().sum((0, 2)) / (m - 1)
    radii = radius_scale * (trace / min(m, d) + 1e-12).sqrt()
    self_pair = torch.eye(b, device=z.device)
    distance = (centers[:, None] - centers + self_pair[..., None]).norm(dim=2)
    reach = (radii[:, None] + radii).clamp(max=1.5)
    near = (distance > 1e-3) & (distance < reach) & (self_pair == 0)
    return ((1 - distance / reach).where(near, 0).square().sum() / 2 + 1e-6).log()


def seconds(function, device, repeats=3):
    """Median time of a call, after one call that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def peak_memory(function, device):
    """GB that a call needs at its peak, beyond what is there before it. On a CPU: Linux only."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def resident(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))

    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    function()
    return (resident("VmHWM") - before) / 2**20


def loss_step(loss_fn, b, d, device):
    """A function that computes a loss of 4 views of b images and its gradient."""
    torch.manual_seed(0)
    z = (torch.randn(b, d) + 0.7 * torch.randn(4, b, d)).to(device).requires_grad_()
    return lambda: loss_fn(z).backward()


def usual_transform(size, blur_kernel):
    """The augmentation as torchvision's transforms, one image at a time."""
    return v2.Compose([
        v2.RandomResizedCrop(size, (0.08, 1.0)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(blur_kernel, (0.1, 2.0))], 0.5),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


class UsualFolder(torch.utils.data.Dataset):
    """Every view is decoded and transformed in the loader."""

    def __init__(self, files, views, transform):
        self.files, self.views, self.transform = files, views, transform

    def __len__(self):
        return len(self.files) * self.views

    def __getitem__(self, k):
        return self.transform(default_loader(self.files[k // self.views]))


class Stop(Exception):
    """Raised by a loss to end the training that it times."""


def training_step(args, device, repeats=5):
    """Median seconds from one call of the loss to the next within clamp.train."""
    stamps = []

    def loss_fn(z):
        if device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        if len(stamps) == repeats + 3:
            raise Stop
        return clamp.packing_loss(z, args.radius_scale, args.max_reach)

    with tempfile.TemporaryDirectory() as out:
        args.out = f"{out}/run"
        try:
            clamp.train(args, loss_fn)
        except Stop:
            return sorted(b - a for a, b in zip(stamps[2:], stamps[3:]))[repeats // 2]


def network_step(args, device):
    """A function: forward and backward of backbone and projector alone on a batch at hand."""
    network = clamp.place(clamp.build_network(args), device)
    views = torch.randn(args.views * args.batch_size, 3, args.size, args.size, device=device)
    _, dtype = clamp.start_processes(args)
    return lambda: clamp.embed(network, views, dtype).square().sum().backward()


def benchmark(quick=False):
    device, cpu = clamp.start_processes(clamp.parse_args([]))[0], torch.device("cpu")
    print(f"{device.type}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}, medians")

    b, d = (64, 16) if quick else (1024, 512)
    steps = [loss_step(loss, b, d, device) for loss in (clamp.packing_loss, broadcast_loss)]
    (ours, theirs), (less, more) = ([f(s, device) for s in steps] for f in (seconds, peak_memory))
    print(f"packing loss, 4 views of {b} images, {d}-d: {1e3 * ours:.1f} ms, {less:.3f} GB; "
          f"broadcast {1e3 * theirs:.0f} ms, {more:.2f} GB: {theirs / ours:.0f} times as fast, "
          f"{more / max(less, 1e-3):.0f} times the memory")
    for more_images in (2 * b, 4 * b):
        peak = peak_memory(loss_step(clamp.packing_loss, more_images, d, device), device)
        print(f"packing loss, {more_images} images: {peak:.2f} GB")

    n = 32 if quick else 128
    images = clamp.draw_patterns(n, 0)[0].to(device)
    augment, usual = clamp.MultiViewAugment(32, 2), usual_transform(32, 3)
    ours = seconds(lambda: augment(augment.crop(images)), device) / (2 * n)
    theirs = seconds(lambda: [usual(x) for x in images.cpu()], cpu) / n
    print(f"augmentation: {1 / ours:,.0f} views/s, torchvision image by image on the CPU "
          f"{1 / theirs:,.0f}: {theirs / ours:.1f} times as fast")

    for stem, views in (("imagenet", 2),) if quick else (("cifar", 4), ("imagenet", 8)):
        batch = 4 if quick else 512 if device.type == "cuda" else 32
        args = clamp.parse_args(["--recipe", "cifar10-published", "--data", "patterns", "--stem",
                                 stem, "--views", str(views), "--batch-size", str(batch)])
        network, whole = seconds(network_step(args, device), device), training_step(args, device)
        print(f"training step, ResNet-18, {stem} stem, {views} views of {batch} images: "
              f"{1e3 * whole:.0f} ms, forward and backward of the network alone "
              f"{1e3 * network:.0f} ms: {whole / network:.2f} times as long")

    n, size = (8, 32) if quick else (96, 224)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(n):
            image = torch.rand(3, 94, 125)[None]
            image = F.interpolate(image, (376, 500), mode="bilinear")[0]
            torchvision.utils.save_image(image, f"{folder}/{k}.jpg")
        data = clamp.load_data(folder, "train")
        augment = clamp.MultiViewAugment(size, 4)
        batches = torch.arange(n).view(-1, n // 6 if n > 8 else n)

        def stream():
            crops = clamp.image_batches(data, enumerate(batches), augment.crop, device, workers=1)
            return [augment(x) for x in crops]

        loader = torch.utils.data.DataLoader(
            UsualFolder(data.files, 4, usual_transform(size, 23)), 64, num_workers=1)
        ours, theirs = seconds(stream, device), seconds(lambda: list(loader), cpu)
        print(f"streamed photographs, 1 worker, 4 views of {size} px: {4 * n / ours:.0f} views/s, "
              f"each view decoded and transformed in the loader {4 * n / theirs:.0f}: "
              f"{theirs / ours:.1f} times as fast")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    benchmark(parser.parse_args().quick)
