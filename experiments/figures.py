"""Draws the pictures beside this file; needs matplotlib.

    python experiments/figures.py dynamics RUN      numbers of a run by epoch, from its log.jsonl
    python experiments/figures.py packing           ten clouds before, during and after packing

views.png is the views.png of a default run of clamp.py.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import clamp  # noqa: E402


def dynamics(run):
    import matplotlib.pyplot as plt
    log = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.4), layout="constrained")
    for ax, key in zip(axes, ("radius", "neighbours", "spread", "participation_ratio")):
        ax.plot([r["epoch"] for r in log], [r[key] for r in log], ".-")
        ax.set(title=key.replace("_", " "), xlabel="epoch")
    figure.savefig(HERE / "dynamics.png", dpi=100)


def pack(radius_scale=4.0):
    """Pack ten images, which are seen through noise, on a sphere in three dimensions until no two
    balls overlap. Returns the views [50, 10, 3] and the number of neighbours of every step."""
    torch.manual_seed(0)
    images = clamp.draw_patterns(10, seed=0)[0].flatten(1) / 255
    network = nn.Sequential(nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 3))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    history = []
    while not history or history[-1][1] > 0:
        z = network(images + 0.3 * torch.randn(50, *images.shape))
        loss, geometry = clamp.packing_loss(z, radius_scale)
        points = F.normalize(z - z.mean((0, 1)), dim=2).detach()
        history.append((points, geometry["neighbours"].item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history


def packing(radius_scale=4.0):
    import matplotlib.pyplot as plt
    history = pack(radius_scale)
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained",
                                subplot_kw={"projection": "3d"})
    u, v = torch.meshgrid(torch.linspace(0, 6.2832, 24), torch.linspace(0, 3.1416, 12),
                          indexing="ij")
    ball = torch.stack([u.cos() * v.sin(), u.sin() * v.sin(), v.cos()])
    for ax, step in zip(axes, (0, len(history) // 2, len(history) - 1)):
        points, neighbours = history[step]
        ax.plot_wireframe(*ball.numpy(), color="0.85", linewidth=0.4)
        centers = points.mean(0)
        radii = radius_scale * ((points - centers).square().sum((0, 2)) / 49 / 3).sqrt()
        for k in range(10):
            ax.scatter(*points[:, k].T.numpy(), s=3, color=f"C{k}")
            if radii[k] < 1:
                surface = centers[k, :, None, None] + radii[k] * ball
                ax.plot_surface(*surface.numpy(), color=f"C{k}", alpha=0.2, linewidth=0)
        ax.set(title=f"step {step}: {neighbours:.1f} neighbours", xlim=(-1.2, 1.2),
               ylim=(-1.2, 1.2), zlim=(-1.2, 1.2))
        ax.set_box_aspect((1, 1, 1), zoom=1.3)
        ax.set_axis_off()
    figure.savefig(HERE / "packing.png", dpi=100)


def main(name="", *run):
    if (name, len(run)) not in (("dynamics", 1), ("packing", 0)):
        raise clamp.UserError("give 'dynamics RUN' or 'packing'")
    dynamics(*run) if run else packing()


if __name__ == "__main__":
    clamp.command_line(lambda: main(*sys.argv[1:]))
