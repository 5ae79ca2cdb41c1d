"""Draws figures; needs matplotlib.

    python experiments/figures.py          experiments/accuracy.png, the accuracies below by views
    python experiments/figures.py RUN      RUN/dynamics.png, the numbers of a run by epoch
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402

# Millions of views: linear probe on the test set of CIFAR-10 (JPEG), from README.md in this folder.
ACCURACY = {
    "CLAMP": {0.3: 54.97, 0.5: 55.94, 1: 59.20, 2: 63.11, 3: 65.45, 6.4: 68.84, 10: 70.27},
    "MMCR": {0.5: 56.14, 2: 63.36, 3: 65.53},
    "SimCLR": {0.5: 55.84, 2: 63.88, 3: 65.30, 20: 73.34},
    "CLAMP, published": {760: 90.2},  # CIFAR-10, 16 views, CIFAR stem
}


def accuracy():
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for method, points in ACCURACY.items():
        ax.semilogx(*zip(*points.items()), ".-", label=method)
    ax.set(xlabel="views seen, millions", ylabel="linear probe, %")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend()
    figure.savefig(Path(__file__).with_name("accuracy.png"), dpi=100)


def dynamics(run):
    import matplotlib.pyplot as plt
    log = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.4), layout="constrained")
    for ax, key in zip(axes, ("radius", "neighbours", "spread", "participation_ratio")):
        ax.plot([r["epoch"] for r in log], [r[key] for r in log], ".-")
        ax.set(title=key.replace("_", " "), xlabel="epoch")
    figure.savefig(Path(run, "dynamics.png"), dpi=100)


if __name__ == "__main__":
    run = sys.argv[1:]
    clamp.command_line(lambda: dynamics(run[0]) if run else accuracy())
