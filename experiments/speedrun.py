"""Train and evaluate CLAMP and other methods on CIFAR-10, in jobs of minutes for one GPU.

    python experiments/speedrun.py pilots                               settings, on held-out images
    python experiments/speedrun.py ten_million --winner "--lr 1.6"      with flags that they chose
    python experiments/speedrun.py pilots --scale 0.001 --out runs/try  the same, rehearsed on a CPU

JOBS lists the runs of each job. OUT/results.jsonl gets a line after each run, and OUT/NAME is its
run folder. A call ends when its --minutes are over, and the same command continues from there.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import peers  # before clamp, because it puts the folder above on sys.path
import clamp
import eval_linear

BASE = "--recipe small --stem cifar --batch-size 512 --compile default"  # lr .4 for 256 images
SHORT = f"{BASE} --weight-decay 5e-4 --gray-p .1 --blur-p 0 --jitter .4 .4 .4 .1"
# Settings of dkobak/simclr-cifar10, which has 83.2 (k-NN) and 85.6 (linear) after 10 million views.
# No flag gives its stem's padding of 1, or weight decay of biases and batch norm.
KOBAK = f"{SHORT} --lr .06 --warmup-epochs 0 --no-zero-init --projector 1024 128"
SIMCLR = f"{KOBAK} --temperature .5"
PUBLISHED = "--recipe cifar10-published --compile default"
JOBS = {  # runs: name, method of peers.py, flags, million views (None: what --minutes hold)
    "pilots": [("lr-0.4", "clamp", BASE, 2.5), ("lr-1.6", "clamp", f"{BASE} --lr 1.6", 2.5),
               ("short", "clamp", SHORT, 2.5), ("short-1.6", "clamp", f"{SHORT} --lr 1.6", 2.5),
               ("reach-1.0", "clamp", f"{BASE} --max-reach 1.0", 2.5),
               ("4x256", "clamp", f"{BASE} --views 4 --batch-size 256 --lr .8", 2.5),
               ("simclr-pilot", "simclr", SIMCLR, 2.5)],
    "ten_million": [("winner", "clamp", BASE + " {winner}", 10), ("simclr", "simclr", SIMCLR, 10)],
    "long": [("winner-long", "clamp", BASE + " {winner}", None)],
    "published_rate": [("published-2.0", "clamp", f"{PUBLISHED} --lr 2.0", 12.8),  # 16 epochs
                       ("published-0.1", "clamp", f"{PUBLISHED} --lr 0.1", 12.8)],
    # MMCR has the rate and widths chosen for `small`. The rates of DCL and SIGReg are untried.
    "peers": [("mmcr", "mmcr", f"{KOBAK} --weight-decay 1e-6 --lr 6.4 --projector 2048 512", 10),
              ("dcl", "dcl", KOBAK, 10), ("sigreg", "sigreg", KOBAK, 10)],
}


def load_images(data, scale, file):
    """(images, labels) to train on, and those to test on. They are decoded once, into a file."""
    if not file.exists():
        both = [clamp.load_data(data, split) for split in ("train", "test")]
        if any(x.images is None or x.labels.min() < 0 for x in both):
            raise clamp.UserError(f"--data {data}: give classes of small images, with a test set")
        gaps = [min(round(1 / scale), len(x.labels) // 700) or 1 for x in both]  # 700 fill a batch
        pairs = [(x.images[::gap].clone(), x.labels[::gap].clone()) for x, gap in zip(both, gaps)]
        clamp.write([data, scale, pairs], file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)  # so that it is whole, or not there
    *source, pairs = torch.load(file)
    if source != [data, scale]:
        raise clamp.UserError(f"{file} has images of another --data or --scale; give another --out")
    return pairs


def hold_out(images, labels):
    """The first four fifths of each class to train on, and the others to test on."""
    classes = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    parts = zip(*(rows.tensor_split([len(rows) * 4 // 5]) for rows in classes))
    return [(images[rows], labels[rows]) for rows in map(torch.cat, parts)]


def train(method, flags, data, epochs, out, deadline=float("inf")):
    """Train a new or an interrupted run until the deadline. Returns the times of its steps."""
    flags = [*flags, "--epochs", str(epochs), "--out", str(out)]
    args, loss_fn, network, augment = peers.prepare(method, *flags)
    args.compile = args.compile if torch.cuda.is_available() else None  # slow on a CPU
    times = []

    def check_time():
        times.append(time.monotonic())
        if times[-1] > deadline:
            print("time is over: call again to continue")
            raise SystemExit  # the next call goes on from the last whole epoch
    check_time()  # also before the first step, which compiles
    clamp.train(args, lambda z: check_time() or loss_fn(z), network, augment, data)
    return times[1:]


def forecast(method, flags, data, scale, deadline):
    """As many epochs as end before the deadline, by the speed of three that are thrown away."""
    with tempfile.TemporaryDirectory() as out:
        times = train(method, flags, data, 3, f"{out}/run")
    _, second, third = times[::len(times) // 3]  # the first step of each epoch
    return max(1, int(0.95 * scale * (deadline - time.monotonic()) / (third - second)))


def main(job, data, out, minutes, scale, winner):
    deadline = time.monotonic() + 54 * minutes  # a tenth of the time is left for an evaluation
    if winner is None and "{winner}" in str(JOBS[job]):
        raise clamp.UserError(f'{job}: give --winner "FLAGS", those that the pilots chose')
    runs = [(name, method, flags.format(winner=winner).split(), million)
            for name, method, flags, million in JOBS[job]]
    settings = [peers.prepare(method, *flags)[0] for _, method, flags, _ in runs]  # or an error now
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = [json.loads(line) for line in open(results)] if results.exists() else []
    data = load_images(data, scale, out / "images.pt")
    data = hold_out(*data[0]) if job == "pilots" else data

    for (name, method, flags, million), args in zip(runs, settings):
        line = {"name": name, "method": method, "flags": " ".join(flags)}
        if any(line.items() <= other.items() for other in done):
            print(f"{name}: done before")
            continue
        views = len(data[0][1]) // args.batch_size * args.batch_size * args.views  # of an epoch
        if (out / name / "backbone.pt").exists():  # an interrupted run keeps its epochs
            epochs = eval_linear.load_backbone(out / name, False)[1]["settings"]["epochs"]
        elif million:
            epochs = max(1, round(scale * 1e6 * million / max(1, views)))
        else:
            epochs = forecast(method, flags, data[0], scale, deadline)
        speed = [65_000, *(x["views_per_second"] for x in done if "linear" in x)][-1]  # an H100's
        print(f"{name}: {epochs} epochs of {views} views; seconds expected: "
              f"{epochs * views / speed:.0f}, left: {deadline - time.monotonic():.0f}", flush=True)
        try:
            train(method, flags, data[0], epochs, out / name, deadline)
            result = eval_linear.evaluate(eval_linear.parse_args([f"{out / name}"]), data=data)
            log = [json.loads(epoch) for epoch in open(out / name / "log.jsonl")]
            line |= {"epochs": epochs, "views": epochs * views,
                     "training_seconds": round(sum(epoch["seconds"] for epoch in log), 1),
                     "views_per_second": round(log[-1]["views_per_second"]),
                     "linear": result["top1"], "knn": result["knn"]}
        except (clamp.UserError, torch.linalg.LinAlgError) as error:
            if "finite" not in str(error):
                raise
            line["error"] = str(error)  # that it diverges is a result, too
        line["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        done.append(line | {"torch": torch.__version__})
        print(json.dumps(done[-1]), flush=True)
        with open(results, "a") as file:
            print(json.dumps(done[-1]), file=file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("speedrun.py", allow_abbrev=False)
    add, within = parser.add_argument, clamp.within
    add("job", choices=JOBS)
    add("--data", type=clamp.data_name, default="data/cifar10-jpeg", help="(data/cifar10-jpeg)")
    add("--out", type=Path, default="runs/speedrun", help="of results and runs (runs/speedrun)")
    add("--minutes", type=within(float, 0.01), default=9.5, help="limit of the call (9.5)")
    add("--scale", type=within(float, 1e-6, 1), default=1.0, help="share of the work (1)")
    add("--winner", help="flags that the pilots chose, in quotes")
    clamp.command_line(lambda: main(**vars(parser.parse_args())))
