"""The self-test of a device: each fault that GPUs were seen to have is found, a sound one is not.

A dispatch mode stands around what the tested "device" (here the CPU) does, and spoils it.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAULTS
from torch.utils._python_dispatch import TorchDispatchMode

import unified_finetune as finetune

Spoil = Callable[..., Any]  # of an operation's real function, its arguments and a memory


class Broken(TorchDispatchMode):
    """Let an operation whose name is `name` go wrong in the way of `spoil`."""

    def __init__(self, name: str, spoil: Spoil, memory: "dict[Any, Any]") -> None:
        super().__init__()
        self.name, self.spoil, self.memory = name, spoil, memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def real(*given, **named):
            return function(*given, **(named or kwargs or {}))

        if function._schema.name != "aten::" + self.name:
            return real(*args)
        FAULTS["a kernel of a device that computes wrongly"] += 1
        return self.spoil(real, args, self.memory)


def tail_lost(real, args, memory):
    a, b = args
    return real(*args) if a.shape[1] < 20_000 else real(a[:, :20_000], b[:20_000])


def stale(real, args, memory):
    shape = tuple(tuple(a.shape) for a in args)
    return memory.setdefault(shape, real(*args)).clone()


def now_and_then(real, args, memory):
    memory["calls"] = memory.get("calls", 0) + 1
    return real(*args) if memory["calls"] % 7 else torch.zeros_like(real(*args))


def gradient_times(factor: float) -> Spoil:
    """Scale what has the shape of a gradient of lora_A, [rank, hidden]."""

    def spoil(real, args, memory):
        result = real(*args)
        return result * factor if result.shape == (8, 128) else result

    return spoil


def forgetful(real, args, memory):
    return args[0].copy_(torch.randint_like(args[0], -(2**62), 2**62))


FAULTY = {
    "an adapter's gradient times 0.3": ("mm", gradient_times(0.3)),
    "an adapter's gradient times 1,000": ("mm", gradient_times(1000)),
    "the tail of a long sum is lost": ("mm", tail_lost),
    "an old result instead of the new one": ("bmm", stale),
    "work that is dropped now and then": ("mm", now_and_then),
    "a mask that lets the future through": ("triu", lambda real, a, m: torch.zeros_like(a[0])),
    "a causal mask of another shape": ("triu", lambda real, a, m: real(a[0], 2)),
    "a random state that is forgotten": ("random_", forgetful),
    "masks that are always the same": ("random_", lambda real, a, m: a[0].zero_()),
    "writes that do not arrive": ("index_copy_", lambda real, a, m: a[0]),
    "sums over repeated places that lose some": ("index_add_", lambda real, a, m: a[0]),
    "targets that are not subtracted": ("scatter_add_", lambda real, a, m: a[0]),
    "rows that are swapped": ("index_select", lambda real, a, m: real(*a).roll(1, 0)),
    "a softmax that does not add up": ("_softmax", lambda real, a, m: real(*a) * 0.98),
    "a sine that is a cosine": ("sin", lambda real, a, m: torch.cos(a[0])),
    "an activation that is left out": ("silu", lambda real, a, m: a[0].clone()),
    "an optimizer that forgets its moments": ("lerp_", lambda real, a, m: a[0]),
    "a clipping that clips nothing": ("clamp", lambda real, a, m: torch.ones_like(a[0])),
    "a mask that answers do not heed": (
        "scaled_dot_product_attention", lambda real, a, m: real(*a[:3], None, *a[4:]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTY)
def test_every_fault_of_a_device_is_found(kind):
    name, spoil = FAULTY[kind]
    memory: dict[Any, Any] = {}
    size = 32_000 if spoil is tail_lost else 300
    assert finetune.find_fault("cpu", "float32", 3, size, lambda: Broken(name, spoil, memory))


def test_a_device_that_rounds_coarsely_is_granted_that_and_no_more():
    def products(change):  # of float32, not those of float64 that they are compared with
        return lambda real, a, m: real(change(a[0]) if a[0].dtype == torch.float32 else a[0], a[1])

    exact = finetune.tolerance_of("cpu", "float32")
    with Broken("mm", products(lambda x: x.bfloat16().float()), {}):
        coarse = finetune.tolerance_of("cpu", "float32")
    with Broken("mm", products(lambda x: 3 * x), {}):
        wrong = finetune.tolerance_of("cpu", "float32")
    assert (exact, wrong) == (1e-3, 5e-2)
    assert 5e-3 < coarse < 5e-2


def test_the_time_of_a_sample_of_the_work_is_measured():
    assert 0 < finetune.time_products("cpu", "float32") < 60


def test_a_kernel_that_is_wrong_without_gradients_only_is_found():
    def world():  # outside of inference_mode, PyTorch hands on what a linear layer is made of
        return Broken("linear", lambda real, a, m: real(*a) * 1.05, {})

    assert "without gradients" in finetune.find_fault("cpu", "float32", 3, 300, world)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.scale) for seed in range(1, 20))]
)
def test_a_sound_device_passes(seed):
    assert finetune.find_fault("cpu", "float32", seed, 300) == ""


@pytest.mark.scale
def test_a_sound_device_passes_in_bf16():
    assert finetune.find_fault("cpu", "bfloat16") == ""


def test_a_device_that_passed_is_not_tested_again_and_one_that_failed_is(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "PROGRAM_FOLDER", tmp_path)
    answers = [{"problem": "x", "seconds": []}, {"problem": None, "seconds": [1, 2, 3]}]
    said, started, real = list(map(json.dumps, answers)), [], finetune.subprocess.run

    def run(command, **options):
        if finetune.SELF_TEST not in command:  # `platform` runs uname
            return real(command, **options)
        started.append(command)
        return real(["echo", said[len(started) - 1]], **options)

    monkeypatch.setattr(finetune.subprocess, "run", run)
    outcomes = [finetune.self_test("cpu:0", "float32") for _ in range(4)]
    assert outcomes == [("the self-test failed: x", []), *[(None, [1, 2, 3])] * 3]
    assert len(started) == 2
