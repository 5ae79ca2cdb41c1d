"""Linear probe and 20-NN of a frozen backbone that clamp.py trained.

    python eval_linear.py runs/patterns                  on the data that it was trained on
    python eval_linear.py runs/cifar10 --augment         the published protocol: crops and flips
    python eval_linear.py runs/patterns --random-init    the same network untrained: the floor
    torchrun --nproc-per-node 8 eval_linear.py runs/imagenet

The backbone stays in eval mode and its features are extracted once (with --augment: every epoch).
They are standardised by the training set's mean and standard deviation, an affine map that a
linear classifier absorbs. One classifier for each learning rate is trained, all as one batched
problem; the best on images held out of the training set gives the learning rate, a classifier is
trained with it on all training images, and the test set is looked at once.

Prints a table, then one JSON line, which is written to RUN/linear.json as well (--random-init:
RUN/linear-random-init.json).
"""

import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import clamp


def load_backbone(path, pretrained=True):
    """The backbone of a run folder or a backbone.pt, and what the file says of it: arch, stem,
    size, data. Raises UserError where there is none."""
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


def train_heads(batches, steps, rates, shape, device, desc):
    """Train a linear softmax classifier for each learning rate, side by side: SGD with momentum
    0.9 and a cosine schedule, from zero.

    batches: iterable of `steps` pairs of features [n, width] and labels [n], this process's share.
    shape: (width, classes). Returns weights [len(rates), width, classes].
    """
    weight = torch.zeros(len(rates), *shape, device=device)
    velocity = torch.zeros_like(weight)
    rates = torch.tensor(rates, device=device)[:, None, None]
    rank, world = clamp.rank_and_world()
    bar = tqdm(batches, desc, steps, unit="step", disable=rank > 0, leave=False)
    for step, (x, y) in enumerate(bar):
        error = (x @ weight).softmax(-1) - F.one_hot(y, shape[1])  # cross entropy's, in the logits
        gradient = clamp.all_reduce(x.T @ error) / (len(x) * world)
        velocity = 0.9 * velocity + gradient
        weight -= rates * clamp.lr_scale(step, 0, steps) * velocity
    return weight


def accuracy(x, y, weight, k=1):
    """Top-k accuracy in % of the classifier [width, classes] on features [n, width]."""
    top = (x @ weight).topk(min(k, weight.shape[1])).indices
    return 100 * (top == y[:, None]).any(1).float().mean().item()


@torch.inference_mode()
def evaluate(args):
    """Probe args.run as args (from parse_args) say; prints, writes and returns the result."""
    started = time.time()
    device = clamp.start_processes(args.device)
    rank, world = clamp.rank_and_world()
    dtype = clamp.autocast_dtype(args.amp, device)
    torch.manual_seed(args.seed)  # the same random network on all processes
    backbone, trained = load_backbone(args.run, pretrained=not args.random_init)
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    name, size = args.data or trained["data"], trained["size"]

    def load(split):
        """A split's Data, the rows [n] of it that can be read, and their features [n, f]."""
        data = clamp.load_data(name, split, args.data_dir, args.limit if split == "train" else None,
                               args.seed, args.resident_gb)
        if data.labels.min() < 0:
            raise clamp.UserError(f"--data {name}: a probe needs labels, and {split}/ has pictures "
                                  "outside of the class folders of train/")
        if data.resident:
            data.images = data.images.to(device)
        features, rows = clamp.extract_features(
            backbone, data, torch.arange(len(data.labels)), size, device, dtype, args.workers,
            f"{split} features")
        return data, rows, features, data.labels[rows].to(device)

    data, rows, features, labels = load("train")
    _, _, test_features, test_labels = load("test")
    n, classes = len(labels), int(labels.max()) + 1
    mean, std = features.mean(0), features.std(0) + 1e-6

    def standardise(x):
        return F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column's weight is the bias

    augment = clamp.MultiViewAugment(size, 1, jitter_p=0, gray_p=0, blur_p=[0], solarize_p=[0])

    def fit(indices, rates, desc):
        batch = max(1, min(args.batch_size, len(indices)) // world)
        steps = len(indices) // (batch * world)

        def batches():
            for epoch in range(args.epochs):
                seed = args.seed + epoch
                torch.manual_seed(seed)
                order = indices[torch.randperm(len(indices))]
                share = order[:steps * batch * world].view(steps, world, batch)[:, rank]
                if args.augment:
                    views = clamp.view_batches(data, rows[share], augment, device, args.workers,
                                               seed)
                    # views first, so that they are exhausted; one view of each image
                    for (x,), batch_rows in zip(views, share.to(device)):
                        yield standardise(clamp.embed(backbone, x, dtype)), labels[batch_rows]
                else:
                    for batch_rows in share.to(device):
                        yield standardise(features[batch_rows]), labels[batch_rows]

        width = features.shape[1] + 1
        return train_heads(batches(), args.epochs * steps, rates, (width, classes), device, desc)

    order = torch.randperm(n, generator=torch.Generator().manual_seed(args.seed))
    tenth = math.ceil(n / 10)
    held_out, kept = order[:tenth].to(device), order[tenth:]
    x, y = standardise(features[held_out]), labels[held_out]
    sweep = [accuracy(x, y, w) for w in fit(kept, args.lr, "learning rates")]
    lr = args.lr[sweep.index(max(sweep))]
    weight = fit(order, [lr], "final classifier")[0]

    x = standardise(test_features)
    knn = clamp.knn_accuracy(features, labels, test_features, test_labels)
    result = {"top1": round(accuracy(x, test_labels, weight), 2),
              "top5": round(accuracy(x, test_labels, weight, 5), 2), "knn": round(knn, 2), "lr": lr,
              "data": name, "n_train": n, "n_test": len(test_labels),
              "seconds": round(time.time() - started, 1)}
    if rank == 0:
        print("learning rate    " + "".join(f"{rate:8g}" for rate in args.lr))
        print("held out, top-1 %" + "".join(f"{top1:8.2f}" for top1 in sweep) + f"   -> {lr:g}")
        print("test:  top-1 {top1:.2f} %   top-5 {top5:.2f} %   20-NN {knn:.2f} %".format(**result))
        print(json.dumps(result))
        file = "linear-random-init.json" if args.random_init else "linear.json"
        run = Path(args.run)
        (run if run.is_dir() else run.parent).joinpath(file).write_text(json.dumps(result) + "\n")
    return result


def parse_args(argv=None):
    parser = clamp.Parser("eval_linear.py", description="Linear probe of a run of clamp.py.")
    count, positive = clamp.number(int, 1), clamp.number(float, 0)
    add = parser.add_argument
    add("run", help="run folder of clamp.py, or a backbone.pt")
    add("--data", help="data set or folder; default: what the run was trained on")
    add("--limit", type=count, help="train on the first LIMIT images of a seeded shuffle")
    add("--augment", action="store_true", help="train on random crops and flips, as published")
    add("--random-init", action="store_true", help="the same network untrained: the floor")
    add("--lr", type=positive, nargs="+", default=[0.003, 0.01, 0.03, 0.1, 0.3],
        help="learning rates to choose from")
    add("--epochs", type=count, default=100, help="passes over the training images")
    add("--batch-size", type=count, default=256, help="images a step, over all processes")
    clamp.add_machine_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    clamp.command_line(lambda: evaluate(parse_args()))
