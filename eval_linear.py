"""Measure what the features of a backbone that clamp.py trained are worth.

    python eval_linear.py runs/patterns                     linear probe and 20-NN
    python eval_linear.py runs/cifar10 --augment            the probe sees random crops and flips
    python eval_linear.py runs/cifar10 --random-init        the same network untrained: the floor
    python eval_linear.py runs/cifar10 --data cifar100      on other images
    python eval_linear.py runs/cifar10 --labels 0.01        on 1 % of the labels, or on a list
    python eval_linear.py runs/cifar10 --labels 0.01 --finetune        train the backbone as well
    torchrun --nproc-per-node 8 eval_linear.py runs/imagenet

The probe is a linear classifier on standardised features of the frozen backbone. A held-out tenth
of the training images picks its learning rate. Then it is trained on all of them, and tested once.
The result is printed, and added to linear.jsonl beside the backbone. neighbours.png shows what the
backbone finds alike. If there are no labels, features.pt gets the features of all images instead.
"""

import argparse
import copy
import json
import math
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn
from torchvision.utils import save_image

import clamp

# The images `rows` [n] of data, a clamp.Data, their labels [n] and their features [n, f]
Split = namedtuple("Split", "data rows labels features")


def load_backbone(path, pretrained=True, backbone=None):
    """The backbone of a run folder or a backbone.pt, in eval mode, and what the file holds. A given
    backbone takes the weights if pretrained. Raises UserError if they cannot be loaded."""
    path = Path(path, "backbone.pt") if Path(path).is_dir() else Path(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if backbone is None:  # zero_init would lower the untrained floor
            backbone = clamp.build_backbone(saved["settings"]["arch"], saved["settings"]["stem"])
        if pretrained or backbone.state_dict().keys() != saved["backbone"].keys():
            backbone.load_state_dict(saved["backbone"])  # raises if the keys differ
    except Exception:  # torch.load raises many types
        raise clamp.UserError(f"{path}: missing, damaged, or of another backbone; name a run "
                              "folder or a backbone.pt, or pass evaluate() a backbone")
    return backbone.eval(), saved


def choose_rows(data, rows, part):
    """Those of the rows whose labels are used, in the same order: all, a fraction of each class, or
    those whose file names (without spaces) stand in a text file, such as SimCLR's of ImageNet."""
    if part is None:
        return rows
    if isinstance(part, float):
        labels = data.labels[rows]
        places = [(labels == k).nonzero()[:, 0] for k in labels.unique()]
        places = torch.cat([x[:max(1, round(part * len(x)))] for x in places])
        return rows[places.sort().values]
    names, files = set(Path(part).read_text().split()), [] if data.files is None else data.files
    kept = [row for row in rows.tolist() if len(files) and Path(files[row]).name in names]
    if not kept or len(kept) != len(names):
        raise clamp.UserError(f"--labels {part}: its {len(names)} names fit {len(kept)} training "
                              "files; each must fit one")
    return torch.tensor(kept)


def extract(network, data, rows, options):
    """The network's outputs [n, f] for the images `rows` [n]. Each process computes a share."""
    rank, world = clamp.rank_and_world()
    share = math.ceil(len(rows) / world)
    mine = torch.arange(rank * share, (rank + 1) * share) % len(rows)  # the last may begin again
    part = clamp.extract_features(network, data, rows[mine], **options)
    if world == 1:
        return part
    features = part.new_empty(world * share, part.shape[1])
    dist.all_gather_into_tensor(features, part)
    return features[:len(rows)]


def make_split(data, rows, backbone, options):
    features = extract(backbone, data, rows, options)
    return Split(data, rows, data.labels[rows].to(options["device"]), features)


def draw_batches(split, args):
    """For each step, the batch as places [b] in the split, and the factor on the learning rates."""
    steps = len(split.rows) // args.batch_size
    total = args.epochs * steps
    batches = clamp.draw_batches(len(split.rows), args.batch_size, range(args.epochs), args.seed)
    for step, batch in enumerate(clamp.progress(batches, "training", total, leave=False)):
        yield batch, clamp.lr_scale(step, 0, total)


class CropAndFlip(clamp.MultiViewAugment):
    def photometric(self, x):
        return x


def augmented_batches(split, args, options):
    """This process's share of each of those batches, randomly cropped and flipped."""
    rank, world = clamp.rank_and_world()
    augment = CropAndFlip(options["size"], views=1)
    batches = clamp.draw_batches(len(split.rows), args.batch_size, range(args.epochs), args.seed)
    shares = (split.rows[batch.chunk(world)[rank]] for batch in batches)
    stream = clamp.image_batches(split.data, shares, augment.crop, options["device"],
                                 options["workers"], args.seed)
    for step, images in enumerate(stream):
        torch.manual_seed(hash((args.seed, step, rank)))
        yield augment(images)[0]


def probe(train, test, rates, classes, backbone, args, options):
    """Train a linear classifier with each learning rate, side by side: SGD with momentum 0.9 and a
    cosine schedule, from zero. Returns their logits of test, [len(rates), n, classes]."""
    device = options["device"]
    mean, std = train.features.mean(0), train.features.std(0)
    std = std.clamp(min=0.01 * std.mean().item())  # for constant features
    heads = nn.Linear(len(mean), len(rates) * classes, device=device)  # one after the other
    nn.init.zeros_(heads.weight), nn.init.zeros_(heads.bias)
    optimizer = torch.optim.SGD(heads.parameters(), momentum=0.9)
    rates = torch.tensor(rates, device=device)

    def logits(features):  # [n, f] -> [n, len(rates), classes]
        return heads((features - mean) / std).unflatten(1, (-1, classes))

    views = augmented_batches(train, args, options) if args.augment else None
    for batch, scale in draw_batches(train, args):
        batch = batch.to(device, non_blocking=True)
        x, y = train.features[batch], train.labels[batch]
        if args.augment:
            with torch.no_grad():
                x = clamp.gather(clamp.embed(backbone, next(views), options["dtype"])[None])[0]
        z = logits(x)
        loss = F.cross_entropy(z.flatten(0, 1), y.repeat_interleave(len(rates)), reduction="none")
        loss = loss.view(len(y), -1).mean(0) @ rates  # a head's gradient times its rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = scale
        optimizer.step()
    with torch.no_grad():
        return logits(test.features).transpose(0, 1)


def finetune(train, test, rates, classes, backbone, args, options):
    """As probe(), for a classifier and a copy of the backbone, one rate after the other. The
    backbone's learning rate is 0.05 of the classifier's (arXiv 2506.13717)."""
    (rank, world), device, dtype = clamp.rank_and_world(), options["device"], options["dtype"]
    logits = []
    for rate in rates:
        head = nn.Linear(train.features.shape[1], classes)
        network = clamp.place(nn.Sequential(copy.deepcopy(backbone), head), device).train()
        model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
        optimizer = torch.optim.SGD([{"params": part.parameters()} for part in network],
                                    momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        views = augmented_batches(train, args, options)
        for batch, scale in draw_batches(train, args):
            y = train.labels[batch.chunk(world)[rank].to(device, non_blocking=True)]
            loss = F.cross_entropy(clamp.embed(model, next(views), dtype), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            slow, fast = optimizer.param_groups
            slow["lr"], fast["lr"] = 0.05 * rate * scale, rate * scale
            scaler.step(optimizer)
            scaler.update()
        # Without synchronised batch norm, DDP has given all processes the statistics of the first.
        logits.append(extract(model.eval(), test.data, test.rows, options))
    return torch.stack(logits)


def accuracy(logits, labels, k=1):
    top = logits.nan_to_num().topk(min(k, logits.shape[1])).indices
    return 100 * (top == labels[:, None]).any(1).float().mean().item()  # in %


def draw_neighbours(split, untrained, options, path):
    """A picture of a dozen images, one a row, each before the eight of up to 5,000 images that are
    nearest to it by the features, and before those by the features of an untrained backbone."""
    places = torch.randperm(len(split.rows))[:5000]
    data, rows = split.data, split.rows[places]
    shown = [rows[:12, None]]
    for x in (split.features[places.to(options["device"])],
              clamp.extract_features(untrained, data, rows, **options)):
        x = F.normalize(x).cpu()
        cosine = (x[:12] @ x.T).fill_diagonal_(-1)  # an image is not its own neighbour
        shown.append(rows[cosine.topk(min(8, len(rows) - 1)).indices])
    crop, cpu = partial(clamp.center_crop, size=64), torch.device("cpu")
    image, near, near_untrained = (
        torch.stack([crop(x) for x in clamp.image_batches(data, s, crop, cpu)]) for s in shown)
    white = torch.full_like(image, 255)
    grid = torch.cat([image, white, near, white, near_untrained], 1)  # [12, 19, 3, 64, 64]
    save_image(grid.flatten(0, 1) / 255, path, nrow=grid.shape[1])
    print(f"{path}: images, their nearest by the features, and by those of an untrained network")


def evaluate(args, backbone=None, data=None):
    """Evaluate args.run by the settings of parse_args. Prints, writes and returns the result. If
    there are no labels, it writes the features and returns None.

    backbone: a module of your own for the run's weights, images [n, 3, size, size] -> [n, f].
    data: (images, labels) of your own to train on, and (images, labels) to test on."""
    device, dtype = clamp.start_processes(args)
    rank, own = clamp.rank_and_world()[0], data or (None, None)
    torch.manual_seed(args.seed)  # every process builds the same random network
    untrained = None if backbone else load_backbone(args.run, pretrained=False)[0]
    backbone = backbone or copy.deepcopy(untrained)
    backbone, saved = load_backbone(args.run, not args.random_init, backbone)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    settings, name = saved["settings"], args.data or saved["settings"]["data"]
    options = dict(size=settings["size"], device=device, dtype=dtype, workers=args.workers)

    train = clamp.load_data(name, "train", args.limit, args.seed, own[0]).to(device)
    test = clamp.load_data(name, "test", own=own[1]).to(device)
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(train.labels), generator=generator)  # the first ones are held out
    rows, test_rows = rows[train.labels[rows] >= 0], (test.labels >= 0).nonzero()[:, 0]
    labelled = len(rows) > 0
    if not labelled:
        test, test_rows = train, torch.arange(len(train.labels))
    elif not len(test_rows):
        fifth = math.ceil(len(rows) / 5)
        test, test_rows, rows = train, rows[:fifth], rows[fifth:]
    test = make_split(test, test_rows, backbone, options)
    if labelled:
        train = make_split(train, choose_rows(train, rows, args.labels), backbone, options)
    unreadable = test.data.unreadable | (train.data.unreadable if labelled else set())
    if unreadable:
        raise clamp.UserError(f"{len(unreadable)} images, named above, cannot be read; repair or "
                              "remove them")
    if rank == 0 and untrained and not args.random_init:
        draw_neighbours(test, untrained.to(device), options, folder / "neighbours.png")
    if rank == 0 and not labelled:
        files = None if test.data.files is None else test.data.files.tolist()
        torch.save({"files": files, "features": test.features.cpu()}, folder / "features.pt")
        print(f"no labels: the features of {len(test_rows)} images are in {folder}/features.pt")
    if not labelled:
        return None

    tenth = math.ceil(len(train.rows) / 10)
    held_out, rest = (Split(train.data, *(x[part] for x in train[1:]))
                      for part in (slice(tenth), slice(tenth, None)))
    world = clamp.rank_and_world()[1]
    if args.batch_size % world or len(rest.rows) < args.batch_size:
        raise clamp.UserError(f"--batch-size {args.batch_size}: must be at most {len(rest.rows)}, "
                              f"the images to train on, and divisible by {world}, the number of "
                              "processes")
    fit = partial(finetune if args.finetune else probe, classes=int(train.labels.max()) + 1,
                  backbone=backbone, args=args, options=options)
    sweep = [accuracy(logits, held_out.labels) for logits in fit(rest, held_out, args.lr)]
    lr = args.lr[sweep.index(max(sweep))]
    logits, = fit(train, test, [lr])
    knn = clamp.knn_accuracy(train.features, train.labels, test.features, test.labels)
    result = {"top1": round(accuracy(logits, test.labels), 2),
              "top5": round(accuracy(logits, test.labels, 5), 2), "knn": round(knn, 2), "lr": lr,
              "n_train": len(train.rows), "n_test": len(test.rows), "data": "own" if data else name,
              "epoch": saved["epoch"], "epochs": settings["epochs"]}
    if rank == 0:
        print(f"backbone after {saved['epoch']} of {settings['epochs']} epochs")
        if test.data is train.data:
            print(f"no test set: tested on {fifth} held-out images, which the backbone has seen "
                  "without labels")
        print("learning rate    " + "".join(f"{rate:8g}" for rate in args.lr))
        print("held out, top-1 %" + "".join(f"{top1:8.2f}" for top1 in sweep) + f"   -> {lr:g}")
        print("test:  top-1 {top1:.2f} %   top-5 {top5:.2f} %   20-NN {knn:.2f} %".format(**result)
              + " (before fine-tuning)" * args.finetune)
        print(json.dumps(result))
        with open(folder / "linear.jsonl", "a") as file:
            file.write(json.dumps(result | {"settings": vars(args)}) + "\n")
    return result


def parse_args(argv=None):
    def fraction_or_existing_file(text):
        return text if Path(text).is_file() else clamp.number(float, 1e-6, 1.0)(text)

    number = clamp.number
    parser = argparse.ArgumentParser("eval_linear.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("run", help="run folder of clamp.py, or a backbone.pt")
    add("--data", type=clamp.data_name, help="data set or folder (that of the run)")
    add("--limit", type=number(int, 1), help="train on this many random images (all)")
    add("--labels", type=fraction_or_existing_file, help="a share, or a file of names (all)")
    add("--random-init", action="store_true", help="the same network untrained: the floor")
    add("--augment", action="store_true", help="train the probe on random crops and flips")
    add("--finetune", action="store_true", help="train the backbone too, on crops and flips")
    add("--lr", type=number(float, 0), nargs="+", help="rates to choose from (5 or 6)")
    add("--epochs", type=number(int, 1), help="(100, or 20 for --finetune)")
    add("--batch-size", type=number(int, 2), default=256, help="over all processes (256)")
    clamp.add_machine_flags(parser)
    args = parser.parse_args(argv)
    rates = [0.1, 0.2, 0.4, 0.6, 0.8] if args.finetune else [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    args.lr, args.epochs = args.lr or rates, args.epochs or (20 if args.finetune else 100)
    return args


if __name__ == "__main__":
    clamp.command_line(lambda: evaluate(parse_args()))
