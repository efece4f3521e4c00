"""
Memory, threads and file handles during a long training, and peak memory compared with the Zoo's DQN.

``python -m benchmarks.soak``. Pong with 16 lanes, 2 workers, ``NipsCNN`` and Adam, in a process that is observed from
outside. DQN has the Zoo's hyperparameters and is trained for a moment. Its replay buffer is then filled with copies of
these transitions, since it would take long to play 100 000 steps.
"""

import argparse
import multiprocessing
import platform
import statistics
import time
from datetime import date
from multiprocessing.context import SpawnProcess

import psutil
import torch as th
from stable_baselines3 import DQN

from benchmarks.throughput import make_env
from sb3_async1step import AsyncOneStepQ, NipsCNN

MEGABYTE = 2**20
N_STEPS_OF_DQN = 2_000


def train(seconds: float) -> None:
    """
    Train for some time.

    :param seconds: length of the training
    """
    end = time.monotonic() + seconds
    policy_kwargs = {"features_extractor_class": NipsCNN, "optimizer_class": th.optim.Adam}
    model = AsyncOneStepQ("CnnPolicy", make_env(16), n_workers=2, policy_kwargs=policy_kwargs, verbose=1, seed=0)
    model.learn(10**9, callback=lambda locals_, globals_: time.monotonic() < end, log_interval=100)


def fill_a_replay_buffer() -> None:
    """Train DQN with the Zoo's hyperparameters for Atari games (hyperparams/dqn.yml) and a full replay buffer."""
    model = DQN(
        "CnnPolicy", make_env(1), buffer_size=100_000, learning_rate=1e-4, batch_size=32, learning_starts=1_000,
        target_update_interval=1_000, train_freq=4, gradient_steps=1, exploration_fraction=0.1,
        exploration_final_eps=0.01, optimize_memory_usage=False,
    )  # fmt: skip
    model.learn(N_STEPS_OF_DQN)
    buffer = model.replay_buffer
    assert buffer is not None
    n_filled = buffer.pos
    while not buffer.full:
        i = buffer.pos % n_filled
        buffer.add(
            buffer.observations[i], buffer.next_observations[i],
            buffer.actions[i], buffer.rewards[i], buffer.dones[i], [{}],
        )  # fmt: skip
    model.learn(500, reset_num_timesteps=False)


def sample(process: SpawnProcess, interval: float) -> list[tuple[float, float, int, int]]:
    """
    Observe a process until it ends.

    :param process: the process
    :param interval: seconds between two samples
    :return: for each sample the seconds since the start, the resident memory in MiB, and the numbers of threads and of
        file handles
    """
    start, samples = time.monotonic(), []
    observed = psutil.Process(process.pid)
    while process.is_alive():
        try:
            with observed.oneshot():
                memory, n_threads, n_handles = observed.memory_info().rss, observed.num_threads(), observed.num_fds()
        except psutil.Error:
            break
        samples.append((time.monotonic() - start, memory / MEGABYTE, n_threads, n_handles))
        process.join(interval)
    process.join()
    assert process.exitcode == 0, f"the process ended with {process.exitcode}"
    return samples


def main() -> None:
    """Print a table over time, how much the memory varies after the warm-up, and the ratio of the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the training")
    parser.add_argument("--warm-up", type=float, default=5.0, help="minutes that don't count")
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train, args=(60 * arguments.minutes,))
    process.start()
    ours = sample(process, interval=5.0)
    process = context.Process(target=fill_a_replay_buffer)
    process.start()
    dqns = sample(process, interval=0.1)

    print(f"\n{date.today()}, {platform.machine()}, torch {th.__version__}; Pong, 16 lanes, 2 workers\n")
    print(f"{'minutes':>8} {'MiB':>8} {'threads':>8} {'handles':>8}")
    steady = [row for row in ours if row[0] > 60 * arguments.warm_up][:-1]
    for seconds, memory, n_threads, n_handles in steady[:: max(1, len(steady) // 12)]:
        print(f"{seconds / 60:8.1f} {memory:8.1f} {n_threads:8} {n_handles:8}")
    median = statistics.median(row[1] for row in steady)
    deviation = max(abs(row[1] / median - 1) for row in steady)
    thread_counts, handle_counts = {row[2] for row in steady}, {row[3] for row in steady}
    print(f"\nafter {arguments.warm_up:g} minutes, memory stays within {100 * deviation:.2f} % of its median")
    print(f"threads: {sorted(thread_counts)}, file handles: {sorted(handle_counts)}")
    peak, peak_of_dqn = (max(row[1] for row in rows) for rows in (ours, dqns))
    print(f"peak: {peak:.0f} MiB; DQN with a full buffer of 100 000 transitions: {peak_of_dqn:.0f} MiB")
    print(f"ratio: 1 / {peak_of_dqn / peak:.1f}")


if __name__ == "__main__":
    main()
