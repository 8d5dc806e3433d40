"""Gymnasium's environments that step together: in turn in this process, or each in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv

from fastflow.errors import UserError
from fastflow.online_envs.guard import Failure, Guard, unpack
from fastflow.online_envs.vector import EnvironmentFailed, OnlineEnvs, Step

__all__ = ["InProcesses", "InTurn"]


class _Simulated(OnlineEnvs):
    """What the two have in common: rows of numbers come in, failures are raised."""

    def _reset(self, seeds: np.random.SeedSequence) -> np.ndarray:
        # 64 bits each, so that no two environments of a study get the same one by chance.
        return self._read(self._reset_rows([int(seed) for seed in seeds.generate_state(self.num_envs, np.uint64)])).obs

    def _step(self, actions: np.ndarray) -> Step:
        return self._read(self._step_rows(actions))

    def _read(self, rows: np.ndarray) -> Step:
        step, failed = unpack(rows)
        if len(failed):
            index = int(failed[0])
            failure = self._failure(index)
            self.close()
            raise EnvironmentFailed(
                f"{self.name}: environment {index} failed in its step {failure.steps} (step {failure.episode_steps} of "
                f"the episode): {failure.summary}",
                index,
                failure.steps,
            ) from (failure.error or RuntimeError(f"in the process of environment {index}:\n{failure.trace}"))
        return step

    def _snapshot(self) -> dict[str, np.ndarray] | None:
        states = self._snapshots()
        found = [state for state in states if state is not None]
        if len(found) < len(states):
            return None
        return {key: np.stack([state[key] for state in found]) for key in found[0]}

    def _restore(self, state: dict[str, np.ndarray]) -> np.ndarray:
        self._restore_each([{key: value[i] for key, value in state.items()} for i in range(self.num_envs)])
        return np.array(state["guard.obs"], dtype=np.float32)

    def _reset_rows(self, seeds: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def _step_rows(self, actions: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _failure(self, index: int) -> Failure:
        raise NotImplementedError

    def _snapshots(self) -> Sequence[dict[str, np.ndarray] | None]:
        raise NotImplementedError

    def _restore_each(self, states: list[dict[str, np.ndarray]]) -> None:
        raise NotImplementedError


class InTurn(_Simulated):
    """N environments in this process, one after the other.

    Args:
        name: of the environment.
        num_envs: N.
        recipe: makes one.

    Raises:
        UserError: see `Guard`, or what `recipe` raises.
    """

    def __init__(self, name: str, num_envs: int, recipe: Callable[..., gymnasium.Env]) -> None:
        self._guards: list[Guard] = []
        try:
            for _ in range(num_envs):
                self._guards.append(Guard(recipe(), name))
        except BaseException:
            self.close()
            raise
        first = self._guards[0]
        super().__init__(name, num_envs, first.obs_dim, first.low, first.high)

    def close(self) -> None:
        guards, self._guards = self._guards, []
        self._started = False
        for guard in guards:
            # One that failed may fail again, and the others are still to be closed.
            with contextlib.suppress(Exception):
                guard.close()

    def _reset_rows(self, seeds: Sequence[int]) -> np.ndarray:
        self._check_open()
        return np.stack([guard.reset(seed=seed)[0] for guard, seed in zip(self._guards, seeds, strict=True)])

    def _step_rows(self, actions: np.ndarray) -> np.ndarray:
        return np.stack([guard.step(action)[0] for guard, action in zip(self._guards, actions, strict=True)])

    def _failure(self, index: int) -> Failure:
        failure = self._guards[index].failure
        assert failure is not None
        return failure

    def _snapshots(self) -> Sequence[dict[str, np.ndarray] | None]:
        return [guard.snapshot() for guard in self._guards]

    def _restore_each(self, states: list[dict[str, np.ndarray]]) -> None:
        for guard, state in zip(self._guards, states, strict=True):
            guard.restored = state

    def _check_open(self) -> None:
        if not self._guards:
            raise UserError(f"{self.name}: the environments are closed")


class InProcesses(_Simulated):
    """N environments in N processes, which wait for each other at every step; see `InTurn`.

    A process that ends by itself is an `EnvironmentFailed` too. Processes are started from a server that has no threads
    (where there is such a thing), so that nothing of this process is copied in the middle of its work; a script that
    makes environments therefore needs the usual `if __name__ == "__main__"`.
    """

    def __init__(self, name: str, num_envs: int, recipe: Callable[..., gymnasium.Env]) -> None:
        methods = multiprocessing.get_all_start_methods()
        context = "forkserver" if "forkserver" in methods else "spawn"
        if context == "forkserver":
            # Imported once by the server instead of once by each process.
            multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
        make = functools.partial(_make_guarded, name, recipe, os.getpid())
        self._vector: AsyncVectorEnv | None = None
        # What is wrong with the environment is found here, not in N processes at once.
        guard = make()
        first = (guard.obs_dim, guard.low, guard.high)
        guard.close()
        super().__init__(name, num_envs, *first)
        try:
            with _one_thread_each():
                self._vector = AsyncVectorEnv([make] * num_envs, context=context)
        except (EOFError, ConnectionError) as error:
            raise UserError(
                f"{name}: a process ended before it had made its environment (its own words are above); if this is a "
                'script, what it does belongs under `if __name__ == "__main__":`, as each process imports it'
            ) from error

    def close(self) -> None:
        vector, self._vector = self._vector, None
        self._started = False
        if vector is None or vector.closed:
            return
        try:
            if all(process.is_alive() for process in vector.processes) and vector._state.value == "default":
                vector.close()
                return
        except (EOFError, OSError):
            pass
        # A process is gone, or was left in the middle of a step: no answer is to be expected.
        for process in vector.processes:
            process.terminate()
        for process in vector.processes:
            process.join()
        for pipe in vector.parent_pipes:
            pipe.close()
        vector.closed = True

    def _reset_rows(self, seeds: Sequence[int]) -> np.ndarray:
        with self._processes() as vector:
            return vector.reset(seed=list(seeds))[0]

    def _step_rows(self, actions: np.ndarray) -> np.ndarray:
        with self._processes() as vector:
            return vector.step(actions)[0]

    def _failure(self, index: int) -> Failure:
        with self._processes() as vector:
            failure = vector.get_attr("failure")[index]
        assert failure is not None
        return failure

    def _snapshots(self) -> Sequence[dict[str, np.ndarray] | None]:
        with self._processes() as vector:
            return vector.call("snapshot")

    def _restore_each(self, states: list[dict[str, np.ndarray]]) -> None:
        with self._processes() as vector:
            vector.set_attr("restored", states)

    @contextlib.contextmanager
    def _processes(self) -> Iterator[AsyncVectorEnv]:
        vector = self._vector
        if vector is None:
            raise UserError(f"{self.name}: the environments are closed")
        try:
            yield vector
        except (EOFError, ConnectionError) as error:
            for process in vector.processes:
                process.join(timeout=0.1)
            index = next((i for i, process in enumerate(vector.processes) if not process.is_alive()), 0)
            code = vector.processes[index].exitcode
            self.close()
            message = f"{self.name}: the process of environment {index} has ended (exit code {code})"
            raise EnvironmentFailed(message, index, 0) from error


def _make_guarded(name: str, recipe: Callable[..., gymnasium.Env], parent: int) -> Guard:
    if os.getpid() != parent:
        # Ctrl-C is for the parent, which closes these processes when it has done what it has to.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch: Any = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)
    return Guard(recipe(), name)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Lets processes that are started within compute with one thread, as there are as many of them as environments."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
