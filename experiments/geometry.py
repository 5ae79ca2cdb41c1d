"""The geometry of a backbone's features on the test images: their spectrum, and how classes pack.

    python experiments/geometry.py RUN [--data NAME] [--random-init]

RUN is a run folder of clamp.py or a backbone.pt. The result is a line of geometry.jsonl beside it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402
import eval_linear  # noqa: E402

POWER_LAW = 10, 100  # first and last rank of the eigenvalues to which a power law is fitted


def spectrum(features):
    """Eigenvalues [f] of the covariance of features [n, f], the largest first, and the exponent
    alpha of lambda_n ~ n^-alpha, fitted in log and log over the ranks POWER_LAW."""
    eigenvalues = torch.linalg.eigvalsh(features.double().T.cov()).flip(0)
    eigenvalues = eigenvalues.clamp(min=1e-30)  # rounding leaves some below zero
    first, last = POWER_LAW
    x = torch.arange(first, last + 1, dtype=torch.float64).log()
    y = eigenvalues[first - 1:last].cpu().log()
    return eigenvalues, -((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


def class_packing(features, labels, radius_scale, max_reach):
    """The numbers of the packing if classes take the place of images, and their images the place
    of views: as many of each class as the smallest class has."""
    m = labels.unique(return_counts=True)[1].min()
    classes = torch.stack([features[labels == k][:m] for k in labels.unique()], 1)
    numbers = clamp.packing_numbers(classes, radius_scale, max_reach)
    return {k: v.item() for k, v in numbers.items()}


def measure(args):
    """Measure as args say; prints, writes and returns the result."""
    device, dtype = clamp.start_processes(args)
    torch.manual_seed(args.seed)
    backbone, saved = eval_linear.load_backbone(args.run, not args.random_init)
    settings = saved["settings"]
    backbone = backbone.to(device, memory_format=torch.channels_last)
    data = clamp.load_data(args.data or settings["data"], "test").to(device)
    labels = data.labels
    if len(labels) <= POWER_LAW[1] or labels.min() < 0:
        raise clamp.UserError(f"--data: needs more than {POWER_LAW[1]} test images with labels")
    features = clamp.extract_features(backbone, data, torch.arange(len(labels)), settings["size"],
                                      device, dtype, args.workers)
    eigenvalues, alpha = spectrum(features)
    share = 100 * eigenvalues / eigenvalues.sum()
    packing = class_packing(features, labels.to(device), settings["radius_scale"],
                            settings["max_reach"])
    result = {"alpha": round(alpha, 3), "ranks": POWER_LAW,
              "participation_ratio": round(1e4 / share.square().sum().item(), 2),
              "classes": {k: round(v, 4) for k, v in packing.items()}, "n_test": len(labels)}
    shown = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= len(share)]
    print("eigenvalue   " + "".join(f"{k:8}" for k in shown))
    print("% of variance" + "".join(f"{share[k - 1]:8.3f}" for k in shown))
    print(json.dumps(result))
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    written = result | {"eigenvalues": eigenvalues.tolist(), "settings": vars(args)}
    with open(folder / "geometry.jsonl", "a") as file:
        file.write(json.dumps(written) + "\n")
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser("geometry.py", usage=argparse.SUPPRESS)
    parser.add_argument("run", help="run folder of clamp.py, or a backbone.pt")
    parser.add_argument("--data", type=clamp.data_name,
                        help="data set or folder; default: what the run was trained on")
    parser.add_argument("--random-init", action="store_true", help="the same network untrained")
    clamp.add_machine_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    clamp.command_line(lambda: torch.no_grad()(measure)(parse_args()))
