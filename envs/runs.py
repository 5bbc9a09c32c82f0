"""Runs that survive: files written whole, checkpoints verified before use, signals, errors of one line.

with exits(2, ValueError, OSError):                       # what the user gave wrong: one line, exit code 2
    checkpoint = load("runs/RUN/checkpoint.pt")
with locked(run_dir), stop_signals() as caught:           # Ctrl-C, SIGTERM and SIGHUP are noted in `caught`
    save(run_dir / "checkpoint.pt", {"nets": {"actor": weights}, "streams": generators})
restore({"nets": {"actor": weights}, "streams": generators}, checkpoint)
"""

import argparse
import contextlib
import csv
import ctypes
import fcntl
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import pydantic
import torch
import tyro
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$", max_length=100)]  # of a folder
Threads = Annotated[int, Field(ge=1, le=1024)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # weight of the past in a running mean
Switch = tyro.conf.DisallowNone[bool | None]  # --flag, --no-flag, or neither
GIB = 2**30
# Decorates a group of flags; a script's `Args` inherits from its groups, the last one first
arguments = pydantic.dataclasses.dataclass(config={"allow_inf_nan": False})


class Busy(OSError):
    """Another process is at work in a run's folder."""


@dataclass
class Run:
    """Where a run writes: its folder, a row of metrics per label and log step, a Weights & Biases run per label."""

    dir: Path
    labels: list[dict]  # what tells the S runs that train side by side apart: {"seed": 1}, ...
    rows: list[dict] = field(default_factory=list)  # what metrics.csv holds
    wandb_runs: list = field(default_factory=list)  # empty: not logged there

    @property
    def seeds(self) -> list[int]:
        return [label["seed"] for label in self.labels]


# ---------------------------------------------------------------- errors and signals


@contextlib.contextmanager
def exits(code: int, *kinds: type[BaseException], hint: Callable[[], str] | None = None) -> Iterator[None]:
    """What is raised inside and is of these kinds ends the program: a line on stderr and this exit code."""
    try:
        yield
    except kinds as error:
        kind = "stopped" if isinstance(error, KeyboardInterrupt) else "error"
        message = " ".join(str(error).split()) or type(error).__name__
        parts = [Path(sys.argv[0]).name, kind, f"{message}; {hint()}" if hint else message]
        print(": ".join(parts), file=sys.stderr)
        raise SystemExit(code) from None


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Inside, a reader who has seen enough, as in `--help | head`, ends the program without a word."""
    handler = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        sys.stdout.flush()
        signal.signal(signal.SIGPIPE, handler)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The list of signals that asked this process to stop, as they come: SIGINT, SIGTERM, and SIGHUP unless nohup."""
    caught: list[int] = []
    kinds = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        kinds.append(signal.SIGHUP)
    handlers = {kind: signal.signal(kind, lambda number, frame: caught.append(number)) for kind in kinds}
    try:
        yield caught
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def training(folder: Path) -> Iterator[None]:
    """Inside, only this process is at work in the run's folder; what ends it early is a line that says how to go on. A
    policy.pt that is there goes: a run that is made longer will have another one."""

    def hint() -> str:
        is_saved = (folder / "checkpoint.pt").exists()
        return f"go on with --resume {folder}" if is_saved else f"nothing is saved in {folder} yet"

    failures = (OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError)
    with exits(2, Busy), locked(folder), exits(1, *failures, hint=hint):
        (folder / "policy.pt").unlink(missing_ok=True)
        with exits(130, KeyboardInterrupt, hint=hint):
            yield


@contextlib.contextmanager
def reporting(run: Run) -> Iterator[None]:
    """Inside, what ends the report early is a line that says how to repeat it. Then the Weights & Biases runs end."""

    def hint() -> str:
        return f"repeat the report with --evaluate {run.dir}"

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    failures = (OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError)
    try:
        with exits(1, *failures, hint=hint), exits(130, KeyboardInterrupt, hint=hint):
            yield
            finish_wandb(run)
    finally:
        signal.signal(signal.SIGINT, handler)


def check_memory(env, args) -> None:
    """Raise ValueError with the flag to blame if the largest tensors of a run do not fit this machine: an estimate."""
    S, N = args.num_seeds, env.num_agents
    O, A = env.obs_mask.shape[1], env.action_mask.shape[1]
    hidden = getattr(args, "hidden_size", 64)
    steps = getattr(args, "rollout_steps", env.horizon)
    sample = N * (O + A) + 8 * hidden  # numbers that the networks of an agent hold for one
    rollout = args.num_envs * steps * N * (O + A)
    is_wide = N * (O + A) > 8 * hidden
    network = "the number of agents or the size of observations" if is_wide else "--hidden-size"
    episodes = getattr(args, "eval_episodes", 0) or 0
    if hasattr(env, "for_tests"):  # in turns
        episodes = min(episodes, args.num_envs)
    needs = {
        "--num-envs": (3 + 2 * len(getattr(args, "eval_eta", ()))) * rollout,  # the economy tests all eta at once
        "--buffer-size": min(getattr(args, "buffer_size", 0), getattr(args, "total_timesteps", 0)) * N * (O + A),
        "--batch-size": getattr(args, "batch_size", 0) * N * sample,
        "--eval-episodes": episodes * N * sample,
        network: 8 * N * hidden * sample,
    }
    needed = 4 * S * sum(needs.values())
    if env.device.type == "cuda":
        available = torch.cuda.mem_get_info(env.device)[1]
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        flag = max(needs, key=needs.get)
        flag = f"--num-seeds or {flag}" if S > 1 else flag
        raise ValueError(f"{flag} must be smaller: the run takes {needed / GIB:,.0f} of {available / GIB:,.0f} GiB")


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def written(path: str | Path, mode: str = "w") -> Iterator:
    """A file that is written aside, flushed to disk and renamed: at any moment `path` is whole, old or new."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, mode, **({} if "b" in mode else {"newline": "", "encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the new name
        os.close(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_rows(path: str | Path, rows: list[dict]) -> None:
    """A CSV file; a column that some rows lack is empty there."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with written(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """What `write_rows` wrote, as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time is in here for this folder: raise Busy if another one is. Leftovers of one that
    was killed while it wrote are removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process is at work in {folder}") from None
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        yield
    finally:
        os.close(handle)


def folder(path: str) -> Path:
    """The run's folder: `path` is it, or a file in it."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def trained_file(folder: Path) -> Path:
    """What holds the networks of a run: policy.pt or, of one that is not finished, checkpoint.pt."""
    policy = folder / "policy.pt"
    return policy if policy.exists() else folder / "checkpoint.pt"


def provenance(script: str) -> dict:
    """The script's name, the git commit of its folder, None outside a repository, and versions of packages."""
    command = ["git", "-C", str(Path(script).resolve().parent), "rev-parse", "HEAD"]
    commit = None
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy", "pettingzoo"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"script": Path(script).stem, "git_commit": commit, "versions": versions}


def make_run_dir(args, script: str) -> Path:
    """The run's folder, new unless one is given, and in it args.json: the arguments, the script's name, the git commit
    and versions."""
    given = args.resume or args.evaluate
    env_id = re.sub("[:/]", "_", args.env_id)
    name = f"{env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}"
    run_dir = folder(given) if given else Path(args.runs_dir, name)
    run_dir.mkdir(parents=True, exist_ok=given is not None)
    if not args.evaluate:
        with locked(run_dir), written(run_dir / "args.json") as file:
            json.dump(asdict(args) | provenance(script), file, indent=2)
    return run_dir


# ---------------------------------------------------------------- arguments

LONGER = (
    "total_timesteps",
    "num_iterations",
    "phase_two_timesteps",
)  # flags that may be larger in the run that goes on
CHANGEABLE = {  # flags that may be others there
    *LONGER,
    *"resume evaluate cuda num_threads num_workers compile compile_transport runs_dir backend capture_video".split(),
    *"cuda_graphs log_interval checkpoint_interval wandb_mode wandb_project_name wandb_entity".split(),
}


def read_flags(kind: type, doc: str, defaults: dict):
    """`kind` from the command line; its flags are in groups, the dataclasses that it inherits from."""
    groups = {group.__name__: group for group in reversed(kind.__bases__)}
    parts = {}
    for name, group in groups.items():
        parts[name] = group(**{f.name: defaults[f.name] for f in fields(group) if f.name in defaults})
    everything = make_dataclass("Flags", groups.items())
    omit = (tyro.conf.OmitArgPrefixes,)
    with quiet_pipe():
        given = tyro.cli(everything, default=everything(**parts), config=omit, description=doc.split("\n")[0])
    values = {}
    for name in groups:
        values |= vars(getattr(given, name))
    return build(kind, values)


def build(kind: type, values: dict):
    """Raise ValueError in one line, where pydantic has several."""
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        reasons = []
        for fault in error.errors():
            place = ".".join(map(str, fault["loc"]))
            reason = fault["msg"].removeprefix("Value error, ")
            reasons.append(f"{place}: {reason}, got {fault['input']}" if place else reason)
        raise ValueError("; ".join(reasons)) from None


def parse_args(kind: type, doc: str, presets: dict[str, dict] | None = None) -> tuple:
    """Arguments from the command line, over those of the run that --resume or --evaluate names, or over the preset that
    --preset names, and that run's checkpoint, or {}. Raise ValueError where they do not fit each other."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--preset")
    given, _ = parser.parse_known_args()
    if given.resume and given.evaluate:
        raise ValueError("--resume and --evaluate exclude each other")
    path = given.resume or given.evaluate
    if path is None:
        preset = (presets or {}).get(given.preset, {})
        return read_flags(kind, doc, preset), {}
    if path.is_dir():
        path = trained_file(path) if given.evaluate else path / "checkpoint.pt"
    checkpoint = load(path)
    names, known = checkpoint["args"].keys(), {f.name for f in fields(kind)}
    if unknown := names - known:
        raise ValueError(f"{path} has arguments that are unknown here: {', '.join(sorted(unknown))}")
    if new := known - names:
        print(f"not in {path}, set to their defaults: {', '.join(sorted(new))}")
    old = build(kind, checkpoint["args"] | {"resume": None, "evaluate": None})
    args = read_flags(kind, doc, vars(old))
    for name, value in asdict(args).items():
        before, flag = getattr(old, name), f"--{name.replace('_', '-')}"
        if value != before and not (name in CHANGEABLE or name in new or name.startswith("eval_")):
            raise ValueError(f"{flag} must be {before} as in {path}, got {value}")
        if name in LONGER and value < before:
            raise ValueError(f"{flag} must be at least {before} as in {path}, got {value}")
    return args, checkpoint


def saved(kind: type, path: str) -> tuple:
    """Arguments and checkpoint of the run at `path`, or of a file of one, without a look at the command line."""
    path = Path(path)
    checkpoint = load(trained_file(path) if path.is_dir() else path)
    return build(kind, checkpoint["args"] | {"resume": None, "evaluate": None}), checkpoint


def keep_memory() -> None:
    """On Linux freed memory stays with the process, unless the environment has MALLOC_ variables. glibc gives large
    blocks back at once, and the kernel clears every page of the next one: a third of the time of ermas_economy.py with
    twelve seeds side by side."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def setup(args) -> torch.device:
    """Torch settings and the device. Under torchrun each process trains its share of the seeds, as a run of its own."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    if args.num_seeds % world_size:
        raise ValueError(f"--num-seeds must be a multiple of torchrun's {world_size} processes, got {args.num_seeds}")
    args.num_seeds //= world_size
    args.seed += rank * args.num_seeds
    code_of(type(args))  # of the code that runs, whatever is edited meanwhile
    torch.set_num_threads(args.num_threads)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling costs a tenth of an update
    keep_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it
    if args.cuda and torch.cuda.is_available():
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return torch.device("cpu")


# ---------------------------------------------------------------- checkpoints


def map_tensors(function: Callable, x):
    """Containers and dataclasses, with `function` of each tensor in its place."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {name: map_tensors(function, value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(map_tensors(function, value) for value in x)
    return replace(x, **map_tensors(function, vars(x))) if is_dataclass(x) else x


def tensors_in(x) -> list[Tensor]:
    """Those in containers and dataclasses, in the order of their names."""
    if isinstance(x, Tensor):
        return [x]
    if is_dataclass(x):
        x = vars(x)
    if isinstance(x, dict):
        x = [x[name] for name in sorted(x)]
    return [tensor for part in x for tensor in tensors_in(part)] if isinstance(x, list | tuple) else []


def moved(x, device: torch.device):
    """Tensors in containers and dataclasses, on that device."""
    return map_tensors(lambda tensor: tensor.to(device), x)


def pack(x):
    """Training state as tensors, numbers and containers of them, on the CPU and owning their memory."""
    if isinstance(x, dict):
        return {name: pack(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [pack(value) for value in x]
    if isinstance(x, torch.Generator):
        return x.get_state()
    if isinstance(x, torch.optim.Optimizer):
        return pack(x.state_dict())
    return x.detach().cpu().clone() if isinstance(x, Tensor) else x


def check_finite(x, name: str) -> None:
    """Raise FloatingPointError with the place of a NaN or infinity in packed state."""
    if isinstance(x, dict | list):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            check_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(x, Tensor) and not bool(x.isfinite().all()):
        raise FloatingPointError(f"{name} is not finite")


def save(path: Path, state: dict) -> None:
    """Write a checkpoint: tensors, numbers, generators, optimisers and containers of them. Raise FloatingPointError
    before anything is written if something in it is not finite."""
    packed = pack(state)
    check_finite(packed, "")
    buffer = io.BytesIO()  # torch.save aborts the process where a disk is full
    torch.save(packed, buffer)
    with written(path, "wb") as file:
        file.write(buffer.getbuffer())


def load(path: Path) -> dict:
    """Read a checkpoint, its bytes verified, which torch.load does not do. Raise ValueError if it is no whole one."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or "args" not in checkpoint:
            raise ValueError("args is missing")
        return checkpoint
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}") from None
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is no readable checkpoint: {reason or type(error).__name__}") from None


@cache
def code_of(kind: type) -> str:
    """A digest of the script that has the arguments `kind`, of our environments, torch and the kind of device, as they
    are when it is first asked for."""
    paths = [Path(sys.modules[kind.__module__].__file__), *sorted(Path(__file__).parent.glob("*.py"))]
    digest = hashlib.sha256(f"{torch.__version__} {torch.cuda.is_available()}".encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def save_part(run_dir: Path, part: str, values: dict, args) -> None:
    """`part`.pt in a run's folder, for other runs."""
    save(run_dir / f"{part}.pt", {"args": asdict(args), "code": code_of(type(args)), part: values})


def find_part(part: str, args, others: Collection[str]) -> dict:
    """The newest `part`.pt in args.runs_dir that the same code has made with the same arguments but for `others`; {} if
    there is none."""
    code, names = code_of(type(args)), asdict(args).keys() - set(others)
    paths = Path(args.runs_dir).glob(f"*/{part}.pt")
    for path in sorted(paths, key=lambda path: path.parent.name.split("__")[-1], reverse=True):  # by their time
        with contextlib.suppress(ValueError, OSError):  # of other settings, damaged, or gone
            saved = load_part(path, part, args, names)
            if saved.get("code") == code:
                print(f"{part} taken from {path}")
                return saved
    return {}


def load_part(path: str | Path, part: str, args, names: Collection[str]) -> dict:
    """A file of another run that holds `part`. Raise ValueError if it does not, or arguments `names` differ there."""
    saved = load(Path(path))
    if part not in saved:
        raise ValueError(f"{part} is missing in {path}")
    given = pack(asdict(args))
    for name in names:
        value = saved["args"].get(name)
        if value != given[name]:
            raise ValueError(f"--{name.replace('_', '-')} must be {value} as in {path}, got {given[name]}")
    return saved


def restore(live: dict, saved: dict, name: str = "checkpoint") -> None:
    """Copy what `save` packed into the tensors, generators and optimisers of `live`, in place. Raise ValueError with
    the key that is missing or of another size. Generators of another kind of device begin anew."""
    for key, target in live.items():
        place = f"{name}.{key}"
        if not isinstance(saved, dict) or key not in saved:
            raise ValueError(f"{place} is missing")
        value = saved[key]
        if isinstance(target, dict):
            restore(target, value, place)
        elif isinstance(target, list):
            restore(dict(enumerate(target)), dict(enumerate(value)), place)
        elif isinstance(target, torch.Generator):
            if value.shape == target.get_state().shape:
                target.set_state(value)
            else:
                target.manual_seed(zlib.crc32(value.numpy().tobytes()))
        elif isinstance(target, torch.optim.Optimizer):
            try:
                target.load_state_dict(value)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{place} does not fit: {error}") from None
        elif isinstance(target, int):
            if not isinstance(value, int):
                raise ValueError(f"{place} must be a number, got {value!r}")
        elif not isinstance(value, Tensor) or value.shape != target.shape:
            shape = list(getattr(value, "shape", ()))
            raise ValueError(f"{place} is {shape} where the arguments ask for {list(target.shape)}")
        else:
            target.detach().copy_(value)


# ---------------------------------------------------------------- progress and Weights & Biases


def progress_bar(total: int, initial: int, unit: str = "step") -> tqdm:
    """Of environment steps; without a terminal it is silent but for `show_progress`."""
    return tqdm(total=total, initial=initial, unit=unit, delay=0 if sys.stderr.isatty() else math.inf)


def show_progress(bar: tqdm, **values: str) -> None:
    """`values` beside the progress bar or, without a terminal, in a line with steps, speed and time left."""
    bar.set_postfix(values, refresh=False)
    if not sys.stderr.isatty():
        print(bar, flush=True)


def log(run: Run, step: int, metrics: dict[str, Tensor]) -> None:
    """A row per seed in metrics.csv and in the seed's wandb run; metrics [S]. Raise FloatingPointError for a NaN."""
    columns = {name: values.tolist() for name, values in metrics.items()}
    rows = []
    for k, label in enumerate(run.labels):
        row = label | {"global_step": step}
        for name, values in columns.items():
            if not math.isfinite(values[k]):
                raise FloatingPointError(f"{name} is not finite at step {step}, {label}")
            row[name] = values[k]
        rows.append(row)
    run.rows += rows
    write_rows(run.dir / "metrics.csv", run.rows)
    log_wandb(run, rows, step)


def start_wandb(run: Run, args) -> None:
    """A Weights & Biases run per label, grouped by run name: offline if online fails, none if that fails too. A run
    that goes on logs its earlier rows again, so that its record has no gap."""
    modes = {"online": ["online", "offline"], "offline": ["offline"], "disabled": []}
    config = json.loads((run.dir / "args.json").read_text())  # arguments, git commit and versions
    for mode in modes[args.wandb_mode]:
        try:
            import wandb  # slow to import, and may be absent

            settings = wandb.Settings(init_timeout=30, console="off", silent=True)
            init = partial(
                wandb.init,
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                mode=mode,
                group=run.dir.name,
                dir=run.dir,
                resume="allow",
                reinit="create_new",
                settings=settings,
            )
            for k, label in enumerate(run.labels):
                name = f"{run.dir.name}__run{k}__seed{label['seed']}"
                wandb_run = init(name=name, id=name, config=config | label)
                wandb_run.define_metric("eval/*", summary="last,max")
                run.wandb_runs.append(wandb_run)
            break
        except Exception as error:
            print(f"wandb ({mode}) is left out: {error!r}", file=sys.stderr)
            run.wandb_runs.clear()
            with contextlib.suppress(Exception):
                wandb.teardown()  # else the names are still in use
    for k in range(0, len(run.rows), len(run.labels)):
        log_wandb(run, run.rows[k : k + len(run.labels)], run.rows[k]["global_step"])


def log_wandb(run: Run, rows: Iterable[dict], step: int) -> None:
    """A row to the Weights & Biases run of each seed. What wandb raises ends its logging, not the run."""
    try:
        for wandb_run, row in zip(run.wandb_runs, rows):
            wandb_run.log(row, step=step)
    except Exception as error:
        run.wandb_runs.clear()
        print(f"wandb failed and is left out from now on: {error!r}", file=sys.stderr)


def log_report(run: Run, tables: dict[str, list[list[dict]]], pictures: dict[str, Path]) -> None:
    """Log a report, by name: rows of each run, and pictures of all."""

    def contents() -> Iterator[dict]:
        import wandb  # slow to import

        for k in range(len(run.labels)):
            own = {name: wandb.Image(str(path)) for name, path in pictures.items()}  # an image serves one run
            for name, parts in tables.items():
                own[name] = wandb.Table(list(parts[k][0]), [list(row.values()) for row in parts[k]])
            yield own

    if run.wandb_runs:
        log_wandb(run, contents(), last_step(run))


def last_step(run: Run) -> int:
    """Of metrics.csv; 0 where nothing was trained."""
    return run.rows[-1]["global_step"] if run.rows else 0


def finish_wandb(run: Run) -> None:
    """Log the GIF of the run, if there is one, and end the Weights & Biases runs."""
    path = run.dir / "episode.gif"

    def contents() -> Iterator[dict]:
        import wandb  # slow to import

        for _ in run.labels:
            yield {"episode": wandb.Video(str(path), format="gif")}

    if run.wandb_runs and path.exists():
        log_wandb(run, contents(), last_step(run))
    with contextlib.suppress(Exception):
        for wandb_run in run.wandb_runs:
            wandb_run.finish()
