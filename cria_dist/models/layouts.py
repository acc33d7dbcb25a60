"""How the blocks of a CIFAR ResNet lie in their grids: channels, sides and strides of three stages."""

from dataclasses import dataclass

STAGES = (16, 32, 64)
"""Channels of the residual stream in each stage."""
SIDE = 32
"""Places of the first grid along each side; every stage but the first halves them."""
TAPS = 9
"""Places of a patch."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One block.

    Attributes:
        channels_before: channels it reads.
        channels: channels it writes.
        side_before: places along each side of what it reads.
        stride: 2 where it halves them.
    """

    channels_before: int
    channels: int
    side_before: int
    stride: int

    @property
    def side(self) -> int:
        """Places along each side of what it writes, and of what is between its two maps."""
        return self.side_before // self.stride


def block_layouts(blocks: int) -> tuple[BlockLayout, ...]:
    """The blocks of a net, the same number in each stage."""
    found: list[BlockLayout] = []
    before, side = STAGES[0], SIDE
    for stage, channels in enumerate(STAGES):
        for place in range(blocks // len(STAGES)):
            stride = 2 if stage and not place else 1
            found.append(BlockLayout(before, channels, side, stride))
            before, side = channels, side // stride
    return tuple(found)
