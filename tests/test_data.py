from __future__ import annotations

import functools
import gc
import http.server
import io
import shutil
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow.data import KEYS, MIRROR, Dataset, load_dataset, save_transitions
from fastflow.errors import MissingExtra, UserError

NAME = "pointmaze-arena-navigate-singletask-v0"
DATASET = "pointmaze-arena-navigate-v0"
N, O, A = 50, 3, 2


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Transitions, not of any environment."""
    rng = np.random.default_rng(seed)
    success = (rng.random(N) < 0.2).astype(np.float32)
    return {
        "observations": rng.normal(size=(N, O)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, A)).astype(np.float32),
        "next_observations": rng.normal(size=(N, O)).astype(np.float32),
        "rewards": success - 1,
        "masks": 1 - success,
        "terminals": (np.arange(N) % 10 == 9).astype(np.float32),
    }


def dataset(seed: int = 0) -> Dataset:
    return Dataset(NAME, {key: torch.from_numpy(array) for key, array in arrays(seed).items()})


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


# The dataset on a device


def test_facts(device):
    data = dataset().to(device)
    assert (len(data), data.obs_dim, data.action_dim, data.device.type) == (N, O, A, device.type)
    assert data.nbytes == 4 * N * (2 * O + A + 3)
    assert data.to(device) is data
    assert "50 transitions, observations 3, actions 2" in repr(data)


def test_sampling_is_uniform_with_replacement_and_keeps_rows_together(device):
    # Each row's values say which row it is.
    row = torch.arange(N, dtype=torch.float32)
    tensors = {key: row[:, None].expand(N, {"actions": A}.get(key, O)).contiguous() for key in KEYS[:3]}
    data = Dataset(NAME, {**tensors, **{key: row.clone() for key in KEYS[3:]}}).to(device)
    generator = torch.Generator(device).manual_seed(0)
    batch = data.sample(200_000, generator)
    assert {key: list(tensor.shape[1:]) for key, tensor in batch.items()} == {
        **{key: [] for key in KEYS},
        "observations": [O],
        "next_observations": [O],
        "actions": [A],
    }
    assert all(tensor.dtype == torch.float32 and tensor.device == data.device for tensor in batch.values())
    for tensor in batch.values():
        assert torch.equal(
            tensor.reshape(len(tensor), -1), batch["rewards"][:, None].expand_as(tensor.reshape(len(tensor), -1))
        )
    # Binomial counts: 4000 expected per row, standard deviation 63.
    counts = torch.bincount(batch["rewards"].long(), minlength=N)
    assert (counts - 4000).abs().max() < 6 * 63

    again = data.sample(200_000, torch.Generator(device).manual_seed(0))
    assert torch.equal(again["rewards"], batch["rewards"])
    assert not torch.equal(data.sample(200_000, generator)["rewards"], batch["rewards"])


def test_empty_batch():
    batch = dataset().sample(0, torch.Generator())
    assert {key: list(tensor.shape) for key, tensor in batch.items()} == {
        **{key: [0] for key in KEYS},
        "observations": [0, O],
        "next_observations": [0, O],
        "actions": [0, A],
    }


@pytest.mark.gpu
def test_generator_of_another_device():
    with pytest.raises(ValueError, match="generator: expected one on cuda"):
        dataset().to("cuda").sample(4, torch.Generator())


def test_bad_sampling():
    with pytest.raises(ValueError, match="batch_size: expected zero or more, got -1"):
        dataset().sample(-1, torch.Generator())
    empty = Dataset(NAME, {key: tensor[:0] for key, tensor in dataset().tensors.items()})
    with pytest.raises(ValueError, match="empty"):
        empty.sample(1, torch.Generator())
    assert len(empty.sample(0, torch.Generator())["rewards"]) == 0


@pytest.mark.parametrize(
    ("key", "tensor", "error", "message"),
    [
        ("rewards", torch.zeros(N, dtype=torch.float64), TypeError, r"'rewards'.*expected float32, got torch.float64"),
        ("rewards", torch.zeros(N, 1), ValueError, r"'rewards'.*expected \[50\], got \[50, 1\]"),
        ("actions", torch.zeros(N - 1, A), ValueError, r"'actions'.*expected \[50, 2\], got \[49, 2\]"),
        ("actions", torch.zeros(N), ValueError, r"'actions'.*expected \[N, dim\], got \[50\]"),
        ("next_observations", torch.zeros(N, O + 1), ValueError, r"'next_observations'.*expected \[50, 3\]"),
        ("masks", torch.zeros(N, device="meta"), ValueError, r"'masks'.*expected device cpu, got meta"),
        ("valids", torch.zeros(N), ValueError, "expected the keys observations"),
    ],
)
def test_bad_tensors(key, tensor, error, message):
    with pytest.raises(error, match=message):
        Dataset(NAME, {**dataset().tensors, key: tensor})


def test_what_the_behaviour_did_next():
    data = dataset()
    assert data.with_behaviour((), 0.9) is data
    more = data.with_behaviour(("next_actions", "returns"), 0.9)
    rows = {key: tensor.double().numpy() for key, tensor in more.tensors.items()}
    assert all(torch.equal(more.tensors[key], tensor) for key, tensor in data.tensors.items())
    for i in range(N):
        last = rows["terminals"][i] == 1
        assert np.array_equal(rows["next_actions"][i], rows["actions"][i if last else i + 1])
        # Ten rows are a trajectory; -1 goes on for ever behind one that is not solved.
        following = rows["rewards"][i] / 0.1 if last else rows["returns"][i + 1]
        assert rows["returns"][i] == pytest.approx(rows["rewards"][i] + 0.9 * rows["masks"][i] * following, rel=1e-6)
    batch = more.sample(7, torch.Generator().manual_seed(0))
    assert batch["next_actions"].shape == (7, A) and batch["returns"].shape == (7,)
    with pytest.raises(ValueError, match="expected some of next_actions, returns, got rewards"):
        data.with_behaviour(("rewards",), 0.9)
    with pytest.raises(ValueError, match=r"'next_actions'.*expected \[50, 2\]"):
        Dataset(NAME, {**data.tensors, "next_actions": torch.zeros(N, A + 1)})


# Transitions files: no simulator


@pytest.fixture
def no_simulator(monkeypatch):
    for package in ("ogbench", "gymnasium", "mujoco", "dm_control"):
        monkeypatch.setitem(sys.modules, package, None)


def test_transitions_file_round_trip_without_a_simulator(tmp_path, no_simulator):
    data = dataset()
    save_transitions(data, tmp_path / "t.npz")
    train, val = load_dataset(NAME, dataset_path=tmp_path / "t.npz")
    assert val is None and train.name == NAME
    assert all(torch.equal(train.tensors[key], data.tensors[key]) for key in KEYS)
    save_transitions(dataset(1), tmp_path / "t-val.npz")
    _, val = load_dataset(NAME, dataset_path=str(tmp_path / "t.npz"))
    assert torch.equal(val.tensors["rewards"], dataset(1).tensors["rewards"])


def test_file_types_are_converted_and_actions_clipped(tmp_path):
    file = arrays()
    file["actions"][:2] = [[1, -1], [1.0005, 0.5]]
    file = {key: array.astype(np.float64) for key, array in file.items()}
    np.savez(tmp_path / "t.npz", **{**file, "terminals": file["terminals"].astype(bool)})
    train, _ = load_dataset(NAME, dataset_path=tmp_path / "t.npz")
    limit = np.float32(1 - 1e-5)
    np.testing.assert_array_equal(train.tensors["actions"][:2], np.array([[limit, -limit], [limit, 0.5]], np.float32))
    assert train.tensors["actions"].abs().max() == limit
    assert all(tensor.dtype == torch.float32 for tensor in train.tensors.values())


def without(key):
    return lambda file: file.pop(key)


def changed(key, function):
    return lambda file: file.update({key: function(file[key].copy())})


def with_value(key, value, index=(7,)):
    def change(array):
        array = array.astype(np.float32)
        array[index] = value
        return array

    return changed(key, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("next_observations"), "the key 'next_observations' is missing; it has actions"),
        (without("terminals"), "the key 'terminals' is missing"),
        *((with_value(key, np.nan), f"'{key}': NaN or infinite value in row 7") for key in KEYS),
        (with_value("rewards", -np.inf, 12), "'rewards': NaN or infinite value in row 12"),
        (with_value("actions", 1.5), r"'actions': expected values in [-1, 1], got ["),
        (with_value("masks", 0.5), "'masks': expected only 0 and 1"),
        (with_value("terminals", 2), "'terminals': expected only 0 and 1"),
        (changed("actions", lambda a: a[:-1]), "'actions': expected 50 rows like 'observations', got 49"),
        (changed("rewards", lambda a: a[:, None]), "'rewards': expected 1 dimension(s), got shape [50, 1]"),
        (changed("observations", lambda a: a[:, None]), "'observations': expected one or two dimensions"),
        (changed("observations", lambda a: a[:, 0]), "'observations': expected 2 dimension(s), got shape [50]"),
        (changed("next_observations", lambda a: a[:, :2]), "'next_observations': expected shape [50, 3] like"),
        (changed("observations", lambda a: a.astype(np.int64)), "'observations': expected floating point numbers"),
        (changed("observations", lambda a: a.astype("U8")), "'observations': expected numbers, got dtype <U8"),
        (changed("rewards", lambda a: a.astype(np.complex64)), "'rewards': expected numbers, got dtype complex64"),
        (lambda file: file.update({key: array[:0] for key, array in file.items()}), "expected at least one row"),
    ],
)
def test_bad_transitions(tmp_path, change, message):
    file = arrays()
    change(file)
    np.savez(tmp_path / "t.npz", **file)
    with pytest.raises(UserError) as error:
        load_dataset(NAME, dataset_path=tmp_path / "t.npz")
    assert str(tmp_path / "t.npz") in str(error.value) and message in str(error.value)


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    np.savez(tmp_path / "t.npz", **{**arrays(), "actions": np.array([Bomb()], dtype=object)})
    with pytest.raises(UserError, match=r"t\.npz: 'actions' cannot be read"):
        load_dataset(NAME, dataset_path=tmp_path / "t.npz")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(tmp_path, share):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays())
    data = buffer.getvalue()
    (tmp_path / "t.npz").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"t\.npz: not a complete npz file"):
        load_dataset(NAME, dataset_path=tmp_path / "t.npz")


def test_damaged_file(tmp_path):
    np.savez_compressed(tmp_path / "t.npz", **arrays())
    data = bytearray((tmp_path / "t.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "t.npz") as archive:
        start = archive.getinfo("rewards.npy").header_offset
    data[start + 60 : start + 70] = bytes(10)
    (tmp_path / "t.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"t\.npz: 'rewards' cannot be read"):
        load_dataset(NAME, dataset_path=tmp_path / "t.npz")


def test_validation_file_of_another_environment(tmp_path):
    save_transitions(dataset(), tmp_path / "t.npz")
    other = {
        key: tensor[:, :2] if key.endswith("observations") else tensor for key, tensor in dataset().tensors.items()
    }
    save_transitions(Dataset(NAME, other), tmp_path / "t-val.npz")
    with pytest.raises(UserError, match=r"t-val\.npz.*does not fit"):
        load_dataset(NAME, dataset_path=tmp_path / "t.npz")


def test_bad_arguments(tmp_path):
    path = tmp_path / "t.npz"
    save_transitions(dataset(), path)
    with pytest.raises(UserError, match="did you mean pointmaze-arena-navigate-singletask-v0"):
        load_dataset("pointmaze-arena-navigate-v0", dataset_path=path)
    with pytest.raises(UserError, match=r"none\.npz: no such file"):
        load_dataset(NAME, dataset_path=tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"expected a file whose name ends in \.npz"):
        load_dataset(NAME, dataset_path=tmp_path)
    with pytest.raises(UserError, match="not both"):
        load_dataset(NAME, dataset_path=path, dataset_dir=tmp_path)
    with pytest.raises(UserError, match="device: "):
        load_dataset(NAME, dataset_path=path, device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(tmp_path):
    with pytest.raises(UserError, match="cuda was asked for, and PyTorch sees no CUDA GPU"):
        load_dataset(NAME, dataset_path=tmp_path / "none.npz", device="cuda")


def test_saving_fails(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.npz"):
        save_transitions(dataset(), tmp_path / "t.txt")
    with pytest.raises(UserError, match="cannot write"):
        save_transitions(dataset(), tmp_path / "none" / "t.npz")


def test_saving_on_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "t.npz"
    save_transitions(dataset(), path)
    before = path.read_bytes()
    large = Dataset(
        NAME, {key: tensor.repeat((50, *[1] * (tensor.ndim - 1))) for key, tensor in dataset().tensors.items()}
    )
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"t\.npz: cannot write, the disk is full.*old file is intact"):
            save_transitions(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# Raw files: OGBench's loader


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """A folder with a small arena dataset."""
    pytest.importorskip("ogbench")
    from fastflow.collect import collect

    folder = tmp_path_factory.mktemp("data")
    collect(DATASET, dataset_dir=folder, episodes=4, val_episodes=2, progress=False)
    return folder


def test_raw_file_becomes_transitions(collected):
    train, val = load_dataset(NAME, dataset_dir=collected)
    raw = read(collected / f"{DATASET}.npz")
    tensors = {key: tensor.numpy() for key, tensor in train.tensors.items()}
    assert (len(train), len(val), train.obs_dim, train.action_dim) == (4000, 2000, 2, 2)
    # The last row of an episode is the next observation of its last transition, and none of its own.
    rows = np.flatnonzero(~raw["terminals"])
    np.testing.assert_array_equal(tensors["observations"], raw["observations"][rows])
    np.testing.assert_array_equal(tensors["next_observations"], raw["observations"][rows + 1])
    np.testing.assert_array_equal(tensors["terminals"], raw["terminals"][rows + 1])
    np.testing.assert_array_equal(tensors["actions"], raw["actions"][rows].clip(-1 + 1e-5, 1 - 1e-5))
    assert np.abs(tensors["actions"]).max() < 1 and np.abs(raw["actions"]).max() == 1


@pytest.mark.parametrize(("task", "goal"), [("", (20, 20)), ("-task1", (20, 20)), ("-task3", (8, 8))])
def test_rewards_are_those_of_the_task(collected, task, goal):
    # Success: the state, not the next one, is within 1 of the goal.
    train, _ = load_dataset(f"pointmaze-arena-navigate-singletask{task}-v0", dataset_dir=collected)
    distance = np.linalg.norm(train.tensors["observations"].numpy() - goal, axis=1)
    success = distance <= 1
    assert success.any() or task != "-task3"
    np.testing.assert_array_equal(train.tensors["rewards"], success - 1.0)
    np.testing.assert_array_equal(train.tensors["masks"], 1.0 - success)
    # Trajectories go on after success: ends are not successes.
    assert train.tensors["terminals"].sum() == 4


def test_relabelled_file_needs_no_simulator(collected, tmp_path, monkeypatch):
    train, val = load_dataset(NAME, dataset_dir=collected)
    save_transitions(train, tmp_path / "t.npz")
    save_transitions(val, tmp_path / "t-val.npz")
    monkeypatch.setitem(sys.modules, "mujoco", None)
    again = load_dataset(NAME, dataset_path=tmp_path / "t.npz")
    for ours, theirs in zip(again, (train, val)):
        assert all(torch.equal(ours.tensors[key], theirs.tensors[key]) for key in KEYS)
    with pytest.raises(MissingExtra) as error:
        load_dataset(NAME, dataset_path=collected / f"{DATASET}.npz")
    assert 'pip install "fastflow[rl]"' in str(error.value) and "fastflow relabel" in str(error.value)


def test_dataset_path_with_a_misleading_folder(collected, tmp_path):
    # OGBench's own loader would look for the validation file in another folder.
    folder = tmp_path / "all.npz files"
    shutil.copytree(collected, folder)
    train, val = load_dataset(NAME, dataset_path=folder / f"{DATASET}.npz")
    assert (len(train), len(val)) == (4000, 2000)


def test_dataset_path_without_its_validation_file(collected, tmp_path):
    shutil.copy(collected / f"{DATASET}.npz", tmp_path)
    with pytest.raises(UserError, match=rf"{DATASET}-val\.npz: no such file"):
        load_dataset(NAME, dataset_path=tmp_path / f"{DATASET}.npz")


@pytest.mark.parametrize("suffix", ["", "-val"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("qpos"), "the key 'qpos' is missing; it has actions, observations, qvel, terminals"),
        (without("observations"), "the key 'observations' is missing"),
        (with_value("qpos", np.nan), "'qpos': NaN or infinite value in row 7"),
        (with_value("actions", np.inf, 1000), "'actions': NaN or infinite value in row 1000"),
        (with_value("actions", -3), "'actions': expected values in [-1, 1], got [-3,"),
        (changed("qpos", lambda a: a[1:]), "'qpos': expected "),
        (changed("observations", lambda a: np.repeat(a, 2, 1)), "as pointmaze-arena-navigate-singletask-v0 has, got 4"),
        (changed("terminals", lambda a: a[:-1]), "'terminals': expected "),
        (changed("terminals", np.zeros_like), "'terminals': expected the last row to end a trajectory"),
        (changed("terminals", np.ones_like), "every row ends a trajectory"),
        (changed("terminals", lambda a: a * 3.0), "'terminals': expected only 0 and 1"),
        (changed("actions", lambda a: a.astype(np.int32)), "'actions': expected floating point numbers, got int32"),
    ],
)
def test_bad_raw_files(collected, tmp_path, change, message, suffix):
    folder = shutil.copytree(collected, tmp_path / "data")
    path = folder / f"{DATASET}{suffix}.npz"
    file = read(path)
    change(file)
    np.savez(path, **file)
    with pytest.raises(UserError) as error:
        load_dataset(NAME, dataset_dir=folder)
    assert str(path) in str(error.value) and message in str(error.value)


def test_truncated_raw_file(collected, tmp_path):
    folder = shutil.copytree(collected, tmp_path / "data")
    path = folder / f"{DATASET}-val.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{DATASET}-val\.npz: not a complete npz file"):
        load_dataset(NAME, dataset_dir=folder)


# Downloading


def test_what_cannot_be_downloaded_is_to_be_collected(tmp_path):
    with pytest.raises(UserError) as error:
        load_dataset(NAME, dataset_dir=tmp_path / "new")
    assert f"fastflow collect {DATASET} --dataset-dir {tmp_path / 'new'}" in str(error.value)
    assert not (tmp_path / "new").exists()


class Host(http.server.SimpleHTTPRequestHandler):
    """OGBench's host: serves a folder; `cut` closes connections in the middle of a file."""

    cut = False

    def copyfile(self, source, outputfile):
        if self.cut:
            outputfile.write(source.read(1000))
            self.close_connection = True
        else:
            super().copyfile(source, outputfile)

    def log_message(self, *args):
        pass


@pytest.fixture
def host(collected, tmp_path, monkeypatch):
    """A host on this machine, with the collected files under the name of a published dataset."""
    import ogbench.utils

    folder = tmp_path / "host"
    folder.mkdir()
    for suffix in ("", "-val"):
        shutil.copy(collected / f"{DATASET}{suffix}.npz", folder / f"pointmaze-medium-navigate-v0{suffix}.npz")
    handler = type("Handler", (Host,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", f"http://127.0.0.1:{server.server_port}")
    server.folder, server.handler = folder, handler
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    # OGBench closes neither its connections nor its files.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


MEDIUM = "pointmaze-medium-navigate-v0"
MEDIUM_TASK = "pointmaze-medium-navigate-singletask-v0"
downloads = pytest.mark.filterwarnings("ignore::ResourceWarning")


@downloads
def test_download(host, tmp_path):
    train, val = load_dataset(MEDIUM_TASK, dataset_dir=tmp_path / "data")
    assert (len(train), len(val)) == (4000, 2000)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [f"{MEDIUM}-val.npz", f"{MEDIUM}.npz"]
    # Only what is missing is downloaded again.
    (tmp_path / "data" / f"{MEDIUM}-val.npz").unlink()
    (host.folder / f"{MEDIUM}.npz").unlink()
    load_dataset(MEDIUM_TASK, dataset_dir=tmp_path / "data")


def check_failed_download(folder: Path, cause: str) -> None:
    with pytest.raises(UserError) as error:
        load_dataset(MEDIUM_TASK, dataset_dir=folder)
    message = str(error.value)
    assert cause in message and MIRROR in message
    assert f"{MEDIUM}.npz and {MEDIUM}-val.npz" in message and f"fastflow collect {MEDIUM}" in message
    assert not list(folder.iterdir())


@downloads
def test_download_cut_short(host, tmp_path):
    host.handler.cut = True
    check_failed_download(tmp_path / "data", "cut short")


@downloads
def test_host_without_the_file(host, tmp_path):
    (host.folder / f"{MEDIUM}-val.npz").unlink()
    check_failed_download(tmp_path / "data", "404")


@downloads
def test_host_is_down(host, tmp_path):
    host.shutdown()
    host.server_close()
    check_failed_download(tmp_path / "data", "refused")


def test_downloading_needs_the_extra(tmp_path, no_simulator):
    with pytest.raises(MissingExtra, match="downloading it needs OGBench"):
        load_dataset(MEDIUM_TASK, dataset_dir=tmp_path)
