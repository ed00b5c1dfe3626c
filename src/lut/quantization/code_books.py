"""Normal-float code books: levels that normally distributed values use about equally often (arXiv:2305.14314).

The levels are quantiles of N(0, 1), scaled to [-1, 1], with an exact zero. Of 2^k levels, 2^(k-1) are positive and
2^(k-1) - 1 negative.
"""

from statistics import NormalDist

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 published values (arXiv:2305.14314, Appendix E)."""


def normal_float(bits: int) -> tuple[float, ...]:
    """Construct the code book of `bits` bits, in ascending order; `normal_float(4)` is NF4 to seven digits.

    The outermost quantile lies halfway between those that cut 2^k and 2^k - 1 equal parts in half; from it, each
    side takes equal steps of probability towards the median.
    """
    levels = 2**bits
    outermost = 1 - (1 / (2 * levels) + 1 / (2 * (levels - 1))) / 2
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [quantile(outermost - step * index) for index in range(count)]

    values = [*(-value for value in side(levels // 2 - 1)), 0.0, *reversed(side(levels // 2))]
    return tuple(value / values[-1] for value in values)


NF3 = normal_float(3)
"""The 8 values that the construction gives for three bits; arXiv:2305.14314 prints four bits only."""
