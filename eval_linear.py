"""Measure what the features of a backbone that clamp.py trained are worth.

    python eval_linear.py runs/patterns                     linear probe and 20-NN
    python eval_linear.py runs/cifar10 --augment            the probe sees random crops and flips
    python eval_linear.py runs/cifar10 --random-init        the same network untrained: the floor
    python eval_linear.py runs/cifar10 --data cifar100      on other images
    python eval_linear.py runs/cifar10 --labels 0.01        on 1 % of the labels of each class
    python eval_linear.py runs/cifar10 --labels names.txt   on the labels of the images named there
    python eval_linear.py runs/cifar10 --labels 0.01 --finetune        train the backbone as well
    torchrun --nproc-per-node 8 eval_linear.py runs/imagenet

The probe is a linear classifier on standardised features of the frozen backbone. A held-out tenth
of the training images picks its learning rate. Then it is trained on all of them, and tested once.
The result is printed, and added to linear.jsonl beside the backbone. neighbours.png shows what the
backbone finds alike. If the images have no labels, there is no result, but features.pt: the names
of all training images and their features.
"""

import argparse
import copy
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

import clamp


@dataclass
class Split:
    """Some images of a clamp.Data and their features."""
    data: clamp.Data
    rows: torch.Tensor  # [n], their places in data; on the CPU, like data.labels
    labels: torch.Tensor  # [n], on the device
    features: torch.Tensor  # [n, f], on the device

    def part(self, places):  # a slice
        return Split(self.data, self.rows[places], self.labels[places], self.features[places])


def load_backbone(path, pretrained=True, backbone=None):
    """The backbone of a run folder or of a backbone.pt, in eval mode, and what the file holds.
    backbone: a module of your own to load the weights into.
    pretrained: load the weights at all. Raises UserError if they are not those of the backbone."""
    path = Path(path, "backbone.pt") if Path(path).is_dir() else Path(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if backbone is None:
            backbone = clamp.build_backbone(saved["settings"]["arch"], saved["settings"]["stem"])
        if backbone.state_dict().keys() != saved["backbone"].keys():  # also if not pretrained
            raise ValueError
        if pretrained:
            backbone.load_state_dict(saved["backbone"])
    except Exception:  # torch.load raises many types
        raise clamp.UserError(f"{path}: missing, damaged, or of another backbone; name a run "
                              "folder or a backbone.pt, or pass evaluate() a backbone")
    return backbone.eval(), saved


def choose_rows(data, rows, part):
    """Those of the rows, which are in random order, whose labels are used. part: None for all; a
    fraction, for the first rows of each class; or a text file with the names of image files,
    separated by white space, such as SimCLR's of ImageNet."""
    if part is None:
        return rows
    if isinstance(part, float):
        labels = data.labels[rows]
        kept = torch.zeros(len(rows), dtype=torch.bool)
        for label in labels.unique():
            places = (labels == label).nonzero()[:, 0]
            kept[places[:max(1, round(part * len(places)))]] = True
        return rows[kept]
    names = set(Path(part).read_text(errors="surrogateescape").split())
    files = [] if data.files is None else [Path(data.files[row]).name for row in rows]
    fitting = [name for name in files if name in names]
    if not names or sorted(fitting) != sorted(names):
        raise clamp.UserError(f"--labels {part}: {len(names)} names fit {len(fitting)} training "
                              "files; each has to fit one")
    kept = torch.tensor([name in names for name in files])
    return rows[kept]


def extract(network, data, rows, options):
    """The network's outputs [n, f] for the images `rows` [n]. Each process computes a share.
    options: size, device, dtype and workers, as clamp.extract_features takes them."""
    rank, world = clamp.rank_and_world()
    share = math.ceil(len(rows) / world)
    # The shares must be equally long, so the last go on with the first rows. These are cut off.
    places = torch.arange(rank * share, (rank + 1) * share) % len(rows)
    part = clamp.extract_features(network, data, rows[places], **options)
    if world == 1:
        return part
    features = part.new_empty(world * share, part.shape[1])
    dist.all_gather_into_tensor(features, part)
    return features[:len(rows)]


def make_split(data, rows, backbone, options):
    labels = data.labels[rows].to(options["device"])
    return Split(data, rows, labels, extract(backbone, data, rows, options))


class CropAndFlip(clamp.MultiViewAugment):
    """MultiViewAugment without changes of colour."""

    def photometric(self, x):
        return x


def schedule(split, args):
    """For each step, the batch as places [b] in the split, and the factor on the learning rate. An
    incomplete last batch of an epoch is left out."""
    n = len(split.rows)
    steps = args.epochs * (n // args.batch_size)
    batches = clamp.draw_batches(n, args.batch_size, range(args.epochs), args.seed)
    for step, batch in enumerate(clamp.progress(batches, "training", steps, leave=False)):
        yield batch, clamp.lr_scale(step, warmup=0, total=steps)


def augmented_images(split, args, options):
    """For each batch of schedule(), this process's share [b / world, 3, size, size] of the images,
    randomly cropped and flipped."""
    rank, world = clamp.rank_and_world()
    augment = CropAndFlip(options["size"], views=1)
    # The same batches again, because they follow from the arguments alone.
    batches = clamp.draw_batches(len(split.rows), args.batch_size, range(args.epochs), args.seed)
    shares = (split.rows[batch.chunk(world)[rank]] for batch in batches)
    stream = clamp.image_batches(
        split.data, shares, augment.crop, options["device"], options["workers"], args.seed)
    for step, images in enumerate(stream):
        torch.manual_seed(hash((args.seed, step, rank)))
        # Images from files have been cropped by augment.crop. augment() crops those in memory.
        yield augment(images)[0]


def probe(train, test, rates, classes, backbone, args, options):
    """Train a linear classifier for each learning rate, side by side, by SGD with momentum 0.9 and
    a cosine schedule. Their weights start from 0. Returns logits of test [rates, n, classes].

    All processes train the same classifiers on whole batches. With --augment, each of them computes
    the features of its share of the images."""
    device = options["device"]
    mean, std = train.features.mean(0), train.features.std(0)
    std = std.clamp(min=0.01 * std.mean().item())  # for constant features
    heads = nn.Linear(len(mean), len(rates) * classes, device=device)
    nn.init.zeros_(heads.weight), nn.init.zeros_(heads.bias)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0, momentum=0.9)  # each step sets lr
    rates = torch.tensor(rates, device=device)

    def logits(features):  # [n, f] -> [n, rates, classes]
        return heads((features - mean) / std).unflatten(1, (-1, classes))

    images = augmented_images(train, args, options) if args.augment else None
    for batch, scale in schedule(train, args):
        batch = batch.to(device, non_blocking=True)
        x, y = train.features[batch], train.labels[batch]
        if args.augment:
            with torch.no_grad():
                x = clamp.embed(backbone, next(images), options["dtype"])
                x = clamp.gather(x[None])[0]  # of the whole batch; gather() takes [views, n, f]
        z = logits(x).transpose(1, 2)  # [b, classes, rates]
        loss = F.cross_entropy(z, y[:, None].expand(-1, len(rates)), reduction="none").mean(0)
        optimizer.zero_grad()
        (loss * rates).sum().backward()  # each classifier has its rate, as a factor on its loss
        optimizer.param_groups[0]["lr"] = scale
        optimizer.step()
    with torch.no_grad():
        return logits(test.features).transpose(0, 1)


def finetune(train, test, rates, classes, backbone, args, options):
    """For each learning rate anew, train a classifier and a copy of the backbone on augmented
    images. The rate is the classifier's, and the backbone has 0.05 of it (arXiv 2506.13717).
    Returns logits of test [rates, n, classes]."""
    (rank, world), device, dtype = clamp.rank_and_world(), options["device"], options["dtype"]
    logits = []
    for rate in rates:
        head = nn.Linear(train.features.shape[1], classes)
        network = clamp.place(nn.Sequential(copy.deepcopy(backbone), head), device).train()
        model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
        groups = [{"params": part.parameters()} for part in network]
        optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9)  # each step sets lr
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        images = augmented_images(train, args, options)
        for batch, scale in schedule(train, args):
            share = batch.chunk(world)[rank].to(device, non_blocking=True)
            z = clamp.embed(model, next(images), dtype)  # logits
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(z, train.labels[share])).backward()
            slow, fast = optimizer.param_groups
            slow["lr"], fast["lr"] = 0.05 * rate * scale, rate * scale
            scaler.step(optimizer)
            scaler.update()
        # On CPUs, the processes differ in their batch norm. DDP gives all of them the first one's.
        logits.append(extract(model.eval(), test.data, test.rows, options))
    return torch.stack(logits)


def accuracy(logits, labels, k=1):
    """Top-k accuracy in %. With too large a learning rate, logits may be NaN; they count as 0."""
    top = logits.nan_to_num().topk(min(k, logits.shape[1])).indices
    return 100 * (top == labels[:, None]).any(1).float().mean().item()


def draw_neighbours(split, untrained, options, path):
    """A picture with a dozen rows: an image, its eight nearest by the features, and its eight
    nearest by the features of an untrained backbone. They are sought among 5,000 images at most.
    Only one process needs to call this."""
    split = split.part(slice(None, None, math.ceil(len(split.rows) / 5000)))
    n = len(split.rows)
    shown = torch.linspace(0, n - 1, min(12, n)).long()
    untrained_features = clamp.extract_features(untrained, split.data, split.rows, **options)
    columns = [split.rows[shown, None]]
    for x in (split.features, untrained_features):
        x = F.normalize(x).cpu()
        cosine = x[shown] @ x.T
        cosine[torch.arange(len(shown)), shown] = -1  # an image is not its own neighbour
        columns.append(split.rows[cosine.topk(min(8, n - 1)).indices])
    # image_batches() crops images from files, and crop(x) those in memory. A batch is one row.
    crop, cpu = partial(clamp.center_crop, size=64), torch.device("cpu")
    image, near, near_untrained = (  # each [12, images, 3, 64, 64]
        torch.stack([crop(x) for x in clamp.image_batches(split.data, rows, crop, cpu)])
        for rows in columns)
    white = torch.full_like(image, 255)
    grid = torch.cat([image, white, near, white, near_untrained], 1)
    save_image(grid.flatten(0, 1) / 255, path, nrow=grid.shape[1])
    print(f"{path}: images, their nearest by the features, and by those of an untrained network")


def evaluate(args, backbone=None, data=None):
    """Evaluate args.run with the settings args, as parse_args returns them. Prints, writes and
    returns the result, or None if there are no labels.

    backbone: a module of your own, images [n, 3, size, size] -> [n, f], to load the weights into.
        With --random-init its weights stay as they are, so make a new one.
    data: ((images, labels) to train on, (images, labels) to test on), as for clamp.train"""
    device, dtype = clamp.start_processes(args)
    rank, world = clamp.rank_and_world()
    torch.manual_seed(args.seed)  # every process builds the same random network
    untrained = None if backbone else load_backbone(args.run, pretrained=False)[0].to(device)
    torch.manual_seed(args.seed)  # --random-init is this untrained network
    backbone, saved = load_backbone(args.run, not args.random_init, backbone)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    settings, epoch = saved["settings"], 0 if args.random_init else saved["epoch"]
    name = "own" if data else args.data or settings["data"]
    options = dict(size=settings["size"], device=device, dtype=dtype, workers=args.workers)
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent

    own_train, own_test = data or (None, None)
    train_data = clamp.load_data(name, "train", args.limit, args.seed, own_train).to(device)
    test_data = clamp.load_data(name, "test", own=own_test).to(device)
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(train_data.labels), generator=generator)
    rows = rows[train_data.labels[rows] >= 0]  # the others have no label
    test_rows = (test_data.labels >= 0).nonzero()[:, 0]
    if len(rows) and not len(test_rows):
        fifth = math.ceil(len(rows) / 5)
        test_data, test_rows, rows = train_data, rows[:fifth], rows[fifth:]
    if not len(rows):  # without labels, look at all training images
        test = make_split(train_data, torch.arange(len(train_data.labels)), backbone, options)
    else:
        rows = choose_rows(train_data, rows, args.labels)
        train = make_split(train_data, rows, backbone, options)
        test = make_split(test_data, test_rows, backbone, options)
    # Each process has met the unreadable files of its share.
    unreadable = set().union(*clamp.from_all(train_data.unreadable | test_data.unreadable))
    if unreadable:
        raise clamp.UserError(f"{len(unreadable)} images, named above, cannot be read; repair or "
                              "remove them")
    tenth = math.ceil(len(rows) / 10)  # of the rows, which are in random order
    n = len(rows) - tenth
    if len(rows) and (args.batch_size % world or args.batch_size > n):  # before a file is written
        raise clamp.UserError(f"--batch-size {args.batch_size}: must be at most {n}, the images to "
                              f"train on, and divisible by {world}, the number of processes")
    if rank == 0 and untrained and not args.random_init:
        draw_neighbours(test, untrained, options, folder / "neighbours.png")
    if not len(rows):
        if rank == 0 and not args.random_init:
            files = None if train_data.files is None else train_data.files.tolist()
            clamp.write({"files": files, "features": test.features.cpu()}, folder / "features.pt")
            print(f"no labels: {folder}/features.pt has the features of {len(test.rows)} images")
        return None

    rest, held_out = train.part(slice(tenth, None)), train.part(slice(tenth))
    fit = partial(finetune if args.finetune else probe, classes=int(train.labels.max()) + 1,
                  backbone=backbone, args=args, options=options)
    sweep = [accuracy(logits, held_out.labels) for logits in fit(rest, held_out, args.lr)]
    lr = args.lr[sweep.index(max(sweep))]
    logits, = fit(train, test, [lr])
    knn = clamp.knn_accuracy(train.features, train.labels, test.features, test.labels)
    result = {"top1": round(accuracy(logits, test.labels), 2),
              "top5": round(accuracy(logits, test.labels, 5), 2), "knn": round(knn, 2), "lr": lr,
              "n_train": len(rows), "n_test": len(test.rows), "data": name,
              "epoch": epoch, "epochs": settings["epochs"]}
    if rank == 0:
        print(f"backbone after {epoch} of {settings['epochs']} epochs")
        if test_data is train_data:
            print(f"no test set: {len(test.rows)} images are held out. If the backbone was trained "
                  "on this folder, it has seen them, without labels.")
        print("learning rate    " + "".join(f"{rate:8g}" for rate in args.lr))
        print("held out, top-1 %" + "".join(f"{top1:8.2f}" for top1 in sweep) + f"   -> {lr:g}")
        print("test:  top-1 {top1:.2f} %   top-5 {top5:.2f} %   20-NN {knn:.2f} %".format(**result))
        if args.finetune:
            print("20-NN is that of the backbone before fine-tuning.")
        print(json.dumps(result))
        with open(folder / "linear.jsonl", "a") as file:
            file.write(json.dumps(result | {"settings": vars(args)}) + "\n")
    return result


def parse_args(argv=None):
    """The settings, from the command line or from the list argv."""
    within = clamp.within

    def fraction_or_file(text):
        return text if Path(text).is_file() else within(float, 1e-6, 1)(text)

    parser = argparse.ArgumentParser(
        "eval_linear.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        description="Evaluate a backbone. Defaults stand in brackets.")
    add = parser.add_argument
    add("run", help="run folder of clamp.py, or a backbone.pt")
    add("--data", type=clamp.data_name, help="data set or folder (the run's)")
    add("--limit", type=within(int, 1), help="train on this many random images (all)")
    add("--labels", type=fraction_or_file, help="fraction of the labels, or file of names (all)")
    add("--random-init", action="store_true", help="the same network untrained: the floor")
    add("--augment", action="store_true", help="train the probe on random crops and flips")
    add("--finetune", action="store_true", help="train the backbone too, on crops and flips")
    add("--lr", type=within(float, 0), nargs="+",
        help="learning rates to try (.001 .003 .01 .03 .1 .3; --finetune: .1 .2 .4 .6 .8)")
    add("--epochs", type=within(int, 1), help="(100; --finetune: 20)")
    add("--batch-size", type=within(int, 2), default=256, help="over all processes (256)")
    clamp.add_machine_flags(parser)  # --device, --amp, --workers, --seed
    args = parser.parse_args(argv)
    rates = [0.1, 0.2, 0.4, 0.6, 0.8] if args.finetune else [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    args.lr, args.epochs = args.lr or rates, args.epochs or (20 if args.finetune else 100)
    return args


if __name__ == "__main__":
    clamp.command_line(lambda: evaluate(parse_args()))
