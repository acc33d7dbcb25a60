"""How channels lie in the grids of convolutional nets: how large a grid is, what makes a channel, what reads it.

Grids are square; a k x k convolution reads k * k taps of every channel.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

STAGES = (16, 32, 64)
"""Channels of the residual stream in each stage of a CIFAR ResNet."""
SIDE = 32
"""Places of a CIFAR image along each side; every stage of a ResNet but the first halves them."""
TAPS = 9
"""Places of a patch of a 3 x 3 convolution."""
COLOURS = 3
"""Channels of an image."""


@dataclass(frozen=True, slots=True)
class SiteLayout:
    """The channels between two maps.

    Attributes:
        before: channels that the map making them reads.
        taps: places of the patch it reads.
        channels: its outputs, the units.
        span: places of the patch that the map reading them reads.
        writes: outputs of that map.
        side: places along each side at which it reads a patch.
        chained: the map that reads them makes the channels of the next site.
    """

    before: int
    taps: int
    channels: int
    span: int
    writes: int
    side: int
    chained: bool = False


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One residual block.

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
        """Places along each side of what it writes."""
        return self.side_before // self.stride

    @property
    def keeps_shape(self) -> bool:
        """Whether it writes as many channels and places as it reads."""
        return self.stride == 1 and self.channels_before == self.channels


def block_layouts(blocks: int) -> tuple[BlockLayout, ...]:
    """The blocks of a CIFAR ResNet, the same number in each stage."""
    return stacked([blocks // len(STAGES)] * len(STAGES), STAGES, STAGES[0], SIDE)


def stacked(depths: Sequence[int], channels: Sequence[int], before: int, side: int) -> tuple[BlockLayout, ...]:
    """Blocks in stages; every stage but the first halves the grid.

    Args:
        depths: blocks of each stage.
        channels: channels of the residual stream in each stage.
        before: channels the first block reads.
        side: places along each side of what it reads.
    """
    found: list[BlockLayout] = []
    for stage, (depth, width) in enumerate(zip(depths, channels, strict=True)):
        for place in range(depth):
            stride = 2 if stage and not place else 1
            found.append(BlockLayout(before, width, side, stride))
            before, side = width, side // stride
    return tuple(found)


def chain(channels: Sequence[int], pools: Collection[int], classes: int, side: int = SIDE) -> tuple[SiteLayout, ...]:
    """The sites of 3 x 3 convolutions one behind the other, and a map of the last one's channels to classes.

    Args:
        channels: of every convolution.
        pools: the convolutions that max pooling follows.
        classes: outputs of the last map.
        side: places along each side of the image.
    """
    found: list[SiteLayout] = []
    before, last = COLOURS, len(channels) - 1
    for place, width in enumerate(channels):
        side //= 2 if place in pools else 1
        span, writes = (TAPS, channels[place + 1]) if place < last else (1, classes)
        found.append(SiteLayout(before, TAPS, width, span, writes, side, chained=place < last))
        before = width
    return tuple(found)


def bottlenecks(blocks: Sequence[BlockLayout], widths: Sequence[int]) -> tuple[SiteLayout, ...]:
    """The sites of residual blocks of a 1 x 1, a 3 x 3 and a 1 x 1 convolution: two of each.

    Args:
        blocks: the blocks; strides are those of the 3 x 3 convolutions.
        widths: channels between their maps, two of every block.
    """
    found: list[SiteLayout] = []
    for block, first, second in zip(blocks, widths[::2], widths[1::2], strict=True):
        found.append(SiteLayout(block.channels_before, 1, first, TAPS, second, block.side, chained=True))
        found.append(SiteLayout(first, TAPS, second, 1, block.channels, block.side))
    return tuple(found)
