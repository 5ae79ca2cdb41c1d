"""Run clamp.py and eval_linear.py on CUDA tensors without contents, which need no GPU.

This uses private parts of torch (2.14.1 has them, 2.6 does not). MISSING says what is missing.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import clamp
import eval_linear

CUDA, ATEN = torch.device("cuda", 0), torch.ops.aten
MISSING = "" if hasattr(torch._C, "_ensureCUDADeviceGuardSet") else (
    f"torch {torch.__version__} cannot make CUDA tensors without a GPU")


class FakeCuda(FakeTensorMode):
    """While it is on, CUDA tensors have no contents, and CPU tensors are real. It raises if an
    operation mixes devices, if the shape of a result depends on contents (a mask as an index), or
    if a copy to the CPU is not waited for.

    waits: how often each function of this project made the CPU wait for the GPU, by .item(), by
        bool(), or by a copy between the two that is not non_blocking
    held, peak: bytes of all CUDA tensors now, and at most so far
    """

    def __init__(self):
        super().__init__()
        self.waits, self.storages, self.held, self.peak = Counter(), set(), 0, 0
        self.inside = False  # one of torch's own operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        target = torch.device(kwargs.get("device") or "cpu").type
        if target == "cpu" and not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **kwargs)
        if self.inside:
            return super().__torch_dispatch__(func, types, args, kwargs)

        if func is ATEN._local_scalar_dense.default:  # .item(), float(), bool()
            self.wait()
            return torch.ones((), dtype=args[0].dtype).item()
        places = {x.device.type for x in tensors}
        if func in (ATEN._to_copy.default, ATEN.copy_.default):
            places |= {target} if kwargs.get("device") else set()
            if len(places) > 1 and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.wait()
            elif len(places) > 1 and (args[0].is_cpu if func is ATEN.copy_.default else
                                      target == "cpu"):
                raise RuntimeError("the CPU may read a copy before the GPU has made it")
        elif len({x.device.type for x in tensors if x.ndim}) > 1:  # numbers may be on the CPU
            raise RuntimeError(f"{func} mixes devices")

        def fake(x):
            return x if isinstance(x, FakeTensor) else self.from_tensor(x)

        args, kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
        self.inside = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.inside = False
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                self.hold(x.untyped_storage())
        return result

    def __deepcopy__(self, memo):  # tensors refer to it
        return self

    def wait(self):
        """Count a wait for the innermost function of this project."""
        files = clamp.__file__, eval_linear.__file__
        names = [frame.name for frame in traceback.extract_stack() if frame.filename in files]
        self.waits[["outside", *(name for name in names if name[0] != "<")][-1]] += 1

    def hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            weakref.finalize(storage, self.release, key, size)
            self.held += size
            self.peak = max(self.peak, self.held)

    def release(self, key, size):
        self.storages.remove(key)
        self.held -= size


def backward(loss):
    """In place of loss.backward(), whose engine would ask the driver for a stream."""
    todo = {loss.grad_fn: {0: torch.ones_like(loss)}}  # gradients that each node has been given
    while todo:
        node = max(todo, key=lambda node: node._sequence_nr())  # after all nodes that depend on it
        given = todo.pop(node)
        if hasattr(node, "variable"):
            weight, grad = node.variable, given[0]
            weight.grad = grad if weight.grad is None else weight.grad + grad
            continue
        given = [given.get(k) for k in range(len(node._input_metadata))]
        with torch.no_grad():
            grads = node(*given)
            grads = grads if isinstance(grads, tuple) else [grads]
            del given
            for (target, k), grad in zip(node.next_functions, grads):
                if target is not None and grad is not None:
                    like, sums = target._input_metadata[k], todo.setdefault(target, {})
                    grad = grad.sum_to_size(like.shape).to(like.dtype)
                    sums[k] = sums[k] + grad if k in sums else grad
            del grads, grad


def with_buckets(network):
    """In place of DDP, which holds the gradients a second time, in buckets to be averaged."""
    network.buckets = [torch.empty_like(p) for p in network.parameters()]
    return network


@contextlib.contextmanager
def fake_gpu(world=1, dtype=torch.bfloat16):
    """clamp.py and eval_linear.py take this process for the first of `world` with a GPU each. What
    the other processes would send is left out, and batch norm is not synchronised."""
    def nothing(*_, **__):
        pass

    changes = {
        torch.cuda.amp.common: dict(amp_definitely_not_available=lambda: False),
        torch.cuda: dict(is_available=lambda: False, is_bf16_supported=lambda: True,
                         get_device_name=lambda: "fake GPU", max_memory_allocated=lambda: 0),
        torch.Tensor: dict(backward=backward),
        torch.utils: dict(swap_tensors=nothing),  # moves a fake parameter to where it is already
        dist: dict(all_gather=nothing, all_gather_object=nothing, all_gather_into_tensor=nothing),
        nn.parallel: dict(DistributedDataParallel=with_buckets),
        clamp: dict(start_processes=lambda args: (CUDA, dtype), rank_and_world=lambda: (0, world),
                    save=nothing, save_image=nothing),
        eval_linear: dict(save_image=nothing)}
    with contextlib.ExitStack() as stack:
        for place, names in changes.items():
            stack.enter_context(mock.patch.multiple(place, **names))
        # What a node saved for backward() is let go once the node has used it.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: [x], list.pop))
        yield stack.enter_context(FakeCuda())
