"""The peak memory of a GPU while clamp.py trains, computed without a GPU.

    python experiments/memory.py                               every recipe
    python experiments/memory.py --data photos --size 96       any flags of clamp.py

Two steps of clamp.train run on CUDA tensors without contents, in bf16 or with --amp off. Counted
are weights, gradients, momentum, DDP's buckets, images in memory, views, activations and whatever
else this project's code holds. Not counted are what cuDNN takes within an operation, fragments
that the allocator cannot use, and the CUDA context, so a real GPU needs more.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402
import fake_cuda  # noqa: E402

RUNS = [(["--recipe", recipe], world) for recipe, worlds in {
    "patterns": [1], "small": [1], "photos": [1], "cifar10-published": [1, 8],
    "imagenet100": [1, 2, 4, 8], "imagenet1k": [1, 8]}.items() for world in worlds]


def peak_gib(args, world):
    """The most GiB that one of `world` GPUs holds in two steps of clamp.train."""
    data = clamp.Data(None, torch.full([2 * args.batch_size], -1))

    def crops(data, batches, *_, **__):
        for rows in batches:
            shape = len(rows), args.views, 3, args.size, args.size
            yield torch.empty(shape, dtype=torch.uint8, device="cuda")

    with contextlib.ExitStack() as stack:
        args.out, args.epochs = stack.enter_context(tempfile.TemporaryDirectory()), 1
        for redirect in contextlib.redirect_stdout, contextlib.redirect_stderr:
            stack.enter_context(redirect(io.StringIO()))
        dtype = torch.float32 if args.amp == "off" else torch.bfloat16
        gpu = stack.enter_context(fake_cuda.fake_gpu(world, dtype))
        if args.data in clamp.DATASETS:
            n = args.limit or (5000 if args.data == "patterns" else 50_000)
            data.images = torch.empty(n, 3, 32, 32, dtype=torch.uint8, device="cuda")
        else:
            stack.enter_context(mock.patch.object(clamp, "image_batches", crops))
        stack.enter_context(mock.patch.object(clamp, "load_data", lambda *_: data))
        clamp.train(args)
    return gpu.peak / 2**30


def main(flags):
    if fake_cuda.MISSING:
        raise clamp.UserError(fake_cuda.MISSING)
    runs = [(flags, world) for world in (1, 2, 4, 8)] if flags else RUNS
    print("recipe               GPUs   images of a GPU   GiB of a GPU")
    for flags, world in runs:
        args = clamp.parse_args(flags)
        if args.batch_size % world == 0:
            print(f"{args.recipe:20} {world:4} {args.batch_size // world:17} "
                  f"{peak_gib(args, world):14.1f}", flush=True)


if __name__ == "__main__":
    clamp.command_line(lambda: main(sys.argv[1:]))
