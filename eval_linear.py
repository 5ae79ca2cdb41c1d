"""Evaluate the features of a backbone trained by clamp.py.

    python eval_linear.py runs/patterns                     linear probe and 20-NN
    python eval_linear.py runs/cifar10 --augment            the probe sees random crops and flips
    python eval_linear.py runs/cifar10 --random-init        the same network untrained: the floor
    python eval_linear.py runs/cifar10 --data cifar100      on other images
    python eval_linear.py runs/cifar10 --labels 0.01        on 1 % of each class
    python eval_linear.py runs/cifar10 --labels names.txt   on the images named in a file
    python eval_linear.py runs/cifar10 --labels 0.01 --finetune        train the backbone as well
    torchrun --nproc-per-node 8 eval_linear.py runs/imagenet

The probe is a linear classifier on standardised features of the frozen backbone. Without a test
set, a fifth of the training images is first set aside as one. A tenth of the others is held out to
choose the learning rate. Then the probe is trained on all of them, and tested once. The result is
printed, and added to linear.jsonl beside the backbone. neighbours.png shows what the backbone finds
alike. For images without labels, there is only this picture, and features.pt: the names of all
training images and their features.
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
    """n images and their features. Image i is the image rows[i] of data."""
    data: clamp.Data
    rows: torch.Tensor  # [n], on the CPU
    labels: torch.Tensor  # [n], on the device
    features: torch.Tensor  # [n, f], on the device

    def part(self, start, stop=None):
        cut = slice(start, stop)
        return Split(self.data, self.rows[cut], self.labels[cut], self.features[cut])


def load_backbone(path, pretrained=True, backbone=None, seed=0):
    """The backbone of a run folder or of a backbone.pt, in eval mode, and a dict of what the file
    holds: backbone (the weights), epoch and settings. Raises UserError if the weights do not fit.
    backbone: a module of your own. A copy of it gets the weights.
    pretrained: if False, weights are random by the seed, or those of your own module, which has to
        be untrained."""
    own_backbone = backbone is not None
    path = Path(path, "backbone.pt") if Path(path).is_dir() else Path(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        torch.manual_seed(seed)
        if backbone is None:  # without zero_init, which makes untrained features worse
            backbone = clamp.build_backbone(saved["settings"]["arch"], saved["settings"]["stem"])
        trained = copy.deepcopy(backbone)
        trained.load_state_dict(saved["backbone"])  # in any case, to see whether they fit
    except Exception as error:  # damaged files and weights that do not fit raise many types
        raise clamp.UserError(f"{path}: missing, damaged, or of another backbone "
                              f"({type(error).__name__}); name a run folder or a backbone.pt, or "
                              "pass evaluate() the run's backbone")
    if pretrained:
        return trained.eval(), saved
    weights = backbone.state_dict()
    if own_backbone and all(weights[x].cpu().equal(saved["backbone"][x]) for x in weights):
        raise clamp.UserError("--random-init: the backbone has the trained weights; pass a new one")
    return backbone.eval(), saved


def choose_rows(data, rows, labels):
    """Returns the part of rows [n] whose labels are used. rows are in random order, and stay so.
    labels: None for all; a fraction of each class, its first images; or a text file with names of
    image files, separated by white space, such as SimCLR's lists of ImageNet. Each name has to be
    that of one file in rows."""
    if labels is None or not len(rows):  # no rows: no image has a label
        return rows
    if isinstance(labels, float):
        of_row, kept = data.labels[rows], []
        for label in of_row.unique():
            places = (of_row == label).nonzero()[:, 0]
            kept.append(places[:max(1, round(labels * len(places)))])
        return rows[torch.cat(kept).sort().values]  # sorted: in the order of rows
    names = set(Path(labels).read_text(errors="surrogateescape").split())  # as data.files
    files = [] if data.files is None else [Path(file).name for file in data.files[rows.numpy()]]
    kept = [k for k, file in enumerate(files) if file in names]
    if not names or sorted(files[k] for k in kept) != sorted(names):
        raise clamp.UserError(f"--labels {labels}: {len(names)} names fit {len(kept)} training "
                              "files (not counting a fifth that is set aside); each has to fit one")
    return rows[kept]


def extract(network, data, rows, options):
    """The network's outputs, float32 [n, f] on the device, without gradients, for the images `rows`
    [n]. Each process computes a share.
    options: size, device, dtype and workers, as clamp.extract_features takes them."""
    rank, world = clamp.rank_and_world()
    share = math.ceil(len(rows) / world)
    # All shares need the same length. Beyond the last row, they go on with the first ones.
    places = torch.arange(rank * share, (rank + 1) * share) % len(rows)
    part = clamp.extract_features(network, data, rows[places], **options)
    if world == 1:
        return part
    features = part.new_empty(world * share, part.shape[1])
    dist.all_gather_into_tensor(features, part)  # clamp.gather() would take twice the memory
    return features[:len(rows)]


def make_split(data, rows, backbone, options):
    features = extract(backbone, data, rows, options)
    return Split(data, rows, data.labels[rows].to(options["device"]), features)


class CropAndFlip(clamp.MultiViewAugment):
    """MultiViewAugment that only crops, while images are loaded, and flips, when it is called."""

    def photometric(self, x):
        return x


def training_steps(split, args, options, augmented):
    """Yields (batch, images, scale) for each step of all epochs.
    batch: places [b] in the split, the same in all processes
    images: None, or if augmented, those of this process's part, batch.chunk(world)[rank], cropped
        and flipped at random [b / world, 3, size, size]
    scale: the factor of a cosine schedule on the learning rate"""
    rank, world = clamp.rank_and_world()
    n = len(split.rows)
    total = args.epochs * (n // args.batch_size)
    # Each call of draw() yields the same: (step, batch) for all steps.
    draw = partial(clamp.draw_batches, n, args.batch_size, range(args.epochs), args.seed)
    if augmented:
        augment = CropAndFlip(options["size"], views=1)
        parts = ((step, split.rows[batch.chunk(world)[rank]]) for step, batch in draw())
        # The crops of (step, rows) are random by the step and the rows.
        crops_of_parts = clamp.image_batches(split.data, parts, augment.crop, options["device"],
                                             options["workers"], args.seed)
    for step, batch in clamp.progress(draw(), "training", total, leave=False):
        images = None
        if augmented:
            crops = next(crops_of_parts)
            torch.manual_seed(clamp.seed_of(args.seed, step, rank))  # for the flips
            images = augment(crops)[0]  # the only view
        yield batch, images, clamp.lr_scale(step, warmup=0, total=total)


def probe(train, test, rates, classes, backbone, args, options):
    """Train a linear classifier for each learning rate, side by side, by SGD with momentum 0.9 and
    a cosine schedule. Their weights start from 0. Returns logits of test [rates, n, classes].

    Every process trains the same classifiers on whole batches, so gradients need not be exchanged.
    With --augment, each computes the features of its part of the batch, and gets the others'."""
    device = options["device"]
    mean, std = train.features.mean(0), train.features.std(0)  # of plain images, always
    std = std.clamp(min=0.01 * std.mean().item())  # a feature may be constant
    heads = nn.Linear(len(mean), len(rates) * classes, device=device)  # all side by side
    nn.init.zeros_(heads.weight), nn.init.zeros_(heads.bias)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0, momentum=0.9)  # each step sets lr

    def logits(features):  # [n, f] -> [n, rates, classes]
        return heads((features - mean) / std).unflatten(1, (-1, classes))

    for batch, images, scale in training_steps(train, args, options, args.augment):
        batch = batch.to(device, non_blocking=True)
        if args.augment:
            with torch.no_grad():
                x = clamp.embed(backbone, images, options["dtype"])  # [b / world, f]
                # gather() takes a dimension for views. It joins parts in the order of the batch.
                x = clamp.gather(x[None])[0]  # [b, f]
        else:
            x = train.features[batch]
        y, z = train.labels[batch], logits(x)
        # The classifiers share an optimiser, but each has its own rate. So its loss is multiplied
        # by it. Without weight decay, the steps of SGD with momentum are proportional to that.
        losses = [rate * F.cross_entropy(z[:, k], y) for k, rate in enumerate(rates)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.param_groups[0]["lr"] = scale
        optimizer.step()
    with torch.no_grad():
        return logits(test.features).transpose(0, 1)


def finetune(train, test, rates, classes, backbone, args, options):
    """For one learning rate after the other, train a classifier and a copy of the backbone on
    augmented images, without standardising features. The backbone has 0.05 of the classifier's
    rate, as in arXiv 2506.13717. Returns logits of test [rates, n, classes]."""
    (rank, world), device, dtype = clamp.rank_and_world(), options["device"], options["dtype"]
    logits = []
    for rate in rates:
        torch.manual_seed(args.seed)  # the same start for all rates
        # Not from 0: the backbone would have no gradient in the first step.
        head = nn.Linear(train.features.shape[1], classes)
        network = nn.Sequential(copy.deepcopy(backbone), head)
        network = clamp.place(network, device)  # on several GPUs, it synchronises batch norm
        network.train()
        model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
        optimizer = torch.optim.SGD([{"params": network[0].parameters()},
                                     {"params": network[1].parameters()}], lr=0, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        for batch, images, scale in training_steps(train, args, options, augmented=True):
            part = batch.chunk(world)[rank].to(device, non_blocking=True)  # the places of `images`
            z = clamp.embed(model, images, dtype)  # the output, [b / world, classes]
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(z, train.labels[part])).backward()
            optimizer.param_groups[0]["lr"] = 0.05 * rate * scale
            optimizer.param_groups[1]["lr"] = rate * scale
            scaler.step(optimizer)
            scaler.update()
        # Not `network`, because on CPUs, batch norm has other statistics in each process. Before
        # DistributedDataParallel computes, it copies those of process 0 to all.
        logits.append(extract(model.eval(), test.data, test.rows, options))
    return torch.stack(logits)


def accuracy(logits, labels, k=1):
    """Top-k accuracy in %. NaN counts as 0. So a learning rate at which all logits become NaN has
    the accuracy of chance, and is not chosen."""
    top = logits.nan_to_num().topk(min(k, logits.shape[1])).indices
    return 100 * (top == labels[:, None]).any(1).float().mean().item()


def draw_neighbours(split, args, options, path):
    """A picture of a dozen lines: an image, the eight images whose features are nearest, and the
    eight that are nearest for the same network untrained. Called in the first process only."""
    if len(split.rows) < 2:
        return
    untrained = load_backbone(args.run, pretrained=False, seed=args.seed)[0].to(options["device"])
    some = slice(None, None, math.ceil(len(split.rows) / 5000))  # at most 5,000, to be quick
    rows, features = split.rows[some], split.features[some]
    # Not by extract(), which needs all processes.
    untrained_features = clamp.extract_features(untrained, split.data, rows, **options)
    shown = torch.linspace(0, len(rows) - 1, min(12, len(rows))).long()
    columns = [rows[shown][:, None]]  # [12, 1] of rows, then twice [12, 8], a line for each image
    for x in (features, untrained_features):
        x = F.normalize(x).cpu()
        cosine = x[shown] @ x.T
        cosine[torch.arange(len(shown)), shown] = -1  # an image is not its own neighbour
        columns.append(rows[cosine.topk(min(8, len(rows) - 1)).indices])
    crop, white = partial(clamp.center_crop, size=64), torch.full((1, 3, 64, 64), 255).byte()
    tiles = []
    for line in clamp.image_batches(split.data, enumerate(torch.cat(columns, 1)), crop,
                                    torch.device("cpu")):  # uint8 [17, 3, 64, 64]
        image, near, near_untrained = line.split([1, len(line) // 2, len(line) // 2])
        tiles += [image, white, near, white, near_untrained]
    save_image(torch.cat(tiles) / 255, path, nrow=len(line) + 2)  # with two white ones
    print(f"{path}: images, their nearest by the features, and by those of an untrained network")


def choose_images(name, args, own=None):
    """Returns two pairs (data, rows): to train on, in random order, and to test on. Images of
    unknown class, whose label is -1, are left out."""
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
    """Raise UserError if images could not be read. (If files are read when they are needed, others
    have been taken in their place.)"""
    here = set().union(*(x.unreadable for x in data))
    unreadable = set().union(*clamp.from_all(here))  # from all processes
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
    """Evaluate the run args.run, with args as parse_args returns them. Prints, writes and returns
    the result, or None if there are no labels.

    backbone: a module of your own, images [n, 3, size, size] -> [n, f]. A copy of it gets the run's
        weights. With --random-init, it is evaluated as it is, so pass an untrained one.
    data: ((images, labels) to train on, (images, labels) to test on), images uint8 [n, 3, H, W] and
        labels int64 [n], -1 if unknown"""
    device, dtype = clamp.start_processes(args)
    rank, world = clamp.rank_and_world()
    built_here = backbone is None
    backbone, saved = load_backbone(args.run, not args.random_init, backbone, args.seed)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    settings = saved["settings"]
    options = dict(size=settings["size"], device=device, dtype=dtype, workers=args.workers)
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    name = "own" if data else (args.data or settings["data"])
    if data is None and name == "own":  # the run's data were passed to clamp.train
        raise clamp.UserError(f"{args.run} was trained on images from memory; name other --data, "
                              "or pass evaluate() data")

    (train_data, rows), (test_data, test_rows) = choose_images(name, args, data)
    has_test_set = test_data is not train_data
    for x in (train_data, test_data):
        x.to(device)  # moves images in memory, not labels
    if len(rows):
        tenth = math.ceil(len(rows) / 10)  # held out to choose the learning rate
        if args.batch_size % world or args.batch_size > len(rows) - tenth:
            raise clamp.UserError(
                f"--batch-size {args.batch_size}: must be at most {len(rows) - tenth}, the images "
                f"to train on, and divisible by {world}, the number of processes")
        train = make_split(train_data, rows, backbone, options)  # --finetune, too, has a 20-NN
        test = make_split(test_data, test_rows, backbone, options)
        check_readable(train_data, test_data)
    elif args.random_init or args.labels or args.augment or args.finetune:
        raise clamp.UserError("the images have no labels, which --random-init, --labels, --augment "
                              "and --finetune need")
    else:  # only the picture below uses it
        test = export_features(train_data, backbone, options, folder)
    # For a backbone of your own, there is no untrained one to compare with.
    if rank == 0 and built_here and not args.random_init:
        draw_neighbours(test, args, options, folder / "neighbours.png")
    if not len(rows):
        return None

    # fit(train, test, rates) returns logits of test [rates, n, classes].
    fit = partial(finetune if args.finetune else probe, classes=int(train.labels.max()) + 1,
                  backbone=backbone, args=args, options=options)
    held_out = train.part(0, tenth)  # a random tenth, because rows are in random order
    logits_of_rates = fit(train.part(tenth), held_out, args.lr)
    sweep = [accuracy(logits, held_out.labels) for logits in logits_of_rates]
    lr = args.lr[sweep.index(max(sweep))]
    logits = fit(train, test, [lr])[0]
    knn = clamp.knn_accuracy(train.features, train.labels, test.features, test.labels, k=20)
    result = {"top1": round(accuracy(logits, test.labels), 2),
              "top5": round(accuracy(logits, test.labels, 5), 2), "knn": round(knn, 2), "lr": lr,
              "n_train": len(rows), "n_test": len(test_rows), "data": name,
              "epoch": 0 if args.random_init else saved["epoch"], "epochs": settings["epochs"]}
    if rank == 0:
        if built_here and "network" in settings.get("own", []):  # passed to clamp.train()
            print(f"The run had a network of your own. Its weights fit {settings['arch']} with the "
                  f"{settings['stem']} stem. If it was another one, pass evaluate() its backbone.")
        print("backbone after {epoch} of {epochs} epochs".format(**result))
        if not has_test_set:
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
        except ValueError:  # not a number. (Out of range is another error, with a message.)
            raise argparse.ArgumentTypeError(f"{text}: no such file, and not a fraction")

    parser = argparse.ArgumentParser(
        "eval_linear.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        description="Evaluate a backbone. Defaults stand in brackets.")
    add = parser.add_argument
    add("run", help="run folder of clamp.py, or a backbone.pt")
    add("--data", type=clamp.data_name, help="data set or folder (that of the run)")
    add("--limit", type=within(int, 1), help="train on this many random images (all)")
    add("--labels", type=fraction_or_file, help="fraction of the labels, or file of names (all)")
    add("--random-init", action="store_true", help="an untrained backbone: the floor")
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
