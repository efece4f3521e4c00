"""The driver of a training on Ray, whose nodes and clock are played here. ``test_ray.py`` has real ones."""

import pickle
import types

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_async1step import AsyncOneStepQ, RayVecEnv
from sb3_async1step.common import lanes as common_lanes
from sb3_async1step.common.lanes import count_workers_of_nodes
from sb3_async1step.common.parallelism import SMALL_NETWORK
from sb3_async1step.common.snapshot import Snapshot
from sb3_async1step.nodes import exchange, ray_pool
from sb3_async1step.nodes.cluster import Place
from sb3_async1step.nodes.exchange import DeltaExchange
from sb3_async1step.nodes.messages import Learned, Push, Report
from sb3_async1step.nodes.node import NodeCallback
from sb3_async1step.nodes.parameters import read_values
from sb3_async1step.nodes.ray_pool import RayWorkerPool
from sb3_async1step.nodes.server import ParameterServer, ServerState
from sb3_async1step.nodes.settings import ExchangeSettings


class ActorError(Exception):
    """What Ray raises when a process is away."""


class FakeRay:
    """Requests are functions that answer when they are asked, or tokens of what has not ended yet."""

    exceptions = types.SimpleNamespace(RayActorError=ActorError, RayTaskError=ZeroDivisionError)

    def __init__(self):
        self.ended = set()

    def get(self, request):
        return request() if callable(request) else None

    def wait(self, requests, num_returns=1, timeout=None):
        return [request for request in requests if request in self.ended], []


class Actor:
    """Calls the methods of an object as Ray calls an actor's."""

    def __init__(self, methods):
        self._methods = methods

    def __getattr__(self, name):
        def ask(*arguments):
            def answer():
                if self._methods is None:
                    raise ActorError
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
    :param settings: of the exchanges
    """

    def __init__(self, monkeypatch, total=10**6, **settings):
        self.now, self.ray = 0.0, FakeRay()
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=lambda seconds: None)
        monkeypatch.setattr(ray_pool, "time", clock)
        monkeypatch.setattr(ray_pool, "import_ray", lambda: self.ray)
        self.model = AsyncOneStepQ("MlpPolicy", make_vec_env("CartPole-v1", 4), policy_kwargs={"net_arch": [4]}, seed=0)
        self.start = read_values(self.model.list_learned_parameters())
        self.env, self.server = FakeLanes(**settings), ParameterServer()
        self.env.server = Actor(self.server)
        self.pool = RayWorkerPool(
            self.env,
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
    return lambda **settings: Training(monkeypatch, **settings)


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
            return False

    late.lanes = range(2, 4)
    late.node, late.epoch = 1, 1
    built = late.build(make_vec_env("CartPole-v1", 2))
    way = DeltaExchange(Actor(server), 1, 1, built)
    built.learn(10**6, Look(way), log_interval=None, reset_num_timesteps=False)
    np.testing.assert_allclose(model.seen, values, atol=1e-3)
    assert built.num_timesteps > 51_000


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
    monkeypatch.setattr(common_lanes, "count_usable_cores", lambda: 1)
    env = make_vec_env("CartPole-v1", 4)
    assert count_workers_of_nodes(n_workers, env, n_multiplications) == expected


def test_targets_that_are_never_updated(value_based):
    model = value_based("MlpPolicy", "CartPole-v1", n_envs=2, tau=0.0)
    assert ExchangeSettings().with_sync_interval(8, 4, model._longest_sync_interval).sync_interval == 500


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
