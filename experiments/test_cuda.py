"""What can be known of the CUDA path without a GPU, and tests for machines with one or two.

The tests on fake CUDA tensors (fake_cuda.py) run clamp.train and eval_linear.evaluate themselves.
They fail if an operation mixes devices, if a mask is an index, if a copy to the CPU is not waited
for, and if the CPU waits for the GPU anywhere but in the places listed here with their counts.
"""

import gc
import os
import socket
import sys
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import clamp  # noqa: E402
import eval_linear  # noqa: E402
import fake_cuda  # noqa: E402
import memory  # noqa: E402
import speedrun  # noqa: E402
from test_clamp import FixedViews, tiny_network, write_pictures  # noqa: E402

fake = pytest.mark.skipif(bool(fake_cuda.MISSING), reason=fake_cuda.MISSING)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FEW = ["--recipe", "small", "--data", "patterns", "--batch-size", "4", "--epochs", "1",
       "--workers", "0"]


def size(tensors):
    return sum(x.nbytes for x in tensors)


@fake
@pytest.mark.filterwarnings("ignore:.*pin_memory")  # which needs a GPU
@pytest.mark.parametrize("streamed, world, steps, read_outs", [
    (False, 1, 21, 11), (False, 2, 3, 3), (True, 1, 3, 3)])
def test_training_waits_for_the_gpu_in_read_outs_only(streamed, world, steps, read_outs, tmp_path):
    network, outputs = tiny_network(), set()
    network.register_forward_hook(lambda module, x, z: outputs.add((z.device, z.dtype)))
    args = clamp.parse_args([*FEW, "--blur-p", "1", "0.1", "--solarize-p", "0", "0.2", "--eta",
                             "0.001", "--data", str(tmp_path / "photos"), "--out", str(tmp_path)])
    data = torch.zeros(4 * steps, 3, 40, 36, dtype=torch.uint8), torch.arange(4 * steps)
    if streamed:
        write_pictures(tmp_path / "photos", 4 * steps, ((40, 50), (70, 30)))  # without labels
        data = None
    with fake_cuda.fake_gpu(world) as gpu:
        clamp.train(args, network=network, data=data)
    assert outputs == {(fake_cuda.CUDA, torch.bfloat16)}
    # The network is moved, and each read-out takes six numbers.
    waits = {"place": len(network.state_dict()), "read_numbers": 6 * read_outs}
    if not streamed:  # The images are moved, and the k-NN read-out follows.
        waits |= {"to": 1, "image_batches": 1, "knn_readout": 1, "extract_features": 2,
                  "knn_accuracy": 2}
    assert gpu.waits == waits
    gc.collect()  # What is left are weights, gradients, DDP's buckets and batch norm's statistics.
    weights = size(network.parameters())
    assert gpu.held == weights * (2 if world == 1 else 3) + size(network.buffers())
    assert gpu.peak > gpu.held + weights  # the momentum


@fake
def test_a_speedrun_looks_at_the_clock_without_waiting_for_the_gpu(tmp_path, monkeypatch):
    backbone = tiny_network().backbone
    backbone.num_features = 8 * 49
    monkeypatch.setattr(clamp, "build_backbone", lambda *_: backbone)
    data = torch.zeros(84, 3, 32, 32, dtype=torch.uint8), torch.arange(84)
    with fake_cuda.fake_gpu() as gpu:
        times = speedrun.train("simclr", [*FEW, "--recipe", "small"], data, 1, tmp_path)
    assert len(times) == 21 and gpu.waits["image_batches"] == 1 and "train" not in gpu.waits


@fake
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("method, waits", [
    ([], {"probe": 2, "extract_features": 4}),
    (["--augment"], {"probe": 2, "extract_features": 4}),
    (["--finetune"], {"place": 2 * 3, "extract_features": 10})])
def test_training_of_a_probe_or_backbone_never_waits_for_the_gpu(method, waits, tmp_path):
    """Two epochs of three steps for two learning rates, and again for the better one."""
    backbone = tiny_network().backbone
    torch.save({"epoch": 1, "settings": vars(clamp.parse_args([])),
                "backbone": backbone.state_dict()}, tmp_path / "backbone.pt")
    data = torch.zeros(60, 3, 32, 32, dtype=torch.uint8), torch.arange(60) % 2
    args = eval_linear.parse_args([str(tmp_path), "--epochs", "2", "--batch-size", "18", "--lr",
                                   "0.1", "0.2", *method])
    with fake_cuda.fake_gpu() as gpu:
        eval_linear.evaluate(args, backbone, [data, data])
    # The network, images and labels are moved, and numbers are read after the training.
    assert gpu.waits == waits | {"evaluate": len(backbone.state_dict()) + 1, "to": 2,
                                 "make_split": 2, "accuracy": 4, "knn_accuracy": 2}


@fake
def test_neighbours_are_copied_to_the_cpu_before_they_are_drawn():
    options = dict(size=32, device=fake_cuda.CUDA, dtype=torch.float32)
    with fake_cuda.fake_gpu() as gpu:
        images = torch.zeros(30, 3, 32, 32, dtype=torch.uint8, device="cuda")
        data, rows = clamp.Data(images, torch.arange(30)), torch.arange(30)
        split = eval_linear.make_split(data, rows, nn.Flatten(), options)
        gpu.waits.clear()
        args = eval_linear.parse_args(["run"])
        with mock.patch.object(eval_linear, "load_backbone", lambda *_, **__: (nn.Flatten(), {})):
            eval_linear.draw_neighbours(split, args, options, "neighbours.png")
    assert gpu.waits == {"draw_neighbours": 2, "extract_features": 2, "image_batches": 12}


@fake
@pytest.mark.parametrize("world", [1, 8])
def test_features_are_not_held_twice(world):
    with fake_cuda.fake_gpu(world) as gpu:
        images = torch.zeros(4096, 3, 32, 32, dtype=torch.uint8, device="cuda")
        rows = torch.arange(4096)
        options = dict(size=32, device=fake_cuda.CUDA, dtype=torch.float32)
        features = eval_linear.extract(nn.Flatten(), clamp.Data(images, rows), rows, options)
        assert features.shape == (4096, 3072)
        assert features.nbytes <= gpu.peak - images.nbytes < 1.3 * features.nbytes


@fake
def test_peak_memory_is_counted_to_the_byte_and_grows_with_the_batch():
    gpu = fake_cuda.FakeCuda()
    with gpu:
        x = torch.zeros(1000, 1000, device="cuda")
        view, copy = x.T[5:], x.half()
        assert gpu.held == gpu.peak == 6_000_000
        del x, copy
        assert gpu.held == 4_000_000 and len(view) == 995
        del view
    assert gpu.held == 0 and gpu.peak == 6_000_000
    peaks = [memory.peak_gib(clamp.parse_args([*FEW, "--batch-size", str(b)]), world)
             for b, world in ((64, 1), (128, 1), (192, 1), (192, 3))]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.02)
    assert peaks[0] < peaks[3] < peaks[0] + 0.1  # DDP's buckets


def test_compile_lets_the_compiled_network_make_every_step(tmp_path, monkeypatch):
    """With a stand-in for torch.compile, because compiling takes a minute on a CPU."""
    calls = []

    def compiler(function, mode):
        return lambda *x: calls.append(mode) or function(*x)

    monkeypatch.setattr(torch, "compile", compiler)
    args = clamp.parse_args([*FEW, "--limit", "12", "--compile", "reduce-overhead",
                             "--out", str(tmp_path)])
    clamp.train(args, network=tiny_network())
    assert calls == ["reduce-overhead"] * 3


def test_out_of_memory_ends_in_one_line(tmp_path, capsys):
    def loss_fn(z):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    args = clamp.parse_args([*FEW, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        clamp.command_line(lambda: clamp.train(args, loss_fn, tiny_network()))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: out of memory; lower --batch-size" in line


# -------- on real GPUs


@pytest.fixture
def no_tf32(monkeypatch):
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@gpu
@pytest.mark.parametrize("function", [
    lambda x, change: clamp.normalize(clamp.brightness(x, change)),
    lambda x, change: clamp.contrast(x, change),
    lambda x, change: clamp.saturation(x, change),
    lambda x, change: clamp.hue(x, change),
    lambda x, change: clamp.gaussian_blur(x, 1 + change, 5),
    lambda x, change: clamp.roi_align(x, torch.cat([
        torch.arange(4.0, device=x.device)[:, None], 30 * change.view(4, 1) + torch.tensor(
            [[-3, -3, 2, 3]], device=x.device)], 1), 24, aligned=True),
    lambda x, change: clamp.packing_loss(x.flatten(2)),
    lambda x, change: clamp.build_backbone("resnet18", "cifar").to(x.device).eval()(x),
    lambda x, change: clamp.build_backbone("resnet18").to(x.device).eval()(x)])
def test_a_gpu_computes_what_a_cpu_does(function, no_tf32):
    torch.manual_seed(0)
    x, change, results = torch.rand(4, 3, 40, 36), torch.rand(4, 1, 1, 1) + 0.1, []
    for device in "cpu", "cuda":
        torch.manual_seed(0)  # for the weights
        results.append(function(x.to(device), change.to(device)).detach().cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@gpu
@pytest.mark.parametrize("streamed, read_outs, others", [(False, 11, 7), (True, 3, 0)])
def test_a_real_gpu_is_waited_for_as_often_as_the_fake_one(streamed, read_outs, others, tmp_path):
    args = clamp.parse_args([*FEW, "--data", str(tmp_path / "photos"), "--out", str(tmp_path)])
    data = torch.zeros(84, 3, 40, 36, dtype=torch.uint8), torch.arange(84)
    if streamed:
        write_pictures(tmp_path / "photos", 12, ((40, 50), (70, 30)))
        data = None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clamp.train(args, network=tiny_network(), data=data)
    torch.cuda.set_sync_debug_mode("default")
    waits = Counter(w.lineno for w in caught if w.filename == clamp.__file__)
    assert sum(waits.values()) == 6 * read_outs + others, waits


@gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_default_run_on_a_gpu_continues_and_is_evaluated(amp, tmp_path):
    args, save = clamp.parse_args(["--amp", amp, "--out", str(tmp_path)]), clamp.save

    def save_and_stop(out, log, settings, epoch, parts):
        save(out, log, settings, epoch, parts)
        if epoch == 1:
            raise KeyboardInterrupt

    with mock.patch.object(clamp, "save", save_and_stop), pytest.raises(KeyboardInterrupt):
        clamp.train(args)
    clamp.train(args)
    for flags in [], ["--augment", "--epochs", "5"], ["--finetune", "--epochs", "2"]:
        flags = [str(tmp_path), "--amp", amp, *flags]
        result = eval_linear.evaluate(eval_linear.parse_args(flags))
        assert result["top1"] > 84  # untrained: 77


def train_alike(rank, world, device, compiled, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_float32_matmul_precision = lambda precision: None  # because TF32 is coarse
    torch.backends.cudnn.allow_tf32 = False
    args = clamp.parse_args(["--limit", "24", "--batch-size", "12", "--epochs", "3", "--lr", "4",
                             "--eta", "0.1", "--amp", "off", "--device", device, "--out", folder,
                             *(["--compile", "default"] if compiled else [])])
    clamp.train(args, network=tiny_network(), augment=FixedViews)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpus_train_as_one_cpu_does(world, compiled, tmp_path):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    for device, processes in ("cpu", 1), ("cuda", world):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        torch.multiprocessing.spawn(train_alike, (
            processes, device, compiled and device == "cuda", str(tmp_path / device), port),
            processes)
    cpu, cuda = (torch.load(tmp_path / x / "checkpoint.pt", "cpu") for x in ("cpu", "cuda"))
    torch.testing.assert_close(cuda["network"], cpu["network"], rtol=1e-3, atol=2e-5)
    assert [x["loss"] for x in cuda["log"]] == pytest.approx([x["loss"] for x in cpu["log"]], 1e-3)
