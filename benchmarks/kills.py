"""
Kill trainings at random moments while they save, and load the files that they leave.

``python -m benchmarks.kills``. Each training continues from the last file, saves every few hundred milliseconds (to the
same name again and again, and to numbered names), and is ended by SIGKILL. Every file must load and predict.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from stable_baselines3.common.env_util import make_vec_env

from sb3_async1step import AsyncOneStepQ

LATEST = "latest.zip"


def train(folder: Path, interval: float, has_started: Event) -> None:
    """
    Train until killed.

    :param folder: folder of the files to continue from and to save to
    :param interval: seconds between two saves
    :param has_started: event that is set after the first save
    """
    env = make_vec_env("CartPole-v1", n_envs=4)
    latest = folder / LATEST
    if latest.exists():
        model = AsyncOneStepQ.load(latest, env=env)
    else:
        model = AsyncOneStepQ("MlpPolicy", env, n_workers=2, policy_kwargs={"net_arch": [512, 512]})
    last_save = time.monotonic()

    def save(locals_: dict, globals_: dict) -> bool:
        nonlocal last_save
        if time.monotonic() - last_save > interval:
            model.save(latest)
            model.save(folder / f"checkpoint_{model.num_timesteps}_steps")
            last_save = time.monotonic()
            has_started.set()
        return True

    model.learn(10**9, callback=save, reset_num_timesteps=False, log_interval=None)


def main() -> None:
    """Print how many files were found, and how many of them failed to load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--interval", type=float, default=0.2, help="seconds between two saves")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sb3_async1step", "stable_baselines3.common.env_util"])

    n_files, n_unfinished, failures = 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(arguments.kills):
            has_started = context.Event()
            process = context.Process(target=train, args=(folder, arguments.interval, has_started))
            process.start()
            has_started.wait(timeout=60)
            time.sleep(rng.uniform(0.0, 4 * arguments.interval))
            if not process.is_alive():
                failures.append(f"training {i} ended by itself with {process.exitcode}")
            process.kill()
            process.join()
            n_unfinished += len(list(folder.glob(".*")))
            for path in folder.glob("*.zip"):
                n_files += 1
                try:
                    AsyncOneStepQ.load(path).predict(np.zeros(4, np.float32))
                except Exception as exception:
                    failures.append(f"{path.name} after kill {i}: {exception!r}")
                if path.name != LATEST:
                    path.unlink()
            for path in folder.glob(".*"):
                path.unlink()
        n_steps = AsyncOneStepQ.load(folder / LATEST).num_timesteps

    print(f"{arguments.kills} kills, {n_unfinished} of them in the middle of a save; {n_steps} steps trained in all")
    print(f"{n_files} files found, {len(failures)} failures")
    print("\n".join(failures))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
