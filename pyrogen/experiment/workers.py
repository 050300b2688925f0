"""Jobs in other processes: on this machine, or on a Ray cluster; one that fails is tried once more.

A job is a function that writes into a folder and returns plain values. It travels by value as far as nothing can import
it, so that lambdas, classes inside functions and files named as ``FILE.py:NAME`` come along; what all jobs have in
common is put where every worker reads it. Only what a worker of this very call wrote is unpickled.
"""

import dataclasses
import importlib.util
import io
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import cloudpickle
import numpy as np
import torch
from loky import BrokenProcessPool, ProcessPoolExecutor, cpu_count

from pyrogen.configuration import _FILE_PREFIX

__all__ = ["Job", "Outcome", "Workers", "check_workers", "perform_all", "prepared_job"]

Workers = int | Literal["ray"]

_ATTEMPTS = 2
_THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
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
    """A function on its way to a worker.

    Attributes:
        function: What to call, pickled: ``function(common, folder, resume=..., device=...)``.
        sources: Path and text of the files from which it has classes or functions, by the name of their module.
        folder: Where it writes.
        resume: Whether it goes on with what is in its folder.
        files: What is there, for a worker that can't see it.
    """

    function: bytes
    sources: dict[str, tuple[str, str]]
    folder: Path
    resume: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """What a worker has to know beside its job: how many threads it has, where paths begin, what torch was set to."""

    threads: int
    device: str | None
    mark: Path
    directory: Path = field(default_factory=Path.cwd)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    matmul_precision: str = field(default_factory=torch.get_float32_matmul_precision)
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)

    def settle(self) -> None:
        if self.directory.is_dir():
            os.chdir(self.directory)
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic)


def check_workers(workers: Any) -> None:
    """See that workers are a number of processes, or ``"ray"`` where Ray is installed.

    Raises:
        ValueError: If not.
    """
    if workers == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("workers='ray' needs Ray, which is not installed; install it with: pip install 'pyrogen[ray]'")
    is_count = isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1
    if not (workers is None or workers == "ray" or is_count):
        raise ValueError(f"workers is a number of processes of at least 1, or 'ray', got {workers!r}")


def prepared_job(name: str, function: Callable, folder: Path, *, resume: bool) -> Job:
    """The job of calling ``function(common, folder, resume=..., device=...)``.

    Raises:
        ValueError: If something in it can't be sent to another process.
    """
    files = {key: str(module.__file__) for key, module in [*sys.modules.items()] if key.startswith(_FILE_PREFIX)}
    sources = {key: (path, Path(path).read_text(encoding="utf-8")) for key, path in files.items()}
    with _sent(f"'{name}'"):
        return Job(cloudpickle.dumps(function), sources, folder, resume)


def _save(common: Any, target: Path | io.BytesIO) -> None:
    with _sent("the data"):
        torch.save(common, target, pickle_module=cloudpickle)


@contextmanager
def _sent(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever an object of the user's makes of being pickled
        raise ValueError(
            f"{what} can't be sent to a worker ({type(error).__name__}: {error}); build what can't be pickled where it "
            "is used, or leave workers out"
        ) from error


def perform_all(
    jobs: Mapping[str, Job], common: Any, workers: Workers, device: str, watch: Callable[[list[str]], None]
) -> Generator[tuple[str, Outcome], None, None]:
    """Perform jobs, and give what becomes of each as it ends.

    Args:
        jobs: By name. One that fails, or whose process is ended from outside, is tried once more and goes on from what
            it left in its folder.
        common: What every function gets; it is sent once, not with every job.
        workers: As for :func:`pyrogen.compare`.
        device: As for :func:`pyrogen.fit`; where there are several GPUs, jobs take turns.
        watch: Called twice a second with the names of the jobs under way.
    """
    waiting, under_way = deque(jobs), dict[Future, str]()
    attempts: Counter[str] = Counter()
    with _cluster(jobs, common, device) if workers == "ray" else _processes(workers, common, device) as pool:
        while waiting or under_way:
            while waiting and pool.is_free():
                name = waiting.popleft()
                job = jobs[name] if not attempts[name] else dataclasses.replace(jobs[name], resume=True)
                attempts[name] += 1
                under_way[pool.submit(job)] = name
            watch([*under_way.values()])
            for future in wait(under_way, timeout=_PERIOD, return_when=FIRST_COMPLETED).done:
                name, outcome = under_way.pop(future), pool.outcome(future)
                if outcome.error is not None and attempts[name] < _ATTEMPTS:
                    waiting.append(name)
                    continue
                _write(jobs[name].folder, outcome.files)
                yield name, outcome


class _Pool(Protocol):
    """Where jobs are performed."""

    def is_free(self) -> bool: ...
    def submit(self, job: Job) -> Future: ...
    def outcome(self, future: Future) -> Outcome: ...


class _Processes:
    """Processes of this machine, each in a pool of its own, so that one that dies takes no other's job along."""

    def __init__(self, count: int, common: Path, device: str) -> None:
        self.common = common
        threads = max(1, min(torch.get_num_threads(), cpu_count() // count))
        gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
        devices = [f"cuda:{index % gpus}" if gpus > 1 else None for index in range(count)]
        self.places = [_Place(threads, each, common) for each in devices]
        self.pools: dict[int, ProcessPoolExecutor] = {}
        self.idle = deque(range(count))
        self.seats: dict[Future, int] = {}

    def is_free(self) -> bool:
        return bool(self.idle)

    def submit(self, job: Job) -> Future:
        seat = self.idle.popleft()
        task = _perform, job, self.places[seat], self.common
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
            parent = os.getpid(), multiprocessing.get_start_method(allow_none=True)
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
def _processes(count: int, common: Any, device: str) -> Iterator[_Pool]:
    with tempfile.TemporaryDirectory(prefix="pyrogen-") as folder, warnings.catch_warnings():
        # A worker that has grown is replaced between two jobs, which is as it shall be.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
        path = Path(folder) / "common.pt"
        _save(common, path)
        pool = _Processes(count, path, device)
        try:
            yield pool
        finally:
            pool.close()


def _stay_with(parent: int, start_method: str | None) -> None:
    """Leave Ctrl-C to the parent, which ends its workers; end if it is gone without having done so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What fits start they start as the parent would: loky's own way leaves semaphores behind where it is killed.
    multiprocessing.set_start_method(start_method, force=True)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Cluster:
    """A Ray cluster, which queues jobs itself."""

    def __init__(self, common: Any, device: str, jobs: int, mark: Path) -> None:
        import ray

        self.ray = ray
        buffer = io.BytesIO()
        _save(common, buffer)
        self.common = ray.put(np.frombuffer(buffer.getbuffer(), dtype=np.uint8))
        there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [int(each.get("CPU", 0)) for each in there]
        gpu = device.partition(":")[0] in ("auto", "cuda") and any(each.get("GPU", 0) >= 1 for each in there)
        threads = max(1, min(torch.get_num_threads(), sum(cores) // jobs, max(cores)))
        self.place = _Place(threads, "cuda" if gpu else None, mark)
        # Jobs that fail are tried again by the one who asked, whatever they failed of.
        self.remote = ray.remote(num_cpus=threads, num_gpus=int(gpu), max_retries=0)(_perform)
        self.references: dict[Future, Any] = {}

    def is_free(self) -> bool:
        return True

    def submit(self, job: Job) -> Future:
        files = _contents(job.folder) if job.resume else {}
        reference = self.remote.remote(dataclasses.replace(job, files=files), self.place, self.common)
        future = reference.future()
        self.references[future] = reference
        return future

    def outcome(self, future: Future) -> Outcome:
        del self.references[future]
        try:
            return future.result()
        except self.ray.exceptions.RayTaskError as error:  # where not even _perform could be had, as without pyrogen
            return Outcome(error=error.cause)
        except self.ray.exceptions.RayError as error:
            return Outcome(error=_ended(error))

    def close(self) -> None:
        for reference in self.references.values():
            self.ray.cancel(reference, force=True)


@contextmanager
def _cluster(jobs: Mapping[str, Job], common: Any, device: str) -> Iterator[_Pool]:
    import ray

    started = not ray.is_initialized()
    if started:  # or joined, where there is one already
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    base = next(iter(jobs.values())).folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=base, prefix=".workers-") as mark:
            pool = _Cluster(common, device, len(jobs), Path(mark.name))
            try:
                yield pool
            finally:
                pool.close()
    finally:
        if started:
            ray.shutdown()


def _perform(job: Job, place: _Place, common: Any) -> Outcome:
    """What a worker does."""
    place.settle()
    try:
        for name, (path, text) in job.sources.items():
            _import_file(name, path, text)
        function = cloudpickle.loads(job.function)
        in_file = isinstance(common, Path)
        shared = torch.load(common if in_file else io.BytesIO(common), mmap=in_file, weights_only=False)
        with _folder_of(job, place) as folder:
            result = function(shared, folder, resume=job.resume, device=place.device)
            return Outcome(result, files={} if folder == job.folder else _contents(folder))
    except Exception as error:
        return Outcome(error=_portable(error))


def _import_file(name: str, path: str, text: str) -> None:
    """Import a file under the name that it has where the job comes from, even if it is not on this machine."""
    if name in sys.modules:
        return
    place, copied = Path(path), None
    if not place.is_file() or place.read_text(encoding="utf-8") != text:
        copied = tempfile.mkdtemp(prefix="pyrogen-")
        place = Path(copied) / place.name
        place.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    if copied is not None:  # stays as long as somebody may want to read the source
        weakref.finalize(module, shutil.rmtree, copied, ignore_errors=True)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    module.__file__ = path


@contextmanager
def _folder_of(job: Job, place: _Place) -> Iterator[Path]:
    """The folder of a job, or one of the worker's own with the same in it where that can't be seen from here."""
    if place.mark.exists():
        yield job.folder
        return
    with tempfile.TemporaryDirectory(prefix="pyrogen-") as own:
        folder = Path(own) / job.folder.name
        _write(folder, job.files)
        yield folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def _portable(error: Exception) -> Exception:
    """An error as it can be sent, with its traceback as a note."""
    came_from = traceback.format_exc()
    try:
        error = cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # whatever an exception of the user's makes of being pickled
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a worker:\n{came_from}")
    return error


def _ended(error: Exception) -> ChildProcessError:
    codes = re.search(r"exit codes of the workers are \{(.*)\}", str(error))
    how = codes[1] if codes else next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ChildProcessError(f"the process of the worker ended ({how}); it may have been short of memory")
