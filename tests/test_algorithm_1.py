"""In serial mode, the algorithms are a plain transcription of the paper's Algorithm 1, parameter for parameter."""

from copy import deepcopy

import numpy as np
import pytest
import torch as th

from sb3_async1step import AsyncOneStepQ, AsyncOneStepSarsa, SharedRMSprop
from tests.envs import RandomWalkEnv, make_env

GAMMA = 0.9
FINAL_EPS, FINAL_PROBS = (0.1, 0.01, 0.5), (0.4, 0.3, 0.3)
SEED = 7


class Thread:
    """State of one of the paper's actor-learner threads; it may have several lanes, which act in one batch."""

    def __init__(self, envs, final_eps, rng):
        self.envs = envs
        self.eps = None
        self.final_eps = np.array(final_eps)
        self.rng = rng
        self.t = 0
        self.actions = None
        self.d_theta = None
        self.transitions = []


def algorithm_1(network, target, threads, *, total, i_update, i_target, lr, fraction, sarsa, alpha=0.99, rms_eps=0.1):
    """
    Mnih et al. 2016, Algorithm 1, with shared RMSProp (equations 8 and 9); returns the number of updates.

    One deviation: with several threads, a thread reads the weights when it needs its gradient (at its update, and
    before it syncs the target) and not at every step; with one thread, both are the same and it does the latter.
    """
    theta = list(network.parameters())
    square_avg = [th.zeros_like(p) for p in theta]
    n_lanes = sum(len(thread.envs) for thread in threads)
    T = n_updates = 0

    def q(net, s):
        return net(th.as_tensor(s)[None])[0]

    def behave(thread, states, lanes):
        greedy = np.array([int(q(network, s).argmax()) for s in states])
        explores = thread.rng.random(len(states)) < thread.eps[lanes]
        return np.where(explores, thread.rng.integers(3, size=len(states)), greedy)

    def accumulate(thread):
        if not thread.transitions:
            return
        total_loss = 0.0
        for s, a, r, s_next, a_next, terminated in thread.transitions:
            with th.no_grad():
                value = q(target, s_next)[a_next] if sarsa else q(target, s_next).max()
                y = r if terminated else r + GAMMA * value
            total_loss += (y - q(network, s)[a]) ** 2
        thread.transitions.clear()
        gradient = th.autograd.grad(total_loss / len(thread.envs), theta)
        for d, g in zip(thread.d_theta, gradient, strict=True):
            d += g

    for thread in threads:
        thread.d_theta = [th.zeros_like(p) for p in theta]

    while T < total:  # noqa: SIM300 (not a constant)
        # Schedules are evaluated when all lanes have made a step
        progress = min(T / total / fraction, 1.0)
        learning_rate = lr * (1 - T / total)
        for thread in threads:
            thread.eps = 1.0 + progress * (thread.final_eps - 1.0)
        for thread in threads:
            n = len(thread.envs)
            # Take action a with epsilon-greedy policy based on Q(s, a; theta); Sarsa has chosen it before
            if not sarsa or thread.actions is None:
                thread.actions = behave(thread, [env.s for env in thread.envs], np.arange(n))
            outcomes = [env.step(a) for env, a in zip(thread.envs, thread.actions, strict=True)]
            truncated = np.array([trunc and not term for _, _, term, trunc, _ in outcomes])
            done = np.array([term or trunc for _, _, term, trunc, _ in outcomes])
            starts = [env.reset()[0] if d else o[0] for env, d, o in zip(thread.envs, done, outcomes, strict=True)]
            if sarsa:
                next_actions = np.zeros(n, dtype=int)
                if truncated.any():
                    ends = [o[0] for o, t in zip(outcomes, truncated, strict=True) if t]
                    next_actions[truncated] = behave(thread, ends, np.flatnonzero(truncated))
                new_actions = behave(thread, starts, np.arange(n))
                next_actions[~truncated] = new_actions[~truncated]
            for i, (env, (s_next, r, terminated, _, _)) in enumerate(zip(thread.envs, outcomes, strict=True)):
                a_next = next_actions[i] if sarsa else None
                thread.transitions.append((env.s, thread.actions[i], r, s_next, a_next, terminated))
            if len(threads) == 1:
                accumulate(thread)
            for env, start in zip(thread.envs, starts, strict=True):
                env.s = start
            if sarsa:
                thread.actions = new_actions
            T += n
            thread.t += 1
            if T // i_target > (T - n) // i_target:
                accumulate(thread)
                target.load_state_dict(network.state_dict())
            if thread.t == i_update or (n == 1 and done[0]):
                accumulate(thread)
                with th.no_grad():
                    for p, g, d in zip(theta, square_avg, thread.d_theta, strict=True):
                        g.mul_(alpha).add_((1 - alpha) * d**2)
                        p.sub_(learning_rate * d / (g + rms_eps).sqrt())
                        d.zero_()
                thread.t = 0
                n_updates += 1
    assert n_lanes * (total // n_lanes) == T
    return n_updates


@pytest.mark.parametrize("sarsa", [False, True])
@pytest.mark.parametrize(
    ("n_lanes", "n_workers", "i_update"), [(1, 1, 5), (3, 3, 2), (4, 2, 2), (3, 2, 3), (4, 1, 2), (4, 2, 1)]
)
def test_serial_mode_equals_algorithm_1(sarsa, n_lanes, n_workers, i_update):
    total, i_target, lr, fraction = 240 * i_update * n_lanes // n_workers, 37, 2e-2, 0.5
    model = (AsyncOneStepSarsa if sarsa else AsyncOneStepQ)(
        "MlpPolicy",
        make_env(n_lanes),
        learning_rate=lambda progress_remaining: lr * progress_remaining,
        gamma=GAMMA,
        n_workers=n_workers,
        update_interval=i_update,
        target_update_interval=i_target,
        exploration_fraction=fraction,
        exploration_final_eps=FINAL_EPS,
        exploration_final_probs=FINAL_PROBS,
        max_grad_norm=1e6,
        backend="serial",
        policy_kwargs={"net_arch": [16], "optimizer_class": SharedRMSprop},
        seed=SEED,
    )
    network, target = deepcopy(model.q_net), deepcopy(model.q_net_target)
    before = deepcopy(model.q_net.state_dict())
    model.learn(total)

    seeds = np.random.SeedSequence(SEED).spawn(n_workers)
    from sb3_async1step.value_based.exploration import allot_final_epsilons
    from sb3_async1step.vec_envs.split import group_lanes

    final_eps = allot_final_epsilons(FINAL_EPS, FINAL_PROBS, n_lanes)
    envs = [RandomWalkEnv() for _ in range(n_lanes)]
    for i, env in enumerate(envs):
        env.s, _ = env.reset(seed=SEED + i)
    threads = [
        Thread([envs[lane] for lane in lanes], [final_eps[lane] for lane in lanes], np.random.default_rng(seed))
        for lanes, seed in zip(group_lanes(n_lanes, n_workers), seeds, strict=True)
    ]
    n_updates = algorithm_1(
        network,
        target,
        threads,
        total=total,
        i_update=i_update,
        i_target=i_target,
        lr=lr,
        fraction=fraction,
        sarsa=sarsa,
    )

    # The same actions in the same episodes
    assert [env.unwrapped.tape for env in model.get_env().envs] == [env.tape for env in envs]
    assert model._n_updates == n_updates
    assert n_updates >= 200
    for name, parameter in model.q_net.state_dict().items():
        th.testing.assert_close(parameter, network.state_dict()[name], rtol=1e-3, atol=1e-5)
        assert not th.allclose(parameter, before[name], rtol=1e-2, atol=1e-3)
    for name, parameter in model.q_net_target.state_dict().items():
        th.testing.assert_close(parameter, target.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_the_oracle_tells_q_from_sarsa(algorithm):
    """The comparison above can fail: the two algorithms part ways at once."""
    weights = []
    for cls in (AsyncOneStepQ, AsyncOneStepSarsa):
        model = cls("MlpPolicy", make_env(1), backend="serial", seed=SEED, learning_rate=2e-2).learn(100)
        weights.append(model.q_net.state_dict()["q_net.0.weight"])
    assert not th.allclose(*weights, rtol=1e-3, atol=1e-5)
