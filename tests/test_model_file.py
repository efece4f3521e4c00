"""Where a model can be saved, what is left after a kill, and what is said about a file that is no model."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv

from sb3_async1step import A3C, AsyncNStepQ, AsyncOneStepQ, AsyncOneStepSarsa, MinAtarCNN, NipsCNN, SharedRMSprop
from sb3_async1step.common import model_file
from sb3_async1step.common.model_file import TEMPORARY_PREFIX, remove_leftovers, write_atomically
from tests.envs import BoxWalkEnv, RandomWalkEnv, make_env
from tests.helpers import are_equal, meanwhile, weights_of

SMALL = {"net_arch": [8]}


@pytest.fixture(scope="module")
def model():
    return AsyncOneStepQ("MlpPolicy", make_env(2), n_workers=1, policy_kwargs=SMALL, seed=0).learn(20)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model.zip")
    return tmp_path / "model.zip"


# ---------------------------------------------------------------------- targets


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_fifo_is_written_into(model, is_linked, tmp_path):
    fifo = target = tmp_path / "fifo.zip"
    os.mkfifo(fifo)
    if is_linked:
        target = tmp_path / "link.zip"
        target.symlink_to(fifo)
    received = []
    with meanwhile(lambda: received.append(fifo.read_bytes())):
        model.save(target)
    assert fifo.is_fifo() and target.is_symlink() == is_linked
    assert are_equal(weights_of(AsyncOneStepQ.load(io.BytesIO(received[0]))), weights_of(model))


def test_a_device_and_a_pipe_are_written_into(model, tmp_path):
    """The target of a link to a pipe has no path of its own."""
    (tmp_path / "null.zip").symlink_to("/dev/null")
    model.save(tmp_path / "null.zip")
    assert (tmp_path / "null.zip").is_char_device()
    reader, writer = os.pipe()
    (tmp_path / "pipe.zip").symlink_to(f"/dev/fd/{writer}")
    received = []
    with open(reader, "rb") as pipe, meanwhile(lambda: received.append(pipe.read())):
        model.save(tmp_path / "pipe.zip")
        os.close(writer)
    assert are_equal(weights_of(AsyncOneStepQ.load(io.BytesIO(received[0]))), weights_of(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null.zip", "pipe.zip"]


def test_a_folder_is_not_replaced(model, tmp_path):
    (tmp_path / "model.zip").mkdir()
    with pytest.raises(IsADirectoryError):
        model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


@pytest.mark.parametrize("call", ["replace", "open"])
@pytest.mark.parametrize("error", [errno.EBUSY, errno.EACCES, errno.EROFS])
def test_a_file_that_cannot_be_replaced_is_written_in_place(model, call, error, tmp_path, monkeypatch):
    """A mount point, or a file in a folder without write permission."""
    target = tmp_path / "model.zip"
    target.write_bytes(b"old")
    inode = target.stat().st_ino

    def fail(path, *args):
        if call == "replace" or TEMPORARY_PREFIX in str(path):
            raise OSError(error, os.strerror(error), str(path))
        return open(path, *args)

    monkeypatch.setattr(*{"replace": (model_file.os, call), "open": (model_file, call)}[call], fail, raising=False)
    with pytest.warns(UserWarning, match=r"model\.zip can't be replaced \(.*written in place"):
        model.save(target)
    assert target.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert AsyncOneStepQ.load(target).num_timesteps == 20
    target.unlink()
    with pytest.raises(OSError, match=os.strerror(error)):
        model.save(target)
    assert list(tmp_path.iterdir()) == []


def test_a_mounted_file(model, tmp_path):
    (tmp_path / "real.zip").write_bytes(b"old")
    (tmp_path / "mounted.zip").write_bytes(b"")
    if subprocess.run(["mount", "--bind", "real.zip", "mounted.zip"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        with pytest.warns(UserWarning, match=r"can't be replaced"):
            model.save(tmp_path / "mounted.zip")
    finally:
        subprocess.run(["umount", "mounted.zip"], cwd=tmp_path, check=True)
    assert AsyncOneStepQ.load(tmp_path / "real.zip").num_timesteps == 20


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO, errno.EPERM])
def test_niceties_never_fail_a_save(model, saved, error, monkeypatch):
    """Network shares can't sync folders or set modes."""

    def fail(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    for owner, name in ((model_file.os, "open"), (model_file.shutil, "copymode"), (model_file.fcntl, "flock")):
        monkeypatch.setattr(owner, name, fail)
    model.save(saved)
    if error == errno.EINVAL:
        monkeypatch.setattr(model_file.os, "fsync", fail)
        model.save(saved)
    monkeypatch.undo()
    assert [path.name for path in saved.parent.iterdir()] == ["model.zip"]
    assert AsyncOneStepQ.load(saved).num_timesteps == 20


@pytest.mark.parametrize("length", [218, 251])
def test_long_names(model, length, tmp_path):
    model.save(tmp_path / ("x" * length))
    assert [len(path.name) for path in tmp_path.iterdir()] == [length + 4]
    assert AsyncOneStepQ.load(tmp_path / ("x" * length)).num_timesteps == 20


def test_modes(model, tmp_path):
    """A new file's is the usual one, that of an old file is kept."""
    usual, private = tmp_path / "usual.zip", tmp_path / "private.zip"
    private.touch(mode=0o600)
    for path in (usual, private):
        model.save(path)
    (tmp_path / "plain").touch()
    assert usual.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert private.stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------------- leftovers

WRITE_AND_HANG = """
import os, pathlib, sys, time
from sb3_async1step.common import model_file
model_file.os.replace = lambda *args: (print("written", flush=True), time.sleep(3600))
model_file.write_atomically(pathlib.Path(sys.argv[1]), b"new")
"""


def test_the_next_save_removes_what_a_killed_one_left(tmp_path):
    """But not what a living one is about to rename."""
    (tmp_path / "model.zip").write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_HANG, tmp_path / "model.zip"], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "written\n"
        (temporary,) = tmp_path.glob(f"{TEMPORARY_PREFIX}*")
        write_atomically(tmp_path / "other.zip", b"other")
        assert temporary.read_bytes() == b"new"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert (tmp_path / "model.zip").read_bytes() == b"old" and temporary.exists()
    write_atomically(tmp_path / "other.zip", b"other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.zip", "other.zip"]


def test_writers_in_the_same_folder(tmp_path):
    """None takes another one's temporary file for a dead writer's, not even between its creation and its lock."""
    stop = threading.Event()

    def clean_up():
        while not stop.is_set():
            remove_leftovers(tmp_path)

    with meanwhile(clean_up):
        try:
            for i in range(60):
                write_atomically(tmp_path / "model.zip", str(i).encode())
                assert (tmp_path / "model.zip").read_bytes() == str(i).encode()
        finally:
            stop.set()
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


# ---------------------------------------------------------------------- damage


def write_archive(path, data, like, compression=zipfile.ZIP_STORED, **others):
    """Write what is in another file, with other data."""
    with zipfile.ZipFile(like) as source:
        members = {name: source.read(name) for name in source.namelist()} | {"data": data} | others
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


def assert_refused(path, match):
    """By both ways to load it, in one sentence."""
    model = AsyncOneStepQ("MlpPolicy", make_env(2), policy_kwargs=SMALL)
    before = weights_of(model)
    for load in (AsyncOneStepQ.load, model.set_parameters):
        with pytest.raises(ValueError, match=match) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    assert are_equal(weights_of(model), before)


@pytest.mark.parametrize(
    "data",
    [b"5", b"null", b"[]", b'"n_workers"', b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, None],
    ids=lambda data: str(data)[:12],
)
def test_data_that_are_no_attributes(data, saved):
    write_archive(saved.with_name("crafted.zip"), data, saved)
    assert_refused(saved.with_name("crafted.zip"), r"crafted\.zip is damaged, or no saved model: ")


@pytest.mark.parametrize("change", ["missing", "number", "unpicklable"])
def test_attributes_that_are_no_models(change, saved):
    """Each of them in turn: only those that are not needed may be anything."""
    with zipfile.ZipFile(saved) as archive:
        attributes = json.loads(archive.read("data"))
    expected = ("n_workers", "target_update_interval")
    assert set(expected) < set(attributes)
    crafted = saved.with_name("crafted.zip")
    write_archive(crafted, json.dumps({name: attributes[name] for name in expected}), saved)
    with pytest.raises(ValueError, match=r"crafted\.zip can't be loaded: KeyError"):
        AsyncOneStepQ.load(crafted)
    n_refused = 0
    for name in attributes:
        wrong = {"number": 5, "unpicklable": {":serialized:": "gAWVBQAAAAAA"}}
        others = {key: value for key, value in attributes.items() if key != name}
        write_archive(crafted, json.dumps(others if change == "missing" else {**others, name: wrong[change]}), saved)
        try:
            AsyncOneStepQ.load(crafted)
        except ValueError:
            n_refused += 1
    # Those that an algorithm has defaults for may be missing
    assert n_refused >= (4 if change == "missing" else 5)


@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", [1, 2], {"state": 3}], ids=str)
def test_parameters_that_are_none(member, content, saved):
    if isinstance(content, (list, dict)):
        file = io.BytesIO()
        th.save(content, file)
        content = file.getvalue()
    with zipfile.ZipFile(saved) as archive:
        data = archive.read("data")
    write_archive(saved.with_name("crafted.zip"), data, saved, **{member: content})
    model = AsyncOneStepQ("MlpPolicy", make_env(2), policy_kwargs=SMALL)
    for load in (AsyncOneStepQ.load, model.set_parameters):
        with pytest.raises(ValueError):
            load(saved.with_name("crafted.zip"))


def test_flipped_bits(saved):
    """In headers, in the directory of the archive, anywhere: an error, or the same model."""
    content = saved.read_bytes()
    model = AsyncOneStepQ.load(saved)
    before = weights_of(model)
    # The directory, whose entries repeat the headers, is at the end
    with zipfile.ZipFile(saved) as archive:
        places = [info.header_offset + i for info in archive.infolist() for i in range(30)]
        places += range(archive.start_dir, len(content))
    rng = random.Random(0)
    damaged = saved.with_name("damaged.zip")
    n_refused = 0
    for place in [*rng.sample(places, 150), *rng.sample(range(len(content)), 50)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        damaged.write_bytes(flipped)
        try:
            model.set_parameters(str(damaged))
        except ValueError as error:
            assert str(damaged) in str(error) or "parameters" in str(error) or "object name" in str(error)
            n_refused += 1
        assert are_equal(weights_of(model), before)
    assert n_refused > 100


def test_a_file_that_was_packed_again_is_loaded(model, saved):
    with zipfile.ZipFile(saved) as archive:
        data = archive.read("data")
    write_archive(saved.with_name("packed.zip"), data, saved, zipfile.ZIP_DEFLATED)
    assert are_equal(weights_of(AsyncOneStepQ.load(saved.with_name("packed.zip"))), weights_of(model))


def test_a_missing_file_is_missing(model, tmp_path):
    for load in (AsyncOneStepQ.load, model.set_parameters):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "nothing")


# ---------------------------------------------------------------------- other optimizers and algorithms


@pytest.mark.parametrize("optimizer_class", [SharedRMSprop, th.optim.Adam, th.optim.SGD])
@pytest.mark.parametrize(("smaller", "larger"), [([8], [300]), ([1], [300])])
def test_the_state_for_parameters_of_other_shapes(optimizer_class, smaller, larger):
    """Adam's fused kernel would write beyond the end of its statistics."""

    def make(net_arch):
        kwargs = {"momentum": 0.9} if optimizer_class is th.optim.SGD else None
        policy_kwargs = {"net_arch": net_arch, "optimizer_class": optimizer_class, "optimizer_kwargs": kwargs}
        return AsyncOneStepQ("MlpPolicy", make_env(2), n_workers=1, policy_kwargs=policy_kwargs).learn(20)

    models = make(smaller), make(larger)
    for model, other in (models, models[::-1]):
        parameters = {**model.get_parameters(), "policy.optimizer": other.get_parameters()["policy.optimizer"]}
        before = weights_of(model)
        for _ in range(20):
            with pytest.raises(ValueError, match=r"policy\.optimizer does not fit"):
                model.set_parameters(parameters)
        assert are_equal(weights_of(model), before)
        assert model.learn(20).num_timesteps == 20


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(
    ("mine", "other"),
    [(SharedRMSprop, th.optim.Adam), (th.optim.Adam, SharedRMSprop), (th.optim.Adam, th.optim.SGD)],
    ids=lambda c: c.__name__,
)
def test_the_state_of_another_optimizer(mine, other, from_file, tmp_path):
    def make(optimizer_class):
        kwargs = {**SMALL, "optimizer_class": optimizer_class}
        return AsyncOneStepQ("MlpPolicy", make_env(2), n_workers=1, policy_kwargs=kwargs)

    trained, model = make(other).learn(20), make(mine)
    before = weights_of(model)
    trained.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=rf"policy.optimizer does not fit this policy's {mine.__name__} "):
        model.set_parameters(str(tmp_path / "model.zip") if from_file else trained.get_parameters())
    assert are_equal(weights_of(model), before)
    model.set_parameters({"policy": trained.get_parameters()["policy"]}, exact_match=False)
    assert are_equal(weights_of(model), weights_of(trained))
    model.learn(20)


def test_models_do_not_share_statistics(algorithm):
    """Unlike torch's, which are the tensors that were given."""
    one, two = (algorithm("MlpPolicy", make_env(2), n_workers=1, learning_rate=0.1).learn(20) for _ in range(2))
    two.set_parameters(one.get_parameters())
    tensors = [
        {v.data_ptr() for s in m.policy.optimizer.state.values() for v in s.values() if isinstance(v, th.Tensor)}
        for m in (one, two)
    ]
    assert tensors[0] and not tensors[0] & tensors[1]


VALUE_BASED = (AsyncOneStepQ, AsyncOneStepSarsa, AsyncNStepQ)


@pytest.mark.parametrize("loading", VALUE_BASED, ids=lambda c: c.__name__)
def test_files_of_the_other_value_based_algorithms(loading, tmp_path, recwarn):
    for saving in VALUE_BASED:
        model = saving("MlpPolicy", make_env(2), policy_kwargs=SMALL)
        model.save(tmp_path / "model.zip")
        recwarn.clear()
        loaded = loading.load(tmp_path / "model.zip")
        texts = [str(warning.message) for warning in recwarn]
        if saving is loading:
            assert texts == []
        else:
            (text,) = texts
            assert f"was saved by {saving.__name__}, and {loading.__name__} goes on" in text
        assert are_equal(weights_of(loaded), weights_of(model))
        # From then on, it is this one's
        loaded.save(tmp_path / "model.zip")
        recwarn.clear()
        loading.load(tmp_path / "model.zip")
        assert not recwarn.list


# ---------------------------------------------------------------------- policies and networks


def test_policies_and_networks_are_saved_as_sb3s(algorithm, tmp_path):
    value_based = algorithm in VALUE_BASED
    configurations = [("MlpPolicy", {}, {}), ("MlpPolicy", {"net_arch": [8]}, {})]
    if value_based:
        configurations += [("MlpPolicy", {"net_arch": [8], "layer_norm": True, "mixed_precision": True}, {})]
    else:
        sde = {"use_sde": True, "sde_sample_freq": 2}
        configurations += [("MlpPolicy", {"share_features_extractor": False}, {}), ("MlpPolicy", {}, sde)]
    for policy, policy_kwargs, kwargs in configurations:
        env = make_env(2, BoxWalkEnv) if kwargs else make_env(2)
        model = algorithm(policy, env, policy_kwargs=policy_kwargs, **kwargs)
        assert_round_trips(model, tmp_path / "network")


def assert_round_trips(model, path):
    observation = model.policy.obs_to_tensor(model.observation_space.sample())[0]
    networks = [model.policy, model.q_net, model.q_net_target] if hasattr(model, "q_net") else [model.policy]
    for network in networks:
        network.save(path)
        loaded = type(network).load(path)
        network.set_training_mode(False)
        loaded.set_training_mode(False)
        assert str(loaded) == str(network)
        assert are_equal(loaded.state_dict(), network.state_dict())
        with th.no_grad():
            assert th.equal(loaded._predict(observation, True), network._predict(observation, True))


class MinAtarLikeEnv(RandomWalkEnv):
    """Binary images, channels last."""

    observation_space = spaces.Box(0.0, 1.0, (10, 10, 4), dtype=np.float32)


@pytest.mark.parametrize("algorithm", [AsyncOneStepQ, A3C], ids=lambda c: c.__name__)
def test_networks_for_images_and_dicts_are_saved_as_sb3s(algorithm, tmp_path):
    small = {"features_extractor_kwargs": {"features_dim": 16}, "net_arch": []}
    nips, min_atar = ({**small, "features_extractor_class": cnn} for cnn in (NipsCNN, MinAtarCNN))
    if algorithm is A3C:
        nips_kwargs = [nips, {**nips, "share_features_extractor": False}]
    else:
        nips_kwargs = [nips, {**nips, "normalize_images": False, "layer_norm": False, "mixed_precision": True}]
    images = make_env(1, lambda: FakeImageEnv(screen_height=40, screen_width=40))
    models = [algorithm("CnnPolicy", images, policy_kwargs=kwargs) for kwargs in nips_kwargs]
    models.append(algorithm("MlpPolicy", make_env(1, MinAtarLikeEnv), policy_kwargs=min_atar))
    models.append(algorithm("MultiInputPolicy", make_env(1, SimpleMultiObsEnv)))
    for model in models:
        assert_round_trips(model, tmp_path / "network")


def test_attributes_that_were_left_out_have_their_defaults(algorithm, tmp_path):
    model = algorithm("MlpPolicy", make_env(2), n_workers=2, gamma=0.5)
    model.save(tmp_path / "model", exclude=["n_workers", "gamma"])
    loaded = algorithm.load(tmp_path / "model", env=make_env(2), gamma=0.7)
    assert (loaded.n_workers, loaded.gamma) == ("auto", 0.7)
    assert loaded.learn(20).num_timesteps == 20
