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
The result is printed, and added to linear.jsonl beside the backbone.
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
from torch import nn
from tqdm import tqdm

import clamp

# n images as in clamp.py, their labels [n] and their features [n, f]
Split = namedtuple("Split", "images labels features")


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
    except Exception:  # torch.load raises many kinds
        raise clamp.UserError(f"{path}: missing, damaged, or of another backbone; name a run "
                              "folder or a backbone.pt, or pass evaluate() a backbone")
    return backbone.eval(), saved


def labelled_rows(images, labels, part, seed):
    """The images whose labels are used: all, a fraction of each class, or those whose file names
    (without spaces) stand in a text file, such as SimCLR's splits of ImageNet."""
    if part is None:
        return torch.arange(len(labels))
    if isinstance(part, float):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        classes = [order[labels[order] == k] for k in labels.unique()]
        return torch.cat([rows[:max(1, round(part * len(rows)))] for rows in classes])
    names, files = set(Path(part).read_text().split()), [] if torch.is_tensor(images) else images
    rows = torch.tensor([k for k, file in enumerate(files) if Path(file).name in names])
    if not len(rows) or len(rows) != len(names):
        raise clamp.UserError(f"--labels {part}: its {len(names)} names fit {len(rows)} training "
                              "files; each must fit one, not kept in memory")
    return rows


def extract(network, images, options):
    """The network's outputs [n, f] for n images. Each process computes a share of them."""
    (rank, world), n = clamp.rank_and_world(), len(images)
    share = math.ceil(n / world)
    rows = torch.arange(rank * share, (rank + 1) * share) % n  # the last share may wrap around
    part = clamp.extract_features(network, images, rows, **options)
    if world == 1:
        return part
    features = part.new_zeros(world, *part.shape)  # gather() would hold them three times
    features[rank] = part
    torch.distributed.all_reduce(features)
    return features.flatten(0, 1)[:n]


def batches(train, args, options):
    """Yield for each step the factor on the learning rate, the batch as rows of train (process 0's
    share comes first), and the views of this process's share. The views are None without
    --augment and --finetune."""
    (rank, world), n = clamp.rank_and_world(), len(train.labels)
    steps = n // args.batch_size
    if args.batch_size % world or not steps:
        raise clamp.UserError(f"--batch-size {args.batch_size}: must be at most {n}, the images to "
                              f"train on, and divisible by {world}, the number of processes")
    augment = clamp.MultiViewAugment(options["size"], 1, jitter_p=0, gray_p=0, blur_p=[0])
    for epoch in tqdm(range(args.epochs), "training", leave=False, disable=rank > 0):
        seed = 10_000 * args.seed + epoch
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        order = order[:steps * args.batch_size].view(steps, world, -1)
        torch.manual_seed(world * seed + rank)
        views = [None] * steps
        if args.augment or args.finetune:
            pictures = clamp.image_batches(train.images, order[:, rank], augment.crop,
                                           options["device"], options["workers"])
            views = (augment(x)[0] for x in pictures)
        scale = [clamp.lr_scale(epoch * steps + k, 0, args.epochs * steps) for k in range(steps)]
        yield from zip(scale, order.flatten(1).to(options["device"]), views)


def probe(train, test, rates, classes, backbone, args, options):
    """Train a linear classifier with each learning rate, side by side: SGD with momentum 0.9 and a
    cosine schedule, from zero. Returns their logits of test, [len(rates), n, classes]."""
    mean, std = train.features.mean(0), train.features.std(0)
    std = std.clamp(min=0.01 * std.mean().item())  # for constant features

    def standardise(x):
        return F.pad((x - mean) / std, (0, 1), value=1.0)  # the weight of the 1 is the bias

    weight = torch.zeros(len(mean) + 1, len(rates) * classes, device=mean.device)
    velocity = torch.zeros_like(weight)
    column_rates = torch.tensor(rates, device=mean.device).repeat_interleave(classes)
    for scale, batch, views in batches(train, args, options):
        if views is None:
            x = train.features[batch]
        else:
            x = clamp.gather(clamp.embed(backbone, views, options["dtype"])[None])[0]
        x, y = standardise(x), F.one_hot(train.labels[batch], classes)
        error = (x @ weight).unflatten(1, (-1, classes)).softmax(2) - y[:, None]
        velocity = 0.9 * velocity + x.T @ error.flatten(1) / len(x)
        weight -= column_rates * scale * velocity
    return (standardise(test.features) @ weight).unflatten(1, (-1, classes)).transpose(0, 1)


def finetune(train, test, rates, classes, backbone, args, options):
    """As probe(), for a classifier and a copy of the backbone, one rate after the other. The
    backbone's learning rate is 0.05 of the classifier's (arXiv 2506.13717)."""
    (rank, world), dtype, logits = clamp.rank_and_world(), options["dtype"], []
    for rate in rates:
        head = nn.Linear(train.features.shape[1], classes, device=options["device"])
        network = nn.Sequential(copy.deepcopy(backbone), head).train()
        model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
        optimizer = torch.optim.SGD([{"params": network[0].parameters(), "rate": 0.05 * rate},
                                     {"params": head.parameters(), "rate": rate}], momentum=0.9)
        scaler = torch.amp.GradScaler(options["device"].type, enabled=dtype == torch.float16)
        for scale, batch, views in batches(train, args, options):
            for group in optimizer.param_groups:
                group["lr"] = scale * group["rate"]
            y = train.labels[batch].view(world, -1)[rank]
            with torch.enable_grad():
                loss = scaler.scale(F.cross_entropy(clamp.embed(model, views, dtype), y))
            optimizer.zero_grad()
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
        # DDP (model, not network) gives all processes the first one's batch norm statistics.
        logits.append(extract(model.eval(), test.images, options))
    return torch.stack(logits)


def make_split(images, labels, backbone, options):
    if labels.min() < 0:
        raise clamp.UserError("--data: has no labels; evaluation needs train/<class>/ and "
                              "test/<class>/ or val/<class>/")
    images = images.to(options["device"]) if torch.is_tensor(images) else images
    return Split(images, labels.to(options["device"]), extract(backbone, images, options))


def accuracy(logits, labels, k=1):
    top = logits.nan_to_num().topk(min(k, logits.shape[1])).indices
    return 100 * (top == labels[:, None]).any(1).float().mean().item()  # in %


@torch.no_grad()
def evaluate(args, backbone=None, data=None):
    """Evaluate args.run by the settings of parse_args. Prints, writes and returns the result.

    backbone: a module of your own for the run's weights, images [n, 3, size, size] -> [n, f].
    data: (images, labels) of your own to train on, and (images, labels) to test on.
    """
    device, dtype = clamp.start_processes(args)
    torch.manual_seed(args.seed)  # every process builds the same random network
    backbone, saved = load_backbone(args.run, not args.random_init, backbone)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    name = args.data or saved["settings"]["data"]
    (images, labels), test = data or (clamp.load_data(name, "train", args.limit, args.seed),
                                      clamp.load_data(name, "test"))
    options = dict(size=saved["settings"]["size"], device=device, dtype=dtype, workers=args.workers)
    rows = labelled_rows(images, labels, args.labels, args.seed)
    rows = rows[torch.randperm(len(rows))]  # because the first tenth of them is held out
    train = make_split(images[rows.numpy()], labels[rows], backbone, options)
    test = make_split(*test, backbone, options)

    fit = partial(finetune if args.finetune else probe, classes=int(train.labels.max()) + 1,
                  backbone=backbone, args=args, options=options)
    tenth = math.ceil(len(rows) / 10)
    held_out, rest = Split(*(x[:tenth] for x in train)), Split(*(x[tenth:] for x in train))
    sweep = [accuracy(logits, held_out.labels) for logits in fit(rest, held_out, args.lr)]
    lr = args.lr[sweep.index(max(sweep))]
    logits, = fit(train, test, [lr])
    knn = clamp.knn_accuracy(train.features, train.labels, test.features, test.labels)
    result = {"top1": round(accuracy(logits, test.labels), 2),
              "top5": round(accuracy(logits, test.labels, 5), 2), "knn": round(knn, 2), "lr": lr,
              "n_train": len(rows), "n_test": len(test.labels), "data": "own" if data else name}
    if clamp.rank_and_world()[0] == 0:
        print("learning rate    " + "".join(f"{rate:8g}" for rate in args.lr))
        print("held out, top-1 %" + "".join(f"{top1:8.2f}" for top1 in sweep) + f"   -> {lr:g}")
        print("test:  top-1 {top1:.2f} %   top-5 {top5:.2f} %   20-NN {knn:.2f} %".format(**result)
              + " (before fine-tuning)" * args.finetune)
        print(json.dumps(result))
        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        with open(folder / "linear.jsonl", "a") as file:
            file.write(json.dumps(result | {"settings": vars(args)}) + "\n")
    return result


def parse_args(argv=None):
    def fraction_or_existing_file(text):
        return text if Path(text).is_file() else clamp.within(1e-6, 1.0)(text)

    parser = argparse.ArgumentParser("eval_linear.py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("run", help="run folder of clamp.py, or a backbone.pt")
    add("--data", help="data set or folder; if None, what the run was trained on")
    add("--limit", type=clamp.within(1), help="train on this many images, chosen at random")
    add("--labels", type=fraction_or_existing_file, help="share of the labels, or file of names")
    add("--random-init", action="store_true", help="the same network untrained: the floor")
    add("--augment", action="store_true", help="train the probe on random crops and flips")
    add("--finetune", action="store_true", help="train the backbone too, on crops and flips")
    add("--lr", type=clamp.within(0.0), nargs="+", help="rates to choose from; if None, 5 or 6")
    add("--epochs", type=clamp.within(1), help="if None, 100, or 20 for --finetune")
    add("--batch-size", type=clamp.within(2), default=256, help="images a step, over all processes")
    clamp.add_machine_flags(parser)
    args = parser.parse_args(argv)
    rates = [0.1, 0.2, 0.4, 0.6, 0.8] if args.finetune else [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    args.lr, args.epochs = args.lr or rates, args.epochs or (20 if args.finetune else 100)
    return args


if __name__ == "__main__":
    clamp.command_line(lambda: evaluate(parse_args()))
