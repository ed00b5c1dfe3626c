"""Windows as a pure function of (seed, sample), over one stream and over several in their weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.config import DataConfig
from src.data.datamodule import StepSampler, StepWindows
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.data.shards import TokenSequence
from src.data.windows import Mixture, find_distinct, held_out_windows, permute, training_windows
from src.errors import ConfigError, DataError
from tests.data.corpora import stdlib_config

LENGTH = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return stdlib_config(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def corpus(config: DataConfig) -> PackedCorpus:
    return prepare_corpus(config)


def sequence(folder: Path, *shards: int, first: int = 0) -> TokenSequence:
    """Ids that count up from `first`, over shard files of the given lengths."""
    files = []
    for number, length in enumerate(shards):
        path = folder / f"{first}-{number}.bin"
        np.arange(first, first + length, dtype="<u4").tofile(path)
        files, first = [*files, path], first + length
    return TokenSequence(files, shards, "<u4")


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    mapped = permute(np.arange(size, dtype=np.int64), size, key=(seed, epoch))
    assert np.array_equal(np.sort(mapped), np.arange(size))


def test_permutations_of_epochs_seeds_and_streams_differ() -> None:
    index = np.arange(1000, dtype=np.int64)
    orders = [permute(index, 1000, key=key) for key in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))]
    for first in range(4):
        for second in range(first):
            assert (orders[first] == orders[second]).mean() < 0.02
    assert abs(np.corrcoef(index, orders[0])[0, 1]) < 0.1


def test_an_epoch_holds_every_window_once_and_windows_overlap_by_one_token(corpus: PackedCorpus) -> None:
    tokens = corpus.tokens("train")
    num_windows = (len(tokens) - 1) // 32
    windows = training_windows(tokens, 32, np.arange(num_windows, dtype=np.int64), seed=0)
    expected = {tuple(tokens.read(start * 32, 33).tolist()) for start in range(num_windows)}
    assert {tuple(window) for window in windows.tolist()} == expected


@given(shards=st.lists(st.integers(0, 7), min_size=1, max_size=6), data=st.data())
def test_a_sequence_of_shards_reads_like_one_array(
    shards: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = sequence(tmp_path_factory.mktemp("shards"), *shards)
    assert len(tokens) == sum(shards)
    if len(tokens):
        start = data.draw(st.integers(0, len(tokens) - 1))
        length = data.draw(st.integers(1, len(tokens) - start))
        assert tokens.read(start, length).tolist() == list(range(start, start + length))
    assert [int(value) for chunk in tokens.chunks(3) for value in chunk] == list(range(len(tokens)))


@pytest.mark.parametrize(
    ("micro", "world_size", "windows"),
    [(12, 1, 12), (5, 1, 4), (48, 1, 24), (12, 2, 12), (12, 3, 8), (8, 4, 6), (7, 2, 6), (12, 24, 1)],
)
def test_a_device_takes_at_most_the_micro_batch_and_equally_many_each_time(
    micro: int, world_size: int, windows: int
) -> None:
    config = DataConfig(global_batch_size=24, micro_batch_size=micro)
    assert config.micro_batch_windows(world_size) == windows
    assert config.micro_batches_per_step(world_size) * windows * world_size == 24


@pytest.mark.parametrize(("world_size", "multiple"), [(5, 25), (32, 32)])
def test_devices_that_do_not_divide_the_global_batch_are_refused(world_size: int, multiple: int) -> None:
    config = DataConfig(global_batch_size=24, micro_batch_size=4)
    for count in (config.micro_batch_windows, config.micro_batches_per_step):
        with pytest.raises(ConfigError, match=rf"24 windows .* {world_size} devices .*size={multiple}$"):
            count(world_size)


@pytest.mark.parametrize(("micro", "world_size"), [(16, 2), (3, 4), (3, 1)])
def test_ranks_that_take_less_than_the_micro_batch_share_each_step(
    corpus: PackedCorpus, config: DataConfig, micro: int, world_size: int
) -> None:
    whole, shared = (replace(config, global_batch_size=16, micro_batch_size=size) for size in (16, micro))
    ranks = [StepWindows(corpus, shared, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = torch.cat([rank[3].flatten(0, 1) for rank in ranks])
    expected = StepWindows(corpus, whole, rank=0, world_size=1)[3].flatten(0, 1)
    assert sorted(together.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_step_without_overlap(corpus: PackedCorpus, config: DataConfig, world_size: int) -> None:
    alone = StepWindows(corpus, config, rank=0, world_size=1)
    ranks = [StepWindows(corpus, config, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 7, 1000):
        shares = torch.stack([rank[step] for rank in ranks], dim=1)  # (A, world, B, T+1)
        assert torch.equal(shares.flatten(0, 1), alone[step])


def test_two_ranks_see_disjoint_windows_that_together_are_one_epoch(
    corpus: PackedCorpus, config: DataConfig, tmp_path: Path
) -> None:
    tokens = sequence(tmp_path, 700, 901)  # 200 windows of 8, each with ids of its own; 25 steps of 8 windows
    seen: list[set[int]] = []
    for rank in range(2):
        dataset = StepWindows(corpus, config, rank=rank, world_size=2)
        dataset.mixture = Mixture([(tokens, 1.0)], LENGTH, seed=1)
        seen.append({int(window[0]) for step in range(25) for window in dataset[step].flatten(0, 1)})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(0, 1600, LENGTH))


def test_a_position_is_one_integer(corpus: PackedCorpus, config: DataConfig) -> None:
    dataset = StepWindows(corpus, config, rank=0, world_size=1)
    resumed = iter(StepSampler(5))
    assert torch.equal(dataset[next(resumed)], dataset[5])
    assert not torch.equal(dataset[5], StepWindows(corpus, replace(config, seed=1), 0, 1)[5])
    reordered = [StepWindows(corpus, replace(config, seed=seed, shuffle_seed=1), 0, 1)[5] for seed in (0, 1)]
    assert torch.equal(reordered[0], reordered[1])
    assert not torch.equal(dataset[5], reordered[0])


def test_held_out_windows_are_spread_and_fixed(corpus: PackedCorpus) -> None:
    tokens = corpus.tokens("validation")
    few, many = held_out_windows(tokens, 32, 4), held_out_windows(tokens, 32, 10**6)
    assert len(few) == 4
    assert len(many) == (len(tokens) - 1) // 32
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[2], many[len(many) // 2])


WEIGHTS = [5.0, 3.0, 1.5, 0.4, 0.1]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Five streams of 50 to 90 windows; an id says which stream it is from."""
    folder = tmp_path_factory.mktemp("mixed")
    lengths = [(50 + 10 * number) * LENGTH + 1 for number in range(5)]
    streams = [sequence(folder, length, first=1000 * number) for number, length in enumerate(lengths)]
    return Mixture(list(zip(streams, WEIGHTS, strict=True)), LENGTH, seed=3)


@pytest.mark.parametrize("first", [0, 777, 60_000])
def test_sources_arrive_in_their_weights(mixture: Mixture, first: int) -> None:
    samples = np.arange(first, first + 10_000, dtype=np.int64)
    streams = (mixture.windows(samples)[:, 0] // 1000).numpy()
    counts = np.bincount(streams, minlength=5)
    wanted = 10_000 * np.asarray(WEIGHTS) / sum(WEIGHTS)
    assert (np.abs(counts - wanted) <= 0.01 * wanted).all(), counts
    assert np.array_equal(streams, mixture.stream_of(samples))


def test_each_source_of_a_mixture_is_seen_whole_before_it_repeats(mixture: Mixture) -> None:
    windows = mixture.windows(np.arange(70_000, dtype=np.int64))  # beyond the period of turns
    starts = windows[:, 0].numpy()
    for stream in range(5):
        order = starts[starts // 1000 == stream]
        size = 50 + 10 * stream
        for epoch in range(2):
            assert len(set(order[epoch * size : (epoch + 1) * size])) == size
        if len(order) > 2 * size:
            assert not np.array_equal(order[:size], order[size : 2 * size])


def test_a_mixture_resumes_with_the_very_next_window(mixture: Mixture) -> None:
    whole = mixture.windows(np.arange(65_500, 65_600, dtype=np.int64))
    assert torch.equal(mixture.windows(np.arange(65_550, 65_600, dtype=np.int64)), whole[50:])


def test_a_mixture_of_one_is_its_stream(corpus: PackedCorpus) -> None:
    samples = np.arange(100, dtype=np.int64)
    one = Mixture([(corpus.tokens("train"), 1.0)], 32, seed=4).windows(samples)
    assert torch.equal(one, training_windows(corpus.tokens("train"), 32, samples, seed=4))


def test_a_weight_that_would_never_be_drawn_is_refused(tmp_path: Path) -> None:
    tokens = sequence(tmp_path, 100)
    with pytest.raises(DataError, match=r"weight 1e-09 is less than 1/65536 of all; raise it or leave the source out"):
        Mixture([(tokens, 1.0), (tokens, 1e-9)], LENGTH, seed=0)


@pytest.mark.parametrize("multiple", [1, 256])
def test_distinct_ids_of_a_batch_are_found_with_it(multiple: int) -> None:
    windows = torch.randint(50, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    inputs = windows[..., :-1]
    micro, step = (find_distinct(windows, per, multiple) for per in ("micro_batch", "step"))
    for index, ids in enumerate(inputs):
        found, inverse = micro.distinct(index) or pytest.fail("not found")
        assert torch.equal(found[inverse], ids)
        assert len(found) == -(-ids.unique().numel() // multiple) * multiple
    found, inverse = step.distinct() or pytest.fail("not found")
    assert torch.equal(found[inverse], inputs)
    assert find_distinct(windows, None).distinct() is None
    assert torch.equal(micro[..., :-1], inputs) and micro.shape == windows.shape
