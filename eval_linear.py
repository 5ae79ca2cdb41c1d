"""What the frozen features of a backbone that clamp.py trained are worth.

    python eval_linear.py runs/patterns                     linear probe and 20-NN
    python eval_linear.py runs/cifar10 --augment            the published protocol: crops and flips
    python eval_linear.py runs/cifar10 --random-init        the same network untrained: the floor
    python eval_linear.py runs/cifar10 --data stl10         transfer to another data set
    python eval_linear.py runs/cifar10 --labels 0.01        on 1 % of the labels (0.1, or a list)
    python eval_linear.py runs/cifar10 --labels 0.01 --finetune        and train the backbone too
    python eval_linear.py runs/cifar10 --geometry           spectrum, and how the classes pack
    torchrun --nproc-per-node 8 eval_linear.py runs/imagenet

The backbone stays in eval mode and its features are extracted once (with --augment: every epoch).
They are standardised by the training set's mean and standard deviation, an affine map that a
linear classifier absorbs. One classifier for each learning rate is trained, all as one batched
problem; the best on images held out of the training set gives the learning rate, a classifier is
trained with it on all training images, and the test set is looked at once.

Prints a table, then one JSON line, which is written beside the backbone as well: linear.json, or
with --random-init, --data, --labels or --finetune a name that says so; --geometry: geometry.json.
"""

import argparse
import copy
import json
import math
import time
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import clamp

# ---------------------------------------------------------------------------------------------
# Backbone, labelled images and their features
# ---------------------------------------------------------------------------------------------

# A split of a data set: Data, the rows [n] of it in use, their features [n, f] and labels [n].
Split = namedtuple("Split", "data rows features labels")


def load_backbone(path, pretrained=True):
    """The backbone of a run folder or a backbone.pt, and what the file says of it: arch, stem,
    size, data, radius_scale, epoch, mean, std. Raises UserError where there is none."""
    path = Path(path, "backbone.pt") if Path(path).is_dir() else Path(path)
    try:
        saved = clamp.load(path)
        backbone = clamp.build_backbone(saved["arch"], saved["stem"])
        if pretrained:
            backbone.load_state_dict(saved["backbone"])
    except FileNotFoundError:
        raise clamp.UserError(f"{path}: no such file; name a run folder or a backbone.pt") from None
    except Exception:  # torch.load raises many kinds
        raise clamp.UserError(f"{path}: not a backbone that clamp.py wrote, or damaged") from None
    return backbone, saved


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
    found = {}
    for row, file in enumerate(data.files or []):
        for name in Path(file).name, "/".join(Path(file).parts[-2:]):
            found.setdefault(name, []).append(row)
    names = Path(labels).read_text().split()
    for name in names:
        if len(found.get(name, [])) != 1:
            raise clamp.UserError(f"--labels {labels}: {name} is the name of "
                                  f"{len(found.get(name, []))} training images, not of one")
    if not names:
        raise clamp.UserError(f"--labels {labels}: names no image")
    return torch.tensor([found[name][0] for name in names])


# ---------------------------------------------------------------------------------------------
# Classifiers
# ---------------------------------------------------------------------------------------------


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
    0.9 and a cosine schedule, the backbone's learning rate 0.05 of the classifier's (published).

    batches: as for train_heads, but of views [n, 3, s, s]. Returns both, the backbone in eval mode.
    """
    rank, world = clamp.rank_and_world()
    backbone = copy.deepcopy(backbone).train()
    head = nn.Linear(*shape, device=next(backbone.parameters()).device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(backbone, head)
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([{"params": backbone.parameters(), "lr": 0.05 * lr},
                                 {"params": head.parameters()}], lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: clamp.lr_scale(step, 0, steps))
    scaler = torch.amp.GradScaler(head.weight.device.type, enabled=dtype == torch.float16)
    with torch.enable_grad():
        for x, y in tqdm(batches, desc, steps, unit="step", disable=rank > 0, leave=False):
            loss = F.cross_entropy(clamp.embed(model, x, dtype), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    return backbone.eval(), head


def accuracy(logits, labels, k=1):
    """Top-k accuracy in %."""
    top = logits.topk(min(k, logits.shape[1])).indices
    return 100 * (top == labels[:, None]).any(1).float().mean().item()


# ---------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------

RANKS = 10, 100  # of the eigenvalues to which the power law is fitted


def spectrum(features):
    """Eigenvalues [f] of the covariance of features [n, f], in falling order, and the exponent
    alpha of lambda_n ~ n^-alpha: least squares in log and log over RANKS, both included."""
    eigenvalues = torch.linalg.eigvalsh(features.double().T.cov()).flip(0).clamp(min=1e-12)
    low, high = RANKS
    x = torch.arange(low, high + 1, dtype=torch.float64).log()
    y = eigenvalues[low - 1:high].cpu().log()
    return eigenvalues, -((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


def class_packing(features, labels, radius_scale):
    """The packing loss's geometry with classes for images and their images, as many of each class
    as the smallest has, for views."""
    m = labels.bincount().sort().values
    m = m[m > 0][0]
    classes = torch.stack([features[labels == k][:m] for k in labels.unique()], 1)
    return {k: v.item() for k, v in clamp.packing_loss(classes, radius_scale)[1].items()}


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(args):
    """Evaluate args.run as args (from parse_args) say; prints, writes and returns the result."""
    started = time.time()
    device = clamp.start_processes(args.device)
    rank, world = clamp.rank_and_world()
    if args.geometry and world > 1:
        raise clamp.UserError("--geometry: one process computes it; start without torchrun")
    dtype = clamp.autocast_dtype(args.amp, device)
    torch.manual_seed(args.seed)  # the same random network on all processes
    backbone, trained = load_backbone(args.run, pretrained=not args.random_init)
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    name, size = args.data or trained["data"], trained["size"]

    def load(part):
        data = clamp.load_data(name, part, args.data_dir, args.limit if part == "train" else None,
                               args.seed, args.resident_gb)
        if data.labels.min() < 0:
            raise clamp.UserError(f"--data {name}: a probe needs labels, train/<class>/ and test/"
                                  f"<class>/, which these {part} pictures lack; name another set")
        if data.images is not None:
            data.images = data.images.to(device)
        rows = labelled_rows(data, args.labels if part == "train" else None, args.seed)
        features, rows = extract(backbone, data, rows, f"{part} features")
        return Split(data, rows, features, data.labels[rows].to(device))

    def extract(network, data, rows, desc):
        return clamp.extract_features(network, data, rows, size, device, dtype, args.workers, desc)

    def finish(kind, result, hidden=()):
        """Print the result as a JSON line and write it beside the backbone."""
        result |= {"data": name, "epoch": 0 if args.random_init else trained["epoch"],
                   "seconds": round(time.time() - started, 1)}
        parts = [kind, args.random_init and "random-init",
                 name != trained["data"] and Path(name).resolve().name,
                 args.labels and f"labels-{Path(str(args.labels)).name}",
                 args.finetune and "finetune"]
        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        if rank == 0:
            print(json.dumps({k: v for k, v in result.items() if k not in hidden}))
            file = folder / ("-".join(filter(None, parts)) + ".json")
            file.write_text(json.dumps(result) + "\n")
        return result

    if args.geometry:
        test = load("test")
        eigenvalues, alpha = spectrum(test.features)
        share = eigenvalues / eigenvalues.sum()
        packing = class_packing(test.features, test.labels, trained["radius_scale"])
        result = {"alpha": round(alpha, 3), "ranks": RANKS,
                  "participation_ratio": round(1 / share.square().sum().item(), 2),
                  "classes": {k: round(v, 4) for k, v in packing.items()},
                  "n_test": len(test.labels), "eigenvalues": eigenvalues.tolist()}
        ranks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= len(share)]
        print("eigenvalue   " + "".join(f"{k:8}" for k in ranks))
        print("% of variance" + "".join(f"{100 * share[k - 1]:8.3f}" for k in ranks))
        return finish("geometry", result, ["eigenvalues"])

    train, test = load("train"), load("test")
    mean, std = train.features.mean(0), train.features.std(0) + 1e-6
    width, classes = train.features.shape[1], int(train.data.labels.max()) + 1
    augment = clamp.MultiViewAugment(size, 1, jitter_p=0, gray_p=0, blur_p=[0], solarize_p=[0])

    def standardise(x):
        return F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column's weight is the bias

    def steps_of(indices):
        """Steps of an epoch over the images `indices`, and images a step of each process."""
        batch = max(1, min(args.batch_size, len(indices)) // world)
        return len(indices) // (batch * world), batch

    def shares(indices):
        """Of every epoch: its seed, and this process's part of `indices`, [steps, batch]."""
        steps, batch = steps_of(indices)
        for seed in range(args.seed, args.seed + args.epochs):
            torch.manual_seed(seed)
            order = indices[torch.randperm(len(indices))][:steps * world * batch]
            yield seed, order.view(steps, world, batch)[:, rank]

    def view_batches(indices):
        for seed, share in shares(indices):
            views = clamp.view_batches(train.data, train.rows[share], augment, device,
                                       args.workers, seed)
            # views first, so that they are exhausted; one view of each image
            for (x,), picked in zip(views, share.to(device)):
                yield x, train.labels[picked]

    def feature_batches(indices):
        if args.augment:
            for x, y in view_batches(indices):
                yield standardise(clamp.embed(backbone, x, dtype)), y
        else:
            for _, share in shares(indices):
                for picked in share.to(device):
                    yield standardise(train.features[picked]), train.labels[picked]

    def fit(indices, rates, desc):
        """Train on the training images `indices`, once with each learning rate. Returns as many
        functions of a split and indices of its images that give logits."""
        steps = args.epochs * steps_of(indices)[0]
        if not args.finetune:
            weights = train_heads(feature_batches(indices), steps, rates, (width + 1, classes),
                                  device, desc)
            return [lambda split, i, w=w: standardise(split.features[i]) @ w for w in weights]
        networks = [finetune(backbone, view_batches(indices), steps, rate, (width, classes), dtype,
                             f"{desc} {rate:g}") for rate in rates]
        return [lambda split, i, network=network, head=head:
                head(extract(network, split.data, split.rows[i], desc)[0])
                for network, head in networks]

    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(args.seed))
    tenth = math.ceil(len(order) / 10)
    held_out, kept = order[:tenth], order[tenth:]
    sweep = [accuracy(classify(train, held_out), train.labels[held_out])
             for classify in fit(kept, args.lr, "learning rate")]
    lr = args.lr[sweep.index(max(sweep))]
    classify, = fit(order, [lr], "final classifier")
    logits = classify(test, torch.arange(len(test.labels)))
    knn = clamp.knn_accuracy(train.features, train.labels, test.features, test.labels)
    result = {"top1": round(accuracy(logits, test.labels), 2),
              "top5": round(accuracy(logits, test.labels, 5), 2), "knn": round(knn, 2), "lr": lr,
              "n_train": len(order), "n_test": len(test.labels)}
    if rank == 0:
        print("learning rate    " + "".join(f"{rate:8g}" for rate in args.lr))
        print("held out, top-1 %" + "".join(f"{top1:8.2f}" for top1 in sweep) + f"   -> {lr:g}")
        print("test:  top-1 {top1:.2f} %   top-5 {top5:.2f} %   20-NN {knn:.2f} %".format(**result))
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
    parser = clamp.Parser("eval_linear.py", description="Evaluate a run of clamp.py.")
    count, positive = clamp.number(int, 1), clamp.number(float, 0)
    add = parser.add_argument
    add("run", help="run folder of clamp.py, or a backbone.pt")
    add("--data", help="data set or folder; default: what the run was trained on")
    add("--limit", type=count, help="train on the first LIMIT images of a seeded shuffle")
    add("--labels", type=fraction_or_file, metavar="PART",
        help="use this fraction of each class's labels, or those of the files listed in a file")
    add("--finetune", action="store_true", help="train the backbone too, on random crops and flips")
    add("--augment", action="store_true", help="train on random crops and flips, as published")
    add("--random-init", action="store_true", help="the same network untrained: the floor")
    add("--geometry", action="store_true", help="measure the features' geometry; trains nothing")
    add("--lr", type=positive, nargs="+", help="learning rates to choose from "
        "(default: .003 .01 .03 .1 .3; --finetune: .1 .2 .4 .8)", default=argparse.SUPPRESS)
    add("--epochs", type=count, default=argparse.SUPPRESS,
        help="passes over the training images (default: 100; --finetune: 20)")
    add("--batch-size", type=count, default=256, help="images a step, over all processes")
    clamp.add_machine_flags(parser)
    args = parser.parse_args(argv)
    args.data = args.data and str(Path(args.data))  # photos/ is photos
    tuned = [0.1, 0.2, 0.4, 0.8], 20  # the published range, and epochs, of fine-tuning
    rates, epochs = tuned if args.finetune else ([0.003, 0.01, 0.03, 0.1, 0.3], 100)
    args.lr, args.epochs = getattr(args, "lr", rates), getattr(args, "epochs", epochs)
    return args


if __name__ == "__main__":
    clamp.command_line(lambda: evaluate(parse_args()))
