"""What layers that read the same tensor cost, written as bases or dense: no weights are needed to know it."""

import math
from dataclasses import dataclass

MAX_MOMENT = 16384  # a side longer than this has its moment replaced by its mean eigenvalue times the identity


def moment_shape(side: int) -> tuple[int, ...]:
    """Of the second moment of a side of that many numbers."""
    return (side, side) if side <= MAX_MOMENT else ()


@dataclass(frozen=True)
class Shape:
    """How many numbers a group of linear layers reads, and how many each of them writes."""

    inputs: int
    outputs: tuple[int, ...]

    @property
    def full_rank(self) -> int:
        """How many bases lose nothing."""
        return min(self.inputs, sum(self.outputs))

    @property
    def basis_cost(self) -> int:
        """Parameters of one basis."""
        return self.inputs + sum(self.outputs)

    @property
    def full_cost(self) -> int:
        """Parameters of so many bases that they lose nothing."""
        return self.full_rank * self.basis_cost

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense weights."""
        return self.inputs * sum(self.outputs)

    @property
    def largest_rank(self) -> int:
        """The most bases that have fewer parameters than the dense weights."""
        return (self.dense_cost - 1) // self.basis_cost

    def deployed(self, rank: int) -> int:
        """Parameters of so many bases, or of the dense weights where these are fewer."""
        return min(rank * self.basis_cost, self.dense_cost)

    @property
    def output_sides(self) -> tuple[int, ...]:
        """Sides of the second moments of what is written: of all outputs together, or of each layer's if too long."""
        whole = sum(self.outputs)
        return (whole,) if moment_shape(whole) else self.outputs

    @property
    def input_moment(self) -> int:
        """Entries of the second moment of what is read."""
        return math.prod(moment_shape(self.inputs))

    @property
    def output_moment(self) -> int:
        """Entries of the second moments of what is written."""
        return sum(math.prod(moment_shape(side)) for side in self.output_sides)

    def __str__(self) -> str:
        return f"{self.inputs} -> {'+'.join(map(str, self.outputs))}"
