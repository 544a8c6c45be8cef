"""How attention over short sequences is cut into tiles: plain arithmetic, no arrays.

The operands are [B*S, N*H]: a row is a token, the heads lie side by side. A *block* is what one grid step holds in
VMEM: a whole number of sequences, and all lanes or a whole number of heads. A *tile* is a window of `tile_rows`
consecutive rows in a block that starts at a multiple of 8 and covers `sequences` whole sequences. Their first row is
seldom the first row of the window: the rows before and after belong to other sequences and are masked. So nothing is
ever shifted, whatever the length. A *head group* is one head, or several which are computed side by side, with the
window of whole 128-lane tiles they lie in.
"""

import dataclasses
import itertools
import math
from typing import Any

LANES = 128
SUBLANES = 8
CHUNK = 2 * LANES  # columns of logits that are computed at a time, or rows
RIDERS = 2 * SUBLANES  # lanes beside a head's that take part in its logits, where keys lie across
FORWARD_STAGES = 3
BACKWARD_STAGES = 5
ROLLING_PASSES = 4  # of a loop whose passes overlap, at least


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """Heads computed together: `start` and `width` of their lane window, `heads` their lanes within that window."""

    start: Any
    width: int
    heads: tuple[tuple[Any, Any], ...]

    @property
    def lane_tiles(self) -> range:
        """The 128-lane tiles of the block that the window covers."""
        return range(self.start // LANES, -(-(self.start + self.width) // LANES))


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which query of a tile stands in which column (lane) of the logits of a head group.

    Every head has `own` columns, a multiple of 128, for the tile's first `own_rows` queries. Where few queries are
    left (of two heads at most 64 rows over a multiple of 128, of four 32) those of all heads share the 128 columns that
    follow, `shared` columns for each head: so two heads of 257 tokens need five times 128 columns instead of six.
    """

    own: int
    own_rows: int
    shared: int
    shared_rows: int
    total: int


def riders_of(group: HeadGroup) -> int | None:
    """First of `RIDERS` lanes beside those of a group's one head, from a multiple of 16 on; None if there are none."""
    ((start, stop),) = group.heads
    first = 0 if start >= RIDERS else round_up(stop, RIDERS)
    return first if first + RIDERS <= group.width else None


def can_lie_across(groups: tuple[HeadGroup, ...], tile_rows: int) -> bool:
    """Return whether `keys_on_lanes` can take these groups: one head each, whole registers, lanes to spare."""
    return tile_rows > LANES and all(
        group.width % LANES == 0 and riders_of(group) is not None and all(edge % RIDERS == 0 for edge in group.heads[0])
        for group in groups
    )


def columns_of(rows: int, heads: int) -> Columns:
    """The columns of a group of `heads` heads in a tile of `rows` rows."""
    rest = rows % LANES
    shared = LANES // 2 if rest > LANES // 4 else LANES // 4
    if rows > LANES and heads > 1 and 0 < rest <= shared <= LANES // heads:
        return Columns(rows - rest, rows - rest, shared, rest, heads * (rows - rest) + LANES)
    own = round_up(rows, LANES)
    return Columns(own, rows, 0, 0, heads * own)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of one kernel call; see the module's text for the words.

    `unroll` tiles are worked on in one pass of the loop. `lags` and `spread` say how far the stages of the work stand
    apart: softmax and first product behind the logits, and the backward's three products behind each other.
    With `looped_heads` the loop goes over that many heads too, one group standing for all of them: code for long
    sequences is too large to repeat for each head. `keys_across`: the logits of the backward have queries along rows,
    see `keys_on_lanes`; every group is one head then.
    """

    length: int
    sequences: int
    tile_rows: int
    block_sequences: int
    block_lanes: int
    groups: tuple[HeadGroup, ...]
    unroll: int = 1
    lags: tuple[int, int] = (1, 4)
    looped_heads: int = 0
    spread: int = 0
    keys_across: bool = False

    @property
    def block_rows(self) -> int:
        return self.block_sequences * self.length

    @property
    def tiles(self) -> int:
        return -(-self.block_sequences // self.sequences)

    def columns(self, group: HeadGroup) -> Columns:
        return columns_of(self.tile_rows, len(group.heads))

    @property
    def is_long(self) -> bool:
        """Whether a tile holds one sequence and more than 128 rows."""
        return self.tile_rows > LANES

    @property
    def sums_queries_transposed(self) -> bool:
        """Whether products that sum over queries are made transposed.

        That pays where many rows flow through the matrix unit otherwise, unless heads share columns: what then is to
        be transposed first costs more than is saved.
        """
        return self.is_long and not any(self.columns(group).shared for group in self.groups)

    def parts(self, group: HeadGroup) -> list[slice]:
        """The columns (or rows: `Item`) in which a group's logits are made: short parts leave registers for others."""
        total = self.tile_rows if self.keys_across else self.columns(group).total
        return chunks(total)

    @property
    def items(self) -> int:
        """Parts of logits in a pass of the loop."""
        return self.unroll * sum(len(self.parts(group)) for group in self.groups)

    @property
    def steps(self) -> int:
        """Tiles of a block, once for each head that is looped over."""
        return self.tiles * max(1, self.looped_heads)

    @property
    def passes(self) -> int:
        """Of the loop over the steps."""
        return -(-self.steps // self.unroll)

    def lags_of(self, stages: int) -> list[int]:
        """How many items after its first stage each stage of an item runs."""
        first, second = self.lags
        return [0, first, *(second + self.spread * i for i in range(stages - 2))]

    def is_rolling(self, stages: int) -> bool:
        """Whether a pass of the loop ends what the pass before it began.

        That needs as many items and head groups in a pass as are under way, and groups that share no lanes, as sums of
        several are kept in registers (in VMEM where `keys_across`). With few passes, what the first does in vain costs
        more than the others gain.
        """
        shared = not (self.looped_heads or self.keys_across) and any(
            a.lane_tiles.stop > b.lane_tiles.start for a, b in itertools.pairwise(self.groups)
        )
        groups = self.unroll * len(self.groups)
        return (
            self.passes >= ROLLING_PASSES
            and not shared
            and self.items >= self.lags_of(stages)[-1]
            and groups >= self._groups_under_way(stages)
        )

    def _groups_under_way(self, stages: int) -> int:
        """Head groups whose probabilities wait at once: from the stage that writes them to the last that reads them.

        The backward of long tiles writes them in its first stage, all others in the second.
        """
        parts = min(len(self.parts(group)) for group in self.groups)
        _, second, *_, last = self.lags_of(stages)
        written = 0 if self.is_long and stages == BACKWARD_STAGES else second
        return (parts - 1 + last - written) // parts + 1

    def logits_places(self, stages: int) -> int:
        """In how many places logits wait for the vector unit."""
        return self._places(self.lags[0] + 1, self.items, stages)

    def products_places(self, stages: int) -> int:
        """In how many places a head group's probabilities wait for the matrix unit."""
        return self._places(self._groups_under_way(stages), self.unroll * len(self.groups), stages)

    def _places(self, needed: int, of: int, stages: int) -> int:
        """Where passes overlap, a divisor of what passes through them: what waits has the same place in each pass."""
        return next(n for n in range(needed, of + 1) if of % n == 0) if self.is_rolling(stages) else needed

    def waiting_shapes(self, stages: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """[places, keys, columns] of what waits for the vector unit, and of what waits for the products."""
        number, rows, columns = self.products_shape(stages)
        return (self.logits_places(stages), rows, min(columns, CHUNK)), (number, rows, columns)

    def products_shape(self, stages: int) -> tuple[int, int, int]:
        """[places, tile rows, columns] of what waits for the products."""
        width = max(self.columns(group).total for group in self.groups)
        return self.products_places(stages), self.tile_rows, width

    @property
    def head_dim(self) -> int:
        start, stop = self.groups[0].heads[0]
        return stop - start

    @property
    def heads(self) -> int:
        """Heads in a block."""
        return self.looped_heads or sum(len(group.heads) for group in self.groups)

    @property
    def statistics_lanes(self) -> int:
        """Lanes that a number for each query of a sequence takes."""
        return round_up(self.tile_rows, LANES)

    @property
    def offsets(self) -> int:
        """Number of places in a tile where its first sequence can start (0, 1, ...)."""
        return self.tile_rows - self.sequences * self.length + 1

    @property
    def rows_always_seen(self) -> slice:
        """Rows, whole registers of them, that belong to a tile's one sequence wherever it starts."""
        start = round_up(self.offsets - 1, SUBLANES)
        return slice(start, max(start, self.length // SUBLANES * SUBLANES))


def chunks(total: int) -> list[slice]:
    """So many rows or columns, `CHUNK` at a time."""
    return [slice(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]


def round_up(x: int, multiple: int) -> int:
    """`x` rounded up to a multiple."""
    return -(-x // multiple) * multiple


def batch_multiple(length: int) -> int:
    """The number of sequences whose rows together are a multiple of 8 rows."""
    return SUBLANES // math.gcd(length, SUBLANES)


def tile_of(length: int, at_most: int) -> tuple[int, int]:
    """(sequences, rows) of a tile: as many whole sequences as 128 rows always hold, but `at_most`, and at least one."""

    def rows(n: int) -> int:
        first_row_at_most = SUBLANES - math.gcd(n * length, SUBLANES)
        return round_up(n * length + first_row_at_most, 2 * SUBLANES)

    sequences = max((n for n in range(1, min(at_most, LANES // length) + 1) if rows(n) <= LANES), default=1)
    return sequences, rows(sequences)


def head_groups(num_heads: int, head_dim: int, together: int, mxu: int) -> tuple[HeadGroup, ...]:
    """Groups of at most `together` neighbouring heads whose lane window is no wider than the MXU, or a head's own."""
    groups = []
    head = 0
    while head < num_heads:
        start = head * head_dim // LANES * LANES
        last = head + 1
        while last < min(head + together, num_heads) and round_up((last + 1) * head_dim, LANES) - start <= mxu:
            last += 1
        stop = min(round_up(last * head_dim, LANES), num_heads * head_dim)
        heads = tuple((h * head_dim - start, (h + 1) * head_dim - start) for h in range(head, last))
        groups.append(HeadGroup(start, stop - start, heads))
        head = last
    return tuple(groups)


def looped_group(head_dim: int) -> HeadGroup:
    """The group that stands for every head: one head, in as many lanes as it can touch wherever it starts."""
    return HeadGroup(0, LANES if LANES % head_dim == 0 else 2 * LANES, ((0, head_dim),))


def lane_block(num_heads: int, head_dim: int, heads_wanted: int) -> int:
    """Lanes per block: the narrowest that cuts between heads at a multiple of 128 and holds `heads_wanted` heads."""
    width = num_heads * head_dim
    step = math.lcm(head_dim, LANES)
    for lanes in range(step, width, step):
        if width % lanes == 0 and lanes >= heads_wanted * head_dim:
            return lanes
    return width
