"""The parts of training on several machines, without a cluster. ``test_ray.py`` has trainings."""

import io
import math
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    unwrap_vec_wrapper,
)

from sb3_async1step import A3C, AsyncOneStepQ, AsyncOneStepSarsa, RayVecEnv, SharedRMSprop
from sb3_async1step.nodes import cluster
from sb3_async1step.nodes.cluster import place_lanes
from sb3_async1step.nodes.exchange import GradientMean
from sb3_async1step.nodes.messages import Learned, Push, Report, ServerState
from sb3_async1step.nodes.moments import Moments, read_moments, store_moments
from sb3_async1step.nodes.parameters import read_values, store_values
from sb3_async1step.nodes.reported_steps import NotCarried, ReportedSteps
from sb3_async1step.nodes.server import ParameterServer
from sb3_async1step.nodes.settings import ExchangeSettings
from sb3_async1step.nodes.wrappers import pack_wrappers, wrap
from sb3_async1step.workers.transitions import UpdateStats
from sb3_async1step.zoo import cli


def report(n_steps, dones=()):
    return Report(np.isin(np.arange(n_steps), dones), [{"end": i} for i in dones], [])


def push(node=0, number=1, version=0, delta=(1.0, 2.0), n_steps=10, epoch=0, moments=None):
    learned = None if delta is None else Learned(np.array(delta, dtype=np.float32))
    return Push(node, epoch, number, version, learned, [], moments or {}, report(n_steps))


@pytest.fixture
def make_server():
    def make(n_lanes=(2, 2), total=40, last=40, values=(10.0, 20.0), moments=None, **settings):
        server = ParameterServer()
        start = np.array(values, dtype=np.float32)
        settings = ExchangeSettings(**{"sync_interval": 10, "outer_learning_rate": 1.0, **settings})
        server.load(ServerState(start, [], moments or {}, list(n_lanes), 0, total, last), settings)
        return server

    return make


# ---------------------------------------------------------------------- the server


def test_deltas_add_up(make_server):
    server = make_server()
    first = server.exchange(push(0, delta=None, n_steps=0))
    server.exchange(push(1, delta=None, n_steps=0))
    assert (first.version, first.values.tolist(), first.num_timesteps) == (0, [10.0, 20.0], 0)
    second = server.exchange(push(0, 2, delta=(1.0, -2.0)))
    third = server.exchange(push(1, 2, delta=(0.5, 0.5)))
    assert (second.version, second.values.tolist(), second.num_timesteps) == (1, [11.0, 18.0], 10)
    assert (third.version, third.values.tolist(), third.num_timesteps) == (2, [11.5, 18.5], 20)
    # What a node has been given does not change under its hands
    assert first.values.tolist() == [10.0, 20.0]
    assert server.take_news(False).staleness == [0, 1]


def test_by_default_the_deltas_of_the_nodes_that_learn_are_averaged(make_server):
    server = make_server(outer_learning_rate=None)
    alone = server.exchange(push(0, 1, delta=(1.0, 0.0), n_steps=0))
    assert alone.values.tolist() == [11.0, 20.0] and alone.n_granted == 5
    server.exchange(push(1, 1, delta=None, n_steps=0))
    assert server.exchange(push(0, 2, delta=(1.0, 0.0), n_steps=10)).values.tolist() == [11.5, 20.0]
    # The other one has died, beside which this was learned
    server.begin_epoch(1, 1)
    assert server.exchange(push(0, 3, delta=(1.0, 0.0), n_steps=10)).values.tolist() == [12.0, 20.0]
    assert server.exchange(push(0, 4, delta=(1.0, 0.0), n_steps=10)).values.tolist() == [13.0, 20.0]


def test_outer_learning_rate_and_momentum(make_server):
    server = make_server(outer_learning_rate=0.5, outer_momentum=0.9)
    assert server.exchange(push(number=1, delta=(1.0, 0.0))).values.tolist() == [10.5, 20.0]
    # The momentum is 0.9 * 1 + 2
    assert server.exchange(push(number=2, delta=(2.0, 0.0))).values == pytest.approx([10.5 + 0.5 * 2.9, 20.0])


def test_a_push_that_is_sent_again_is_applied_once(make_server):
    server = make_server()
    answer = server.exchange(push(number=1))
    again = server.exchange(push(number=1))
    assert again.values.tolist() == answer.values.tolist() == [11.0, 22.0]
    assert again.n_granted == answer.n_granted == 5
    assert again.num_timesteps == 10 and len(server.take_news(False).reports) == 1


def test_a_stale_push_is_dropped_and_counted(make_server):
    server = make_server(max_staleness=1)
    for number in (1, 2):
        server.exchange(push(0, number, version=number - 1))
    server.exchange(push(1, 1, version=0))
    assert server.state.values.tolist() == [12.0, 24.0]
    news = server.take_news(False)
    assert (news.n_dropped, news.staleness) == (1, [0, 0, 2])
    # Its steps were taken nevertheless
    assert news.num_timesteps == 30
    server.exchange(push(1, 2, version=2))
    assert server.state.values.tolist() == [13.0, 26.0]
    assert server.take_news(False).n_dropped == 0


def test_what_a_dead_process_has_sent_is_refused(make_server):
    server = make_server()
    server.exchange(push(0, 1))
    server.begin_epoch(0, 1)
    late = server.exchange(push(0, 2))
    assert late.is_over and late.num_timesteps == 10 and late.values.tolist() == [11.0, 22.0]
    # The new one begins with number 1 again
    assert server.exchange(push(0, 1, epoch=1)).values.tolist() == [12.0, 24.0]


def test_the_server_keeps_nothing_of_the_messages_memory(make_server):
    """They are views of Ray's store, which would keep the whole message: its parameters, until the driver asks."""
    server, sent = make_server(), replace(push(), buffers=[np.array([3.0, 4.0, 5.0])])
    server.exchange(sent)
    kept = [*(each.dones for each in server._reports), server.state.values, *server.state.buffers]
    assert [each.size for each in kept] == [10, 2, 3]
    assert server.state.buffers[0].tolist() == [3.0, 4.0, 5.0]
    message = (sent.report.dones, sent.learned.change, *sent.buffers)
    assert not any(np.shares_memory(mine, its) for mine in kept for its in message)


def test_steps_are_granted_once_until_there_are_none_left(make_server):
    server = make_server(total=40, last=40)
    numbers = {0: 0, 1: 0}

    def ask(node, n_steps):
        numbers[node] += 1
        return server.exchange(push(node, numbers[node], delta=None, n_steps=n_steps))

    assert [ask(node, 0).n_granted for node in (0, 1)] == [5, 5]
    assert ask(0, 10).n_granted == ask(0, 10).n_granted == 5
    # All 40 are taken or promised: 20 by the first node, which asked twice, and 10 to each
    waiting = ask(0, 10)
    assert (waiting.n_granted, waiting.is_over, waiting.num_timesteps) == (0, False, 30)
    # The second one dies, and the first takes its steps
    server.begin_epoch(1, 1)
    assert ask(0, 0).n_granted == 5
    end = ask(0, 10)
    assert (end.n_granted, end.is_over, end.num_timesteps) == (0, True, 40)


def test_nodes_with_unequal_numbers_of_lanes_overshoot_by_less_than_a_vector_step(make_server):
    server = make_server(n_lanes=(2, 3), total=11, last=15)
    number, n_steps = 0, 0
    while not (answer := server.exchange(push(1, number := number + 1, delta=None, n_steps=n_steps))).is_over:
        n_steps = 3 * answer.n_granted
    assert 11 <= answer.num_timesteps <= 15


def test_stopped_nodes_are_told_so(make_server):
    server = make_server()
    server.stop()
    assert server.exchange(push()).is_over


def test_a_new_server_waits_for_its_checkpoint(make_server):
    before = make_server()
    before.exchange(push(number=1))
    state = pickle.loads(pickle.dumps(before.take_news(with_state=True).state))
    server = ParameterServer()
    assert server.exchange(push(number=2)) is None and server.take_news(False) is None and server.get_values() is None
    server.begin_epoch(0, 1)
    server.load(state, before.settings)
    # The same push as before the crash
    assert server.exchange(push(number=1)).num_timesteps == 10
    assert server.exchange(push(number=2)).values.tolist() == [12.0, 24.0]


# ---------------------------------------------------------------------- gradients


def test_the_mean_of_the_gradients_takes_the_place_of_steps():
    one, two = th.nn.Parameter(th.ones(2)), th.nn.Parameter(th.ones(1))
    mean = GradientMean(th.optim.Adam([one, two], lr=0.5))
    for gradient in (1.0, 3.0):
        one.grad = th.full((2,), gradient)
        mean.step()
    assert mean.n_gradients == 2 and mean.param_groups[0]["lr"] == 0.5
    without, of_one = mean.take([two, one])
    assert without is None and of_one.tolist() == [2.0, 2.0]
    assert mean.n_gradients == 0 and one.tolist() == [1.0, 1.0] and two.tolist() == [1.0]


@pytest.mark.parametrize("optimizer_class", [SharedRMSprop, th.optim.AdamW])
def test_the_server_applies_gradients_as_the_policys_optimizer_does(algorithm, optimizer_class):
    policy_kwargs = {"net_arch": [4], "optimizer_class": optimizer_class}
    model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", 2), policy_kwargs=policy_kwargs, seed=0)
    model.learn(40)
    file = io.BytesIO()
    model.save(file)
    parameters = model.list_learned_parameters()
    state = ServerState(read_values(parameters), [], {}, [2], 0, 1000, 1000)
    settings = ExchangeSettings("gradients", sync_interval=10)

    def start(state):
        server = ParameterServer()
        server.load(state, settings, (algorithm, file.getvalue()))
        return server

    server = start(state)
    generator = th.Generator().manual_seed(0)
    for number in range(1, 5):
        learning_rate = 0.1 / number
        for parameter in parameters:
            parameter.grad = th.randn(parameter.shape, generator=generator)
        gradient = read_values([parameter.grad for parameter in parameters])
        # AdamW would decay it, and go on by its momentum
        parameters[number % 3].grad = None
        has_gradient = [parameter.grad is not None for parameter in parameters]
        model.policy.optimizer.param_groups[0]["lr"] = learning_rate
        model.policy.optimizer.step()
        learned = Learned(gradient, learning_rate, has_gradient)
        pull = server.exchange(Push(0, 0, number, number - 1, learned, [], {}, report(10)))
        np.testing.assert_array_equal(pull.values, read_values(parameters))
        # Another server goes on from the checkpoint with the same statistics
        server = start(pickle.loads(pickle.dumps(server.take_news(with_state=True).state)))
    mine, others = model.policy.optimizer.state_dict(), server.get_optimizer_state()
    assert mine["param_groups"] == others["param_groups"]
    for number, statistics in mine["state"].items():
        for name, value in statistics.items():
            assert th.equal(th.as_tensor(value), th.as_tensor(others["state"][number][name]))


def test_default_sync_intervals():
    def choose(update_interval, n_nodes, longest, **settings):
        return ExchangeSettings(**settings).with_sync_interval(update_interval, [8] * n_nodes, longest).sync_interval

    assert choose(10, 3, math.inf) == 500
    # As long as all nodes together make as many steps as lie between two updates of the target network
    assert [choose(1, n_nodes, 500) for n_nodes in (1, 2, 3, 4)] == [500, 250, 166, 125]
    assert choose(1, 4, 10_000) == 500
    # Not more often than there is something new
    assert choose(10, 4, 200) == 80
    assert choose(10, 4, 200, sync_interval=7) == 7


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [84, 80, 80]),
        ({"sync_interval": 7}, [12, 8, 7]),
        # Each node after each of its updates
        ({"exchange": "gradients"}, [60, 20, 5]),
        ({"exchange": "gradients", "sync_interval": 7}, [12, 8, 7]),
    ],
)
def test_steps_between_two_exchanges_of_nodes_with_unequal_numbers_of_lanes(settings, expected):
    n_lanes = [12, 4, 1]
    settings = ExchangeSettings(**settings).with_sync_interval(5, n_lanes, 240)
    server = ParameterServer()
    server.load(ServerState(np.zeros(1, np.float32), [], {}, n_lanes, 0, 1000, 1000), settings)
    pulls = [server.exchange(Push(node, 0, 1, 0, None, [], {}, Report())) for node in range(3)]
    assert [pull.n_granted * n for pull, n in zip(pulls, n_lanes, strict=True)] == expected


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 400), (0.1, 4000)])
def test_nodes_exchange_at_each_update_of_the_target_network(value_based, tau, expected):
    model = value_based("MlpPolicy", "CartPole-v1", n_envs=2, target_update_interval=400, tau=tau)
    assert model._longest_sync_interval == pytest.approx(expected)


def test_a3c_has_no_target_network():
    assert A3C("MlpPolicy", "CartPole-v1", n_envs=2)._longest_sync_interval == math.inf


# ---------------------------------------------------------------------- running statistics


def test_merged_statistics_are_those_of_all_data(make_server):
    rng = np.random.default_rng(0)
    start = RunningMeanStd(shape=(3,))
    start.update(rng.normal(5.0, 2.0, (20, 3)))
    server = make_server(moments={"observations": Moments.of(start)})
    everything = start.copy()
    mine = [start.copy(), start.copy()]
    known = [Moments.of(start), Moments.of(start)]
    for number in range(1, 4):
        for node in (0, 1):
            data = rng.normal(node * 10.0, 1.0 + number, (50, 3))
            mine[node].update(data)
            everything.update(data)
            gained = {"observations": Moments.of(mine[node]) - known[node]}
            answer = server.exchange(push(node, number, moments=gained))
            answer.moments["observations"].store(mine[node])
            known[node] = Moments.of(mine[node])
    answer.moments["observations"].store(mine[0])
    assert mine[0].count == pytest.approx(everything.count)
    np.testing.assert_allclose(mine[0].mean, everything.mean)
    np.testing.assert_allclose(mine[0].var, everything.var)


def test_moments_of_dict_observations():
    env = VecNormalize(DictVecEnv())
    env.obs_rms["a"].update(np.ones((4, 2)))
    other = VecNormalize(DictVecEnv())
    store_moments(other, read_moments(env))
    for key in ("a", "b"):
        np.testing.assert_allclose(other.obs_rms[key].mean, env.obs_rms[key].mean)
        np.testing.assert_allclose(other.obs_rms[key].var, env.obs_rms[key].var)
    assert read_moments(None) == {}


def DictVecEnv():
    import gymnasium as gym

    class Env(gym.Env):
        observation_space = gym.spaces.Dict(
            a=gym.spaces.Box(-1, 1, (2,), np.float32), b=gym.spaces.Box(-1, 1, (3,), np.float32)
        )
        action_space = gym.spaces.Discrete(2)

    return DummyVecEnv([Env])


# ---------------------------------------------------------------------- the rest


def test_values_make_the_round_trip():
    tensors = [th.randn(2, 3), th.randn(4).to(th.bfloat16), th.zeros(())]
    before = [tensor.clone() for tensor in tensors]
    values = read_values(tensors)
    assert values.shape == (11,) and values.dtype == np.float32
    for tensor in tensors:
        tensor.fill_(7.0)
    values.flags.writeable = False
    store_values(tensors, values)
    assert all(th.equal(one, two) for one, two in zip(tensors, before, strict=True))
    assert read_values([th.zeros(2, dtype=th.float64)]).dtype == np.float64


def test_reported_steps_come_in_batches():
    steps = ReportedSteps()
    steps.add(report(3, dones=[1]))
    steps.add(Report(np.array([True, False]), [{"end": "second"}], [UpdateStats({}, 0)]))
    batch = steps.take(4)
    assert batch.dones.tolist() == [False, True, False, True] and len(batch.updates) == 1
    assert batch.infos == [{}, {"end": 1}, {}, {"end": "second"}]
    rest = steps.take(4)
    assert rest.dones.tolist() == [False] and rest.infos == [{}] and rest.updates == [] and len(steps) == 0


@pytest.mark.parametrize(
    "use",
    [
        np.asarray, len, list, bool, float, int, abs, round, lambda x: x[0], lambda x: x.shape, lambda x: x == 1,
        lambda x: x <= 1, lambda x: x < 1, lambda x: x + 1, lambda x: 1 / x, lambda x: x // 2, lambda x: x % 2,
        lambda x: x**2, lambda x: -x, lambda x: x @ x, lambda x: x.mean(), lambda x: np.ones(2) * x,
    ],
)  # fmt: skip
def test_what_is_not_carried_says_so(use):
    with pytest.raises(RuntimeError, match=r"locals\['rewards'\] stays on the nodes"):
        use(NotCarried("rewards"))


@pytest.mark.parametrize(
    "machines, n_nodes, lanes_per_node, expected",
    [
        ([("a", 2), ("b", 6)], None, None, [(6, 6, "b"), (2, 2, "a")]),
        ([("a", 64)], None, None, [(8, 64, "a")]),
        ([("a", 1)] * 10, None, None, [(1, 1, "a")] * 8),
        ([("a", 2), ("b", 6)], 3, None, [(3, 2, None), (3, 2, None), (2, 2, None)]),
        ([("a", 4)], None, 3, [(3, 1, None), (3, 1, None), (2, 1, None)]),
    ],
)
def test_lanes_are_placed_by_cpus(machines, n_nodes, lanes_per_node, expected):
    placed = place_lanes(machines, 8, n_nodes, lanes_per_node)
    assert [(len(lanes), place.n_cpus, place.machine) for lanes, place in placed] == expected
    assert [lane for lanes, _ in placed for lane in lanes] == list(range(8))


def test_too_many_nodes_for_the_cluster():
    with pytest.raises(ValueError, match=r"3 node\(s\) need one CPU each, but Ray's cluster has 2"):
        place_lanes([("a", 2)], 8, 3, None)
    with pytest.raises(ValueError, match=r"1 node\(s\) need one CPU each, but Ray's cluster has 0"):
        place_lanes([], 8, None, None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_nodes": 5}, "only 4 lanes"),
        ({"n_nodes": 0}, "n_nodes must be a whole number of at least 1, or None, got 0"),
        ({"n_nodes": 2, "lanes_per_node": 2}, "give one of them"),
        ({"lanes_per_node": 1.5}, "lanes_per_node must be a whole number of at least 1, or None, got 1.5"),
        ({"sync_interval": 0}, "sync_interval must be a whole number of at least 1, or None, got 0"),
        ({"exchange": "gossip"}, r"exchange must be one of \['deltas', 'gradients'\], got 'gossip'"),
        ({"exchange": "gradients", "outer_momentum": 0.9}, "outer_momentum are for exchange='deltas'"),
        ({"exchange": "gradients", "outer_learning_rate": 1.0}, "leave both out"),
        ({"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\), got 1.0"),
        ({"outer_momentum": None}, r"outer_momentum must be in \[0, 1\), got None"),
        ({"outer_momentum": False}, r"outer_momentum must be in \[0, 1\), got False"),
        ({"exchange": None}, r"exchange must be one of .*, got None"),
        ({"outer_learning_rate": 0.0}, "outer_learning_rate must be a positive, finite number, or None, got 0.0"),
        ({"outer_learning_rate": math.inf}, "outer_learning_rate must be a positive, finite number, or None, got inf"),
        ({"max_staleness": -1}, "max_staleness must be a whole number of at least 0, or None, got -1"),
        ({"checkpoint_interval": 0}, "checkpoint_interval must be a positive, finite number, got 0"),
        ({"checkpoint_interval": None}, "checkpoint_interval must be a positive, finite number, got None"),
        ({"max_restarts": True}, "max_restarts must be a whole number of at least 0, got True"),
        ({"node_timeout": "5"}, "node_timeout must be a positive, finite number, or None, got '5'"),
        ({"start_timeout": 0}, "start_timeout must be a positive, finite number, got 0"),
        ({"start_timeout": math.nan}, "start_timeout must be a positive, finite number, got nan"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(arguments, message, monkeypatch):
    monkeypatch.setattr(cluster, "import_ray", None)
    with pytest.raises(ValueError, match=message):
        make_vec_env("CartPole-v1", 4, vec_env_cls=RayVecEnv, vec_env_kwargs=arguments)


def test_wrappers_are_sent_without_the_lanes_inside(tmp_path):
    env = make_vec_env("CartPole-v1", 4)
    whole = VecNormalize(VecFrameStack(VecMonitor(env, str(tmp_path / "monitor.csv")), 2))
    whole.reset()
    sent = pickle.loads(pickle.dumps(pack_wrappers(whole, range(1, 3))))
    part = wrap(make_vec_env("CartPole-v1", 2), sent)
    assert part.num_envs == 2 and part.reset().shape == (2, 8)
    observations, rewards, dones, infos = part.step(np.zeros(2, dtype=int))
    assert observations.shape == (2, 8) and len(infos) == len(dones) == len(rewards) == 2
    assert unwrap_vec_wrapper(part, VecFrameStack) is part.venv and unwrap_vec_wrapper(part, VecTransposeImage) is None
    # The original is as it was
    assert whole.reset().shape == (4, 8) and whole.venv.venv.results_writer is not None
    whole.close()


def test_other_wrappers_are_refused():
    class Mine(VecMonitor):
        pass

    with pytest.raises(TypeError, match="Mine can't be sent to other machines"):
        pack_wrappers(Mine(make_vec_env("CartPole-v1", 2)), range(1))


@pytest.mark.parametrize("algorithm", [AsyncOneStepQ, AsyncOneStepSarsa])
def test_a_nodes_lanes_have_the_epsilons_of_all_lanes(algorithm):
    whole = algorithm("MlpPolicy", make_vec_env("CartPole-v1", 16))
    expected = whole._get_exploration_schedule(16)(0.0)
    found = []
    for lanes in (range(6), range(6, 16)):
        part = algorithm("MlpPolicy", make_vec_env("CartPole-v1", len(lanes)))
        part.learn_from_lanes(lanes, 16)
        part._check_parameters()
        found += sorted(part._get_exploration_schedule(len(lanes))(0.0))
    assert sorted(found) == sorted(expected)


# ---------------------------------------------------------------------- without Ray


def test_without_ray_its_users_are_told_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-async1step\[ray\]'"):
        make_vec_env("CartPole-v1", 2, vec_env_cls=RayVecEnv)
    with pytest.raises(SystemExit):
        cli.take_vec_env_options(["--vec-env", "ray"])
    assert "pip install 'sb3-async1step[ray]'" in capsys.readouterr().err
