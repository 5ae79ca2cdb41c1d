"""Draws RUN/dynamics.png, the numbers of a run by epoch; needs matplotlib.

    python experiments/figures.py RUN
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402


def dynamics(*run):
    if len(run) != 1:
        raise clamp.UserError("give a run folder")
    import matplotlib.pyplot as plt
    log = [json.loads(line) for line in Path(*run, "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.4), layout="constrained")
    for ax, key in zip(axes, ("radius", "neighbours", "spread", "participation_ratio")):
        ax.plot([r["epoch"] for r in log], [r[key] for r in log], ".-")
        ax.set(title=key.replace("_", " "), xlabel="epoch")
    figure.savefig(Path(*run, "dynamics.png"), dpi=100)


if __name__ == "__main__":
    clamp.command_line(lambda: dynamics(*sys.argv[1:]))
