"""Evaluate a backbone by the authors' protocol for CIFAR-10 and by ours; README.md compares them.

    python experiments/their_evaluation.py RUN [--epochs 100] [--batch-size 1024]

Theirs (linear_probe.py in github.com/guanming-zhang/CLAMP) has these flags. Of eval_linear.py's,
--labels, --lr, --augment and --finetune are for ours, and all others for both."""

import sys
from itertools import islice
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402
import eval_linear  # noqa: E402

RATES = 0.3, 0.1, 0.05  # Adam's in the first epoch, for 256 images a batch


def evaluate(argv):
    """Print the accuracies in %. Theirs is that of the rate that is best on the test images."""
    args = eval_linear.parse_args(["--batch-size", "1024", *argv])
    (device, dtype), b = clamp.start_processes(args), args.batch_size
    backbone, saved = eval_linear.load_backbone(args.run, not args.random_init, seed=args.seed)
    backbone = clamp.place(backbone, device).requires_grad_(False)
    options = dict(size=saved["settings"]["size"], device=device, dtype=dtype, workers=args.workers)
    name = args.data or saved["settings"]["data"]
    train = clamp.load_data(name, "train", args.limit, args.seed).to(device)
    test = clamp.load_data(name, "test").to(device)
    rows, scored = torch.randperm(len(train.labels)), torch.randperm(len(test.labels))
    held_out, rows = rows.tensor_split([len(rows) // 20])
    if min(len(held_out), len(scored)) < b or train.labels.min() < 0:
        raise clamp.UserError(f"--batch-size {b}: needs {b} test and {20 * b} training labels")
    split = eval_linear.Split(train, rows, train.labels[rows].to(device), None)
    steps, accuracies = eval_linear.training_steps(split, args, options, augmented=True), []
    heads = [nn.Linear(backbone.num_features, train.labels.max() + 1, device=device) for _ in RATES]
    groups = [{"params": head.parameters(), "lr": r * b / 256} for head, r in zip(heads, RATES)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for _ in range(args.epochs):
        backbone.train()  # batch norm takes the batch's statistics, and its running ones move
        for batch, images, _ in islice(steps, len(rows) // b):
            x, y = clamp.embed(backbone, images, dtype), split.labels[batch]
            optimizer.zero_grad()
            sum(nn.functional.cross_entropy(head(x), y) for head in heads).backward()
            optimizer.step()
        schedule.step()
        for data, rest in (train, held_out), (test, scored):  # an incomplete last batch is dropped
            x = eval_linear.make_split(data, rest[:len(rest) // b * b], backbone.eval(), options)
            accuracies.append([eval_linear.accuracy(head(x.features), x.labels) for head in heads])
    held_out, tested = torch.tensor(accuracies).unflatten(0, (-1, 2)).unbind(1)  # [epochs, rates]
    theirs = tested.gather(0, held_out.argmax(0, keepdim=True)).max()  # where best held out
    ours = eval_linear.evaluate(eval_linear.parse_args([*argv, "--epochs=100", "--batch-size=256"]))
    print(f"theirs, {args.epochs} epochs: {theirs:.2f} %; eval_linear.py: {ours['top1']:.2f} %")


if __name__ == "__main__":
    clamp.command_line(lambda: evaluate(sys.argv[1:]))
