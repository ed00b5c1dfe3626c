"""Every precision against plain loops, the published code book, and the bounds that its levels promise."""

from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import LutError
from src.lut.codecs import CODECS, NF3, NF4, normal_float
from src.lut.layout import TableLayout
from tests.lut import reference_codecs as reference

PACKED = ("int8", "nf4", "nf3")
HIDDEN = 256


def encode_by_loops(precision: str, vector: list[float]) -> reference.Encoded:
    if precision == "int8":
        return reference.encode_int8(vector)
    if precision == "nf4":
        return reference.encode_normal_float(vector, NF4, len(vector))
    return reference.encode_normal_float(vector, NF3, 128)


def random_vectors(seed: int) -> torch.Tensor:
    """Vectors (2, 3, D) of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1e-3, 1.0, 300.0]).view(1, 3, 1)
    return torch.randn(2, 3, HIDDEN, generator=generator) * sizes


@pytest.mark.parametrize("precision", PACKED)
def test_bytes_and_values_equal_plain_loops(precision: str) -> None:
    vectors = random_vectors(0)
    vectors[0, 0] = 0
    vectors[1, 1, 128:] = 0
    codec = CODECS[precision]
    stored = codec.encode(vectors)
    decoded = codec.decode(stored, HIDDEN)
    for vector, row, values in zip(vectors.view(-1, HIDDEN), stored.flatten(0, 1), decoded.flatten(0, 1), strict=True):
        expected = encode_by_loops(precision, vector.tolist())
        assert row.numpy().tobytes() == expected.stored
        torch.testing.assert_close(values, torch.tensor(expected.values), rtol=1e-6, atol=0)


def test_nf4_is_the_published_code_book() -> None:
    assert NF4 == reference.QLORA_NF4
    assert normal_float(4) == pytest.approx(reference.QLORA_NF4, abs=2e-7)


def test_nf3_follows_the_same_construction() -> None:
    assert pytest.approx(reference.NF3, abs=2e-7) == NF3
    assert sorted(NF3) == list(NF3)
    assert (NF3[0], NF3[3], NF3[-1]) == (-1, 0, 1)
    # steps of probability are equal on either side
    probabilities = [NormalDist().cdf(level * NormalDist().inv_cdf(1 - (1 / 16 + 1 / 14) / 2)) for level in NF3]
    steps = [after - before for before, after in pairwise(probabilities)]
    assert steps[:3] == pytest.approx([steps[0]] * 3)
    assert steps[3:] == pytest.approx([steps[3]] * 4)


@pytest.mark.parametrize("precision", ["nf4", "nf3"])
def test_values_between_two_levels_take_the_nearer_and_in_the_middle_the_lower(precision: str) -> None:
    levels = NF4 if precision == "nf4" else NF3
    codec = CODECS[precision]
    for index, (lower, upper) in enumerate(pairwise(levels)):
        middle = torch.tensor((lower + upper) / 2)  # float32
        vector = torch.zeros(128)
        vector[0], vector[1], vector[2] = 1, middle, torch.nextafter(middle, torch.tensor(2.0))
        decoded = codec.decode(codec.encode(vector), 128)
        in_float32 = torch.tensor(levels)
        assert decoded[2] == in_float32[index + 1]
        assert decoded[1] in (in_float32[index], in_float32[index + 1])  # float32 has no exact middle
        assert torch.equal(decoded[3:], torch.zeros(125))
    exact = torch.zeros(128)
    exact[: len(levels)] = torch.tensor(levels)
    assert torch.equal(codec.decode(codec.encode(exact), 128), exact)


@pytest.mark.parametrize("precision", PACKED)
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-20, 12))
def test_the_error_is_bounded_by_half_a_gap_and_the_rounding_of_the_scale(
    precision: str, seed: int, exponent: int
) -> None:
    vectors = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codec = CODECS[precision]
    error = (codec.decode(codec.encode(vectors), HIDDEN) - vectors).abs()
    block_size = 128 if precision == "nf3" else HIDDEN
    largest = vectors.abs().unflatten(-1, (-1, block_size)).amax(-1, keepdim=True)
    scale = largest.half().float()
    levels = {"int8": (0.0, 1 / 127), "nf4": NF4, "nf3": NF3}[precision]
    half_gap = max(upper - lower for lower, upper in pairwise(levels)) / 2
    bound = scale * half_gap * (1 + 1e-5) + (largest - scale).abs()
    assert (error.unflatten(-1, (-1, block_size)) <= bound).all()


@pytest.mark.parametrize("precision", sorted(CODECS))
def test_any_layer_can_be_decoded_alone_and_rows_at_odd_addresses_too(precision: str) -> None:
    codec = CODECS[precision]
    stored = codec.encode(random_vectors(1))  # (2, 3, vector_bytes)
    whole = codec.decode(stored, HIDDEN)
    assert torch.equal(codec.decode(stored[:, 1:2], HIDDEN), whole[:, 1:2])
    if precision in PACKED:
        shifted = torch.empty(stored.numel() + 1, dtype=torch.uint8)[1:].view(stored.shape).copy_(stored)
        assert torch.equal(codec.decode(shifted, HIDDEN), whole)


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e6])
def test_values_that_cannot_be_scaled_are_refused(precision: str, bad: float) -> None:
    vectors = torch.zeros(2, HIDDEN)
    vectors[1, 7] = bad
    with pytest.raises(LutError, match="NaN, infinity or a value above 65,504"):
        CODECS[precision].encode(vectors)


def test_hidden_sizes_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(LutError, match=r"nf3 packs values by 128, but model.hidden_size is 192; choose another"):
        CODECS["nf3"].vector_bytes(192)
    with pytest.raises(LutError, match=r"nf4 packs values by 2, but model.hidden_size is 33"):
        CODECS["nf4"].encode(torch.zeros(1, 33))


@pytest.mark.parametrize(("precision", "share"), [("nf4", 0.2513), ("nf3", 0.1953)])
def test_sizes_are_exact(precision: str, share: float) -> None:
    def layout(name: str) -> TableLayout:
        return TableLayout(vocab_size=50304, num_layers=12, num_experts=4, hidden_size=768, precision=name)

    assert layout("int8").row_bytes == 12 * 4 * (768 + 2)
    assert layout("nf4").row_bytes == 12 * 4 * (768 // 2 + 2)
    assert layout("nf3").row_bytes == 12 * 4 * 768 * (48 + 2) // 128
    assert layout(precision).row_bytes / layout("float16").row_bytes == pytest.approx(share, abs=5e-5)
