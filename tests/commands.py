"""What the tests of all scripts share: starting one as a user does and reading what it left, networks and gradients by
hand."""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import envs
from envs import runs

ROOT = Path(__file__).parent.parent
RTOL, ATOL = 3e-3, 3e-4  # of alike() on a GPU
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # a CPU's kernels take minutes to compile


class Fork:
    """A script that fork_server.py has started: what the tests need of subprocess.Popen."""

    channel: socket.socket | None = None  # to this process's server, which ends when that is closed

    def __init__(self, words: list[str], environment: dict[str, str]):
        if Fork.channel is None:
            Fork.channel, other = socket.socketpair()
            server = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(other.fileno())]
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "pass_fds": [other.fileno()]}
            process = subprocess.Popen(server, **pipes)
            other.close()
            atexit.register(process.wait)  # so that its time counts
            atexit.register(Fork.channel.close)
        self.out, self.err, request = (tempfile.TemporaryFile("w+") for _ in range(3))
        json.dump({"words": words, "environment": environment, "folder": os.getcwd()}, request)
        request.seek(0)
        status, writer = os.pipe()
        socket.send_fds(Fork.channel, [b"."], [request.fileno(), self.out.fileno(), self.err.fileno(), writer])
        os.close(writer)
        request.close()
        self.status = os.fdopen(status)
        self.pid = int(self.status.readline())

    def communicate(self, timeout: float) -> tuple[str, str]:
        if not select.select([self.status], [], [], timeout)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired("a script", timeout)
        self.returncode = int(self.status.readline())
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        self.status.close()
        return tuple(texts)


def start_script(script: str, *flags, is_forked=True, **environment) -> Fork | subprocess.Popen:
    """The script as a user starts it, or as good as that, without the seconds that it takes to import torch."""
    words, environment = [str(ROOT / script), *map(str, flags)], os.environ | environment
    if is_forked:
        return Fork(words, environment)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, *words], **options)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def call(script, monkeypatch, *flags) -> int:
    """script.main() in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    try:
        script.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def only(tmp_path) -> Path:
    (folder,) = tmp_path.iterdir()
    return folder


def without_speed(rows):
    return [{name: value for name, value in row.items() if name != "charts/SPS"} for row in rows]


def alike(a, b) -> bool:
    """Are tensors or rows of metrics.csv the same in a batch of another size? To the last bit on a CPU; on a GPU, where
    rounding depends on that size, nearly, but for what is a small difference of gradients."""
    if isinstance(a, dict):
        names = [name for name in a if not (torch.cuda.is_available() and "interaction" in name)]
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in names)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, torch.Tensor):
        if a.is_cuda and a.is_floating_point():
            return a.shape == b.shape and torch.allclose(a, b, rtol=RTOL, atol=ATOL)
        return torch.equal(a, b)
    return a == b or (torch.cuda.is_available() and float(a) == pytest.approx(float(b), rel=RTOL, abs=ATOL))


def on(device, x):
    """Tensors, networks and dictionaries of them, moved there: what is drawn on a CPU is the same on every device."""
    if isinstance(x, dict):
        return {name: on(device, value) for name, value in x.items()}
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return dataclasses.replace(x, flat=x.flat.detach().to(device).requires_grad_(x.flat.requires_grad))


def plain(net, row, x, activation=torch.tanh):
    """Output of one of the networks for one input [in]: weights and biases of its layers in a row."""
    at = 0
    for k, (n_in, n_out) in enumerate(itertools.pairwise(net.sizes)):
        weight = net.flat[row, at : at + n_in * n_out].view(n_out, n_in)
        bias = net.flat[row, at + n_in * n_out : at + (n_in + 1) * n_out]
        at += (n_in + 1) * n_out
        x = weight @ x + bias
        x = activation(x) if k < len(net.sizes) - 2 else x
    return x


def fourth_order(function, h=1e-5):
    """Derivative at 0."""
    a, b, c, d = (function(k * h) for k in (2, 1, -1, -2))
    return (-a + 8 * b - 8 * c + d) / (12 * h)


class Recorder(TorchDispatchMode):
    """A CUDA graph on a CPU: `calls` are those of ATen inside, with the tensors and numbers they had; `replay` repeats
    them. As in a capture, what they write is undone in the end. `obstacles` are those that a CUDA graph cannot have."""

    def __init__(self):
        super().__init__()
        self.calls, self.overwritten, self.obstacles = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_obstacle(function, args, kwargs):
            self.obstacles.append(str(function))
        for argument, value in zip(function._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten += [(tensor, tensor.clone()) for tensor in tree_leaves(value)]
        result = function(*args, **kwargs)
        if function.namespace == "aten":  # the others tell the profiler
            self.calls.append((function, args, kwargs, result))
        return result

    @torch.no_grad()
    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.overwritten):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # no view, and not in place
                    old.copy_(new)


def is_obstacle(function, args, kwargs) -> bool:
    """To a capture: numbers that the host has or reads, shapes that depend on them, random ones, sums in any order."""
    name = function.overloadpacket.__name__.rstrip("_")
    if name == "index":  # which has the tag of its masks
        return any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
    if tags & set(function.tags) or any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
        return True
    if name != "scatter_add" or args[0].is_meta:
        return name in ("index_add", "index_put", "scatter_reduce", "lift_fresh")  # the last of host memory
    sums, axis, index, terms = args
    counts = torch.zeros_like(sums).scatter_add(axis, index, torch.ones_like(terms))
    return torch.are_deterministic_algorithms_enabled() or bool((counts > 1).any())  # see envs.graphed


def record_cuda_graphs(monkeypatch) -> list[Recorder]:
    """Let a Recorder be made in the place of each CUDA graph. Returns those that are."""
    recorders = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def make_recorder() -> Recorder:
        recorders.append(Recorder())
        return recorders[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda place: contextlib.nullcontext())
    return recorders


def learner(script, nets, env, args) -> tuple[dict, Callable]:
    """What a checkpoint has of copies of networks and of their optimisers, and `update` as a function of the batch."""
    copies, optimizers = script.make_nets(env, args)
    for name, net in copies.items():
        net.flat.detach().copy_(nets[name].flat.detach())
    losses = {name: getattr(script, f"{name}_loss", None) for name in ("critic", "actor", "adversary")}
    update = partial(script.update, copies, optimizers)
    if hasattr(script, "qcombo_loss"):
        update = partial(update, script.qcombo_loss, args=args)
    else:
        update = partial(update, losses, env=env, args=args)
    return {"nets": {name: net.flat for name, net in copies.items()}, "optimizers": optimizers}, update


def rotated(batch: dict, M: int, count: int) -> list[dict]:
    """`count` batches of the same M samples, the k-th rotated by k."""
    batches = []
    for k in range(count):
        rolled = {}
        for name, x in batch.items():
            rolled[name] = x.roll(k, list(x.shape).index(M)) if M in x.shape else x
        batches.append(rolled)
    return batches


@contextlib.contextmanager
def cuda_graphs(device, monkeypatch, least):
    """Inside, exactly one graph is captured; on a CPU it is a recording of more than `least` calls of ATen."""
    recorders = [] if device.type == "cuda" else record_cuda_graphs(monkeypatch)
    yield
    assert len(recorders) == (device.type == "cpu")
    for recorder in recorders:
        assert len(recorder.calls) > least and not recorder.obstacles


def check_updates_in_a_cuda_graph(learners, batches, device, monkeypatch, resumed=False, least=100) -> None:
    """Three updates that run, a capture and its replays equal updates without a graph, of two equal `learners`."""
    (plain, update), (graphed, update_graphed) = learners
    with cuda_graphs(device, monkeypatch, least):
        update_graphed = envs.captured(update_graphed, device, graphed["optimizers"])
        if resumed:
            update(batches[0])
            for state in (graphed, plain):
                runs.restore(state, runs.pack(plain))
        metrics = []
        for k, batch in enumerate(batches[1:]):
            for optimizer in [*plain["optimizers"].values(), *graphed["optimizers"].values()]:
                optimizer.param_groups[0]["lr"] = 2.0 ** -(k + 6)  # exact in single precision
            metrics.append((update(batch), update_graphed(batch)))
    assert all(alike(*pair) for pair in metrics)
    assert alike(plain["nets"], graphed["nets"])
    for name, optimizer in plain["optimizers"].items():
        assert alike(optimizer.state_dict(), graphed["optimizers"][name].state_dict())


def check_rollouts_in_a_cuda_graph(play, nets, draws, device, monkeypatch, least=200) -> None:
    """Three rollouts that run, a capture and its replays equal rollouts without a graph, with the same `draws` and with
    networks that change in between."""
    assert (envs.graphed(play, device) is play) == (device.type == "cpu")
    pairs = []
    with cuda_graphs(device, monkeypatch, least):
        play_graphed = envs.captured(play, device)
        for drawn in draws:
            for net in nets.values():
                net.flat.detach().mul_(1.1)
            pairs.append([runs.tensors_in(outputs) for outputs in (play(*drawn), play_graphed(*drawn))])
    assert all(alike(*pair) for pair in pairs)
    assert not alike(pairs[-2][1], pairs[-1][1])
