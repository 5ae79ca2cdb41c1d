"""Films the packing: with a projector of three outputs, the images' balls lie in ordinary space.

    python experiments/sphere.py        trains on patterns; writes sphere.png and sphere.gif here
    python experiments/sphere.py RUN    draws a finished run of --projector 2048 3, into RUN
"""
import math
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
import clamp  # noqa: E402

FLAGS = ("--projector 512 3 --radius-scale 1.2 --max-reach 9 --views 4 --batch-size 60 --epochs 4 "
         "--lr 1.6 --crop-scale 0.4 1 --blur-p 0 --device cpu").split()
KINDS = dict(stripes=(204, 121, 167), checks=(86, 180, 233), dots=(0, 158, 115),  # Okabe and Ito's,
             rings=(240, 228, 66), zigzag=(0, 114, 178), rays=(213, 94, 0))  # for the colour-blind


def draw(z, skins, radius_scale, turn, side=340):
    """The loss's balls in skins [b, 3, 128, 128], turned and seen from afar; far ones are pale.
    The grey disc is the unit sphere."""
    centers, r = clamp.balls(z, radius_scale)
    x, y, z = centers.T
    x, z = x * math.cos(turn) + z * math.sin(turn), z * math.cos(turn) - x * math.sin(turn)
    column = torch.linspace(-1.4, 1.4, 2 * side)
    row = column[:, None]
    inside = r**2 - (column[:, None] - x)**2 - (row[:, None] + y)**2  # [row, column, ball]
    depth, k = (z + inside.clamp(min=0).sqrt()).where(inside > 0, -9).max(2)  # the nearest ball
    u, v, light = ((a / r[k]).clamp(-1, 1) for a in (column - x[k], row + y[k], depth - z[k]))
    light, depth, disc = light[..., None], depth[..., None], (column**2 + row**2 < 1)[..., None]
    colour = skins[k, :, (63.5 * (v + 1)).long(), (63.5 * (u + 1)).long()] * (0.5 + 0.5 * light)
    colour = 1 + (colour - 1) * (depth / 1.5 + 0.6).clamp(0.2, 1)
    colour = colour.where(depth > -9, 1 - 0.07 * disc)
    return Image.fromarray((colour * 255).byte().numpy()).reduce(2)


def film(shots, skins, kinds, args, folder, shrink=1.0):
    """Shows the packings (title, z) one by one while they turn. Nine also stand in a row."""
    frames, font, row = [], ImageFont.load_default(28), Image.new("RGB", (2700, 450))
    paper = Image.new("RGB", (560 if kinds else 340, 450), "white")
    for k, (kind, index) in enumerate(kinds.items()):
        skin = (skins[index] * 255).byte().permute(1, 2, 0).numpy()
        paper.paste(Image.fromarray(skin).resize((48, 48)), (380, 25 + 64 * k))
        ImageDraw.Draw(paper).text((440, 31 + 64 * k), kind, "black", font)
    for title, z in shots + 20 * shots[-1:]:  # the last is also shown from behind
        frames.append(paper.copy())
        turn = math.pi * len(frames) / 20
        frames[-1].paste(draw(z, skins, shrink * args.radius_scale, turn))
        numbers = clamp.packing_numbers(z, args.radius_scale, args.max_reach)
        text = "{}\nmean radius {radius:.2f}\nneighbours {neighbours:.1f}".format(title, **numbers)
        ImageDraw.Draw(frames[-1]).text((40, 335), text, "black", font, spacing=8)
    for k in range(9):
        row.paste(frames[k * (len(shots) - 1) // 8].crop((20, 0, 320, 450)), (300 * k, 0))
    palette = row.reduce(3).quantize(64 if kinds else 256, kmeans=8)
    row, *frames = (x.quantize(palette=palette, dither=Image.Dither.NONE) for x in (row, *frames))
    row.save(folder / "sphere.png", optimize=True)
    frames[0].save(folder / "sphere.gif", save_all=True, append_images=frames[1:], duration=120,
                   loop=0)


def main(run=None, flags=(), folder=Path(__file__).parent):
    args, kinds, shots, shrink = clamp.parse_args([*FLAGS, *flags]), {}, [], 1.0
    if run:
        folder, saved = Path(run), torch.load(Path(run, "checkpoint.pt"), "cpu")
        vars(args).update(saved["settings"])
    if args.projector[-1] != 3:
        raise clamp.UserError(f"{run}: needs a projector of three outputs, as --projector 2048 3")
    torch.manual_seed(args.seed)
    network, data = clamp.build_network(args), clamp.load_data(args.data, "test")
    data = data if len(data.labels) else clamp.load_data(args.data, "train")
    labels = data.labels
    rows = labels.argsort(stable=True)[torch.linspace(  # as many of each class
        0, len(labels) - 1, min(args.batch_size, len(labels))).long()]
    images = next(clamp.image_batches(data, [(0, rows)], lambda x: clamp.center_crop(x, 128),
                                      torch.device("cpu")))
    skins = images / 255
    augment = clamp.build_augment(args)
    views = augment(augment.crop(images))

    def look():  # at as many test images as a batch has, as the loss would see them
        z = clamp.embed(network.train(), views.flatten(0, 1), torch.float32).detach()
        return z.unflatten(0, views.shape[:2])

    def loss_fn(z):
        shots.append(look() if len(shots) % 8 == 0 else None)
        return clamp.packing_loss(z, args.radius_scale, args.max_reach)

    if run:
        network.load_state_dict(saved["network"])
        z = look()
        numbers = clamp.packing_numbers(z, args.radius_scale, args.max_reach)
        shrink = min(1, 0.2 / numbers["radius"].item())  # wide balls would hide the sphere
        shots = 20 * [(f"radii drawn x {shrink:.2g}", z)]
    else:
        grey = skins[:, :1] - skins[:, :1].mean((2, 3), keepdim=True)
        light = (0.75 + 0.2 * grey / grey.std((2, 3), keepdim=True)).clamp(0.2, 1)
        skins = light * torch.tensor([*KINDS.values()])[labels[rows], :, None, None] / 255
        kinds = {kind: labels[rows].tolist().index(k) for k, kind in enumerate(KINDS)}
        with tempfile.TemporaryDirectory() as args.out:
            clamp.train(args, loss_fn, network)
        shots = [(f"step {k}", z) for k, z in enumerate([*shots, look()]) if z is not None]
    film(shots, skins, kinds, args, folder, shrink)


if __name__ == "__main__":
    clamp.command_line(lambda: main(*sys.argv[1:]))
