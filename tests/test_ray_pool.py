"""The driver of a training on Ray, whose nodes and clock are played here. ``test_ray.py`` has real ones."""

import os
import pickle
import signal
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common import monitor
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_async1step import AsyncOneStepQ, RayVecEnv
from sb3_async1step.common import parallelism
from sb3_async1step.common.parallelism import SMALL_NETWORK, count_workers_of_nodes
from sb3_async1step.common.snapshot import Snapshot
from sb3_async1step.nodes import cluster, exchange, exchange_metrics, ray_pool, ray_vec_env
from sb3_async1step.nodes.cluster import Place
from sb3_async1step.nodes.exchange import EXCHANGES, DeltaExchange
from sb3_async1step.nodes.messages import Learned, Push, Report, ServerState
from sb3_async1step.nodes.moments import read_moments
from sb3_async1step.nodes.node import Node, NodeCallback, make_picklable
from sb3_async1step.nodes.parameters import read_values, store_values
from sb3_async1step.nodes.ray_pool import RayWorkerPool
from sb3_async1step.nodes.server import ParameterServer
from sb3_async1step.nodes.settings import ExchangeSettings
from sb3_async1step.nodes.wrappers import pack_wrappers
from sb3_async1step.workers.gate import Call, learning_on
from tests.helpers import DEADLINE, wait_until


class ActorError(Exception):
    """What Ray raises when a process is away."""


class LostError(Exception):
    """What Ray raises when an answer was on its way from a machine that is lost."""


class MemoryError_(Exception):
    """What Ray raises when it has killed a process, since its machine had run out of memory."""


class HangError(Exception):
    """What Ray raises when there is no answer in time."""


class MachineError(Exception):
    """What Ray raises on a machine that is about to be lost."""


class FakeRay:
    """Requests are functions that answer when they are asked, or tokens of what has not ended yet, or has failed."""

    exceptions = types.SimpleNamespace(
        RayActorError=ActorError,
        ObjectLostError=LostError,
        NodeDiedError=LostError,
        OutOfMemoryError=MemoryError_,
        GetTimeoutError=HangError,
        RaySystemError=MachineError,
        RayTaskError=ZeroDivisionError,
    )

    def __init__(self):
        self.ended, self.failed, self.answers = set(), {}, {}

    def get(self, request, timeout=None):
        if request in self.failed:
            raise self.failed[request]
        return request() if callable(request) else self.answers.get(request)

    def wait(self, requests, num_returns=1, timeout=None):
        assert requests
        return [request for request in requests if request in self.ended][:num_returns], []


class Actor:
    """Calls the methods of an object as Ray calls an actor's: one at a time, whichever threads ask."""

    def __init__(self, methods):
        self._methods, self.lock = methods, threading.Lock()

    def __getattr__(self, name):
        def ask(*arguments):
            def answer():
                if self._methods is None:
                    raise ActorError
                with self.lock:
                    return pickle.loads(pickle.dumps(getattr(self._methods, name)(*arguments)))

            return answer

        return types.SimpleNamespace(remote=ask)


class FakeNode:
    """Keeps what it is to learn; its requests are tokens."""

    def __init__(self, lanes):
        self.lanes, self.place, self.epoch, self.recipes = lanes, Place(1), 0, []
        self.actor = types.SimpleNamespace(
            learn=types.SimpleNamespace(remote=self.learn),
            stop=types.SimpleNamespace(remote=lambda: None),
            __ray_ready__=types.SimpleNamespace(remote=lambda: ("starting", self.lanes.start, self.epoch)),
        )

    def learn(self, recipe, server):
        self.recipes.append(recipe)
        return "learning", self.lanes.start, self.epoch

    def restart(self):
        self.epoch += 1

    def is_alive(self):
        return True


class FakeLanes(RayVecEnv):
    """Two lanes on each of two nodes."""

    def __init__(self, **settings):
        self.settings = ExchangeSettings(**{"sync_interval": 4, "node_timeout": 100.0, **settings})
        self.nodes = [FakeNode(range(2)), FakeNode(range(2, 4))]
        self.closed = True
        box = gym.spaces.Box(-9, 9, (4,), np.float32)
        VecEnv.__init__(self, 4, box, gym.spaces.Discrete(2))

    def get_attr(self, name, indices=None):
        return [None] * 4


class Training:
    """
    A pool of two nodes, which the test plays.

    :param monkeypatch: see pytest
    :param total: steps of all nodes
    :param read_interval: seconds between two questions of the thread that reads news
    :param settings: of the exchanges
    """

    def __init__(self, monkeypatch, total=10**6, read_interval=1e6, **settings):
        self.now, self.ray = 0.0, FakeRay()
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=lambda seconds: None)
        monkeypatch.setattr(ray_pool, "time", clock)
        monkeypatch.setattr(exchange_metrics, "time", clock)
        monkeypatch.setattr(ray_pool, "import_ray", lambda: self.ray)
        # The clock of the thread that reads news is a real one
        monkeypatch.setattr(ray_pool, "READ_INTERVAL", read_interval)
        self.model = AsyncOneStepQ("MlpPolicy", make_vec_env("CartPole-v1", 4), policy_kwargs={"net_arch": [4]}, seed=0)
        self.start = read_values(self.model.list_learned_parameters())
        self.env, self.server = FakeLanes(**{"checkpoint_interval": 4e6, **settings}), ParameterServer()
        self.env.server = Actor(self.server)
        self.pool = RayWorkerPool(
            self.env,
            self.model._gate,
            self.model._make_node_recipe(1, total),
            1,
            500,
            self.model._share_parameters(),
            self.model._sync_after_jump,
        )
        self.numbers = {0: 0, 1: 0}

    def push(self, node, change=1.0, n_steps=4):
        """Let a node exchange after steps for one batch, by which it has changed all parameters."""
        self.numbers[node] += 1
        state, epoch = self.server.state, self.env.nodes[node].epoch
        learned = Learned(np.full_like(self.start, change)) if change else None
        report = Report(np.zeros(n_steps, bool))
        with self.env.server.lock:
            return self.server.exchange(Push(node, epoch, self.numbers[node], state.version, learned, [], {}, report))

    def begin(self):
        """Let both nodes pull the parameters; returns the batches of the steps that they make from then on."""
        for node in (0, 1):
            self.push(node, change=None, n_steps=0)
        return self.pool.batches()

    def lose_server(self):
        """Ray starts another one in the place of one that has died."""
        self.server = ParameterServer()
        self.env.server._methods = self.server

    def has_changed_by(self, change):
        """Whether all of the model's parameters have."""
        return np.allclose(read_values(self.model.list_learned_parameters()) - self.start, change, atol=1e-5)

    @property
    def n_restarts(self):
        return [node.epoch for node in self.env.nodes]


@pytest.fixture
def make_training(monkeypatch):
    trainings = []

    def make(**settings):
        trainings.append(Training(monkeypatch, **settings))
        return trainings[-1]

    yield make
    for training in trainings:
        training.pool._reader.end(DEADLINE)
        # The garbage collector would close it, with the real Ray
        training.env.closed = True


def test_nodes_are_not_blamed_for_a_callback_that_takes_its_time(make_training):
    training = make_training()
    batches = training.begin()
    for _ in range(2):
        for node in (0, 1):
            training.push(node)
        next(batches), next(batches)
        assert training.n_restarts == [0, 0]
        training.now += 1000
    # One that hangs is
    training.push(0)
    next(batches)
    assert training.n_restarts == [0, 1]
    assert training.pool.take_metrics()["ray/node_restarts"] == 1


def test_a_node_that_hangs_before_its_first_exchange(make_training):
    training = make_training()
    batches = training.pool.batches()
    # The other one waits for a CPU, as long as it takes
    for _ in range(3):
        training.push(0)
        next(batches)
        training.now += 1000
    assert training.n_restarts == [0, 0]
    training.ray.ended.add(("starting", 2, 0))
    for seconds, expected in [(0, 0), (99, 0), (2, 1)]:
        training.now += seconds
        training.push(0)
        next(batches)
        assert training.n_restarts == [0, expected]


def test_the_training_ends_without_a_node_that_cannot_start(make_training):
    training = make_training(total=40)
    pull = training.push(0, change=None, n_steps=0)
    while not pull.is_over:
        pull = training.push(0, n_steps=2 * pull.n_granted)
    assert sum(len(batch) for batch in training.pool.batches()) == 40
    training.pool.stop()
    assert training.n_restarts == [1, 1]


def test_a_node_and_the_server_that_die_together(make_training):
    training = make_training()
    batches = training.begin()
    for _ in range(20):
        for node in (0, 1):
            training.push(node)
    next(batches)
    training.lose_server()
    training.pool._restart_node(1, "has ended")
    training.pool._take_news()
    state, n_steps = training.server.state, training.server.state.num_timesteps
    assert state.num_timesteps == 160 and state.last_numbers == {0: 21, 1: -1}
    # The new process counts its exchanges from one
    training.numbers[1] = 0
    for _ in range(3):
        training.push(1)
    assert state.num_timesteps == n_steps + 12


def test_what_a_process_did_before_its_end_is_not_taken_for_the_next_ones(make_training):
    training = make_training()
    batches = training.begin()
    for node in (0, 1, 1, 1):
        training.push(node)
    next(batches)
    # While a callback takes its time
    training.push(1)
    training.pool._reader._unread.append(training.pool._ask_for_news())
    request = ("learning", 2, 0)
    training.ray.ended.add(request)
    training.ray.failed[request] = ActorError("its process was killed")
    training.pool._follow_nodes()
    # The next one waits for a CPU, as long as it takes
    training.now = 1000
    training.push(0)
    training.pool._follow_nodes()
    assert (training.n_restarts, training.pool.take_metrics()["ray/nodes"]) == ([0, 1], 1)
    training.lose_server()
    training.pool._follow_nodes()
    state = training.server.state
    assert (state.num_timesteps, state.last_numbers) == (24, {0: 3, 1: -1})
    # It counts its pushes from one
    training.numbers[1] = 0
    training.push(1)
    assert (state.num_timesteps, state.last_numbers) == (28, {0: 3, 1: 1})


def test_the_parameters_stay_the_same_during_a_callback(make_training):
    training = make_training(outer_learning_rate=1.0)
    batches = training.begin()
    training.push(0)
    next(batches)
    for _ in range(3):
        training.push(1)
        training.pool.refresh()
        assert training.has_changed_by(2.0)
    next(batches)
    training.pool.refresh()
    assert training.has_changed_by(4.0)
    # The end is what all nodes have learned
    training.push(0)
    training.pool.stop()
    assert training.has_changed_by(5.0)


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_server_that_is_away_at_the_end(looked_at, make_training):
    training = make_training(outer_learning_rate=1.0, checkpoint_interval=10)
    batches = training.begin()
    training.push(0)
    training.now = 11
    next(batches)
    training.push(0, change=7.0)
    next(batches)
    if looked_at:
        training.now = 12
        training.pool.refresh()
    training.env.server._methods = None
    with pytest.warns(UserWarning, match="was away when the training ended.*checkpoint_interval=10 seconds"):
        training.pool.stop()
    assert training.has_changed_by(8.0 if looked_at else 1.0)


def test_a_node_that_joins_late_has_a_target_network_of_the_present(monkeypatch, make_training):
    training = make_training()
    training.pool._num_timesteps = 50_990
    training.pool._start_node(1)
    recipe = training.env.nodes[1].recipes[-1]
    # 51 000 steps later, with an interval of 10 000: the target networks of all are those of step 50 000 or later
    training.model.target_update_interval = 10_000
    server = ParameterServer()
    values = training.start + 5.0
    server.load(
        ServerState(values, [], {}, [2, 2], 51_000, 10**6, 10**6, epochs={1: 1}), ExchangeSettings(sync_interval=20)
    )
    monkeypatch.setattr(exchange, "import_ray", FakeRay)
    late = training.model._make_node_recipe(1, 10**6)
    assert recipe.num_timesteps == late.num_timesteps == 0
    model = types.SimpleNamespace(seen=None)

    class Look(NodeCallback):
        def _on_step(self):
            model.seen = read_values(list(self.model.q_net_target.parameters()))
            model.progress = self.model.get_workers()[1].progress_remaining
            return False

    late.lanes = range(2, 4)
    late.node, late.epoch = 1, 1
    built = late.build(make_vec_env("CartPole-v1", 2))
    way = DeltaExchange(Actor(server), 1, 1, built)
    built.learn(10**6, Look(way), log_interval=None, reset_num_timesteps=False)
    np.testing.assert_allclose(model.seen, values, atol=1e-3)
    assert built.num_timesteps > 51_000
    # For the learning rate and epsilon of its first step, too
    assert model.progress == pytest.approx(1 - 51_000 / 10**6)


def test_the_last_deltas_are_averaged_as_all_before(make_training):
    """Also when other nodes have ended already."""
    training = make_training(total=16)
    training.begin()
    changes = []
    for _ in range(2):
        before = training.server.state.values[0]
        for node in (0, 1):
            training.push(node)
        changes.append(float(training.server.state.values[0] - before))
    assert training.push(0, n_steps=0).is_over
    assert changes == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("n_workers", "n_multiplications", "expected"),
    [("auto", SMALL_NETWORK, None), ("auto", SMALL_NETWORK - 1, 1), (2, SMALL_NETWORK, 2), (3, 1, 3)],
)
def test_workers_of_nodes_are_for_their_cpus(n_workers, n_multiplications, expected, monkeypatch):
    """However many the driver has."""
    monkeypatch.setattr(parallelism, "count_usable_cores", lambda: 1)
    env = make_vec_env("CartPole-v1", 4)
    assert count_workers_of_nodes(n_workers, env, n_multiplications) == expected


def test_targets_that_are_never_updated(value_based):
    model = value_based("MlpPolicy", "CartPole-v1", n_envs=2, tau=0.0)
    assert ExchangeSettings().with_sync_interval(8, [1] * 4, model._longest_sync_interval).sync_interval == 500


def test_what_a_snapshot_plays_is_what_is_saved(make_training):
    """The parameters are the server's."""
    training = make_training(outer_learning_rate=1.0)
    batches = training.begin()
    training.push(0)
    next(batches)
    training.model._pool = training.pool
    snapshot = Snapshot(training.model, with_file=True)
    assert training.has_changed_by(1.0)
    training.model._pool = None
    played = snapshot._player.policy.state_dict()
    snapshot._file.seek(0)
    saved = AsyncOneStepQ.load(snapshot._file).policy.state_dict()
    assert all(th.equal(played[name], saved[name]) for name in saved)
    np.testing.assert_allclose(read_values(list(snapshot._player.q_net.parameters())), training.start + 1.0, atol=1e-5)


@pytest.mark.parametrize("error", [ActorError, LostError, MemoryError_, MachineError, OSError])
def test_nodes_ask_again_if_an_answer_is_lost(error, monkeypatch):
    """With the server, or with a machine while it is on its way. The push is applied once."""
    server, failures = ParameterServer(), [error, error]

    class Unreliable(ParameterServer):
        def exchange(self, push, seconds=0.0):
            answer = server.exchange(push, seconds)
            if failures:
                raise failures.pop()
            return answer

    model = AsyncOneStepQ("MlpPolicy", make_vec_env("CartPole-v1", 2), policy_kwargs={"net_arch": [4]}, n_workers=1)
    start = read_values(model.list_learned_parameters())
    server.load(ServerState(start, [], {}, [2], 0, 40, 40), ExchangeSettings(sync_interval=4))
    monkeypatch.setattr(exchange, "import_ray", FakeRay)
    way = DeltaExchange(Actor(Unreliable()), 0, 0, model)
    model.learn(10**6, NodeCallback(way), log_interval=None)
    assert failures == [] and server.state.num_timesteps == 40 == sum(len(r.dones) for r in server._reports)
    np.testing.assert_allclose(server.state.values, read_values(model.list_learned_parameters()), atol=1e-5)


def test_a_server_that_was_started_again_has_the_checkpoints_parameters(make_training):
    training = make_training(outer_learning_rate=1.0, checkpoint_interval=10)
    batches = training.begin()
    training.push(0, change=2.0)
    training.now = 11
    next(batches)
    training.push(0, change=7.0)
    training.lose_server()
    training.pool._take_news()
    np.testing.assert_allclose(training.server.state.values, training.start + 2.0, atol=1e-5)
    training.push(1, change=1.0)
    training.pool.stop()
    assert training.has_changed_by(3.0)


def test_a_server_that_never_comes_back(make_training):
    training = make_training()
    batches = training.begin()
    training.push(0)
    next(batches)
    training.env.server._methods = None
    for training.now in (1, 100):
        assert training.pool._take_news() is False
    training.now = 102
    with pytest.raises(RuntimeError, match="server of the nodes has been away for node_timeout=100 seconds"):
        next(batches)


def test_a_server_that_was_started_again_promises_nothing_to_a_node_that_cannot_start(make_training):
    training = make_training(total=40)
    batches = training.pool.batches()
    pull = training.push(0, change=None, n_steps=0)
    training.push(0)
    next(batches)
    training.lose_server()
    training.pool._take_news()
    while not pull.is_over:
        pull = training.push(0, n_steps=2 * pull.n_granted)
    assert sum(len(batch) for batch in batches) == 36


def test_the_last_steps_need_not_be_those_of_a_node_that_cannot_start():
    """Lanes of unequal numbers: those of the other node do not add up to the last step."""
    server = ParameterServer()
    server.load(ServerState(np.zeros(1, np.float32), [], {}, [6, 2], 0, 11, 16), ExchangeSettings(sync_interval=6))
    n_steps, pulls = 0, []
    for number in range(4):
        report = Report(np.zeros(n_steps, bool))
        pulls.append(server.exchange(Push(0, 0, number, 0, None, [], {}, report)))
        n_steps = 6 * pulls[-1].n_granted
        if pulls[-1].is_over:
            break
    assert pulls[-1].is_over and server.state.num_timesteps == 12


def test_a_node_that_waits_gets_no_parameters(make_training):
    training = make_training(total=4)
    assert training.push(0, change=None, n_steps=0).values is not None
    waits = training.push(1, change=None, n_steps=0)
    assert (waits.n_granted, waits.values, waits.is_over) == (0, None, False)
    over = training.push(0)
    assert over.is_over and over.values is not None


class FullCluster(FakeRay):
    """Has no CPU for nodes: whoever gives no timeout waits forever."""

    def get(self, request, timeout=None):
        assert timeout is not None
        raise HangError

    def cluster_resources(self):
        return {"CPU": 2.0}

    def available_resources(self):
        return {}


def test_nodes_that_wait_for_a_cpu_between_trainings(monkeypatch):
    """Others may have taken those of processes that have ended."""
    monkeypatch.setattr(ray_vec_env, "import_ray", FullCluster)
    env, remote = FakeLanes(), types.SimpleNamespace(remote=lambda *args: "waits")
    env.closed, env._start_timeout = False, 5.0
    for node in env.nodes:
        node.actor = types.SimpleNamespace(get_spaces=remote, reset=remote)
        node.ask = lambda method, *args, **kwargs: "waits"
    model = AsyncOneStepQ("MlpPolicy", env)
    questions = {
        "made": [partial(model.learn, 100), partial(env.env_is_wrapped, gym.Wrapper), env.get_images],
        "reset": [env.reset],
    }
    for what, asked in questions.items():
        for ask in asked:
            with pytest.raises(RuntimeError) as error:
                ask()
            assert str(error.value) == (
                f"2 nodes have not {what} their envs within start_timeout=5 seconds. Each needs a free CPU of Ray's "
                "cluster, of whose 2 CPUs 0 are free."
            )
    env.closed = True


def test_lanes_that_are_closed_or_copied():
    """Ray would start another cluster for the first, and end the nodes when the second is forgotten."""
    env = FakeLanes()
    env.nodes, env._start_timeout = [], 1.0
    for use in (env.reset, env.get_images, env.restart_dead_nodes, lambda: env.env_method("close")):
        with pytest.raises(RuntimeError, match="is closed: make it anew"):
            use()
    with pytest.raises(TypeError, match="can't be copied: to copy a model that has one, save and load it"):
        pickle.dumps(env)


def make_cartpole():
    return gym.make("CartPole-v1")


def learn_on_a_node(model, node, monkeypatch, **settings):
    """Let a node that has all lanes take 80 steps; returns the server that it learns with."""
    monkeypatch.setattr(exchange, "import_ray", FakeRay)
    server, settings = ParameterServer(), ExchangeSettings(**{"sync_interval": 20, **settings})
    recipe = model._make_node_recipe(1, 80)
    recipe.exchange, recipe.lanes = settings.exchange, range(model.n_envs)
    recipe.wrappers = pack_wrappers(model.env, recipe.lanes)
    values, moments = read_values(model.list_learned_parameters()), read_moments(model.get_vec_normalize_env())
    state = ServerState(values, [], moments, [model.n_envs], 0, 80, 80)
    server.load(state, settings, (recipe.model_class, recipe.model))
    assert node.learn(cloudpickle.loads(cloudpickle.dumps(recipe)), Actor(server)) is None
    return server


@pytest.mark.parametrize("exchange_name", EXCHANGES)
def test_frozen_parameters_stay_frozen_on_nodes(exchange_name, algorithm, monkeypatch):
    """Files of the model do not tell. On the server, AdamW would change those whose gradients are zero."""
    policy_kwargs = {"net_arch": [4], "optimizer_class": th.optim.AdamW}
    model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", 2), policy_kwargs=policy_kwargs, seed=0)
    parameters = model.list_learned_parameters()
    for parameter in parameters[:2]:
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in parameters]
    server = learn_on_a_node(model, Node([make_cartpole] * 2), monkeypatch, exchange=exchange_name)
    store_values(parameters, server.state.values)
    are_same = [th.equal(one, two) for one, two in zip(before, parameters, strict=True)]
    assert are_same == [True] * 2 + [False] * (len(parameters) - 2)


class CountsResets(gym.Wrapper):
    n_resets = 0

    def reset(self, **kwargs):
        self.n_resets += 1
        return super().reset(**kwargs)


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize(("is_stepped", "n_resets"), [(False, 1), (True, 2)])
def test_nodes_go_on_from_the_drivers_reset(is_stepped, n_resets, vec_env_cls, monkeypatch):
    """Unless somebody has stepped the lanes since. ``Monitor`` refuses a second reset if it is told to."""

    def make_env():
        return monitor.Monitor(CountsResets(make_cartpole()), allow_early_resets=is_stepped)

    model = AsyncOneStepQ("MlpPolicy", make_vec_env("CartPole-v1", 2), policy_kwargs={"net_arch": [4]}, seed=0)
    node = Node([make_env] * 2, vec_env_cls)
    node.reset([1, 2], [{}, {}])
    if is_stepped:
        node.call("step", np.zeros(2, int))
    server = learn_on_a_node(model, node, monkeypatch)
    n_episodes = sum(int(report.dones.sum()) for report in server._reports)
    assert sum(node.call("get_attr", "n_resets")) == 2 * n_resets + n_episodes
    node.call("close")


def test_statistics_have_each_observation_once(monkeypatch):
    env = VecNormalize(make_vec_env("CartPole-v1", 2))
    model = AsyncOneStepQ("MlpPolicy", env, policy_kwargs={"net_arch": [4]}, seed=0)
    node = Node([make_cartpole] * 2)
    env.reset(), node.reset([0, 1], [{}, {}])
    server = learn_on_a_node(model, node, monkeypatch)
    assert server.state.moments["observations"].count == pytest.approx(2 + 80, abs=0.01)


def test_lanes_are_reset_after_a_training_that_has_not_begun(make_training):
    node, recipe = Node([lambda: CountsResets(make_cartpole())]), make_training().model._make_node_recipe(1, 80)
    recipe.lanes, recipe.exchange = range(1), "of another version"
    for _ in range(2):
        node.reset([None], [{}])
        assert isinstance(node.learn(recipe, None), KeyError)
    assert node.call("get_attr", "n_resets") == [2]


def test_nodes_have_the_models_schedule(make_training):
    """In the place of which a file has that of ``learning_rate``."""
    model = make_training().model
    model.lr_schedule = lambda progress: 0.5 * progress
    recipe = cloudpickle.loads(cloudpickle.dumps(model._make_node_recipe(1, 80)))
    recipe.lanes = range(2)
    assert recipe.build(make_vec_env("CartPole-v1", 2)).lr_schedule(0.5) == 0.25


@pytest.mark.filterwarnings("ignore:AsyncOneStepQ learns from a single env lane")
@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        (range(2, 4), "node 1, where lanes 0 to 1 are lanes 2 to 3 of all lanes"),
        (range(7, 8), "node 1, where lane 0 is lane 7 of all lanes"),
    ],
)
def test_exceptions_say_how_a_node_numbers_its_lanes(lanes, expected, make_training, monkeypatch):
    monkeypatch.setattr(exchange, "import_ray", FakeRay)

    class Breaks(gym.Wrapper):
        def step(self, action):
            raise ZeroDivisionError

    server = ParameterServer()
    training = make_training()
    recipe = training.model._make_node_recipe(1, 80)
    recipe.node, recipe.lanes, recipe.num_envs = 1, lanes, 8
    server.load(ServerState(training.start, [], {}, [4, len(lanes)], 0, 80, 80), ExchangeSettings(sync_interval=20))
    node = Node([make_cartpole] * (len(lanes) - 1) + [lambda: Breaks(make_cartpole())])
    exception = node.learn(recipe, Actor(server))
    assert [exception.__notes__[0], exception.__notes__[-1]] == [
        f"Raised in env lane {len(lanes) - 1}.",
        f"It was raised on {expected}.",
    ]


def test_exceptions_that_cannot_be_sent():
    class Local(Exception):
        pass

    # Ray sends a class that the other process can't import, such as one of the main script, too
    for sendable in (ValueError("an env"), Local("an env")):
        assert make_picklable(sendable) is sendable
    exception = Local("an env")
    exception.lock = threading.Lock()
    exception.add_note("in lane 1")
    substitute = make_picklable(exception)
    assert (type(substitute), str(substitute), substitute.__notes__) == (RuntimeError, "Local: an env", ["in lane 1"])


class FakeConnection:
    """Ray as a connection to a cluster."""

    def __init__(self):
        self.number, self.connected, self.n_shutdowns = 0, False, 0
        self.n_cpus = []

    def init(self, num_cpus=None, **arguments):
        self.number, self.connected = self.number + 1, True
        self.n_cpus.append(num_cpus)
        os.environ["RAY_AUTH_MODE"] = "token"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def is_initialized(self):
        return self.connected

    def shutdown(self):
        self.connected, self.n_shutdowns = False, self.n_shutdowns + 1

    def get_runtime_context(self):
        return types.SimpleNamespace(get_worker_id=lambda: str(self.number))


@pytest.fixture
def connection(monkeypatch):
    ray = FakeConnection()
    monkeypatch.setattr(cluster, "import_ray", lambda: ray)
    monkeypatch.setattr(cluster, "start_ray_on_loopback", ray.init)
    monkeypatch.setattr(cluster, "_users", set())
    monkeypatch.setattr(cluster, "_connection", None)
    monkeypatch.setattr(cluster, "_set_by_ray", set())
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield ray
    signal.signal(signal.SIGTERM, before)
    os.environ.pop("RAY_AUTH_MODE", None)


def test_the_last_user_ends_what_was_started(connection):
    def handler(number, frame):
        raise AssertionError

    signal.signal(signal.SIGTERM, handler)
    for user in ("one", "two"):
        cluster.enter_cluster(user, 1)
    assert signal.getsignal(signal.SIGTERM) is handler
    cluster.leave_cluster("one")
    assert connection.is_initialized()
    cluster.leave_cluster("two")
    assert connection.n_shutdowns == 1 and "RAY_AUTH_MODE" not in os.environ


def test_a_cluster_of_our_own_has_the_cores_that_this_process_may_use(connection, monkeypatch):
    monkeypatch.setattr(cluster, "count_usable_cores", lambda: 3)
    for n_nodes in (2, 4):
        cluster.enter_cluster("one", n_nodes)
        cluster.leave_cluster("one")
    assert connection.n_cpus == [3, 4]


def test_a_cluster_that_somebody_else_has_started_goes_on(connection, monkeypatch):
    def fail(**arguments):
        raise ConnectionError

    # The first attempt fails, then the user connects
    monkeypatch.setattr(cluster, "start_ray_on_loopback", fail)
    with pytest.raises(ConnectionError):
        cluster.enter_cluster("one", 1)
    connection.init()
    cluster.enter_cluster("one", 1)
    cluster.leave_cluster("one")
    assert connection.n_shutdowns == 0
    connection.shutdown()
    # The user ends ours, and connects
    monkeypatch.setattr(cluster, "start_ray_on_loopback", connection.init)
    cluster.enter_cluster("one", 1)
    connection.shutdown()
    connection.init()
    cluster.leave_cluster("one")
    assert connection.is_initialized() and connection.n_shutdowns == 2


def test_settings_that_a_callback_changes(make_training):
    training = make_training()
    for name in ("gamma", "learning_rate", "The parameters"):
        with pytest.raises(RuntimeError, match=f"{name} can't be changed while the nodes of a RayVecEnv learn"):
            training.pool.check_change(name)
    training.pool.stop()
    # By on_training_end(), say
    training.pool.check_change("The parameters")


@pytest.mark.parametrize("told", [(0, 1), (1,)])
def test_a_server_that_dies_after_it_has_ended_the_training(told, make_training):
    """The driver does not know of the last steps, and has one node or both take them again."""
    training = make_training(total=16)
    batches = training.begin()
    for node in (0, 1):
        training.push(node)
    # While a callback takes its time
    next(batches)
    for node in (0, 1):
        training.push(node)
    assert all(training.push(node, n_steps=0).is_over for node in told)
    training.ray.ended.update(("learning", 2 * node, 0) for node in told)
    training.lose_server()
    batch = next(batches)
    for _ in range(3):
        training.pool._follow_nodes()
    assert training.n_restarts == [node in told for node in (0, 1)]
    training.numbers.update(dict.fromkeys(told, 0))
    pulls = {node: training.push(node, n_steps=0) for node in (0, 1)}
    assert [pull.n_granted for pull in pulls.values()] == [2, 2]
    for node in (0, 1):
        training.push(node)
    assert sum(len(batch) for batch in batches) + len(batch) + 4 == 16
    assert len(training.env.nodes[1].recipes) == 2


def test_what_nodes_do_during_a_long_callback_is_known_when_the_server_dies(make_training):
    training = make_training(read_interval=0.01)
    batches = training.begin()
    training.push(0)
    next(batches)
    training.push(0)
    training.push(1)
    wait_until(lambda: not training.server._reports)
    training.lose_server()
    next(batches), next(batches)
    training.pool._take_news()
    assert training.server.state.num_timesteps == 12
    training.pool.stop()
    assert not training.pool._reader._thread.is_alive()


def test_a_checkpoint_is_made_during_a_long_callback(make_training):
    training = make_training(read_interval=0.01, checkpoint_interval=10, outer_learning_rate=1.0)
    batches = training.begin()
    training.push(0)
    next(batches)
    training.push(0, change=2.0)
    training.now = 11
    wait_until(lambda: training.pool._checkpoint_time == 11)
    training.lose_server()
    training.pool._follow_nodes()
    np.testing.assert_allclose(training.server.state.values, training.start + 3.0, atol=1e-5)
    training.pool.stop()


def test_nodes_are_not_blamed_for_a_server_that_was_away(make_training):
    training = make_training()
    batches = training.begin()
    for node in (0, 1):
        training.push(node)
    next(batches), next(batches)
    training.now = 99
    training.lose_server()
    training.pool._follow_nodes()
    training.now = 102
    training.pool._follow_nodes()
    assert training.n_restarts == [0, 0]
    training.now = 200
    training.push(0)
    training.pool._follow_nodes()
    assert training.n_restarts == [0, 1]


def test_a_server_that_hangs(make_training):
    training = make_training()
    batches = training.begin()
    training.push(0)
    next(batches)

    def hang(with_state):
        training.now += 101
        raise HangError

    training.server.take_news = hang
    with pytest.raises(RuntimeError, match="server of the nodes has been away for node_timeout=100 seconds"):
        next(batches)


@pytest.mark.parametrize("where", ["answers", "failed"])
def test_a_node_fails_while_a_callback_ends_the_training(where, make_training):
    training = make_training()
    batches = training.begin()
    training.push(0)
    next(batches)
    requests = [("learning", 0, 0), ("learning", 2, 0)]
    training.ray.ended.update(requests)
    training.ray.failed[requests[0]] = ActorError()
    getattr(training.ray, where)[requests[1]] = ZeroDivisionError("in lane 2")
    training.pool.stop()
    with pytest.raises(ZeroDivisionError, match="in lane 2"):
        training.pool.check()


def test_a_node_that_waits_for_a_cpu_does_not_learn(make_training):
    training = make_training()
    batches = training.pool.batches()
    training.push(0)
    next(batches)
    assert training.pool.take_metrics()["ray/nodes"] == 1
    training.ray.ended.add(("starting", 2, 0))
    assert training.pool.take_metrics()["ray/nodes"] == 2


def test_statistics_are_those_of_the_parameters_of_the_end(make_training, monkeypatch):
    stored = []
    monkeypatch.setattr(ray_pool, "store_moments", lambda normalize, moments: stored.append((normalize, moments)))
    training = make_training()
    training.begin()
    training.pool._normalize = "statistics"
    training.server.state.moments = {"obs": 1.0}
    training.pool.stop()
    assert stored == [("statistics", {"obs": 1.0})]


def ask_in_a_callback(training, monkeypatch, failures):
    """Ask the lanes of node 1, whose process ends or hangs as often as there are failures; returns the answer."""
    monkeypatch.setattr(ray_vec_env, "import_ray", lambda: training.ray)
    training.env.closed = False
    node, answers = training.env.nodes[1], list(failures)

    def answer():
        if answers:
            raise answers.pop(0)
        return [f"of epoch {node.epoch}"]

    node.ask = lambda method, *args, **kwargs: lambda: answer()
    return training.env.env_method("level", indices=[2])


def test_a_callback_asks_a_node_that_has_ended(make_training, monkeypatch):
    training = make_training()
    batches = training.begin()
    training.push(0)
    next(batches)
    request = ("learning", 2, 0)
    training.ray.ended.add(request)
    training.ray.failed[request] = ActorError("its process was killed")
    learning_on(training.env).add(Call(sys._getframe()))
    with training.model._gate.closed():
        assert ask_in_a_callback(training, monkeypatch, [ActorError(), HangError(), MemoryError_()]) == ["of epoch 1"]
    assert training.n_restarts == [0, 1] and len(training.env.nodes[1].recipes) == 2
    training.push(0)
    assert len(next(batches)) == 4


def test_a_callback_asks_a_node_that_hangs(make_training, monkeypatch):
    training = make_training()
    batches = training.begin()
    training.push(0)
    next(batches)
    training.push(0)
    training.now = 101
    learning_on(training.env).add(Call(sys._getframe()))
    assert ask_in_a_callback(training, monkeypatch, [HangError(), ActorError()]) == ["of epoch 1"]
    assert training.n_restarts == [0, 1]


def give_statistics(training):
    """Let a training have running statistics; returns the wrapper that keeps them, and another that has newer ones."""
    normalize, newest = (VecNormalize(make_vec_env("CartPole-v1", 4)) for _ in range(2))
    newest.obs_rms.update(np.full((4, 4), 3.0))
    training.pool._normalize, training.server.state.moments = normalize, read_moments(normalize)
    return normalize, newest


def test_what_a_callback_sees_stays_the_same_while_it_waits_for_an_answer(make_training, monkeypatch):
    training = make_training(outer_learning_rate=1.0)
    normalize, newest = give_statistics(training)
    batches = training.begin()
    training.push(0)
    next(batches)
    training.pool.refresh()
    training.server.state.moments = read_moments(newest)
    training.push(1)
    before = normalize.obs_rms.copy()
    learning_on(training.env).add(Call(sys._getframe()))
    assert ask_in_a_callback(training, monkeypatch, [HangError(), HangError()]) == ["of epoch 0"]
    training.pool.refresh()
    assert training.has_changed_by(1.0)
    np.testing.assert_array_equal(normalize.obs_rms.mean, before.mean)
    next(batches)
    training.pool.refresh()
    assert training.has_changed_by(2.0)
    np.testing.assert_allclose(normalize.obs_rms.mean, newest.obs_rms.mean)


def test_statistics_that_have_come_during_the_last_callback(make_training, monkeypatch):
    """The server is away when the training ends."""
    training = make_training()
    normalize, newest = give_statistics(training)
    batches = training.begin()
    training.push(0)
    next(batches)
    training.server.state.moments = read_moments(newest)
    learning_on(training.env).add(Call(sys._getframe()))
    ask_in_a_callback(training, monkeypatch, [HangError()])
    training.env.server._methods = None
    with pytest.warns(UserWarning, match="was away when the training ended"):
        training.pool.stop()
    np.testing.assert_allclose(normalize.obs_rms.mean, newest.obs_rms.mean)


@pytest.mark.parametrize(
    ("where", "what", "expected"),
    [
        ("answers", AttributeError("of an env"), AttributeError("of an env")),
        (
            "failed",
            ActorError("its process was killed"),
            RuntimeError("Node 1 has ended (its process was killed), after max_restarts=0 restarts of nodes."),
        ),
    ],
)
def test_what_ends_the_training_does_so_if_a_callback_has_caught_it(where, what, expected, make_training, monkeypatch):
    """SB3's ``VecEnv.has_attr()`` catches any ``AttributeError``."""
    training = make_training(max_restarts=0)
    batches = training.begin()
    training.push(0)
    next(batches)
    request = ("learning", 2, 0)
    training.ray.ended.add(request)
    getattr(training.ray, where)[request] = what
    learning_on(training.env).add(Call(sys._getframe()))
    caught = []
    for ask in (partial(ask_in_a_callback, training, monkeypatch, [HangError()]), partial(next, batches)):
        training.push(0)
        with pytest.raises((AttributeError, RuntimeError)) as error:
            ask()
        caught.append(error.value)
    assert caught[0] is caught[1]
    assert repr(caught[0]) == repr(expected)


def test_another_thread_asks_a_node_that_has_ended(make_training, monkeypatch):
    """The nodes are the calling thread's."""
    training = make_training()
    training.push(0)
    next(training.begin())
    with pytest.raises(RuntimeError, match="A node's process has ended, and will be replaced: ask again"):
        ask_in_a_callback(training, monkeypatch, [HangError(), ActorError()])
    assert training.n_restarts == [0, 0]


def test_another_thread_asks_a_node_that_takes_its_time(make_training, monkeypatch):
    training = make_training()
    training.push(0)
    next(training.begin())
    assert ask_in_a_callback(training, monkeypatch, [HangError(), HangError()]) == ["of epoch 0"]
    assert training.n_restarts == [0, 0]


def test_the_training_goes_on_while_another_thread_waits_for_an_answer(make_training, monkeypatch):
    training = make_training()
    env, asked = training.env, threading.Event()
    monkeypatch.setattr(ray_vec_env, "import_ray", lambda: training.ray)
    env.closed = False
    env.reset = lambda: np.zeros((4, 4), np.float32)
    env.env_is_wrapped = lambda wrapper_class: [False] * 4
    model = AsyncOneStepQ("MlpPolicy", env)

    def answer():
        asked.set()
        wait_until(lambda: model.num_timesteps == 40)
        return ["yes"]

    class Play(BaseCallback):
        def _on_rollout_start(self):
            training.push(0, change=None)

        def _on_step(self):
            if self.n_calls == 1:
                answers.append(executor.submit(env.env_method, "level", indices=[2]))
                assert asked.wait(DEADLINE)
            return True

    env.nodes[1].ask = lambda method, *args, **kwargs: answer
    answers = []
    with ThreadPoolExecutor(1) as executor:
        model.learn(40, Play())
    assert answers[0].result() == ["yes"]


def test_lanes_of_a_node_that_was_restarted_go_on_with_their_monitor_files(tmp_path, monkeypatch):
    # In a process of its own, nobody else's files would be concerned
    monkeypatch.setattr(monitor, "ResultsWriter", monitor.ResultsWriter)
    for is_first in (True, False):
        node = Node([lambda: monitor.Monitor(gym.make("CartPole-v1"), str(tmp_path / "0"))], is_first=is_first)
        node.reset([1], [{}])
        while not node.call("step", np.zeros(1, int))[2].any():
            pass
        node.call("close")
    lines = (tmp_path / "0.monitor.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[2].split(",")[:2] == lines[3].split(",")[:2]


def test_processes_of_lanes_do_not_outlive_a_node_that_is_killed():
    node = Node([lambda: gym.make("CartPole-v1")], SubprocVecEnv)
    (process,) = node._env.processes
    node.kill_lanes()
    process.join(DEADLINE)
    assert process.exitcode == -signal.SIGKILL
    # Lanes on threads have none
    Node([lambda: gym.make("CartPole-v1")]).kill_lanes()


class Own(DummyVecEnv):
    """Can't be split."""


@pytest.mark.parametrize(
    ("vec_env_cls", "n_cpus", "n_cores", "expected"),
    [(DummyVecEnv, 2, 8, 2), (DummyVecEnv, 8, 3, 3), (DummyVecEnv, 8, 8, 4), (Own, 2, 8, 1)],
)
def test_a_node_has_a_worker_for_each_core_that_it_may_use(
    vec_env_cls, n_cpus, n_cores, expected, make_training, monkeypatch
):
    monkeypatch.setattr("sb3_async1step.nodes.node.count_usable_cores", lambda: n_cores)
    recipe = make_training().model._make_node_recipe(None, 100)
    recipe.lanes, recipe.n_cpus = range(4), n_cpus
    assert recipe.build(make_vec_env("CartPole-v1", 4, vec_env_cls=vec_env_cls)).n_workers == expected


def test_an_interrupt_of_close(monkeypatch):
    ended = []

    class Interrupted(FakeRay):
        def wait(self, requests, num_returns=1, timeout=None):
            raise KeyboardInterrupt

        def is_initialized(self):
            return True

        def kill(self, actor):
            ended.append(actor)

    monkeypatch.setattr(ray_vec_env, "import_ray", Interrupted)
    monkeypatch.setattr(ray_vec_env, "leave_cluster", ended.append)
    env = FakeLanes()
    env.closed, env.server = False, "server"
    for node in env.nodes:
        node.ask, node.end = lambda method: None, partial(ended.append, node)
    nodes = env.nodes
    with pytest.raises(KeyboardInterrupt):
        env.close()
    assert ended == [*nodes, "server", env]
    env.close()
