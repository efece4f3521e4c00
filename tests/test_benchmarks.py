"""Tables and curves say what the results' files say."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from benchmarks import actor_learners, learning, limits, throughput
from benchmarks.agents import save_agent
from benchmarks.learning import (
    Run,
    SavedModel,
    complete_part,
    find_checkpoints,
    find_parts,
    list_saved,
    play,
    play_by_zoo,
    play_checkpoint,
    result_path,
    run_and_evaluate,
)
from benchmarks.memory import read_peak_memory, wait_and_measure
from benchmarks.pqn import PQN
from benchmarks.report import insert_table, main, pages
from benchmarks.report.figures import COLOURS, draw_actor_learners, draw_curves, draw_mean, draw_node_kills
from benchmarks.report.results import NAMES, read_node_kills, read_runs, seconds_to
from benchmarks.report.tables import (
    actor_learners_table,
    make_learning_tables,
    make_speed_tables,
    node_kills_table,
    race_table,
)
from sb3_async1step import AsyncOneStepQ, NipsCNN
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.zoo import AsyncExperimentManager, register
from tests.helpers import are_equal, wait_until, weights_of

SETTING = actor_learners.Setting("a worker for each", n_lanes=2, seed=1)


def make_run(curve=(100.0, 480.0, 470.0), final=(490.0, 500.0), seconds=40.0):
    return Run(
        command="sb3-async1step train",
        date="2026-11-21",
        hardware="x86_64, 2 cores",
        versions={},
        n_steps=1_000_000,
        n_env_steps=999_000,
        seconds=seconds,
        peak_memory_mib=400.4,
        curve_steps=[250_000, 500_000, 750_000],
        curve_seconds=[10.0, 20.0, 30.0],
        curve_returns=list(curve),
        final_returns=list(final),
    )


def write(run, results, env_id, algo, seed):
    path = result_path(results, env_id, algo, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(run)))


@pytest.mark.parametrize(
    ("run", "seconds"),
    [
        (make_run(), 20.0),
        (make_run(curve=(0.0, 0.0, 0.0)), 40.0),
        (make_run(curve=(0.0, 0.0, 0.0), final=(0.0,)), float("inf")),
        (make_run(curve=(475.0, 0.0, 0.0)), 10.0),
    ],
)
def test_seconds_to_threshold(run, seconds):
    assert seconds_to(run, 475.0) == seconds


@pytest.mark.parametrize(("algo", "model_class"), [("dqn", DQN), ("async_one_step_q", AsyncOneStepQ)])
def test_contenders_of_the_zoo(algo, model_class, monkeypatch):
    """DQN is measured with the epsilon of most of a training: while it acts at random, its network does nothing."""
    monkeypatch.setattr(AsyncExperimentManager, "default_vec_env_cls", None)
    make = partial(throughput.make_by_zoo, algo, "CartPole-v1")
    monkeypatch.setitem(throughput.COMPARISONS, "test", {algo: make})
    monkeypatch.setattr(throughput, "WARM_UP_STEPS", 64)
    throughput.start_learning("test", algo)
    assert throughput.measure(0.1).steps_per_second > 0
    assert type(throughput._model) is model_class
    if algo == "dqn":
        assert throughput._model.exploration_rate == throughput._model.exploration_final_eps == 0.04
    throughput.stop_learning()


def test_limit(monkeypatch):
    """The first layer's pass that images do not need is left out."""
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", 1), 4)
    model = AsyncOneStepQ("CnnPolicy", env, policy_kwargs={"features_extractor_class": NipsCNN})
    monkeypatch.setattr(limits, "time_emulation", lambda n_lanes: 0.0)
    monkeypatch.setattr(limits, "time_call", lambda call: 2.0 * limits.N_ROWS**3 * 1e-9)
    monkeypatch.setattr(limits, "count_usable_cores", lambda: 2)
    layers = [20 * 20 * 16 * 4 * 8 * 8, 9 * 9 * 32 * 16 * 4 * 4, 9 * 9 * 32 * 256, 256 * 6]
    n_passes = [3, 4, 4, 4] if model.update_interval == 1 else [4, 5, 5, 5]
    nanoseconds = 2 * sum(n * layer for n, layer in zip(n_passes, layers, strict=True))
    assert limits.measure_limit(model, False) == pytest.approx(2 / (nanoseconds * 1e-9))


def test_bands_span_the_seeds():
    _, axis = plt.subplots()
    runs = [make_run(curve=(value, value, value)) for value in (0.0, 1.0, 5.0)]
    draw_mean(axis, [np.array([1.0, 2.0, 3.0])] * 3, runs, "C0", "")
    (line,), (band,) = axis.lines, axis.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.0, 5.0) and set(line.get_ydata()) == {2.0}
    plt.close()


def test_tables_and_curves(tmp_path):
    write(make_run(seconds=40.0), tmp_path, "CartPole-v1", "async_one_step_q", 1)
    write(
        make_run(seconds=50.0, final=(400.0, 400.0), curve=(0.0, 0.0, 0.0)),
        tmp_path,
        "CartPole-v1",
        "async_one_step_q",
        2,
    )
    write(make_run(seconds=60.0), tmp_path, "CartPole-v1", "async_one_step_q", 3)
    write(make_run(final=(10.0, 11.0)), tmp_path, "MinAtar/Breakout-v0", "async_one_step_sarsa", 1)
    for algo, curve, final, seconds in [
        ("async_one_step_q", (-21.0, 1.0, -1.0), (19.0, 21.0), 7200.0),
        ("async_one_step_sarsa", (-21.0, 1.0, 18.0), (19.0,), 7200.0),
        ("dqn", (-21.0, 0.0, -1.0), (-3.0,), 3600.0),
    ]:
        run = make_run(curve, final, seconds)
        run.command += " --seed 7 -n 1000000"
        run.curve_seconds = [900.0, 1800.0, 2880.0]
        write(run, tmp_path, "PongNoFrameskip-v4", algo, 7)
    for game, score in (("Pong", 20.0), ("Breakout", 203.3)):
        whole = replace(make_run(final=(score - 1, score + 1)), n_steps=10_000_000, command="--seed 1")
        write(whole, tmp_path / "whole", f"{game}NoFrameskip-v4", "a3c", 1)
    write(whole, tmp_path / "whole", "BreakoutNoFrameskip-v4", "async_n_step_q", 1)
    short = replace(whole, n_steps=2_000_000)
    write(short, tmp_path / "whole", "PongNoFrameskip-v4", "async_n_step_q", 1)
    runs = read_runs(tmp_path)
    tables = make_learning_tables(runs)
    assert tables["classic control"][2:] == [
        "| CartPole-v1 | AsyncOneStepQ | 3 | 463.3 ± 44.8 | 1 000 000 | 50 | 20 s (2 of 3 to 475) | 400 |"
    ]
    # No columns of algorithms without results in these environments
    assert tables["classic control in short"][:4] == [
        "| environment (threshold) | AsyncOneStepQ |",
        "|---|---|",
        "| CartPole-v1 (475) | 463.3 ± 44.8; 20 s |",
        "| Acrobot-v1 (-90) |  |",
    ]
    assert tables["MinAtar"][2:] == ["| Breakout | AsyncOneStepSarsa | 1 | 10.5 ± 0.0 | 1 000 000 | 40 |"]
    start = "| PongNoFrameskip-v4"
    assert tables["Atari"][2:] == [
        f"{start} | AsyncOneStepQ | 7 | 20.0 ± 1.0 | 115% | -7.0 | 1.0 | 2.0 "
        "| 0: 0.5 (0.5); 10: 1.0 (2.0); 18: 1.0 (2.0) |",
        f"{start} | AsyncOneStepSarsa | 7 | 19.0 ± 0.0 | 112% | -0.7 | 1.0 | 2.0 "
        "| 0: 0.5 (0.5); 10: 0.8 (0.8); 18: 0.8 (0.8) |",
        f"{start} | DQN | 7 | -3.0 ± 0.0 | 50% | -7.3 | 1.0 | 1.0 | 0: 0.5 (0.5); 10: not reached; 18: not reached |",
        f"{start} | DQN, published by the Zoo |  | 20.6 ± 0.6 | 117% |  | 10.0 |  |  |",
        f"{start} | QR-DQN, published by the Zoo |  | 20.5 ± 0.7 | 117% |  | 10.0 |  |  |",
        f"{start} | A2C, published by the Zoo |  | 17.3 ± 3.2 | 108% |  | 10.0 |  |  |",
        f"{start} | PPO, published by the Zoo |  | 21.0 ± 0.1 | 118% |  | 10.0 |  |  |",
    ]
    # Trainings of 10 million steps alone; a median over fewer games could not be compared
    assert make_learning_tables(read_runs(tmp_path / "whole"))["Atari in short"] == [
        "| algorithm | Pong | Breakout | human-normalised median |",
        "|---|---|---|---|",
        "| AsyncNStepQ |  | 203.3 |  |",
        "| A3C | 20.0 | 203.3 | 408% |",
        "| DQN, published by the Zoo | 20.6 | 358.3 | 678% |",
        "| QR-DQN, published by the Zoo | 20.5 | 393.6 | 739% |",
        "| A2C, published by the Zoo | 17.3 | 279.8 | 537% |",
        "| PPO, published by the Zoo | 21.0 | 398.0 | 747% |",
    ]
    throughput = {"contenders": {"DQN, 1 env": {"steps_per_second": [90.0, 200.0, 190.0]}}}
    assert race_table(runs, throughput)[2:] == [
        "| AsyncOneStepQ | 7 | 120 | 1 468 000 | seed 7: 0.0 (until 1 000 000) |",
        "| AsyncOneStepSarsa | 7 | 48 | 647 200 | seed 7: 0.0 |",
    ]
    assert set(runs) == {"CartPole-v1", "MinAtar-Breakout-v0", "PongNoFrameskip-v4"}
    for env_id, groups in runs.items():
        draw_curves(env_id, groups, tmp_path / f"{env_id}.png")
    assert (tmp_path / "CartPole-v1.png").stat().st_size > 5000


def test_speeds():
    """Medians and their ranges; what a machine could do at best; the best fixed setting beside "auto"."""
    fast = {"steps_per_second": [900.0, 1000.0, 1200.0], "cpu_microseconds": [1800.0, 2000.0, 2100.0]}
    slow = {"steps_per_second": [100.0, 125.0, 130.0]}
    throughput = {
        "contenders": {"DQN, 1 env": {**slow, "peak_memory_mib": 700.4}, "ours": {**fast, "peak_memory_mib": 1500}},
        "floor": {"emulation": 300.4, "acting": 100.0},
        "limits": {"ours": 4000.0},
        "auto, CartPole-v1, 4 lanes": {"auto": slow, "1 workers, 1 threads each": fast, "2 workers": slow},
    }
    tables = make_speed_tables(throughput)
    assert set(tables) == {"contenders", "auto", "limits", "floor"}
    assert tables["contenders"] == [
        "| | steps/s | x DQN, 1 env | CPU µs per step | MiB |",
        "|---|---|---|---|---|",
        "| DQN, 1 env | 125 (100 to 130) | 1.00 |  | 700 |",
        "| ours | 1 000 (900 to 1 200) | 8.00 | 2 000 | 1 500 |",
    ]
    assert tables["limits"][2:] == ["| ours | 4 000 | 25% |"]
    assert tables["floor"][2:] == ["| emulation | 300 |", "| acting | 100 |", "| together | 400 |"]
    best = "1 workers, 1 threads each: 1 000 (900 to 1 200)"
    assert tables["auto"][2:] == [f"| CartPole-v1, 4 lanes | 125 (100 to 130) | {best} | 0.12 |"]
    # What --only has measured for another file
    alone = {name: throughput[name] for name in throughput if name.startswith("auto")}
    assert make_speed_tables(alone) == {"auto": tables["auto"]}


def test_study_of_actor_learners(tmp_path, monkeypatch):
    """What was measured is not measured again; medians and ranges of the seeds, and gains over one actor-learner."""
    path = tmp_path / actor_learners.results_path("CartPole-v1", "async_one_step_q").name
    steps = {1: (900, 1000, 1200), 2: (400, 500, 800), 4: (250, 250, float("inf"))}
    measured = [(n_lanes, "one worker", values) for n_lanes, values in steps.items()]
    for n_lanes, layout, values in [*measured, (2, "a worker for each", (float("inf"),) * 3)]:
        for seed, value in enumerate(values):
            setting = actor_learners.Setting(layout, n_lanes, seed)
            assert not actor_learners.is_measured(actor_learners.read_measurements(path), setting)
            measurement = actor_learners.Measurement(*setting, value, value / 10, "2026-11-21", "x86_64, 2 cores")
            actor_learners.append_measurement(path, measurement)
            measurements = actor_learners.read_measurements(path)
            assert tuple(measurements.iloc[-1]) == measurement
            assert actor_learners.is_measured(measurements, setting)
    studies = actor_learners.read_all(tmp_path)
    assert list(studies) == [("CartPole-v1", "async_one_step_q")]
    start = "| CartPole-v1 | AsyncOneStepQ |"
    not_reached = "not reached (not reached to not reached)"
    assert actor_learners_table(studies)[2:] == [
        f"{start} 1 | one worker | 3 | 1 000 (900 to 1 200) | 1.00 | 1.0 | 100 (90 to 120) | 1.00 | 1.0 |",
        f"{start} 2 | one worker | 3 | 500 (400 to 800) | 2.00 | 1.5 | 50 (40 to 80) | 2.00 | 3.0 |",
        f"{start} 2 | a worker for each | 3 | {not_reached} |  | 1.5 | {not_reached} |  | 3.0 |",
        f"{start} 4 | one worker | 3 | 250 (250 to not reached) | 4.00 | 1.6 | 25 (25 to not reached) | 4.00 | 6.3 |",
    ]
    draw_actor_learners(studies, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000

    task = replace(actor_learners.TASKS["CartPole-v1"], reference_score=8.0, exploration_steps=100, max_steps=10_000)
    monkeypatch.setitem(actor_learners.TASKS, "CartPole-v1", task)
    easy = actor_learners.measure("CartPole-v1", "async_one_step_sarsa", SETTING)
    # 100 episodes of at least 8 steps, whatever it learns
    assert 800 <= easy.steps < 10_000 and easy.steps % 2 == 0 and easy.seconds > 0
    hard = replace(task, reference_score=501.0, max_steps=200)
    monkeypatch.setitem(actor_learners.TASKS, "CartPole-v1", hard)
    assert actor_learners.measure("CartPole-v1", "async_one_step_q", SETTING).steps == float("inf")


def test_report_of_killed_nodes(tmp_path):
    training = {
        "seed": 3, "total_timesteps": 100, "num_timesteps": 112, "seconds": 20.0, "returns": [500.0, 400.0],
        "kills": [["node", 25, 5.0], ["server", 50, 10.0], ["machine", 75, 15.0]],
        "curve_steps": [10, 100], "curve_seconds": [2.0, 20.0], "curve_returns": [20.0, 400.0],
    }  # fmt: skip
    stopped = {**training, "num_timesteps": 99, "seconds": 10.0, "returns": [50.0], "kills": []}
    longer = {**training, "total_timesteps": 1000, "num_timesteps": 1000}
    (tmp_path / "node_kills.json").write_text(json.dumps([longer, training, stopped]))
    trainings = read_node_kills(tmp_path)
    assert node_kills_table(trainings)[2:] == [
        "| 100 | 2 | 3 | 1 | 250.0 ± 200.0 | 450, 50 | 15 (10 to 20) |",
        "| 1 000 | 1 | 3 | 1 | 450.0 ± 0.0 | 450 | 20 (20 to 20) |",
    ]
    draw_node_kills(trainings[0], tmp_path / "node_kills.png")
    assert (tmp_path / "node_kills.png").exists()
    assert read_node_kills(tmp_path / "elsewhere") == []


def test_report_of_the_results_there_are(tmp_path, monkeypatch):
    """Also while a study has no results yet."""
    monkeypatch.setattr(pages, "PAGES", ())
    monkeypatch.setattr(pages, "PICTURES", tmp_path)
    monkeypatch.setattr(pages, "read_all", dict)
    main()
    assert (tmp_path / "throughput.png").exists() and (tmp_path / "CartPole-v1.png").exists()
    assert not (tmp_path / "actor_learners.png").exists()


def test_all_algorithms_have_a_name_and_a_colour():
    assert list(NAMES) == list(COLOURS) == [*ALGORITHMS, "dqn", "a2c"]
    assert len(set(NAMES.values())) == len(set(COLOURS.values())) == len(NAMES)


def test_tables_replace_what_was_between_the_marks():
    page = "a\n<!-- MinAtar -->\nold\n<!-- end of MinAtar -->\nb"
    new = "a\n<!-- MinAtar -->\n| 1 |\n| 2 |\n<!-- end of MinAtar -->\nb"
    assert insert_table(page, "MinAtar", ["| 1 |", "| 2 |"]) == new
    assert insert_table(page, "classic control", ["| 1 |"]) == page


def test_checkpoints_are_in_order(tmp_path):
    for n_steps in (100, 20, 3):
        (tmp_path / f"rl_model_{n_steps}_steps.zip").touch()
    assert list(find_checkpoints(tmp_path)) == [3, 20, 100]


def make_part(folder, start, checkpoints, last=None):
    """The files of a part of a training, with the times at which they were written."""
    folder.mkdir(parents=True)
    (folder / "0.monitor.csv").write_text(f'#{{"t_start": {start}, "env_id": "CartPole-v1"}}\n')
    files = {f"rl_model_{steps}_steps.zip": time for steps, time in checkpoints.items()}
    for name, time in (files | ({"CartPole-v1.zip": last} if last else {})).items():
        (folder / name).touch()
        os.utime(folder / name, (time, time))


def test_time_of_a_training_in_parts(tmp_path):
    """What was done after the last checkpoint of an interrupted part, and the time between the parts, do not count."""
    algo = tmp_path / "async_one_step_q"
    make_part(algo / "CartPole-v1_1", 1000.0, {100: 1010.0, 200: 1020.0})
    make_part(algo / "CartPole-v1_2", 2000.0, {})
    make_part(algo / "CartPole-v1_10", 3000.0, {300: 3015.0}, last=3030.0)
    # The Zoo's benchmark leaves its scores beside them
    (tmp_path / "benchmark" / "async_one_step_q-CartPole-v1").mkdir(parents=True)
    parts = find_parts(tmp_path)
    assert [part.name for part in parts] == ["CartPole-v1_1", "CartPole-v1_2", "CartPole-v1_10"]
    assert list_saved(parts, "CartPole-v1.zip") == (
        {
            100: SavedModel(parts[0] / "rl_model_100_steps.zip", 10.0),
            200: SavedModel(parts[0] / "rl_model_200_steps.zip", 20.0),
            300: SavedModel(parts[2] / "rl_model_300_steps.zip", 35.0),
        },
        SavedModel(parts[2] / "CartPole-v1.zip", 50.0),
    )


def test_the_last_checkpoint_of_a_training_may_be_its_last_model(tmp_path):
    """It was killed when it was about to write that, and the statistics."""
    part = tmp_path / "part"
    make_part(part, 1000.0, {100: 1010.0})
    (part / "CartPole-v1").mkdir()
    checkpoint = part / "rl_model_100_steps.zip"
    checkpoint.write_text("model")
    (part / "rl_model_vecnormalize_100_steps.pkl").write_text("statistics")
    complete_part(checkpoint, "CartPole-v1.zip")
    assert (part / "CartPole-v1.zip").read_text() == "model"
    assert (part / "CartPole-v1" / "vecnormalize.pkl").read_text() == "statistics"
    # What is there stays
    checkpoint.write_text("another")
    complete_part(checkpoint, "CartPole-v1.zip")
    assert (part / "CartPole-v1.zip").read_text() == "model"


@pytest.mark.parametrize("algo", ["dqn", "async_one_step_q"])
def test_what_the_zoo_cannot_go_on_with_begins_again(algo, tmp_path, monkeypatch):
    make_part(tmp_path / algo / "CartPole-v1_1", 1000.0, {100: 1010.0})
    commands = []

    def run_zoo(options, folder):
        commands.append(options)
        raise RuntimeError("enough")

    monkeypatch.setattr(learning, "run_zoo", run_zoo)
    with pytest.raises(RuntimeError, match="enough"):
        run_and_evaluate("CartPole-v1", algo, ["--seed", "1"], 300, n_episodes=1, folder=tmp_path)
    begins = ["--seed", "1", "-n", "300", "-f", str(tmp_path)]
    goes_on = ["--seed", "1", "-n", "200", "-f", str(tmp_path), "-i"]
    goes_on.append(str(tmp_path / algo / "CartPole-v1_1" / "rl_model_100_steps.zip"))
    assert commands == [begins if algo == "dqn" else goes_on]


def test_each_model_plays_in_a_new_env():
    """A game that another one has begun would count for it on Atari."""
    env, closed = make_vec_env("CartPole-v1", 2), []
    env.close = lambda: closed.append(True)
    model = AsyncOneStepQ("MlpPolicy", env)
    assert len(play(model, env, 3, deterministic=True)) == 3 and closed == [True]


@pytest.mark.parametrize("norm_obs", [True, False])
def test_each_checkpoint_plays_with_its_own_statistics(norm_obs, tmp_path):
    def make_normalized():
        return VecNormalize(make_vec_env("CartPole-v1", 2), norm_obs=norm_obs)

    before, env = make_normalized(), make_normalized()
    before.reset()
    before.save(str(tmp_path / "statistics.pkl"))
    model = AsyncOneStepQ("MlpPolicy", env)
    env.training = False
    returns = play_checkpoint(model, env, 2, deterministic=True, statistics=tmp_path / "statistics.pkl")
    assert len(returns) == 2
    if norm_obs:
        np.testing.assert_array_equal(env.obs_rms.mean, before.obs_rms.mean)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_program_alone():
    """Not that of its parent, which ``getrusage()`` says if it is larger."""
    block = np.ones(2**26)
    assert read_peak_memory() > 500
    del block
    code = "import sys; block = b'x' * (100 * 2**20); sys.stdin.read(1)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        wait_until(lambda: read_peak_memory(process.pid) > 100)
        wait = process.wait

        def end(timeout):
            # Only now, when its memory has been read
            process.stdin.close()
            return wait(timeout)

        process.wait = end
        assert 100 < wait_and_measure(process) < 300
        process.wait = wait
    with pytest.raises(OSError):
        read_peak_memory(process.pid)


@pytest.mark.slow
def test_an_interrupted_training_goes_on_and_an_ended_one_is_not_repeated(tmp_path, monkeypatch):
    register()
    monkeypatch.setattr(learning, "N_FINAL_EPISODES", 10)
    env_id, algo = "CartPole-v1", "async_one_step_q"
    options = ["--algo", algo, "--env", env_id, "--seed", "1", "--eval-freq", "-1", "--save-freq", "640"]
    first = run_and_evaluate(env_id, algo, options, n_steps=1280, n_episodes=1, folder=tmp_path)
    assert first.n_steps == 1280 and first.curve_steps == [640, 1280]
    # As if it had been interrupted on the way to 1920 steps, after the first checkpoint: the Zoo saved a model then
    (tmp_path / learning.RECORD).unlink()
    (tmp_path / algo / "CartPole-v1_1" / "rl_model_1280_steps.zip").unlink()
    second = run_and_evaluate(env_id, algo, options, n_steps=1920, n_episodes=1, folder=tmp_path)
    assert second.n_steps == 1920 and second.curve_steps == [640, 1280, 1920]
    assert second.curve_seconds[0] == first.curve_seconds[0]
    assert sorted(second.curve_seconds) == second.curve_seconds and second.seconds >= second.curve_seconds[-1]
    assert f"-i {tmp_path}" not in second.command and second.command.endswith("-n 1920")
    again = run_and_evaluate(env_id, algo, options, n_steps=1920, n_episodes=1, folder=tmp_path)
    assert asdict(again) == asdict(second)
    # Only the benchmark was killed, when the training had ended
    (tmp_path / learning.RECORD).unlink()
    once_more = run_and_evaluate(env_id, algo, options, n_steps=1920, n_episodes=1, folder=tmp_path)
    assert asdict(replace(once_more, peak_memory_mib=second.peak_memory_mib)) == asdict(second)
    assert len(find_parts(tmp_path)) == 2
    with pytest.raises(RuntimeError, match="holds a training of 1920 instead of 2560 steps: remove it"):
        run_and_evaluate(env_id, algo, options, n_steps=2560, n_episodes=1, folder=tmp_path)

    # As for Atari's scores; none of the 10 lanes takes more than 500 steps to the end of its episode
    returns = play_by_zoo(env_id, algo, tmp_path, n_steps=5010)
    assert len(returns) >= 10 and all(8 <= episode_return <= 500 for episode_return in returns)


@pytest.mark.slow
def test_a_training_that_was_interrupted_has_no_results(tmp_path, monkeypatch):
    """However it ended: the Zoo saves a model at Ctrl-C, and ends without an error."""
    register()
    wait = learning.wait_and_measure

    def interrupt(process):
        wait_until(lambda: list(tmp_path.glob("async_one_step_q/*/rl_model_*_steps.zip")))
        os.kill(process.pid, signal.SIGINT)
        return wait(process)

    monkeypatch.setattr(learning, "wait_and_measure", interrupt)
    options = ["--algo", "async_one_step_q", "--env", "CartPole-v1", "--eval-freq", "-1", "--save-freq", "640"]
    with pytest.raises(RuntimeError, match=r"The training was interrupted after \d+ of 1000000 steps"):
        run_and_evaluate("CartPole-v1", "async_one_step_q", options, 1_000_000, n_episodes=1, folder=tmp_path)
    assert (tmp_path / "async_one_step_q" / "CartPole-v1_1" / "CartPole-v1.zip").exists()
    assert not (tmp_path / learning.RECORD).exists()


def test_pqn_learns_from_lambda_returns(monkeypatch):
    """The peer in the throughput benchmark: its returns are the weighted mean of the n-step returns."""
    monkeypatch.setattr(PQN, "N_STEPS", 4)
    env = make_vec_env(lambda: FakeImageEnv(screen_height=84, screen_width=84, n_channels=4), n_envs=2)
    pqn = PQN(env)
    rewards, values = th.rand(4, 2), th.rand(4, 2)
    goes_on = th.ones(4, 2, dtype=th.bool)
    goes_on[2, 0] = False

    def n_step_return(t, n, lane):
        total, discount = 0.0, 1.0
        for step in range(t, t + n):
            total += discount * rewards[step, lane]
            discount *= PQN.GAMMA
            if not goes_on[step, lane]:
                return total
        return total + discount * values[t + n - 1, lane]

    def weighted_mean(t, lane):
        n_last = 4 - t
        weights = [(1 - PQN.LAMBDA) * PQN.LAMBDA ** (n - 1) for n in range(1, n_last)] + [PQN.LAMBDA ** (n_last - 1)]
        return sum(weight * n_step_return(t, n, lane) for n, weight in enumerate(weights, start=1))

    expected = th.tensor([[weighted_mean(t, lane) for lane in range(2)] for t in range(4)])
    assert th.allclose(pqn._lambda_returns(rewards, goes_on, values), expected)

    before = [parameter.clone() for parameter in pqn.network.parameters()]
    pqn.learn(100, callback=lambda locals_, globals_: pqn.num_timesteps < 16)
    assert pqn.num_timesteps == 16
    assert not any(th.equal(a, b) for a, b in zip(before, pqn.network.parameters(), strict=True))


def test_a_trained_agent_takes_half_of_the_space_and_plays_as_its_model(tmp_path):
    model = AsyncOneStepQ("MlpPolicy", "CartPole-v1", seed=1)
    model.learn(100)
    model.save(tmp_path / "model")
    trained = weights_of(model)
    save_agent(model, tmp_path / "agent.zip")
    assert (tmp_path / "agent.zip").stat().st_size < 0.5 * (tmp_path / "model.zip").stat().st_size
    agent = AsyncOneStepQ.load(tmp_path / "agent", env=make_vec_env("CartPole-v1", 16))
    assert weights_of(agent).keys() == trained.keys()
    assert all(th.equal(trained[name.replace("_target", "")], values) for name, values in weights_of(agent).items())
    # It learns on, with parameters of the two networks that are not the same tensors
    agent.learn(100, reset_num_timesteps=False)
    assert not are_equal(agent.q_net.state_dict(), agent.q_net_target.state_dict())
