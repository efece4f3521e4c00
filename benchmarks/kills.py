"""
Kill trainings at random moments while they save, and load the files that they leave.

``python -m benchmarks.kills``. Each training continues from the last file, saves every few hundred milliseconds (to the
same name again and again, and to numbered names), and is ended by SIGKILL. Every file must load and predict, and no
process of an env may be left (except by SB3's ``SubprocVecEnv`` with ``start_method="fork"``, whose processes keep each
other's pipes open).
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from contextlib import suppress
from multiprocessing.synchronize import Event
from pathlib import Path

import psutil

from benchmarks.interrupts import FORK, make_envs
from sb3_async1step import AsyncOneStepQ

LATEST = "latest.zip"
#: Seconds for what a killed training has started to end
START_TIMEOUT = 60


def train(vec_env: str, folder: Path, interval: float, has_started: Event) -> None:
    """
    Train until killed.

    :param vec_env: kind of VecEnv
    :param folder: folder of the files to continue from and to save to
    :param interval: seconds between two saves
    :param has_started: event that is set after the first save
    """
    env = make_envs()[vec_env]()
    latest = folder / LATEST
    if latest.exists():
        model = AsyncOneStepQ.load(latest, env=env)
    else:
        policy = "CnnPolicy" if vec_env == "AleVecEnv" else "MlpPolicy"
        model = AsyncOneStepQ(policy, env, n_workers=2, policy_kwargs={"net_arch": [512, 512]})
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


def kill_trainings(vec_env: str, n_kills: int, interval: float, rng: random.Random, folder: Path) -> list[str]:
    """
    :param vec_env: kind of VecEnv
    :param n_kills: number of trainings
    :param interval: seconds between two saves
    :param rng: draws the moments of the kills
    :param folder: for the files
    :return: what failed
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sb3_async1step", "benchmarks.interrupts"])
    n_files, n_unfinished, failures = 0, 0, []
    for i in range(n_kills):
        has_started = context.Event()
        process = context.Process(target=train, args=(vec_env, folder, interval, has_started))
        process.start()
        if not has_started.wait(timeout=START_TIMEOUT):
            failures.append(f"training {i} has not saved within {START_TIMEOUT} s")
        time.sleep(rng.uniform(0.0, 4 * interval))
        children = []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        if not process.is_alive():
            failures.append(f"training {i} ended by itself with {process.exitcode}")
        process.kill()
        process.join()
        if vec_env == FORK:
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        _, left = psutil.wait_procs(children, timeout=START_TIMEOUT)
        failures += [f"{child} was left by kill {i}" for child in left]
        n_unfinished += len(list(folder.glob(".*")))
        for path in folder.glob("*.zip"):
            n_files += 1
            try:
                model = AsyncOneStepQ.load(path)
                model.predict(model.observation_space.sample())
            except Exception as exception:
                failures.append(f"{path.name} after kill {i}: {exception!r}")
            if path.name != LATEST:
                path.unlink()
        for path in folder.glob(".*"):
            path.unlink()
    n_steps = AsyncOneStepQ.load(folder / LATEST).num_timesteps
    print(f"{vec_env}: {n_kills} kills, {n_unfinished} of them in the middle of a save; {n_steps} steps trained in all")
    print(f"{n_files} files found, {len(failures)} failures", flush=True)
    return failures


def main() -> None:
    """Print how many files were found, and how many of them failed to load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="for each kind of VecEnv")
    parser.add_argument("--vec-envs", nargs="+", choices=make_envs(), default=list(make_envs()), help="kinds of VecEnv")
    parser.add_argument("--interval", type=float, default=0.2, help="seconds between two saves")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    failures = []
    for vec_env in arguments.vec_envs:
        with tempfile.TemporaryDirectory() as folder:
            failures += kill_trainings(vec_env, arguments.kills, arguments.interval, rng, Path(folder))
    print("\n".join(failures))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
