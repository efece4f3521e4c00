import os
import threading
import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import polyak_update
from torch import nn
from torch.nn.utils import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_async1step import A3C, AsyncOneStepQ
from sb3_async1step.a3c.actor_learner import NOISE, A3CActorLearner
from sb3_async1step.value_based.target_network import SharedQNetworks, move_towards
from sb3_async1step.workers.network_copies import view_network
from sb3_async1step.workers.shared_parameters import LocalParameters
from tests.envs import make_env
from tests.helpers import weights_of


def make_policy(**policy_kwargs):
    return AsyncOneStepQ("MlpPolicy", make_env(1), seed=0, policy_kwargs=policy_kwargs).policy


def loss_of(network, observations):
    return network(observations).square().mean()


@pytest.fixture(params=[False, True], ids=["view", "thread-specific"])
def thread_specific(request):
    return request.param


def share(policy):
    return SharedQNetworks(policy, lock_updates=False)


def test_views_share_weights_but_not_gradients():
    policy = make_policy()
    one, two = view_network(policy.q_net), view_network(policy.q_net)
    one.set_training_mode(True)
    two.set_training_mode(False)
    assert one.training and not two.training
    with th.no_grad():
        next(policy.q_net.parameters()).fill_(0.25)
    assert all(th.equal(next(net.parameters()), next(policy.q_net.parameters())) for net in (one, two))
    loss_of(one, th.ones(2, 4)).backward()
    assert all(p.grad is not None for p in one.parameters())
    assert all(p.grad is None for net in (two, policy.q_net) for p in net.parameters())
    # Predicting flips the policy's mode, not the views'
    policy.set_training_mode(True)
    policy.predict(th.ones(4).numpy())
    assert one.training and not policy.q_net.training


def test_thread_specific_parameters_change_when_they_are_pulled(thread_specific):
    policy = make_policy()
    local = LocalParameters(share(policy), thread_specific)
    before = [p.detach().clone() for p in local.learning_network.parameters()]
    with th.no_grad():
        for parameter in policy.q_net.parameters():
            parameter.add_(1.0)

    def are_pulled(network):
        return [th.equal(p, b + 1.0) for p, b in zip(network.parameters(), before, strict=True)]

    networks = (local.learning_network, local.acting_network)
    assert all(are_pulled(network) == [not thread_specific] * len(before) for network in networks)
    local.pull()
    assert all(are_pulled(network) == [True] * len(before) for network in networks)


def test_a_push_moves_the_shared_parameters_alone(thread_specific):
    policy = make_policy(optimizer_class=th.optim.SGD)
    shared = share(policy)
    local = LocalParameters(shared, thread_specific)
    local.pull()
    mine = [p.detach().clone() for p in local.learning_network.parameters()]
    loss_of(local.learning_network, th.ones(2, 4)).backward()
    gradients = local.get_gradients()
    learning_rate = policy.optimizer.param_groups[0]["lr"]
    assert local.push() == 0
    for parameter, start, gradient in zip(policy.q_net.parameters(), mine, gradients, strict=True):
        th.testing.assert_close(parameter.detach(), start - learning_rate * gradient)
    for parameter, start in zip(local.learning_network.parameters(), mine, strict=True):
        assert th.equal(parameter, start) == (thread_specific or bool((parameter == start).all()))
    # Gradients are cleared
    assert local.get_gradients() == [None] * len(mine)
    # Without another pull, the next push is one update late
    loss_of(local.learning_network, th.ones(2, 4)).backward()
    assert local.push() == 1


class OnAccelerator(TorchDispatchMode):
    """Lets the meta device, which any machine has, play an accelerator, from which zeros are copied."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is th.ops.aten._to_copy.default and kwargs.get("device") == th.device("cpu"):
            return th.zeros(args[0].shape)
        return function(*args, **kwargs)


def test_states_for_files_are_on_the_cpu(thread_specific):
    """A machine without an accelerator can't unpickle its tensors."""
    local = LocalParameters(share(make_policy().to("meta")), thread_specific)
    for parameter in local.parameters[1:]:
        parameter.grad = th.zeros_like(parameter)
    noise = StateDependentNoiseDistribution(2)
    noise.exploration_mat = noise.exploration_matrices = nn.Parameter(th.zeros(4, 2, device="meta"))
    worker = SimpleNamespace(acting_policy=SimpleNamespace(action_dist=noise), _n_draws=1)
    with OnAccelerator():
        gradients, values = local.get_gradients(), local.get_values()
        drawn = [A3CActorLearner.get_extra_state(worker)[name] for name in NOISE]
    assert gradients[0] is None
    tensors = [*gradients[1:], *(values or []), *drawn]
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in tensors)


def test_states_are_copies(thread_specific):
    local = LocalParameters(share(make_policy()), thread_specific)
    loss_of(local.learning_network, th.ones(2, 4)).backward()
    states = [local.get_gradients(), local.get_values()]
    before = deepcopy(states)
    for parameter in local.parameters:
        parameter.data.fill_(9.0)
        parameter.grad.fill_(9.0)
    for state, expected in zip(states, before, strict=True):
        assert all(map(th.equal, state or [], expected or []))


def test_a_write_between_forward_and_backward_raises_no_error():
    shared = share(make_policy())
    one, two = LocalParameters(shared, False), LocalParameters(shared, False)
    loss = loss_of(one.learning_network, th.ones(2, 4))
    loss_of(two.learning_network, th.ones(2, 4)).backward()
    two.push()
    loss.backward()


def test_gradients_of_concurrent_workers_do_not_mix(thread_specific):
    shared = share(make_policy())
    batches = [th.full((8, 4), float(i + 1)) for i in range(4)]
    expected = []
    for batch in batches:
        network = LocalParameters(shared, thread_specific).learning_network
        loss_of(network, batch).backward()
        expected.append([p.grad for p in network.parameters()])
    wrong = []

    def work(i):
        network = LocalParameters(shared, thread_specific).learning_network
        for _ in range(300):
            network.zero_grad()
            loss_of(network, batches[i]).backward()
            wrong.extend(
                p
                for p, e in zip(network.parameters(), expected[i], strict=True)
                if not th.allclose(p.grad, e, rtol=1e-4)
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs"),
    [
        (None, {}),
        (th.optim.Adam, {"eps": 1e-5}),
        (th.optim.AdamW, {"weight_decay": 0.1}),
        (th.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (th.optim.SGD, {}),
        (th.optim.SGD, {"momentum": 0.9}),
        (th.optim.Adagrad, {}),
    ],
)
def test_one_optimizers_statistics_serve_all_workers(thread_specific, optimizer_class, optimizer_kwargs):
    """Two workers' updates in turn equal one optimizer's steps with the same gradients."""
    policy_kwargs = {} if optimizer_class is None else {"optimizer_class": optimizer_class}
    policy = make_policy(optimizer_kwargs=optimizer_kwargs, **policy_kwargs)
    plain = deepcopy(policy.q_net)
    plain_optimizer = type(policy.optimizer)(plain.parameters(), lr=0.01, **optimizer_kwargs)
    for group in policy.optimizer.param_groups:
        group["lr"] = 0.01
    shared = share(policy)
    locals_ = [LocalParameters(shared, thread_specific) for _ in range(2)]
    for i in range(6):
        batch = th.full((3, 4), i / 3.0)
        locals_[i % 2].pull()
        plain.zero_grad()
        for network in (plain, locals_[i % 2].learning_network):
            loss_of(network, batch).backward()
        plain_optimizer.step()
        assert locals_[i % 2].push() == 0
        assert shared.n_updates == i + 1
    for mine, expected in zip(policy.q_net.parameters(), plain.parameters(), strict=True):
        th.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    # What is saved are the shared statistics
    saved, expected_state = policy.optimizer.state_dict()["state"], plain_optimizer.state_dict()["state"]
    for index, state in expected_state.items():
        for name, value in state.items():
            if value is not None:
                th.testing.assert_close(th.as_tensor(saved[index][name]), th.as_tensor(value))


@pytest.mark.parametrize("n_times", [1, 3])
def test_soft_sync(n_times):
    policy = make_policy()
    tau = 0.1
    target = [p.detach().clone() for p in policy.q_net_target.parameters()]
    with th.no_grad():
        for parameter in policy.q_net.parameters():
            parameter.add_(1.0)
    for _ in range(n_times):
        target = [(1 - tau) * t + tau * p for t, p in zip(target, policy.q_net.parameters(), strict=True)]
    share(policy).sync_target(n_times, tau)
    for mine, expected in zip(policy.q_net_target.parameters(), target, strict=True):
        th.testing.assert_close(mine, expected)


class Extractor(BaseFeaturesExtractor):
    """Keeps what can't be copied deeply."""

    def __init__(self, observation_space, keep):
        super().__init__(observation_space, features_dim=8)
        # Its weight is computed from two parameters, anew in each forward pass
        self.linear = weight_norm(nn.Linear(4, 8))
        # Whose weight no forward pass of the policy computes under no_grad()
        self.unused = weight_norm(nn.Linear(4, 8))
        self.kept = keep()

    def forward(self, observations):
        with self.kept if isinstance(self.kept, type(threading.Lock())) else nullcontext():
            return self.linear(observations)


UNCOPYABLE = {"lock": threading.Lock, "file": Path(os.devnull).open}


@pytest.mark.parametrize("kept", UNCOPYABLE)
def test_features_extractors_that_cannot_be_copied_deeply(algorithm, kept):
    extractor = {"features_extractor_class": Extractor, "features_extractor_kwargs": {"keep": UNCOPYABLE[kept]}}
    model = algorithm("MlpPolicy", make_env(4), n_workers=2, policy_kwargs=extractor)
    with pytest.raises((TypeError, RuntimeError)):
        deepcopy(model.policy)
    view = view_network(model.policy)
    mine, shared = (
        policy.features_extractor if algorithm is A3C else policy.q_net.features_extractor
        for policy in (view, model.policy)
    )
    assert mine.kept is shared.kept
    assert mine.linear is not shared.linear and mine.linear.weight_v.data_ptr() == shared.linear.weight_v.data_ptr()
    before = weights_of(model)
    with warnings.catch_warnings():
        # What is computed from parameters is not lost
        warnings.filterwarnings("error", message="The network has changed")
        for _ in range(2):
            model.learn(60)
    changed = {name for name, value in weights_of(model).items() if not th.equal(value, before[name])}
    assert any(name.endswith("linear.weight_v") for name in changed)


class CompiledExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space, compile_module):
        super().__init__(observation_space, features_dim=8)
        self.hidden = compile_module(nn.Sequential(nn.Linear(4, 8), nn.Tanh()))

    def forward(self, observations):
        return self.hidden(observations)


def trace(module):
    return th.jit.trace(module, th.zeros(2, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compile_module", [th.jit.script, trace], ids=["script", "trace"])
def test_torch_script_learns_what_the_module_learns(algorithm, compile_module):
    def learn(prepare):
        kwargs = {
            "features_extractor_class": CompiledExtractor,
            "features_extractor_kwargs": {"compile_module": prepare},
        }
        # The orthogonal initialization passes over modules of TorchScript
        kwargs |= {"ortho_init": False} if algorithm is A3C else {}
        model = algorithm("MlpPolicy", make_env(4), n_workers=2, backend="serial", seed=1, policy_kwargs=kwargs)
        parameters = model.list_learned_parameters()
        before = [parameter.detach().clone() for parameter in parameters]
        model.learn(200)
        assert not any(map(th.equal, parameters, before))
        return parameters

    for mine, expected in zip(learn(compile_module), learn(lambda module: module), strict=True):
        th.testing.assert_close(mine, expected)


def test_what_cannot_be_copied_in_a_container():
    kwargs = {"features_extractor_class": Extractor, "features_extractor_kwargs": {"keep": lambda: [threading.Lock()]}}
    model = AsyncOneStepQ("MlpPolicy", make_env(4), policy_kwargs=kwargs)
    message = (
        r"'kept' of its module 'features_extractor' \(Extractor\) can't be copied: .*lock.* Extractor.__deepcopy__"
    )
    with pytest.raises(TypeError, match=message):
        model.learn(10)


class InPlace(TorchDispatchMode):
    """Records the operations that write into a tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.names = tensor, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.endswith("_") and args[0].data_ptr() == self.tensor.data_ptr():
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_other_workers_see_no_half_updated_target(tau):
    """Between its old and its new values, SB3's are multiplied by 1 - tau."""
    target, online = th.rand(5), th.rand(5)
    expected = target.clone()
    polyak_update([online], [expected], tau)
    with InPlace(target) as record:
        move_towards([target], [online], tau)
    assert record.names == ["copy_"] and th.equal(target, expected)


class KeepsItsFeatures(BaseFeaturesExtractor):
    """Another thread that calls the same module in between would change what it uses."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.layer = nn.Linear(observation_space.shape[0], 4)

    def forward(self, observations):
        self.features = self.layer(observations)
        return th.relu(self.features)


def test_each_worker_has_a_target_network_of_its_own(value_based):
    policy_kwargs = {"features_extractor_class": KeepsItsFeatures}
    # No update of the target network comes in between
    model = value_based("MlpPolicy", make_env(4), n_workers=2, target_update_interval=1000, policy_kwargs=policy_kwargs)
    seen = []

    def look(locals_, globals_):
        if model.num_timesteps == 80:
            # A callback may give a parameter another memory
            bias = model.q_net_target.q_net[-1].bias
            bias.data = bias.data + 100.0
        elif model.num_timesteps == 84:
            seen.extend(worker.target_network for worker in model._pool.workers)
            for network in seen:
                for mine, shared in zip(network.parameters(), model.q_net_target.parameters(), strict=True):
                    assert mine.data_ptr() == shared.data_ptr()
                assert not network.training and network.q_net[-1].bias.min() > 90
        return True

    model.learn(120, callback=look)
    modules = {id(network.features_extractor) for network in (*seen, model.q_net_target)}
    assert len(modules) == 3
