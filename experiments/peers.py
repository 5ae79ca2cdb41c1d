"""Other losses on the same augmentation, network, optimiser, loop and process handling as CLAMP.

    python experiments/peers.py simclr [any flag of clamp.py]

The methods are simclr, barlow_twins, vicreg and mmcr. A loss takes the embeddings z [m, b, d] of
the images of all processes, and returns its value and a dict of numbers to log.
"""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402


def simclr(z, temperature=0.1):
    """Cross entropy of finding the other views of an image (arXiv 2002.05709)."""
    m, b, _ = z.shape
    z = F.normalize(z.flatten(0, 1), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-1e9)
    same = z.new_ones(m, m).kron(z.new_ones(b).diag()).fill_diagonal_(0)
    return -(similarity.log_softmax(1) * same).sum(1).mean() / (m - 1), {}


def barlow_twins(z, weight=0.005):
    """The views' cross-correlation becomes the identity (arXiv 2103.03230); two views."""
    x, y = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    c = x.T @ y / len(x)
    on_diagonal = (c.diagonal() - 1).square().sum()
    off_diagonal = c.square().sum() - c.diagonal().square().sum()
    return (on_diagonal + weight * off_diagonal) / len(c), {}


def vicreg(z):
    """Variance, invariance and covariance, weighted 25 : 25 : 1 (arXiv 2105.04906); two views."""
    _, b, d = z.shape
    invariance = F.mse_loss(z[0], z[1])
    variance = F.relu(1 - (z.var(1) + 1e-4).sqrt()).mean()
    z = z - z.mean(1, keepdim=True)
    covariance = z.mT @ z / (b - 1)
    off_diagonal = covariance.square().sum() - covariance.diagonal(dim1=1, dim2=2).square().sum()
    return invariance + variance + off_diagonal / d / 25, {}


def mmcr(z):
    """The nuclear norm of the centroids grows (arXiv 2303.03307)."""
    centroids = F.normalize(z, dim=2).mean(0)
    return -torch.linalg.matrix_norm(centroids, "nuc") / len(centroids), {}


METHODS = {  # the loss, and the widths of its projector
    "simclr": (simclr, "2048-256"), "barlow_twins": (barlow_twins, "2048-2048"),
    "vicreg": (vicreg, "2048-2048"), "mmcr": (mmcr, "512-128"),
}


def build_network(args):
    """Backbone and projector with batch norm: Linear-BatchNorm-ReLU-...-Linear."""
    backbone = clamp.build_backbone(args.arch, args.stem, args.zero_init)
    widths = [backbone.num_features, *args.projector]
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(OrderedDict(backbone=backbone, projector=nn.Sequential(*layers[:-2])))


def main(method="", *flags):
    if method not in METHODS:
        raise clamp.UserError(f"'{method}' is not one of {', '.join(METHODS)}; name one first")
    loss_fn, projector = METHODS[method]
    args = clamp.parse_args(["--views", "2", "--projector", projector, *flags])
    torch.manual_seed(args.seed)
    clamp.train(args, loss_fn, build_network(args))


if __name__ == "__main__":
    clamp.command_line(lambda: main(*sys.argv[1:]))
