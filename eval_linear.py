"""What the features of a backbone that clamp.py trained are worth.

    python eval_linear.py runs/patterns                     linear probe and 20-NN
    python eval_linear.py runs/cifar10 --augment            the published protocol: crops and flips
    python eval_linear.py runs/cifar10 --random-init        the same network untrained: the floor
    python eval_linear.py runs/cifar10 --data stl10         transfer to another data set
    python eval_linear.py runs/cifar10 --labels 0.01        on 1 % of the labels (0.1, or a list)
    python eval_linear.py runs/cifar10 --labels 0.01 --finetune        and train the backbone too
    python eval_linear.py runs/cifar10 --geometry           spectrum, and how the classes pack
    torchrun --nproc-per-node 8 eval_linear.py runs/imagenet

For the probe the backbone stays in eval mode and the features of whole pictures are extracted once
(with --augment those of crops too, to train on, every epoch). They are standardised by the training
set's mean and standard deviation, an affine map that a linear classifier absorbs. One classifier
for each learning rate is trained, all as one batched problem; the best on images held out of the
training set gives the learning rate, a classifier is trained with it on all training images, and
the test set is looked at once.

Prints a table, then one JSON line, which is written beside the backbone as well, with the settings:
linear.json, or geometry.json; other images, labels, methods or seeds than the plain ones are added
to the name.
"""

import argparse
import copy
import json
import math
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import clamp

# Features [n, f] and labels [n] of some of data's images: row k is of data's image rows[k].
Split = namedtuple("Split", "data rows features labels")
POWER_LAW = 10, 100  # first and last rank of the eigenvalues to which a power law is fitted


def load_backbone(path, pretrained=True):
    """The backbone of a run folder or a backbone.pt, and what the file says of it: arch, stem,
    size, data, radius_scale, max_reach, epoch, mean, std. Raises UserError where there is none."""
    path = Path(path, "backbone.pt") if Path(path).is_dir() else Path(path)
    try:
        saved = clamp.load(path)
        # Without zero_init, which would lower the untrained floor by much; weights replace it.
        backbone = clamp.build_backbone(saved["arch"], saved["stem"])
        if pretrained:
            backbone.load_state_dict(saved["backbone"])
    except FileNotFoundError:
        raise clamp.UserError(f"{path}: no such file; name a run folder, after its first epoch, or "
                              "a backbone.pt") from None
    except Exception:  # torch.load raises many kinds
        raise clamp.UserError(f"{path}: not a backbone that clamp.py wrote, or damaged") from None
    return backbone.eval(), saved


def labelled_rows(data, labels, seed):
    """Rows of the images whose labels are used: all, a fraction of every class, or those that a
    file lists by name, one a line, such as n01440764_10026.JPEG or n01440764/n01440764_10026.JPEG
    (as the splits of SimCLR, arXiv 2002.05709, are published)."""
    if not labels:
        return torch.arange(len(data.labels))
    if isinstance(labels, float):
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
        classes = [order[data.labels[order] == k] for k in data.labels.unique()]
        return torch.cat([rows[:max(1, round(labels * len(rows)))] for rows in classes])
    rows_of = {}
    for row, file in enumerate(data.files or []):
        for name in Path(file).name, "/".join(Path(file).parts[-2:]):
            rows_of.setdefault(name, []).append(row)
    names = filter(None, Path(labels).read_text().splitlines())
    found = [(name, rows_of.get(name, [])) for name in names]
    if not found:
        raise clamp.UserError(f"--labels {labels}: names no image; give a name a line")
    for name, rows in found:
        if len(rows) != 1:
            raise clamp.UserError(f"--labels {labels}: {name} is the name of {len(rows)} training "
                                  "images, not of one; give it as class/name, and data as a folder")
    return torch.tensor(sorted({row for _, (row,) in found}))


def train_heads(batches, steps, rates, shape, device, desc):
    """Train a linear softmax classifier for each learning rate, side by side: SGD with momentum
    0.9 and a cosine schedule, from zero.

    batches: iterable of `steps` pairs of features [n, width] and labels [n], this process's share.
    shape: (width, classes). Returns weights [len(rates), width, classes].
    """
    width, classes = shape
    weight = torch.zeros(width, len(rates) * classes, device=device)  # one product for all
    velocity = torch.zeros_like(weight)
    rates = torch.tensor(rates, device=device).repeat_interleave(classes)
    rank, world = clamp.rank_and_world()
    bar = tqdm(batches, desc, steps, unit="step", disable=rank > 0, leave=False)
    for step, (x, y) in enumerate(bar):
        error = (x @ weight).unflatten(1, (-1, classes)).softmax(-1)
        error = error - F.one_hot(y, classes)[:, None]  # cross entropy's gradient in the logits
        gradient = clamp.all_reduce(x.T @ error.flatten(1)) / (len(x) * world)
        velocity = 0.9 * velocity + gradient
        weight -= rates * clamp.lr_scale(step, 0, steps) * velocity
    return weight.unflatten(1, (-1, classes)).transpose(0, 1)


def finetune(backbone, batches, steps, lr, shape, dtype, desc):
    """Train a copy of the backbone and a linear classifier on it, end to end: SGD with momentum
    0.9 and a cosine schedule, the backbone's learning rate 0.05 of the classifier's (arXiv
    2506.13717). With several processes batch norm takes each one's own images.

    batches: as for train_heads, but of views [n, 3, s, s]. Returns both, the backbone in eval mode.
    """
    rank, world = clamp.rank_and_world()
    backbone = copy.deepcopy(backbone).train()
    head = nn.Linear(*shape, device=next(backbone.parameters()).device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    network = nn.Sequential(backbone, head)
    model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
    optimizer = torch.optim.SGD([{"params": backbone.parameters(), "scale": 0.05},
                                 {"params": head.parameters(), "scale": 1.0}], lr, momentum=0.9)
    scaler = torch.amp.GradScaler(head.weight.device.type, enabled=dtype == torch.float16)
    bar = tqdm(batches, desc, steps, unit="step", disable=rank > 0, leave=False)
    with torch.enable_grad():
        for step, (x, y) in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"] * clamp.lr_scale(step, 0, steps)
            loss = F.cross_entropy(clamp.embed(model, x, dtype), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return backbone.eval(), head


def accuracy(logits, labels, k=1):
    """Top-k accuracy in %; logits that are not finite are wrong."""
    top = logits.topk(min(k, logits.shape[1])).indices
    right = (top == labels[:, None]).any(1) & logits.isfinite().all(1)
    return 100 * right.float().mean().item()


def spectrum(features):
    """Eigenvalues [f] of the covariance of features [n, f], in falling order, and the exponent
    alpha of lambda_n ~ n^-alpha: least squares in log and log over the ranks POWER_LAW."""
    eigenvalues = torch.linalg.eigvalsh(features.double().T.cov()).flip(0)
    eigenvalues = eigenvalues.clamp(min=1e-30)  # rounding leaves some below zero
    first, last = POWER_LAW
    x = torch.arange(first, last + 1, dtype=torch.float64).log()
    y = eigenvalues[first - 1:last].cpu().log()
    return eigenvalues, -((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


def class_packing(features, labels, radius_scale, max_reach):
    """The packing loss's geometry with classes for images and their images, as many of each class
    as the smallest has, for views."""
    m = labels.unique(return_counts=True)[1].min()
    classes = torch.stack([features[labels == k][:m] for k in labels.unique()], 1)
    _, geometry = clamp.packing_loss(classes, radius_scale, max_reach=max_reach)
    return {k: v.item() for k, v in geometry.items()}


@torch.no_grad()
def evaluate(args):
    """Evaluate args.run as args (from parse_args) say; prints, writes and returns the result."""
    started = time.time()
    device = clamp.start_processes(args.device)
    rank, world = clamp.rank_and_world()
    if args.geometry and world > 1:
        raise clamp.UserError("--geometry: one process computes it; start without torchrun")
    if args.batch_size < 2 * world:
        raise clamp.UserError(f"--batch-size {args.batch_size}: fewer than two images for each of "
                              f"{world} processes; raise it")
    dtype = clamp.autocast_dtype(args.amp, device)
    torch.manual_seed(args.seed)  # the same random network on all processes
    backbone, trained = load_backbone(args.run, pretrained=not args.random_init)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    name = args.data or trained["data"]
    extract = partial(clamp.extract_features, size=trained["size"], device=device, dtype=dtype,
                      workers=args.workers)

    def load(part, limit=None, labels=None):
        data = clamp.load_data(name, part, args.data_dir, limit, args.seed, args.resident_gb)
        if data.labels.min() < 0:
            file = data.files[data.labels.argmin()]
            raise clamp.UserError(f"--data {name}: a probe needs labels, train/<class>/ and test/"
                                  f"<class>/ of the same classes; {file} has none")
        if data.images is not None:
            data.images = data.images.to(device)
        rows = labelled_rows(data, labels, args.seed)
        features, rows = extract(backbone, data, rows, desc=f"{part} features")
        return Split(data, rows, features, data.labels[rows].to(device))

    def finish(kind, result, **unprinted):
        """Print the result as a JSON line and write it beside the backbone."""
        result |= {"data": name, "epoch": 0 if args.random_init else trained["epoch"],
                   "seconds": round(time.time() - started, 1)}
        transfer = Path(name).resolve() != Path(trained["data"]).resolve()
        parts = [kind, args.random_init and "random-init", transfer and Path(name).resolve().name,
                 args.limit and f"limit-{args.limit}",
                 args.labels and f"labels-{Path(str(args.labels)).name}",
                 args.augment and "augment", args.finetune and "finetune",
                 args.seed and f"seed-{args.seed}"]
        if rank == 0:
            print(json.dumps(result))
            folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
            file = folder / ("-".join(filter(None, parts)) + ".json")
            written = result | unprinted | {"settings": vars(args)}
            file.write_text(json.dumps(written) + "\n")
        return result

    test = load("test")
    if args.geometry:
        if len(test.labels) <= POWER_LAW[1] or test.labels.unique(return_counts=True)[1].min() < 2:
            raise clamp.UserError(f"--geometry: more than {POWER_LAW[1]} test images are needed, "
                                  "two of each class")
        eigenvalues, alpha = spectrum(test.features)
        share = 100 * eigenvalues / eigenvalues.sum()
        packing = class_packing(test.features, test.labels, trained["radius_scale"],
                                trained["max_reach"])
        shown = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= len(share)]
        print("eigenvalue   " + "".join(f"{k:8}" for k in shown))
        print("% of variance" + "".join(f"{share[k - 1]:8.3f}" for k in shown))
        return finish("geometry", {
            "alpha": round(alpha, 3), "ranks": POWER_LAW,
            "participation_ratio": round(1e4 / share.square().sum().item(), 2),
            "classes": {k: round(v, 4) for k, v in packing.items()},
            "n_test": len(test.labels)}, eigenvalues=eigenvalues.tolist())

    train = load("train", args.limit, args.labels)
    mean, std = train.features.mean(0), train.features.std(0)
    std = std.clamp(min=0.01 * std.mean().item())  # constant here, perhaps not in crops
    width, classes = train.features.shape[1], int(train.data.labels.max()) + 1
    crop_and_flip = clamp.MultiViewAugment(trained["size"], 1, jitter_p=0, gray_p=0, blur_p=[0])

    def standardise(x):
        return F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column's weight is the bias

    def batches(indices, steps):
        """This process's part of every batch of every epoch of the training images `indices`, and
        its labels: views for --augment and --finetune, else standardised features."""
        batch = len(indices) // (steps * world)
        for epoch in range(args.epochs):
            seed = 10_000 * args.seed + epoch
            torch.manual_seed(seed)
            order = indices[torch.randperm(len(indices))][:steps * world * batch]
            share = order.view(steps, world, batch)[:, rank]
            if args.augment or args.finetune:
                views = clamp.view_batches(train.data, train.rows[share], crop_and_flip, device,
                                           args.workers, seed)
                # views first, so that they run to their end; one view of each image
                yield from ((x, train.labels[i]) for (x,), i in zip(views, share.to(device)))
            else:
                yield from ((standardise(train.features[i]), train.labels[i])
                            for i in share.to(device))

    def fit(indices, rates, desc):
        """Train on the training images `indices`, once with each learning rate. Returns for each
        a network and a function from its features to logits."""
        # Two images at least for each process.
        steps = min(math.ceil(len(indices) / args.batch_size), len(indices) // (2 * world))
        total = args.epochs * steps
        if args.finetune:
            return [finetune(backbone, batches(indices, steps), total, rate, (width, classes),
                             dtype, f"{desc} {rate:g}") for rate in rates]
        pairs = batches(indices, steps)
        if args.augment:
            pairs = ((standardise(clamp.embed(backbone, x, dtype)), y) for x, y in pairs)
        weights = train_heads(pairs, total, rates, (width + 1, classes), device, desc)
        return [(backbone, lambda x, w=w: standardise(x) @ w) for w in weights]

    def logits(split, i, network, classify):
        if network is backbone:  # not fine-tuned
            return classify(split.features[i])
        return classify(extract(network, split.data, split.rows[i], desc="features")[0])

    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(args.seed))
    tenth = math.ceil(len(order) / 10)
    held_out, kept = order[:tenth], order[tenth:]
    if len(kept) < 2 * world:
        raise clamp.UserError(f"--labels {args.labels}, --limit {args.limit}: {len(order)} images "
                              "are too few to train on")
    sweep = [accuracy(logits(train, held_out, *classifier), train.labels[held_out])
             for classifier in fit(kept, args.lr, "learning rate")]
    lr = args.lr[sweep.index(max(sweep))]
    classifier, = fit(order, [lr], "final classifier")
    output = logits(test, torch.arange(len(test.labels)), *classifier)
    knn = clamp.knn_accuracy(train.features, train.labels, test.features, test.labels)
    result = {"top1": round(accuracy(output, test.labels), 2),
              "top5": round(accuracy(output, test.labels, 5), 2), "knn": round(knn, 2), "lr": lr,
              "n_train": len(order), "n_test": len(test.labels)}
    if rank == 0:
        print("learning rate    " + "".join(f"{rate:8g}" for rate in args.lr))
        print("held out, top-1 %" + "".join(f"{top1:8.2f}" for top1 in sweep) + f"   -> {lr:g}")
        print("test:  top-1 {top1:.2f} %   top-5 {top5:.2f} %   20-NN {knn:.2f} %".format(**result)
              + " (before fine-tuning)" * args.finetune)
    return finish("linear", result)


def fraction_or_file(text):
    """An argparse type: a number within 0 and 1, or the path of a file."""
    if Path(text).is_file():
        return text
    try:
        if 0 < float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is neither a fraction up to 1 nor a file")


def parse_args(argv=None):
    parser = clamp.Parser("eval_linear.py RUN", description="Evaluate a run of clamp.py.")
    count, nonnegative = clamp.number(int, 1), clamp.number(float, 0)
    add = parser.add_argument
    add("run", help="run folder of clamp.py, or a backbone.pt")
    add("--data", type=clamp.data_name,
        help="data set or folder; default: what the run was trained on")
    add("--limit", type=count, help="train on the first LIMIT images of a seeded shuffle")
    add("--labels", type=fraction_or_file, metavar="PART",
        help="train on this fraction of each class (1: all), or on the images that a file names")
    add("--random-init", action="store_true", help="the same network untrained: the floor")
    method = parser.add_mutually_exclusive_group().add_argument
    method("--augment", action="store_true", help="probe on random crops and flips, as published")
    method("--finetune", action="store_true", help="train the backbone too, on crops and flips")
    method("--geometry", action="store_true", help="measure the features' geometry; trains nothing")
    add("--lr", type=nonnegative, nargs="+", default=argparse.SUPPRESS,
        help="rates to choose from (default: .001 .003 .01 .03 .1 .3; finetune: .1 .2 .4 .8)")
    add("--epochs", type=count, default=argparse.SUPPRESS,
        help="passes over the training images (default: 100; finetune: 20)")
    add("--batch-size", type=clamp.number(int, 2), default=256,
        help="images a step, over all processes")
    clamp.add_machine_flags(parser)
    args = parser.parse_args(argv)
    if args.geometry and (args.limit or args.labels):
        parser.error("--geometry: is of the test images; leave --limit and --labels out")
    defaults = dict(lr=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3], epochs=100)
    if args.finetune:
        defaults = dict(lr=[0.1, 0.2, 0.4, 0.8], epochs=20)  # published
    return argparse.Namespace(**defaults | vars(args))


if __name__ == "__main__":
    clamp.command_line(lambda: evaluate(parse_args()))
