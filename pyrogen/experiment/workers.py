"""Jobs in other processes: on this machine, or on a Ray cluster; one that fails is tried once more.

A job is a function that writes into a folder and returns plain values. Functions and classes travel by value as far as
nothing can import them: lambdas, what stands inside functions, and files named as ``FILE.py:NAME``, with the values
that their globals have. All is put at once where every worker reads it. Only what a worker of this very call wrote is
unpickled.
"""

import dataclasses
import importlib.util
import io
import logging
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal, Protocol

import cloudpickle  # noqa: TID251 (between this process and its own workers)
import numpy as np
import pyro
import torch
from loky import BrokenProcessPool, ProcessPoolExecutor, cpu_count

from pyrogen.arguments import is_whole
from pyrogen.configuration import _FILE_PREFIX
from pyrogen.inference.checkpoints import atomically
from pyrogen.inference.folders import LOCK

__all__ = ["Job", "Outcome", "Workers", "check_workers", "open_pool", "perform_all"]

Workers = int | Literal["ray"]

_THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_CUDNN = ("enabled", "benchmark", "deterministic")
_PERIOD = 0.5
"""Seconds between looks at how far jobs are."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        result: What its function returned.
        error: What ended it instead.
        files: What it wrote, by path, where it could not write into the folder itself.
    """

    result: Any = None
    error: Exception | None = None
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A call ``function(common, folder, resume=..., device=...)`` on its way to a worker.

    Attributes:
        name: Of its function, among those that the pool was opened with.
        folder: Where it writes.
        resume: Whether it goes on with what is in its folder.
        mark: A file beside the folder, by which a worker knows whether it can see that; None where it surely can.
        files: What is in the folder, for a worker that can't see it.
    """

    name: str
    folder: Path
    resume: bool = False
    mark: Path | None = None
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """What a worker has to know beside its job: how many threads it has, where paths begin, what torch was set to."""

    threads: int
    device: str | None
    directory: Path = field(default_factory=Path.cwd)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    matmul_precision: str = field(default_factory=torch.get_float32_matmul_precision)
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    warn_only: bool = field(default_factory=torch.is_deterministic_algorithms_warn_only_enabled)
    cudnn: dict[str, bool] = field(
        default_factory=lambda: {each: getattr(torch.backends.cudnn, each) for each in _CUDNN}
    )
    pyro_settings: dict[str, Any] = field(default_factory=pyro.settings.get)

    def settle(self) -> None:
        if self.directory.is_dir():
            os.chdir(self.directory)
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        for name, value in self.cudnn.items():
            setattr(torch.backends.cudnn, name, value)
        known = pyro.settings.get()  # which lacks what a script has registered
        pyro.settings.set(**{name: value for name, value in self.pyro_settings.items() if name in known})


def check_workers(workers: Any) -> Workers | None:
    """The workers, which are a number of processes, or ``"ray"`` where Ray is installed, or None.

    Raises:
        ValueError: If not.
    """
    if workers == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("workers='ray' needs Ray, which is not installed; install it with: pip install 'pyrogen[ray]'")
    is_count = is_whole(workers) and workers >= 1
    if not (workers is None or workers == "ray" or is_count):
        raise ValueError(f"workers is a number of processes of at least 1, or 'ray', got {workers!r}")
    return workers


class _Pool(Protocol):
    """Where jobs are performed.

    Attributes:
        size: How many jobs it takes to reach every worker, as far as they can be told apart.
    """

    size: int

    def is_free(self) -> bool: ...
    def submit(self, job: Job | None) -> Future: ...
    def outcome(self, future: Future) -> Outcome: ...
    def close(self) -> None: ...


@contextmanager
def open_pool(
    workers: Workers, functions: Mapping[str, Callable], common: Any, device: str, count: int, scratch: Path
) -> Iterator[_Pool]:
    """Have workers at hand that have read functions and data, and let none outlive the block.

    Args:
        workers: As for :func:`pyrogen.compare`.
        functions: What jobs call, by name.
        common: What every function gets.
        device: As for :func:`pyrogen.fit`; where there are several GPUs, jobs take turns.
        count: How many jobs have much to do; cores are divided among these.
        scratch: An empty folder for what workers read. They remove it if they outlive this process.

    Raises:
        ValueError: If something can't be sent to a worker or read by it, or a Ray cluster has no machine for a job.
        ChildProcessError: If a worker's process ends while it starts.
    """
    opened = _cluster if workers == "ray" else _processes
    count = count if workers == "ray" else min(workers, count)
    with _terminated_in_order(), opened(functions, common, device, scratch, count) as pool:
        try:
            trials = [pool.submit(None) for _ in range(pool.size)]
            for error in (pool.outcome(trial).error for trial in trials):
                if isinstance(error, ChildProcessError):
                    raise error
                if error is not None:
                    raise ValueError(
                        f"a worker can't read what it was sent ({type(error).__name__}: {error}); put what it lacks "
                        "where it is imported from, or leave workers out"
                    ) from error
            yield pool
        finally:
            pool.close()


def perform_all(pool: _Pool, jobs: Iterable[Job], watch: Callable[[list[str]], None]) -> Iterator[tuple[str, Outcome]]:
    """Perform jobs, and give what becomes of each as it ends.

    One that fails, or whose process is ended from outside, is tried once more and goes on from what it left in its
    folder. If it then fails otherwise, its first error is the context of the second.

    Args:
        pool: Where.
        jobs: What is to be done.
        watch: Called twice a second with the names of the jobs under way.
    """
    waiting, under_way = deque(jobs), dict[Future, Job]()
    errors: dict[str, Exception] = {}
    while waiting or under_way:
        while waiting and pool.is_free():
            job = waiting.popleft()
            under_way[pool.submit(job)] = job
        watch([job.name for job in under_way.values()])
        for future in wait(under_way, timeout=_PERIOD, return_when=FIRST_COMPLETED).done:
            job, outcome = under_way.pop(future), pool.outcome(future)
            _write(job.folder, outcome.files)
            error, first = outcome.error, errors.get(job.name)
            if error is not None and first is None:
                errors[job.name] = error
                waiting.append(dataclasses.replace(job, resume=True))
                continue
            if error is not None and repr(error) != repr(first):
                error.__context__ = first
            yield job.name, outcome


def _save(functions: Mapping[str, Callable], common: Any, target: Path | io.BytesIO) -> None:
    """Write what all jobs share, a tensor that stands in several places once."""
    files = {name: module for name, module in [*sys.modules.items()] if name.startswith(_FILE_PREFIX)}
    for module in files.values():  # of no other process, so that it always has to be so
        cloudpickle.register_pickle_by_value(module)
    homes = {name: (str(module.__file__), _defined_in(module)) for name, module in files.items()}
    try:
        protocol = cloudpickle.DEFAULT_PROTOCOL
        torch.save((functions, common, homes), target, pickle_module=cloudpickle, pickle_protocol=protocol)
    except Exception as error:  # whatever an object of the user's makes of being pickled
        what = next((f"'{name}'" for name, each in functions.items() if not _can_be_sent(each)), "what all fits share")
        raise ValueError(
            f"{what} can't be sent to a worker ({type(error).__name__}: {error}); build what can't be pickled where it "
            "is used, or leave workers out"
        ) from error


def _defined_in(module: ModuleType) -> dict[str, Any]:
    """The classes and functions of a FILE.py, by which a run says where its programs are from."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, (type, FunctionType))}
    return {name: value for name, value in found.items() if value.__module__ == module.__name__ and _can_be_sent(value)}


def _can_be_sent(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:  # as in _save
        return False
    return True


def _load(shared: Any) -> tuple[dict[str, Callable], Any]:
    """Read what :func:`_save` wrote; files are modules under the names that they have where it comes from."""
    in_file = isinstance(shared, Path)
    source = shared if in_file else io.BytesIO(shared)
    functions, common, homes = torch.load(source, mmap=in_file, weights_only=False)  # noqa: TID251 (what the parent wrote)
    for name, (path, defined) in homes.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        vars(module).update(defined, __file__=path)
    return functions, common


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM ends the block as ``sys.exit`` does, so that all is tidied up; a handler of the user's own stays."""
    in_main = threading.current_thread() is threading.main_thread()
    ours = in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Processes:
    """Processes of this machine, each in a pool of its own, so that one that dies takes no other's job along."""

    def __init__(self, shared: Path, device: str, count: int) -> None:
        self.shared, self.size = shared, count
        threads = max(1, min(torch.get_num_threads(), cpu_count() // count))
        gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
        devices = [f"cuda:{index % gpus}" if gpus > 1 else None for index in range(count)]
        self.places = [_Place(threads, each) for each in devices]
        self.pools: dict[int, ProcessPoolExecutor] = {}
        self.idle = deque(range(count))
        self.seats: dict[Future, int] = {}

    def is_free(self) -> bool:
        return bool(self.idle)

    def submit(self, job: Job | None) -> Future:
        seat = self.idle.popleft()
        task = _perform, job, self.places[seat], self.shared
        with _uninterrupted():
            try:
                future = self._pool_of(seat).submit(*task)
            except BrokenProcessPool:  # its process was ended while it had nothing to do
                self.pools.pop(seat).shutdown(kill_workers=True)
                future = self._pool_of(seat).submit(*task)
        self.seats[future] = seat
        return future

    def _pool_of(self, seat: int) -> ProcessPoolExecutor:
        if seat not in self.pools:
            limits = dict.fromkeys(_THREAD_LIMITS, str(self.places[seat].threads))
            parent = os.getpid(), multiprocessing.get_start_method(allow_none=True), self.shared.parent
            self.pools[seat] = ProcessPoolExecutor(1, initializer=_stay_with, initargs=parent, env=limits)
        return self.pools[seat]

    def outcome(self, future: Future) -> Outcome:
        seat = self.seats.pop(future)
        self.idle.append(seat)
        try:
            return future.result()
        except BrokenProcessPool as error:
            self.pools.pop(seat).shutdown(kill_workers=True)
            return Outcome(error=_ended(error))

    def close(self) -> None:
        for pool in self.pools.values():
            pool.shutdown(kill_workers=True)  # leaving of their own takes seconds, and there is nothing to lose


@contextmanager
def _processes(
    functions: Mapping[str, Callable], common: Any, device: str, scratch: Path, count: int
) -> Iterator[_Processes]:
    with warnings.catch_warnings():
        # A worker that has grown is replaced between two jobs, which is as it shall be.
        warnings.filterwarnings("ignore", "A worker (stopped|was restarted) while some jobs", UserWarning)
        path = scratch / "common.pt"
        _save(functions, common, path)
        yield _Processes(path, device, count)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is started within never gets Ctrl-C, not even before it can say that it leaves that to this process."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stay_with(parent: int, start_method: str | None, scratch: Path) -> None:
    """Leave Ctrl-C to the parent, which ends its workers; if it is gone without having done so, tidy up and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What fits start they start as the parent would: loky's own way leaves semaphores behind where it is killed.
    multiprocessing.set_start_method(start_method, force=True)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Cluster:
    """A Ray cluster, which queues jobs itself."""

    size = 1

    def __init__(self, shared: memoryview, device: str, count: int) -> None:
        import ray
        from ray.util.client import ray as client

        self.ray = ray
        there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpu = [each for each in there if each.get("GPU", 0) >= 1]
        kind = device.partition(":")[0]
        gpu = kind == "cuda" or (kind == "auto" and bool(with_gpu))
        cores = [int(each.get("CPU", 0)) for each in (with_gpu if gpu else there)]
        if max(cores, default=0) < 1:  # Ray would wait for such a machine for ever
            raise ValueError(
                f"no machine of the Ray cluster has a core {'and a GPU ' if gpu else ''}for a fit; start it with "
                f"num_cpus of at least 1{', or ask for the device cpu' if gpu else ''}"
            )
        threads = max(1, min(torch.get_num_threads(), sum(cores) // count, max(cores)))
        self.place = _Place(threads, "cuda" if gpu else None)
        self.elsewhere = len(there) > 1 or client.is_connected()
        self.shared = ray.put(np.frombuffer(shared, dtype=np.uint8))
        # Jobs that fail are tried again by the one who asked, whatever they failed of.
        self.remote = ray.remote(num_cpus=threads, num_gpus=int(gpu), max_retries=0)(_perform)
        self.references: dict[Future, Any] = {}
        self.mark: Path | None = None

    def is_free(self) -> bool:
        return True

    def submit(self, job: Job | None) -> Future:
        if job is not None:
            if self.mark is None:  # only now is an earlier comparison gone from the folder
                self.mark = job.folder.parent / f".workers-{secrets.token_hex(8)}"
                self.mark.parent.mkdir(parents=True, exist_ok=True)
                self.mark.touch()
            files = _contents(job.folder) if job.resume and self.elsewhere else {}
            job = dataclasses.replace(job, mark=self.mark, files=files)
        reference = self.remote.remote(job, self.place, self.shared)
        future = reference.future()
        self.references[future] = reference
        return future

    def outcome(self, future: Future) -> Outcome:
        try:
            return future.result()
        except self.ray.exceptions.RayTaskError as error:  # where not even _perform could be had, as without pyrogen
            return Outcome(error=error.cause)
        except self.ray.exceptions.RayError as error:
            return Outcome(error=_ended(error))
        finally:
            if future.done():  # else it was waited for in vain, and is to be cancelled
                del self.references[future]

    def close(self) -> None:
        for reference in self.references.values():
            self.ray.cancel(reference, force=True)
        if self.mark is not None:
            self.mark.unlink(missing_ok=True)


@contextmanager
def _cluster(
    functions: Mapping[str, Callable], common: Any, device: str, scratch: Path, count: int
) -> Iterator[_Cluster]:
    import ray

    buffer = io.BytesIO()
    _save(functions, common, buffer)
    started = not ray.is_initialized()
    if started:  # or joined, where there is one already
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield _Cluster(buffer.getbuffer(), device, count)
    finally:
        if started:
            ray.shutdown()


def _perform(job: Job | None, place: _Place, shared: Any) -> Outcome:
    """What a worker does; without a job it only sees that it could do one."""
    files: dict[str, bytes] = {}
    try:
        place.settle()
        functions, common = _load(shared)
        if job is None:
            return Outcome()
        with _folder_of(job) as folder:
            try:
                result = functions[job.name](common, folder, resume=job.resume, device=place.device)
            finally:
                files |= {} if folder == job.folder else _contents(folder)
        return Outcome(result, files=files)
    except BaseException as error:  # sys.exit() ends one fit, and not those that others make
        return Outcome(error=_portable(error), files=files)


@contextmanager
def _folder_of(job: Job) -> Iterator[Path]:
    """The folder of a job, or one of the worker's own with the same in it where that can't be seen from here."""
    if job.mark is None or job.mark.exists():
        yield job.folder
        return
    with tempfile.TemporaryDirectory(prefix="pyrogen-") as own:
        folder = Path(own) / job.folder.name
        _write(folder, job.files)
        yield folder


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for path, content in files.items():
        with atomically(folder / path) as temporary:
            temporary.write_bytes(content)


def _portable(error: BaseException) -> Exception:
    """An error as it can be sent, with its traceback as a note."""
    came_from = traceback.format_exc()
    try:
        sent = cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # whatever an exception of the user's makes of being pickled
        sent = None
    if not isinstance(sent, Exception):
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note(f"In a worker:\n{came_from}")
    return sent


def _ended(error: Exception) -> ChildProcessError:
    codes = re.search(r"exit codes of the workers are \{(.*)\}", str(error))
    how = codes[1] if codes else next(iter(str(error).strip().splitlines()), type(error).__name__)
    memory = "; it may have been short of memory" if "SIGKILL" in how else ""
    return ChildProcessError(f"the process of the worker ended ({how}){memory}")
