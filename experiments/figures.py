"""Draws figures; needs matplotlib, and a map needs scikit-learn.

    python experiments/figures.py accuracy         experiments/accuracy.png, the accuracies below
    python experiments/figures.py dynamics RUN     RUN/dynamics.png, the numbers of a run by epoch
    python experiments/figures.py map RUN          RUN/map.png, its features of 2,000 test images
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402
import eval_linear  # noqa: E402

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


def feature_map(run):
    """Maps by t-SNE of the features of up to 2,000 random test images, untrained and trained, and a
    histogram of their distances. The features are centred and on the unit sphere."""
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE
    trained, saved = eval_linear.load_backbone(run)
    settings = saved["settings"]
    untrained, _ = eval_linear.load_backbone(run, pretrained=False, seed=settings["seed"])
    data = clamp.load_data(settings["data"], "test")
    rows = torch.randperm(len(data.labels))[:2000]
    labels = data.labels[rows]
    if len(labels) < 100 or labels.min() < 0:
        raise clamp.UserError(f"{run}: needs 100 test images with labels")
    device, dtype = clamp.start_processes(clamp.parse_args([]))
    same = F.pdist(labels[:, None].double()) == 0  # [pairs]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for name, backbone, ax, line in zip(("untrained", "trained"), (untrained, trained), axes, ":-"):
        x = clamp.extract_features(backbone.to(device), data, rows, settings["size"], device, dtype)
        x = F.normalize(x - x.mean(0)).cpu()
        places = TSNE(random_state=0).fit_transform(x.numpy())
        for k in labels.unique().tolist():
            label = k if data.files is None else Path(data.files[rows[labels == k][0]]).parent.name
            ax.scatter(*places[labels == k].T, s=2, color=f"C{k}", label=label)
        ax.set(title=name, xticks=[], yticks=[])
        for pairs, chosen, color in ("within classes", same, "C0"), ("between", ~same, "C1"):
            distances = F.pdist(x)[chosen]
            axes[2].hist(distances, 80, density=True, histtype="step", linestyle=line, color=color,
                         label=f"{name}, {pairs}: {distances.mean():.2f}")
    axes[1].legend(bbox_to_anchor=(1, 1), loc="upper left", markerscale=4, frameon=False)
    axes[2].set(title="distances, and their means", xlabel="on the unit sphere", yticks=[])
    axes[2].legend(fontsize="x-small", loc="upper left")
    figure.savefig(Path(run, "map.png"), dpi=90)


def main(figure="", *run):
    draw = {"accuracy": accuracy, "dynamics": dynamics, "map": feature_map}.get(figure)
    if not draw or len(run) != (figure != "accuracy"):
        raise clamp.UserError("give accuracy, dynamics RUN, or map RUN")
    try:
        draw(*run)
    except ImportError as error:
        raise clamp.UserError(f"{error.name} is missing: pip install matplotlib scikit-learn")


if __name__ == "__main__":
    clamp.command_line(lambda: main(*sys.argv[1:]))
