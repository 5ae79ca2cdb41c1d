"""The geometry of a backbone's features on the test images: their spectrum, and how classes pack;
and under "theirs" what the authors publish, measured as in github.com/guanming-zhang/CLAMP.

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


def their_alpha(eigenvalues):
    """alpha of eigenvalues [f] by the authors' fit (eigenspectrum.ipynb, 5bc40b5): c (n - 1)^-alpha
    is fitted to the eigenvalues themselves, not in log and log, over the ranks n from 16 to 1400,
    or to f if there are fewer. So the largest count most."""
    y = eigenvalues[15:1400].cpu()
    alphas = torch.arange(0, 5, 0.001, dtype=torch.float64)
    curves = torch.arange(15, 15 + len(y)) ** -alphas[:, None]
    cosines = curves @ y / curves.norm(dim=1)  # with its best c, a curve misses y by the sine
    return round(alphas[cosines.argmax()].item(), 3)


def their_packing(z, radius_scale):
    """The mean size of the clouds z [m, b, d] and their mean number of neighbours, by the authors'
    definitions (validation_step in model/lightning_models.py): the covariance is divided by m, a
    size lacks radius_scale, 0.99 of two radii is not capped, and a cloud is its own neighbour."""
    centers, sizes = clamp.balls(z.double(), radius_scale=(1 - 1 / len(z)) ** 0.5)
    near = torch.cdist(centers, centers) < 0.99 * radius_scale * (sizes[:, None] + sizes)
    return {"size": round(sizes.mean().item(), 4), "neighbours": near.sum().item() / len(sizes)}


def measure_theirs(args, backbone, data, settings, options):
    """What the authors publish: the spectrum of features from batches of eight with batch norm in
    train mode (their notebook never calls eval), and the packing of four views of 1,024 images with
    radius scale 7. The packing needs checkpoint.pt, and a run with clamp.py's network and views."""
    torch.manual_seed(args.seed)
    network = clamp.place(clamp.build_network(argparse.Namespace(**settings)), options["device"])
    rows = torch.randperm(len(data.labels))
    values, _ = spectrum(clamp.extract_features(
        lambda x: torch.cat([backbone.train()(eight) for eight in x.split(8)]), data,
        rows[:len(rows) // 8 * 8], **options))
    result = {"alpha": their_alpha(values), "ranks": (16, min(1400, len(values))),
              "participation_ratio": round((values.sum()**2 / values.square().sum()).item(), 2)}
    if not Path(args.run, "checkpoint.pt").exists() or {"network", "augment"} & {*settings["own"]}:
        return result
    if not args.random_init:
        network.load_state_dict(clamp.load_checkpoint(args.run, settings)["network"])
    augment = clamp.build_augment(argparse.Namespace(**settings | {"views": 4}))
    images, = clamp.image_batches(data, [(0, rows[:1024])], augment.crop, options["device"])
    z = [clamp.embed(network.eval(), view, options["dtype"]) for view in augment(images)]
    return result | their_packing(torch.stack(z), radius_scale=7) | {"images": len(images)}


@torch.no_grad()
def measure(args):
    """Measure as args say; prints, writes and returns the result."""
    device, dtype = clamp.start_processes(args)
    backbone, saved = eval_linear.load_backbone(args.run, not args.random_init, seed=args.seed)
    settings = saved["settings"]
    backbone = clamp.place(backbone, device)
    data = clamp.load_data(args.data or settings["data"], "test").to(device)
    labels = data.labels
    if len(labels) <= POWER_LAW[1] or labels.min() < 0:
        raise clamp.UserError(f"--data: needs more than {POWER_LAW[1]} test images with labels")
    options = dict(size=settings["size"], device=device, dtype=dtype, workers=args.workers)
    features = clamp.extract_features(backbone, data, torch.arange(len(labels)), **options)
    eigenvalues, alpha = spectrum(features)
    share = 100 * eigenvalues / eigenvalues.sum()
    packing = class_packing(features, labels.to(device), settings["radius_scale"],
                            settings["max_reach"])
    result = {"alpha": round(alpha, 3), "ranks": POWER_LAW,
              "participation_ratio": round(1e4 / share.square().sum().item(), 2),
              "classes": {k: round(v, 4) for k, v in packing.items()}, "n_test": len(labels),
              "theirs": measure_theirs(args, backbone, data, settings, options)}
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
    parser.add_argument("--data", type=clamp.data_name, help="data set or folder (the run's)")
    parser.add_argument("--random-init", action="store_true", help="the same network untrained")
    clamp.add_machine_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    clamp.command_line(lambda: measure(parse_args()))
