"""In serial mode, n-step Q-learning is a plain transcription of the paper's Algorithm 2, parameter for parameter."""

from copy import deepcopy

import numpy as np
import pytest
import torch as th

from sb3_async1step import AsyncNStepQ, AsyncOneStepQ, SharedRMSprop
from sb3_async1step.async_n_step_q.actor_learner import NStepQActorLearner
from sb3_async1step.value_based.exploration import allot_final_epsilons
from sb3_async1step.vec_envs.split import group_lanes
from sb3_async1step.workers.lanes import Lanes
from sb3_async1step.workers.rollout import Rollout, RolloutBuffer
from tests.envs import RandomWalkEnv, make_env

GAMMA = 0.9
SEED = 7


class Thread:
    """State of one of the paper's actor-learner threads; it may have several lanes, which act in one batch."""

    def __init__(self, envs, final_eps, rng, network):
        self.envs = envs
        self.final_eps = np.array(final_eps)
        self.rng = rng
        self.local = deepcopy(network)
        self.segments = [[] for _ in envs]
        self.t = 0


def algorithm_2(network, target, threads, *, total, t_max, i_target, lr, fraction, q_lambda, alpha=0.99, rms_eps=0.1):
    """
    Mnih et al. 2016, Algorithm 2, with shared RMSProp (equations 8 and 9); returns the number of updates.

    One deviation: as in Algorithm 1, the target network is synchronized as soon as T reaches a multiple of I_target,
    before an update in the same step.
    """
    theta = list(network.parameters())
    square_avg = [th.zeros_like(p) for p in theta]
    T = n_updates = 0

    def q(net, s):
        return net(th.as_tensor(s)[None])[0]

    def d_theta(thread):
        theta_local = list(thread.local.parameters())
        total_loss = 0.0
        for segment in thread.segments:
            R = None
            for s, a, r, s_next, terminated, truncated in reversed(segment):
                with th.no_grad():
                    bootstrap = q(target, s_next).max()
                # The last state of a segment, or of an episode that was cut off
                if R is None or truncated:
                    R = bootstrap
                R = r + (0.0 if terminated else GAMMA * (q_lambda * R + (1 - q_lambda) * bootstrap))
                total_loss += (R - q(thread.local, s)[a]) ** 2
            segment.clear()
        return th.autograd.grad(total_loss / len(thread.envs), theta_local)

    while T < total:  # noqa: SIM300 (not a constant)
        # Schedules are evaluated when all lanes have made a step
        progress = min(T / total / fraction, 1.0)
        learning_rate = lr * (1 - T / total)
        for thread in threads:
            n = len(thread.envs)
            if thread.t == 0:
                # Synchronize thread-specific parameters theta' = theta
                thread.local.load_state_dict(network.state_dict())
            # Take action a_t according to the epsilon-greedy policy based on Q(s_t, a; theta')
            eps = 1.0 + progress * (thread.final_eps - 1.0)
            greedy = np.array([int(q(thread.local, env.s).argmax()) for env in thread.envs])
            explores = thread.rng.random(n) < eps
            actions = np.where(explores, thread.rng.integers(3, size=n), greedy)
            done = False
            for env, segment, a in zip(thread.envs, thread.segments, actions, strict=True):
                s_next, r, terminated, truncated, _ = env.step(a)
                segment.append((env.s, a, r, s_next, terminated, truncated and not terminated))
                done = terminated or truncated
                env.s = env.reset()[0] if done else s_next
            T += n
            thread.t += 1
            is_over = thread.t == t_max or (n == 1 and done)
            gradient = d_theta(thread) if is_over else None
            if T // i_target > (T - n) // i_target:
                target.load_state_dict(network.state_dict())
            if is_over:
                with th.no_grad():
                    for p, g, d in zip(theta, square_avg, gradient, strict=True):
                        g.mul_(alpha).add_((1 - alpha) * d**2)
                        p.sub_(learning_rate * d / (g + rms_eps).sqrt())
                thread.t = 0
                n_updates += 1
    return n_updates


@pytest.mark.parametrize(
    ("n_lanes", "n_workers", "t_max", "q_lambda"),
    [(1, 1, 5, 1.0), (3, 3, 2, 1.0), (4, 2, 2, 1.0), (3, 2, 3, 0.7), (4, 1, 2, 0.0), (1, 1, 3, 0.7)],
)
def test_serial_mode_equals_algorithm_2(n_lanes, n_workers, t_max, q_lambda):
    total, i_target, lr, fraction = 240 * t_max * n_lanes // n_workers, 37, 2e-2, 0.5
    model = AsyncNStepQ(
        "MlpPolicy",
        make_env(n_lanes),
        learning_rate=lambda progress_remaining: lr * progress_remaining,
        gamma=GAMMA,
        n_workers=n_workers,
        update_interval=t_max,
        target_update_interval=i_target,
        exploration_fraction=fraction,
        max_grad_norm=1e6,
        q_lambda=q_lambda,
        lock_updates=False,
        backend="serial",
        policy_kwargs={"net_arch": [16], "optimizer_class": SharedRMSprop},
        seed=SEED,
    )
    network, target = deepcopy(model.q_net), deepcopy(model.q_net_target)
    before = deepcopy(model.q_net.state_dict())
    model.learn(total)

    seeds = np.random.SeedSequence(SEED).spawn(n_workers)
    final_eps = allot_final_epsilons((0.1, 0.01, 0.5), (0.45, 0.45, 0.1), n_lanes)
    envs = [RandomWalkEnv() for _ in range(n_lanes)]
    for i, env in enumerate(envs):
        env.s, _ = env.reset(seed=SEED + i)
    threads = [
        Thread(
            [envs[lane] for lane in lanes], [final_eps[lane] for lane in lanes], np.random.default_rng(seed), network
        )
        for lanes, seed in zip(group_lanes(n_lanes, n_workers), seeds, strict=True)
    ]
    n_updates = algorithm_2(
        network,
        target,
        threads,
        total=total,
        t_max=t_max,
        i_target=i_target,
        lr=lr,
        fraction=fraction,
        q_lambda=q_lambda,
    )

    # The same actions in the same episodes
    assert [env.unwrapped.tape for env in model.get_env().envs] == [env.tape for env in envs]
    assert model._n_updates == n_updates
    assert n_updates >= 200
    for net, expected in ((model.q_net, network), (model.q_net_target, target)):
        for name, parameter in net.state_dict().items():
            th.testing.assert_close(parameter, expected.state_dict()[name], rtol=1e-3, atol=1e-5)
    for name, parameter in model.q_net.state_dict().items():
        assert not th.allclose(parameter, before[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("q_lambda", [1.0, 0.5])
@pytest.mark.parametrize("n_lanes", [1, 4])
@pytest.mark.parametrize("optimizer_class", [SharedRMSprop, th.optim.Adam])
def test_segments_of_one_step_are_one_step_q_learning(q_lambda, n_lanes, optimizer_class):
    weights = []
    for algorithm, parameters in ((AsyncOneStepQ, {}), (AsyncNStepQ, {"q_lambda": q_lambda})):
        model = algorithm(
            "MlpPolicy",
            make_env(n_lanes),
            learning_rate=1e-2,
            n_workers=1,
            update_interval=1,
            target_update_interval=37,
            policy_kwargs={"net_arch": [16], "optimizer_class": optimizer_class},
            seed=SEED,
            **parameters,
        )
        weights.append(model.learn(200 * n_lanes).policy.state_dict())
    for name, value in weights[0].items():
        assert th.equal(value, weights[1][name]), name


def test_segments_of_several_steps_are_not():
    weights = []
    for algorithm in (AsyncOneStepQ, AsyncNStepQ):
        model = algorithm("MlpPolicy", make_env(4), n_workers=1, update_interval=5, seed=SEED)
        weights.append(model.learn(400).q_net.q_net[0].weight)
    assert not th.allclose(*weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("n_workers", "lock_updates"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(5, [5, 5, 5, 5]), (7, [7, 7, 6]), (3, [3] * 6 + [2]), (20, [20]), (31, [20]), (50, [20])]
)
def test_minibatches(batch_size, sizes, n_workers, lock_updates, monkeypatch):
    """An update follows each of them, and together they are the segment, with the returns that it has as a whole."""
    segments, minibatches = [], []
    take, compute_loss = RolloutBuffer.take, NStepQActorLearner.compute_loss

    def keep_segment(buffer):
        rollout = take(buffer)
        segments.append(deepcopy(rollout))
        return rollout

    def keep_minibatch(worker, rollout):
        with th.no_grad():
            targets = rollout.flatten(worker.compute_targets(rollout))
        minibatches.append((worker, deepcopy(rollout), targets))
        return compute_loss(worker, rollout)

    monkeypatch.setattr(RolloutBuffer, "take", keep_segment)
    monkeypatch.setattr(NStepQActorLearner, "compute_loss", keep_minibatch)
    model = AsyncNStepQ(
        "MlpPolicy",
        make_env(4 * n_workers),
        learning_rate=lambda progress_remaining: 1e-2,
        n_workers=n_workers,
        batch_size=batch_size,
        target_update_interval=10**6,
        q_lambda=0.5,
        max_grad_norm=0.5,
        lock_updates=lock_updates,
        backend="serial",
        policy_kwargs={"net_arch": [16], "optimizer_class": th.optim.SGD},
        seed=SEED,
    )
    network, target = deepcopy(model.q_net), deepcopy(model.q_net_target)
    model.learn(3 * 20 * n_workers)
    assert [rollout.rewards.size for _, rollout, _ in minibatches] == sizes * 3 * n_workers
    assert model._n_updates == len(minibatches)

    for number, segment in enumerate(segments):
        parts = minibatches[number * len(sizes) : (number + 1) * len(sizes)]
        # Each transition is in one minibatch
        expected, *rows = (
            np.column_stack([rollout.flatten(rollout.observations), rollout.flatten(rollout.actions)])
            for rollout in (segment, *(part for _, part, _ in parts))
        )
        np.testing.assert_array_equal(*(np.unique(each, axis=0) for each in (np.concatenate(rows), expected)))
        assert len(np.unique(expected, axis=0)) == 20
        # By hand: Peng's Q(lambda), from the end
        with th.no_grad():
            values = target(th.as_tensor(segment.next_observations).flatten(0, 1)).max(dim=1).values.reshape(5, 4)
        following, returns = values[-1].numpy(), {}
        for t in reversed(range(5)):
            mixture = 0.5 * np.where(segment.truncated[t] | (t == 4), values[t], following) + 0.5 * values[t].numpy()
            following = segment.rewards[t] + model.gamma * ~segment.terminated[t] * mixture
            for lane in range(4):
                returns[tuple(segment.observations[t, lane])] = following[lane]
        for _, part, targets in parts:
            wanted = [returns[tuple(row)] for row in part.flatten(part.observations)]
            np.testing.assert_allclose(targets.numpy(), wanted, rtol=1e-5)

    if n_workers == 2 and len(sizes) == 1 and not lock_updates:
        # The gradient of a whole segment is of the parameters with which the segment began
        return
    # One update after the other, whichever worker makes it: each gradient is of the newest parameters
    for _, part, targets in minibatches:
        q_values = network(th.as_tensor(part.flatten(part.observations)))
        chosen = q_values.gather(1, th.as_tensor(part.flatten(part.actions)).reshape(-1, 1)).squeeze(1)
        network.zero_grad()
        (5 * th.nn.functional.mse_loss(chosen, targets)).backward()
        th.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        with th.no_grad():
            for parameter in network.parameters():
                parameter.sub_(1e-2 * parameter.grad)
    for name, parameter in model.q_net.state_dict().items():
        th.testing.assert_close(parameter, network.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_minibatches_of_lanes_that_are_not_equally_far():
    """Such as those of a SubprocVecEnv."""
    ones = np.ones((3, 2), dtype=np.float32)
    rollout = Rollout(np.arange(6.0).reshape(3, 2, 1), ones, ones, ones[..., None], ones < 0, ones < 0)
    rollout.lengths = np.array([3, 1])
    env = make_env(2)
    model = AsyncNStepQ("MlpPolicy", env, batch_size=2, q_lambda=1.0)
    model._shared = model._share_parameters()
    (worker,) = model._make_workers([Lanes(model.env)], [range(2)], model.env.reset())
    worker.compute_targets = lambda rollout: rollout.unflatten(th.tensor([10.0, 11.0, 12.0, 14.0]))
    parts = list(worker.make_minibatches(rollout))
    assert [part.n_transitions for part in parts] == [2, 2]
    pairs = [pair for part in parts for pair in zip(part.observations.ravel(), part.targets.ravel(), strict=True)]
    assert sorted(pairs) == [(0.0, 10.0), (1.0, 11.0), (2.0, 12.0), (4.0, 14.0)]
