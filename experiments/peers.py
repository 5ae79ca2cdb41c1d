"""Other methods on the same augmentation, network, optimiser, loop and process handling as CLAMP.

    python experiments/peers.py METHOD [any flag of clamp.py]

METHODS, at the end of this file, lists what each method brings: a loss, and for some a network, an
augmentation and flags. A loss takes z [m, b, d], embeddings of m views of the b images of all
processes. Its other arguments are flags, too, such as --temperature for simclr (--help shows only
clamp.py's). All views go through the network, and its batch norm, together.
"""

import argparse
import copy
import math
import sys
from functools import partial
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import MLP

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402

# -------- losses

def two_views(z):
    if len(z) != 2:
        raise clamp.UserError(f"--views {len(z)}: this method compares two views; give 2")
    return z


def across_views(x, y):
    """The mean product x[v, i] . y[w, i] over all images i and all pairs of views v != w."""
    m, b, _ = x.shape
    return ((x.sum(0) * y.sum(0)).sum() - (x * y).sum()) / (m * (m - 1) * b)


def similarities(z, temperature):
    """Cosines / temperature of all views, and 1 for two views of an image, both [m * b, m * b]."""
    m, b, _ = z.shape
    z = F.normalize(z.flatten(0, 1), dim=1)
    same = torch.eye(b, device=z.device).repeat(m, m).fill_diagonal_(0)
    return (z @ z.T / temperature).fill_diagonal_(-1e9), same  # without a view and itself


def simclr(z, temperature=0.1):
    """Cross entropy of finding the other views of an image (arXiv 2002.05709)."""
    similarity, same = similarities(z, temperature)
    return -(similarity.log_softmax(1) * same).sum() / same.sum()


def dcl(z, temperature=0.1):
    """SimCLR whose denominator has views of other images only (arXiv 2110.06848)."""
    similarity, same = similarities(z, temperature)
    negatives = similarity.masked_fill(same == 1, -1e9).logsumexp(1)
    return negatives.mean() - (similarity * same).sum() / same.sum()


def barlow_twins(z, weight=0.005):
    """The views' cross-correlation becomes the identity: 1/d of the loss of arXiv 2103.03230."""
    x, y = two_views((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True))
    c = x.T @ y / len(x)
    on_diagonal = (c.diagonal() - 1).square().sum()
    off_diagonal = c.square().sum() - c.diagonal().square().sum()
    return (on_diagonal + weight * off_diagonal) / len(c)


def vicreg(z, weight=0.04):
    """Variance + invariance + weight * covariance: 1/25 of the release's (arXiv 2105.04906)."""
    _, b, d = z.shape
    invariance = F.mse_loss(*two_views(z))
    variance = F.relu(1 - (z.var(1) + 1e-4).sqrt()).mean()
    z = z - z.mean(1, keepdim=True)
    covariance = z.mT @ z / (b - 1)
    off_diagonal = covariance.square().sum() - covariance.diagonal(dim1=1, dim2=2).square().sum()
    return invariance + variance + weight * off_diagonal / d


def mmcr(z):
    """Minus the nuclear norm of the centroids / b (arXiv 2303.03307 does not divide by b)."""
    centroids = F.normalize(z, dim=2).mean(0)
    return -torch.linalg.matrix_norm(centroids, "nuc") / len(centroids)


def w_mse(z):
    """W-MSE: squared distance of the views after sub-batches of 2 d images have been whitened by
    the Cholesky factor of their covariance, and put on the sphere (arXiv 2007.06346)."""
    _, b, d = z.shape
    if b % (2 * d):
        raise clamp.UserError(f"--batch-size {b}: give a multiple of {2 * d}, twice the last width")
    # The images of a batch come in random order, so neighbours are a random sub-batch.
    x = z.double().unflatten(1, (-1, 2 * d))  # [m, b / 2d, 2d, d]
    x = x - x.mean(2, keepdim=True)
    factor = torch.linalg.cholesky(x.mT @ x / (2 * d - 1))
    white = torch.linalg.solve_triangular(factor, x.mT, upper=False).mT
    white = F.normalize(white.flatten(1, 2), dim=2)
    return 2 - 2 * across_views(white, white)


def shuffled_dbn(z, group=16):
    """Shuffled-DBN: mean squared difference of the views after random groups of features have been
    ZCA-whitened (arXiv 2105.00470, whose loss is d times this one)."""
    _, b, d = z.shape
    if d % group or b <= group:
        raise clamp.UserError(f"--group {group}: has to divide {d}, the last width of --projector, "
                              f"and be less than {b}, the batch size")

    def whiten(x):  # [b, d], one view
        order = torch.randperm(d, device=x.device)
        if dist.is_initialized():
            dist.broadcast(order, 0)  # all processes take the first one's order
        x = x[:, order].unflatten(1, (-1, group)).transpose(0, 1)  # [d / group, b, group]
        x = x - x.mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh(x.mT @ x / b)
        x = x @ (vectors * values.rsqrt()[:, None]) @ vectors.mT
        return x.transpose(0, 1).flatten(1)[:, order.argsort()]

    white = torch.stack([whiten(x) for x in z.double()])
    return 2 - 2 * across_views(white, white) / d  # the mean square of a white feature is 1


def simsiam(z):
    """SimSiam: minus the cosine of each view's prediction, z[:, :, :d/2], and the other view's
    projection, z[:, :, d/2:], which gets no gradient (arXiv 2011.10566)."""
    prediction, projection = F.normalize(z.unflatten(2, (2, -1)), dim=3).unbind(2)
    return -across_views(prediction, projection.detach())


def byol(z):
    """BYOL: 4 - 4 of simsiam()'s cosines (arXiv 2006.07733). A momentum copy makes projections."""
    return 4 + 4 * simsiam(z)


def swav(z, temperature=0.1, epsilon=0.03, rounds=3):
    """SwAV with two crops, no queue and no frozen prototypes: each view predicts the other's
    assignment to prototypes from its scores z [m, b, prototypes] (arXiv 2006.09882). The release
    has epsilon 0.05, and advises 0.03 if the loss stays at log(prototypes), which is a collapse."""
    assignment = (z.detach() / epsilon).exp()
    for _ in range(rounds):  # Sinkhorn-Knopp, for each view
        assignment = assignment / assignment.sum(1, keepdim=True)  # prototypes share images equally
        assignment = assignment / assignment.sum(2, keepdim=True)  # each image is assigned once
    return -across_views(assignment, (z / temperature).log_softmax(2))


def ce_ssl(z, weight=0.4, temperature=0.1):
    """CE-SSL (Yerxa et al., NeurIPS 2024): SimCLR of z[:, :, :d/2], and SimCLR of the differences
    that the two views make in z[:, :, d/2:]. Images 2k and 2k + 1 have the same two views, so their
    differences should agree, and differ from those of other pairs."""
    invariant, equivariant = z.chunk(2, 2)
    first, second = two_views(equivariant)
    differences = (first - second).unflatten(0, (-1, 2)).transpose(0, 1)  # [2, b / 2, d / 2]
    same, change = simclr(invariant, temperature), simclr(differences, temperature)
    return (1 - weight) * same + weight * change


def sigreg(z, weight=0.05, directions=256):
    """LeJEPA: squared distance to the mean view, and SIGReg. In random directions, SIGReg compares
    the characteristic function of embeddings with that of a normal distribution, on -3 to 3, where
    it is even (arXiv 2511.08544)."""
    a = F.normalize(torch.randn(z.shape[2], directions, dtype=z.dtype, device=z.device), dim=0)
    if dist.is_initialized():
        dist.broadcast(a, 0)  # all processes take the first one's directions
    t = torch.linspace(0, 3, 17, device=z.device)
    normal = (-t.square() / 2).exp()
    x = (z @ a)[..., None] * t  # [m, b, directions, 17]
    error = (x.cos().mean(1) - normal).square() + x.sin().mean(1).square()
    statistic = z.shape[1] * 2 * torch.trapezoid(error * normal, t).mean()  # 2: both halves
    return weight * statistic + (1 - weight) * (z - z.mean(0)).square().mean()


def frossl(z, weight=1.0):
    """FroSSL: squared distance of the views, and the Frobenius norm of each view's covariance. It
    is least if all eigenvalues are equal (release of arXiv 2310.02903)."""
    m, b, d = z.shape
    z = F.normalize(z, dim=1)  # each feature, over the batch
    c = z @ z.mT / d  # [m, b, b]; its trace is 1, and its norm that of z.mT @ z / d
    distance = (z - z.mean(0)).square().sum() * m / b
    return 2 * torch.linalg.matrix_norm(c).log().sum() + weight * distance


def tcr(z, weight=200.0, eps=0.2):
    """EMP-SSL with whole views: the coding rate of each view grows, and views come close to their
    mean (release of arXiv 2304.03977)."""
    _, b, d = z.shape
    z = F.normalize(z, dim=2)
    rate = torch.logdet(torch.eye(d, device=z.device) + d / (b * eps) * z.mT @ z).mean() / 2
    return -weight * F.cosine_similarity(z, z.mean(0, keepdim=True), dim=2).mean() - rate


def ellipsoid(z, reach=3.0):
    """CLAMP with ellipsoids: the distance of two centres is
        sqrt((Z_i - Z_j)^T (L_i + L_j)^+ (Z_i - Z_j)),
    in standard deviations of both clouds. Only the centres have a gradient."""
    m, b, _ = z.shape
    z = F.normalize(z - z.mean((0, 1)), dim=2).double().transpose(0, 1)  # [b, m, d]
    centers = z.mean(1)
    offsets = ((z - centers[:, None]) / math.sqrt(m - 1)).detach()  # L_i = offsets_i^T offsets_i
    i, j = torch.triu_indices(b, b, 1, device=z.device)  # all pairs
    both = torch.cat([offsets[i], offsets[j]], 1)  # A [pairs, 2 m, d], with A^T A = L_i + L_j
    # (A^T A)^+ = A^T (A A^T)^+ (A A^T)^+ A
    inverse = torch.linalg.pinv(both @ both.mT, rtol=1e-9, hermitian=True)
    distance = (inverse @ both @ (centers[i] - centers[j])[:, :, None]).norm(dim=(1, 2))
    return ((1 - distance / reach).relu().square().sum() + 1e-6).log()


# -------- networks
mlp = partial(MLP, norm_layer=nn.BatchNorm1d, bias=False)  # mlp(n, widths)


def build_network(args):
    """Backbone and projector with batch norm: images [n, 3, size, size] -> [n, d]."""
    network = clamp.build_network(args)
    network.projector = mlp(network.backbone.num_features, args.projector)
    return network


class SideBySide(nn.ModuleList):
    """The outputs of two modules: [n, d] -> [n, 2 d]."""

    def forward(self, x):
        return torch.cat([module(x) for module in self], 1)


def build_simsiam(args):
    """Images -> prediction and projection. The predictor has a bottleneck of d / 4."""
    network, d = build_network(args), args.projector[-1]
    network.projector.append(nn.BatchNorm1d(d, affine=False))
    return network.append(SideBySide([mlp(d, [d // 4, d]), nn.Identity()]))


class BYOL(nn.Module):
    """Images -> prediction, and projection by a momentum copy of backbone and projector. At each
    step it keeps this share of its weights: 1 - 0.01 (1 + cos(pi step / steps)) / 2."""

    def __init__(self, args):
        super().__init__()
        online, d = build_network(args), args.projector[-1]
        self.backbone, self.projector = online
        self.predictor = mlp(d, args.projector)
        self.target = copy.deepcopy(online).requires_grad_(False)
        self.register_buffer("step", torch.zeros(()))
        clamp.start_processes(args)  # so that only one process downloads
        n = len(clamp.load_data(args.data, "train", args.limit, args.seed).labels)
        self.steps = args.epochs * (n // args.batch_size)

    def forward(self, x):
        if self.training:  # the optimiser has moved the weights since the last step
            share = 0.01 * (1 + torch.cos(math.pi * self.step / self.steps)) / 2
            online = [*self.backbone.parameters(), *self.projector.parameters()]
            for old, new in zip(self.target.parameters(), online):
                old.lerp_(new.detach(), share)
            self.step += 1
        prediction = self.predictor(self.projector(self.backbone(x)))
        return torch.cat([prediction, self.target(x)], 1)


class Prototypes(nn.Linear):
    """Vectors [n, d] -> their cosines with the prototypes, which are kept on the sphere."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight))
        with torch.autocast(x.device.type, enabled=False):  # bf16 is coarse beside epsilon
            return super().forward(F.normalize(x.float()))


def build_swav(args):
    """Images -> scores. The paper has 3000 prototypes for batches of 4096 without a queue."""
    count = 3 * args.batch_size // 4
    return build_network(args).append(Prototypes(args.projector[-1], count, bias=False))


def build_ce_ssl(args):
    """Images -> invariant and equivariant embedding, by a projector each."""
    network = build_network(args)
    second = mlp(network.backbone.num_features, args.projector)
    network.projector = SideBySide([network.projector, second])
    return network


# -------- augmentation

class PairedAugment(clamp.MultiViewAugment):
    """Images 2k and 2k + 1 get the same transformations."""

    def in_pairs(self, function, images, dim):  # images are in this dimension of the result
        if images.ndim == 3 or len(images) % 2:
            raise clamp.UserError("ce_ssl pairs images: give images of one size, at most 256 px, "
                                  "and an even --batch-size for each process")
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            even = function(images[::2])
        odd = function(images[1::2])  # draws the same random numbers again
        return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)

    def crop(self, images):
        return self.in_pairs(super().crop, images, 0)

    def __call__(self, crops):
        return self.in_pairs(super().__call__, crops, 1)


# -------- table of methods

METHODS = {
    "simclr": dict(loss=simclr, flags="--views 2 --projector 2048 256"),
    "dcl": dict(loss=dcl, flags="--views 2 --projector 2048 256"),
    "barlow_twins": dict(loss=barlow_twins, flags="--views 2 --projector 2048 2048"),
    "vicreg": dict(loss=vicreg, flags="--views 2 --projector 2048 2048"),
    "mmcr": dict(loss=mmcr, flags="--views 2 --projector 512 128"),
    "w_mse": dict(loss=w_mse, flags="--views 2 --projector 1024 64 --batch-size 128"),
    "shuffled_dbn": dict(loss=shuffled_dbn, flags="--views 2 --projector 1024 512"),
    "simsiam": dict(loss=simsiam, network=build_simsiam, flags="--views 2 --projector 2048 2048"),
    "byol": dict(loss=byol, network=BYOL, flags="--views 2 --projector 4096 256"),
    "swav": dict(loss=swav, network=build_swav, flags="--views 2 --projector 2048 128"),
    "ce_ssl": dict(loss=ce_ssl, network=build_ce_ssl, augment=PairedAugment,
                   flags="--views 2 --projector 2048 256"),
    "clamp": dict(loss=clamp.packing_loss, network=clamp.build_network),
    "sigreg": dict(loss=sigreg, flags="--projector 2048 128"),
    "frossl": dict(loss=frossl, flags="--projector 2048 1024"),
    "tcr": dict(loss=tcr, flags="--projector 2048 256"),
    "ellipsoid": dict(loss=ellipsoid, network=clamp.build_network),
}


def prepare(method="", *flags):
    """args, loss_fn, network and augment, as clamp.train takes them."""
    if method not in METHODS:
        raise clamp.UserError(f"'{method}' is not one of {', '.join(METHODS)}; name one first")
    parts = dict(network=build_network, augment=None, flags="") | METHODS[method]
    numbers = {p.name: p.default for p in signature(parts["loss"]).parameters.values()
               if type(p.default) in (int, float)}
    parser = argparse.ArgumentParser("peers.py", add_help=False, allow_abbrev=False)
    for name in numbers.keys() - vars(clamp.parse_args([])).keys():
        parser.add_argument(f"--{name}", type=type(numbers[name]), default=numbers[name])
    own, flags = parser.parse_known_args(flags)
    args = clamp.parse_args([*parts["flags"].split(), "--out", f"runs/{method}", *flags])
    vars(args).update(vars(own), method=method)  # saved, and compared if a run continues
    torch.manual_seed(args.seed)
    network = parts["network"](args)
    loss_fn = partial(parts["loss"], **{name: getattr(args, name) for name in numbers})
    return args, loss_fn, network, parts["augment"]


def main(method="", *flags):
    parts = prepare(method, *flags)
    try:
        clamp.train(*parts)
    except torch.linalg.LinAlgError as error:
        raise clamp.UserError(f"{method} has diverged ({error}); give a lower --lr, another --out")


if __name__ == "__main__":
    clamp.command_line(lambda: main(*sys.argv[1:]))
