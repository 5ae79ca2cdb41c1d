"""Evaluate the features of a backbone trained by clamp.py.

    python eval_linear.py runs/patterns                     linear probe and 20-NN
    python eval_linear.py runs/cifar10 --augment            the probe sees random crops and flips
    python eval_linear.py runs/cifar10 --random-init        the same network untrained: the floor
    python eval_linear.py runs/cifar10 --data cifar100      on other images
    python eval_linear.py runs/cifar10 --labels 0.01        on 1 % of the labels of each class
    python eval_linear.py runs/cifar10 --labels names.txt   on the labels of the files in a list
    python eval_linear.py runs/cifar10 --labels 0.01 --finetune        train the backbone as well
    torchrun --nproc-per-node 8 eval_linear.py runs/imagenet

The probe is a linear classifier on standardised features of the frozen backbone. A held-out tenth
of the training images picks its learning rate. Then it is trained on all of them, and tested once.
The result is printed, and added to linear.jsonl beside the backbone. neighbours.png shows what the
backbone finds alike. For images without labels, there is only this picture, and features.pt: the
names of all training images and their features.
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
    """n images of a clamp.Data and their features."""
    data: clamp.Data
    rows: torch.Tensor  # [n], the images' places in data; on the CPU
    labels: torch.Tensor  # [n], on the device
    features: torch.Tensor  # [n, f], on the device

    def part(self, start, stop=None):
        cut = slice(start, stop)
        return Split(self.data, self.rows[cut], self.labels[cut], self.features[cut])


def load_backbone(path, pretrained=True, backbone=None, seed=0):
    """The backbone of a run folder or of a backbone.pt, in eval mode, and a dict of what the file
    holds: backbone, epoch and settings. Raises UserError if the file and the backbone do not fit.
    backbone: a module of your own to load the weights into.
    pretrained: if False, they are not loaded, and a new network has random ones, by the seed.
    """
    path = Path(path, "backbone.pt") if Path(path).is_dir() else Path(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        torch.manual_seed(seed)
        if backbone is None:
            backbone = clamp.build_backbone(saved["settings"]["arch"], saved["settings"]["stem"])
        if pretrained:
            backbone.load_state_dict(saved["backbone"])
        else:  # only see whether they would fit
            copy.deepcopy(backbone).load_state_dict(saved["backbone"])
    except Exception:  # torch.load raises many types
        raise clamp.UserError(f"{path}: missing, damaged, or of another backbone; name a run "
                              "folder or a backbone.pt, or pass evaluate() a backbone")
    return backbone.eval(), saved


def choose_rows(data, rows, part):
    """Choose the rows whose labels are used. rows: [n], in random order.
    part: None for all of them; a fraction, for the first of the rows of each class; or a text file
    with names of image files, separated by white space, such as SimCLR's lists of ImageNet."""
    if part is None or not len(rows):
        return rows
    if isinstance(part, float):
        labels, kept = data.labels[rows], []
        for label in labels.unique():
            places = (labels == label).nonzero()[:, 0]
            kept.append(places[:max(1, round(part * len(places)))])
        return rows[torch.cat(kept).sort().values]
    names = set(Path(part).read_text(errors="surrogateescape").split())  # as file names are
    files = [] if data.files is None else data.files[rows.numpy()]
    kept = [k for k, file in enumerate(files) if Path(file).name in names]
    # Each name has to be that of one file.
    if not names or {Path(files[k]).name for k in kept} != names or len(kept) > len(names):
        raise clamp.UserError(f"--labels {part}: {len(names)} names fit {len(kept)} training "
                              "files; each has to fit one")
    return rows[kept]


def extract(network, data, rows, options):
    """The network's outputs [n, f] for the images `rows` [n]. Each process computes a share.
    options: size, device, dtype and workers, as clamp.extract_features takes them."""
    rank, world = clamp.rank_and_world()
    share = math.ceil(len(rows) / world)
    # All shares need the same length. Beyond the end, they go on with the first rows (%).
    places = torch.arange(rank * share, (rank + 1) * share) % len(rows)
    part = clamp.extract_features(network, data, rows[places], **options)
    if world == 1:
        return part
    features = part.new_empty(world * share, part.shape[1])
    dist.all_gather_into_tensor(features, part)  # clamp.gather() takes twice the memory
    return features[:len(rows)]  # without what came after the end


def make_split(data, rows, backbone, options):
    features = extract(backbone, data, rows, options)
    return Split(data, rows, data.labels[rows].to(options["device"]), features)


class CropAndFlip(clamp.MultiViewAugment):
    """MultiViewAugment without its changes of colour. crop() crops, and a call flips the crops."""

    def photometric(self, x):
        return x


def training_steps(split, args, options, augmented):
    """For each step: the batch as places [b] in the split, the factor on the learning rate, and if
    augmented, this process's share [b / world, 3, size, size] of the images, cropped and flipped
    at random. Otherwise, images is None."""
    (rank, world), n = clamp.rank_and_world(), len(split.rows)
    total, images = args.epochs * (n // args.batch_size), None
    draw = partial(clamp.draw_batches, n, args.batch_size, range(args.epochs), args.seed)
    if augmented:
        augment = CropAndFlip(options["size"], views=1)
        shares = ((step, split.rows[places]) for step, places in draw(rank=rank, world=world))
        stream = clamp.image_batches(split.data, shares, augment.crop, options["device"],
                                     options["workers"], args.seed)
    for step, batch in clamp.progress(draw(), "training", total, leave=False):
        if augmented:
            crops = next(stream)
            torch.manual_seed(clamp.seed_of(args.seed, step, rank))  # for the flips
            images = augment(crops)[0]  # the only view
        yield batch, clamp.lr_scale(step, warmup=0, total=total), images


def probe(train, test, rates, classes, backbone, args, options):
    """Train a linear classifier for each learning rate, side by side, by SGD with momentum 0.9 and
    a cosine schedule. Their weights start from 0. Returns logits of test [rates, n, classes].

    Every process trains the same classifiers on whole batches. With --augment, it computes the
    features of its share of the images, and gathers the others."""
    device = options["device"]
    mean, std = train.features.mean(0), train.features.std(0)
    std = std.clamp(min=0.01 * std.mean().item())  # for constant features
    heads = nn.Linear(len(mean), len(rates) * classes, device=device)
    nn.init.zeros_(heads.weight), nn.init.zeros_(heads.bias)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0, momentum=0.9)  # each step sets lr

    def logits(features):  # [n, f] -> [n, rates, classes]
        return heads((features - mean) / std).unflatten(1, (-1, classes))

    for batch, scale, images in training_steps(train, args, options, args.augment):
        batch = batch.to(device, non_blocking=True)
        x, y = train.features[batch], train.labels[batch]
        if args.augment:
            with torch.no_grad():
                x = clamp.embed(backbone, images, options["dtype"])  # [b / world, f]
                # gather() takes [views, b, f]. Here is one view.
                x = clamp.gather(x[None])[0]  # [b, f], in the order of the batch
        z = logits(x)
        # Without weight decay, SGD with momentum is linear in the gradients. So each classifier can
        # have its rate as a factor on its loss.
        losses = [rate * F.cross_entropy(z[:, k], y) for k, rate in enumerate(rates)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.param_groups[0]["lr"] = scale
        optimizer.step()
    with torch.no_grad():
        return logits(test.features).transpose(0, 1)


def finetune(train, test, rates, classes, backbone, args, options):
    """For one learning rate after the other, train a classifier and a copy of the backbone on
    augmented images. The backbone has 0.05 of the classifier's rate (arXiv 2506.13717). Returns
    logits of test [rates, n, classes]."""
    (rank, world), device, dtype = clamp.rank_and_world(), options["device"], options["dtype"]
    logits = []
    for rate in rates:
        torch.manual_seed(args.seed)  # the same start for all rates
        head = nn.Linear(train.features.shape[1], classes)
        network = nn.Sequential(copy.deepcopy(backbone), head)
        network = clamp.place(network, device).train()  # with synchronised batch norm on GPUs
        model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
        optimizer = torch.optim.SGD([{"params": network[0].parameters()},
                                     {"params": network[1].parameters()}], lr=0, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        for batch, scale, images in training_steps(train, args, options, augmented=True):
            share = batch.chunk(world)[rank].to(device, non_blocking=True)
            logits_of_share = clamp.embed(model, images, dtype)  # the network's output
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(logits_of_share, train.labels[share])).backward()
            optimizer.param_groups[0]["lr"] = 0.05 * rate * scale
            optimizer.param_groups[1]["lr"] = rate * scale
            scaler.step(optimizer)
            scaler.update()
        # On CPUs, each process has its own statistics of batch norm. DistributedDataParallel takes
        # the first process's before it computes, so it is `model` that is evaluated.
        logits.append(extract(model.eval(), test.data, test.rows, options))
    return torch.stack(logits)


def accuracy(logits, labels, k=1):
    """Top-k accuracy in %. With too large a rate, logits are NaN, and it is that of chance."""
    top = logits.nan_to_num().topk(min(k, logits.shape[1])).indices
    return 100 * (top == labels[:, None]).any(1).float().mean().item()


def draw_neighbours(split, args, options, path):
    """A picture with a dozen lines: an image, its eight nearest by the features, and its eight
    nearest by those of the same network untrained. They are sought among 5,000 images at most.
    This needs no other process."""
    if len(split.rows) < 2:
        return
    untrained = load_backbone(args.run, pretrained=False, seed=args.seed)[0].to(options["device"])
    kept = slice(None, None, math.ceil(len(split.rows) / 5000))
    rows, features = split.rows[kept], split.features[kept]
    untrained_features = clamp.extract_features(untrained, split.data, rows, **options)
    shown = torch.linspace(0, len(rows) - 1, min(12, len(rows))).long()
    blocks = [rows[shown][:, None]]  # three parts of the picture, as rows of data: [12, 1 or 8]
    for x in (features, untrained_features):
        x = F.normalize(x).cpu()
        cosine = x[shown] @ x.T
        cosine[torch.arange(len(shown)), shown] = -1  # an image is not its own neighbour
        blocks.append(rows[cosine.topk(min(8, len(rows) - 1)).indices])
    crop, cpu = partial(clamp.center_crop, size=64), torch.device("cpu")
    # Each line of a block is a batch. The result is uint8 [12, 1 or 8, 3, 64, 64].
    blocks = [torch.stack(list(clamp.image_batches(split.data, enumerate(block), crop, cpu)))
              for block in blocks]
    white = torch.full_like(blocks[0], 255)
    grid = torch.cat([blocks[0], white, blocks[1], white, blocks[2]], 1)
    save_image(grid.flatten(0, 1) / 255, path, nrow=grid.shape[1])
    print(f"{path}: images, their nearest by the features, and by those of an untrained network")


def choose_images(name, args, own=None):
    """(data, rows) to train on, rows in random order, and (data, rows) to test on. Rows without
    labels are left out."""
    own_train, own_test = own or (None, None)
    train = clamp.load_data(name, "train", limit=args.limit, seed=args.seed, own=own_train)
    test = clamp.load_data(name, "test", own=own_test)  # empty if there is no test set
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(train.labels), generator=generator)
    rows = rows[train.labels[rows] >= 0]
    test_rows = (test.labels >= 0).nonzero()[:, 0]
    if not len(test_rows):  # without labelled test images, hold out a fifth
        fifth = math.ceil(len(rows) / 5)
        test, test_rows, rows = train, rows[:fifth], rows[fifth:]
    return (train, choose_rows(train, rows, args.labels)), (test, test_rows)


def check_readable(*data):
    """Raise UserError if images could not be read. (The loader has put others in their place.)"""
    here = set().union(*(x.unreadable for x in data))
    unreadable = set().union(*clamp.from_all(here))  # each process has read only its share
    if unreadable:
        raise clamp.UserError(f"{len(unreadable)} images, named above, cannot be read; repair or "
                              "remove them")


def export_features(data, backbone, options, folder):
    """Write features.pt, for images without labels. Returns their Split."""
    split = make_split(data, torch.arange(len(data.labels)), backbone, options)
    check_readable(data)
    if clamp.rank_and_world()[0] == 0:
        files = None if data.files is None else data.files.tolist()
        clamp.write({"files": files, "features": split.features.cpu()}, folder / "features.pt")
        print(f"no labels: {folder}/features.pt has the features of {len(split.rows)} images")
    return split


def evaluate(args, backbone=None, data=None):
    """Evaluate args.run with the settings args, as parse_args returns them. Prints, writes and
    returns the result, or None if there are no labels.

    backbone: a module of your own, images [n, 3, size, size] -> [n, f], to load the weights into.
        With --random-init its weights stay as they are, so make a new one.
    data: ((images, labels) to train on, (images, labels) to test on), as for clamp.train"""
    device, dtype = clamp.start_processes(args)
    rank, world = clamp.rank_and_world()
    # The picture needs an untrained network, which can be built only if it is not your own.
    draw_picture = rank == 0 and backbone is None and not args.random_init
    backbone, saved = load_backbone(args.run, not args.random_init, backbone, args.seed)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    settings = saved["settings"]
    options = dict(size=settings["size"], device=device, dtype=dtype, workers=args.workers)
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    name = "own" if data else (args.data or settings["data"])
    if name == "own" and not data:
        raise clamp.UserError(f"{args.run} was trained on images from memory; name other --data, "
                              "or pass evaluate() data")

    (train_data, rows), (test_data, test_rows) = choose_images(name, args, data)
    train_data.to(device), test_data.to(device)  # moves their images, not their labels
    if not len(rows):  # no labels
        if args.random_init:
            raise clamp.UserError("--random-init: the images have no labels to measure a floor by")
        split = export_features(train_data, backbone, options, folder)
        if draw_picture:
            draw_neighbours(split, args, options, folder / "neighbours.png")
        return None
    tenth = math.ceil(len(rows) / 10)
    n = len(rows) - tenth
    if args.batch_size % world or args.batch_size > n:
        raise clamp.UserError(f"--batch-size {args.batch_size}: must be at most {n}, the images to "
                              f"train on, and divisible by {world}, the number of processes")
    train = make_split(train_data, rows, backbone, options)
    test = make_split(test_data, test_rows, backbone, options)
    check_readable(train_data, test_data)
    if draw_picture:
        draw_neighbours(test, args, options, folder / "neighbours.png")

    # fit(train, test, rates) returns logits of test [rates, n, classes].
    fit = partial(finetune if args.finetune else probe, classes=int(train.labels.max()) + 1,
                  backbone=backbone, args=args, options=options)
    held_out = train.part(0, tenth)
    sweep = [accuracy(logits, held_out.labels)
             for logits in fit(train.part(tenth), held_out, args.lr)]
    lr = args.lr[sweep.index(max(sweep))]
    logits = fit(train, test, [lr])[0]
    knn = clamp.knn_accuracy(train.features, train.labels, test.features, test.labels)
    result = {"top1": round(accuracy(logits, test.labels), 2),
              "top5": round(accuracy(logits, test.labels, 5), 2), "knn": round(knn, 2), "lr": lr,
              "n_train": len(rows), "n_test": len(test_rows), "data": name,
              "epoch": 0 if args.random_init else saved["epoch"], "epochs": settings["epochs"]}
    if rank == 0:
        if draw_picture and "network" in settings.get("own", []):
            print(f"The run had a network of its own. Its weights fit {settings['arch']} with the "
                  f"{settings['stem']} stem. If it is another one, pass evaluate() a backbone.")
        print("backbone after {epoch} of {epochs} epochs".format(**result))
        if test_data is train_data:
            print(f"no test set: {len(test_rows)} images are held out. If the backbone was trained "
                  "on this folder, it has seen them, without labels.")
        print("learning rate    " + "".join(f"{rate:8g}" for rate in args.lr))
        print("held out, top-1 %" + "".join(f"{top1:8.2f}" for top1 in sweep) + f"   -> {lr:g}")
        print("test:  top-1 {top1:.2f} %   top-5 {top5:.2f} %   20-NN {knn:.2f} %".format(**result))
        if args.finetune:
            print("20-NN is that of the backbone before fine-tuning.")
        print(json.dumps(result))
        with open(folder / "linear.jsonl", "a") as file:
            file.write(json.dumps(result | {"settings": vars(args)}, default=str) + "\n")
    return result


def parse_args(argv=None):
    """The settings, from the command line or from the list argv."""
    within = clamp.within

    def fraction_or_file(text):
        try:
            return text if Path(text).is_file() else within(float, 1e-6, 1)(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: no such file, and not a fraction")

    parser = argparse.ArgumentParser(
        "eval_linear.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        description="Evaluate a backbone. Defaults stand in brackets.")
    add = parser.add_argument
    add("run", help="run folder of clamp.py, or a backbone.pt")
    add("--data", type=clamp.data_name, help="data set or folder (the run's)")
    add("--limit", type=within(int, 1), help="train on this many random images (all)")
    add("--labels", type=fraction_or_file, help="fraction of the labels, or file of names (all)")
    add("--random-init", action="store_true", help="an untrained network: the floor")
    add("--augment", action="store_true", help="train the probe on random crops and flips")
    add("--finetune", action="store_true", help="train the backbone too, on crops and flips")
    add("--lr", type=within(float, 0), nargs="+",
        help="learning rates to try (.001 .003 .01 .03 .1 .3; --finetune: .1 .2 .4 .6 .8)")
    add("--epochs", type=within(int, 1), help="of the classifier (100; --finetune: 20)")
    add("--batch-size", type=within(int, 2), default=256, help="over all processes (256)")
    clamp.add_machine_flags(parser)  # --device, --amp, --workers, --seed
    args = parser.parse_args(argv)
    rates = [0.1, 0.2, 0.4, 0.6, 0.8] if args.finetune else [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    args.lr, args.epochs = args.lr or rates, args.epochs or (20 if args.finetune else 100)
    return args


if __name__ == "__main__":
    clamp.command_line(lambda: evaluate(parse_args()))
